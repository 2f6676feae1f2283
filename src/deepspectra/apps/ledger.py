"""What each stage of a long computation costs, shown while it runs and kept for the report."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from deepspectra.results import Cost

Report = Callable[[int, int | None], None]


@dataclass
class Ledger:
    """Stages with their products and seconds.

    Attributes:
        gradient_seconds: seconds of one full-data gradient, the unit of cost; set when it is measured.
        show: whether to draw progress on standard error.
        costs: stage → cost, in the order they ran.
    """

    show: bool = True
    gradient_seconds: float = float("nan")
    costs: dict[str, Cost] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[Report]:
        """Time a stage; the function it yields takes (products so far, products expected or None)."""
        began = time.perf_counter()
        done = 0
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description:<34}"),
            BarColumn(bar_width=20),
            TextColumn("{task.completed:>4} products  {task.fields[spent]:>8}"),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=Console(stderr=True), disable=not self.show) as bars:
            task = bars.add_task(name, total=None, spent="")

            def report(products: int, expected: int | None) -> None:
                nonlocal done
                done = products
                spent = f"{(time.perf_counter() - began) / self.gradient_seconds:.0f} g"
                bars.update(task, completed=products, total=expected, spent=spent)

            yield report
            seconds = time.perf_counter() - began
            spent = f"{seconds / self.gradient_seconds:.0f} g"
            bars.update(task, completed=done, total=max(done, 1), spent=spent)
        self.costs[name] = self.costs.get(name, Cost(0, 0.0)) + Cost(done, seconds)

    @property
    def total(self) -> Cost:
        """All stages together."""
        return sum(self.costs.values(), Cost(0, 0.0))

    def gradients(self, cost: Cost) -> float:
        """A cost in full-data gradients."""
        return cost.seconds / self.gradient_seconds

"""What each stage of a long computation costs, shown while it runs and kept for the report."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from deepspectra.apps.kept import Kept
from deepspectra.errors import ConvergenceWarning
from deepspectra.results import Cost

Report = Callable[[int, int | None], None]
Result = TypeVar("Result")


@dataclass
class Ledger:
    """Stages with their products and seconds.

    Attributes:
        gradient_seconds: seconds of one full-data gradient, the unit of cost; set when it is measured.
        show: whether to draw progress on standard error.
        costs: stage → cost, in the order they ran.
        doubts: convergence warnings, word for word.
        taken: stages that an earlier run had finished.
        kept: where results of stages are kept, for a run that may be stopped.
    """

    show: bool = True
    gradient_seconds: float = float("nan")
    costs: dict[str, Cost] = field(default_factory=dict)
    doubts: list[str] = field(default_factory=list)
    taken: list[str] = field(default_factory=list)
    kept: Kept | None = None

    def run(self, name: str, work: Callable[[Report], Result]) -> Result:
        """The result of a stage: what `work`, called as in `stage`, returns, or what it did in a stopped run."""
        entry = None if self.kept is None else self.kept.read(name)
        if entry is None:
            doubts: list[str] = []
            with self.stage(name) as report, _noting(doubts):
                result = work(report)
            self.doubts += doubts
            if self.kept is not None:
                self.kept.write(name, (result, self.costs[name], doubts))
            return result
        earlier: Result
        earlier, self.costs[name], doubts = entry
        self.doubts += doubts
        self.taken.append(name)
        return earlier

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
        self.costs[name] = Cost(done, seconds)

    @property
    def total(self) -> Cost:
        """All stages together."""
        return sum(self.costs.values(), Cost(0, 0.0))

    def gradients(self, cost: Cost) -> float:
        """A cost in full-data gradients."""
        return cost.seconds / self.gradient_seconds


@contextmanager
def _noting(doubts: list[str]) -> Iterator[None]:
    """Collect convergence warnings for the report, and still give them."""
    caught: list[warnings.WarningMessage] = []
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    finally:
        for warning in caught:
            if issubclass(warning.category, ConvergenceWarning):
                doubts.append(str(warning.message))
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)

"""What each stage of a long computation costs, shown while it runs and kept for the report."""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from torch import Tensor

from deepspectra.errors import ConvergenceWarning
from deepspectra.problem.finished_stages import FinishedStages
from deepspectra.problem.memory_budget import return_freed
from deepspectra.results import Cost

if TYPE_CHECKING:
    from rich.progress import Progress

Report = Callable[[int, int | None], None]
Result = TypeVar("Result")
MEASURING = 1 / 20  # of the time of the stages, spent on measuring their unit
MOST_MEASURED = 7  # gradients that are timed together
RETURNED = 0.2  # seconds of a stage from which what it freed is given back to the system, in milliseconds
WARM_UP = 0.5  # seconds; a first gradient that takes longer is one like any other


@dataclass
class Ledger:
    """Stages with their products, their seconds and what these are in gradients.

    The unit, a gradient over all the data, is timed again beside each stage that is long enough to pay for it, so
    that a machine that grows busier slows both down. Both are timed in this process's own seconds on a CPU, which
    other programs do not lengthen much, and by the clock on an accelerator.

    Attributes:
        show: whether to draw progress on standard error.
        foresees: whether what is to be done is told first; every process then helps to measure it.
        gradient: computes one full-data gradient and waits for it.
        clock: in which stages and gradients are compared.
        agree: of seconds that each process measures, those that all go by.
        gradient_seconds: of the gradient that took least, by the wall clock.
        costs: stage → products and wall-clock seconds, in the order they ran.
        gradients: stage → the same in gradients; NaN before one was timed.
        doubts: convergence warnings, word for word.
        resumed: names of the stages that an earlier run had finished.
        finished: where results of stages are kept, for a run that may be stopped.
    """

    show: bool = True
    foresees: bool = True
    gradient: Callable[[], object] | None = None
    clock: Callable[[], float] = time.process_time
    agree: Callable[[float], float] = float
    gradient_seconds: float = float("inf")
    costs: dict[str, Cost] = field(default_factory=dict)
    gradients: dict[str, float] = field(default_factory=dict)
    doubts: list[str] = field(default_factory=list)
    resumed: list[str] = field(default_factory=list)
    finished: FinishedStages = field(default_factory=FinishedStages)
    _unit: float = field(default=float("nan"), init=False)
    _unpaid: float = field(default=0.0, init=False)  # seconds of stages since the unit was timed

    def run(self, name: str, work: Callable[[Report], Result], by: Tensor | None = None) -> Result:
        """The result of a stage: what `work`, called as in `stage`, returns, or what it did in a stopped run.

        Numbers that it goes `by` are those of `FinishedStages.run`.
        """
        entry = self.finished.read(name, by)
        if entry is None:
            doubts: list[str] = []
            with self.stage(name) as report, _collecting(doubts):
                result = work(report)
            self.doubts += doubts
            self.finished.write(name, (result, self.costs[name], self.gradients[name], doubts), by)
            return result
        earlier: Result
        earlier, self.costs[name], self.gradients[name], doubts = entry
        self.doubts += doubts
        self.resumed.append(name)
        return earlier

    @contextmanager
    def stage(self, name: str) -> Iterator[Report]:
        """Time a stage; the function it yields takes (products so far, products expected or None)."""
        began, began_unit, before = time.perf_counter(), self.clock(), self._unit
        done = 0
        with _bars(self.show) as bars:
            task = bars.add_task(name, total=None, spent="", left="")

            def report(products: int, expected: int | None) -> None:
                nonlocal done
                done = products
                left = _left(time.perf_counter() - began, products, expected)
                spent = self._gradients_since(began_unit)
                bars.update(task, completed=products, total=expected, spent=spent, left=left)

            yield report
            seconds, spent = time.perf_counter() - began, self.clock() - began_unit
            if seconds > RETURNED:
                return_freed()
            bars.update(task, completed=done, total=done, spent=self._gradients_since(began_unit), left="")
            self._measure_unit(spent)
        self.costs[name] = Cost(done, seconds)
        unit = self._unit if math.isnan(before) else (before + self._unit) / 2
        self.gradients[name] = spent / unit if unit else math.nan

    def _gradients_since(self, began: float) -> str:
        """How many gradients have passed, if one has been timed."""
        return f"{(self.clock() - began) / self._unit:.0f} gradients" if self._unit > 0 else ""

    def _measure_unit(self, spent: float) -> None:
        """Time the unit again, for a twentieth of what was spent since it was timed last; the median of several."""
        if self.gradient is None:
            return
        self._unpaid += self.agree(spent)
        if math.isnan(self._unit):
            seconds = [self._time_gradient()]
            if seconds[0] < WARM_UP:  # much of which happens only once
                seconds = [self._time_gradient() for _ in range(3)]
        else:
            num = int(MEASURING * self._unpaid / max(self._unit, 1e-9))
            seconds = [self._time_gradient() for _ in range(min(num, MOST_MEASURED))]
        if seconds:
            self._unit, self._unpaid = statistics.median(seconds), 0.0

    def _time_gradient(self) -> float:
        """One gradient by the ledger's clock."""
        assert self.gradient is not None
        began, began_unit = time.perf_counter(), self.clock()
        self.gradient()
        self.gradient_seconds = min(self.gradient_seconds, time.perf_counter() - began)
        return self.agree(self.clock() - began_unit)

    def tell(self, text: str) -> None:
        """Say something on standard error, if progress is shown."""
        if self.show:
            from rich.console import Console  # noqa: PLC0415  (its import takes a while)

            Console(stderr=True).print(text, highlight=False)


class Countdown:
    """Tells how long the layers that are left will take, at the pace of those that are done.

    Args:
        work: layer → how much its own is, in any unit; others count alike.
    """

    def __init__(self, work: Mapping[str, float]) -> None:
        self.work, self._last, self._first = work, -1, 0

    def left(self, done: int, total: int | None, name: str) -> str:
        """What to say before this layer, of which so many are done; "" at the first one."""
        if done <= self._last or self._last < 0:  # another round begins
            self._began, self._seen, self._first = time.perf_counter(), 0.0, done
            self._weighed = not done and name in self.work
        self._last = done
        part, whole = (
            (self._seen, sum(self.work.values()))
            if self._weighed
            else (done - self._first, (total or 0) - self._first)
        )
        self._seen += self.work.get(name, 0.0)
        return _left(time.perf_counter() - self._began, part, whole)


def _left(elapsed: float, done: float, expected: float | None) -> str:
    """How long it will go on at this pace, where it is known how much there is to do."""
    if not done or not expected or done >= expected:
        return ""
    seconds = elapsed * (expected - done) / done
    return f"{seconds:.0f} s to go" if seconds < 90 else f"{seconds / 60:.0f} min to go"


def _bars(show: bool) -> Progress:
    """Progress on standard error, or none of it."""
    from rich import progress  # noqa: PLC0415  (its import takes a while)
    from rich.console import Console  # noqa: PLC0415

    columns = (
        progress.SpinnerColumn(finished_text="✓"),
        progress.TextColumn("{task.description:<28}"),
        progress.BarColumn(bar_width=20),
        progress.TextColumn("{task.completed:>4} products  {task.fields[spent]:>13}"),
        progress.TimeElapsedColumn(),
        progress.TextColumn("{task.fields[left]}"),
    )
    return progress.Progress(*columns, console=Console(stderr=True), disable=not show)


@contextmanager
def _collecting(doubts: list[str]) -> Iterator[None]:
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

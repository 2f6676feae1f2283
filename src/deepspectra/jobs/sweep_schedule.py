"""Which tasks of a sweep run when: as many at once as fit the memory, and what came of each."""

from __future__ import annotations

import contextlib
import math
import pickle
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from deepspectra.errors import OptionError, WorkerError, first_line
from deepspectra.jobs.sweep_cell import DONE, FAILED, SUFFIX, Cell, Point, Record, Value, digest, run_task
from deepspectra.jobs.sweep_store import Store

ATTEMPTS = 3  # of a task whose process dies; after the first it is alone
REMEMBERED = 256  # latest cells, from which others are expected
MOST_AT_ONCE = 1000  # tasks in an executor that does not say how many it runs
MOST_EXPECTED = 1000  # tasks whose seconds are added up; of more, a sample
SHORTEST, LONGEST = 1e-3, 0.1  # seconds between two looks at what runs


class Job(Protocol):
    """A `concurrent.futures.Future`, or what another library has in its place."""

    def done(self) -> bool:
        """Whether it has ended."""
        ...

    def result(self) -> Any:
        """What the function returned; raises what it raised."""
        ...


class Submits(Protocol):
    """A `concurrent.futures.Executor`, or what another library has in its place."""

    def submit(self, fn: Callable[..., Any], /, *args: Any) -> Any:
        """Run a function, some time."""
        ...


@dataclass
class Task:
    """A cell, or several looks at one training.

    Attributes:
        point: axis → value, without the axis of the looks.
        looks: that axis, if there is one.
        values: those of its values that are still missing.
        need: bytes, if the cell says so.
        attempts: how many processes it ended in.
    """

    point: Point
    looks: str | None
    values: tuple[Value, ...]
    need: float | None
    attempts: int = 0

    @property
    def points(self) -> list[Point]:
        """Of its cells."""
        return [self.point] if self.looks is None else [self.point | {self.looks: v} for v in self.values]


class Experience:
    """What cells took, and what is expected of others: as much as of those that differ from them on fewest axes."""

    def __init__(self, axes: Iterable[str]) -> None:
        self.axes = tuple(axes)
        self._codes: dict[tuple[str, Value], int] = {}
        self._seen: deque[tuple[list[int], float, float]] = deque(maxlen=REMEMBERED)

    def add(self, record: Record) -> None:
        """A cell that is done; others tell nothing."""
        if record.status == DONE:
            self._seen.append((self._coded(record.point), record.seconds, record.peak_memory))

    def seconds(self, points: Sequence[Point]) -> float:
        """In all, on average; NaN if nothing is known."""
        nearest, seconds, _ = self._nearest(points)
        return float((nearest @ seconds / nearest.sum(1)).sum()) if len(seconds) else math.nan

    def memory(self, points: Sequence[Point]) -> float:
        """At most, in bytes; NaN if nothing is known, 0 if it was not measured."""
        nearest, _, peaks = self._nearest(points)
        return float((nearest * np.nan_to_num(peaks)).max()) if len(peaks) else math.nan

    def _nearest(self, points: Sequence[Point]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Which of those seen are nearest to each point (n, seen), and what these took."""
        if not self._seen or not points:
            return np.zeros((0, 0)), np.zeros(0), np.zeros(0)
        codes, seconds, peaks = map(np.array, zip(*self._seen, strict=True))
        wanted = np.array([self._coded(point) for point in points])
        same = (wanted[:, None] == codes).sum(2)
        return (same == same.max(1, keepdims=True)).astype(float), seconds, peaks

    def _coded(self, point: Point) -> list[int]:
        return [self._codes.setdefault((name, point[name]), len(self._codes)) for name in self.axes]


@dataclass
class Schedule:
    """Tasks that wait, in order, and those that run.

    Attributes:
        cell: the function.
        store: where results go.
        budget: bytes for all that run; infinite for no limit.
        unknown: bytes that a cell is taken to need before any was measured.
        experience: what earlier cells took.
        show: whether to draw progress on standard error.
        spent: seconds that cells took since it began.
    """

    cell: Cell
    store: Store
    budget: float
    unknown: float
    experience: Experience
    show: bool = True
    waiting: deque[Task] = field(default_factory=deque)
    running: dict[int, tuple[Job, Task, float]] = field(default_factory=dict)
    num_failed: int = 0
    spent: float = 0.0
    began: float = field(default_factory=time.monotonic)
    _count: int = 0

    def run(self, executor: Submits, most: int, tasks: Iterable[Task], done: int, total: int) -> None:
        """Run them all, so many at once at most; some of the cells are done before.

        Raises:
            OptionError: the cell cannot be sent to where it should run.
            WorkerError: the executor takes no more.
            FileError: a result cannot be written.
        """
        # its import takes a while
        from rich.console import Console  # noqa: PLC0415
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn  # noqa: PLC0415

        self.waiting.extend(tasks)
        columns = (
            TextColumn("sweep"),
            BarColumn(bar_width=30),
            TextColumn("{task.completed:.0f} of {task.total:.0f} cells{task.fields[said]}"),
            TimeElapsedColumn(),
        )
        with (
            self._cancelling(),
            Progress(*columns, console=Console(stderr=True), disable=not self.show) as bars,
        ):
            bar = bars.add_task("", total=total, completed=done, said="")
            pause, told = SHORTEST, -math.inf
            while self.waiting or self.running:
                self._start(executor, most)
                ended = [number for number, (job, _, _) in self.running.items() if job.done()]
                for number in ended:
                    bars.advance(bar, self._end(number))
                if time.monotonic() - told > 1:
                    bars.update(bar, said=self._told())
                    told = time.monotonic()
                pause = SHORTEST if ended else min(2 * pause, LONGEST)
                if not ended:
                    time.sleep(pause)
            bars.update(bar, said=self._told())

    @contextlib.contextmanager
    def _cancelling(self) -> Iterator[None]:
        """Call off what has not begun, if the sweep ends early."""
        try:
            yield
        except BaseException:
            for job, _, _ in self.running.values():
                with contextlib.suppress(Exception):  # of a library that cancels in another way, or never
                    job.cancel()  # type: ignore[attr-defined]
            raise

    def _start(self, executor: Submits, most: int) -> None:
        """Start tasks in their order, until one does not fit beside those that run."""
        while self.waiting and len(self.running) < most:
            task = self.waiting[0]
            need = self._need(task)
            used = sum(need for _, _, need in self.running.values())
            alone = task.attempts > 0 or any(other.attempts > 0 for _, other, _ in self.running.values())
            if self.running and (alone or used + need > self.budget):
                return
            self.waiting.popleft()
            try:
                job = executor.submit(run_task, self.cell, task.point, task.looks, task.values, str(self.store.cells))
            except (BrokenExecutor, RuntimeError) as error:  # RuntimeError: after shutdown
                raise WorkerError(
                    f"the executor takes no more tasks ({first_line(error)}). What was finished is kept; call sweep "
                    "again with another."
                ) from error
            self.running[self._count] = (job, task, need)
            self._count += 1

    def _need(self, task: Task) -> float:
        if task.need is not None:
            return task.need
        if not math.isfinite(self.budget):
            return 0.0
        expected = self.experience.memory(task.points)
        return self.unknown if math.isnan(expected) else expected

    def _end(self, number: int) -> int:
        """Keep what came of a task that has ended; returns how many cells these are."""
        job, task, _ = self.running.pop(number)
        try:
            files = job.result()
        # run_task itself raises none of these
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise OptionError(
                f"{self.cell!r} cannot be sent to the executor ({first_line(error)}). Define it at the top level "
                "of a file that can be imported."
            ) from error
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # its process died, or its machine
            return self._again(task, error)
        for name, content in files:
            self.store.keep(name, content)
        return self._learn(task)

    def _learn(self, task: Task) -> int:
        """From the cells of a task."""
        for point in task.points:
            record = Record.read(self.store.cells / f"{digest(point)}{SUFFIX}", measures=False)
            if record.status == FAILED:
                self.num_failed += 1
            else:
                self.experience.add(record)
                self.spent += record.seconds
        return len(task.points)

    def _again(self, task: Task, error: BaseException) -> int:
        """Have a task whose process died wait to be alone, or give it up."""
        there = [point for point in task.points if (self.store.cells / f"{digest(point)}{SUFFIX}").is_file()]
        missing = [point for point in task.points if point not in there]
        before = self._learn(Task(task.point, task.looks, _values(task, there), None)) if there else 0
        task.values = _values(task, missing)
        task.attempts += 1
        if not missing:
            return before
        if task.attempts < ATTEMPTS:
            self.waiting.append(task)
            return before
        reason = (
            f"{type(error).__name__}: {first_line(error)}\nIts process died in {ATTEMPTS} attempts, "
            "alone in all but the first: killed, out of memory, or by a fault in native code."
        )
        for point in missing:
            self.store.keep(f"{digest(point)}{SUFFIX}", Record(point, FAILED, reason).pack())
        return before + self._learn(task)

    def _told(self) -> str:
        """How many failed, and how long the rest takes if as much runs at once as until now."""
        failed = f", {self.num_failed} failed" if self.num_failed else ""
        unfinished = [*self.waiting, *(task for _, task, _ in self.running.values())]
        every = max(1, len(unfinished) // MOST_EXPECTED)
        left = self.experience.seconds([point for task in unfinished[::every] for point in task.points]) * every
        if not (left > 0 and self.spent > 0):
            return failed
        return f"{failed}, about {_duration(left * (time.monotonic() - self.began) / self.spent)} to go"


def _values(task: Task, points: Iterable[Point]) -> tuple[Value, ...]:
    """Those of its looks that are at these points."""
    return () if task.looks is None else tuple(point[task.looks] for point in points)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

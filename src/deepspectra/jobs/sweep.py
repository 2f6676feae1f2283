"""A function over a grid: one labelled store that survives kills, grows with the grid, and is resumed from."""

from __future__ import annotations

import inspect
import itertools
import math
import multiprocessing
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from deepspectra.errors import MemoryBudgetError, OptionError, SweepWarning, first_line
from deepspectra.jobs.executors import LocalProcesses
from deepspectra.jobs.sweep_cell import (
    FAILED,
    REFUSED,
    RESERVED,
    SUFFIX,
    Cell,
    Point,
    Record,
    Value,
    digest,
)
from deepspectra.jobs.sweep_identity import identity
from deepspectra.jobs.sweep_schedule import MOST_AT_ONCE, Experience, Schedule, Submits, Task
from deepspectra.jobs.sweep_store import Store, chosen, gather, locked, ordered
from deepspectra.problem.memory_budget import free_memory, parse_bytes

if TYPE_CHECKING:
    import xarray as xr

SHARE_OF_FREE = 0.8  # memory for the cells by default


def sweep(
    cell: Cell,
    axes: Mapping[str, Sequence[Value]],
    folder: str | Path,
    *,
    looks: str | None = None,
    executor: Submits | int | None = None,
    memory: int | str | None = None,
    retry: bool = False,
    progress: bool = True,
) -> xr.Dataset:
    """Run a function at every point of a grid, and store what it measures with its axes named.

    Each finished cell is a small file of its own, which appears whole or not at all. A sweep that was stopped,
    killed or asked for more values goes on with the cells that are missing. A cell that fails is recorded with its
    error, and the rest goes on; one whose process dies is tried again, alone.

    ``cell(**point)`` returns a mapping of names to numbers, strings or arrays. With ``looks="epochs"`` one task makes
    all cells that differ in that axis alone: ``cell`` gets the values that are missing as a tuple, numbers ascending,
    and yields one such mapping for each, in that order; what it finds at one must not depend on which others are
    asked for. The global random states of Python, NumPy and PyTorch are seeded from the point, except where cells are
    threads of one process.

    Args:
        cell: the function. If it has an attribute ``memory``, a function of the point that returns bytes, no more
            cells run at once than fit; otherwise as many as fit by what the cells most like them took. If it has an
            attribute ``version``, a text, that tells whether it is the cell of an earlier sweep in the folder; a
            bound method has that of its object. Otherwise its source does, with the arguments that are fixed,
            defaults, the variables that it closes over and its object, but not globals, nor what it calls. `ZooCell`
            is a ready one.
        axes: name → values: numbers or texts, True, False or None; no two of one label, such as 1 and "1".
        folder: of the results, made if need be.
        looks: the axis along which one task makes several cells.
        executor: a number of local processes, of a thread each, by default as many as there are CPUs; or any
            `concurrent.futures.Executor`, or what has a `submit` like one.
        memory: for all cells that run at once, bytes or text such as "8GiB"; if it is given and nothing is known of
            what they need, the first runs alone. By default four fifths of what is free for local processes, and no
            limit for another executor.
        retry: do failed cells again.
        progress: show it on standard error, with the time to go.

    Returns:
        The cells that were asked for, as `gather` describes them; the file ``sweep.nc`` in the folder has all that
        the folder holds.

    Raises:
        OptionError: axes, looks or memory that cannot be used; a cell that does not reach the executor, or that needs
            a ``version`` because what it holds cannot be written down.
        FileError: the folder holds a sweep of another cell, version or other axes, another process is at work in it,
            or it cannot be written.
        WorkerError: the executor takes no more tasks; what was finished is kept.

    Cost: some 5 ms a cell, and with local processes the seconds that importing PyTorch takes, once.
    """
    grid = _checked(axes, looks)
    _check_takes(cell, grid, looks)
    _check_parent()
    place = Path(folder)
    name, version = identity(cell)
    budget = _budget(memory, local=executor is None or isinstance(executor, int))
    with locked(place):
        store = Store(place, grid, looks=looks, cell=name, version=version)
        known, experience = store.records(), Experience(grid)
        for record in known.values():
            experience.add(record)
        tasks = list(_missing(cell, grid, looks, store, known, budget, retry))
        if tasks:
            unknown = budget if memory is not None else 0.0
            schedule = Schedule(cell, store, budget, unknown, experience, progress)
            _run(schedule, tasks, executor, math.prod(map(len, grid.values())))
            store.tidy()
        whole = gather(place)
    found = chosen(whole, grid)
    _warn_of_failures(found, place)
    return found


def _checked(axes: Mapping[str, Sequence[Value]], looks: str | None) -> dict[str, list[Value]]:
    """The axes as plain values."""
    grid = {}
    for name, values in axes.items():
        if not isinstance(name, str) or not name.isidentifier() or name in RESERVED:
            raise OptionError(f"axis {name!r}: expected a Python name, and none of {', '.join(RESERVED)}.")
        if isinstance(values, str) or not isinstance(values, Iterable) or getattr(values, "ndim", 1) == 0:
            raise OptionError(f"axis {name}={values!r}: expected a list of values.")
        grid[name] = plain = [_plain(name, value) for value in values]
        if not plain or len(set(plain)) < len(plain):
            raise OptionError(f"axis {name}={plain}: expected one value or more, none of them twice.")
    if not grid:
        raise OptionError("axes is empty; expected names and values, such as {'seed': range(3)}.")
    if looks is not None and looks not in grid:
        raise OptionError(f"looks={looks!r} is not an axis; there are {', '.join(grid)}.")
    return grid


def _plain(name: str, value: Any) -> Value:
    if isinstance(value, np.generic) or (isinstance(value, torch.Tensor) and value.numel() == 1):
        value = value.item()
    known = isinstance(value, (str, int, float, type(None)))
    if not known or (isinstance(value, float) and not math.isfinite(value)):
        raise OptionError(f"axis {name} has the value {value!r}; expected numbers, texts, True, False or None.")
    plain: Value = value
    return plain


def _check_takes(cell: Cell, grid: Mapping[str, list[Value]], looks: str | None) -> None:
    """Refuse axes that are not the cell's before any work is done."""
    try:
        signature = inspect.signature(cell)
    except (TypeError, ValueError):  # not of Python
        return
    try:
        signature.bind(**{name: values if name == looks else values[0] for name, values in grid.items()})
    except TypeError as error:
        raise OptionError(
            f"the cell takes {', '.join(signature.parameters)}; the axes are {', '.join(grid)}: {error}."
        ) from error


def _check_parent() -> None:
    """Refuse to begin in a process that is only being started to run cells."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise OptionError("sweep is called while a process starts. Put the call under `if __name__ == '__main__':`.")


def _budget(memory: int | str | None, *, local: bool) -> float:
    if memory is not None:
        return parse_bytes(memory)
    return SHARE_OF_FREE * free_memory(torch.device("cpu")) if local else math.inf


def _missing(
    cell: Cell,
    grid: Mapping[str, list[Value]],
    looks: str | None,
    store: Store,
    known: Mapping[str, Record],
    budget: float,
    retry: bool,
) -> Iterable[Task]:
    """The tasks to do, in the order of the grid; what cannot be done is recorded at once."""
    again = {REFUSED, FAILED} if retry else {REFUSED}
    outer = [name for name in grid if name != looks]
    for values in itertools.product(*(grid[name] for name in outer)):
        point = dict(zip(outer, values, strict=True))
        task = Task(point, looks, tuple(ordered(grid[looks])) if looks else (), None)
        missing = []
        for at in task.points:
            record = known.get(digest(at))
            if record is not None and record.status in again:
                store.forget(at)
                record = None
            if record is None:
                missing.append(at)
        if not missing:
            continue
        task.values = tuple(at[looks] for at in missing) if looks else ()
        try:
            task.need = _need(cell, task)
        except Exception as error:  # whatever a function of the user's may raise
            _refuse(store, missing, FAILED, f"{type(error).__name__}: {error}\nraised by its function memory")
            continue
        if task.need is not None and task.need > budget:
            text = (
                f"{MemoryBudgetError.__name__}: the cell needs {task.need / 2**30:.3g} GiB and there are "
                f"{budget / 2**30:.3g}. Raise memory=, or leave it out of the grid."
            )
            _refuse(store, missing, REFUSED, text)
            continue
        yield task


def _need(cell: Cell, task: Task) -> float | None:
    """Bytes that a cell says it needs."""
    function = getattr(cell, "memory", None)
    if function is None:
        return None
    looks = {} if task.looks is None else {task.looks: task.values}
    return float(function(**task.point, **looks))


def _refuse(store: Store, points: Iterable[Point], status: str, text: str) -> None:
    for point in points:
        store.keep(f"{digest(point)}{SUFFIX}", Record(point, status, text).pack())


def _run(schedule: Schedule, tasks: Sequence[Task], executor: Submits | int | None, total: int) -> None:
    """Run tasks in an executor that was given, or in processes that end with it."""
    done = total - sum(len(task.points) for task in tasks)
    if executor is not None and not isinstance(executor, int):
        most = getattr(executor, "_max_workers", MOST_AT_ONCE)  # of the standard library's
        schedule.run(executor, most, tasks, done, total)
        return
    num = os.cpu_count() or 1 if executor is None else executor
    if num < 1:
        raise OptionError(f"executor={executor}: expected at least one process.")
    num = min(num, len(tasks))
    own = LocalProcesses(num)
    try:
        own.check(schedule.cell)
        schedule.run(own, num, tasks, done, total)
    except BaseException:
        own.shutdown(cancel_futures=True)
        raise
    own.shutdown()


def _warn_of_failures(found: xr.Dataset, folder: Path) -> None:
    for status, advice in {
        FAILED: "Its error is in the variable error; retry=True (--retry) does it again.",
        REFUSED: "The variable error says how much they need.",
    }.items():
        errors = found.error.values[found.status.values == status].tolist()
        if errors:
            warnings.warn(
                f"{len(errors)} of {found.status.size} cells of the sweep in {folder} {status}; the first: "
                f"{first_line(ValueError(errors[0])).rstrip('.')}. {advice}",
                SweepWarning,
                stacklevel=3,
            )

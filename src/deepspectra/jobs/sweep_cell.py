"""A cell of a sweep: run where there is room for it, measured, and packed into one small file."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import random
import resource
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepspectra.errors import OptionError
from deepspectra.problem.memory_budget import return_freed
from deepspectra.results import versions

Value = str | int | float | bool | None
Point = dict[str, Value]
Cell = Callable[..., Any]
DONE, FAILED, REFUSED, MISSING = "done", "failed", "refused", "missing"
RESERVED = ("status", "error", "seconds", "peak_memory")  # variables of the store
ABOUT, MEASURE = "about", "measure:"  # in a cell's file
SUFFIX = ".npz"


@dataclass(frozen=True)
class Record:
    """What came of a cell.

    Attributes:
        point: axis → value.
        status: "done", "failed" or "refused".
        error: if it failed: type and message, then the traceback.
        seconds: since the look before, or the task's beginning.
        peak_memory: bytes resident in its process at most; NaN in a thread of a process that does other things.
        versions: of the software.
        measures: name → numbers (float64) or strings.
    """

    point: Point
    status: str
    error: str = ""
    seconds: float = math.nan
    peak_memory: float = math.nan
    versions: Mapping[str, str] = field(default_factory=versions)
    measures: Mapping[str, np.ndarray] = field(default_factory=dict)

    def pack(self) -> bytes:
        """As the content of a file."""
        about = {key: value for key, value in vars(self).items() if key != "measures"}
        arrays: dict[str, Any] = {f"{MEASURE}{name}": value for name, value in self.measures.items()}
        arrays[ABOUT] = np.array(json.dumps(about))
        file = io.BytesIO()
        np.savez(file, **arrays)
        return file.getvalue()

    @classmethod
    def read(cls, path: Path, measures: bool = True) -> Record:
        """From a file, with its measures or without."""
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            names = [name for name in file.files if name.startswith(MEASURE)] if measures else []
            found = {name.removeprefix(MEASURE): file[name] for name in names}
            return cls(**json.loads(str(file[ABOUT])), measures=found)


def digest(point: Point) -> str:
    """Of a point; the same for 1 and 1.0, and in any order of the axes."""
    plain = {name: _as_float(value) for name, value in point.items()}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:24]


def _as_float(value: Value) -> Value:
    """An integer as the float that equals it, if there is one: beyond 2^53 many have none."""
    if not isinstance(value, int) or isinstance(value, bool) or abs(value) > sys.float_info.max:
        return value
    return float(value) if float(value) == value else value


def write_once(path: Path, content: bytes) -> None:
    """Have a file appear whole, unless there is one already: the first stays."""
    staged = path.with_name(f".{uuid.uuid4().hex}.part")
    try:
        staged.write_bytes(content)
        try:
            os.link(staged, path)
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)


def run_task(
    cell: Cell, point: Point, looks: str | None, values: tuple[Value, ...], folder: str
) -> list[tuple[str, bytes]]:
    """Run one task, which is one cell, or several looks at one training, and return a file's name and content each.

    Each file is also written as soon as there is something to write, if the folder is there to be seen.
    """
    points = [point] if looks is None else [point | {looks: value} for value in values]
    files = []
    place = Path(folder)
    for record in _records(cell, point, looks, values, points):
        files.append((digest(record.point) + SUFFIX, record.pack()))
        if place.is_dir():
            with contextlib.suppress(OSError):  # whoever receives it will try again, and say what is wrong
                write_once(place / files[-1][0], files[-1][1])
    return files


def _records(
    cell: Cell, point: Point, looks: str | None, values: tuple[Value, ...], points: Sequence[Point]
) -> Iterator[Record]:
    alone = threading.current_thread() is threading.main_thread()
    with _seeded(point) if alone else contextlib.nullcontext():
        results = _results(cell, point, looks, values)
        for number, at in enumerate(points):
            began = time.perf_counter()
            if alone:
                _forget_peak()
            error, measures = "", {}
            try:
                measures = _arrays(next(results, None), at, number)
            except (Exception, SystemExit) as caught:
                error = f"{type(caught).__name__}: {caught}\n{traceback.format_exc()}"
            peak = _peak() if alone else math.nan
            seconds = time.perf_counter() - began
            yield Record(at, FAILED if error else DONE, error, seconds, peak, measures=measures)
            if error:  # of a training that stopped there is nothing more to see
                yield from (Record(later, FAILED, error) for later in points[number + 1 :])
                break
        results.close()


def _results(cell: Cell, point: Point, looks: str | None, values: tuple[Value, ...]) -> Generator[Any, None, None]:
    if looks is None:
        yield cell(**point)
        return
    found = cell(**point, **{looks: values})
    if isinstance(found, Mapping):
        raise OptionError(f"the cell gave one mapping; with looks={looks!r} it yields one for each of {values}.")
    yield from found


def _arrays(found: object, point: Point, number: int) -> dict[str, np.ndarray]:
    """The measures of a cell as arrays, if they are such as can be stored."""
    if found is None and number:
        raise OptionError(f"the cell yielded {number} looks and was asked for more.")
    if not isinstance(found, Mapping):
        raise OptionError(f"the cell gave {type(found).__name__}; expected a mapping of names to numbers or arrays.")
    arrays = {}
    for name, value in found.items():
        if (
            not isinstance(name, str)
            or not set(name) - {"."}
            or set(name) & {"/", "\0"}
            or name in {*point, *RESERVED}
        ):
            raise OptionError(
                f"the cell measures {name!r}; expected a text without '/' that is no axis and none of "
                f"{', '.join(RESERVED)}."
            )
        array = _array(value)
        if array.dtype.kind not in "biufU":
            raise OptionError(f"measure {name!r} is {type(value).__name__}; expected numbers, strings or arrays.")
        arrays[name] = array if array.dtype.kind == "U" else array.astype(np.float64)
    return arrays


def _array(value: object) -> np.ndarray:
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = value.double() if value.is_floating_point() else value  # NumPy knows no bfloat16
    found: np.ndarray = np.asarray(value)
    return found


@contextlib.contextmanager
def _seeded(point: Point) -> Iterator[None]:
    """Global random states that follow from the point alone, so that no order of the cells shows in their numbers."""
    seed = int(digest(point)[:8], 16)
    before, numpy_before = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            random.setstate(before)
            np.random.set_state(numpy_before)


def _forget_peak() -> None:
    """Have Linux measure the peak of resident memory anew; elsewhere it is that of the process's life.

    What cells before have freed and the C library keeps is resident, and not this cell's.
    """
    return_freed()
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def _peak() -> float:
    """Bytes."""
    with contextlib.suppress(OSError, StopIteration), open("/proc/self/status") as lines:
        return float(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) * 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * (1 if sys.platform == "darwin" else 1024)

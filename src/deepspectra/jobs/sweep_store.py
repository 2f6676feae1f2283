"""The folder of a sweep: a small file for each finished cell, what makes them one sweep, and all in one dataset."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deepspectra.errors import FallbackWarning, FileError, OptionError, first_line
from deepspectra.file_writing import save_whole
from deepspectra.jobs.pages import check_writable, now, save_dataset
from deepspectra.jobs.sweep_cell import (
    MISSING,
    SUFFIX,
    Point,
    Record,
    Value,
    digest,
    write_once,
)

if TYPE_CHECKING:
    import xarray as xr

STORE, MANIFEST, LOCK, CELLS = "sweep.nc", "sweep.json", "lock", "cells"
FORMAT = 1
UNITS = {"seconds": "s", "peak_memory": "bytes"}


class Store:
    """The folder of one sweep, which one process at a time adds to.

    Args:
        folder: made if need be.
        axes: name → values that are asked for, added to those that were.
        looks: the axis along which one task makes several cells.
        cell: its name, and
        version: what tells it from other programs of that name.

    Raises:
        FileError: the folder cannot be written, or holds another sweep.
        OptionError: values of an axis that cannot be told apart beside those that were.
    """

    def __init__(
        self, folder: Path, axes: Mapping[str, list[Value]], *, looks: str | None, cell: str, version: str
    ) -> None:
        self.folder, self.cells = folder, folder / CELLS
        earlier = read_manifest(folder) if (folder / MANIFEST).is_file() else None
        new: dict[str, Any] = {"cell": cell, "version": version, "looks": looks, "names": sorted(axes)}
        if earlier is not None:
            _check_same(folder, earlier, new)
        known = earlier["axes"] if earlier is not None else {name: [] for name in axes}
        for name in axes:
            _check_labels(name, [*known[name], *axes[name]])
        check_writable(self.cells)
        new["axes"] = {name: ordered([*known[name], *axes[name]]) for name in known}
        new |= {"format": FORMAT, "created": (earlier or {}).get("created", now())}
        if new != earlier:
            save_whole(folder / MANIFEST, lambda staged: staged.write_text(json.dumps(new, indent=1)))
        self.tidy()

    def tidy(self) -> None:
        """Remove half-written files of processes that were killed."""
        for staged in self.cells.glob(".*.part"):
            staged.unlink(missing_ok=True)

    def records(self) -> dict[str, Record]:
        """What is known of each cell, by its point's digest; without measures."""
        found = {}
        for path in self.cells.glob(f"*{SUFFIX}"):
            record = _read(path, measures=False)
            if record is None:
                path.unlink(missing_ok=True)
            else:
                found[path.stem] = record
        return found

    def forget(self, point: Point) -> None:
        """Have a cell be done anew."""
        (self.cells / f"{digest(point)}{SUFFIX}").unlink(missing_ok=True)

    def keep(self, name: str, content: bytes) -> None:
        """Write a cell's file, unless there is one.

        Raises:
            FileError: it cannot be written.
        """
        path = self.cells / name
        try:
            if not path.exists():
                write_once(path, content)
        except OSError as error:
            raise FileError(
                f"{path} cannot be written ({first_line(error)}). Make room, or choose another folder."
            ) from error


def gather(folder: str | Path) -> xr.Dataset:
    """The finished cells of a sweep as one dataset, written to ``sweep.nc`` beside them.

    Also of a sweep that was killed, or of one that runs: what it has so far.

    Args:
        folder: of a `sweep`.

    Returns:
        Dims are the axes, variables the measures; also ``status`` ("done", "failed", "refused": it needs more memory
        than there was, "missing"), ``error``, ``seconds`` and ``peak_memory``. Arrays have further dims, named after
        the measure, and are padded with NaN to the longest.

    Raises:
        FileError: the folder holds no sweep, or cannot be written.
    """
    place = Path(folder)
    manifest = read_manifest(place)
    paths = sorted((place / CELLS).glob(f"*{SUFFIX}"))
    records = [record for path in paths if (record := _read(path)) is not None]
    dataset = _dataset(manifest, records)
    save_dataset(dataset, place / STORE)
    return dataset


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes' sweeps out of a folder; the lock ends with its process, however that ends.

    Raises:
        FileError: another process has it, or the folder cannot be written.
    """
    check_writable(folder)
    with open(folder / LOCK, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise FileError(
                f"{folder} is at work in {file.read().strip() or 'another process'}. Wait for it, or choose another "
                "folder; deepspectra.gather reads what it has so far."
            ) from None
        except OSError as error:
            warnings.warn(
                f"{folder} is on a file system without locks ({first_line(error)}): only one sweep may use it.",
                FallbackWarning,
                stacklevel=4,
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} of {socket.gethostname()}")
        file.flush()
        yield


def read_manifest(folder: Path) -> dict[str, Any]:
    """What makes the cells of a folder one sweep.

    Raises:
        FileError: it holds none, or one that cannot be read.
    """
    path = folder / MANIFEST
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        raise FileError(f"{folder} holds no sweep: there is no {MANIFEST}.") from None
    except (OSError, ValueError) as error:
        raise FileError(f"{path} cannot be read ({first_line(error)}). Choose another folder.") from error
    if found.get("format") != FORMAT:
        raise FileError(f"{path} is of format {found.get('format')}; expected {FORMAT}. Choose another folder.")
    return found


def _check_same(folder: Path, earlier: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    differences = [
        f"{what} was {earlier[key]} and is {new[key]}"
        for key, what in {"cell": "the cell", "names": "the list of axes", "looks": "looks"}.items()
        if earlier[key] != new[key]
    ]
    if differences:
        same = len(differences) == 1 and set(new["names"]) < set(earlier["names"])
        instead = "Name the others too, each with the value that is meant, or choose" if same else "Choose"
        raise FileError(f"{folder} holds another sweep: {'; '.join(differences)}. {instead} another folder.")
    if earlier["version"] != new["version"]:
        raise FileError(
            f"the cells in {folder} are of version {earlier['version']} of {new['cell']}, which is now "
            f"{new['version']}. Choose another folder; or, if its numbers are the same, say so by "
            f"cell.version = {earlier['version']!r}, of a bound method by that of its object."
        )


def _read(path: Path, measures: bool = True) -> Record | None:
    """A cell's file; None, with a warning, if it is damaged."""
    try:
        return Record.read(path, measures)
    except MemoryError:
        raise
    except Exception as error:  # whatever reading a damaged file may raise
        warnings.warn(
            f"{path} is damaged ({first_line(error)}); its cell will be done again.",
            FallbackWarning,
            stacklevel=4,
        )
        return None


def ordered(values: Iterable[Value]) -> list[Value]:
    """Each once: numbers ascending, others as they come."""
    found = list(dict.fromkeys(values))
    return sorted(found) if _are_numbers(found) else found  # type: ignore[type-var]


def _are_numbers(values: Iterable[Value]) -> bool:
    return all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)


def _labels(values: list[Value]) -> list[Value]:
    """Of an axis: numbers as NumPy has them in one array, others as texts."""
    found: list[Value] = np.array(values).tolist() if _are_numbers(values) else [_clean(str(v)) for v in values]
    return found


def _check_labels(name: str, values: Iterable[Value]) -> None:
    """Refuse values of different cells that would have one place or label, and numbers that no file holds."""
    cells = list({digest({name: value}): value for value in values}.values())
    if _are_numbers(cells) and np.array(cells).dtype.kind == "O":
        raise OptionError(f"axis {name} has numbers that do not fit 64 bits. Take smaller ones, or texts.")
    for told in (cells, _labels(cells)):
        first: dict[Value, Value] = {}
        for value, key in zip(cells, told, strict=True):
            if first.setdefault(key, value) is not value:
                raise OptionError(
                    f"axis {name} has the values {first[key]!r} and {value!r}, which would have one label in the "
                    "results, perhaps one of an earlier sweep in the folder. Leave one out, or choose another folder."
                )


def chosen(whole: xr.Dataset, axes: Mapping[str, list[Value]]) -> xr.Dataset:
    """Some cells of a store, in an order of their own."""
    texts = {name for name in axes if whole[name].dtype.kind not in "iuf"}
    found = whole.sel({name: [_clean(str(v)) for v in vs] if name in texts else vs for name, vs in axes.items()})
    return found.assign_attrs(verdict=verdict(found.status.values))


def verdict(status: np.ndarray) -> str:
    """How many cells there are, and what became of them."""
    counts = Counter(status.ravel().tolist())
    cells = "cell" if status.size == 1 else "cells"
    return f"{status.size} {cells}: {', '.join(f'{num} {what}' for what, num in counts.items())}."


def _dataset(manifest: Mapping[str, Any], records: list[Record]) -> xr.Dataset:
    import xarray as xr  # noqa: PLC0415  (its import takes a while)

    axes: dict[str, list[Value]] = manifest["axes"]
    shape = tuple(map(len, axes.values()))
    index = {name: {value: j for j, value in enumerate(values)} for name, values in axes.items()}
    cells = [(tuple(index[name][record.point[name]] for name in axes), record) for record in records]
    status, error = np.full(shape, MISSING, dtype=object), np.full(shape, "", dtype=object)
    numbers = {name: np.full(shape, np.nan) for name in UNITS}
    for at, record in cells:
        status[at], error[at] = record.status, _clean(record.error)
        for name, values in numbers.items():
            values[at] = getattr(record, name)
    dims = tuple(axes)
    variables: dict[str, Any] = {"status": (dims, status), "error": (dims, error)}
    variables |= {name: (dims, values, {"units": UNITS[name]}) for name, values in numbers.items()}
    names = dict.fromkeys(name for _, record in cells for name in record.measures)
    for name in names:
        found = {at: record.measures[name] for at, record in cells if name in record.measures}
        values = _padded(found, shape)
        more = tuple(f"{name}_{j}" for j in range(values.ndim - len(dims)))
        while set(more) & {*names, *dims}:
            more = tuple(f"{dim}_" for dim in more)
        variables[name] = ((*dims, *more), values)
    coords = {name: _labels(values) for name, values in axes.items()}
    attributes = {
        "title": f"Sweep of {manifest['cell']}",
        "verdict": verdict(status),
        "cell": manifest["cell"],
        "version": manifest["version"],
        "looks": manifest["looks"] or "",
        "created": manifest["created"],
        "provenance": json.dumps({"versions": _distinct(record.versions for record in records)}),
    }
    return xr.Dataset(variables, coords, attributes)


def _distinct(found: Iterable[Mapping[str, str]]) -> list[dict[str, str]]:
    return [dict(pairs) for pairs in dict.fromkeys(tuple(one.items()) for one in found)]


def _padded(found: Mapping[tuple[int, ...], np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """Arrays of cells in one; strings if any holds them. Shorter ones end in NaN, or in empty strings."""
    most = max(value.ndim for value in found.values())
    values = {at: value.reshape(value.shape + (1,) * (most - value.ndim)) for at, value in found.items()}
    size = tuple(max(value.shape[j] for value in values.values()) for j in range(most))
    text = any(value.dtype.kind == "U" for value in values.values())
    table = np.full(shape + size, "", dtype=object) if text else np.full(shape + size, np.nan)
    for at, value in values.items():
        # "...", or else NumPy would put an array of one text into a place of its own kind
        index: tuple[Any, ...] = (*at, *map(slice, value.shape), ...)
        table[index] = _clean_all(value.astype(str)) if text else value
    return table


def _clean(text: str) -> str:
    """Without characters that no file of texts can hold."""
    return text.replace("\0", "").encode(errors="replace").decode()


_clean_all = np.vectorize(_clean, otypes=[object])

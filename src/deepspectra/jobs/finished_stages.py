"""Finished stages of a long computation, in a folder, so that a stopped one goes on behind the last of them.

Of an analysis the folder holds, each as NAME.pt: the identity of the computation; of every finished stage its result,
its cost and its warnings; the Krylov basis of H, in which attribution goes on; and whether G is computed exactly.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from deepspectra.analysis.attribute import Attribution
from deepspectra.analysis.gram_spectrum import GramSpectrum
from deepspectra.analysis.knockouts import Knockout
from deepspectra.errors import FileError, first_line
from deepspectra.file_writing import save_whole
from deepspectra.problem.batch_trees import map_tensors
from deepspectra.problem.parallel import ALONE, Group
from deepspectra.quadrature import Density
from deepspectra.results import Cost, Eigenpairs, Provenance, Separation
from deepspectra.rows.averages import Averages

RESULTS: list[Any] = [
    *(Attribution, Averages, Cost, Density, Eigenpairs, GramSpectrum, Knockout, Provenance, Separation)
]
IDENTITY = "identity"
SUFFIX = ".pt"
CLOSE = 1e-5  # by which sums differ between runs, orders of the data and numbers of threads
Label = str | int | float | None
Value = TypeVar("Value")


class FinishedStages:
    """A folder of results by name, all of one computation.

    Each file appears whole or not at all; none runs code when it is read.

    Args:
        folder: made if need be.
        identity: what makes the computation this one: sizes, options, digests of weights and data, the version.
        group: the processes that all do it; the first reads and writes, and tells the others.

    Raises:
        FileError: the folder holds results of another computation, or cannot be written.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Label], group: Group = ALONE) -> None:
        self.folder, self.group = folder, group
        group.of_first(lambda: self._claim(identity))

    def _claim(self, identity: Mapping[str, Label]) -> None:
        """See that what is there is of this computation, or begin."""
        earlier = self._read(IDENTITY)
        if earlier is None:
            if next(self.folder.glob(f"*{SUFFIX}"), None) is not None:
                raise FileError(f"{self.folder} holds stages and does not say of what. Remove it, or choose another.")
            self._write(IDENTITY, dict(identity))
            return
        differences = [
            f"{name} was {earlier.get(name)} and is {value}"
            for name, value in identity.items()
            if not _agree(earlier.get(name), value)
        ]
        if differences:
            raise FileError(
                f"{self.folder} holds stages of another computation: {'; '.join(differences)}. "
                "Remove it, or choose another."
            )

    def read(self, name: str) -> Any:
        """The result of this name; None if there is none."""
        return self.group.of_first(lambda: self._read(name))

    def write(self, name: str, value: object) -> None:
        """Write a result: tensors, numbers and this library's results, in dictionaries and tuples."""
        self.group.of_first(lambda: self._write(name, value))

    def write_part(self, name: str, value: object) -> None:
        """Write what this process has of a result that is spread; a folder that all see, as torchrun's own needs."""
        with self.group.summing():  # what one cannot write ends all
            self._write(f"{name} {self.group.rank}", value)

    def read_parts(self, name: str) -> Iterator[Any]:
        """What every process had of such a result, in their order, each read when it is asked for."""
        rank = 0
        while (part := self._read(f"{name} {rank}", in_place=True)) is not None:
            yield part
            rank += 1

    def _read(self, name: str, in_place: bool = False) -> Any:
        path = self._path(name)
        try:
            if not path.is_file():
                return None
            with torch.serialization.safe_globals(RESULTS):
                return torch.load(path, weights_only=True, mmap=in_place)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever unpickling a damaged file may raise
            raise FileError(
                f"{path} cannot be read ({first_line(error)}). If it is damaged, remove it to do that stage again."
            ) from error

    def _write(self, name: str, value: object) -> None:
        save_whole(self._path(name), lambda staged: torch.save(map_tensors(_of_its_size, value), staged))

    def once(self, name: str, value: Value) -> Value:
        """The value that was written first."""
        earlier: Value | None = self.read(name)
        if earlier is None:
            self.write(name, value)
            return value
        return earlier

    def _path(self, name: str) -> Path:
        return self.folder / f"{name.replace(' ', '-').replace(':', '')}{SUFFIX}"


def forget(folder: Path) -> None:
    """Remove the results in a folder, and the folder if nothing else is in it."""
    if not (folder / f"{IDENTITY}{SUFFIX}").is_file():
        return
    for path in [*folder.glob(f"*{SUFFIX}"), *folder.glob("*.part")]:
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # something else is there
        folder.rmdir()


def _of_its_size(tensor: Tensor) -> Tensor:
    """A tensor without the rest of a larger storage, which would be saved with it."""
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor


def _agree(earlier: object, value: object) -> bool:
    if isinstance(earlier, float) and isinstance(value, float):
        return math.isclose(earlier, value, rel_tol=CLOSE, abs_tol=CLOSE)
    return earlier == value

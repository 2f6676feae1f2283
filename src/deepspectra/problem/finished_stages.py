"""Finished stages of a long computation, in a folder, so that a stopped one goes on behind the last of them.

The folder holds, each as NAME.pt, the identity of the computation and the result of every finished stage: of a layer,
of a part, or of an analysis' stage with its cost and its warnings. All jobs keep theirs so, and one process too.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from deepspectra.errors import FallbackWarning, FileError, first_line
from deepspectra.file_writing import save_whole
from deepspectra.problem.batch_trees import map_tensors
from deepspectra.problem.batches import Batches
from deepspectra.problem.losses import Loss
from deepspectra.problem.parallel import ALONE, Group
from deepspectra.problem.problem import Problem
from deepspectra.quadrature import Density
from deepspectra.results import Cost, Eigenpairs, Provenance, Separation, versions


class Measured(NamedTuple):
    """A number that rounding changes from run to run, by no more than so much."""

    value: float
    within: float

    def __str__(self) -> str:
        return str(self.value)


RESULTS = (Cost, Density, Eigenpairs, Provenance, Separation)
FORM = 6  # of what is kept of a stage
IDENTITY = "identity"
SUFFIX = ".pt"
CLOSE = 1e-4  # of a loss, by which it differs between runs, orders of the data and numbers of threads
CLOSE_MARKS = 1e-7  # of the data's marks
SAME = 1e-9  # of the largest, by which numbers that stages go by differ between runs
Label = str | int | float | Measured | None
Value = TypeVar("Value")


class FinishedStages:
    """A folder of results by name, all of one computation; without a folder nothing is kept.

    Each file appears whole or not at all; none runs code when it is read.

    Args:
        folder: made if need be.
        identity: what makes the computation this one: sizes, options, digests of weights and data, the version.
        group: the processes that all do it; the first reads and writes, and tells the others.
        results: classes that results are made of, beside those of `RESULTS`.

    Raises:
        FileError: the folder holds results of another computation, or cannot be written.
    """

    def __init__(
        self,
        folder: Path | None = None,
        identity: Mapping[str, Label] | None = None,
        group: Group = ALONE,
        results: Sequence[type] = (),
    ) -> None:
        self.folder, self.group = folder, group
        self.results: list[Any] = [Measured, *RESULTS, *results]
        self._told = False  # that something is done again
        if folder is not None:
            group.of_first(lambda: self._claim(folder, identity or {}))

    def _claim(self, folder: Path, identity: Mapping[str, Label]) -> None:
        """See that what is there is of this computation, or begin."""
        earlier = self._read(folder / f"{IDENTITY}{SUFFIX}")
        if earlier is None:
            if next(folder.glob(f"*{SUFFIX}"), None) is not None:
                raise FileError(f"{folder} holds stages and does not say of what. Remove it, or choose another.")
            _save(folder / f"{IDENTITY}{SUFFIX}", dict(identity))
            return
        differences = [
            f"{name} was {earlier.get(name)} and is {value}"
            for name, value in identity.items()
            if not _agree(earlier.get(name), value)
        ]
        if differences:
            raise FileError(
                f"{folder} holds stages of another computation: {'; '.join(differences)}. "
                "Give the same data and options, choose another folder, or remove this one."
            )

    def order_of(self, batches: Batches) -> Tensor | None:
        """What a stage whose result has rows in the order of the data goes by; None where nothing is kept."""
        return None if self.folder is None else batches.order()

    def read(self, name: str, by: Tensor | None = None) -> Any:
        """The result of this name; None if there is none, or one that went by other numbers than these."""
        path = self._path(name)
        kept = None if path is None else self.group.of_first(lambda: self._read(path))
        if kept is None or by is None:
            return kept
        earlier, value = kept
        if self.group.of_first(lambda: _are_close(earlier, by)):
            return value
        if not self._told and self.group.rank == 0:
            warnings.warn(
                f"the data comes in another order than before the stop, by which the stage {name!r} goes: it is done "
                "again, and what follows from it. Data in the same order, without shuffling, go on behind it.",
                FallbackWarning,
                stacklevel=3,
            )
        self._told = True
        return None

    def write(self, name: str, value: object, by: Tensor | None = None) -> None:
        """Write a result: tensors, numbers and this library's results, in dictionaries and tuples."""
        if (path := self._path(name)) is not None:
            kept = map_tensors(_of_its_size, value)
            self.group.of_first(lambda: _save(path, kept if by is None else (by, kept)))

    def write_part(self, name: str, value: Tensor) -> None:
        """Write what this process has of a tensor that is spread, in a folder that all of them see."""
        if (path := self._path(f"{name} {self.group.rank} of {self.group.size}")) is not None:
            with self.group.summing():  # what one cannot write ends all
                _save(path, _of_its_size(value).cpu())

    def read_parts(self, name: str, num: int) -> Iterator[Tensor]:
        """What each of so many processes had of such a tensor, in their order; those that are there."""
        for rank in range(num):
            path = self._path(f"{name} {rank} of {num}")
            if path is not None and (part := self._read(path, in_place=True)) is not None:
                yield part

    def run(self, name: str, work: Callable[[], Value], by: Tensor | None = None) -> Value:
        """What `work` returns, or returned before a stop; never None. Done again if it goes by other numbers."""
        value: Value | None = self.read(name, by)
        if value is None:
            value = work()
            self.write(name, value, by)
        return value

    def once(self, name: str, value: Value) -> Value:
        """The value that was written first."""
        return self.run(name, lambda: value)

    def _read(self, path: Path, in_place: bool = False) -> Any:
        try:
            if not path.is_file():
                return None
            with torch.serialization.safe_globals(self.results):
                return torch.load(path, weights_only=True, mmap=in_place)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever unpickling a damaged file may raise
            raise FileError(
                f"{path} cannot be read ({first_line(error)}). If it is damaged, remove it to do that stage again."
            ) from error

    def _path(self, name: str) -> Path | None:
        if self.folder is None:
            return None
        return self.folder / f"{name.replace(' ', '-').replace(':', '')}{SUFFIX}"


def stages_of(
    job: str,
    problems: Sequence[Problem],
    resume: str | Path | None,
    results: Sequence[type] = (),
    **options: Label,
) -> FinishedStages:
    """Where a job on problems keeps its finished stages; nowhere if `resume` is None.

    Args:
        job: its name.
        problems: one, or several, shared by the same processes.
        resume: the folder.
        results: classes that results are made of.
        options: what else makes the computation this one.

    Raises:
        FileError: the folder holds stages of another job, problem or options.
    """
    if resume is None:
        return FinishedStages()
    identity: dict[str, Label] = {"job": job}
    for number, problem in enumerate(problems):
        which = f" of the problem {number + 1}" if number else ""
        identity |= {f"{name}{which}": value for name, value in identity_of(problem, problem.loss()).items()}
    return FinishedStages(Path(resume), identity | options, problems[0].batches.group, results)


def identity_of(problem: Problem, loss: float) -> dict[str, Label]:
    """What tells a problem from others: sizes, the version, its loss, digests of weights and data."""
    return {
        "examples": problem.num_examples,
        "classes": problem.num_classes,
        "parameters": problem.num_parameters,
        "dtype": str(problem.dtype),
        "device": str(problem.device),
        "weights": digest([*problem.model.parameters(), *problem.model.buffers()], ",".join(problem.parameter_names)),
        **marks_of(problem),
        "loss": Measured(loss, CLOSE * abs(loss)),
        "loss function": described(problem.loss_function),
        "version": versions()["deepspectra"],
        "form": FORM,
    }


def marks_of(problem: Problem, name: str = "data") -> dict[str, Label]:
    """What tells its examples from others, in whatever order."""
    first, second = problem.batches.mark
    size = math.sqrt(problem.num_examples * second)  # of Σ |u| at most
    return {
        name: Measured(first, CLOSE_MARKS * size),
        f"squares of the {name}": Measured(second, CLOSE_MARKS * second),
    }


def described(loss: Loss) -> str:
    """A loss and what was chosen of it: numbers and words, and digests of tensors."""
    chosen = {
        name: digest([value]) if isinstance(value, Tensor) else repr(value)
        for name, value in sorted(loss.settings().items())
    }
    return f"{loss.name}({', '.join(f'{name}={value}' for name, value in chosen.items())})"


def digest(tensors: Iterable[Tensor], text: str = "") -> str:
    """Of a text, and of the shapes and bytes of some tensors."""
    found = hashlib.sha256(text.encode())
    for tensor in tensors:
        found.update(str(tuple(tensor.shape)).encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def forget(folder: Path) -> None:
    """Remove the results in a folder, and the folder if nothing else is in it."""
    identity = folder / f"{IDENTITY}{SUFFIX}"
    if not identity.is_file():
        return
    stages = [path for path in folder.glob(f"*{SUFFIX}") if path != identity]
    for path in [*stages, *folder.glob("*.part"), identity]:  # stopped in between, it still says of what they are
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # something else is there
        folder.rmdir()


def _save(path: Path, value: object) -> None:
    save_whole(path, lambda staged: torch.save(value, staged))


def _of_its_size(tensor: Tensor) -> Tensor:
    """A tensor without the rest of a larger storage, which would be saved with it."""
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor


def _are_close(earlier: Tensor, numbers: Tensor) -> bool:
    """Whether they are the same numbers in the same order, up to rounding."""
    if earlier.shape != numbers.shape:
        return False
    differences, size = (earlier - numbers).abs(), numbers.abs()
    return not numbers.numel() or bool(differences.max() <= SAME * size.max())


def _agree(earlier: object, value: object) -> bool:
    if isinstance(earlier, Measured) and isinstance(value, Measured):
        return earlier == value or abs(earlier.value - value.value) <= value.within
    return earlier == value

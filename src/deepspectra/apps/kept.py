"""Finished stages of a long computation, kept in a folder so that a stopped one goes on where it was."""

from __future__ import annotations

import math
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from deepspectra.analysis.attribution import Attribution, Knockout
from deepspectra.analysis.gram import GramSpectrum
from deepspectra.errors import FileError
from deepspectra.results import Cost, Density, Eigenpairs, Provenance, Quadrature, Separation

RESULTS: list[Any] = [
    Attribution,
    Cost,
    Density,
    Eigenpairs,
    GramSpectrum,
    Knockout,
    Provenance,
    Quadrature,
    Separation,
]
IDENTITY = "identity"
LOSS_RTOL = 1e-4  # by which the mean of one loss differs between runs, batches and numbers of threads
Label = str | int | float | None


class Kept:
    """A folder of results by name, all of one computation.

    Each file appears whole or not at all; none runs code when it is read.

    Args:
        folder: made if need be.
        identity: what makes the computation this one: sizes, options, a digest of the weights, the loss.

    Raises:
        FileError: the folder holds results of another computation, or cannot be written.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Label]) -> None:
        self.folder = folder
        earlier = self.read(IDENTITY)
        if earlier is None:
            self.write(IDENTITY, dict(identity))
            return
        differences = [
            f"{name} was {earlier.get(name)} and is {value}"
            for name, value in identity.items()
            if not _agree(earlier.get(name), value)
        ]
        if differences:
            raise FileError(
                f"{folder} holds stages of another computation: {'; '.join(differences)}. "
                "Remove it, or choose another."
            )

    def read(self, name: str) -> Any:
        """The result of this name; None if there is none."""
        path = self._path(name)
        if not path.is_file():
            return None
        try:
            with torch.serialization.safe_globals(RESULTS):
                return torch.load(path, weights_only=True)
        except (OSError, RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
            raise FileError(
                f"{path} is damaged or of another version. Remove it to do that stage again."
            ) from error

    def write(self, name: str, value: object) -> None:
        """Keep a result: tensors, numbers and this library's results, in dictionaries and tuples."""
        path = self._path(name)
        staged = path.with_suffix(".part")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            torch.save(value, staged)
            staged.replace(path)
        except (OSError, RuntimeError) as error:
            raise FileError(f"{path} cannot be written: {error}") from error

    def drop(self, name: str) -> None:
        """Forget a result that is not needed any more."""
        self._path(name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name.replace(' ', '-').replace(':', '')}.pt"


def _agree(earlier: object, value: object) -> bool:
    if isinstance(earlier, float) and isinstance(value, float):
        return math.isclose(earlier, value, rel_tol=LOSS_RTOL)
    return earlier == value

"""A job's dataset and page, written side by side."""

from __future__ import annotations

import contextlib
import json
import math
import tempfile
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import xarray as xr
from safetensors import SafetensorError

from deepspectra.errors import FileError, first_line
from deepspectra.problem.problem import Problem
from deepspectra.report.page import write
from deepspectra.results import versions

ADVICE = "Choose another directory, or make room."
STEMS = ("analysis", "layers", "regions", "compare", "study")  # of what the commands save


def problem_attributes(problem: Problem) -> dict[str, object]:
    """What a file says of the problem, and when it was made."""
    return {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "loss": problem.loss_function.name,
        "num_parameters": problem.num_parameters,
        "num_examples": problem.num_examples,
        "num_classes": problem.num_classes,
        "dtype": str(problem.dtype).removeprefix("torch."),
        "device": str(problem.device),
    }


def provenance(**conditions: object) -> str:
    """How numbers were made, as JSON: the versions first, and whatever else bears on them."""
    return json.dumps({"versions": versions(), **conditions})


def measured(value: float, error: float) -> str:
    """A number to three digits, with its error to two where that shows in them."""
    if not math.isfinite(value) or not error > 5e-4 * abs(value):  # NaN too: one probe has no error
        return f"{value:.3g}" if not abs(value) >= 1000 else f"{float(f'{value:.3g}'):.0f}"
    digits = 1 - math.floor(math.log10(error))
    if digits <= 0:
        return f"{round(value, digits):.0f} ± {round(error, digits):.0f}"
    return f"{value:.{digits}f} ± {error:.{digits}f}" if digits <= 5 else f"{value:.2g} ± {error:.2g}"


def page_attributes(
    problem: Problem, *, verdict: str, subject: str, model: str, data: str, seed: int, seconds: float
) -> dict[str, object]:
    """What the page says of the problem, the job's subject ("Layers of") and its verdict."""
    model = model or type(problem.model).__name__
    return {
        "verdict": verdict,
        "title": f"{subject} {model}" + (f" on {data}" if data else ""),
        "model": model,
        "data": data,
        **problem_attributes(problem),
        "seed": seed,
        "loss_value": problem.loss(),
        "accuracy": problem.accuracy(),
        "provenance": provenance(seconds=round(seconds, 1)),
    }


def load_page(directory: str | Path) -> xr.Dataset:
    """The dataset that a command saved in a directory: an analysis, or else that of another command.

    Raises:
        FileError: there is none, or it cannot be read.
    """
    folder = Path(directory)
    path = next((folder / f"{stem}.nc" for stem in STEMS if (folder / f"{stem}.nc").is_file()), None)
    if path is None:
        raise FileError(
            f"{folder} has none of {', '.join(f'{stem}.nc' for stem in STEMS)}; nothing was saved there."
        )
    return load_dataset(path, "Run the command again.")


def load_dataset(path: Path, advice: str) -> xr.Dataset:
    """Read a NetCDF file.

    Raises:
        FileError: it is truncated, damaged or of another kind.
    """
    try:
        with xr.open_dataset(path, engine="h5netcdf") as file:
            return file.load()
    except MemoryError:
        raise
    except Exception as error:  # whatever reading a damaged file may raise
        raise FileError(f"{path} is truncated, damaged or foreign ({first_line(error)}). {advice}") from error


def save_dataset(dataset: xr.Dataset, path: Path) -> None:
    """Write a NetCDF file, with checksums of its numbers.

    Raises:
        FileError: it cannot be written.
    """
    encoding = {
        name: {"fletcher32": True, "chunksizes": one.shape}
        for name, one in dataset.variables.items()
        if one.size and one.ndim and one.dtype.kind in "fiu"
    }
    save_whole(path, lambda staged: dataset.to_netcdf(staged, engine="h5netcdf", encoding=encoding))


def save_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Have a file written beside its place and move it there, so that what fails or is killed leaves no half file.

    Raises:
        FileError: it cannot be written.
    """
    staged = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(staged)
        staged.replace(path)
    except (
        OSError,
        RuntimeError,
        SafetensorError,
    ) as error:  # RuntimeError is HDF5's, of a disk that is full
        with contextlib.suppress(OSError):
            staged.unlink(missing_ok=True)
        raise FileError(f"{path} cannot be written ({first_line(error)}). {ADVICE}") from error


def check_writable(folder: str | Path) -> None:
    """Make a folder if need be and write into it, before work is done that would be lost.

    Raises:
        FileError: it cannot be made or written.
    """
    place = Path(folder)
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"0")
    except OSError as error:
        raise FileError(f"{place} cannot be written ({error.strerror or error}). {ADVICE}") from error


def save_page(dataset: xr.Dataset, directory: str | Path, stem: str) -> Path:
    """Write STEM.nc and STEM.html into a directory, made if need be; returns the page's path.

    Raises:
        FileError: one cannot be written; the other is, if it can be.
    """
    folder = Path(directory)
    page = folder / f"{stem}.html"
    try:
        save_dataset(dataset, folder / f"{stem}.nc")
    finally:
        write(dataset, page)
    return page

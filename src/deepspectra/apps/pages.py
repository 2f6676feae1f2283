"""A job's dataset and page, written side by side."""

from __future__ import annotations

import json
from pathlib import Path

import xarray as xr

from deepspectra.apps.dataset import problem_attributes
from deepspectra.errors import FileError
from deepspectra.problem import Problem
from deepspectra.report.page import write
from deepspectra.results import versions

STEMS = ("analysis", "layers", "regions", "compare", "study")  # of what the commands save


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
        "provenance": json.dumps({"seconds": round(seconds, 1), "versions": versions()}),
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
    try:
        with xr.open_dataset(path, engine="h5netcdf") as file:
            return file.load()
    except (OSError, ValueError, KeyError) as error:
        raise FileError(f"{path} is truncated or foreign ({error}). Run the command again.") from error


def save_dataset(dataset: xr.Dataset, path: Path) -> None:
    """Write a NetCDF file beside its place and move it there, so that a killed run leaves no half file."""
    staged = path.with_name(f".{path.name}.part")
    dataset.to_netcdf(staged, engine="h5netcdf")
    staged.replace(path)


def save_page(dataset: xr.Dataset, directory: str | Path, stem: str) -> Path:
    """Write STEM.nc and STEM.html into a directory, made if need be; returns the page's path."""
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    save_dataset(dataset, folder / f"{stem}.nc")
    page = folder / f"{stem}.html"
    write(dataset, page)
    return page

"""A job's dataset and page, written side by side."""

from __future__ import annotations

import json
from pathlib import Path

import xarray as xr

from deepspectra.apps.dataset import problem_attributes
from deepspectra.problem import Problem
from deepspectra.report.page import write
from deepspectra.results import versions


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


def save_page(dataset: xr.Dataset, directory: str | Path, stem: str) -> Path:
    """Write STEM.nc and STEM.html into a directory, made if need be; returns the page's path."""
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    staged = folder / f".{stem}.nc.part"
    dataset.to_netcdf(staged, engine="h5netcdf")
    staged.replace(folder / f"{stem}.nc")
    page = folder / f"{stem}.html"
    write(dataset, page)
    return page

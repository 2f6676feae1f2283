"""A job's dataset and page, written side by side."""

from __future__ import annotations

from pathlib import Path

import xarray as xr

from deepspectra.report.page import write


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

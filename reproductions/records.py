"""Records of networks, one flat dict each: of a sweep's store, and of what was measured before there was one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from deepspectra.errors import FileError
from deepspectra.jobs.sweep_cell import DONE, SUFFIX, digest, write_once
from deepspectra.jobs.sweep_cell import Record as Cell
from deepspectra.jobs.sweep_store import CELLS, read_manifest

Record = dict[str, Any]
FITTED = 0.01  # training error up to which a network fits its data
PREFIXES = {"H": "hessian_", "G": ""}
VERSION = "cell_version"  # of a cell that is kept: its sweep's
DIGITS = 8  # of numbers that are kept as text


def of_store(found: xr.Dataset) -> list[Record]:
    """Every finished cell: its point and measures, arrays as long as they were."""
    records = []
    for at in np.argwhere(found.status.values == "done"):
        cell = found.isel(dict(zip(found.status.dims, at.tolist(), strict=True)))
        record: Record = {str(name): one.item() for name, one in cell.coords.items()}
        for name, one in cell.data_vars.items():
            values = _unpadded(one.values)
            if values.size:
                record[str(name)] = values if values.ndim else values.item()
        records.append(record)
    return records


def _unpadded(values: np.ndarray) -> np.ndarray:
    """Without empty texts and NaN at the end."""
    if not values.ndim:
        return values
    there = values != "" if values.dtype.kind == "O" else ~np.isnan(values)
    return values[: 1 + int(np.flatnonzero(there).max(initial=-1))]


def at_end(records: list[Record]) -> list[Record]:
    """Those of trained networks, in the order of the tables."""
    found = [record for record in records if record["progress"] == 1]
    return sorted(found, key=lambda r: (r["model"], r["data"], r["per_class"], r["seed"]))


def fits(record: Record) -> bool:
    """Whether a network fits its training data."""
    return 1 - float(record["accuracy"]) <= FITTED


def earlier(path: Path) -> list[Record]:
    """Records of networks that were trained by `zoo.recipe` alone and measured one by one."""
    return [_flat(json.loads(line)) for line in path.read_text().splitlines()]


def _flat(old: Record) -> Record:
    """One of those by the names of today."""
    record = {"accuracy": old["train_accuracy"], "test_accuracy": 1 - old["test_error"], "progress": 1}
    for name in ("model", "data", "per_class", "seed", "loss", "sample", "clustering"):
        record |= {name: old[name]} if name in old else {}
    for operator, prefix in PREFIXES.items():
        found = old[operator]
        record |= {f"{prefix}{name}": found[name] for name in ("outliers",)}
        record |= {f"{prefix}value": np.array(found["values"]), f"{prefix}bulk_edge": found["edge"]}
        record |= {f"{prefix}share_{name}": share for name, share in found["shares"].items()}
        record |= {f"{prefix}overlap_{level}": value for level, value in found["overlap"].items()}
        for name, (least, most) in found["left"].items():
            removed, method = name.split(", ")
            key = f"{prefix}left_{removed.replace(' + ', '_')}_{method}"
            record |= {key: least, f"{key}_at_most": most}
    for name, regions in old.get("shifts", {}).items():
        record[f"shift_{name.replace(' + ', '_')}"] = np.array(list(regions.values()))
    for layer in old.get("layers", []):
        record.setdefault("layer", []).append(layer["layer"])
        for name, value in layer.items():
            if name not in ("layer", "gradient_top"):
                record.setdefault(f"layer_{name}", []).append(np.nan if value is None else value)
    return record


def keep(store: Path, path: Path) -> None:
    """Write the finished cells of a store, a line each, so that a sweep goes on where its folder is lost."""
    version = read_manifest(store)["version"]
    found = [Cell.read(file) for file in (store / CELLS).glob(f"*{SUFFIX}")]
    lines = [json.dumps(_plain(cell, version)) for cell in found if cell.status == DONE]
    path.write_text("".join(f"{line}\n" for line in sorted(lines)))


def restore(path: Path, store: Path) -> None:
    """Put the cells that were kept into a store, but those that it has.

    Raises:
        FileError: the store is none, or cells were kept of another version than its own.
    """
    version = read_manifest(store)["version"]
    kept = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    for other in {about.pop(VERSION) for about in kept} - {version}:
        raise FileError(
            f"{path} has cells of version {other}, and the store is of version {version}. Remove the file, to "
            "measure them anew."
        )
    for about in kept:
        measures = {name: np.array(value) for name, value in about.pop("measures").items()}
        cell = Cell(status=DONE, measures=measures, **about)
        write_once(store / CELLS / f"{digest(cell.point)}{SUFFIX}", cell.pack())


def _plain(cell: Cell, version: str) -> Record:
    measures = {name: _rounded(values.tolist()) for name, values in cell.measures.items()}
    about = {name: getattr(cell, name) for name in ("point", "seconds", "peak_memory", "versions")}
    return about | {VERSION: version, "measures": measures}


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) and math.isfinite(value) else value

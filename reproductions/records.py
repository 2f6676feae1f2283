"""Records of networks, one flat dict each: of a sweep's store, and of what was measured before there was one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

Record = dict[str, Any]
FITTED = 0.01  # training error up to which a network fits its data
PREFIXES = {"H": "hessian_", "G": ""}


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
        for name, (num, _) in found["left"].items():
            removed, method = name.split(", ")
            record[f"{prefix}left_{removed.replace(' + ', '_')}_{method}"] = num
    for name, regions in old.get("shifts", {}).items():
        record[f"shift_{name.replace(' + ', '_')}"] = np.array(list(regions.values()))
    for layer in old.get("layers", []):
        record.setdefault("layer", []).append(layer["layer"])
        for name, value in layer.items():
            if name not in ("layer", "gradient_top"):
                record.setdefault(f"layer_{name}", []).append(np.nan if value is None else value)
    return record

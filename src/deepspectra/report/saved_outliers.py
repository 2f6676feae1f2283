"""What a saved analysis says: outliers, shares and knock-outs, for charts, captions and tables alike."""

from __future__ import annotations

import math

import xarray as xr

from deepspectra.report.drawing import OPERATOR_NAMES, Row, pivot, rows
from deepspectra.report.text import quantity


def outliers_left(row: Row) -> str:
    """How many outliers a knock-out leaves, in the words that fit what is known."""
    count, upper = row.get("knockout_outliers"), row.get("knockout_upper")
    if count is None or not math.isfinite(count):
        return "not counted"
    if row["knockout"] == "nothing":
        return quantity(count, "outlier")
    if upper is None or not math.isfinite(upper):
        return f"at least {count:.0f}" if count else "none found"
    if upper > count:
        return f"{count:.0f} to {upper:.0f} left"
    return f"{count:.0f} left" if count else "none left"


def outliers(dataset: xr.Dataset) -> list[Row]:
    """Outlier eigenpairs by operator and descending eigenvalue, each with its residual norm and shares."""
    names = ("eigenvalue", "is_outlier", "residual_norm")
    found = [row for row in rows(dataset, *names, need=names[:2]) if row["is_outlier"] == 1]
    shares = pivot(dataset, "share", "part", "operator", "pair")
    found.sort(key=lambda row: (list(OPERATOR_NAMES).index(row["operator"]), -row["eigenvalue"]))
    rank: dict[str, int] = {}
    for row in found:
        row["rank"] = rank[row["operator"]] = rank.get(row["operator"], 0) + 1
        own = shares.get((row["operator"], row["pair"]), {})
        row.update({f"share {part}": share for part, share in own.items()})
    return found


def mean_shares(dataset: xr.Dataset) -> dict[str, dict[str, float]]:
    """Mean share of each part over the outliers, by operator."""
    shares = pivot(dataset, "mean_share", "part", "operator")
    return {operator: means for (operator,), means in shares.items()}


def knockout_summary(dataset: xr.Dataset) -> list[Row]:
    """One record per operator, knock-out and method: largest eigenvalue left, its residual, outliers left."""
    names = ("knockout_value", "knockout_residual_norm", "knockout_outliers", "knockout_upper")
    table: dict[tuple[str, str, str], Row] = {}
    for row in rows(dataset, *names):
        key = (row["operator"], row["knockout"], row["method"])
        best = table.get(key)
        if best is None or row["knockout_value"] > best["knockout_value"]:
            table[key] = row
    first: dict[str, Row] = {}
    return [
        row for row in table.values() if row["knockout"] != "nothing" or first.setdefault(row["operator"], row) is row
    ]

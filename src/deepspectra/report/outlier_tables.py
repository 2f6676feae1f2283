"""What made each eigenvalue, as tables: parts, classes, pairs of classes, layers, each share with its error."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import xarray as xr

from deepspectra.dataframes import Math
from deepspectra.errors import DataError, OptionError
from deepspectra.report.drawing import Row, holds, rows
from deepspectra.report.text import percent

LARGEST = 5  # pairs of classes that a printed table has of each outlier


class _Of(NamedTuple):
    """Where the dataset has shares and their errors, by which axis, and of outliers alone or of all pairs."""

    share: str
    error: str
    axis: str


TABLES = {
    "pairs": _Of("share", "share_error", "part"),
    "classes": _Of("class_share", "class_share_error", "class"),
    "class_pairs": _Of("class_pair_share", "class_pair_share_error", "class"),
    "layers": _Of("layer_length", "angle_bound", "layer"),
}


def dataframe(dataset: xr.Dataset, table: str) -> Any:
    """A table with a row for each pair, or for each pair and what made it, as a `pandas.DataFrame`.

    Raises:
        OptionError: there is no such table.
        DataError: the analysis lacks its numbers.
    """
    known = _checked(dataset, table)
    names = ["eigenvalue", "error_bound", "residual_norm", "is_outlier"]
    pairs = dataset[[name for name in names if name in dataset]].to_dataframe().dropna(subset=["eigenvalue"])
    if table == "pairs":
        for name, prefix in ((known.share, "share of "), (known.error, "error of share of ")):
            if holds(dataset, name):
                pairs = pairs.join(dataset[name].to_dataset(known.axis).to_dataframe().add_prefix(prefix))
        return pairs.reset_index()
    found = {"share": dataset[known.share], "error": dataset[known.error]}
    if table == "classes":
        potential = {name: dataset[f"logit_{name}"].rename(cross_class="class") for name in ("share", "share_error")}
        found |= {"share as potential class": potential["share"], "error of that": potential["share_error"]}
    frame = xr.Dataset({name: one.drop_attrs() for name, one in found.items()}).to_dataframe()
    return pairs[["eigenvalue"]].join(frame.dropna(subset=["share"]), how="inner").reset_index()


def _checked(dataset: xr.Dataset, table: str) -> _Of:
    if table not in TABLES:
        raise OptionError(f"there is no table {table!r}; there are {', '.join(TABLES)}.")
    known = TABLES[table]
    if table != "pairs" and not holds(dataset, known.share):
        raise DataError(f"the analysis has no {known.share}: there are no classes, or no outliers.")
    return known


def wide(dataset: xr.Dataset, table: str) -> Iterator[tuple[Row, dict[str, tuple[float, float]]]]:
    """Each pair, and of what made it name → share and error (NaN if not known); of pairs of classes the largest."""
    known = TABLES[table]
    for row in rows(dataset, "eigenvalue", "error_bound", "is_outlier"):
        own = _own(dataset, known, row, LARGEST if table == "class_pairs" else None)
        if own or table == "pairs":
            yield row, own


def _own(dataset: xr.Dataset, known: _Of, row: Row, most: int | None) -> dict[str, tuple[float, float]]:
    """Name → share and error of what made a pair, the largest first if there are only to be some."""
    if not holds(dataset, known.share):
        return {}
    one = dataset.sel(operator=row["operator"]).isel(pair=row["pair"])
    share = one[known.share]
    errors = (one[known.error] if known.error in dataset else share * math.nan).broadcast_like(share).to_series()
    found = share.to_series().dropna()
    found = found if most is None else found.nlargest(most)
    return {_name(key): (float(value), float(errors[key])) for key, value in found.items()}


def _name(key: Any) -> str:
    """Of a part, a class or a layer; of a pair of classes, the true one and the potential one."""
    return " as ".join(map(str, key)) if isinstance(key, tuple) else str(key)


def share_text(share: float, error: float) -> str:
    """In per cent, with its error: a question mark if that is not known, or as large as all shares together."""
    return f"{percent(share)} ± {percent(error) if error < 1 else '?'}"


def printed(dataset: xr.Dataset, table: str) -> Any:
    """A table of H for a paper: a row a pair, a column each part, class or layer, in per cent with its error."""
    import pandas  # noqa: PLC0415  (its import takes a while)

    _checked(dataset, table)
    lines: list[dict[str, Any]] = []
    for pair, own in wide(dataset, table):
        if pair["operator"] != "hessian":
            continue
        line: dict[str, Any] = {"rank": int(pair["pair"]) + 1, "eigenvalue": pair["eigenvalue"]}
        if table == "pairs":
            line["outlier"] = "yes" if pair["is_outlier"] else "no"
        cells = {name: Math(_in_math(*one)) for name, one in own.items()}
        if table == "class_pairs":
            lines += [line | {"classes": name, "share (%)": cell} for name, cell in cells.items()]
        else:
            lines.append(line | {f"{name} (%)": cell for name, cell in cells.items()})
    return pandas.DataFrame(lines)


def _in_math(share: float, error: float) -> str:
    return f"{100 * share:.1f} \\pm {f'{100 * error:.1f}' if error < 1 else '?'}"

"""Figures of an analysis in matplotlib's axes, for papers that style all their figures alike.

Letters, lines and sizes are those of the user's `rcParams`; colours of operators and parts are those of the report.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from deepspectra.errors import DataError, OptionError
from deepspectra.report import drawing as d
from deepspectra.report.saved_outliers import knockout_summary, outliers, outliers_left
from deepspectra.report.spectrum_charts import bins_of
from deepspectra.report.text import percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMN = (3.3, 2.4)  # inches of a figure that is made here
LEAST = 0.005  # of the eigenvalues, that a legend tells of
LEFT_OUT = "#b8c1cb"  # of eigenvalues below the threshold


def plot(dataset: xr.Dataset, name: str, ax: Axes | None = None, operator: str = "hessian", **style: Any) -> Axes:
    """Draw a figure into axes, or into new ones of a column's width, and return them.

    Args:
        dataset: an analysis.
        name: "spectrum" (on a linear axis), "magnitude_spectrum" (of |λ|, on logarithmic axes), "shares" or
            "knockouts".
        ax: where to draw.
        operator: whose shares or knock-outs.
        style: of the lines of a spectrum, the bars of shares or the dots of knock-outs, as matplotlib calls it.

    Raises:
        DataError: the analysis lacks what it draws.
        OptionError: there is no such figure, or matplotlib is not installed.
    """
    if name not in FIGURES:
        raise OptionError(f"there is no figure {name!r} for matplotlib; there are {', '.join(FIGURES)}.")
    needed, draw = FIGURES[name]
    if not d.holds(dataset, needed) or (needed != "bin_mass" and not d.holds(dataset.sel(operator=operator), needed)):
        raise DataError(f"the analysis has no {needed} of {operator}, which the figure {name} draws.")
    if ax is None:
        _, ax = _pyplot().subplots(figsize=COLUMN, layout="constrained")
    draw(dataset, ax, operator, style)
    return ax


def _pyplot() -> Any:
    try:
        from matplotlib import pyplot  # noqa: PLC0415  (an extra)
    except ImportError as error:
        raise OptionError("plot needs matplotlib: pip install 'deepspectra[plot]'; save_chart does not.") from error
    return pyplot


def _spectrum(dataset: xr.Dataset, ax: Axes, _: str, style: dict[str, Any]) -> None:
    _bins(dataset, ax, "linear", style)
    ax.set(yscale="log", xlabel="eigenvalue λ", ylabel="fraction per unit of λ")


def _magnitudes(dataset: xr.Dataset, ax: Axes, _: str, style: dict[str, Any]) -> None:
    _bins(dataset, ax, "magnitude", style)
    ax.set(xscale="log", yscale="log", xlabel="|λ|", ylabel="fraction per decade of |λ|")


def _bins(dataset: xr.Dataset, ax: Axes, view: str, style: dict[str, Any]) -> None:
    """Steps where a bin is known, boxes from the least to the most that it can hold, outliers and their threshold."""
    table = [row for row in bins_of(dataset, view) if row["split"] == "train"]
    for name in d.operators_of(table):
        every = [row for row in table if row["operator"] == name]
        mine = [row for row in every if view == "linear" or row["start"] > 0]
        beside = sum(row["mass"] for row in every if row not in mine)  # in the bin that reaches down to zero
        label = d.OPERATOR_NAMES[name] + (f", {percent(beside, 0)} farther left" if beside >= LEAST else "")
        shade = d.OPERATOR_COLOURS[name]
        edges, heights = [mine[0]["start"]], []
        for row in mine:
            width = row["end"] - row["start"] if view == "linear" else math.log10(row["end"] / row["start"])
            if row["start"] > edges[-1]:  # nothing between
                heights.append(math.nan)
                edges.append(row["start"])
            known = row["high"] - row["low"] <= row["mass"] and row["mass"] > 0
            heights.append(row["mass"] / width if known else math.nan)
            edges.append(row["end"])
            if row["high"] > row["low"]:
                ends, low = row["end"] - row["start"], row["low"] / width
                ax.bar(row["start"], row["high"] / width - low, ends, low, align="edge", color=shade, alpha=0.2, lw=0)
        line: dict[str, Any] = {"color": shade, "label": label, "baseline": None} | style
        ax.stairs(heights, edges, **line)
        above = [row["eigenvalue"] for row in outliers(dataset) if row["operator"] == name]
        height = 0.03 + 0.03 * (name == "hessian")
        ax.plot(above, [height] * len(above), "o", ms=3, color=shade, transform=ax.get_xaxis_transform())
    for threshold in list(d.by_operator(dataset, "outlier_threshold").values())[:1]:
        ax.axvline(threshold, color=d.MUTED, ls="--", lw=0.8)
    ax.legend(frameon=False)


def _shares(dataset: xr.Dataset, ax: Axes, operator: str, style: dict[str, Any]) -> None:
    """A bar an outlier, negative shares to the left of zero."""
    found = [row for row in outliers(dataset) if row["operator"] == operator][: d.MOST_ROWS]
    places = np.arange(len(found))
    parts = [part for part in d.PART_COLOURS if any(f"share {part}" in row for row in found)]
    ends = {True: np.zeros(len(found)), False: np.zeros(len(found))}
    for part in parts:
        share = np.array([row.get(f"share {part}", 0.0) for row in found])
        left = np.where(share >= 0, ends[True], ends[False])
        bars: dict[str, Any] = {
            "color": d.PART_COLOURS[part],
            "label": part,
            "edgecolor": "white",
            "linewidth": 0.3,
        } | style
        ax.barh(places, 100 * share, left=100 * left, **bars)
        ends = {side: end + np.where((share >= 0) == side, share, 0) for side, end in ends.items()}
    ax.set_yticks(places, [d.number(row["eigenvalue"]) for row in found])
    ax.invert_yaxis()
    ax.set(xlabel="share of the eigenvalue (%)", ylabel="outlier λ")
    ax.legend(frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0), handlelength=1, columnspacing=1)


def _knockouts(dataset: xr.Dataset, ax: Axes, operator: str, style: dict[str, Any]) -> None:
    """A row a knock-out, a dot an eigenvalue left; to the right how many are above the threshold."""
    found = [row for row in knockout_summary(dataset) if row["operator"] == operator]
    limit = d.by_operator(dataset, "outlier_threshold").get(operator, math.inf)
    largest = max(row["knockout_value"] for row in found)
    for place, row in enumerate(found):
        at = {name: row[name] for name in ("operator", "knockout", "method")}
        left = dataset["knockout_value"].sel(at).values
        left = left[left > 1e-4 * largest]
        shades = [d.INK if value > limit else LEFT_OUT for value in left]
        dots: dict[str, Any] = {"s": 9, "c": shades, "zorder": 2} | style
        ax.scatter(left, [place] * len(left), **dots)
        ax.annotate(outliers_left(row), (1.02, place), xycoords=("axes fraction", "data"), va="center")
    ax.axvline(limit, color=d.MUTED, ls="--", lw=0.8)
    names = ["nothing" if row["knockout"] == "nothing" else f"{row['knockout']}\n{row['method']}" for row in found]
    ax.set_yticks(range(len(found)), names)
    ax.invert_yaxis()
    ax.set(xscale="log", xlabel="eigenvalues left", ylabel="removed")


Draw = Callable[[xr.Dataset, "Axes", str, dict[str, Any]], None]
FIGURES: dict[str, tuple[str, Draw]] = {
    "spectrum": ("bin_mass", _spectrum),
    "magnitude_spectrum": ("bin_mass", _magnitudes),
    "shares": ("share", _shares),
    "knockouts": ("knockout_value", _knockouts),
}

"""Charts of the spectrum: smoothed densities, outliers as lollipops, edges and thresholds, on two axes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import altair as alt
import numpy as np
import xarray as xr

from deepspectra.report.drawing import (
    MOST_ROWS,
    MUTED,
    OPERATOR_COLOURS,
    OPERATOR_NAMES,
    PART_COLOURS,
    WIDTH,
    Mark,
    Row,
    blank,
    both_sides,
    by_operator,
    colour,
    finished,
    labelled,
    log_axis,
    needs,
    number,
    operator_selector,
    operators_of,
    plain,
    rows,
    tick,
    ticks_axis,
    tip,
    word,
)
from deepspectra.report.findings import outliers

IS_SHOWN = "shown == 'all' || datum.operator == shown"
# Heights of lollipops, so that operators do not hide one another.
LANES = {"hessian": 0.34, "gauss_newton": 0.25, "residual": 0.16}


@dataclass(frozen=True)
class _Line:
    """The eigenvalue axis: where an eigenvalue is drawn, and the encoding that labels it."""

    place: Callable[[float], float]
    along: Callable[[float], float]  # as a fraction of the axis, 0 at its left end
    x: alt.X


@needs("curve_grid", "curve_density")
def spectrum(dataset: xr.Dataset) -> alt.LayerChart:
    """Densities of H, G and R over a symmetric-log eigenvalue axis, outliers as lollipops."""
    table = _points(dataset, "curve")
    found = [row["eigenvalue"] for row in outliers(dataset)]
    line = _symmetric_log(dataset, [*found, *(row["eigenvalue"] for row in table)])
    return _spectrum(dataset, table, line, "density (fraction of eigenvalues per unit of λ)")


@needs("log_grid", "log_density")
def log_spectrum(dataset: xr.Dataset) -> alt.LayerChart:
    """Densities per decade of |λ|, negative eigenvalues mirrored to the left."""
    table = _points(dataset, "log")
    for row in table:
        row["eigenvalue"] = (-1.0 if row["side"] == "negative" else 1.0) * abs(row["eigenvalue"])
    floor, _ = _density_range(dataset, table)
    seen = [row["eigenvalue"] for row in table if row["density"] > floor]
    smallest = min(abs(row["eigenvalue"]) for row in table)
    line = _mirrored_log([smallest, *seen, *(row["eigenvalue"] for row in outliers(dataset))])
    return _spectrum(dataset, table, line, "density (fraction of eigenvalues per decade of |λ|)")


def _points(dataset: xr.Dataset, curve: str) -> list[Row]:
    """Of the densities' curves of one kind."""
    grid, density, error = (f"{curve}_{end}" for end in ("grid", "density", "standard_error"))
    table = rows(dataset, grid, density, error, need=(grid, density))
    for row in table:
        row |= {"eigenvalue": row[grid], "density": row[density], "error": row.get(error) or 0.0}
    return table


def _spectrum(dataset: xr.Dataset, table: list[Row], line: _Line, title: str) -> alt.LayerChart:
    operators = operators_of(table)
    limits, coarse = (by_operator(dataset, name) for name in ("outlier_threshold", "resolved_above"))
    for row in table:
        size, name = abs(row["eigenvalue"]), row["operator"]
        row["faint"] = ""
        if size > limits.get(name, math.inf):  # there the lollipops tell it better
            row["faint"] = "above" if row["eigenvalue"] > 0 else "below"
        elif size <= coarse.get(name, 0.0):
            row["faint"] = "unresolved"
        row["error"] *= 2
    curves = _curves(labelled(table), operators, line, _density_range(dataset, table), title)
    above = [*_lollipops(dataset, line), *_edges(dataset, operators, line)]
    layers = [curves, alt.layer(*above)] if above else [curves]
    selector = operator_selector(operators, everything=True)
    chart = alt.layer(*layers).resolve_scale(y="independent").add_params(selector)
    return finished(chart, width=WIDTH, height=340)


def _density_range(dataset: xr.Dataset, table: list[Row]) -> tuple[float, float]:
    """From a tenth of one eigenvalue spread over the axis (nine decades down at most) to above the peak."""
    densities = [row["density"] for row in table if row["density"] > 0]
    peak = max(densities, default=1.0)
    spread = max((abs(row["eigenvalue"]) for row in table), default=1.0)
    num_parameters = int(dataset.attrs.get("num_parameters", 1))
    smallest = max(0.1 / num_parameters / max(spread, 1.0), peak * 1e-9)
    low = 10.0 ** math.floor(math.log10(smallest))
    return low, peak * (peak / low) ** 0.12


def _curves(
    table: list[Row], operators: list[str], line: _Line, span: tuple[float, float], title: str
) -> Mark:
    low, high = span
    keep = ("operator", "label", "side", "eigenvalue", "density", "error", "faint")
    points = [{key: row[key] for key in keep if key in row} for row in table]
    for row in points:
        density, error = row["density"], row.pop("error")
        row["x"] = plain(line.place(row["eigenvalue"]))
        row["upper"] = plain(max(density + error, low / 10))
        row["lower"] = plain(max(density - error, low / 10))
        row["density"] = plain(max(density, low / 10))
    scale = alt.Scale(type="log", domain=[low, high], nice=False)
    y = alt.Y("density:Q", scale=scale, axis=log_axis(low, high, title=title))
    shade = colour({OPERATOR_NAMES[name]: OPERATOR_COLOURS[name] for name in operators})
    base = alt.Chart().transform_filter(IS_SHOWN).encode(x=line.x, color=shade, detail=["side:N", "faint:N"])
    faded = alt.condition("datum.faint != ''", alt.value(0.3), alt.value(1))
    band = base.mark_area(opacity=0.22, clip=True).encode(y=alt.Y("lower:Q", scale=scale), y2="upper:Q")
    curve = base.mark_line(strokeWidth=1.6, clip=True).encode(
        y=y, opacity=faded, tooltip=["label:N", tip("eigenvalue", "λ"), tip("density", "density")]
    )
    return alt.layer(band, curve, data={"values": points})  # added last: chained calls copy their data


def _lollipops(dataset: xr.Dataset, line: _Line) -> list[Mark]:
    found = labelled(outliers(dataset))
    if not found:
        return []
    parts = [part for part in PART_COLOURS if any(f"share {part}" in row for row in found)]
    for row in found:
        row |= {"x": plain(line.place(row["eigenvalue"])), "lane": LANES[row["operator"]]}
    base = blank(found).transform_filter(IS_SHOWN)
    base = base.encode(
        x=line.x,
        y=alt.Y("lane:Q", scale=alt.Scale(domain=[0, 1]), axis=None),
        color=alt.Color("label:N", sort=None),
        tooltip=[
            word("label", "outlier of"),
            tip("rank", "rank"),
            tip("eigenvalue", "λ", ".4~g"),
            tip("residual_norm", "‖Av − λv‖", ".2~g"),
            *(tip(f"share {part}", part, ".1~%") for part in parts),
        ],
    )
    crowded = len(found) > 2 * MOST_ROWS
    stem = base.mark_rule(strokeWidth=1.2, opacity=0.2 if crowded else 0.7).encode(y2=alt.datum(0))
    dot = base.mark_circle(
        size=20 if crowded else 70, opacity=1, stroke="white", strokeWidth=0.3 if crowded else 1
    )
    return [stem, dot]


def _edges(dataset: xr.Dataset, operators: list[str], line: _Line) -> list[Mark]:
    """Bulk edge and outlier threshold of the selected operator (of the first one when all are shown)."""
    names = {"bulk_edge": "bulk edge", "outlier_threshold": "outlier threshold"}
    table = []
    for name, text in names.items():
        for operator, value in by_operator(dataset, name).items():
            late = line.along(value) > 0.62  # no room for a label to its right
            edge = {"operator": operator, "x": plain(line.place(value)), "kind": name}
            edge |= {"text": f"{text} {number(value)}", "left": late or name == "bulk_edge"}
            table.append(edge | {"height": 22 if late and name == "bulk_edge" else 8})
    base = blank([row for row in table if row["operator"] in operators]).encode(x=line.x)
    base = base.transform_filter(f"datum.operator == (shown == 'all' ? '{operators[0]}' : shown)")
    dash = alt.StrokeDash("kind:N", scale=alt.Scale(domain=list(names), range=[[2, 2], [6, 3]]), legend=None)
    marks = [base.mark_rule(color=MUTED).encode(strokeDash=dash)]
    for side, align, offset in ((True, "right", -5), (False, "left", 5)):
        for halo in ({"stroke": "white", "strokeWidth": 4}, {"color": MUTED}):
            text = base.transform_filter(f"datum.left == {str(side).lower()}").mark_text(
                align=align, dx=offset, fontSize=11, **halo
            )
            height = alt.Y("height:Q", scale=None, axis=None)
            marks.append(text.encode(y=height, text="text:N"))
    return marks if table else []


def _symmetric_log(dataset: xr.Dataset, eigenvalues: Sequence[float]) -> _Line:
    """Linear within ± the grid's own resolution, logarithmic outside."""
    resolution = float(np.nanmedian(np.abs(np.diff(dataset["curve_grid"].values, axis=-1))))
    low, high = min(eigenvalues), max(eigenvalues)
    constant = 10.0 ** round(math.log10(max(resolution, max(abs(low), abs(high)) * 1e-6)))
    ticks = both_sides(low, high, constant * 10)

    def along(value: float) -> float:
        first, here, last = (math.copysign(math.log1p(abs(x / constant)), x) for x in (low, value, high))
        return (here - first) / (last - first)

    x = alt.X(
        "x:Q",
        scale=alt.Scale(type="symlog", constant=constant, domain=[low, high], nice=False),
        axis=ticks_axis(ticks, [tick(value) for value in ticks], title="eigenvalue λ (symmetric-log axis)"),
    )
    return _Line(lambda value: value, along, x)


def _mirrored_log(eigenvalues: Sequence[float]) -> _Line:
    """Distance from the centre is log₁₀|λ|; the centre is the smallest |λ| of the grid."""
    smallest = min(abs(value) for value in eigenvalues if value)
    low = min([-smallest, *eigenvalues])
    high = max([smallest, *eigenvalues])

    def place(value: float) -> float:
        return math.copysign(math.log10(max(abs(value) / smallest, 1.0)), value)

    def along(value: float) -> float:
        return (place(value) - place(low)) / (place(high) - place(low))

    ticks = both_sides(low, high, smallest * 3)
    labels = [tick(value) if value else f"±{tick(float(f'{smallest:.1g}'))}" for value in ticks]
    x = alt.X(
        "x:Q",
        scale=alt.Scale(domain=[place(low), place(high)], nice=False),
        axis=ticks_axis(
            [place(value) for value in ticks], labels, title="eigenvalue λ (logarithmic on both sides)"
        ),
    )
    return _Line(place, along, x)

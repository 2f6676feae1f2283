"""Charts of a layer-by-layer analysis: spectra, shares, products of means and neural collapse with depth."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import altair as alt
import xarray as xr

from deepspectra.report.drawing import (
    INK,
    LEVEL_COLOURS,
    LEVEL_NAMES,
    MUTED,
    OPERATOR_COLOURS,
    OVERLAP,
    PART_COLOURS,
    WIDTH,
    Mark,
    Row,
    blank,
    choice,
    colour,
    finished,
    joined_points,
    log_axis,
    needs,
    pivot,
    rows,
    ticks_axis,
    tip,
    word,
)

LAYER_COLOURS = {**PART_COLOURS, "mean": "#7a7a7a"}
KIND_LABELS = {
    "features": "Features",
    "errors": "Backpropagated errors",
    "gradients": "Gradients",
    "centred": "Gradients without the mean feature",
}
STATISTICS = {  # with their labels and colours, as MEASURES and SERIES
    "class_cosine": (LEVEL_NAMES["class"], LEVEL_COLOURS["class"]),
    "cross_cosine": (LEVEL_NAMES["cross_class"], LEVEL_COLOURS["cross_class"]),
    "logit_cosine": ("logit means", PART_COLOURS["logit"]),
}
MEASURES = {
    "nc1": ("NC1: scatter within classes over that between", INK),
    "nc2_norms": ("NC2: spread of the norms of class means", "#0072B2"),
    "nc2_simplex": ("NC2: distance of their angles from a simplex", "#E69F00"),
    "nc4": ("NC4: decisions other than the nearest class mean's", "#D55E00"),
}
FIT_LABELS = {
    "frobenius": "‖G − K‖_F / ‖G‖_F",
    "spectral": "‖G − K‖₂ / ‖G‖₂",
    "decades": "distance of spectra, decades",
    "cosine": "cosine",
}
KIND_COLOURS = {"kfac": "#0072B2", "ekfac": "#E69F00", "cfac": "#009E73", "optimal": INK}
SERIES = {
    "gauss_newton": ("block of G", OPERATOR_COLOURS["gauss_newton"]),
    "hessian_positive": ("of H where it differs", INK),
    "hessian_negative": ("of H, below zero", "#D55E00"),
}
ROW_HEIGHT, MARK_HEIGHT = 0.86, 0.3  # of a layer's highest curve, and of a mark for an eigenvalue, in rows
MARKED = 0.02  # of a layer's largest eigenvalue: those above are marked one by one
MOST_DECADES = 16  # ticks of an axis that is cut to what is shown
LOWEST = 1e-6  # of a spectrum's largest eigenvalue; smaller ones are not drawn


def _chosen_kind(marks: Mark, table: list[Row], height: int) -> alt.LayerChart:
    """Marks with a choice of features, errors or gradients: buttons on the page, gradients in a still picture."""
    present = _present(table, "kind", KIND_LABELS)
    first = "gradients" if "gradients" in present else present[0]
    chosen = choice("kind", {kind: KIND_LABELS[kind] for kind in present}, first=first)
    drawn = alt.layer(marks).transform_filter("datum.kind === kind").add_params(chosen)
    return finished(drawn, width=WIDTH, height=height)


def _present(table: list[Row], name: str, known: Iterable[str]) -> list[str]:
    """Which of the names that are known occur in a column."""
    there = {row[name] for row in table}
    return [one for one in known if one in there]


def _part_colour(table: list[Row]) -> alt.Color:
    return colour({part: LAYER_COLOURS[part] for part in _present(table, "label", LAYER_COLOURS)})


def depth_axis(dataset: xr.Dataset, dimension: str = "layer") -> alt.X:
    """Layers from input to output."""
    names = [str(name) for name in dataset[dimension].values]
    axis = alt.Axis(labelAngle=-40, labelLimit=160, grid=False)
    return alt.X(f"{dimension}:N", sort=names, title="layer, from input to output", axis=axis)


@needs("layer_eigenvalue", "layer_share")
def layer_spectra(dataset: xr.Dataset) -> alt.LayerChart:
    """The largest eigenvalues of every layer, each in the colour of the part that has most of it."""
    shares = pivot(dataset, "layer_share", "layer_part", "layer", "kind", "rank")
    tops: dict[tuple[Any, ...], float] = {}
    table: list[Row] = []
    for row in rows(dataset, "layer_eigenvalue"):
        place = (row["layer"], row["kind"])
        tops.setdefault(place, row["layer_eigenvalue"])
        owners = shares.get((*place, row["rank"]), {})
        if row["layer_eigenvalue"] <= LOWEST * tops[place] or not owners:
            continue
        part = max(owners, key=lambda name: owners[name])
        table.append(row | {"label": part, "share": owners[part]})
    values = [row["layer_eigenvalue"] for row in table]
    low, high = min(values), max(values)
    y = alt.Y(
        "layer_eigenvalue:Q",
        scale=alt.Scale(type="log", padding=8),  # over what is shown, so that each kind fills the chart
        axis=log_axis(low / 2, high * 2, most=MOST_DECADES, title="eigenvalue"),
    )
    dots = blank(table).mark_tick(thickness=2.2, bandSize=16)
    dots = dots.encode(
        x=depth_axis(dataset),
        y=y,
        color=_part_colour(table),
        tooltip=[
            word("layer", "layer"),
            alt.Tooltip("rank:Q", title="rank, from 0"),
            tip("layer_eigenvalue", "λ"),
            word("label", "most of it"),
            tip("share", "its share", ".0%"),
        ],
    )
    return _chosen_kind(dots, table, height=340)


@needs("layer_trace")
def layer_traces(dataset: xr.Dataset) -> alt.LayerChart:
    """How the trace of every layer splits into the parts."""
    table, order = rows(dataset, "layer_trace"), list(LAYER_COLOURS)
    traces = pivot(dataset, "layer_trace", "layer_part", "layer", "kind")
    for row in table:
        total = sum(traces[row["layer"], row["kind"]].values()) or 1.0
        row |= {"label": row["layer_part"], "order": order.index(row["layer_part"])}
        row["share"] = row["layer_trace"] / total
    axis, scale = alt.Axis(format="%"), alt.Scale(domain=[0, 1])
    bars = blank(table).mark_bar(size=16)
    bars = bars.encode(
        x=depth_axis(dataset),
        y=alt.Y("share:Q", title="share of the trace", axis=axis, scale=scale),
        color=_part_colour(table),
        order=alt.Order("order:Q"),
        tooltip=[word("layer", "layer"), word("label", "part"), tip("share", "share", ".1%")],
    )
    return _chosen_kind(bars, table, height=260)


@needs("khatri_rao")
def layer_products(dataset: xr.Dataset) -> alt.LayerChart:
    """Cosines between means of gradients and products of means of features and errors."""
    found = pivot(dataset, "khatri_rao", "moment", "layer", "statistic")
    table = [
        row
        | {"layer": layer, "statistic": name, "label": STATISTICS[name][0]}
        | {"low": row["mean"] - row["deviation"], "high": min(1.0, row["mean"] + row["deviation"])}
        for (layer, name), row in found.items()
        if name in STATISTICS
    ]
    base = blank(table).encode(x=depth_axis(dataset), color=colour(dict(STATISTICS.values())))
    bars = base.mark_rule(opacity=0.45, strokeWidth=2).encode(
        y=alt.Y("low:Q", title="cosine", scale=alt.Scale(domainMax=1)), y2="high:Q"
    )
    dots = base.mark_point(filled=True, size=55).encode(
        y="mean:Q",
        tooltip=[
            word("layer", "layer"),
            word("label", "of"),
            tip("mean", "mean cosine", ".3f"),
            tip("deviation", "standard deviation", ".3f"),
        ],
    )
    return finished(alt.layer(bars, dots), width=WIDTH, height=240)


@needs("collapse")
def layer_collapse(dataset: xr.Dataset) -> alt.LayerChart:
    """Neural collapse with depth."""
    table = [
        row | {"label": MEASURES[row["measure"]][0]}
        for row in rows(dataset, "collapse")
        if row["measure"] in MEASURES and row["collapse"] > 0
    ]
    shown = dict(MEASURES[name] for name in _present(table, "measure", MEASURES))
    values = [row["collapse"] for row in table]
    low, high = min(values), max(values)
    lines = joined_points(
        table,
        x=depth_axis(dataset),
        y=alt.Y(
            "collapse:Q",
            scale=alt.Scale(type="log", domainMin=low / 1.5, domainMax=high * 1.5),
            axis=log_axis(low / 1.5, high * 1.5, title="measure"),
        ),
        color=colour(shown, columns=2),
        tooltip=[word("layer", "layer"), word("label", "measure"), tip("collapse", "value")],
    )
    rule = blank([{"one": 1}]).mark_rule(color=MUTED, strokeDash=[4, 4]).encode(y="one:Q")
    return finished(alt.layer(*([rule] if low < 1 < high else []), lines), width=WIDTH, height=260)


@needs("kronecker_fit")
def kronecker_fits(dataset: xr.Dataset) -> alt.LayerChart:
    """How far Kronecker-factored approximations are from each layer's block of G, in a measure to choose."""
    table, shade = _approximations(dataset, "kronecker_fit")
    table = [row for row in table if row["fit"] in FIT_LABELS]
    lines = joined_points(
        table,
        x=depth_axis(dataset, "block"),
        y=alt.Y("kronecker_fit:Q", title="chosen measure", scale=alt.Scale(domainMin=0)),
        color=shade,
        tooltip=[word("block", "layer"), word("label", "approximation"), tip("kronecker_fit", "value")],
    ).transform_filter("datum.fit === fit")
    return finished(alt.layer(lines).add_params(choice("fit", FIT_LABELS)), width=WIDTH, height=260)


@needs("kronecker_overlap")
def kronecker_overlaps(dataset: xr.Dataset) -> alt.LayerChart:
    """Overlap of the top eigenspaces of approximations with those of G's blocks."""
    table, shade = _approximations(dataset, "kronecker_overlap")
    names = [str(name) for name in dataset["block"].values]
    block = choice("block", names, first=names[-1], menu="layer ")
    sizes = alt.Axis(values=[int(k) for k in dataset["size"].values], format="d")
    lines = joined_points(
        table,
        x=alt.X("size:Q", title="dimension k", scale=alt.Scale(type="log", nice=False), axis=sizes),
        y=alt.Y("kronecker_overlap:Q", title=OVERLAP, scale=alt.Scale(domain=[0, 1])),
        color=shade,
        tooltip=[
            word("label", "approximation"),
            alt.Tooltip("size:Q", title="k"),
            tip("kronecker_overlap", "overlap", ".3f"),
        ],
    ).transform_filter("datum.block === block")
    return finished(alt.layer(lines).add_params(block), width=WIDTH, height=220)


def _approximations(dataset: xr.Dataset, name: str) -> tuple[list[Row], alt.Color]:
    """A variable's rows with the names of the approximations, and their colours."""
    table = [row | {"label": row["approximation"].upper()} for row in rows(dataset, name)]
    kinds = [str(kind) for kind in dataset["approximation"].values]
    return table, colour({kind.upper(): KIND_COLOURS.get(kind, MUTED) for kind in kinds})


@needs("layer_density", "layer_density_grid")
def layer_densities(dataset: xr.Dataset) -> alt.LayerChart:
    """Densities of each layer's blocks of G and H, one row a layer."""
    names = [str(name) for name in dataset["layer"].values]
    table = rows(dataset, "layer_density", "layer_density_grid")
    base = {name: float(len(names) - 1 - j) for j, name in enumerate(names)}
    highest: dict[str, float] = {}
    for row in table:
        highest[row["layer"]] = max(row["layer_density"], highest.get(row["layer"], 0.0))
    for row in table:
        row["base"] = base[row["layer"]]
        row["top"] = row["base"] + ROW_HEIGHT * row["layer_density"] / highest[row["layer"]]
        row["label"], _ = SERIES[row["series"]]
    values = [row["layer_density_grid"] for row in table]
    x = alt.X(
        "layer_density_grid:Q",
        scale=alt.Scale(type="log", nice=False),
        axis=log_axis(min(values), max(values), most=MOST_DECADES, title="|eigenvalue|"),
    )
    axis = ticks_axis(list(base.values()), names, title=None, grid=True, labelOverlap=False, labelLimit=150)
    y = alt.Y("base:Q", scale=alt.Scale(domain=[0, len(names)]), axis=axis)
    shade = colour(dict(SERIES[name] for name in _present(table, "series", SERIES)))
    filled = blank([row for row in table if row["series"] == "gauss_newton"])
    areas = filled.mark_area(opacity=0.3).encode(x=x, y=y, y2="top:Q", color=shade, detail="layer:N")
    tooltip = [word("layer", "layer"), word("label", "block of")]
    tooltip += [tip("layer_density_grid", "|λ|"), tip("layer_density", "mass per decade")]
    lines = blank(table).mark_line(strokeWidth=1.4)
    lines = lines.encode(x=x, y=alt.Y("top:Q", title=None), color=shade, detail="layer:N", tooltip=tooltip)
    found = [row for row in rows(dataset, "layer_eigenvalue") if row["kind"] == "gradients"]
    largest = {row["layer"]: row["layer_eigenvalue"] for row in found if row["rank"] == 0}
    marks = [
        {
            "layer": row["layer"],
            "value": row["layer_eigenvalue"],
            "base": base[row["layer"]],
            "top": base[row["layer"]] + MARK_HEIGHT,
        }
        for row in found
        if row["layer_eigenvalue"] > MARKED * largest[row["layer"]]
    ]
    ticks = blank(marks).mark_rule(color=OPERATOR_COLOURS["gauss_newton"], strokeWidth=1)
    tooltip = [word("layer", "layer"), tip("value", "λ of G")]
    ticks = ticks.encode(x="value:Q", y="base:Q", y2="top:Q", tooltip=tooltip)
    return finished(alt.layer(areas, lines, ticks), width=WIDTH, height=30 + 44 * len(names))

"""Charts of a layer-by-layer analysis: spectra, shares, products of means and neural collapse with depth."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import altair as alt
import xarray as xr

from deepspectra.report import drawing as d

LAYER_COLOURS = {**d.PART_COLOURS, "mean": "#7a7a7a"}
KIND_LABELS = {
    "features": "Features",
    "errors": "Backpropagated errors",
    "gradients": "Gradients",
    "centred": "Gradients without the mean feature",
}
STATISTICS = {  # with their labels and colours, as MEASURES and SERIES
    "class_cosine": (d.LEVEL_NAMES["class"], d.LEVEL_COLOURS["class"]),
    "cross_cosine": (d.LEVEL_NAMES["cross_class"], d.LEVEL_COLOURS["cross_class"]),
    "logit_cosine": ("logit means", d.PART_COLOURS["logit"]),
}
MEASURES = {
    "nc1": ("NC1: scatter within classes over that between", d.INK),
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
KIND_COLOURS = {"kfac": "#0072B2", "ekfac": "#E69F00", "cfac": "#009E73", "optimal": d.INK}
SERIES = {
    "gauss_newton": ("block of G", d.OPERATOR_COLOURS["gauss_newton"]),
    "hessian_positive": ("of H where it differs", d.INK),
    "hessian_negative": ("of H, below zero", "#D55E00"),
}
ROW_HEIGHT, MARK_HEIGHT = 0.86, 0.3  # of a layer's highest curve, and of a mark for an eigenvalue, in rows
MARKED = 0.02  # of a layer's largest eigenvalue: those above are marked one by one
MOST_DECADES = 16  # ticks of an axis that is cut to what is shown
LOWEST = 1e-6  # of a spectrum's largest eigenvalue; smaller ones are not drawn


def _chosen_kind(marks: d.Mark, table: list[d.Row], height: int) -> alt.LayerChart:
    """Marks with a choice of features, errors or gradients: buttons on the page, gradients in a still picture."""
    present = _present(table, "kind", KIND_LABELS)
    first = "gradients" if "gradients" in present else present[0]
    chosen = d.choice("kind", {kind: KIND_LABELS[kind] for kind in present}, first=first)
    drawn = d.layered(marks, choices=[chosen], transform=[alt.FilterTransform("datum.kind === kind")])
    return d.finished(drawn, width=d.WIDTH, height=height)


def _present(table: list[d.Row], name: str, known: Iterable[str]) -> list[str]:
    """Which of the names that are known occur in a column."""
    there = {row[name] for row in table}
    return [one for one in known if one in there]


def _part_colour(table: list[d.Row]) -> alt.Color:
    return d.colour({part: LAYER_COLOURS[part] for part in _present(table, "label", LAYER_COLOURS)})


def depth_axis(dataset: xr.Dataset, dimension: str = "layer") -> alt.X:
    """Layers from input to output."""
    names = [str(name) for name in dataset[dimension].values]
    axis = alt.Axis(labelAngle=-40, labelLimit=160, grid=False)
    return alt.X(f"{dimension}:N", sort=names, title="layer, from input to output", axis=axis)


@d.needs("layer_eigenvalue", "layer_share")
def layer_spectra(dataset: xr.Dataset) -> alt.LayerChart:
    """The largest eigenvalues of every layer, each in the colour of the part that has most of it."""
    shares = d.pivot(dataset, "layer_share", "layer_part", "layer", "kind", "rank")
    tops: dict[tuple[Any, ...], float] = {}
    table: list[d.Row] = []
    for row in d.rows(dataset, "layer_eigenvalue"):
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
        axis=d.log_axis(low / 2, high * 2, most=MOST_DECADES, title="eigenvalue"),
    )
    dots = d.blank(table).mark_tick(thickness=2.2, bandSize=16)
    dots = dots.encode(
        x=depth_axis(dataset),
        y=y,
        color=_part_colour(table),
        tooltip=[
            d.word("layer", "layer"),
            alt.Tooltip("rank:Q", title="rank, from 0"),
            d.tip("layer_eigenvalue", "λ"),
            d.word("label", "most of it"),
            d.tip("share", "its share", ".0%"),
        ],
    )
    return _chosen_kind(dots, table, height=340)


@d.needs("layer_trace")
def layer_traces(dataset: xr.Dataset) -> alt.LayerChart:
    """How the trace of every layer splits into the parts."""
    table, order = d.rows(dataset, "layer_trace"), list(LAYER_COLOURS)
    traces = d.pivot(dataset, "layer_trace", "layer_part", "layer", "kind")
    for row in table:
        total = sum(traces[row["layer"], row["kind"]].values()) or 1.0
        row |= {"label": row["layer_part"], "order": order.index(row["layer_part"])}
        row["share"] = row["layer_trace"] / total
    axis, scale = alt.Axis(format="%"), alt.Scale(domain=[0, 1])
    bars = d.blank(table).mark_bar(size=16)
    bars = bars.encode(
        x=depth_axis(dataset),
        y=alt.Y("share:Q", title="share of the trace", axis=axis, scale=scale),
        color=_part_colour(table),
        order=alt.Order("order:Q"),
        tooltip=[d.word("layer", "layer"), d.word("label", "part"), d.tip("share", "share", ".1%")],
    )
    return _chosen_kind(bars, table, height=260)


@d.needs("khatri_rao")
def layer_products(dataset: xr.Dataset) -> alt.LayerChart:
    """Cosines between means of gradients and products of means of features and errors."""
    found = d.pivot(dataset, "khatri_rao", "moment", "layer", "statistic")
    table = [
        row
        | {"layer": layer, "statistic": name, "label": STATISTICS[name][0]}
        | {"low": row["mean"] - row["deviation"], "high": min(1.0, row["mean"] + row["deviation"])}
        for (layer, name), row in found.items()
        if name in STATISTICS
    ]
    base = d.blank(table).encode(x=depth_axis(dataset), color=d.colour(dict(STATISTICS.values())))
    bars = base.mark_rule(opacity=0.45, strokeWidth=2).encode(
        y=alt.Y("low:Q", title="cosine", scale=alt.Scale(domainMax=1)), y2=alt.Y2("high:Q")
    )
    dots = base.mark_point(filled=True, size=55).encode(
        y=alt.Y("mean:Q"),
        tooltip=[
            d.word("layer", "layer"),
            d.word("label", "of"),
            d.tip("mean", "mean cosine", ".3f"),
            d.tip("deviation", "standard deviation", ".3f"),
        ],
    )
    return d.finished(alt.layer(bars, dots), width=d.WIDTH, height=240)


@d.needs("collapse")
def layer_collapse(dataset: xr.Dataset) -> alt.LayerChart:
    """Neural collapse with depth."""
    table = [
        row | {"label": MEASURES[row["measure"]][0]}
        for row in d.rows(dataset, "collapse")
        if row["measure"] in MEASURES and row["collapse"] > 0
    ]
    shown = dict(MEASURES[name] for name in _present(table, "measure", MEASURES))
    values = [row["collapse"] for row in table]
    low, high = min(values), max(values)
    lines = d.joined_points(
        table,
        x=depth_axis(dataset),
        y=alt.Y(
            "collapse:Q",
            scale=alt.Scale(type="log", domainMin=low / 1.5, domainMax=high * 1.5),
            axis=d.log_axis(low / 1.5, high * 1.5, title="measure"),
        ),
        color=d.colour(shown, columns=2),
        tooltip=[d.word("layer", "layer"), d.word("label", "measure"), d.tip("collapse", "value")],
    )
    rule = d.blank([{"one": 1}]).mark_rule(color=d.MUTED, strokeDash=[4, 4]).encode(y=alt.Y("one:Q"))
    return d.finished(alt.layer(*([rule] if low < 1 < high else []), lines), width=d.WIDTH, height=260)


@d.needs("kronecker_fit")
def kronecker_fits(dataset: xr.Dataset) -> alt.LayerChart:
    """How far Kronecker-factored approximations are from each layer's block of G, in a measure to choose."""
    table, shade = _approximations(dataset, "kronecker_fit")
    table = [row for row in table if row["fit"] in FIT_LABELS]
    lines = d.joined_points(
        table,
        x=depth_axis(dataset, "block"),
        y=alt.Y("kronecker_fit:Q", title="chosen measure", scale=alt.Scale(domainMin=0)),
        color=shade,
        tooltip=[d.word("block", "layer"), d.word("label", "approximation"), d.tip("kronecker_fit", "value")],
    ).transform_filter("datum.fit === fit")
    return d.finished(d.layered(lines, choices=[d.choice("fit", FIT_LABELS)]), width=d.WIDTH, height=260)


@d.needs("kronecker_overlap")
def kronecker_overlaps(dataset: xr.Dataset) -> alt.LayerChart:
    """Overlap of the top eigenspaces of approximations with those of G's blocks."""
    table, shade = _approximations(dataset, "kronecker_overlap")
    names = [str(name) for name in dataset["block"].values]
    block = d.choice("block", names, first=names[-1], menu="layer ")
    sizes = alt.Axis(values=[int(k) for k in dataset["size"].values], format="d")
    lines = d.joined_points(
        table,
        x=alt.X("size:Q", title="dimension k", scale=alt.Scale(type="log", nice=False), axis=sizes),
        y=alt.Y("kronecker_overlap:Q", title=d.OVERLAP, scale=alt.Scale(domain=[0, 1])),
        color=shade,
        tooltip=[
            d.word("label", "approximation"),
            alt.Tooltip("size:Q", title="k"),
            d.tip("kronecker_overlap", "overlap", ".3f"),
        ],
    ).transform_filter("datum.block === block")
    return d.finished(d.layered(lines, choices=[block]), width=d.WIDTH, height=220)


def _approximations(dataset: xr.Dataset, name: str) -> tuple[list[d.Row], alt.Color]:
    """A variable's rows with the names of the approximations, and their colours."""
    table = [row | {"label": row["approximation"].upper()} for row in d.rows(dataset, name)]
    kinds = [str(kind) for kind in dataset["approximation"].values]
    return table, d.colour({kind.upper(): KIND_COLOURS.get(kind, d.MUTED) for kind in kinds})


@d.needs("layer_density", "layer_density_grid")
def layer_densities(dataset: xr.Dataset) -> alt.LayerChart:
    """Densities of each layer's blocks of G and H, one row a layer."""
    names = [str(name) for name in dataset["layer"].values]
    table = d.rows(dataset, "layer_density", "layer_density_grid")
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
        axis=d.log_axis(min(values), max(values), most=MOST_DECADES, title="|eigenvalue|"),
    )
    axis = d.ticks_axis(list(base.values()), names, title=None, grid=True, labelOverlap=False, labelLimit=150)
    y = alt.Y("base:Q", scale=alt.Scale(domain=[0, len(names)]), axis=axis)
    shade = d.colour(dict(SERIES[name] for name in _present(table, "series", SERIES)))
    filled = d.blank([row for row in table if row["series"] == "gauss_newton"])
    areas = filled.mark_area(opacity=0.3).encode(
        x=x, y=y, y2=alt.Y2("top:Q"), color=shade, detail=alt.Detail("layer:N")
    )
    tooltip = [d.word("layer", "layer"), d.word("label", "block of")]
    tooltip += [d.tip("layer_density_grid", "|λ|"), d.tip("layer_density", "mass per decade")]
    lines = d.blank(table).mark_line(strokeWidth=1.4)
    lines = lines.encode(
        x=x, y=alt.Y("top:Q", title=None), color=shade, detail=alt.Detail("layer:N"), tooltip=tooltip
    )
    found = [row for row in d.rows(dataset, "layer_eigenvalue") if row["kind"] == "gradients"]
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
    ticks = d.blank(marks).mark_rule(color=d.OPERATOR_COLOURS["gauss_newton"], strokeWidth=1)
    tooltip = [d.word("layer", "layer"), d.tip("value", "λ of G")]
    ticks = ticks.encode(x=alt.X("value:Q"), y=alt.Y("base:Q"), y2=alt.Y2("top:Q"), tooltip=tooltip)
    return d.finished(alt.layer(areas, lines, ticks), width=d.WIDTH, height=30 + 44 * len(names))

"""One function per chart: a saved analysis in, a Vega-Lite chart out.

No mathematics lives here beyond what drawing needs: placing eigenvalues on an axis, cosines from inner
products, sums for captions. Every chart names the variables it draws and raises `DataError` when the analysis
does not hold them, so a page can leave a figure out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import altair as alt
import numpy as np
import xarray as xr

from deepspectra.errors import DataError
from deepspectra.report.class_charts import class_cosines, cross_class_weights, three_level_map
from deepspectra.report.compare_charts import COMPARE_CHARTS
from deepspectra.report.drawing import (
    INK,
    LABEL_INKS,
    LANES,
    LEVEL_COLOURS,
    LEVEL_NAMES,
    MOST_ROWS,
    MUTED,
    OPERATOR_COLOURS,
    OPERATOR_NAMES,
    PART_COLOURS,
    SYMBOLS,
    WIDTH,
    Mark,
    Row,
    blank,
    both_sides,
    colour,
    finished,
    holds,
    labelled,
    log_axis,
    number,
    operator_selector,
    operators_of,
    plain,
    require,
    rows,
    tick,
    ticks_axis,
)
from deepspectra.report.layer_charts import LAYER_CHARTS


def outliers_left(row: Row) -> str:
    """How many outliers a knock-out leaves, in the words that fit what is known."""
    count, upper = row.get("knockout_outliers"), row.get("knockout_upper")
    if count is None or not math.isfinite(count):
        return "not counted"
    if row["knockout"] == "nothing":
        return f"{count:.0f} outliers"
    if upper is None or not math.isfinite(upper):
        return f"at least {count:.0f}" if count else "none found"
    if upper > count:
        return f"{count:.0f} to {upper:.0f} left"
    return f"{count:.0f} left" if count else "none left"


def outliers(dataset: xr.Dataset) -> list[Row]:
    """Outlier eigenpairs by operator and descending eigenvalue, each with its residual norm and shares."""
    if not holds(dataset, "eigenvalue", "is_outlier"):
        return []
    found = [
        row for row in rows(dataset, "eigenvalue", "is_outlier", "residual_norm") if row["is_outlier"] == 1
    ]
    shares = {(row["operator"], row["pair"]): row for row in _shares_by_pair(dataset)}
    found.sort(key=lambda row: (list(OPERATOR_NAMES).index(row["operator"]), -row["eigenvalue"]))
    rank: dict[str, int] = {}
    for row in found:
        row["rank"] = rank[row["operator"]] = rank.get(row["operator"], 0) + 1
        row.update(shares.get((row["operator"], row["pair"]), {}))
    return found


def _shares_by_pair(dataset: xr.Dataset) -> list[Row]:
    if not holds(dataset, "share"):
        return []
    table: dict[tuple[str, int], Row] = {}
    for row in rows(dataset, "share"):
        pair = table.setdefault(
            (row["operator"], row["pair"]), {"operator": row["operator"], "pair": row["pair"]}
        )
        pair[f"share {row['part']}"] = row["share"]
    return list(table.values())


# -------------------------------------------------------------------------------------------------- spectrum


@dataclass(frozen=True)
class _Line:
    """The eigenvalue axis: where an eigenvalue is drawn, and the encoding that labels it."""

    place: Callable[[float], float]
    along: Callable[[float], float]  # as a fraction of the axis, 0 at its left end
    x: alt.X


def spectrum(dataset: xr.Dataset) -> alt.LayerChart:
    """Densities of H, G and R over a symmetric-log eigenvalue axis, outliers as lollipops."""
    require(dataset, "curve_grid", "curve_density")
    table = rows(
        dataset, "curve_grid", "curve_density", "curve_standard_error", need=("curve_grid", "curve_density")
    )
    for row in table:
        row |= {"eigenvalue": row["curve_grid"], "density": row["curve_density"]}
        row["error"] = row.get("curve_standard_error") or 0.0
    found = [row["eigenvalue"] for row in outliers(dataset)]
    line = _symmetric_log(dataset, [*found, *(row["eigenvalue"] for row in table)])
    return _spectrum(dataset, table, line, "density (fraction of eigenvalues per unit of λ)")


def log_spectrum(dataset: xr.Dataset) -> alt.LayerChart:
    """Densities per decade of |λ|, negative eigenvalues mirrored to the left."""
    require(dataset, "log_grid", "log_density")
    table = rows(dataset, "log_grid", "log_density", "log_standard_error", need=("log_grid", "log_density"))
    for row in table:
        sign = -1.0 if row["side"] == "negative" else 1.0
        row |= {"eigenvalue": sign * abs(row["log_grid"]), "density": row["log_density"]}
        row["error"] = row.get("log_standard_error") or 0.0
    floor, _ = _density_range(dataset, table)
    seen = [row["eigenvalue"] for row in table if row["density"] > floor]
    smallest = min(abs(row["eigenvalue"]) for row in table)
    line = _mirrored_log([smallest, *seen, *(row["eigenvalue"] for row in outliers(dataset))])
    return _spectrum(dataset, table, line, "density (fraction of eigenvalues per decade of |λ|)")


def _spectrum(dataset: xr.Dataset, table: list[Row], line: _Line, title: str) -> alt.LayerChart:
    operators = operators_of(table)
    limits = {row["operator"]: row["outlier_threshold"] for row in _thresholds(dataset)}
    for row in table:
        row["beyond"] = abs(row["eigenvalue"]) > limits.get(row["operator"], math.inf)
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
    keep = ("operator", "label", "side", "eigenvalue", "density", "error", "beyond")
    points = [{key: row[key] for key in keep if key in row} for row in table]
    for row in points:
        density, error = row["density"], row.pop("error")
        row["x"] = plain(line.place(row["eigenvalue"]))
        row["upper"] = plain(max(density + 2 * error, low / 10))
        row["lower"] = plain(max(density - 2 * error, low / 10))
        row["density"] = plain(max(density, low / 10))
    scale = alt.Scale(type="log", domain=[low, high], nice=False)
    y = alt.Y("density:Q", scale=scale, axis=log_axis(low, high, title=title))
    base = (
        alt.Chart()
        .transform_filter("shown == 'all' || datum.operator == shown")
        .encode(
            x=line.x,
            color=colour(operators, OPERATOR_NAMES, OPERATOR_COLOURS),
            detail=["side:N", "beyond:N"],
        )
    )
    faded = alt.condition("datum.beyond", alt.value(0.3), alt.value(1))  # there the lollipops tell it better
    band = base.mark_area(opacity=0.22, clip=True).encode(y=alt.Y("lower:Q", scale=scale), y2="upper:Q")
    curve = base.mark_line(strokeWidth=1.6, clip=True).encode(
        y=y, opacity=faded, tooltip=["label:N", _tip("eigenvalue", "λ"), _tip("density", "density")]
    )
    return alt.layer(band, curve, data={"values": points})  # added last: chained calls copy their data


def _tip(field: str, title: str, form: str = ".3~g") -> alt.Tooltip:
    return alt.Tooltip(field=field, type="quantitative", title=title, format=form)


def _lollipops(dataset: xr.Dataset, line: _Line) -> list[Mark]:
    found = labelled(outliers(dataset))
    if not found:
        return []
    parts = [part for part in PART_COLOURS if any(f"share {part}" in row for row in found)]
    for row in found:
        row |= {"x": plain(line.place(row["eigenvalue"])), "lane": LANES.get(row["operator"], 0.16)}
    base = (
        blank(found)
        .transform_filter("shown == 'all' || datum.operator == shown")
        .encode(
            x=line.x,
            y=alt.Y("lane:Q", scale=alt.Scale(domain=[0, 1]), axis=None),
            color=alt.Color("label:N", sort=None),
            tooltip=[
                alt.Tooltip("label:N", title="outlier of"),
                _tip("rank", "rank"),
                _tip("eigenvalue", "λ", ".4~g"),
                _tip("residual_norm", "‖Av − λv‖", ".2~g"),
                *(_tip(f"share {part}", part, ".1~%") for part in parts),
            ],
        )
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
        known = rows(dataset, name) if holds(dataset, name) else []
        for row in known:
            late = line.along(row[name]) > 0.62  # no room for a label to its right
            edge = {"operator": row["operator"], "x": plain(line.place(row[name])), "kind": name}
            edge |= {"text": f"{text} {number(row[name])}", "left": late or name == "bulk_edge"}
            table.append(edge | {"height": 22 if late and name == "bulk_edge" else 8})
    base = (
        blank([row for row in table if row["operator"] in operators])
        .transform_filter(f"datum.operator == (shown == 'all' ? '{operators[0]}' : shown)")
        .encode(x=line.x)
    )
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
    labels = [tick(value) if value else f"±{tick(smallest)}" for value in ticks]
    x = alt.X(
        "x:Q",
        scale=alt.Scale(domain=[place(low), place(high)], nice=False),
        axis=ticks_axis(
            [place(value) for value in ticks], labels, title="eigenvalue λ (logarithmic on both sides)"
        ),
    )
    return _Line(place, along, x)


# ---------------------------------------------------------------------------------------------------- shares


def shares(dataset: xr.Dataset) -> alt.LayerChart:
    """What each outlier is made of: one stacked bar per outlier, and their mean."""
    require(dataset, "share", "eigenvalue", "is_outlier")
    table = [row for row in outliers(dataset) if any(key.startswith("share ") for key in row)]
    if not table:
        raise DataError("the analysis attributes no outlier: none was found, or none has shares")
    parts = [str(part) for part in dataset["part"].values]
    seen = [row for row in table if row["rank"] <= MOST_ROWS]
    bars = [bar for row in seen for bar in _bars(row, parts)] + _mean_bars(dataset)
    reach = [math.floor(20 * min(bar["from"] for bar in bars) + 1e-6) / 20]
    reach.append(math.ceil(20 * max(bar["to"] for bar in bars) - 1e-6) / 20)
    order = [*dict.fromkeys(bar["row"] for bar in bars if bar["row"] not in (" ", "mean")), " ", "mean"]
    operators = operators_of(bars)
    longest = max(row["rank"] for row in seen) + 2
    note = (
        f"the {MOST_ROWS} largest of up to {max(row['rank'] for row in table)} outliers; the mean is over all"
    )
    title = {"title": note} if len(seen) < len(table) else {}
    base = blank(bars).transform_filter("datum.operator == shown")
    bar = base.mark_bar(stroke="white", strokeWidth=0.8, height={"band": 0.82}).encode(
        y=alt.Y("row:N", sort=order, title="outlier, by rank: λ", axis=alt.Axis(ticks=False, domain=False)),
        x=alt.X(
            "from:Q",
            scale=alt.Scale(domain=reach, nice=False),
            title="share of the eigenvalue",
            axis=alt.Axis(format=".0%", tickCount=5),
        ),
        x2="to:Q",
        color=colour(parts, {}, PART_COLOURS),
        tooltip=[
            alt.Tooltip("row:N", title="outlier"),
            alt.Tooltip("label:N", title="part"),
            _tip("share", "share", ".1~%"),
        ],
    )
    text = (
        base.transform_filter("datum.text")
        .mark_text(fontSize=10.5)
        .encode(
            y=alt.Y("row:N", sort=order),
            x="middle:Q",
            text="text:N",
            color=alt.Color("ink:N", scale=None),
        )
    )
    chart = alt.layer(bar, text).add_params(operator_selector(operators, everything=False))
    return finished(chart, width=WIDTH, height=22 * longest, **title)


def _bars(row: Row, parts: list[str]) -> list[Row]:
    name = f"{row['rank']}:  {number(row['eigenvalue'])}"
    return _stack(
        row["operator"], name, {part: row[f"share {part}"] for part in parts if f"share {part}" in row}
    )


def _mean_bars(dataset: xr.Dataset) -> list[Row]:
    bars = []
    for operator, means in mean_shares(dataset).items():
        gap = {"operator": operator, "row": " ", "label": next(iter(means)), "from": 0, "to": 0}
        bars += [gap, *_stack(operator, "mean", means)]
    return bars


def mean_shares(dataset: xr.Dataset) -> dict[str, dict[str, float]]:
    """Mean share of each part over the outliers, by operator."""
    if not holds(dataset, "mean_share"):
        return {}
    out: dict[str, dict[str, float]] = {}
    for row in rows(dataset, "mean_share"):
        out.setdefault(row["operator"], {})[row["part"]] = row["mean_share"]
    return out


def _stack(operator: str, name: str, parts: dict[str, float]) -> list[Row]:
    """The segments of one bar, negative shares to the left of zero; wide ones carry their percentage."""
    bars, ends = [], {True: 0.0, False: 0.0}
    for part, share in parts.items():
        start = ends[share >= 0]
        ends[share >= 0] = start + share
        low, high = sorted((start, start + share))
        bar: Row = {"operator": operator, "row": name, "label": part, "share": share, "from": low, "to": high}
        if high - low >= 0.1:
            ink = LABEL_INKS.get(part, "white")
            bar |= {"text": f"{share:.0%}".replace("-", "−"), "middle": (low + high) / 2, "ink": ink}
        bars.append(bar)
    return bars


# ------------------------------------------------------------------------------------------------ knock-outs


def knockout_summary(dataset: xr.Dataset) -> list[Row]:
    """One record per operator, knock-out and method: largest eigenvalue left, its residual, outliers left."""
    names = ("knockout_value", "knockout_residual_norm", "knockout_outliers", "knockout_upper")
    table: dict[tuple[str, str, str], Row] = {}
    for row in rows(dataset, *names):
        key = (row["operator"], row["knockout"], row["method"])
        best = table.get(key)
        if best is None or row["knockout_value"] > best["knockout_value"]:
            table[key] = row
    first: dict[tuple[str, float], Row] = {}
    return [
        row
        for row in table.values()
        if row["knockout"] != "nothing" or first.setdefault((row["operator"], 0.0), row) is row
    ]


def knockouts(dataset: xr.Dataset) -> alt.LayerChart:
    """Eigenvalues that stay when parts are removed, against the outlier threshold."""
    require(dataset, "knockout_value")
    summary = knockout_summary(dataset)
    names = {(row["operator"], row["knockout"], row["method"]): _knockout_name(row) for row in summary}
    thresholds = {row["operator"]: row for row in _thresholds(dataset)}
    table = [
        row
        for row in rows(dataset, "knockout_value")
        if (row["operator"], row["knockout"], row["method"]) in names
    ]
    for row in table:
        limit = thresholds.get(row["operator"], {}).get("outlier_threshold", math.inf)
        row |= {"row": names[row["operator"], row["knockout"], row["method"]]}
        row |= {"label": "above the threshold" if row["knockout_value"] > limit else "below"}
    table = [row for row in table if row["knockout_value"] > 0]
    values = [row["knockout_value"] for row in table] + [
        row["outlier_threshold"] for row in thresholds.values()
    ]
    low, high = max(min(values), max(values) * 1e-5) / 1.5, max(values) * 1.5
    x = alt.X(
        "knockout_value:Q",
        scale=alt.Scale(type="log", domain=[low, high], nice=False),
        axis=log_axis(low, high, title="eigenvalues left (logarithmic axis)"),
    )
    order = list(dict.fromkeys(names.values()))
    split = alt.Axis(
        labelExpr="split(datum.label, ' | ')",
        ticks=False,
        domain=False,
        grid=True,
        labelLineHeight=14,
        labelOffset=-7,
    )
    y = alt.Y("row:N", sort=order, title=None, axis=split)
    layers = [_knockout_dots(table, x, y), *_knockout_rules(list(thresholds.values()))]
    layers.append(_knockout_counts(summary, names, y))
    chart = alt.layer(*layers).add_params(operator_selector(operators_of(table), everything=False))
    return finished(chart, width=WIDTH, height=40 * len(order))


def _knockout_name(row: Row) -> str:
    if row["knockout"] == "nothing":
        return "nothing | removed"
    return f"without {row['knockout']} | by {row['method']}"


def _thresholds(dataset: xr.Dataset) -> list[Row]:
    return rows(dataset, "outlier_threshold") if holds(dataset, "outlier_threshold") else []


def _knockout_dots(table: list[Row], x: alt.X, y: alt.Y) -> Mark:
    colours = alt.Scale(domain=["above the threshold", "below"], range=[INK, "#b8c1cb"])
    base = blank(table).transform_filter("datum.operator == shown")
    return base.mark_circle(size=60, opacity=0.8, clip=True).encode(
        x=x,
        y=y,
        color=alt.Color("label:N", scale=colours, sort=None),
        tooltip=[alt.Tooltip("row:N", title="removed"), _tip("knockout_value", "λ left", ".4~g")],
    )


def _knockout_rules(thresholds: list[Row]) -> list[Mark]:
    table = [row | {"text": f"outlier threshold {number(row['outlier_threshold'])}"} for row in thresholds]
    base = blank(table).transform_filter("datum.operator == shown").encode(x="outlier_threshold:Q")
    rule = base.mark_rule(color=MUTED, strokeDash=[5, 3])
    text = base.mark_text(color=MUTED, fontSize=11, align="center").encode(y=alt.value(-8), text="text:N")
    return [rule, text]


def _knockout_counts(summary: list[Row], names: dict[tuple[str, str, str], str], y: alt.Y) -> Mark:
    table = [
        {
            "operator": row["operator"],
            "row": names[row["operator"], row["knockout"], row["method"]],
            "text": outliers_left(row),
        }
        for row in summary
    ]
    base = blank(table).transform_filter("datum.operator == shown")
    mark = base.mark_text(align="left", dx=10, fontSize=12, fontWeight=600, color=INK)
    return mark.encode(x=alt.value("width"), y=y, text="text:N")


# ------------------------------------------------------------------------------------------------- averaging


def averaging(dataset: xr.Dataset) -> alt.LayerChart:
    """Eigenvalues found by averaging alone, over the true ones, by rank."""
    require(dataset, "subspace_value")
    table = _scree(rows(dataset, "subspace_value"), "level", "subspace_value", LEVEL_NAMES)
    if holds(dataset, "eigenvalue"):
        known = [row for row in rows(dataset, "eigenvalue") if row["operator"] in ("hessian", "gauss_newton")]
        table = _scree(known, "operator", "eigenvalue", OPERATOR_NAMES) + table
    overlaps = _overlaps(dataset)
    for row in table:
        row["overlap"] = overlaps.get(row["name"], "")
    names = list(dict.fromkeys(row["name"] for row in table))
    labels = {row["name"]: row["label"] for row in table}
    values = [row["value"] for row in table]
    low, high = max(min(values), max(values) * 1e-8) / 1.3, max(values) * 1.3
    last = max(row["rank"] for row in table)
    ranks = alt.Scale(type="log" if last > 30 else "linear", domain=[0.8, last * 1.1], nice=False)
    across = (
        log_axis(1, last, 7, grid=False) if last > 30 else alt.Axis(tickMinStep=1, format="d", grid=False)
    )
    shapes = {"hessian": "circle", "gauss_newton": "circle", "class": "diamond", "cross_class": "triangle-up"}
    shape_scale = alt.Scale(domain=[labels[name] for name in names], range=[shapes[name] for name in names])
    base = blank(table).encode(
        x=alt.X("rank:Q", scale=ranks, axis=across, title="rank"),
        y=alt.Y(
            "value:Q",
            scale=alt.Scale(type="log", domain=[low, high], nice=False),
            axis=log_axis(low, high, title="eigenvalue (logarithmic axis)"),
        ),
        color=colour(names, labels, {**OPERATOR_COLOURS, **LEVEL_COLOURS}, columns=2),
        shape=alt.Shape("label:N", scale=shape_scale, legend=alt.Legend(columns=2), sort=None),
        tooltip=[
            "label:N",
            _tip("rank", "rank"),
            _tip("value", "λ", ".4~g"),
            alt.Tooltip("overlap:N", title="overlap"),
        ],
    )
    true = base.transform_filter("indexof(['hessian', 'gauss_newton'], datum.name) >= 0")
    line = true.mark_line(strokeWidth=1, opacity=0.5, clip=True).encode(shape=alt.Undefined)
    point = base.mark_point(size=50, strokeWidth=1.6, opacity=1, clip=True)
    return finished(alt.layer(line, point), width=WIDTH, height=320)


def _scree(table: list[Row], group: str, value: str, labels: dict[str, str]) -> list[Row]:
    """Positive values of each group by descending size."""
    out: list[Row] = []
    for name in dict.fromkeys(row[group] for row in table):
        values = sorted((row[value] for row in table if row[group] == name and row[value] > 0), reverse=True)
        label = labels.get(name, name)
        out += [
            {"name": name, "label": label, "rank": rank, "value": item} for rank, item in enumerate(values, 1)
        ]
    return out


def _overlaps(dataset: xr.Dataset) -> dict[str, str]:
    if not holds(dataset, "subspace_overlap"):
        return {}
    out: dict[str, list[str]] = {}
    for row in rows(dataset, "subspace_overlap", "subspace_dimension"):
        size = row.get("subspace_dimension")
        top = f"top {size:.0f} of" if size else "top of"
        name = SYMBOLS.get(row["operator"], row["operator"])
        out.setdefault(row["level"], []).append(f"{row['subspace_overlap']:.1%} with the {top} {name}")
    return {level: ", ".join(texts) for level, texts in out.items()}


# ------------------------------------------------------------------------------------------------------ cost


def cost(dataset: xr.Dataset) -> alt.LayerChart:
    """What each stage cost, in full-data gradients."""
    require(dataset, "cost_gradients")
    table = rows(dataset, "cost_gradients", "cost_products", "cost_seconds")
    order = [row["stage"] for row in table]
    for row in table:
        row["text"] = number(row["cost_gradients"])
    base = blank(table).encode(
        y=alt.Y("stage:N", sort=order, title=None, axis=alt.Axis(ticks=False, domain=False, labelLimit=150)),
        x=alt.X(
            "cost_gradients:Q",
            scale=alt.Scale(domain=[0, 1.12 * max(row["cost_gradients"] for row in table)], nice=False),
            title="cost in full-data gradients",
            axis=alt.Axis(tickCount=4, format=",.2~f"),
        ),
        tooltip=[
            "stage:N",
            _tip("cost_gradients", "gradients", ".4~g"),
            _tip("cost_products", "products", ",.0f"),
            _tip("cost_seconds", "seconds", ".3~g"),
        ],
    )
    bar = base.mark_bar(color="#7b8794", height={"band": 0.7})
    text = base.mark_text(align="left", dx=5, color=INK).encode(text="text:N")
    return finished(alt.layer(bar, text), width=WIDTH, height=26 * len(order))


# ------------------------------------------------------------------------------------------------ everything

CHARTS: dict[str, Callable[[xr.Dataset], alt.TopLevelMixin]] = {
    "spectrum": spectrum,
    "log_spectrum": log_spectrum,
    "shares": shares,
    "knockouts": knockouts,
    "averaging": averaging,
    "class_cosines": class_cosines,
    "cross_class_weights": cross_class_weights,
    "three_level_map": three_level_map,
    **LAYER_CHARTS,
    **COMPARE_CHARTS,
    "cost": cost,
}


def charts(dataset: xr.Dataset) -> dict[str, alt.TopLevelMixin]:
    """Every chart whose variables the analysis holds, by name."""
    drawn = {}
    for name, draw in CHARTS.items():
        try:
            drawn[name] = draw(dataset)
        except DataError:  # the analysis did not compute what this chart draws
            continue
    return drawn

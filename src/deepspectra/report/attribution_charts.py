"""Charts of an attribution: shares, knock-outs, what averaging finds, and what it all cost."""

from __future__ import annotations

import math

import altair as alt
import xarray as xr

from deepspectra.report import drawing as d
from deepspectra.report.saved_outliers import knockout_summary, mean_shares, outliers, outliers_left
from deepspectra.report.text import percent

RANKED = {  # eigenvalues that are drawn by rank: labels, colours and symbols
    "hessian": (d.OPERATOR_NAMES["hessian"], d.OPERATOR_COLOURS["hessian"], "circle"),
    "gauss_newton": (d.OPERATOR_NAMES["gauss_newton"], d.OPERATOR_COLOURS["gauss_newton"], "circle"),
    "class": (d.LEVEL_NAMES["class"], d.LEVEL_COLOURS["class"], "diamond"),
    "cross_class": (d.LEVEL_NAMES["cross_class"], d.LEVEL_COLOURS["cross_class"], "triangle-up"),
}


def _of_shown(table: list[d.Row]) -> d.Mark:
    """An empty chart of the rows of the operator that is chosen."""
    return d.blank(table).transform_filter("datum.operator == shown")


# ---------------------------------------------------------------------------------------------------- shares


def _attributed(dataset: xr.Dataset) -> list[d.Row]:
    """The outliers that have shares."""
    return [row for row in outliers(dataset) if any(key.startswith("share ") for key in row)]


NONE_ATTRIBUTED = "the analysis attributes no outlier: none was found, or none has shares"


@d.needs("share", "eigenvalue", "is_outlier", some=_attributed, reason=NONE_ATTRIBUTED)
def shares(dataset: xr.Dataset) -> alt.LayerChart:
    """What each outlier is made of: one stacked bar per outlier, and their mean."""
    table = _attributed(dataset)
    parts = [str(part) for part in dataset["part"].values]
    seen = [row for row in table if row["rank"] <= d.MOST_ROWS]
    bars = [bar for row in seen for bar in _bars(row, parts)] + _mean_bars(dataset)
    low, high = min(bar["from"] for bar in bars), max(bar["to"] for bar in bars)
    reach = [math.floor(20 * low + 1e-6) / 20, math.ceil(20 * high - 1e-6) / 20]
    order = [*dict.fromkeys(bar["row"] for bar in bars if bar["row"] not in (" ", "mean")), " ", "mean"]
    operators = d.operators_of(bars)
    longest = max(row["rank"] for row in seen) + 2
    note = f"the {d.MOST_ROWS} largest of up to {max(row['rank'] for row in table)} outliers; the mean is over all"
    title = {"title": note} if len(seen) < len(table) else {}
    base = _of_shown(bars)
    bar = base.mark_bar(stroke="white", strokeWidth=0.8, height={"band": 0.82}).encode(
        y=alt.Y("row:N", sort=order, title="outlier, by rank: λ", axis=alt.Axis(ticks=False, domain=False)),
        x=alt.X(
            "from:Q",
            scale=alt.Scale(domain=reach, nice=False),
            title="share of the eigenvalue",
            axis=alt.Axis(format=".0%", tickCount=5),
        ),
        x2=alt.X2("to:Q"),
        color=d.colour({part: d.PART_COLOURS[part] for part in parts}),
        tooltip=[d.word("row", "outlier"), d.word("label", "part"), d.tip("share", "share", ".1~%")],
    )
    text = (
        base.transform_filter("datum.text")
        .mark_text(fontSize=10.5)
        .encode(
            y=alt.Y("row:N", sort=order),
            x=alt.X("middle:Q"),
            text=alt.Text("text:N"),
            color=alt.Color("ink:N", scale=None),
        )
    )
    chart = d.layered(bar, text, choices=[d.operator_selector(operators, everything=False)])
    return d.finished(chart, width=d.WIDTH, height=22 * longest, **title)


def _bars(row: d.Row, parts: list[str]) -> list[d.Row]:
    own = {part: row[f"share {part}"] for part in parts if f"share {part}" in row}
    return _stack(row["operator"], f"{row['rank']}:  {d.number(row['eigenvalue'])}", own)


def _mean_bars(dataset: xr.Dataset) -> list[d.Row]:
    bars = []
    for operator, means in mean_shares(dataset).items():
        gap = {"operator": operator, "row": " ", "label": next(iter(means)), "from": 0, "to": 0}
        bars += [gap, *_stack(operator, "mean", means)]
    return bars


def _stack(operator: str, name: str, parts: dict[str, float]) -> list[d.Row]:
    """The segments of one bar, negative shares to the left of zero; wide ones carry their percentage."""
    bars, ends = [], {True: 0.0, False: 0.0}
    for part, share in parts.items():
        start = ends[share >= 0]
        ends[share >= 0] = start + share
        low, high = sorted((start, start + share))
        bar: d.Row = {
            "operator": operator,
            "row": name,
            "label": part,
            "share": share,
            "from": low,
            "to": high,
        }
        if high - low >= 0.1:
            bar |= {"text": percent(share, 0), "middle": (low + high) / 2}
            bar["ink"] = d.INK if part in d.LIGHT_PARTS else "white"
        bars.append(bar)
    return bars


# ------------------------------------------------------------------------------------------------ knock-outs


@d.needs(
    "knockout_value",
    some=lambda dataset: (dataset["knockout_value"] > 0).any(),
    reason="no eigenvalue is positive, with or without knock-outs",
)
def knockouts(dataset: xr.Dataset) -> alt.LayerChart:
    """Eigenvalues that stay when parts are removed, against the outlier threshold."""
    summary = knockout_summary(dataset)
    for row in summary:
        row["row"] = _knockout_name(row)
    order = list(dict.fromkeys(row["row"] for row in summary))
    thresholds = d.by_operator(dataset, "outlier_threshold")
    table = [row | {"row": _knockout_name(row)} for row in d.rows(dataset, "knockout_value")]
    table = [row for row in table if row["row"] in order and row["knockout_value"] > 0]
    for row in table:
        limit = thresholds.get(row["operator"], math.inf)
        row["label"] = "above the threshold" if row["knockout_value"] > limit else "below"
    values = [row["knockout_value"] for row in table]
    values += [value for value in thresholds.values() if value > 0]
    low, high = max(min(values), max(values) * 1e-5) / 1.5, max(values) * 1.5
    x = alt.X(
        "knockout_value:Q",
        scale=alt.Scale(type="log", domain=[low, high], nice=False),
        axis=d.log_axis(low, high, title="eigenvalues left (logarithmic axis)"),
    )
    split = alt.Axis(
        labelExpr="split(datum.label, ' | ')",
        ticks=False,
        domain=False,
        grid=True,
        labelLineHeight=14,
        labelOffset=-7,
    )
    y = alt.Y("row:N", sort=order, title=None, axis=split)
    layers = [_knockout_dots(table, x, y), *_knockout_rules(thresholds), _knockout_counts(summary, y)]
    chart = d.layered(*layers, choices=[d.operator_selector(d.operators_of(table), everything=False)])
    return d.finished(chart, width=d.WIDTH, height=40 * len(order))


def _knockout_name(row: d.Row) -> str:
    if row["knockout"] == "nothing":
        return "nothing | removed"
    return f"without {row['knockout']} | by {row['method']}"


def _knockout_dots(table: list[d.Row], x: alt.X, y: alt.Y) -> d.Mark:
    colours = alt.Scale(domain=["above the threshold", "below"], range=[d.INK, "#b8c1cb"])
    return (
        _of_shown(table)
        .mark_circle(size=60, opacity=0.8, clip=True)
        .encode(
            x=x,
            y=y,
            color=alt.Color("label:N", scale=colours, sort=None),
            tooltip=[d.word("row", "removed"), d.tip("knockout_value", "λ left", ".4~g")],
        )
    )


def _knockout_rules(thresholds: dict[str, float]) -> list[d.Mark]:
    table = [
        {"operator": name, "outlier_threshold": value, "text": f"outlier threshold {d.number(value)}"}
        for name, value in thresholds.items()
    ]
    base = _of_shown(table).encode(x=alt.X("outlier_threshold:Q"))
    rule = base.mark_rule(color=d.MUTED, strokeDash=[5, 3])
    text = base.mark_text(color=d.MUTED, fontSize=11, align="center").encode(
        y=alt.YValue(-8), text=alt.Text("text:N")
    )
    return [rule, text]


def _knockout_counts(summary: list[d.Row], y: alt.Y) -> d.Mark:
    table = [{"operator": row["operator"], "row": row["row"], "text": outliers_left(row)} for row in summary]
    mark = _of_shown(table).mark_text(align="left", dx=10, fontSize=12, fontWeight=600, color=d.INK)
    return mark.encode(x=alt.XValue("width"), y=y, text=alt.Text("text:N"))


# ------------------------------------------------------------------------------------------------- averaging


def _ranked(dataset: xr.Dataset) -> list[d.Row]:
    """Positive eigenvalues by rank, the true ones first, then those by averaging."""
    known = [row for row in d.rows(dataset, "eigenvalue") if row["operator"] in RANKED]
    averages = _scree(d.rows(dataset, "subspace_value"), "level", "subspace_value")
    return _scree(known, "operator", "eigenvalue") + averages


@d.needs("subspace_value", some=_ranked, reason="no eigenvalue is positive, by averaging or otherwise")
def averaging(dataset: xr.Dataset) -> alt.LayerChart:
    """Eigenvalues found by averaging alone, over the true ones, by rank."""
    table = _ranked(dataset)
    overlaps = _overlaps(dataset)
    for row in table:
        row["overlap"] = overlaps.get(row["name"], "")
    names = list(dict.fromkeys(row["name"] for row in table))
    labels, colours, symbols = zip(*(RANKED[name] for name in names), strict=True)
    values = [row["value"] for row in table]
    low, high = max(min(values), max(values) * 1e-8) / 1.3, max(values) * 1.3
    last = max(row["rank"] for row in table)
    ranks = alt.Scale(type="log" if last > 30 else "linear", domain=[0.8, last * 1.1], nice=False)
    across = d.log_axis(1, last, 7, grid=False) if last > 30 else alt.Axis(tickMinStep=1, format="d", grid=False)
    shapes = alt.Scale(domain=labels, range=symbols)
    base = d.blank(table).encode(
        x=alt.X("rank:Q", scale=ranks, axis=across, title="rank"),
        y=alt.Y(
            "value:Q",
            scale=alt.Scale(type="log", domain=[low, high], nice=False),
            axis=d.log_axis(low, high, title="eigenvalue (logarithmic axis)"),
        ),
        color=d.colour(dict(zip(labels, colours, strict=True)), columns=2),
        shape=alt.Shape("label:N", scale=shapes, legend=alt.Legend(columns=2), sort=None),
        tooltip=["label:N", d.tip("rank", "rank"), d.tip("value", "λ", ".4~g"), d.word("overlap", "overlap")],
    )
    true = base.transform_filter("indexof(['hessian', 'gauss_newton'], datum.name) >= 0")
    line = true.mark_line(strokeWidth=1, opacity=0.5, clip=True).encode(shape=alt.Undefined)
    point = base.mark_point(size=50, strokeWidth=1.6, opacity=1, clip=True)
    return d.finished(alt.layer(line, point), width=d.WIDTH, height=320)


def _scree(table: list[d.Row], group: str, value: str) -> list[d.Row]:
    """Positive values of each group by descending size."""
    out: list[d.Row] = []
    for name in dict.fromkeys(row[group] for row in table):
        values = sorted((row[value] for row in table if row[group] == name and row[value] > 0), reverse=True)
        known = {"name": name, "label": RANKED[name][0]}
        out += [known | {"rank": rank, "value": item} for rank, item in enumerate(values, 1)]
    return out


def _overlaps(dataset: xr.Dataset) -> dict[str, str]:
    out: dict[str, list[str]] = {}
    for row in d.rows(dataset, "subspace_overlap", "subspace_dimension"):
        size = row.get("subspace_dimension")
        top = f"top {size:.0f} of" if size else "top of"
        name = d.SYMBOLS.get(row["operator"], row["operator"])
        out.setdefault(row["level"], []).append(f"{row['subspace_overlap']:.1%} with the {top} {name}")
    return {level: ", ".join(texts) for level, texts in out.items()}


# ------------------------------------------------------------------------------------------------------ cost


@d.needs("cost_gradients")
def cost(dataset: xr.Dataset) -> alt.LayerChart:
    """What each stage cost, in full-data gradients."""
    table = d.rows(dataset, "cost_gradients", "cost_products", "cost_seconds")
    order = [row["stage"] for row in table]
    for row in table:
        row["text"] = d.number(row["cost_gradients"], 2)
    base = d.blank(table).encode(
        y=alt.Y("stage:N", sort=order, title=None, axis=alt.Axis(ticks=False, domain=False, labelLimit=200)),
        x=alt.X(
            "cost_gradients:Q",
            scale=alt.Scale(domain=[0, 1.12 * max(row["cost_gradients"] for row in table)], nice=False),
            title="cost in full-data gradients",
            axis=alt.Axis(tickCount=4, format=",.2~f"),
        ),
        tooltip=[
            "stage:N",
            d.tip("cost_gradients", "gradients, about", ".2~g"),
            d.tip("cost_products", "products", ",.0f"),
            d.tip("cost_seconds", "seconds", ".3~g"),
        ],
    )
    bar = base.mark_bar(color="#7b8794", height={"band": 0.7})
    text = base.mark_text(align="left", dx=5, color=d.INK).encode(text=alt.Text("text:N"))
    return d.finished(alt.layer(bar, text), width=d.WIDTH, height=26 * len(order))

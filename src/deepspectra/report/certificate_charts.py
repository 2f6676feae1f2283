"""Charts of a certificate: bounds beside each other, and posterior variances against curvature."""

from __future__ import annotations

import math

import altair as alt
import xarray as xr

from deepspectra.report.drawing import (
    APART,
    INK,
    MUTED,
    WIDTH,
    blank,
    choice,
    finished,
    layered,
    log_axis,
    needs,
    rows,
    tip,
    word,
)

ROW = 34  # pixels of a bound
SMALLEST = 1e-12  # of the largest curvature that is drawn


@needs("bound")
def bounds(dataset: xr.Dataset) -> alt.LayerChart:
    """What is bounded: the share of errors that was observed, and the bound."""
    table = []
    for name in map(str, dataset["bounded"].values):
        observed, bound = (float(value) for value in dataset["bound"].sel(bounded=name).values)
        known = {"observed": observed, "bound": bound}
        table.append({"name": name} | {key: value for key, value in known.items() if math.isfinite(value)})
    names = [str(row["name"]) for row in table]
    axis = alt.Axis(title=None, labelLimit=330, ticks=False, domain=False)
    base = blank(table).encode(y=alt.Y("name:N", sort=names, axis=axis))
    tooltip = [word("name", "of"), tip("observed", "observed", ".4f"), tip("bound", "at most", ".4f")]
    scale = alt.Scale(domainMin=0)
    title = "share of errors: observed (dot) and bound (bar's end)"
    x = alt.X("observed:Q", title=title, scale=scale, axis=alt.Axis(tickCount=6, format="~g"))
    bars = base.transform_filter("isValid(datum.bound)").mark_bar(height=12, color="#0072B2", opacity=0.35)
    bars = bars.encode(x=alt.X("bound:Q", scale=scale), tooltip=tooltip)
    ends = base.transform_filter("isValid(datum.bound)").mark_text(align="left", dx=5, fontSize=12, color=INK)
    ends = ends.encode(x=alt.X("bound:Q"), text=alt.Text("bound:Q", format=".4f"))
    dots = base.transform_filter("isValid(datum.observed)").mark_point(filled=True, size=70, color=INK)
    dots = dots.encode(x=x, tooltip=tooltip)
    return finished(alt.layer(bars, ends, dots), width=WIDTH, height=ROW * len(names))


@needs("posterior_variance", "posterior_curvature")
def posterior_variances(dataset: xr.Dataset) -> alt.LayerChart:
    """Posterior variances of a layer's weights against the curvature along them, one layer at a time."""
    table, lines = [], []
    layers = [str(name) for name in dataset["layer"].values]
    scales = {
        str(row["layer"]): row["posterior"]
        for row in rows(dataset, "posterior")
        if row["posterior_measure"] == "scale"
    }
    for row in rows(dataset, "posterior_variance", "posterior_curvature"):
        curvature, variance = row["posterior_curvature"] or 0.0, row["posterior_variance"]
        if curvature > SMALLEST and variance > 0:
            table.append({"layer": row["layer"], "curvature": curvature, "variance": variance})
    for layer, scale in scales.items():
        lines.append({"layer": layer, "variance": scale, "label": "prior λ"})
    spread = [row["variance"] for row in table] + [row["variance"] for row in lines]
    across = [row["curvature"] for row in table] or [1.0]
    chosen = choice("layer_shown", layers, menu="layer ")
    shown = "datum.layer === layer_shown"
    x = alt.X(
        "curvature:Q",
        title="curvature h of the cross-entropy along the coordinate",
        scale=alt.Scale(type="log", nice=False, domain=[min(across), max(across)]),
        axis=log_axis(min(across), max(across)),
    )
    y = alt.Y(
        "variance:Q",
        title="posterior variance s",
        scale=alt.Scale(type="log", nice=False, domain=[min(spread) / 1.3, max(spread) * 1.3]),
        axis=log_axis(min(spread) / 1.3, max(spread) * 1.3),
    )
    points = blank(table).transform_filter(shown).mark_point(filled=True, size=22, opacity=0.5)
    tooltip = [tip("curvature", "curvature h"), tip("variance", "variance s")]
    points = points.encode(x=x, y=y, color=alt.ColorValue("#0072B2"), tooltip=tooltip)
    rule = blank(lines).transform_filter(shown).mark_rule(color=MUTED, strokeDash=[5, 4]).encode(y=y)
    text = blank(lines).transform_filter(shown).mark_text(align="right", dy=-7, dx=-4, color=MUTED)
    text = text.encode(y=y, x=alt.XValue(WIDTH), text=alt.Text("label:N"))
    return finished(layered(points, rule, text, choices=[chosen]), width=WIDTH, height=330)


@needs("descent")
def descent(dataset: xr.Dataset) -> alt.LayerChart:
    """The error of the stochastic network, and its divergence from the prior, epoch by epoch."""
    names = {"error": "error of the stochastic network", "kl": "KL from the prior, nats"}
    table = rows(dataset, "descent")
    charts = []
    for measure, colour in (("error", "#0072B2"), ("kl", "#D55E00")):
        mine = [row for row in table if row["descent_measure"] == measure]
        scale = alt.Scale(type="log" if all(row["descent"] > 0 for row in mine) else "linear", nice=True)
        axis = alt.Axis(title=names[measure], titleColor=colour, labelColor=colour, tickCount=5)
        line = blank(mine).mark_line(color=colour, strokeWidth=2, point={"color": colour, "size": 18})
        charts.append(
            line.encode(x=alt.X("epoch:Q", title="epoch of descent"), y=alt.Y("descent:Q", scale=scale, axis=axis))
        )
    return finished(layered(*charts, resolve=APART), width=WIDTH, height=240)

"""Charts of several networks: overlap of the eigenspaces of two, and measures of the variants of a study."""

from __future__ import annotations

import altair as alt
import xarray as xr

from deepspectra.report import drawing as d
from deepspectra.report.layer_charts import depth_axis
from deepspectra.report.text import json_attribute

CURVES = {  # with their labels and colours
    "measured": ("measured", d.INK),
    "kronecker": ("of the Kronecker factors", "#0072B2"),
    "predicted": ("predicted from spectra", "#D55E00"),
    "baseline": ("random subspaces", d.MUTED),
}
VARIANT_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
WHOLE = "all layers"
FIRST = "input_ratio"  # the measure that is shown before another is chosen


def _overlap(value: str, dimension: str) -> dict[str, alt.X | alt.Y]:
    """Axes of an overlap against a dimension k."""
    return {
        "x": alt.X(f"{dimension}:Q", title="dimension k", axis=alt.Axis(tickMinStep=1)),
        "y": alt.Y(f"{value}:Q", title=d.OVERLAP, scale=alt.Scale(domainMin=0)),
    }


@d.needs("overlap_curve")
def overlap_curves(dataset: xr.Dataset) -> alt.LayerChart:
    """Overlap of the top-k eigenspaces of two networks against k, one layer at a time."""
    table = [row | {"label": CURVES[row["curve"]][0]} for row in d.rows(dataset, "overlap_curve")]
    layers = [str(name) for name in dataset["layer"].values]
    shown = "datum.layer === chosen"
    tooltip = [d.word("label", "curve"), alt.Tooltip("dimension:Q", title="k")]
    tooltip.append(d.tip("overlap_curve", "overlap", ".3f"))
    lines = d.blank(table).mark_line(strokeWidth=2).transform_filter(shown)
    shade = d.colour(dict(CURVES.values()), columns=4)
    lines = lines.encode(**_overlap("overlap_curve", "dimension"), color=shade, tooltip=tooltip)
    outputs = d.rows(dataset, "layer_outputs", "layer_alignment")
    for row in outputs:
        row["text"] = f"m = {row['layer_outputs']:.0f}, (t·t′)² = {row['layer_alignment']:.2f}"
    base = d.blank(outputs).transform_filter(shown).encode(x="layer_outputs:Q")
    rule = base.mark_rule(color=d.MUTED, strokeDash=[4, 4])
    text = base.mark_text(align="left", dx=5, dy=-6, baseline="top", color=d.MUTED)
    text = text.encode(y=alt.value(0), text="text:N")
    chosen = d.choice("chosen", layers, menu="layer ")
    return d.finished(alt.layer(rule, lines, text).add_params(chosen), width=d.WIDTH, height=300)


def peaks(dataset: xr.Dataset) -> list[d.Row]:
    """Of each layer: where measured and predicted curves are highest, and how high."""
    found: dict[str, d.Row] = {row["layer"]: row for row in d.rows(dataset, "layer_outputs", "layer_alignment")}
    for (layer, curve), heights in d.pivot(dataset, "overlap_curve", "dimension", "layer", "curve").items():
        at = max(heights, key=lambda k: heights[k])
        found[layer] |= {f"{curve}_height": heights[at], f"{curve}_at": int(at)}
    return list(found.values())


@d.needs("overlap_whole")
def overlap_whole(dataset: xr.Dataset) -> alt.LayerChart:
    """The same over all parameters."""
    tooltip = [alt.Tooltip("whole_dimension:Q", title="k"), d.tip("overlap_whole", "overlap", ".3f")]
    base = d.blank(d.rows(dataset, "overlap_whole")).mark_line(color=d.INK, point=True)
    lines = base.encode(**_overlap("overlap_whole", "whole_dimension"), tooltip=tooltip)
    return d.finished(alt.layer(lines), width=d.WIDTH, height=220)


@d.needs("study")
def study_measures(dataset: xr.Dataset) -> alt.LayerChart:
    """A measure of every layer, to choose: means over networks as lines, networks as points."""
    labels = json_attribute(dataset, "measures")
    variants = [str(name) for name in dataset["variant"].values]
    table = [row | {"label": row["variant"]} for row in d.rows(dataset, "study")]
    present = [key for key in labels if any(row["measured"] == key for row in table)]
    first = FIRST if FIRST in present else present[0]
    measure = d.choice("measured_shown", {key: labels[key] for key in present}, first=first, menu="measure ")
    colours = {name: VARIANT_COLOURS[j % len(VARIANT_COLOURS)] for j, name in enumerate(variants)}
    base = d.blank(table).transform_filter("datum.measured === measured_shown")
    base = base.encode(x=depth_axis(dataset), color=d.colour(colours))
    y = alt.Y("study:Q", title="chosen measure", scale=alt.Scale(zero=False))
    in_order = base.transform_filter(f"datum.layer !== '{WHOLE}'")
    lines = in_order.mark_line(strokeWidth=1.6).encode(y=y.aggregate("mean"))
    tooltip = [d.word("layer", "layer"), d.word("variant", "variant"), d.tip("study", "value")]
    points = base.mark_point(filled=True, size=45, opacity=0.75).encode(y=y, tooltip=tooltip)
    return d.finished(alt.layer(lines, points).add_params(measure), width=d.WIDTH, height=300)

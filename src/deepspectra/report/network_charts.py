"""Charts of two networks: overlap of their eigenspaces."""

from __future__ import annotations

import altair as alt
import xarray as xr

from deepspectra.report import drawing as d

CURVES = {  # with their labels and colours
    "measured": ("measured", d.INK),
    "kronecker": ("of the Kronecker factors", "#0072B2"),
    "predicted": ("predicted from spectra", "#D55E00"),
    "baseline": ("random subspaces", d.MUTED),
}


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
    base = d.blank(outputs).transform_filter(shown).encode(x=alt.X("layer_outputs:Q"))
    rule = base.mark_rule(color=d.MUTED, strokeDash=[4, 4])
    text = base.mark_text(align="left", dx=5, dy=-6, baseline="top", color=d.MUTED)
    text = text.encode(y=alt.YValue(0), text=alt.Text("text:N"))
    chosen = d.choice("chosen", layers, menu="layer ")
    return d.finished(d.layered(rule, lines, text, choices=[chosen]), width=d.WIDTH, height=300)


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

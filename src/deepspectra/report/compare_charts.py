"""Charts of two networks compared: overlap of their top eigenspaces, layer by layer."""

from __future__ import annotations

import altair as alt
import xarray as xr

from deepspectra.report.drawing import (
    INK,
    MUTED,
    WIDTH,
    Row,
    blank,
    choice,
    colour,
    finished,
    needs,
    pivot,
    rows,
    tip,
    word,
)

CURVE_LABELS = {
    "measured": "measured",
    "kronecker": "of the Kronecker factors",
    "predicted": "predicted from spectra",
    "baseline": "random subspaces",
}
CURVE_COLOURS = {"measured": INK, "kronecker": "#0072B2", "predicted": "#D55E00", "baseline": MUTED}


@needs("overlap_curve")
def overlap_curves(dataset: xr.Dataset) -> alt.LayerChart:
    """Overlap of the top-k eigenspaces of two networks against k, one layer at a time."""
    table = [row | {"label": CURVE_LABELS[row["curve"]]} for row in rows(dataset, "overlap_curve")]
    layers = [str(name) for name in dataset["layer"].values]
    y = alt.Y("overlap_curve:Q", title="overlap ‖UᵀV‖² / k", scale=alt.Scale(domainMin=0))
    lines = (
        blank(table)
        .mark_line(strokeWidth=2)
        .encode(
            x=alt.X("dimension:Q", title="dimension k", axis=alt.Axis(tickMinStep=1)),
            y=y,
            color=colour(list(CURVE_LABELS), CURVE_LABELS, CURVE_COLOURS, columns=4),
            tooltip=[
                word("label", "curve"),
                alt.Tooltip("dimension:Q", title="k"),
                tip("overlap_curve", "overlap", ".3f"),
            ],
        )
        .transform_filter("datum.layer === chosen")
    )
    outputs = rows(dataset, "layer_outputs", "layer_alignment")
    for row in outputs:
        row["text"] = f"m = {row['layer_outputs']:.0f}, (t·t′)² = {row['layer_alignment']:.2f}"
    base = blank(outputs).transform_filter("datum.layer === chosen").encode(x="layer_outputs:Q")
    rule = base.mark_rule(color=MUTED, strokeDash=[4, 4])
    text = base.mark_text(align="left", dx=5, dy=-6, baseline="top", color=MUTED)
    text = text.encode(y=alt.value(0), text="text:N")
    chosen = choice("chosen", layers, menu="layer ")
    return finished(alt.layer(rule, lines, text).add_params(chosen), width=WIDTH, height=300)


def peaks(dataset: xr.Dataset) -> list[Row]:
    """Of each layer: where measured and predicted curves are highest, and how high."""
    found: dict[str, Row] = {row["layer"]: row for row in rows(dataset, "layer_outputs", "layer_alignment")}
    for (layer, curve), heights in pivot(dataset, "overlap_curve", "dimension", "layer", "curve").items():
        at = max(heights, key=lambda k: heights[k])
        found[layer] |= {f"{curve}_height": heights[at], f"{curve}_at": int(at)}
    return list(found.values())


@needs("overlap_whole")
def overlap_whole(dataset: xr.Dataset) -> alt.LayerChart:
    """The same over all parameters."""
    table = rows(dataset, "overlap_whole")
    base = blank(table).encode(
        x=alt.X("whole_dimension:Q", title="dimension k", axis=alt.Axis(tickMinStep=1)),
        y=alt.Y("overlap_whole:Q", title="overlap ‖UᵀV‖² / k", scale=alt.Scale(domainMin=0)),
        tooltip=[
            alt.Tooltip("whole_dimension:Q", title="k"),
            tip("overlap_whole", "overlap", ".3f"),
        ],
    )
    return finished(alt.layer(base.mark_line(color=INK, point=True)), width=WIDTH, height=220)

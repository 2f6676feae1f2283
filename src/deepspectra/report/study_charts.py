"""Charts of a study: a measure of every layer, variant by variant."""

from __future__ import annotations

import altair as alt
import xarray as xr

from deepspectra.report.drawing import (
    WIDTH,
    Row,
    blank,
    choice,
    colour,
    finished,
    holds,
    needs,
    rows,
    tip,
    word,
)
from deepspectra.report.layer_charts import depth_axis
from deepspectra.report.text import json_attribute

VARIANT_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
WHOLE = "all layers"
FIRST = "input_ratio"  # the measure that is shown before another is chosen


@needs("study")
def study_measures(dataset: xr.Dataset) -> alt.LayerChart:
    """A measure of every layer, to choose: means over networks as lines, networks as points."""
    labels = json_attribute(dataset, "measures")
    variants = [str(name) for name in dataset["variant"].values]
    table = [row | {"label": row["variant"]} for row in rows(dataset, "study")]
    present = [key for key in labels if any(row["measured"] == key for row in table)]
    first = FIRST if FIRST in present else present[0]
    measure = choice("measured_shown", {key: labels[key] for key in present}, first=first, menu="measure ")
    colours = {name: VARIANT_COLOURS[j % len(VARIANT_COLOURS)] for j, name in enumerate(variants)}
    base = (
        blank(table)
        .transform_filter("datum.measured === measured_shown")
        .encode(x=depth_axis(dataset), color=colour(variants, {}, colours))
    )
    y = alt.Y("study:Q", title="chosen measure", scale=alt.Scale(zero=False))
    in_order = base.transform_filter(f"datum.layer !== '{WHOLE}'")
    lines = in_order.mark_line(strokeWidth=1.6).encode(y=y.aggregate("mean"))
    points = base.mark_point(filled=True, size=45, opacity=0.75).encode(
        y=y,
        tooltip=[word("layer", "layer"), word("variant", "variant"), tip("study", "value")],
    )
    return finished(alt.layer(lines, points).add_params(measure), width=WIDTH, height=300)


def means(dataset: xr.Dataset) -> dict[tuple[str, str], Row]:
    """(layer, variant) → measure → mean over networks."""
    if not holds(dataset, "study"):
        return {}
    sums: dict[tuple[str, str], dict[str, list[float]]] = {}
    for row in rows(dataset, "study"):
        entry = sums.setdefault((row["layer"], row["variant"]), {})
        entry.setdefault(row["measured"], []).append(row["study"])
    return {
        place: {key: sum(values) / len(values) for key, values in entry.items()}
        for place, entry in sums.items()
    }

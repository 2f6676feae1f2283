"""Charts of the classes: cosines of their means, weights of their confusions, and the map of all means."""

from __future__ import annotations

from typing import Any

import altair as alt
import numpy as np
import xarray as xr

from deepspectra.report import drawing as d

COLOURINGS = {"true": "true class c", "potential": "potential class k"}
FEW_CLASSES = 10  # whose colours everybody tells apart
MAP_SIZE = 460


def cosines(dataset: xr.Dataset) -> d.Array:
    """(C, C) cosines between class means, from their inner products."""
    gram = np.asarray(dataset["mean_gram"].values, dtype=np.float64)
    norms = np.sqrt(np.clip(np.diag(gram), 0, None))
    with np.errstate(divide="ignore", invalid="ignore"):
        cosine: d.Array = gram / np.outer(norms, norms)
    return cosine


@d.needs("mean_gram")
def class_cosines(dataset: xr.Dataset) -> alt.LayerChart:
    """Cosines between the mean gradients of classes."""
    scale = alt.Scale(scheme="purpleorange", domain=[-1, 1], reverse=True)
    return _heat_map(dataset, cosines(dataset), scale, ("class", "class", "cosine"))


def _confusions(dataset: xr.Dataset) -> d.Array:
    """(C, C) weights of wrong labels; NaN on the diagonal and for none."""
    weights = np.array(dataset["cross_class_weight"].values, dtype=np.float64)
    np.fill_diagonal(weights, np.nan)
    return np.where(weights > 0, weights, np.nan)


@d.needs(
    "cross_class_weight",
    some=lambda dataset: np.isfinite(_confusions(dataset)).any(),
    reason="every cross-class weight is zero: no example puts any probability on a wrong class",
)
def cross_class_weights(dataset: xr.Dataset) -> alt.LayerChart:
    """Weight of examples of one class under the label of another: how much each confusion counts."""
    scale = alt.Scale(scheme="blues", type="log")
    return _heat_map(dataset, _confusions(dataset), scale, ("true class", "potential class", "weight"))


def _chosen_classes(dataset: xr.Dataset) -> list[int]:
    """All classes, or those of largest weight when there are too many to label."""
    count = int(dataset.sizes["class"])
    if count <= d.MOST_ROWS:
        return list(range(count))
    source = dataset["class_weight"].values if d.holds(dataset, "class_weight") else np.arange(count)[::-1]
    heaviest = np.argsort(-np.nan_to_num(source))[: d.MOST_ROWS]
    return sorted(int(index) for index in heaviest)


def _heat_map(dataset: xr.Dataset, matrix: d.Array, scale: alt.Scale, titles: tuple[str, str, str]) -> alt.LayerChart:
    """A square of classes by classes; `titles` name the rows, the columns and the value."""
    names, chosen = class_names(dataset), _chosen_classes(dataset)
    down_title, across_title, what = titles
    cells = [
        {"row": names[i], "column": names[j], "value": d.plain(matrix[i, j])}
        for i in chosen
        for j in chosen
        if np.isfinite(matrix[i, j])
    ]
    order, values = [names[i] for i in chosen], [cell["value"] for cell in cells]
    upright = max(map(len, order)) <= 2 and len(order) <= 20
    axis: dict[str, Any] = {"labelLimit": 90, "ticks": False, "domain": False, "titlePadding": 8}
    axis |= {"labelFontSize": 9 if len(order) > 20 else 12, "labelOverlap": "greedy"}
    down, across = alt.Axis(**axis), alt.Axis(**axis, labelAngle=0 if upright else -90)
    chart = d.blank(cells).mark_rect(stroke="white", strokeWidth=0.5 if len(order) > 20 else 1)
    chart = chart.encode(
        x=alt.X("column:N", sort=order, scale=alt.Scale(domain=order), title=across_title, axis=across),
        y=alt.Y("row:N", sort=order, scale=alt.Scale(domain=order), title=down_title, axis=down),
        color=alt.Color("value:Q", scale=scale, legend=_gradient(scale, what, values)),
        tooltip=[
            d.word("row", down_title),
            alt.Tooltip("column:N", title=across_title if across_title != down_title else "and"),
            d.tip("value", what),
        ],
    )
    note = f"{len(chosen)} of {len(names)} classes: those of largest weight"
    title = {"title": note} if len(chosen) < len(names) else {}
    return d.finished(alt.layer(chart), width=420, height=max(380, 11 * len(order)), **title)


def _gradient(scale: alt.Scale, title: str, values: list[float]) -> alt.Legend:
    look: dict[str, Any] = {"title": title, "orient": "top", "gradientLength": 200, "gradientThickness": 10}
    if scale.to_dict().get("type") == "log":
        return alt.Legend(**look, values=d.decades(min(values), max(values), most=4), format=".0e")
    return alt.Legend(**look, values=[-1, -0.5, 0, 0.5, 1], format="~g")


def class_names(dataset: xr.Dataset) -> list[str]:
    """Names of the classes, or their numbers."""
    named = dataset["class"].values if "class" in dataset.coords else range(dataset.sizes["class"])
    return [str(name) for name in named]


@d.needs("map_x", "map_y", "map_class_x", "map_class_y")
def three_level_map(dataset: xr.Dataset) -> alt.LayerChart:
    """Class means (large) and cross-class means (small), near each other where they point the same way."""
    names = class_names(dataset)
    table: list[d.Row] = []
    for by in COLOURINGS:
        for row in d.rows(dataset, "map_class_x", "map_class_y"):
            name, place = row["class"], {"x": row["map_class_x"], "y": row["map_class_y"]}
            table.append({"by": by, "label": name, "size": "class", "name": f"class {name}", **place})
        for row in d.rows(dataset, "map_x", "map_y"):
            true, potential, place = row["class"], row["cross_class"], {"x": row["map_x"], "y": row["map_y"]}
            text = f"{true} as if {potential}" if true != potential else f"{true}, true label"
            size = "true" if true == potential else "cross-class"
            label = true if by == "true" else potential
            table.append({"by": by, "label": label, "size": size, "name": text, **place})
    few = len(names) <= FEW_CLASSES
    scale = alt.Scale(domain=names, scheme="tableau10" if few else "turbo")
    legend = alt.Legend(columns=FEW_CLASSES) if few else None
    plane: dict[str, Any] = {"scale": alt.Scale(zero=False, padding=12), "axis": None}
    base = d.blank(table).encode(
        x=alt.X("x:Q", **plane),
        y=alt.Y("y:Q", **plane),
        color=alt.Color("label:N", sort=names, scale=scale, legend=legend),
        tooltip=[d.word("name", "mean of")],
    )
    shown = "datum.by === by && datum.size === "
    means = base.transform_filter(shown + "'class'").mark_circle(size=420, opacity=0.45)
    crossed = base.transform_filter(shown + "'cross-class'").mark_circle(size=55, opacity=0.95)
    true = base.transform_filter(shown + "'true'").mark_point(size=55, filled=False, strokeWidth=1.6)
    captions = base.transform_filter(shown + "'class'").mark_text(fontSize=11, fontWeight=600, color=d.INK)
    captions = captions.encode(text=alt.Text("label:N"), color=alt.ColorValue(d.INK))
    chart = d.layered(means, crossed, true, captions, choices=[d.choice("by", COLOURINGS)])
    return d.finished(chart, width=MAP_SIZE, height=MAP_SIZE)

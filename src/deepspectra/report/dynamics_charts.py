"""What moves in a sweep: every measure against axes of numbers and against depth, its mean and spread over seeds.

What a store has is drawn: measures that are known by their names in figures of their own, and any number by choice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import altair as alt
import numpy as np
import xarray as xr

from deepspectra.report.drawing import (
    INK,
    OPERATOR_COLOURS,
    PART_COLOURS,
    Array,
    Mark,
    Row,
    carried,
    choice,
    colour,
    finished,
    layered,
    needs,
    plain,
    word,
)

OF_CELLS = ("seconds", "peak_memory")  # of every sweep
SEED = "seed"  # the axis over which means are taken
WIDE_RANGE = 10  # ratio from which an axis of positive numbers is logarithmic
SIZES = {1: 860, 2: 410, 3: 270}  # widths of figures in a row
ANY, CHOSEN = "any measure", "measure_chosen"
KEY, HEIGHT, LABEL = "=key", "=height", "=label"  # made of rows whose fields are also called as axes are
LAYER, OF_LAYER = "layer", "layer_"  # the names of layers, and what those of their measures begin with
SHADES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
PALE_CLASS = "#7fc3ea"
OWN_COLOURS = alt.Resolve(scale=alt.ScaleResolveMap(color="independent"))


class Line(NamedTuple):
    """A measure of a family: what it is called there, its colour, and how it follows from the store's."""

    label: str
    colour: str
    first: bool = False  # of an array
    rest: bool = False  # one minus it


class Family(NamedTuple):
    """Measures of one unit that are drawn together; those of H in place of G's where a store has both."""

    title: str
    lines: Mapping[str, Line]
    log: bool = False


G, H, R = (OPERATOR_COLOURS[name] for name in ("gauss_newton", "hessian", "residual"))
FAMILIES = (
    Family("Training loss", {"loss": Line("training loss", INK)}, log=True),
    Family(
        "Share of examples misclassified",
        {
            "accuracy": Line("training error", INK, rest=True),
            "test_accuracy": Line("test error", "#CC79A7", rest=True),
        },
    ),
    Family(
        "Outliers, and how many are left without means",
        {
            "hessian_outliers": Line("outliers of H", H),
            "outliers": Line("outliers of G", G),
            "left_class_subtraction": Line("of G without class means", PALE_CLASS),
            "left_class_logit_subtraction": Line("of G without class and logit means", PART_COLOURS["logit"]),
            "hessian_left_class_subtraction": Line("of H without class means", PART_COLOURS["class"]),
            "hessian_left_class_logit_subtraction": Line(
                "of H without class and logit means", PART_COLOURS["residual"]
            ),
        },
    ),
    Family(
        "Largest eigenvalue and edge of the bulk",
        {
            "hessian_value": Line("λ₁ of H", H, first=True),
            "value": Line("λ₁ of G", G, first=True),
            "hessian_bulk_edge": Line("edge of H", R),
            "bulk_edge": Line("edge of G", PART_COLOURS["within"]),
        },
        log=True,
    ),
    Family(
        "Gauss-Newton G against residual R",
        {
            "norm": Line("Frobenius norm of G", G),
            "norm_residual": Line("Frobenius norm of R", R),
            "trace": Line("trace of G", "#b79ad0"),
            "trace_residual": Line("trace of R", "#eaa27a"),
        },
        log=True,
    ),
    Family(
        "Traces of the parts of G",
        {f"trace_{name}": Line(name, shade) for name, shade in PART_COLOURS.items() if name != "residual"},
        log=True,
    ),
    Family(
        "What the outliers of G are made of",
        {f"share_{name}": Line(name, shade) for name, shade in PART_COLOURS.items()},
    ),
    Family(
        "What the outliers of H are made of",
        {f"hessian_share_{name}": Line(name, shade) for name, shade in PART_COLOURS.items()},
    ),
    Family(
        "Cross-class bump above the bulk within classes, in decades of λ",
        {
            "bump_distance": Line("median to median", PART_COLOURS["interaction"]),
            "bump_clearance": Line("median to the bulk's edge", PART_COLOURS["within"]),
        },
    ),
)


def is_sweep(dataset: xr.Dataset) -> bool:
    """Whether it is the store of a sweep."""
    return "status" in dataset and "looks" in dataset.attrs


def _lacks_numbers(dataset: xr.Dataset) -> bool:
    return is_sweep(dataset) and bool(_columns(dataset)) and bool(_scalars(dataset))


@needs(some=_lacks_numbers, reason="the sweep has no measure along an axis of two numbers or more.")
def dynamics(dataset: xr.Dataset) -> alt.LayerChart:
    """Families of measures, one below the other, against every axis; the other axes are chosen by menus."""
    return drawn(dataset)


@needs(some=lambda dataset: is_sweep(dataset) and _of_layers(dataset), reason="the sweep measured no layers.")
def by_layer(dataset: xr.Dataset) -> alt.LayerChart:
    """A measure of every layer against depth, one figure an axis, its values by colours; menus choose the rest."""
    axes = [name for name in _axes(dataset) if name != SEED and dataset.sizes[name] > 1]
    menus = {name: _options(dataset, name) for name in axes}
    choices = [choice(f"at_{name}", menus[name], first=_shown_first(dataset, name), menu=f"{name} ") for name in axes]
    measures = {name: name.removeprefix(OF_LAYER).replace("_", " ") for name in _of_layers(dataset)}
    choices.append(choice(CHOSEN, measures, first=next(iter(measures)), menu="measure "))
    table = _layer_table(dataset, [*measures])
    alike = [axis for axis in axes if _same_layers(table, axis)]
    parts = [_depth(axis, menus, table) for axis in alike or [SEED]]
    pairs = [alt.hconcat(*parts[j : j + 2], resolve=OWN_COLOURS) for j in range(0, len(parts), 2)]
    return finished(_below(pairs, table, choices))


def _of_layers(dataset: xr.Dataset) -> list[str]:
    """Measures that have a number a layer."""
    axes = len(_axes(dataset))
    if LAYER not in dataset.data_vars or dataset[LAYER].ndim != axes + 1:
        return []
    return [
        str(name)
        for name, one in dataset.data_vars.items()
        if str(name).startswith(OF_LAYER) and one.ndim == axes + 1 and _has_numbers(one)
    ]


def _layer_table(dataset: xr.Dataset, measures: list[str]) -> list[Row]:
    """A row a layer of each finished cell: its axes, name, depth and measures."""
    rows = []
    for at in np.argwhere(dataset["status"].values == "done"):
        cell = dataset.isel(dict(zip(dataset["status"].dims, at.tolist(), strict=True)))
        about: Row = {f"{name} ": _text(cell[name].item()) for name in _axes(dataset)}
        values = {name: cell[name].values for name in measures}
        names = [str(name) for name in cell[LAYER].values if str(name) not in ("", "nan")]
        for depth, name in enumerate(names):
            found = {key: plain(some[depth]) for key, some in values.items() if depth < len(some)}
            rows.append(about | {LAYER: name, "depth": depth} | found)
    return rows


def _same_layers(table: list[Row], axis: str) -> bool:
    """Whether networks have the same layers all along an axis, as they have not along one of models."""
    names: dict[Any, set[str]] = {}
    for row in table:
        names.setdefault(row[f"{axis} "], set()).add(row[LAYER])
    return all(some == next(iter(names.values())) for some in names.values())


def _depth(axis: str, menus: Mapping[str, list[str]], table: list[Row]) -> Mark:
    """The chosen measure against depth, where the other axes are as menus say."""
    base = alt.Chart()
    for name in menus:
        if name != axis:
            base = base.transform_filter(f"datum['{name} '] === at_{name}")
    base = base.transform_calculate(height=f"datum[{CHOSEN}]", label=f"datum['{axis} ']")
    base = base.transform_filter("isValid(datum.height)")
    order = alt.EncodingSortField("depth", op="min")
    x = alt.X(f"{LAYER}:N", title=None, sort=order, axis=alt.Axis(labelAngle=-40, labelLimit=110))
    y = alt.Y("height:Q", title=None, scale=alt.Scale(zero=False))
    values = menus.get(axis, list(dict.fromkeys(str(row[f"{axis} "]) for row in table)) if table else [])
    shades = {value: SHADES[j % len(SHADES)] for j, value in enumerate(values)}
    base = base.encode(x=x, color=colour(shades, columns=4, title=axis.replace("_", " ")))
    mean = base.mark_line(strokeWidth=1.8).encode(y=y.aggregate("mean"))
    tooltip = [word(LAYER, "layer"), alt.Tooltip("height:Q", title="value", format=".4~g")]
    tooltip += [word(f"{name} ", name) for name in dict.fromkeys([*menus, axis])]
    points = base.mark_point(filled=True, size=30, opacity=0.7).encode(y=y, tooltip=tooltip)
    return layered(mean, points, width=SIZES[2], height=210)


def drawn(
    dataset: xr.Dataset, chosen: Mapping[str, Any] | None = None, families: tuple[str, ...] = ()
) -> alt.LayerChart:
    """The chart with some choices made, and of some families by title; all, and any measure, by default."""
    columns, scalars = _columns(dataset), _scalars(dataset)
    menus = {name: _options(dataset, name) for name in _axes(dataset) if name != SEED and dataset.sizes[name] > 1}
    first = {name: str((chosen or {}).get(name, _shown_first(dataset, name))) for name in menus}
    choices = [choice(f"at_{name}", menus[name], first=first[name], menu=f"{name} ") for name in menus]
    shown = [family for family in FAMILIES if not families or family.title in families]
    figures = [
        alt.hconcat(*(_figure(dataset, family, lines, column, menus) for column in columns), title=family.title)
        for family in shown
        if (lines := {name: line for name, line in family.lines.items() if name in _measures(dataset)})
    ]
    if not families:
        choices.append(choice(CHOSEN, scalars, menu="measure "))
        parts = [_figure(dataset, Family(ANY, {}), {}, column, menus) for column in columns]
        figures.append(alt.hconcat(*parts, title="Any measure, as chosen above"))
    return finished(_below(figures, _table(dataset), choices))


def _axes(dataset: xr.Dataset) -> list[str]:
    return [str(name) for name in dataset["status"].dims]


def _columns(dataset: xr.Dataset) -> list[str]:
    """Axes of two numbers or more, that of the looks first."""
    found = [
        name
        for name in _axes(dataset)
        if name != SEED and dataset[name].dtype.kind in "iuf" and dataset.sizes[name] > 1
    ]
    return sorted(found, key=lambda name: name != dataset.attrs["looks"])


def _options(dataset: xr.Dataset, name: str) -> list[str]:
    """Values of an axis as menus and filters spell them."""
    return [_text(value) for value in dataset[name].values.tolist()]


def _text(value: Any) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _shown_first(dataset: xr.Dataset, name: str) -> str:
    """The first of names, the last of numbers, among those that have finished cells."""
    others = [axis for axis in _axes(dataset) if axis != name]
    there = (dataset["status"] == "done").any(others).values
    options = [one for one, done in zip(_options(dataset, name), there, strict=True) if done]
    options = options or _options(dataset, name)
    return options[-1] if name in _columns(dataset) else options[0]


def _scalars(dataset: xr.Dataset) -> list[str]:
    """Measures of one number a cell, of which there are some; what is told of every cell comes last."""
    axes = set(_axes(dataset))
    found = [str(name) for name, one in dataset.data_vars.items() if set(one.dims) == axes and _has_numbers(one)]
    return sorted(found, key=lambda name: name in OF_CELLS)


def _has_numbers(measure: xr.DataArray) -> bool:
    return measure.dtype.kind in "iufb" and bool(np.isfinite(measure.values).any())


def _measures(dataset: xr.Dataset) -> dict[str, Array]:
    """What families and menus draw of each cell."""
    known = {name: line for family in FAMILIES for name, line in family.lines.items()}
    axes = _axes(dataset)
    found = {name: dataset[name].transpose(*axes).values for name in _scalars(dataset)}
    for name, line in known.items():
        if line.first and name in dataset and dataset[name].ndim == len(axes) + 1 and _has_numbers(dataset[name]):
            found[name] = dataset[name].transpose(*axes, ...).values[..., 0]
        if line.rest and name in found:
            found[name] = 1 - found[name]
    return found


def _table(dataset: xr.Dataset) -> list[Row]:
    """A row a finished cell: its axes and measures."""
    measures = _measures(dataset)
    axes = {name: dataset[name].values.tolist() for name in _axes(dataset)}
    rows = []
    for at in np.argwhere(dataset["status"].values == "done"):
        row: Row = {name: values[j] for (name, values), j in zip(axes.items(), at, strict=True)}
        row |= {f"{name} ": _text(value) for name, value in row.items()}  # as menus spell it
        rows.append(row | {name: plain(values[tuple(at)]) for name, values in measures.items()})
    return rows


def _below(figures: list[Mark], table: list[Row], choices: list[alt.Parameter]) -> Mark:
    """Figures of the same rows one below the other, with their menus: in one step, as `layered` layers."""
    return alt.vconcat(
        *figures, data=carried(table), params=[choice.param for choice in choices], resolve=OWN_COLOURS
    )


def _figure(
    dataset: xr.Dataset,
    family: Family,
    lines: Mapping[str, Line],
    column: str,
    menus: Mapping[str, list[str]],
) -> Mark:
    """One family against one axis: means over seeds as lines, from lowest to highest as bands, seeds as points."""
    columns = _columns(dataset)
    base = alt.Chart()
    for name in menus:
        if name != column:
            base = base.transform_filter(f"datum['{name} '] === at_{name}")
    if lines:
        names = {name: line.label for name, line in lines.items()}
        base = base.transform_fold(list(names), as_=[KEY, HEIGHT])
        base = base.transform_calculate(**{LABEL: f"({names!r})[datum['{KEY}']]"})
    else:
        base = base.transform_calculate(**{HEIGHT: f"datum[{CHOSEN}]", LABEL: CHOSEN})
    height = f"datum['{HEIGHT}']"
    base = base.transform_filter(f"isValid({height})" + (f" && {height} > 0" if family.log else ""))
    x = alt.X(f"{column}:Q", title=column.replace("_", " "), scale=_scale(dataset[column].values))
    scale = alt.Scale(type="log") if family.log else alt.Scale(zero=False)
    y = alt.Y(f"{HEIGHT}:Q", title=None, scale=scale)
    shades = {line.label: line.colour for line in lines.values()}
    shade = colour(shades, LABEL, columns=3) if lines else alt.ColorValue(INK)
    base = base.encode(x=x, color=shade)
    low_high = {"y": y.aggregate("min"), "y2": alt.Y2(f"{HEIGHT}:Q", aggregate="max")}
    band = base.mark_area(opacity=0.16).encode(**low_high)
    mean = base.mark_line(strokeWidth=1.8).encode(y=y.aggregate("mean"))
    details = [word(name, name) for name in _axes(dataset)]
    tooltip = [word(LABEL, "measure"), alt.Tooltip(f"{HEIGHT}:Q", title="value", format=".4~g"), *details]
    points = base.mark_point(filled=True, size=26, opacity=0.65).encode(y=y, tooltip=tooltip)
    return layered(band, mean, points, width=SIZES.get(len(columns), 270), height=190)


def _scale(values: Array) -> alt.Scale:
    """Of an axis: logarithmic for numbers of several orders of magnitude, also with zero among them."""
    values = values.astype(float)  # ten times a large integer may be none
    positive = values[values > 0]
    wide = len(positive) > 1 and positive.max() >= WIDE_RANGE * positive.min()
    if not wide or (values < 0).any():
        return alt.Scale(zero=False, nice=False, padding=8)
    if len(positive) < len(values):
        return alt.Scale(type="symlog", constant=float(positive.min()), nice=False, padding=8)
    return alt.Scale(type="log", nice=False, padding=8)

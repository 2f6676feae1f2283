"""What the charts share: colours, numbers as text, reading the dataset, axes, one visual language."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import altair as alt
import numpy as np
import vl_convert
import xarray as xr
from altair.utils.schemapi import debug_mode
from numpy.typing import NDArray

from deepspectra.errors import DataError, FileError, OptionError

Row = dict[str, Any]
Mark = Any  # a chart under construction: Altair's annotations lose its type when calls are chained
Array = NDArray[np.float64]
Draw = Callable[[xr.Dataset], alt.LayerChart]

# Okabe and Ito's palette, safe for colour-vision deficiencies. One colour per part, everywhere.
PART_COLOURS = {
    "class": "#0072B2",
    "logit": "#E69F00",
    "interaction": "#CC79A7",
    "within": "#009E73",
    "true": "#56B4E9",
    "residual": "#D55E00",
}
OPERATOR_COLOURS = {"hessian": "#1f2933", "gauss_newton": "#6a3d9a", "residual": PART_COLOURS["residual"]}
OPERATOR_NAMES = {"hessian": "Hessian H", "gauss_newton": "Gauss-Newton G", "residual": "residual R"}
SYMBOLS = {"hessian": "H", "gauss_newton": "G", "residual": "R"}
LIGHT_PARTS = ("logit", "true", "interaction")  # whose colours take dark text
LEVEL_COLOURS = {"class": PART_COLOURS["class"], "cross_class": "#882255"}
LEVEL_NAMES = {"class": "class means", "cross_class": "cross-class means"}

INK, MUTED, GRID = "#1f2933", "#5f6c7b", "#e4e8ed"
FONT = "-apple-system, 'Segoe UI', 'Helvetica Neue', Arial, sans-serif"
WIDTH = 720
OVERLAP = "overlap ‖UᵀV‖² / k"
LETTERS, POINTS, ASPECT = 7, 72, 0.68  # of a printed chart: their size, points an inch, height by width
ROW_HEIGHT, ROWS_MARGIN = 0.5, 45  # of a printed chart with a name a row: of the page's height, and points beside
MOST_ROWS = 40  # more cannot be labelled legibly
APART = alt.Resolve(scale=alt.ScaleResolveMap(y="independent"))  # layers with vertical axes of their own
FORMATS = ("svg", "pdf", "png", "html", "json")


# ------------------------------------------------------------------------------------------- numbers as text


def number(value: float, digits: int = 3) -> str:
    """`value` to some significant digits: 0.0213, −1.5, 2.3×10⁻⁷."""
    if not math.isfinite(value):
        return "–"
    text = f"{value:.{digits}g}"
    if "e" not in text:
        return text.replace("-", "−")
    if 1 <= abs(float(text)) < 1e6:
        return f"{float(text):,.0f}".replace("-", "−")
    mantissa, exponent = text.split("e")
    power = "10" + str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{mantissa}×{power}".replace("-", "−")


def tick(value: float) -> str:
    """An axis label in characters every font has: 0.01, −10, 1e−5."""
    text = (
        f"{value:g}"
        if value == 0 or 1e-4 <= abs(value) < 1e5
        else f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    )
    return text.replace("-", "−")


# --------------------------------------------------------------------------------------- reading the dataset


def holds(dataset: xr.Dataset, *names: str) -> bool:
    """Whether every named variable is there and has a finite value."""
    return all(name in dataset and bool(np.isfinite(dataset[name].values).any()) for name in names)


def rows(dataset: xr.Dataset, *names: str, need: Iterable[str] | None = None) -> list[Row]:
    """Variables as records, one per cell of their grid, without cells where a needed one is NaN or missing."""
    needed, present = list(need or names[:1]), [name for name in names if name in dataset]
    if not set(needed) <= set(present):
        return []
    frame = dataset[present].to_dataframe().reset_index().dropna(subset=needed)
    return [{key: plain(value) for key, value in row.items()} for row in frame.to_dict("records")]


def pivot(dataset: xr.Dataset, name: str, column: str, *keys: str) -> dict[tuple[Any, ...], dict[Any, Any]]:
    """A variable as a table: what `keys` say of a row → what `column` says → value, where there is one."""
    table: dict[tuple[Any, ...], dict[Any, Any]] = {}
    for row in rows(dataset, name):
        table.setdefault(tuple(row[key] for key in keys), {})[row[column]] = row[name]
    return table


def by_operator(dataset: xr.Dataset, name: str) -> dict[str, float]:
    """A number of each operator, where there is one."""
    return {row["operator"]: row[name] for row in rows(dataset, name)}


def plain(value: Any) -> Any:
    """A value JSON can hold, floats to nine digits."""
    if isinstance(value, (float, np.floating)):
        return float(f"{value:.9g}") if math.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value


class Chart:
    """A function that draws an analysis, and what the analysis must hold for it.

    Called on an analysis that lacks something, it raises DataError with the reason, which `lacks` tells beforehand.
    """

    def __init__(self, draw: Draw, needed: Sequence[str], some: Callable[[xr.Dataset], Any], reason: str) -> None:
        functools.update_wrapper(self, draw)
        self.name, self.draw = draw.__name__, draw
        self.needed, self.some, self.reason = needed, some, reason

    def __call__(self, dataset: xr.Dataset) -> alt.LayerChart:
        """The chart, whose ingredients are not held against Vega-Lite's schema one by one: no data change that."""
        if reason := self.lacks(dataset):
            raise DataError(reason)
        with debug_mode(False):
            return self.draw(dataset)

    def lacks(self, dataset: xr.Dataset) -> str:
        """Why it cannot be drawn; empty if it can."""
        missing = [name for name in self.needed if not holds(dataset, name)]
        if missing:
            return (
                f"this chart draws {', '.join(self.needed)}; the analysis has no values of {', '.join(missing)}. "
                "Run the step that computes them, or leave the chart out."
            )
        return "" if self.some(dataset) else self.reason


def needs(
    *needed: str, some: Callable[[xr.Dataset], Any] = lambda _: True, reason: str = ""
) -> Callable[[Draw], Chart]:
    """Make a chart of a function that draws these variables; without `some` of them, for a reason, there is none."""
    return lambda draw: Chart(draw, needed, some, reason)


# ---------------------------------------------------------------------------------------- shared ingredients


class _Rows(alt.InlineData):
    """Rows that charts share, which Altair would otherwise copy, and check one by one, at every step of building."""

    _class_is_valid_at_instantiation = False

    def __deepcopy__(self, *_: object) -> _Rows:
        return self


def carried(table: list[Row]) -> alt.InlineData:
    """Rows that a chart carries itself."""
    return _Rows(values=table)


def blank(table: list[Row]) -> Mark:
    """An empty chart that carries its rows itself."""
    return alt.Chart(carried(table))


def layered(*marks: Mark, choices: Sequence[alt.Parameter] = (), **properties: Any) -> alt.LayerChart:
    """Marks in one frame, and what a reader chooses.

    In one step, since each further one, such as `add_params`, copies all that there is, several times.
    """
    params = [choice.param for choice in choices] or alt.Undefined
    chart: Any = alt.layer(*marks, params=params, **properties)
    found: alt.LayerChart = chart
    return found


def finished(chart: Mark, **properties: Any) -> alt.LayerChart:
    """One visual language: quiet axes, a light grid, text that stays legible in print. It changes the chart."""
    text: dict[str, Any] = {"labelColor": INK, "titleColor": INK, "labelFontSize": 12, "titleFontSize": 12}
    line: dict[str, Any] = {"gridColor": GRID, "domainColor": "#9aa5b1", "tickColor": "#9aa5b1"}
    legend: dict[str, Any] = {"symbolSize": 110, "symbolOpacity": 1, "labelLimit": 400, "columnPadding": 18}
    properties["config"] = alt.Config(
        font=FONT,
        background="white",
        padding=4,
        view=alt.ViewConfig(stroke=None),
        axis=alt.AxisConfig(**text, **line, titleFontWeight=500, titlePadding=10),
        legend=alt.LegendConfig(**text, **legend, titleFontWeight=500, orient="top", title=None, columns=3),
        title=alt.TitleConfig(anchor="start", fontSize=13, fontWeight=600, color=INK, subtitleColor=MUTED),
    )
    for name, value in properties.items():
        chart[name] = value
    finished: alt.LayerChart = chart
    return finished


def printed(chart: alt.LayerChart, inches: float | None) -> alt.LayerChart:
    """The same for print: as wide as some inches, all marks and letters included, these of 7 points."""
    if inches is None:
        return chart
    if not 0 < inches < math.inf:
        raise OptionError(f"inches={inches!r}; expected a positive width, or None for that of the page.")
    spec = chart.to_dict(validate=False)
    config = spec["config"]
    text = {"labelFontSize": LETTERS, "titleFontSize": LETTERS}
    config["axis"] |= {**text, "titlePadding": 3, "tickSize": 3}
    config["legend"] |= {**text, "symbolSize": 30, "columnPadding": 6, "rowPadding": 1, "offset": 3}
    config["title"]["fontSize"] = LETTERS + 1
    config["padding"] = {"left": 1, "top": 1, "right": 6, "bottom": 1}  # half of the last tick's label
    width, page_height = inches * POINTS, spec["height"]
    height, pending = ASPECT * width, [spec]
    while pending:
        one = pending.pop()
        pending += one.get("layer", [])
        mark, y = one.get("mark"), one.get("encoding", {}).get("y", {})
        if isinstance(mark, dict):
            is_text = mark["type"] == "text"
            mark |= {"fontSize": LETTERS} if is_text else {}
            mark |= {"size": mark["size"] / 3} if "size" in mark and mark["type"] != "bar" else {}
            thin = "strokeWidth" in mark and not is_text  # of letters it is a halo
            mark |= {"strokeWidth": min(0.9, mark["strokeWidth"])} if thin else {}
        if y.get("type") == "nominal":  # rows of names, which need room
            height = max(height, ROW_HEIGHT * page_height + ROWS_MARGIN)
        if "labelLineHeight" in (y.get("axis") or {}):  # names in two lines
            y["axis"] |= {"labelLineHeight": LETTERS + 1, "labelOffset": -LETTERS / 2}
        if y.get("value", 0) < 0:  # letters above the figure, where the legend is
            config["legend"]["offset"] = 2 * LETTERS
    spec |= {"width": width, "height": height, "autosize": {"type": "fit", "contains": "padding"}}
    with debug_mode(False):
        found: alt.LayerChart = alt.LayerChart.from_dict(spec, validate=False)
    return found


def colour(colours: Mapping[str, str], field: str = "label", **options: Any) -> alt.Color:
    """Fixed colours, by the labels in a field, which the legend shows."""
    scale = alt.Scale(domain=list(colours), range=list(colours.values()))
    return alt.Color(f"{field}:N", scale=scale, legend=alt.Legend(**options), sort=None)


def joined_points(table: list[Row], **encodings: Any) -> Mark:
    """Points, and lines that join those of a label."""
    return blank(table).mark_line(point=True, strokeWidth=1.6).encode(**encodings)


def operator_selector(operators: Sequence[str], *, everything: bool) -> alt.Parameter:
    """A choice of operator: a row of buttons on the page, the first choice in a still picture."""
    if len(operators) == 1:
        return alt.param(name="shown", value=operators[0])
    options = (["all"] if everything else []) + list(operators)
    return choice("shown", {name: OPERATOR_NAMES.get(name, name) for name in options})


def operators_of(table: Iterable[Row]) -> list[str]:
    """The operators that occur, in their order."""
    present = {row["operator"] for row in table}
    return [name for name in OPERATOR_NAMES if name in present]


def labelled(table: list[Row]) -> list[Row]:
    """Rows with the name of their operator for people."""
    return [row | {"label": OPERATOR_NAMES.get(row["operator"], row["operator"])} for row in table]


def ticks_axis(values: Sequence[float], labels: Sequence[str], **options: Any) -> alt.Axis:
    """An axis with exactly these ticks and labels."""
    places = [float(f"{value:.9g}") for value in values]
    options = {"labelOverlap": "greedy", "labelSeparation": 5, **options}
    return alt.Axis(values=places, labelExpr=f"{list(labels)!r}[indexof({places}, datum.value)]", **options)


def decades(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers within [low, high]: 1, 2, 5 a decade, else 1, 3, else powers of ten, else every n-th."""
    first, last = math.floor(math.log10(low)), math.floor(math.log10(high) + 1e-9)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        ticks = [float(f"{factor}e{power}") for power in range(first, last + 1) for factor in factors]
        ticks = [value for value in ticks if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]
        if len(ticks) <= most:
            return ticks
    return ticks[:: -math.ceil(len(ticks) / most)][::-1]


def both_sides(low: float, high: float, smallest: float) -> list[float]:
    """Zero and the same round numbers on either side of it, from `smallest` on, within [low, high]."""
    ticks = decades(smallest, max(-low, high, smallest), most=5)
    return [value for value in (*(-tick for tick in reversed(ticks)), 0.0, *ticks) if low <= value <= high]


def log_axis(low: float, high: float, most: int = 6, **options: Any) -> alt.Axis:
    """A logarithmic axis with round ticks."""
    ticks = decades(low, high, most)
    return ticks_axis(ticks, [tick(value) for value in ticks], **options)


def tip(field: str, title: str, form: str = ".3~g") -> alt.Tooltip:
    """A number in a tooltip."""
    return alt.Tooltip(field=field, type="quantitative", title=title, format=form)


def word(field: str, title: str) -> alt.Tooltip:
    """A name in a tooltip."""
    return alt.Tooltip(field=field, type="nominal", title=title)


def choice(
    name: str, options: Iterable[str] | Mapping[str, str], *, first: str = "", menu: str = ""
) -> alt.Parameter:
    """A choice on the page among options, with labels if need be, and the first of them in a still picture.

    By buttons, or by a menu with these words before it.
    """
    values = list(options)
    labels = list(options.values()) if isinstance(options, Mapping) else alt.Undefined
    binding = alt.binding_select if menu else alt.binding_radio
    bind = binding(options=values, labels=labels, name=menu or " ")
    return alt.param(name=name, value=first or values[0], bind=bind)


def svg(chart: alt.TopLevelMixin) -> str:
    """A chart as an SVG image."""
    found: str = vl_convert.vegalite_to_svg(chart.to_json())
    return found


def save_chart(chart: alt.TopLevelMixin, path: str | Path) -> None:
    """Save a chart as .svg, .pdf, .png, .html or .json, without a browser.

    Raises:
        OptionError: the suffix is none of these.
    """
    suffix = Path(path).suffix.lower().removeprefix(".")
    if suffix not in FORMATS:
        raise OptionError(f"cannot save a chart as {Path(path).name!r}: use one of .{', .'.join(FORMATS)}")
    extra: dict[str, dict[str, Any]] = {"html": {"inline": True}, "png": {"scale_factor": 2}}
    options: dict[str, Any] = {"format": suffix, **extra.get(suffix, {})}
    try:
        chart.save(str(path), **options)
    except OSError as error:
        raise FileError(f"{path} cannot be written ({error.strerror or error}).") from error

"""Charts of the spectrum: histograms with their bands, outliers, tails, edges and thresholds, on three axes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import altair as alt
import xarray as xr

from deepspectra.report import drawing as d
from deepspectra.report.saved_outliers import outliers
from deepspectra.report.text import percent, symbol

IS_SHOWN = "shown == 'all' || datum.operator == shown"
# Heights of outliers, so that operators do not hide one another.
LANES = {"hessian": 0.06, "gauss_newton": 0.03, "residual": 0.0}
TITLES = {"train": "training data", "test": "test data"}
SIGNS = {"magnitude": 1.0, "positive": 1.0, "negative": -1.0}
ENDS = ("start", "end")
CUT = 0.3  # of the axis, within which what ends there has its words at the axis' end
MARGIN = 0.01  # of a linear axis, on either side
TAIL = [f"tail_{name}" for name in ("exponent", *ENDS, "density_at_start", "density_at_end", "verdict")]
PER_DECADE, PER_UNIT = "fraction of eigenvalues per decade of |λ|", "fraction of eigenvalues per unit of λ"


@dataclass(frozen=True)
class _Line:
    """The eigenvalue axis: where an eigenvalue is drawn, and the encoding that labels it."""

    place: Callable[[float], float]
    ends: tuple[float, float]  # places
    x: alt.X

    def along(self, value: float) -> float:
        """As a fraction of the axis, 0 at its left end."""
        return (self.place(value) - self.ends[0]) / (self.ends[1] - self.ends[0])


def _linear(dataset: xr.Dataset, split: str) -> alt.LayerChart:
    """Densities of H, G and R with their outliers over a linear eigenvalue axis."""
    table = [row for row in bins_of(dataset, "linear") if row["split"] == split]
    low, high = min(row["start"] for row in table), max(row["end"] for row in table)
    ends = low - MARGIN * (high - low), high + MARGIN * (high - low)
    x = _axis(ends, alt.Axis(title="eigenvalue λ", tickCount=8, format="~g"))
    return _spectrum(dataset, table, _Line(lambda value: value, ends, x), split, PER_UNIT)


def _mirrored(dataset: xr.Dataset, split: str) -> alt.LayerChart:
    """Densities per decade of |λ|, negative eigenvalues mirrored to the left, with the power laws of their tails."""
    table = bins_of(dataset, "signed")
    return _spectrum(dataset, table, _mirrored_log(table), split, PER_DECADE, ("negative", "positive"))


def _of_sizes(dataset: xr.Dataset, split: str) -> alt.LayerChart:
    """Densities per decade of |λ|, both signs together, with the power laws of their tails."""
    table = bins_of(dataset, "magnitude")
    low, high = _sizes(table)
    ticks = d.decades(low, high, most=7)
    axis = d.ticks_axis([*map(math.log10, ticks)], [*map(d.tick, ticks)], title="|λ|")
    ends = math.log10(low), math.log10(high)
    line = _Line(lambda value: math.log10(max(abs(value), low)), ends, _axis(ends, axis))
    return _spectrum(dataset, table, line, split, PER_DECADE, ("magnitude",))


def _both(name: str, draw: Callable[[xr.Dataset, str], alt.LayerChart]) -> tuple[d.Chart, d.Chart]:
    """A chart of the problem's data, and another of the test data, on the same axes where these are logarithmic."""
    drawn = []
    for split, end in (("train", ""), ("test", "_test")):

        def chart(dataset: xr.Dataset, split: str = split) -> alt.LayerChart:
            return draw(dataset, split)

        chart.__name__, chart.__doc__ = name + end, draw.__doc__
        drawn.append(d.needs("bin_mass", *(["test_eigenvalue"] if end else []))(chart))
    return drawn[0], drawn[1]


spectrum, spectrum_test = _both("spectrum", _linear)
log_spectrum, log_spectrum_test = _both("log_spectrum", _mirrored)
magnitude_spectrum, magnitude_spectrum_test = _both("magnitude_spectrum", _of_sizes)


def _sizes(table: list[d.Row]) -> tuple[float, float]:
    """The smallest and the largest |λ| of bins that may hold some."""
    ends = [abs(row[end]) for row in table if row["high"] > 0 for end in ENDS if row[end]] or [1e-3, 1.0]
    return min(ends), max(ends)


def _axis(ends: tuple[float, float], axis: alt.Axis) -> alt.X:
    return alt.X("x:Q", scale=alt.Scale(domain=list(ends), nice=False), axis=axis)


def bins_of(dataset: xr.Dataset, view: str) -> list[d.Row]:
    """The histograms of a view, rows in the order of their bins."""
    names = [f"bin_{name}" for name in (*ENDS, "mass", "low", "high")]
    table = d.labelled(d.rows(dataset[names].sel(view=view), *names))
    for row in table:
        row |= {name.removeprefix("bin_"): row.pop(name) for name in names}
    return sorted(table, key=lambda row: (row["split"], row["operator"], row["bin"]))


def _spectrum(
    dataset: xr.Dataset, table: list[d.Row], line: _Line, split: str, title: str, sides: tuple[str, ...] = ()
) -> alt.LayerChart:
    """Of the bins of all splits, which share axes, those of one, with what stands out of them and what fits them."""
    operators = d.operators_of(table)
    about_zero = [row for row in table if sides and row["start"] <= 0 < row["end"]]  # which has no decades
    table = [row for row in table if row not in about_zero]
    for row in table:
        row["x"], row["x2"] = line.place(row["start"]), line.place(row["end"])
        row["known"] = row["high"] - row["low"] <= row["mass"]
        row |= {name: row[name] / ((row["x2"] - row["x"]) or 1.0) for name in ("mass", "low", "high")}
    tops = [row["mass"] for row in table if row["known"] and row["mass"] > 0] or [0.1, 1.0]
    span = max(min(tops) / 2, max(tops) * 1e-9), 2 * max(tops)
    table = [row for row in table if row["split"] == split]
    tails = [row for row in d.rows(dataset, *TAIL) if row["split"] == split and row["side"] in sides]
    layers = [alt.layer(*_histograms(table, operators, line, span, title), *_power_laws(tails, line, span))]
    marks = [*_outliers(dataset, line), *_edges(dataset, operators, line)] if split == "train" else []
    if marks := marks + _unresolved([row for row in about_zero if row["split"] == split], line):
        layers.append(alt.layer(*marks))
    choices = [d.operator_selector(operators, everything=True)]
    chart = d.layered(*layers, choices=choices, resolve=d.APART)
    named = {"title": TITLES[split]} if dataset.sizes["split"] > 1 else {}
    return d.finished(chart, width=d.WIDTH, height=340, **named)


def _histograms(
    table: list[d.Row], operators: list[str], line: _Line, span: tuple[float, float], title: str
) -> list[d.Mark]:
    """Steps where a bin is known, and boxes from the least to the most that any can hold."""
    low, high = span
    drawn = alt.Scale(type="log", domain=[low, high], nice=False)
    shade = d.colour({d.OPERATOR_NAMES[name]: d.OPERATOR_COLOURS[name] for name in operators})
    keep = ("operator", "label", "x", "x2", "start", "end", "mass", "low", "high")
    boxes, steps, run = [], [], 0
    for row, following in zip(table, [*table[1:], {}], strict=True):
        shown: d.Row = {key: d.plain(row[key]) for key in keep}
        shown |= {name: d.plain(max(row[name], low / 10)) for name in ("mass", "low", "high")}
        if shown["high"] > shown["low"]:
            boxes.append(shown)
        if row["known"]:
            steps.append({key: shown[key] for key in keep if key not in ("x2", "low", "high")} | {"run": run})
        goes_on = following.get("x") == row["x2"] and following["operator"] == row["operator"]
        if row["known"] and not (goes_on and following["known"]):
            steps.append(steps[-1] | {"x": shown["x2"]})  # where its last step ends
            run += 1
    tips = [d.word("label", "of"), d.tip("start", "λ from"), d.tip("end", "to"), d.tip("mass", "density")]
    band = d.blank(boxes).transform_filter(IS_SHOWN).mark_rect(opacity=0.2, clip=True, strokeWidth=0)
    band = band.encode(x=line.x, x2=alt.X2("x2:Q"), y=alt.Y("low:Q", scale=drawn), y2=alt.Y2("high:Q"), color=shade)
    curve = d.blank(steps).transform_filter(IS_SHOWN)
    curve = curve.mark_line(strokeWidth=1.4, clip=True, interpolate="step-after").encode(
        x=line.x,
        y=alt.Y("mass:Q", scale=drawn, axis=d.log_axis(low, high, title=title)),
        color=shade,
        detail=alt.Detail("run:N"),
        tooltip=tips,
    )
    return [*([band] if boxes else []), curve]


def _power_laws(tails: list[d.Row], line: _Line, span: tuple[float, float]) -> list[d.Mark]:
    """The power law of each tail as a straight line, with its exponent where it is the verdict, else faint."""
    ends, texts = [], []
    for row in d.labelled([row for row in tails if row["tail_verdict"] != "not resolved"]):
        own: d.Row = {key: row[key] for key in ("operator", "label", "side")}
        own["strength"] = 1.0 if row["tail_verdict"] == "power law" else 0.35
        sign = SIGNS[row["side"]]
        points = [(line.place(sign * row[f"tail_{at}"]), row[f"tail_density_at_{at}"]) for at in ENDS]
        ends += [own | {"x": x, "mass": y} for x, y in points]
        if row["tail_verdict"] == "power law":
            (x, y), (x2, y2) = points
            texts.append(own | {"x": (x + x2) / 2, "mass": math.sqrt(y * y2)})
            texts[-1]["text"] = f"|λ|^−{row['tail_exponent']:.2g}"
    if not ends:
        return []
    y = alt.Y("mass:Q", scale=alt.Scale(type="log", domain=list(span), nice=False))
    shared = {"x": line.x, "y": y, "color": alt.Color("label:N", sort=None)}
    rule = d.blank(ends).transform_filter(IS_SHOWN).mark_line(strokeDash=[2, 2], strokeWidth=2, clip=True)
    rule = rule.encode(**shared, opacity=alt.Opacity("strength:Q", scale=None), detail=alt.Detail("side:N"))
    text = d.blank(texts).transform_filter(IS_SHOWN).mark_text(dx=6, dy=-6, align="left", fontSize=11)
    return [rule, *([text.encode(**shared, text=alt.Text("text:N"))] if texts else [])]


def _unresolved(about_zero: list[d.Row], line: _Line) -> list[d.Mark]:
    """Bars over the values about zero that are in one bin, with the share of the eigenvalues there."""
    table = [
        {"operator": row["operator"], "label": row["label"], "x": line.place(row["start"])}
        | {"x2": line.place(row["end"]), "lane": 0.16 + 3 * LANES[row["operator"]]}
        | {"text": f"{percent(row['mass'])} of {symbol(row['operator'])}", "cut": line.along(row["end"]) < CUT}
        for row in about_zero
        if row["mass"] > 0
    ]
    shared = {
        "y": alt.Y("lane:Q", scale=alt.Scale(domain=[0, 1]), axis=None),
        "color": alt.Color("label:N", sort=None),
    }
    base = d.blank(table).transform_filter(IS_SHOWN).encode(**shared)
    rule = base.mark_rule(strokeWidth=3, opacity=0.5, clip=True).encode(x=line.x, x2=alt.X2("x2:Q"))
    middle = base.transform_calculate(x="(datum.x + datum.x2) / 2")
    texts = [
        middle.transform_filter("!datum.cut").mark_text(dy=-7, fontSize=11).encode(x=line.x, text=alt.Text("text:N")),
        base.transform_filter("datum.cut")
        .mark_text(dy=-7, dx=2, fontSize=11, align="left")
        .encode(x=alt.XValue(0), text=alt.Text("text:N")),
    ]
    return [rule, *texts] if table else []


def _outliers(dataset: xr.Dataset, line: _Line) -> list[d.Mark]:
    found = d.labelled(outliers(dataset))
    if not found:
        return []
    parts = [part for part in d.PART_COLOURS if any(f"share {part}" in row for row in found)]
    for row in found:
        row |= {"x": d.plain(line.place(row["eigenvalue"])), "lane": LANES[row["operator"]]}
    base = d.blank(found).transform_filter(IS_SHOWN)
    base = base.encode(
        x=line.x,
        y=alt.Y("lane:Q", scale=alt.Scale(domain=[0, 1]), axis=None),
        color=alt.Color("label:N", sort=None),
        tooltip=[
            d.word("label", "outlier of"),
            d.tip("rank", "rank"),
            d.tip("eigenvalue", "λ", ".4~g"),
            d.tip("residual_norm", "‖Av − λv‖", ".2~g"),
            *(d.tip(f"share {part}", part, ".1~%") for part in parts),
        ],
    )
    crowded = len(found) > 2 * d.MOST_ROWS
    return [base.mark_circle(size=15 if crowded else 40, opacity=1, stroke="white", strokeWidth=0.5)]


def _edges(dataset: xr.Dataset, operators: list[str], line: _Line) -> list[d.Mark]:
    """Bulk edge and outlier threshold of the selected operator (of the first one when all are shown)."""
    names = {"bulk_edge": "bulk edge", "outlier_threshold": "outlier threshold"}
    table = []
    for name, text in names.items():
        for operator, value in d.by_operator(dataset, name).items():
            edge = {"operator": operator, "x": d.plain(line.place(value)), "kind": name}
            edge |= {
                "text": f"{text} {d.number(value)}",
                "left": line.along(value) > 0.62,
            }  # room for a label
            table.append(edge | {"height": 8 if name == "outlier_threshold" else 22})
    base = d.blank([row for row in table if row["operator"] in operators]).encode(x=line.x)
    base = base.transform_filter(f"datum.operator == (shown == 'all' ? '{operators[0]}' : shown)")
    dash = alt.StrokeDash("kind:N", scale=alt.Scale(domain=list(names), range=[[2, 2], [6, 3]]), legend=None)
    marks = [base.mark_rule(color=d.MUTED).encode(strokeDash=dash)]
    for side, align, offset in ((True, "right", -5), (False, "left", 5)):
        for halo in ({"stroke": "white", "strokeWidth": 4}, {"color": d.MUTED}):
            text = base.transform_filter(f"datum.left == {str(side).lower()}").mark_text(
                align=align, dx=offset, fontSize=11, **halo
            )
            height = alt.Y("height:Q", scale=None, axis=None)
            marks.append(text.encode(y=height, text=alt.Text("text:N")))
    return marks if table else []


def _mirrored_log(table: list[d.Row]) -> _Line:
    """Distance from the centre is log₁₀|λ|; the centre is the smallest |λ| of the bins."""
    smallest, _ = _sizes(table)
    seen = [row[end] for row in table if row["high"] > 0 for end in ENDS]
    low, high = min([-smallest, *seen]), max([smallest, *seen])

    def place(value: float) -> float:
        return math.copysign(math.log10(max(abs(value) / smallest, 1.0)), value)

    ticks = d.both_sides(low, high, smallest * 3)
    labels = [d.tick(value) if value else f"±{d.tick(float(f'{smallest:.1g}'))}" for value in ticks]
    axis = d.ticks_axis([place(value) for value in ticks], labels, title="eigenvalue λ (logarithmic on both sides)")
    ends = place(low), place(high)
    return _Line(place, ends, _axis(ends, axis))

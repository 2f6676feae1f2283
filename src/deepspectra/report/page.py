"""One self-contained HTML page: verdict, figures with captions, tables, how it was measured.

Every text that comes from the analysis is escaped. Numbers are shown to a few digits; each table cell keeps
the full value in `data-value`, which is also what the page's CSV buttons save.
"""

from __future__ import annotations

import functools
import html
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import altair as alt
import numpy as np
import vl_convert
import xarray as xr

from deepspectra.errors import FileError
from deepspectra.report.charts import (
    charts,
    class_names,
    cosines,
    knockout_summary,
    mean_shares,
    outliers,
    outliers_left,
)
from deepspectra.report.drawing import LEVEL_NAMES, OPERATOR_NAMES, SYMBOLS, Row, holds, number, rows

Cell = str | int | float | tuple[str, float] | None  # a pair: the text shown and the value behind it


def write(dataset: xr.Dataset, path: str | os.PathLike[str]) -> None:
    """Write the page to a file.

    Raises:
        FileError: the file cannot be written.
    """
    page = render(dataset)
    try:
        Path(path).write_text(page, encoding="utf-8")
    except OSError as error:
        raise FileError(f"cannot write the report to {os.fspath(path)!r}: {error.strerror}") from error


def render(dataset: xr.Dataset) -> str:
    """The page as a string; sections whose variables the analysis does not hold are left out."""
    figures, specs = _figures(dataset, charts(dataset))
    tables, measured = _tables(dataset), _measured(dataset)
    links = [*figures, *({"tables": "Tables"} if tables else {}), "measured", "glossary", "cite"]
    template = Template(files("deepspectra.report").joinpath("template.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=_text(_attribute(dataset, "title", "A spectrum")),
        verdict=_verdict(str(_attribute(dataset, "verdict", ""))),
        subject=_subject(dataset),
        cards=_cards(dataset),
        contents=" ".join(f'<a href="#{name}">{LINKS[name]}</a>' for name in links),
        figures="\n".join(figures.values()),
        tables=tables,
        measured=measured,
        citation=_citation(dataset),
        specs=json.dumps(specs, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"),
        bundle=_bundle(),
    )


LINKS = {
    "spectrum": "Spectrum",
    "shares": "Shares",
    "knockouts": "Knock-outs",
    "averaging": "Averaging",
    "classes": "Classes",
    "layers": "Layers",
    "layer-traces": "Shares by layer",
    "products": "Products of means",
    "collapse": "Neural collapse",
    "cost": "Cost",
    "tables": "Tables",
    "measured": "How it was measured",
    "glossary": "Glossary",
    "cite": "How to cite",
}


@functools.cache
def _bundle() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script, of the version the charts are written for."""
    version = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
    script: str = vl_convert.javascript_bundle(vl_version=version)  # type: ignore[call-arg]  # its stub is wrong
    return script.replace("</script", "<\\/script").replace("<!--", "<\\!--")


# ------------------------------------------------------------------------------------------------------ text


def _text(value: object) -> str:
    return html.escape(str(value))


def _attribute(dataset: xr.Dataset, name: str, default: Any = None) -> Any:
    """An attribute as a plain Python value; missing and NaN are the default."""
    value = dataset.attrs.get(name, default)
    value = value.item() if isinstance(value, (np.generic, np.ndarray)) and np.size(value) == 1 else value
    return default if isinstance(value, float) and math.isnan(value) else value


def _json(dataset: xr.Dataset, name: str) -> dict[str, Any]:
    """A JSON attribute as a dictionary; what is not JSON is shown as it stands."""
    text = _attribute(dataset, name, "")
    try:
        value = json.loads(text) if text else {}
    except ValueError:
        return {name: text}
    return value if isinstance(value, dict) else {name: value}


def _number(value: object, digits: int = 3) -> str:
    """A number inside a sentence."""
    return f'<span class="number">{number(float(str(value)), digits)}</span>'


def _share(value: float) -> str:
    return f'<span class="number">{value:.1%}</span>'.replace("-", "−")


def _symbol(operator: str) -> str:
    return SYMBOLS.get(operator, _text(operator))


def _operator(operator: str) -> str:
    return OPERATOR_NAMES.get(operator, operator)


def _joined(items: Iterable[str]) -> str:
    """A, B and C."""
    *most, last = items
    return f"{', '.join(most)} and {last}" if most else last


def _verdict(text: str) -> str:
    """The first sentence large, the rest below."""
    if not text.strip():
        return ""
    first, *rest = re.split(r"(?<=[.!?])\s+(?=[A-Z0-9])", text.strip(), maxsplit=1)
    more = "".join(f'<p class="rest">{_text(part)}</p>' for part in rest)
    return f'<div class="verdict"><p class="first">{_text(first)}</p>{more}</div>'


def _subject(dataset: xr.Dataset) -> str:
    names = ("model", "data", "loss", "created")
    known = [str(_attribute(dataset, name, "")) for name in names]
    return " &nbsp;·&nbsp; ".join(_text(item) for item in known if item)


def _citation(dataset: xr.Dataset) -> str:
    versions = _json(dataset, "provenance").get("versions", {})
    version = versions.get("deepspectra", "") if isinstance(versions, dict) else ""
    parts = [f"deepspectra {version}".strip()]
    parts += [str(_attribute(dataset, name, "")) for name in ("model", "data", "loss")]
    seed = _attribute(dataset, "seed")
    parts += [f"seed {seed}"] if seed is not None else []
    return f"<em>{_text('; '.join(part for part in parts if part))}</em>."


# ----------------------------------------------------------------------------------------------------- cards


def _cards(dataset: xr.Dataset) -> str:
    cards = [*_size_cards(dataset), *_outlier_cards(dataset), *_share_cards(dataset), *_cost_cards(dataset)]
    if not cards:
        return ""
    items = [
        f'<li><span class="name">{_text(name)}</span><span class="figure">{_text(figure)}</span>'
        f'<span class="note">{_text(note)}</span></li>'
        for name, figure, note in cards
    ]
    return f'<ul class="cards">{"".join(items)}</ul>'


def _size_cards(dataset: xr.Dataset) -> list[tuple[str, str, str]]:
    parameters, examples = (_attribute(dataset, name) for name in ("num_parameters", "num_examples"))
    classes, accuracy = (_attribute(dataset, name) for name in ("num_classes", "accuracy"))
    loss = _attribute(dataset, "loss_value")
    cards = [("Parameters", f"{parameters:,}", "")] if parameters is not None else []
    if examples is not None:
        cards.append(("Examples", f"{examples:,}", f"in {classes:,} classes" if classes else ""))
    if accuracy is not None:
        cards.append(
            ("Training accuracy", f"{accuracy:.2%}", f"loss {number(loss)}" if loss is not None else "")
        )
    return cards


def _outlier_cards(dataset: xr.Dataset) -> list[tuple[str, str, str]]:
    if not holds(dataset, "num_outliers"):
        return []
    counts = {row["operator"]: row["num_outliers"] for row in rows(dataset, "num_outliers")}
    first, *rest = (f"of {_symbol(name)}" for name in counts)
    others = [f"{count:.0f} {name}" for name, count in zip(rest, list(counts.values())[1:], strict=True)]
    return [
        ("Outliers", f"{next(iter(counts.values())):.0f}", "; ".join([first, ", ".join(others)]).strip("; "))
    ]


def _share_cards(dataset: xr.Dataset) -> list[tuple[str, str, str]]:
    for operator, means in mean_shares(dataset).items():
        part = max(means, key=lambda name: means[name])
        name = _symbol(operator)
        return [("Largest share", f"{part} {means[part]:.0%}", f"mean over the outliers of {name}")]
    return []


def _cost_cards(dataset: xr.Dataset) -> list[tuple[str, str, str]]:
    if not holds(dataset, "cost_gradients"):
        return []
    seconds = float(dataset["cost_seconds"].sum()) if holds(dataset, "cost_seconds") else math.nan
    note = f"full-data gradients; {_duration(seconds)}" if math.isfinite(seconds) else "full-data gradients"
    return [("Cost", f"{float(dataset['cost_gradients'].sum()):,.0f}", note)]


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{number(seconds, 2)} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


# --------------------------------------------------------------------------------------------------- figures


def _figures(
    dataset: xr.Dataset, drawn: Mapping[str, alt.TopLevelMixin]
) -> tuple[dict[str, str], dict[str, Any]]:
    """Sections by name, and the specifications of their charts."""
    sections: dict[str, str] = {}
    for name, (heading, labels, caption) in FIGURES.items():
        present = {chart: label for chart, label in labels.items() if chart in drawn}
        if present:
            count = len(sections) + 1
            sections[name] = _section(name, heading, count, present, caption(dataset))
    return sections, {name: _responsive(chart) for name, chart in drawn.items()}


def _responsive(chart: alt.TopLevelMixin) -> dict[str, Any]:
    """The specification of a chart that takes the width of its place on the page."""
    return {**chart.to_dict(), "width": "container", "autosize": {"type": "fit-x", "contains": "padding"}}


def _section(name: str, heading: str, count: int, labels: dict[str, str], caption: str) -> str:
    boxes = {chart: f'<div class="chart" id="chart-{chart}"></div>' for chart in labels}
    if name == "spectrum" and len(boxes) > 1:
        body = _tabs(boxes, labels)
    elif len(boxes) > 1:
        body = "".join(f"<div><h3>{labels[chart]}</h3>{box}</div>" for chart, box in boxes.items())
        body = f'<div class="pair">{body}</div>'
    else:
        body = "".join(boxes.values())
    text = f"<figcaption><b>Figure {count}.</b> {caption}</figcaption>"
    return f'<section id="{name}">\n<h2>{heading}</h2>\n<figure>{body}{text}</figure>\n</section>'


def _tabs(boxes: dict[str, str], labels: dict[str, str]) -> str:
    buttons = [
        f'<input type="radio" name="view" id="view-{chart}"{" checked" if index == 0 else ""}>'
        f'<label for="view-{chart}">{labels[chart]}</label>'
        for index, chart in enumerate(boxes)
    ]
    panels = [f'<div class="panel">{box}</div>' for box in boxes.values()]
    return f'<div class="tabs">{"".join(buttons)}{"".join(panels)}</div>'


def _spectrum_caption(dataset: xr.Dataset) -> str:
    read = (
        "How the eigenvalues of the Hessian H, of its Gauss-Newton part G and of the residual R = H − G are"
        " spread. Curves show the fraction of all eigenvalues per unit of λ, or per decade of |λ|, on a "
        "logarithmic scale; bands are ± 2 standard errors. Each lollipop is one outlier; its height only "
        "tells operators apart. Curves beyond the threshold are drawn faint. Point at an outlier for its "
        "eigenvalue, residual norm and shares."
    )
    return read + _outlier_sentences(dataset)


def _outlier_sentences(dataset: xr.Dataset) -> str:
    found = outliers(dataset)
    edges = _by_operator(dataset, "bulk_edge")
    thresholds = _by_operator(dataset, "outlier_threshold")
    text = ""
    for operator, threshold in thresholds.items():
        top = [row["eigenvalue"] for row in found if row["operator"] == operator]
        name = _symbol(operator)
        text += f" {name} has {_number(len(top))} outliers above {_number(threshold)}"
        if top and edges.get(operator):
            ratio, edge = number(max(top) / edges[operator], 2), _number(edges[operator])
            text += f"; the largest, {_number(max(top))}, is {ratio} times its bulk edge {edge}"
        text += "."
    return text


def _by_operator(dataset: xr.Dataset, name: str) -> dict[str, float]:
    if not holds(dataset, name):
        return {}
    return {row["operator"]: row[name] for row in rows(dataset, name)}


def _shares_caption(dataset: xr.Dataset) -> str:
    text = (
        "What each outlier is made of. A bar is one outlier eigenvalue of the chosen operator; its segments"
        " are the shares of the class means, the logit means, their interaction, the scatter within "
        "classes, the true-label means and the residual R. The shares of one outlier sum to 100 %; a "
        "negative share would be drawn to the left of zero."
    )
    for operator, means in mean_shares(dataset).items():
        ranked = sorted(means.items(), key=lambda item: -item[1])
        listed = _joined(f"{_text(part)} {_share(share)}" for part, share in ranked if abs(share) >= 0.0005)
        text += f" Mean over the outliers of {_symbol(operator)}: {listed}."
    return text


def _knockouts_caption(dataset: xr.Dataset) -> str:
    text = (
        "Which eigenvalues stay when parts are removed. A dot is an eigenvalue left, dark when it is above "
        "the outlier threshold (dashed). A part is the cause of the outliers when they go with it. To the "
        "right: the number left above the threshold; “at least” means that only a lower bound of it is "
        "known."
    )
    summary = knockout_summary(dataset)
    first = summary[0]["operator"]
    left = [f"{_removal(row)}, {_text(outliers_left(row))}" for row in summary if row["operator"] == first]
    return f"{text} For {_symbol(first)}: {'; '.join(left)}."


def _removal(row: Row) -> str:
    if row["knockout"] == "nothing":
        return "nothing removed"
    return f"without {_text(row['knockout'])} by {_text(row['method'])}"


def _averaging_caption(dataset: xr.Dataset) -> str:
    text = (
        "How much of the top of the spectrum averaging finds, without any eigenvalue iteration. Filled dots"
        " are the true eigenvalues, by rank; open symbols are the eigenvalues found by averaging gradients "
        "by class and by pair of classes. Symbols on the dots mean that the averages carry the whole "
        "eigenvalue."
    )
    if holds(dataset, "subspace_overlap"):
        for level in dict.fromkeys(row["level"] for row in rows(dataset, "subspace_overlap")):
            text += _overlap_sentence(dataset, level)
    return text


def _overlap_sentence(dataset: xr.Dataset, level: str) -> str:
    table = rows(dataset, "subspace_overlap", "subspace_dimension", "subspace_gradients")
    table = [row for row in table if row["level"] == level]
    listed = _joined(
        f"{_share(row['subspace_overlap'])} of the top {_dimension(row)}{_symbol(row['operator'])}"
        for row in table
    )
    gradients = table[0].get("subspace_gradients")
    unit = "gradient" if gradients == 1 else "gradients"
    price = f", for the cost of {_number(gradients)} {unit}" if _finite(gradients) else ""
    return f" The {LEVEL_NAMES.get(level, _text(level))} span {listed}{price}."


def _dimension(row: Row) -> str:
    size = row.get("subspace_dimension")
    return f"{size:.0f} eigenvectors of " if _finite(size) else "eigenvectors of "


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _classes_caption(dataset: xr.Dataset) -> str:
    text = ""
    if holds(dataset, "mean_gram"):
        text += (
            "Cosines between the mean gradients of two classes: purple when they pull the parameters the "
            "same way, orange when they pull against each other. "
        )
        text += _cosine_sentence(dataset)
    if holds(dataset, "cross_class_weight"):
        text += (
            " Weights: how much the loss counts the examples of the class in a row under the label in a "
            "column, which is large where the network confuses them. The diagonal (true labels) is left "
            "out. "
        )
        text += _confusion_sentence(dataset)
    return text


def _cosine_sentence(dataset: xr.Dataset) -> str:
    names, cosine = class_names(dataset), cosines(dataset)
    i, j = np.triu_indices(len(names), k=1)
    values = cosine[i, j]
    if not np.isfinite(values).any():
        return ""
    best = int(np.nanargmax(values))
    pair = f"{_text(names[i[best]])} and {_text(names[j[best]])}"
    return (
        f"The mean cosine of two classes is {_number(np.nanmean(values), 2)}; the closest are {pair} "
        f"({_number(values[best], 2)})."
    )


def _confusion_sentence(dataset: xr.Dataset) -> str:
    names = class_names(dataset)
    weights = np.array(dataset["cross_class_weight"].values, dtype=np.float64)
    np.fill_diagonal(weights, np.nan)
    if not np.isfinite(weights).any():
        return ""
    true, label = np.unravel_index(int(np.nanargmax(weights)), weights.shape)
    pair = f"{_text(names[true])} under the label {_text(names[label])}"
    return f"The largest is {pair} ({_number(weights[true, label])})."


def _layers_caption(_dataset: xr.Dataset) -> str:
    return (
        "The largest eigenvalues of every layer: of the second moment of its features (what enters), of its "
        "backpropagated errors (what comes back to its output), and of its block of G. Each dash is one "
        "eigenvalue in the colour of the part that has most of it; all are exact. Outliers stand apart from "
        "the dashes below them."
    )


def _layer_traces_caption(_dataset: xr.Dataset) -> str:
    return (
        "How much of each layer's trace the parts make: of features, the global mean, the class means about "
        "it and the scatter within classes; of errors and gradients, the parts of G."
    )


def _products_caption(_dataset: xr.Dataset) -> str:
    return (
        "Whether means of gradients are products of means: the cosine between g_c and h_c ⊗ e_c (class means) "
        "and between g_{c,k} and h_c ⊗ e_{c,k} (cross-class means), averaged over classes or pairs; bars are "
        "one standard deviation. At 1 the two agree up to length."
    )


def _collapse_caption(_dataset: xr.Dataset) -> str:
    return (
        "How far the features that enter each layer have collapsed onto their class means: every measure is 0 "
        "for complete collapse. Zeros cannot be drawn here; the table has them."
    )


def _cost_caption(dataset: xr.Dataset) -> str:
    table = rows(dataset, "cost_gradients", "cost_seconds")
    total = sum(row["cost_gradients"] for row in table)
    most = max(table, key=lambda row: row["cost_gradients"])
    largest = _share(most["cost_gradients"] / total if total else 0)
    text = (
        "What each stage cost, in the time of one gradient of the loss over all examples. "
        f"Together {_number(total)} gradients, {largest} of them for {_text(most['stage'])}."
    )
    seconds = _attribute(dataset, "gradient_seconds")
    return text + (f" One gradient took {_number(seconds)} s." if seconds is not None else "")


Caption = Callable[[xr.Dataset], str]
FIGURES: dict[str, tuple[str, dict[str, str], Caption]] = {
    "spectrum": (
        "The spectrum",
        {"spectrum": "Linear density", "log_spectrum": "Density per decade"},
        _spectrum_caption,
    ),
    "shares": ("What the outliers are made of", {"shares": ""}, _shares_caption),
    "knockouts": ("What is left when parts are removed", {"knockouts": ""}, _knockouts_caption),
    "averaging": ("What averaging alone finds", {"averaging": ""}, _averaging_caption),
    "classes": (
        "The classes",
        {"class_cosines": "Cosines of class means", "cross_class_weights": "Cross-class weights"},
        _classes_caption,
    ),
    "layers": ("Layer by layer", {"layer_spectra": ""}, _layers_caption),
    "layer-traces": ("What the layers are made of", {"layer_traces": ""}, _layer_traces_caption),
    "products": ("Products of means", {"layer_products": ""}, _products_caption),
    "collapse": ("Neural collapse", {"layer_collapse": ""}, _collapse_caption),
    "cost": ("What it cost", {"cost": ""}, _cost_caption),
}


# ---------------------------------------------------------------------------------------------------- tables


def _tables(dataset: xr.Dataset) -> str:
    tables = [
        _eigenvalue_table(dataset),
        _knockout_table(dataset),
        _averaging_table(dataset),
        _trace_table(dataset),
        _layer_table(dataset),
        _collapse_table(dataset),
    ]
    body = "\n".join(table for table in tables if table)
    return f'<section id="tables">\n<h2>Tables</h2>\n{body}\n</section>' if body else ""


def _table(
    name: str, heading: str, head: list[str], body: list[list[Cell]], strong: Iterable[int] = ()
) -> str:
    """A table with its heading and a button that saves it; rows in `strong` stand out."""
    numeric = [any(isinstance(row[i], (int, float, tuple)) for row in body) for i in range(len(head))]
    top = "".join(
        f"<th{' class=n' if wide else ''}>{_text(cell)}</th>"
        for cell, wide in zip(head, numeric, strict=True)
    )
    marked = set(strong)
    lines = [
        f"<tr{' class=outlier' if index in marked else ''}>{''.join(_cell(cell) for cell in row)}</tr>"
        for index, row in enumerate(body)
    ]
    return (
        f'<h3>{_text(heading)} <button class="csv" data-table="{name}">Save as CSV</button></h3>\n'
        f'<div class="scroll"><table id="{name}"><thead><tr>{top}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _cell(value: Cell) -> str:
    if isinstance(value, str):
        return f"<td>{_text(value)}</td>"
    if isinstance(value, tuple):
        return f'<td class=n data-value="{value[1]!r}">{_text(value[0])}</td>'
    if value is None or not math.isfinite(value):
        return '<td class=n data-value="">–</td>'
    shown = f"{value:,}" if isinstance(value, int) else number(value, 4)
    return f'<td class=n data-value="{value!r}">{shown}</td>'


def _eigenvalue_table(dataset: xr.Dataset) -> str:
    if not holds(dataset, "eigenvalue"):
        return ""
    special = {(row["operator"], row["pair"]): row for row in outliers(dataset)}
    parts = [str(part) for part in dataset["part"].values] if holds(dataset, "share") else []
    body: list[list[Cell]] = []
    strong: list[int] = []
    for row in rows(dataset, "eigenvalue", "residual_norm"):
        found = special.get((row["operator"], row["pair"]), {})
        strong += [len(body)] if found else []
        shares = [_percentage(found.get(f"share {part}")) for part in parts]
        body.append(
            [
                _symbol(row["operator"]),
                row["pair"] + 1,
                row["eigenvalue"],
                _residual(row, "residual_norm"),
                *shares,
            ]
        )
    head = ["operator", "pair", "eigenvalue λ", "‖Av − λv‖", *parts]
    return _table("eigenvalues", "Eigenvalues, and the shares of the outliers (shaded)", head, body, strong)


def _percentage(share: float | None) -> Cell:
    return None if share is None else (f"{share:.1%}".replace("-", "−"), share)


def _residual(row: Row, name: str) -> Cell:
    return (number(row[name], 2), row[name]) if _finite(row.get(name)) else None


def _knockout_table(dataset: xr.Dataset) -> str:
    if not holds(dataset, "knockout_value"):
        return ""
    body: list[list[Cell]] = [
        [
            _operator(row["operator"]),
            row["knockout"],
            row["method"] if row["knockout"] != "nothing" else "",
            row["knockout_value"],
            _residual(row, "knockout_residual_norm"),
            row.get("knockout_outliers"),
            row.get("knockout_upper"),
        ]
        for row in knockout_summary(dataset)
    ]
    head = ["operator", "removed", "method", "largest λ left", "‖Av − λv‖", "outliers left", "upper bound"]
    return _table("knockout-table", "Knock-outs", head, body)


def _layer_table(dataset: xr.Dataset) -> str:
    if not holds(dataset, "layer_largest"):
        return ""
    tops = {
        (row["layer"], row["kind"]): row["layer_eigenvalue"]
        for row in rows(dataset, "layer_eigenvalue")
        if row["rank"] == 0
    }
    parts = [str(part) for part in dataset["layer_part"].values]
    shares: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows(dataset, "layer_share"):
        if row["rank"] == 0:
            shares.setdefault((row["layer"], row["kind"]), {})[row["layer_part"]] = row["layer_share"]
    body: list[list[Cell]] = [
        [layer, kind, value, *(_percentage(shares.get((layer, kind), {}).get(part)) for part in parts)]
        for (layer, kind), value in tops.items()
    ]
    head = ["layer", "of", "largest λ", *parts]
    return _table("layer-table", "Layers: the largest eigenvalue and its shares", head, body)


def _collapse_table(dataset: xr.Dataset) -> str:
    if not holds(dataset, "collapse"):
        return ""
    measures = [str(name) for name in dataset["measure"].values]
    found: dict[str, dict[str, float]] = {}
    for row in rows(dataset, "collapse"):
        found.setdefault(row["layer"], {})[row["measure"]] = row["collapse"]
    for row in rows(dataset, "khatri_rao") if holds(dataset, "khatri_rao") else []:
        if row["moment"] == "mean":
            found.setdefault(row["layer"], {})[row["statistic"]] = row["khatri_rao"]
    products = {
        "class_cosine": "cos g_c, h⊗e",
        "class_error": "its error",
        "cross_cosine": "cos g_ck, h⊗e",
        "cross_error": "error of that",
    }
    body: list[list[Cell]] = [
        [layer, *(values.get(name) for name in (*measures, *products))] for layer, values in found.items()
    ]
    head = ["layer", *(name.replace("nc", "NC").replace("_", " ") for name in measures), *products.values()]
    return _table("collapse-table", "Neural collapse, and products of means", head, body)


def _averaging_table(dataset: xr.Dataset) -> str:
    if not holds(dataset, "subspace_overlap"):
        return ""
    names = ("subspace_overlap", "subspace_dimension", "subspace_gradients")
    body: list[list[Cell]] = [
        [
            LEVEL_NAMES.get(row["level"], row["level"]),
            _operator(row["operator"]),
            *(row.get(name) for name in names),
        ]
        for row in rows(dataset, *names)
    ]
    head = ["averages", "operator", "overlap", "dimension k", "gradients"]
    return _table("overlaps", "Overlap of averages with the top k eigenvectors", head, body)


def _trace_table(dataset: xr.Dataset) -> str:
    body: list[list[Cell]] = []
    if holds(dataset, "trace"):
        for row in rows(dataset, "trace", "trace_standard_error"):
            name = _operator(row["operator"])
            body.append([name, row["trace"], row.get("trace_standard_error")])
    if holds(dataset, "part_trace"):
        body += [
            [f"part of G: {row['part']}", row["part_trace"], None] for row in rows(dataset, "part_trace")
        ]
    return _table("traces", "Traces", ["operator", "trace", "standard error"], body) if body else ""


# --------------------------------------------------------------------------------------- how it was measured


def _measured(dataset: xr.Dataset) -> str:
    blocks = [_conditions(dataset), _convergence(dataset), _threshold_table(dataset), _cost_table(dataset)]
    body = "\n".join(block for block in blocks if block)
    return f'<section id="measured">\n<h2>How it was measured</h2>\n{body}\n</section>'


def _conditions(dataset: xr.Dataset) -> str:
    names = {
        "dtype": "precision",
        "device": "device",
        "seed": "seed",
        "loss_value": "training loss",
        "gradient_norm": "norm of the gradient",
        "gradient_seconds": "seconds for one gradient",
    }
    listed = {label: _attribute(dataset, name) for name, label in names.items()}
    listed |= {
        "memory budget": _bytes(dataset, "memory_bytes"),
        "peak memory": _bytes(dataset, "peak_memory_bytes"),
    }
    listed |= _probes(dataset)
    listed |= dict(_flat(_json(dataset, "provenance")))
    items = [
        f"<dt>{_text(name)}</dt><dd>{_text(number(value) if isinstance(value, float) else value)}</dd>"
        for name, value in listed.items()
        if value is not None
    ]
    return f"<dl>{''.join(items)}</dl>" if items else ""


def _bytes(dataset: xr.Dataset, name: str) -> str | None:
    value = _attribute(dataset, name)
    return None if value is None else f"{value / 1e9:.3g} GB" if value >= 1e9 else f"{value / 1e6:.3g} MB"


def _probes(dataset: xr.Dataset) -> dict[str, str]:
    """How many probes and nodes stand behind each density."""
    if not holds(dataset, "density_probe"):
        return {}
    out = []
    for operator, table in dataset["density_probe"].groupby("operator"):
        probe = table.values.ravel()
        drawn, exact = probe[probe >= 0], int((probe == -1).sum())
        text = f"{_symbol(str(operator))}: {len(np.unique(drawn))} probes, {drawn.size} nodes"
        out.append(text + (f" and {exact} exact eigenvalues" if exact else ""))
    return {"density estimates": "; ".join(out)}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """A nested dictionary as labels and leaves."""
    for name, value in tree.items():
        label = f"{prefix}{name}".replace("_", " ")
        if isinstance(value, dict):
            yield from _flat(value, f"{label}: ")
        else:
            yield label, {True: "yes", False: "no"}[value] if isinstance(value, bool) else value


def _convergence(dataset: xr.Dataset) -> str:
    """The worst relative residual among outliers, by operator."""
    if not holds(dataset, "residual_norm"):
        return ""
    worst: dict[str, float] = {}
    for row in outliers(dataset):
        ratio = (row.get("residual_norm") or 0.0) / abs(row["eigenvalue"])
        worst[row["operator"]] = max(ratio, worst.get(row["operator"], 0.0))
    if not worst:
        return ""
    listed = _joined(f"{_number(ratio, 2)} for {_symbol(name)}" for name, ratio in worst.items())
    return f"<p>Largest measured ‖Av − λv‖ / |λ| among the outliers: {listed}.</p>"


def _threshold_table(dataset: xr.Dataset) -> str:
    body: list[list[Cell]] = []
    for name, entry in _json(dataset, "thresholds").items():
        value, explanation = entry if isinstance(entry, list) and len(entry) == 2 else (entry, "")
        body.append([name, value if isinstance(value, (int, float)) else str(value), str(explanation)])
    return _table("thresholds", "Thresholds", ["threshold", "value", "meaning"], body) if body else ""


def _cost_table(dataset: xr.Dataset) -> str:
    if not holds(dataset, "cost_gradients"):
        return ""
    names = ("cost_gradients", "cost_products", "cost_seconds")
    body: list[list[Cell]] = [
        [row["stage"], *(row.get(name) for name in names)] for row in rows(dataset, *names)
    ]
    return _table("cost-table", "Cost", ["stage", "gradients", "products", "seconds"], body)

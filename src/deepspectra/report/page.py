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
from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import altair as alt
import numpy as np
import vl_convert
import xarray as xr

from deepspectra.errors import DataError, FileError
from deepspectra.glossary import GLOSSARY
from deepspectra.report import tables
from deepspectra.report import text as t
from deepspectra.report.drawing import Chart, by_operator, holds, number
from deepspectra.report.dynamics_charts import is_sweep
from deepspectra.report.figures import FIGURES, OF_SWEEPS, Figure, figures_of
from deepspectra.report.saved_outliers import mean_shares, outliers
from deepspectra.report.tables import Cell, table_html

# What lets a chart take the width of its place on the page.
RESPONSIVE = {"width": "container", "autosize": {"type": "fit-x", "contains": "padding"}}


def write(dataset: xr.Dataset, path: str | os.PathLike[str]) -> None:
    """Write the page to a file.

    Raises:
        FileError: the file cannot be written.
    """
    _save(render(dataset), path)


def write_series(series: Mapping[str, xr.Dataset], path: str | os.PathLike[str]) -> None:
    """Write one page of several analyses, such as those of a network at several epochs, with a choice among them.

    Raises:
        FileError: the file cannot be written.
        DataError: there are no analyses.
    """
    _save(render_series(series), path)


def _save(page: str, path: str | os.PathLike[str]) -> None:
    try:
        Path(path).write_text(page, encoding="utf-8")
    except OSError as error:
        raise FileError(f"cannot write the report to {os.fspath(path)!r}: {error.strerror}") from error


def render(dataset: xr.Dataset) -> str:
    """The page as a string; sections whose variables the analysis does not hold are left out."""
    body, names, specs = _body(dataset)
    return _filled(dataset, _verdict(dataset), _cards(dataset), names, body, specs)


def render_series(series: Mapping[str, xr.Dataset]) -> str:
    """One page of several analyses by label; the last is shown first.

    Raises:
        DataError: there are no analyses.
    """
    if not series:
        raise DataError("a page of several analyses needs at least one of them.")
    bodies: list[str] = []
    names: dict[str, None] = {}
    specs: dict[str, Any] = {}
    last = len(series) - 1
    for j, dataset in enumerate(series.values()):
        body, sections, drawn = _body(dataset)
        away, summary = "" if j == last else " away", _verdict(dataset) + _cards(dataset)
        bodies.append(f'<div class="moment{away}">\n{summary}\n{_numbered(body, j)}\n</div>')
        names |= dict.fromkeys(sections)
        specs |= {f"{name}-m{j}": spec for name, spec in drawn.items()}
    buttons = [
        f'<input type="radio" name="moment" id="moment-{j}" value="{j}"{" checked" if j == last else ""}>'
        f'<label for="moment-{j}">{t.escaped(label)}</label>'
        for j, label in enumerate(series)
    ]
    choice = f'<div class="moments" role="radiogroup" aria-label="Which analysis">{"".join(buttons)}</div>'
    shown = list(series.values())[last]
    return _filled(shown, "", choice, list(names), "\n".join(bodies), specs)


def _numbered(body: str, number: int) -> str:
    """Markup whose names are those of one analysis among several."""
    return re.sub(r'\b(id|for|name|data-table)="([^"]+)"', rf'\1="\2-m{number}"', body)


def _body(dataset: xr.Dataset) -> tuple[str, list[str], dict[str, Any]]:
    """Figures, tables and how it was measured; the names of these sections; the specifications of the charts."""
    figures, specs = _figures(dataset)
    numbers = tables_section(dataset)
    names = [*figures, *(["tables"] if numbers else []), "measured"]
    return "\n".join([*figures.values(), numbers, _measured(dataset)]), names, specs


def _filled(dataset: xr.Dataset, verdict: str, cards: str, names: list[str], body: str, specs: dict[str, Any]) -> str:
    template = Template(files("deepspectra.report").joinpath("template.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=t.escaped(t.attribute(dataset, "title", "A spectrum")),
        verdict=verdict,
        subject=_subject(dataset),
        cards=cards,
        contents=" ".join(f'<a href="#{name}">{LINKS[name]}</a>' for name in [*names, "glossary", "cite"]),
        body=body,
        citation=_citation(dataset),
        bibtex=t.escaped(_bibtex(dataset)),
        glossary="\n".join(
            f'<dt id="{term.anchor}">{t.escaped(term.name)}</dt><dd>{t.escaped(term.meaning)}</dd>'
            for term in GLOSSARY
        ),
        specs=json.dumps(specs, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"),
        bundle=_bundle(),
    )


LINKS = {name: figure.link for name, figure in (FIGURES | OF_SWEEPS).items()} | {
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


def _verdict(dataset: xr.Dataset) -> str:
    """The first sentence large, the rest below."""
    text = str(t.attribute(dataset, "verdict", "")).strip()
    if not text:
        return ""
    first, *rest = re.split(r"(?<=[.!?])\s+(?=[A-Z0-9])", text, maxsplit=1)
    more = "".join(f'<p class="rest">{t.glossed(_quoted(part))}</p>' for part in rest)
    return f'<div class="verdict"><p class="first">{t.glossed(_quoted(first))}</p>{more}</div>'


def _quoted(text: str) -> str:
    """Escaped but for apostrophes, so that terms with one are found; powers of |λ| are raised, on one line."""
    raised = r'<span style="white-space: nowrap">|λ|<sup>\1</sup></span>'
    return re.sub(r"\|λ\|\^(−[\d.]+)", raised, html.escape(text, quote=False))


def _subject(dataset: xr.Dataset) -> str:
    names = ("model", "data", "loss", "created")
    known = [str(t.attribute(dataset, name, "")) for name in names]
    return " &nbsp;·&nbsp; ".join(t.escaped(item) for item in known if item)


def _citation(dataset: xr.Dataset) -> str:
    parts = [f"deepspectra {_version(dataset)}".strip()]
    parts += [str(t.attribute(dataset, name, "")) for name in ("model", "data", "loss")]
    seed = t.attribute(dataset, "seed")
    parts += [f"seed {seed}"] if seed is not None else []
    return f"<em>{t.escaped('; '.join(part for part in parts if part))}</em>."


def _version(dataset: xr.Dataset) -> str:
    known = t.json_attribute(dataset, "provenance")
    versions = known.get("versions", known)  # files of before name them among the rest
    return str(versions.get("deepspectra", "")) if isinstance(versions, dict) else ""


def _bibtex(dataset: xr.Dataset) -> str:
    """The software, of the version and the year that made the numbers; the page has the papers."""
    year = str(t.attribute(dataset, "created", ""))[:4]
    return (
        "@software{deepspectra,\n  author = {{The deepspectra developers}},\n  title = {deepspectra},\n"
        f"  version = {{{_version(dataset)}}},\n  year = {{{year}}}\n}}"
    )


# ----------------------------------------------------------------------------------------------------- cards


def _cards(dataset: xr.Dataset) -> str:
    if is_sweep(dataset):
        return ""
    cards = [*_size_cards(dataset), *_outlier_cards(dataset), *_share_cards(dataset), *_cost_cards(dataset)]
    if not cards:
        return ""
    items = [
        f'<li><span class="name">{t.escaped(name)}</span><span class="figure">{t.escaped(figure)}</span>'
        f'<span class="note">{t.escaped(note)}</span></li>'
        for name, figure, note in cards
    ]
    return f'<ul class="cards">{"".join(items)}</ul>'


def _size_cards(dataset: xr.Dataset) -> list[tuple[str, str, str]]:
    parameters, classes = t.attribute(dataset, "num_parameters"), t.attribute(dataset, "num_classes")
    cards = [("Parameters", f"{parameters:,}", "")] if parameters is not None else []
    for prefix, of in (("", ""), ("test_", "Test ")):
        names = ("num_examples", "accuracy", "loss_value")
        examples, accuracy, loss = (t.attribute(dataset, prefix + name) for name in names)
        whole = t.attribute(dataset, "row", "example") == "example"
        notes = [] if whole else ["several an example"]
        notes += [f"in {t.quantity(classes, 'class', 'classes')}"] if classes else []
        if examples is not None:
            name = f"{of}{'examples' if whole else 'rows'}".capitalize()
            cards.append((name, f"{examples:,}", ", ".join(notes)))
        if accuracy is not None:
            note = f"loss {number(loss)}" if loss is not None else ""
            cards.append((f"{of}accuracy".capitalize(), f"{accuracy:.2%}", note))
    return cards


def _outlier_cards(dataset: xr.Dataset) -> list[tuple[str, str, str]]:
    counts = [(f"{num:.0f}", t.symbol(name)) for name, num in by_operator(dataset, "num_outliers").items()]
    if not counts:
        return []
    (first, name), *others = counts
    rest = "; " * bool(others) + ", ".join(f"{count} of {other}" for count, other in others)
    return [("Outliers", first, f"of {name}{rest}")]


def _share_cards(dataset: xr.Dataset) -> list[tuple[str, str, str]]:
    for operator, means in mean_shares(dataset).items():
        part = max(means, key=lambda name: means[name])
        name = t.symbol(operator)
        return [("Largest share", f"{part} {t.percent(means[part], 0)}", f"mean over the outliers of {name}")]
    return []


def _cost_cards(dataset: xr.Dataset) -> list[tuple[str, str, str]]:
    if not holds(dataset, "cost_gradients"):
        return []
    seconds = float(dataset["cost_seconds"].sum()) if holds(dataset, "cost_seconds") else math.nan
    note = f"full-data gradients; {_duration(seconds)}" if math.isfinite(seconds) else "full-data gradients"
    return [("Cost, about", number(float(dataset["cost_gradients"].sum()), 2), note)]


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{number(seconds, 2)} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


# --------------------------------------------------------------------------------------------------- figures


def _figures(dataset: xr.Dataset) -> tuple[dict[str, str], dict[str, Any]]:
    """Sections by name, and the specifications of their charts."""
    sections: dict[str, str] = {}
    specs: dict[str, Any] = {}
    for name, figure in figures_of(dataset).items():
        if drawn := figure.drawn(dataset):
            words = figure.captioned(dataset)
            caption = f"<b>Figure {len(sections) + 1}.</b> {t.glossed(words)}"
            sections[name] = (
                f'<section id="{name}">\n<h2>{figure.heading}</h2>\n<figure>{_boxes(figure, drawn)}'
                f"<figcaption>{caption}</figcaption></figure>\n</section>"
            )
            specs |= {
                chart.name: _responsive(_specified(chart, dataset)) | {"description": _plain(label, words)}
                for chart, label in drawn.items()
            }
    return sections, specs


def _specified(chart: Chart, dataset: xr.Dataset) -> dict[str, Any]:
    """What a page draws; tests hold it against Vega-Lite's schema, since no data change what that says."""
    found: dict[str, Any] = chart(dataset).to_dict(validate=False)
    return found


def _plain(label: str, words: str) -> str:
    """What is read aloud in place of a chart: its name and its caption, which has its numbers."""
    return html.unescape(re.sub(r"<[^>]+>", "", f"{label}: {words}" if label else words))


def _responsive(spec: dict[str, Any]) -> dict[str, Any]:
    """As wide as its place; figures side by side keep their widths."""
    return spec if "vconcat" in spec else spec | RESPONSIVE


def _boxes(figure: Figure, drawn: dict[Chart, str]) -> str:
    """Places for charts: of several side by side, or one at a time."""
    panels: dict[str, str] = {}
    for chart, label in drawn.items():
        panels[label] = panels.get(label, "") + f'<div class="chart" id="chart-{chart.name}"></div>'
    if len(panels) == 1:
        return "".join(panels.values())
    if not figure.tabs:
        pair = "".join(f"<div><h3>{label}</h3>{boxes}</div>" for label, boxes in panels.items())
        return f'<div class="pair">{pair}</div>'
    buttons = [
        f'<input type="radio" name="view" id="view-{index}"{"" if index else " checked"}>'
        f'<label for="view-{index}">{label}</label>'
        for index, label in enumerate(panels)
    ]
    shown = [f'<div class="panel" data-label="{label}">{boxes}</div>' for label, boxes in panels.items()]
    return f'<div class="tabs">{"".join(buttons)}{"".join(shown)}</div>'


def tables_section(dataset: xr.Dataset) -> str:
    """Every table whose numbers the analysis holds."""
    body = "\n".join(filter(None, (table(dataset) for one in figures_of(dataset).values() for table in one.tables)))
    return f'<section id="tables">\n<h2>Tables</h2>\n{body}\n</section>' if body else ""


# --------------------------------------------------------------------------------------- how it was measured


def _measured(dataset: xr.Dataset) -> str:
    blocks = [_conditions(dataset)]
    if not is_sweep(dataset):
        blocks += [_convergence(dataset), _threshold_table(dataset), tables.cost(dataset)]
    body = "\n".join(filter(None, blocks))
    return f'<section id="measured">\n<h2>How it was measured</h2>\n{body}\n</section>'


def _conditions(dataset: xr.Dataset) -> str:
    names = {
        "dtype": "precision",
        "device": "device",
        "seed": "seed",
        "loss_value": "training loss",
        "gradient_norm": "norm of the gradient",
        "gradient_seconds": "seconds for one gradient",
        "averages": "averages over",
    }
    listed = {label: t.attribute(dataset, name) for name, label in names.items()}
    listed |= {
        "memory budget": _bytes(dataset, "memory_bytes"),
        "peak memory": _bytes(dataset, "peak_memory_bytes"),
    }
    listed |= _probes(dataset)
    listed |= dict(_flat(t.json_attribute(dataset, "provenance")))
    items = [
        f"<dt>{t.escaped(name)}</dt><dd>{t.escaped(number(value) if isinstance(value, float) else value)}</dd>"
        for name, value in listed.items()
        if value is not None
    ]
    return f"<dl>{''.join(items)}</dl>" if items else ""


def _bytes(dataset: xr.Dataset, name: str) -> str | None:
    value = t.attribute(dataset, name)
    return None if value is None else f"{value / 1e9:.3g} GB" if value >= 1e9 else f"{value / 1e6:.3g} MB"


def _probes(dataset: xr.Dataset) -> dict[str, str]:
    """How many probes and nodes stand behind each density."""
    if not holds(dataset, "density_probe", "density_node"):
        return {}
    out = []
    for operator, table in dataset["density_probe"].groupby("operator"):
        probe, node = table.values.ravel(), dataset["density_node"].sel(operator=operator).values.ravel()
        drawn, exact = probe[probe >= 0], int(((probe == -1) & (node != 0)).sum())  # zeros have one node
        text = f"{t.symbol(str(operator))}: {len(np.unique(drawn))} probes, {drawn.size} nodes"
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
    listed = t.joined(f"{t.number_html(ratio, 2)} for {t.symbol(name)}" for name, ratio in worst.items())
    return f"<p>Largest measured ‖Av − λv‖ / |λ| among the outliers: {listed}.</p>"


def _threshold_table(dataset: xr.Dataset) -> str:
    body: list[list[Cell]] = []
    for name, entry in t.json_attribute(dataset, "thresholds").items():
        value, explanation = entry if isinstance(entry, list) and len(entry) == 2 else (entry, "")
        body.append([name, value if isinstance(value, (int, float)) else str(value), str(explanation)])
    return table_html("thresholds", "Thresholds", ["threshold", "value", "meaning"], body) if body else ""

"""The page's tables: each cell keeps its full value."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable

import xarray as xr

from deepspectra.report import text as t
from deepspectra.report.drawing import LEVEL_NAMES, holds, number, pivot, rows
from deepspectra.report.network_charts import peaks
from deepspectra.report.outlier_tables import LARGEST, share_text, wide
from deepspectra.report.saved_outliers import knockout_summary

Cell = str | int | float | tuple[str, float] | None  # a pair: the text shown and the value behind it
Filled = tuple[list[str], list[list[Cell]]] | tuple[list[str], list[list[Cell]], list[int]]


def table_html(name: str, heading: str, head: list[str], body: list[list[Cell]], strong: Iterable[int] = ()) -> str:
    """A table with its heading and a button that saves it; rows in `strong` stand out."""
    numeric = [any(isinstance(row[i], (int, float, tuple)) for row in body) for i in range(len(head))]
    top = "".join(
        f"<th{' class=n' if wide else ''}>{t.escaped(cell)}</th>" for cell, wide in zip(head, numeric, strict=True)
    )
    marked = set(strong)
    lines = [
        f"<tr{' class=outlier' if index in marked else ''}>{''.join(_cell_html(cell) for cell in row)}</tr>"
        for index, row in enumerate(body)
    ]
    return (
        f'<h3>{t.escaped(heading)} <button class="csv" data-table="{name}">Save as CSV</button></h3>\n'
        f'<div class="scroll" tabindex="0" role="region" aria-label="{t.escaped(heading)}">'
        f'<table id="{name}"><thead><tr>{top}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _cell_html(value: Cell) -> str:
    if isinstance(value, str):
        return f"<td>{t.escaped(value)}</td>"
    if isinstance(value, tuple):
        return f'<td class=n data-value="{value[1]!r}">{t.escaped(value[0])}</td>'
    if value is None or not math.isfinite(value):
        return '<td class=n data-value="">–</td>'
    shown = f"{value:,}" if isinstance(value, int) else number(value, 4)
    return f'<td class=n data-value="{value!r}">{shown}</td>'


def _table(
    name: str, heading: str | Callable[[xr.Dataset], str], *needed: str
) -> Callable[[Callable[[xr.Dataset], Filled]], Callable[[xr.Dataset], str]]:
    """Make a table of what a function finds (heads, rows, places of rows that stand out) in these variables.

    It is empty for an analysis that lacks one of them.
    """

    def made(fill: Callable[[xr.Dataset], Filled]) -> Callable[[xr.Dataset], str]:
        @functools.wraps(fill)
        def table(dataset: xr.Dataset) -> str:
            said = heading if isinstance(heading, str) else heading(dataset)
            return table_html(name, said, *fill(dataset)) if holds(dataset, *needed) else ""

        return table

    return made


def _of_eigenvalues(dataset: xr.Dataset) -> str:
    return "Eigenvalues, and the shares of the outliers (shaded)" if holds(dataset, "share") else "Eigenvalues"


@_table("eigenvalues", _of_eigenvalues, "eigenvalue")
def eigenvalue(dataset: xr.Dataset) -> Filled:
    """Every eigenvalue with its error and residual; outliers also with their shares."""
    made = {(row["operator"], row["pair"]): own for row, own in wide(dataset, "pairs")}
    parts = [str(part) for part in dataset["part"].values] if holds(dataset, "share") else []
    body: list[list[Cell]] = []
    strong: list[int] = []
    for row in rows(dataset, "eigenvalue", "error_bound", "residual_norm", "is_outlier"):
        is_outlier = row.get("is_outlier") == 1
        strong += [len(body)] if is_outlier else []
        own = made.get((row["operator"], row["pair"]), {}) if is_outlier else {}
        errors = about(row.get("error_bound")), about(row.get("residual_norm"))
        shares = (_sure(own.get(part)) for part in parts)
        body.append([t.symbol(row["operator"]), row["pair"] + 1, row["eigenvalue"], *errors, *shares])
    return ["operator", "pair", "eigenvalue λ", "error of λ ≤", "‖Av − λv‖", *parts], body, strong


def _sure(share: tuple[float, float] | None) -> Cell:
    """A share with its error, as a cell."""
    return None if share is None else (share_text(*share), share[0])


def _of_outliers(name: str, heading: str, table: str) -> Callable[[xr.Dataset], str]:
    """A table with a row for each outlier, and a column for each class or layer."""

    def made(dataset: xr.Dataset) -> str:
        found = [(row, own) for row, own in wide(dataset, table) if row["is_outlier"] == 1]
        names = list(dict.fromkeys(name for _, own in found for name in own))
        body: list[list[Cell]] = [
            [t.symbol(row["operator"]), row["pair"] + 1, row["eigenvalue"], *(_sure(own.get(name)) for name in names)]
            for row, own in found
        ]
        return table_html(name, heading, ["operator", "pair", "eigenvalue λ", *names], body) if body else ""

    made.__name__ = name
    return made


outlier_classes = _of_outliers("outlier-classes", "Outliers by true class: share of the eigenvalue", "classes")
outlier_layers = _of_outliers("outlier-layers", "Outliers by layer: where the eigenvector lies", "layers")


def outlier_class_pairs(dataset: xr.Dataset) -> str:
    """The largest pairs of classes of each outlier, an outlier a row."""
    body: list[list[Cell]] = []
    for row, own in wide(dataset, "class_pairs"):
        largest = [f"{name}: {share_text(*share)}" for name, share in own.items()]
        body.append([t.symbol(row["operator"]), row["pair"] + 1, row["eigenvalue"], *largest])
    places = [f"{place + 1}." for place in range(max((len(row) - 3 for row in body), default=0))]
    body = [row + [""] * (3 + len(places) - len(row)) for row in body]
    heading = f"Outliers by pair of a true and a potential class: the {LARGEST} largest shares of each"
    return table_html("outlier-pairs", heading, ["operator", "pair", "eigenvalue λ", *places], body) if body else ""


def about(value: float | None) -> Cell:
    """A number of which two digits mean something, such as one that a clock gave."""
    return (number(value, 2), value) if value is not None and t.finite(value) else None


def _percentage(share: float | None) -> Cell:
    return None if share is None else (t.percent(share), share)


@_table("tail-table", "Tails of the spectra", "bin_mass")
def tail(dataset: xr.Dataset) -> Filled:
    """The law of every tail, and its power law in any case."""
    names = [f"tail_{name}" for name in ("exponent", "exponent_low", "exponent_high", "start", "p_value")]
    body: list[list[Cell]] = [
        [
            t.symbol(row["operator"]),
            row["split"],
            row["side"],
            row["tail_verdict"],
            *map(row.get, names),
            row["tail_why"],
        ]
        for row in rows(dataset, "tail_verdict", "tail_why", *names)
        if row["tail_verdict"]
    ]
    head = ["operator", "data", "of", "law", "exponent of a power law", "from", "to", "above", "p", "why"]
    return head, body


@_table("knockout-table", "Knock-outs", "knockout_value")
def knockout(dataset: xr.Dataset) -> Filled:
    """What each knock-out leaves."""
    body: list[list[Cell]] = [
        [
            t.operator_name(row["operator"]),
            row["knockout"],
            row["method"] if row["knockout"] != "nothing" else "",
            row["knockout_value"],
            about(row.get("knockout_residual_norm")),
            row.get("knockout_outliers"),
            row.get("knockout_upper"),
        ]
        for row in knockout_summary(dataset)
    ]
    head = ["operator", "removed", "method", "largest λ left", "‖Av − λv‖", "outliers left", "upper bound"]
    return head, body


@_table("layer-table", "Layers: the largest eigenvalue and its shares", "layer_largest")
def layer(dataset: xr.Dataset) -> Filled:
    """The largest eigenvalue of each layer and kind, and its shares."""
    top = dataset.isel(rank=0)
    parts = [str(part) for part in dataset["layer_part"].values]
    shares = pivot(top, "layer_share", "layer_part", "layer", "kind")
    body: list[list[Cell]] = []
    for row in rows(top, "layer_eigenvalue"):
        own = shares.get((row["layer"], row["kind"]), {})
        largest = row["layer_eigenvalue"]
        body.append([row["layer"], row["kind"], largest, *(_percentage(own.get(part)) for part in parts)])
    return ["layer", "of", "largest λ", *parts], body


@_table("charge-table", "What the certificate is charged", "charge")
def charge(dataset: xr.Dataset) -> Filled:
    """The ledger: nats of each term."""
    body: list[list[Cell]] = [[row["charged"], row["charge"]] for row in rows(dataset, "charge")]
    total = sum(row["charge"] for row in rows(dataset, "charge"))
    body.append(["together, over as many examples", total])
    return ["charged", "nats"], body, [len(body) - 1]


@_table("posterior-table", "Layers of the posterior", "posterior")
def posterior(dataset: xr.Dataset) -> Filled:
    """Divergence, prior scale and freedom of each layer, and what its noise costs by the quadratic model."""
    found = pivot(dataset, "posterior", "posterior_measure", "layer")
    names = ("kl", "scale", "parameters", "free", "loss_increase")
    body: list[list[Cell]] = [[layer, *(own.get(name) for name in names)] for (layer,), own in found.items()]
    return ["layer", "KL, nats", "λ of its prior", "parameters", "of them free", "½ tr(HΣ)"], body


@_table("block-table", "Layers: their blocks of G and H", "stable_rank")
def block(dataset: xr.Dataset) -> Filled:
    """Each layer's blocks of G and H: traces, stable ranks, and how far the two are apart."""
    of_gradients = dataset[["layer_trace", "stable_rank"]].sel(kind="gradients")
    traces = pivot(of_gradients, "layer_trace", "layer_part", "layer")
    ranks = {row["layer"]: row["stable_rank"] for row in rows(of_gradients, "stable_rank")}
    largest = pivot(dataset, "hessian_eigenvalue", "hessian_rank", "layer")
    measures = pivot(dataset, "hessian_block", "block_measure", "layer")
    names = {
        "residual": "‖R‖/‖G‖",
        "largest": "largest λ of H",
        "trace": "trace of H",
        "trace_standard_error": "its standard error",
        "smallest": "lowest of H",
    }
    body: list[list[Cell]] = []
    for row in rows(dataset, "layer_parameters"):
        layer = row["layer"]
        own = {"largest": largest.get((layer,), {}).get(0)} | measures.get((layer,), {})
        trace = sum(traces.get((layer,), {}).values(), 0.0)
        body.append([layer, row["layer_parameters"], trace, ranks.get(layer), *map(own.get, names)])
    return ["layer", "parameters", "trace of G", "stable rank of G", *names.values()], body


@_table("collapse-table", "Neural collapse, and products of means", "collapse")
def collapse(dataset: xr.Dataset) -> Filled:
    """Neural collapse of each layer, and how well products of means give mean gradients."""
    names = {str(name): str(name).replace("nc", "NC").replace("_", " ") for name in dataset["measure"].values}
    names |= {
        "class_cosine": "cos g_c, h⊗e",
        "class_error": "its error",
        "cross_cosine": "cos g_ck, h⊗e",
        "cross_error": "error of that",
        "logit_cosine": "cos g_k, h̄⊗e",
    }
    found = pivot(dataset, "collapse", "measure", "layer")
    if holds(dataset, "khatri_rao"):
        for layer, cosines in pivot(dataset.sel(moment="mean"), "khatri_rao", "statistic", "layer").items():
            found.setdefault(layer, {}).update(cosines)
    body: list[list[Cell]] = [[layer, *map(values.get, names)] for (layer,), values in found.items()]
    return ["layer", *names.values()], body


@_table("kronecker-table", "Kronecker factors", "kronecker_fit")
def kronecker(dataset: xr.Dataset) -> Filled:
    """How far each approximation is from each layer's block of G."""
    names = {
        "frobenius": "‖G − K‖_F / ‖G‖_F",
        "spectral": "‖G − K‖₂ / ‖G‖₂",
        "cosine": "cosine",
        "decades": "decades",
        "trace": "tr K / tr G",
    }
    found = pivot(dataset, "kronecker_fit", "fit", "block", "approximation").items()
    body: list[list[Cell]] = [[name, kind.upper(), *map(fits.get, names)] for (name, kind), fits in found]
    return ["layer", "K", *names.values()], body


@_table("overlap-table", "Shared eigenspaces", "overlap_curve")
def overlap(dataset: xr.Dataset) -> Filled:
    """The highest overlap of each layer's eigenspaces, measured and predicted."""
    names = {
        "layer": "layer",
        "layer_outputs": "outputs m",
        "measured_at": "peak at k",
        "measured_height": "height",
        "predicted_at": "predicted at k",
        "predicted_height": "its height",
        "layer_alignment": "(t·t′)²",
    }
    return [*names.values()], [[*map(row.get, names)] for row in peaks(dataset)]


@_table("region-table", "Regions, in decades of λ", "region_shift")
def region(dataset: xr.Dataset) -> Filled:
    """How far each knock-out moves each region, and which it moves most."""
    regions = [str(name) for name in dataset["region"].values]
    dims = ("spectrum", "place", "removed")
    shifts, errors = (pivot(dataset, f"region_shift{end}", "region", *dims) for end in ("", "_error"))
    body: list[list[Cell]] = []
    for key, shift in shifts.items():
        numbers = [one.get(name) for name in regions for one in (shift, errors.get(key, {}))]
        moved = int(dataset["region_moved"].sel(dict(zip(dims, key, strict=True))))
        body.append([*key, *numbers, [*regions, "–"][moved]])  # −1: none
    head = ["rows", "of", "without", *(name + end for name in regions for end in ("", " ±")), "moves most"]
    return head, body


@_table("overlaps", "Overlap of averages with the top k eigenvectors", "subspace_overlap")
def averaging(dataset: xr.Dataset) -> Filled:
    """Overlap of each averaged subspace with each eigenspace, and its cost."""
    body: list[list[Cell]] = [
        [
            LEVEL_NAMES.get(row["level"], row["level"]),
            t.operator_name(row["operator"]),
            row["subspace_overlap"],
            row.get("subspace_dimension"),
            about(row.get("subspace_gradients")),
        ]
        for row in rows(dataset, "subspace_overlap", "subspace_dimension", "subspace_gradients")
    ]
    return ["averages", "operator", "overlap", "dimension k", "gradients, about"], body


def trace(dataset: xr.Dataset) -> str:
    """Traces of the operators and of the parts of G, each with its standard error."""
    body: list[list[Cell]] = []
    for name in ("trace", "part_trace"):
        for row in rows(dataset, name, f"{name}_standard_error"):
            of = f"part of G: {row['part']}" if "part" in row else t.operator_name(row["operator"])
            error = row.get(f"{name}_standard_error")
            body.append([of, row[name], ("exact", 0.0) if error == 0 else about(error)])
    return table_html("traces", "Traces", ["operator", "trace", "standard error"], body) if body else ""


def failure(dataset: xr.Dataset) -> str:
    """Cells of a sweep that failed or were refused, by what went wrong: how many, and where the first is."""
    if "error" not in dataset:
        return ""
    status, error = (dataset[name].values for name in ("status", "error"))
    places: dict[tuple[str, str], list[tuple[int, ...]]] = {}
    for at in zip(*error.astype(bool).nonzero(), strict=True):
        lines = str(error[at]).splitlines() or [""]  # the first says what, the last of a traceback is the same
        places.setdefault((str(status[at]), lines[0]), []).append(at)
    body: list[list[Cell]] = []
    for key, found in places.items():
        axes = zip(dataset["status"].dims, found[0], strict=True)
        first = ", ".join(f"{name}={dataset[name].values[j]}" for name, j in axes)
        body.append([*key, len(found), first])
    head = ["what became of them", "error", "cells", "the first of them"]
    return table_html("failures", "Cells without numbers", head, body) if body else ""


@_table("cost-table", "Cost", "cost_gradients")
def cost(dataset: xr.Dataset) -> Filled:
    """What each stage cost; it stands under how it was measured."""
    names = {"cost_gradients": "gradients, about", "cost_products": "products", "cost_seconds": "seconds"}
    body: list[list[Cell]] = [
        [row["stage"], about(row["cost_gradients"]), row.get("cost_products"), about(row.get("cost_seconds"))]
        for row in rows(dataset, *names)
    ]
    return ["stage", *names.values()], body

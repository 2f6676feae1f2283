"""The page's tables: each cell keeps its full value."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import xarray as xr

from deepspectra.report.compare_charts import peaks
from deepspectra.report.drawing import LEVEL_NAMES, Row, holds, number, pivot, rows
from deepspectra.report.findings import knockout_summary, outliers
from deepspectra.report.study_charts import means as study_means
from deepspectra.report.text import escaped, finite, json_attribute, operator_name, percent, symbol

Cell = str | int | float | tuple[str, float] | None  # a pair: the text shown and the value behind it


def table_html(
    name: str, heading: str, head: list[str], body: list[list[Cell]], strong: Iterable[int] = ()
) -> str:
    """A table with its heading and a button that saves it; rows in `strong` stand out."""
    numeric = [any(isinstance(row[i], (int, float, tuple)) for row in body) for i in range(len(head))]
    top = "".join(
        f"<th{' class=n' if wide else ''}>{escaped(cell)}</th>"
        for cell, wide in zip(head, numeric, strict=True)
    )
    marked = set(strong)
    lines = [
        f"<tr{' class=outlier' if index in marked else ''}>{''.join(_cell_html(cell) for cell in row)}</tr>"
        for index, row in enumerate(body)
    ]
    return (
        f'<h3>{escaped(heading)} <button class="csv" data-table="{name}">Save as CSV</button></h3>\n'
        f'<div class="scroll"><table id="{name}"><thead><tr>{top}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _cell_html(value: Cell) -> str:
    if isinstance(value, str):
        return f"<td>{escaped(value)}</td>"
    if isinstance(value, tuple):
        return f'<td class=n data-value="{value[1]!r}">{escaped(value[0])}</td>'
    if value is None or not math.isfinite(value):
        return '<td class=n data-value="">–</td>'
    shown = f"{value:,}" if isinstance(value, int) else number(value, 4)
    return f'<td class=n data-value="{value!r}">{shown}</td>'


def eigenvalue(dataset: xr.Dataset) -> str:
    """Every eigenvalue with its residual; outliers also with their shares."""
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
                symbol(row["operator"]),
                row["pair"] + 1,
                row["eigenvalue"],
                _residual(row, "residual_norm"),
                *shares,
            ]
        )
    head = ["operator", "pair", "eigenvalue λ", "‖Av − λv‖", *parts]
    return table_html(
        "eigenvalues", "Eigenvalues, and the shares of the outliers (shaded)", head, body, strong
    )


def _percentage(share: float | None) -> Cell:
    return None if share is None else (percent(share), share)


def _residual(row: Row, name: str) -> Cell:
    return (number(row[name], 2), row[name]) if finite(row.get(name)) else None


def knockout(dataset: xr.Dataset) -> str:
    """What each knock-out leaves."""
    if not holds(dataset, "knockout_value"):
        return ""
    body: list[list[Cell]] = [
        [
            operator_name(row["operator"]),
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
    return table_html("knockout-table", "Knock-outs", head, body)


def layer(dataset: xr.Dataset) -> str:
    """The largest eigenvalue of each layer and kind, and its shares."""
    if not holds(dataset, "layer_largest"):
        return ""
    top = dataset.isel(rank=0)
    parts = [str(part) for part in dataset["layer_part"].values]
    shares = pivot(top, "layer_share", "layer_part", "layer", "kind")
    body: list[list[Cell]] = []
    for row in rows(top, "layer_eigenvalue"):
        own = shares.get((row["layer"], row["kind"]), {})
        largest = row["layer_eigenvalue"]
        body.append([row["layer"], row["kind"], largest, *(_percentage(own.get(part)) for part in parts)])
    head = ["layer", "of", "largest λ", *parts]
    return table_html("layer-table", "Layers: the largest eigenvalue and its shares", head, body)


def block(dataset: xr.Dataset) -> str:
    """Each layer's blocks of G and H: traces, stable ranks, and how far the two are apart."""
    if not holds(dataset, "stable_rank"):
        return ""
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
        body.append(
            [layer, row["layer_parameters"], trace, ranks.get(layer), *(own.get(name) for name in names)]
        )
    head = ["layer", "parameters", "trace of G", "stable rank of G", *names.values()]
    return table_html("block-table", "Layers: their blocks of G and H", head, body)


def collapse(dataset: xr.Dataset) -> str:
    """Neural collapse of each layer, and how well products of means give mean gradients."""
    if not holds(dataset, "collapse"):
        return ""
    measures = [str(name) for name in dataset["measure"].values]
    found = pivot(dataset, "collapse", "measure", "layer")
    if holds(dataset, "khatri_rao"):
        for layer, cosines in pivot(dataset.sel(moment="mean"), "khatri_rao", "statistic", "layer").items():
            found.setdefault(layer, {}).update(cosines)
    products = {
        "class_cosine": "cos g_c, h⊗e",
        "class_error": "its error",
        "cross_cosine": "cos g_ck, h⊗e",
        "cross_error": "error of that",
        "logit_cosine": "cos g_k, h̄⊗e",
    }
    body: list[list[Cell]] = [
        [layer, *(values.get(name) for name in (*measures, *products))] for (layer,), values in found.items()
    ]
    head = ["layer", *(name.replace("nc", "NC").replace("_", " ") for name in measures), *products.values()]
    return table_html("collapse-table", "Neural collapse, and products of means", head, body)


def kronecker(dataset: xr.Dataset) -> str:
    """How far each approximation is from each layer's block of G."""
    if not holds(dataset, "kronecker_fit"):
        return ""
    found = pivot(dataset, "kronecker_fit", "fit", "block", "approximation")
    names = {
        "frobenius": "‖G − K‖_F / ‖G‖_F",
        "spectral": "‖G − K‖₂ / ‖G‖₂",
        "cosine": "cosine",
        "decades": "decades",
        "trace": "tr K / tr G",
    }
    body: list[list[Cell]] = [
        [layer, kind.upper(), *(values.get(name) for name in names)]
        for (layer, kind), values in found.items()
    ]
    return table_html("kronecker-table", "Kronecker factors", ["layer", "K", *names.values()], body)


def overlap(dataset: xr.Dataset) -> str:
    """The highest overlap of each layer's eigenspaces, measured and predicted."""
    if not holds(dataset, "overlap_curve"):
        return ""
    names = {
        "layer_outputs": "outputs m",
        "measured_at": "peak at k",
        "measured_height": "height",
        "predicted_at": "predicted at k",
        "predicted_height": "its height",
        "layer_alignment": "(t·t′)²",
    }
    body: list[list[Cell]] = [[row["layer"], *(row.get(name) for name in names)] for row in peaks(dataset)]
    return table_html("overlap-table", "Shared eigenspaces", ["layer", *names.values()], body)


def region(dataset: xr.Dataset) -> str:
    """How far each knock-out moves each region, and which it moves most."""
    if not holds(dataset, "region_shift"):
        return ""
    regions = [str(name) for name in dataset["region"].values]
    dims = ("spectrum", "place", "removed")
    shifts, errors = (pivot(dataset, f"region_shift{end}", "region", *dims) for end in ("", "_error"))
    body: list[list[Cell]] = []
    for key, shift in shifts.items():
        numbers = [one.get(name) for name in regions for one in (shift, errors.get(key, {}))]
        moved = int(dataset["region_moved"].sel(dict(zip(dims, key, strict=True))))
        body.append([*key, *numbers, [*regions, "–"][moved]])  # −1: none
    head = ["rows", "of", "without", *(name + end for name in regions for end in ("", " ±")), "moves most"]
    return table_html("region-table", "Regions, in decades of λ", head, body)


def study(dataset: xr.Dataset) -> str:
    """Means over networks of every measure, layer by layer and variant by variant."""
    found = study_means(dataset)
    if not found:
        return ""
    labels = json_attribute(dataset, "measures")
    body: list[list[Cell]] = [
        [layer, variant, *(measured.get(key) for key in labels)]
        for (layer, variant), measured in sorted(found.items(), key=_order(dataset))
    ]
    return table_html("study-table", "Measures of every layer", ["layer", "variant", *labels.values()], body)


def _order(dataset: xr.Dataset) -> Callable[[tuple[tuple[str, str], Row]], tuple[int, int]]:
    """By layer, then by variant, as they stand."""
    layers, variants = ([str(name) for name in dataset[dim].values] for dim in ("layer", "variant"))
    return lambda item: (layers.index(item[0][0]), variants.index(item[0][1]))


def training(dataset: xr.Dataset) -> str:
    """Loss and accuracy of each network of a study."""
    if not holds(dataset, "study_loss"):
        return ""
    body: list[list[Cell]] = [
        [row["variant"], row["network"] + 1, row["study_loss"], _percentage(row.get("study_accuracy"))]
        for row in rows(dataset, "study_loss", "study_accuracy")
    ]
    return table_html("training-table", "Training", ["variant", "network", "loss", "accuracy"], body)


def averaging(dataset: xr.Dataset) -> str:
    """Overlap of each averaged subspace with each eigenspace, and its cost."""
    if not holds(dataset, "subspace_overlap"):
        return ""
    names = ("subspace_overlap", "subspace_dimension", "subspace_gradients")
    body: list[list[Cell]] = [
        [
            LEVEL_NAMES.get(row["level"], row["level"]),
            operator_name(row["operator"]),
            *(row.get(name) for name in names[:2]),
            about(row.get(names[2])),
        ]
        for row in rows(dataset, *names)
    ]
    head = ["averages", "operator", "overlap", "dimension k", "gradients, about"]
    return table_html("overlaps", "Overlap of averages with the top k eigenvectors", head, body)


def about(value: float | None) -> Cell:
    """A number that a clock gave, to the two digits that mean something."""
    return (number(value, 2), value) if value is not None and finite(value) else None


def trace(dataset: xr.Dataset) -> str:
    """Traces of the operators and of the parts of G, each with its standard error."""
    body: list[list[Cell]] = []
    if holds(dataset, "trace"):
        for row in rows(dataset, "trace", "trace_standard_error"):
            name = operator_name(row["operator"])
            body.append([name, row["trace"], _error(row.get("trace_standard_error"))])
    if holds(dataset, "part_trace"):
        for row in rows(dataset, "part_trace", "part_trace_standard_error"):
            error = _error(row.get("part_trace_standard_error"))
            body.append([f"part of G: {row['part']}", row["part_trace"], error])
    return table_html("traces", "Traces", ["operator", "trace", "standard error"], body) if body else ""


def _error(value: float | None) -> Cell:
    return ("exact", 0.0) if value == 0 else about(value)

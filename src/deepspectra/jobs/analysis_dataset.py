"""Findings as one labelled dataset: every number with its dimensions named."""

from __future__ import annotations

import json
import math
import resource
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from deepspectra.algorithms.long_vectors import inner_products
from deepspectra.derivatives.products import products_of
from deepspectra.jobs.pages import Dataset, Labels, Variables, dataset_of, described, measured, provenance
from deepspectra.jobs.stages import LETTERS, Findings
from deepspectra.quadrature import Curve, Density

OPERATORS = ("hessian", "gauss_newton", "residual")
SIDES = {"negative": -1, "positive": 1}
LEVELS, METHODS = ("class", "cross_class"), ("subtraction", "projection")
CLASS_AXES = ("class", "cross_class", "class_other")
POINTS, LOG_POINTS = 801, 301
SMALLEST = 1e-6  # of an operator's largest |λ|: what is drawn on logarithmic axes
COARSE = 0.05  # share of the eigenvalues in a single node from which on it resolves nothing,
APART = 2.0  # or ratio of neighbouring nodes
EPSILON = 1e-12  # added to |λ| by `Density.smooth`, relative to the largest: nothing


def analysis_dataset(found: Findings) -> Dataset:
    """Every number of an analysis."""
    variables: Variables = {}
    for group in (_curves, _nodes, _pairs, _shares, _knockouts, _averages, _traces, _classes, _costs):
        variables |= group(found)
    coords = {
        "operator": list(OPERATORS),
        "side": list(SIDES),
        "part": list(found.attribution.part_names),
        "level": list(LEVELS),
        "knockout": list(dict.fromkeys(knockout.name for knockout in found.attribution.knockouts)),
        "method": list(METHODS),
        "stage": list(found.ledger.costs),
        **{axis: [str(c) for c in range(found.num_classes)] for axis in CLASS_AXES},
    }
    return dataset_of(variables, coords, _attributes(found))


class _View(NamedTuple):
    """What of a density can be drawn, and what only be said."""

    drawn: Density  # without zeros
    zero_share: float  # of the eigenvalues: known to be zero, up to rounding; NaN if none is
    small_share: float  # others smaller in size than `smallest`, or zero as far as random vectors tell
    smallest: float
    resolved_above: float  # |λ| up to which nodes are too far apart or too heavy; 0 for an exact spectrum
    unresolved_share: float  # up to there, zeros left out


def _view(found: Findings, name: str) -> _View | None:
    """Of H, G or R; None if nothing but zeros is known.

    Of G, which is positive semi-definite and of rank N (C − 1) at most, what lies below zero is rounding.
    """
    density = found.densities[name]
    if not bool(density.weights.isfinite().all() and density.nodes.isfinite().all()):
        found.ledger.doubts.append(
            f"the density of {LETTERS[name]} has values that are not finite; none is drawn"
        )
        return None
    nodes, weights = density.nodes, density.weights
    largest, zero = float(nodes.abs().max()), nodes == 0
    if name == "gauss_newton":
        eps = torch.finfo(torch.promote_types(found.problem.dtype, torch.float32)).eps
        rounded = len(nodes) if found.exact is not None else 10 if found.effort.dense else 1  # as in Spectrum
        exact = eps * rounded * largest
        zero = nodes <= max(exact, -float(nodes.min()))
    if bool(zero.all()):
        return None
    rest, known = ~zero, zero & (density.probes < 0)  # probes only estimate how many are zero
    mass = float(weights[rest].sum())
    sizes, smallest = nodes.abs(), SMALLEST * largest
    drawn = rest & (density.probes >= 0)
    coarse = sizes[drawn & (weights * density.num_probes > COARSE * mass)]
    resolved = max(
        [*(_first_gap(sizes[drawn & (nodes * sign > 0)]) for sign in SIDES.values()), *coarse.tolist()]
    )
    return _View(
        drawn=replace(density, nodes=nodes[rest], weights=weights[rest], probes=density.probes[rest]),
        zero_share=float(weights[known].sum()) if bool(known.any()) else math.nan,
        small_share=float(weights[~known & (zero | (sizes < smallest))].sum()),
        smallest=smallest,
        resolved_above=resolved,
        unresolved_share=float(weights[~known & (sizes <= resolved)].sum()),
    )


def _first_gap(sizes: Tensor) -> float:
    """The upper end of the first gap between neighbouring nodes, from the largest down; the smallest if none is."""
    falling = sizes.sort(descending=True).values
    if not len(falling):
        return 0.0
    (wide,) = (falling[:-1] > APART * falling[1:]).nonzero(as_tuple=True)
    return float(falling[wide[0]] if len(wide) else falling[-1])


def _curves(found: Findings) -> Variables:
    """Smoothed densities without zeros, linear, and logarithmic on each side of zero; what they do not show."""
    views = {name: view for name in OPERATORS if (view := _view(found, name)) is not None}
    linear, log = {}, {}
    for name, view in views.items():
        curve = view.drawn.smooth("linear", num_points=POINTS)
        linear[name] = _folded(curve) if name == "gauss_newton" else _rows(curve)
        for side, sign in SIDES.items():
            shown = (view.drawn.nodes * sign > 0) & (view.drawn.nodes.abs() >= view.smallest)
            if bool(shown.any()):
                parts = {key: getattr(view.drawn, key)[shown] for key in ("nodes", "weights", "probes")}
                curve = replace(view.drawn, **parts).smooth(
                    "log", num_points=LOG_POINTS, sign=sign, epsilon=EPSILON
                )
                log[name, side] = np.where(curve.grid >= view.smallest, _rows(curve), np.nan)
    names = ("grid", "density", "standard_error")
    numbers = ("zero_share", "small_share", "smallest_drawn", "resolved_above", "unresolved_share")
    said = {n: {name: view[j] for name, view in views.items()} for j, n in enumerate(numbers, 1)}
    if not bool(found.densities["gauss_newton"].nodes.any()):
        said["zero_share"]["gauss_newton"] = 1.0
    return (
        {f"curve_{n}": (("operator", "point"), _row(linear, j)) for j, n in enumerate(names)}
        | {f"log_{n}": (("operator", "side", "log_point"), _row(log, j)) for j, n in enumerate(names)}
        | {n: (("operator",), shares) for n, shares in said.items()}
    )


def _row(tables: Mapping[Any, Any], number: int) -> dict[Any, Any]:
    """Entry `number` of each."""
    return {key: table[number] for key, table in tables.items()}


def _rows(curve: Curve) -> np.ndarray:
    found: np.ndarray = torch.stack([curve.grid, curve.density, curve.standard_error]).numpy()
    return found


def _folded(curve: Curve) -> np.ndarray:
    """A curve of eigenvalues that are not negative, with what the kernel puts left of zero reflected to the right."""
    grid, *both = _rows(curve)
    mirrored = [np.interp(-grid, grid, one, left=0, right=0) for one in both]
    return np.where(
        grid >= 0, [grid, *(one + other for one, other in zip(both, mirrored, strict=True))], np.nan
    )


def _nodes(found: Findings) -> Variables:
    densities, dims = found.densities.items(), ("operator", "node")
    probes = [found.densities[name].probes for name in OPERATORS]
    return {
        "density_node": (dims, {name: one.nodes for name, one in densities}),
        "density_weight": (dims, {name: one.weights for name, one in densities}),
        "density_probe": (dims, pad_sequence(probes, True, padding_value=-2).numpy()),
    }


def _pairs(found: Findings) -> Variables:
    pairs = found.pairs.items()
    thresholds = {name: _threshold(found, name) for name in OPERATORS[:2]}
    above = {name: one.values.cpu() > thresholds[name] for name, one in pairs}
    outliers = [above.get(name, torch.zeros(0, dtype=torch.bool)) for name in OPERATORS]
    edges = {"hessian": found.attribution.bulk_edge}
    if found.exact is not None:
        edges["gauss_newton"] = found.exact.bulk_edge
    return {
        "eigenvalue": (("operator", "pair"), {name: one.values for name, one in pairs}),
        "residual_norm": (("operator", "pair"), {name: one.residual_norms for name, one in pairs}),
        "is_outlier": (("operator", "pair"), pad_sequence(outliers, True).to(torch.int8).numpy()),
        "num_outliers": (("operator",), {name: some.sum() for name, some in above.items() if len(some)}),
        "bulk_edge": (("operator",), edges),
        "outlier_threshold": (("operator",), thresholds),
        "converged": (("operator",), {name: float(one.converged) for name, one in pairs}),
    }


def _threshold(found: Findings, name: str) -> float:
    """Above which eigenvalues of H or G are outliers: G's own if its edge is known, else H's."""
    attribution = found.attribution
    if name == "gauss_newton" and found.exact is not None:
        return found.exact.threshold(attribution.margin)
    return attribution.threshold


def _shares(found: Findings) -> Variables:
    means = {}
    for name, table in found.shares.items():
        above = found.pairs[name].values.cpu() > _threshold(found, name)
        if above.any():
            means[name] = table.numpy()[above.numpy()].mean(0)
    return {
        "share": (("operator", "pair", "part"), found.shares),
        "mean_share": (("operator", "part"), means),
    }


def _knockouts(found: Findings) -> Variables:
    """Of H, and of G where its spectrum is exact; NaN for the methods and operators not run."""
    most = max(len(pairs.values) for pairs in found.pairs.values())
    left: dict[tuple[str, str, str], tuple[Tensor, Tensor, int, int]] = {}
    for one in found.attribution.knockouts:
        counts = one.num_outliers, one.num_outliers_at_most
        left["hessian", one.name, one.method] = (one.values, one.residual_norms, *counts)
        if found.exact is not None:
            exact, removed = found.exact, one.removed
            values = exact.knockout(*removed, method=one.method) if removed else exact.values
            count, values = int((values > _threshold(found, "gauss_newton")).sum()), values[:most]
            left["gauss_newton", one.name, one.method] = (values, torch.zeros_like(values), count, count)
    dims = ("operator", "knockout", "method")
    return {
        "knockout_value": ((*dims, "pair"), _row(left, 0)),
        "knockout_residual_norm": ((*dims, "pair"), _row(left, 1)),
        "knockout_outliers": (dims, _row(left, 2)),
        "knockout_upper": (dims, _row(left, 3)),
    }


def _averages(found: Findings) -> Variables:
    most, levels = max(len(pairs.values) for pairs in found.pairs.values()), found.subspaces
    dimensions = {(level, name): found.dimensions[level] for level in levels for name in found.pairs}
    return {
        "subspace_value": (
            ("level", "pair"),
            {level: values[:most] for level, (values, _) in levels.items()},
        ),
        "subspace_overlap": (("level", "operator"), found.overlaps),
        "subspace_dimension": (("level", "operator"), dimensions),
        "subspace_gradients": (("level",), {level: found.subspace_gradients[level] for level in levels}),
    }


def _traces(found: Findings) -> Variables:
    """Traces of H, G, R and of G's parts, with standard errors, 0 where they are exact."""
    traces = {name: _trace(found, name) for name in OPERATORS}
    parts = dict(zip(found.attribution.part_names, found.part_traces.T.tolist(), strict=False))
    return {
        "trace": (("operator",), _row(traces, 0)),
        "trace_standard_error": (("operator",), _row(traces, 1)),
        "part_trace": (("part",), _row(parts, 0)),
        "part_trace_standard_error": (("part",), _row(parts, 1)),
    }


def _trace(found: Findings, name: str) -> tuple[float, float]:
    """With its standard error: of G as the stages found it, else from the density."""
    if name == "gauss_newton" and found.trace is not None:
        return found.trace
    density = found.densities[name]
    return density.mean * density.size, density.mean_standard_error * density.size


def _classes(found: Findings) -> Variables:
    projections = found.parts.projections
    num_classes = projections.num_classes
    counted = found.parts.rows.curvature > 0
    counts = torch.bincount(projections.labels[counted], minlength=num_classes)
    gram = np.full((num_classes, num_classes), np.nan)
    factor = found.parts.factor("class")
    present = (projections.class_weights > 0).cpu().numpy()
    gram[np.ix_(present, present)] = inner_products(factor.T, factor.T)
    return _places(found) | {
        "class_count": (("class",), counts.cpu().numpy()),
        "class_weight": (("class",), projections.class_weights.cpu().numpy()),
        "cross_class_weight": (("class", "cross_class"), projections.cell_weights.cpu().numpy()),
        "mean_gram": (("class", "class_other"), gram),
    }


def _places(found: Findings) -> Variables:
    """Of the means on the map."""
    if found.places is None:
        return {}
    classes, crossed = (table.numpy() for table in found.places)
    return {f"map_class_{axis}": (("class",), classes[:, j]) for j, axis in enumerate("xy")} | {
        f"map_{axis}": (("class", "cross_class"), crossed[..., j]) for j, axis in enumerate("xy")
    }


def _costs(found: Findings) -> Variables:
    costs = found.ledger.costs.items()
    return {
        "cost_products": (("stage",), np.array([cost.num_products for _, cost in costs])),
        "cost_seconds": (("stage",), {name: cost.seconds for name, cost in costs}),
        "cost_gradients": (("stage",), found.ledger.gradients),
    }


def _attributes(found: Findings) -> dict[str, object]:
    problem, attribution = found.problem, found.attribution
    products, labels = products_of(problem), Labels(seed=found.seed)
    conditions = {
        "batches": problem.batches.num_batches,
        "threads": torch.get_num_threads(),
        "operations of a gradient": f"{found.operations:.2g}, by which effort is chosen where it is not given",
        "eigenpairs of H": len(found.pairs["hessian"].values),
        "rtol of eigenpairs": found.effort.rtol,
        "effort": found.effort.name,
        "probes × steps of densities": "all eigenvalues"
        if found.effort.dense
        else f"{found.effort.num_probes} × {found.effort.num_steps}",
        **products.notes,
        **({"finished before a stop": ", ".join(found.ledger.resumed)} if found.ledger.resumed else {}),
        "doubts": "; ".join(found.ledger.doubts) or "none: every eigenpair converged",
    }
    thresholds = {
        "bulk edge": [
            attribution.bulk_edge,
            "largest eigenvalue of H without any class or cross-class mean: what scatter within classes and "
            "the residual make by themselves",
        ],
        "outlier threshold": [attribution.threshold, f"{attribution.margin:g} times the bulk edge"],
    }
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        **described(problem, labels, "Spectrum of", sentences(found), found.loss, found.accuracy),
        "gradient_norm": found.gradient_norm,
        "gradient_seconds": found.ledger.gradient_seconds,
        "memory_bytes": problem.memory,
        "peak_memory_bytes": peak,
        "provenance": provenance(**conditions),
        "thresholds": json.dumps(thresholds),
    }


def sentences(found: Findings) -> list[str]:
    """The verdict: what the outliers are made of, whether averaging finds them, what G and R are to H."""
    lines = list(found.attribution.verdicts)
    averages = [
        f"{overlap:.2f} from the {level.replace('_', '-')} means (about "
        f"{found.subspace_gradients[level]:.2g} gradients)"
        for (level, name), overlap in found.overlaps.items()
        if name == "hessian" and not math.isnan(overlap)
    ]
    if averages:
        lines.append(
            f"Averaging alone finds the top {found.dimensions['class']} eigenvectors of H with overlap "
            f"{' and '.join(averages)}."
        )
    else:
        lines.append("The class means of gradients are zero, so that averaging finds no eigenvectors.")
    traces = [f"{LETTERS[name]} {measured(*_trace(found, name))}" for name in OPERATORS]
    lines.append(f"Traces, each by itself and ± its standard error: {', '.join(traces)}.")
    if found.ledger.doubts:
        lines.append("Not everything converged: " + "; ".join(found.ledger.doubts))
    return lines

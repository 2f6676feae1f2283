"""Findings as one labelled dataset: every number with its dimensions named."""

from __future__ import annotations

import json
import math
import resource
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from deepspectra.algorithms.long_vectors import inner_products
from deepspectra.algorithms.overlap import overlap
from deepspectra.analysis.outlier_sources import layer_shares, share_errors
from deepspectra.derivatives.products import products_of
from deepspectra.jobs.findings import LETTERS, Findings
from deepspectra.jobs.pages import Dataset, Labels, Variables, dataset_of, described, measured, precision, provenance
from deepspectra.jobs.spectrum_bins import VIEWS, Bins, binned

OPERATORS = ("hessian", "gauss_newton", "residual")
SIDES = ("magnitude", "positive", "negative")
LEVELS, METHODS = ("class", "cross_class"), ("subtraction", "projection")
ROUNDING = 1e-7  # of the largest trace, below which another is none in float32
CLASS_AXES = ("class", "cross_class", "class_other")


def analysis_dataset(found: Findings) -> Dataset:
    """Every number of an analysis."""
    groups = [_histograms, _tails, _nodes, _pairs, _of_test, _traces, _costs]
    coords: dict[str, list[Any]] = {
        "operator": list(OPERATORS),
        "split": list(_looks(found)),
        "view": list(VIEWS),
        "side": list(SIDES),
        "layer": list(found.problem.layers),
        "stage": list(found.ledger.costs),
    }
    if found.classed:
        groups += [_shares, _sources, _knockouts, _averages, _classes]
        coords |= {
            "part": list(found.attribution.part_names),
            "level": list(LEVELS),
            "knockout": list(dict.fromkeys(knockout.name for knockout in found.attribution.knockouts)),
            "method": list(METHODS),
            **{axis: [str(c) for c in range(found.num_classes)] for axis in CLASS_AXES},
        }
    variables: Variables = {}
    for group in groups:
        variables |= group(found)
    return dataset_of(variables, coords, _attributes(found))


def _looks(found: Findings) -> dict[str, Findings]:
    """By the data that they are of; those of the problem count as those of training."""
    return {"train": found} | ({} if found.test is None else {"test": found.test})


def _histograms(found: Findings) -> Variables:
    """Of every spectrum, without its zeros, and what they do not show."""
    bins: dict[tuple[str, str, str], Bins] = {}
    zeros: dict[tuple[str, str], float] = {}
    for split, one in _looks(found).items():
        nodes = torch.cat([density.nodes for density in one.densities.values()]).nan_to_num()
        reach = float(nodes.max() - nodes.min())
        for name in OPERATORS:
            if not bool(one.densities[name].nodes.any()):
                zeros[split, name] = 1.0
            if (spectrum := one.spectrum(name)) is None:
                if not bool(one.densities[name].weights.isfinite().all()):
                    of = f"the density of {LETTERS[name]}{one.of}"
                    found.ledger.doubts.append(f"{of} has values that are not finite; none is drawn")
            else:
                density, zeros[split, name] = spectrum
                for view in VIEWS:
                    bins[split, name, view] = binned(density, view, np.nan_to_num(zeros[split, name]), reach)
    dims = ("split", "operator")
    found_bins = {f"bin_{n}": ((*dims, "view", "bin"), _row(bins, j)) for j, n in enumerate(Bins._fields)}
    return found_bins | {"zero_share": (dims, zeros)}


def _tails(found: Findings) -> Variables:
    """Laws of the tails: numbers, and words where there is a verdict."""
    tails = {(s, *key): kept for s, one in _looks(found).items() for key, kept in one.tails.items()}
    dims, coords = ("split", "operator", "side"), (list(_looks(found)), OPERATORS, SIDES)
    names = list(next(iter(tails.values()), {}))
    words = {
        n: [[[tails.get((s, o, side), {}).get(n, "") for side in SIDES] for o in OPERATORS] for s in coords[0]]
        for n in names[:2]
    }
    return {f"tail_{n}": (dims, np.array(table)) for n, table in words.items()} | {
        f"tail_{n}": (dims, {key: kept[n] for key, kept in tails.items()}) for n in names[2:]
    }


def _of_test(found: Findings) -> Variables:
    """Of the test data what is not beside that of the others: nodes, pairs and traces."""
    if found.test is None:
        return {}
    other = found.test
    pairs, traces = other.pairs.items(), {name: _trace(other, name) for name in OPERATORS}
    nodes = {f"test_{n}": ((dims[0], "test_node"), values) for n, (dims, values) in _nodes(other).items()}
    return nodes | {
        "test_eigenvalue": (("operator", "pair"), {name: one.values for name, one in pairs}),
        "test_residual_norm": (("operator", "pair"), {name: one.residual_norms for name, one in pairs}),
        "test_trace": (("operator",), _row(traces, 0)),
        "test_trace_standard_error": (("operator",), _row(traces, 1)),
    }


def _row(tables: Mapping[Any, Any], number: int) -> dict[Any, Any]:
    """Entry `number` of each."""
    return {key: table[number] for key, table in tables.items()}


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
    thresholds = {name: found.threshold(name) for name in OPERATORS[:2]}
    above = {name: one.values.cpu() > thresholds[name] for name, one in pairs}
    outliers = [above.get(name, torch.zeros(0, dtype=torch.bool)) for name in OPERATORS]
    edges = {"hessian": found.attribution.bulk_edge} if found.classed else {}
    if found.exact is not None:
        edges["gauss_newton"] = found.exact.bulk_edge
    angles = {name: _known(one.angle_bounds) for name, one in pairs}
    lengths = {name: layer_shares(found.problem, one.vectors) for name, one in pairs}
    return {
        "eigenvalue": (("operator", "pair"), {name: one.values for name, one in pairs}),
        "residual_norm": (("operator", "pair"), {name: one.residual_norms for name, one in pairs}),
        "error_bound": (("operator", "pair"), {name: one.error_bounds for name, one in pairs}),
        "angle_bound": (("operator", "pair"), angles),
        "layer_length": (("operator", "pair", "layer"), lengths),
        "is_outlier": (("operator", "pair"), pad_sequence(outliers, True).to(torch.int8).numpy()),
        "num_outliers": (
            ("operator",),
            {name: some.sum() for name, some in above.items() if len(some) and found.classed},
        ),
        "bulk_edge": (("operator",), edges),
        "outlier_threshold": (("operator",), thresholds if found.classed else {}),
        "converged": (("operator",), {name: float(one.converged) for name, one in pairs}),
    }


def _known(bounds: Tensor) -> Tensor:
    """Of sines: NaN where nothing is known."""
    return torch.where(bounds < 1, bounds, torch.nan)


def _norm_of_g(found: Findings) -> float:
    pairs = found.pairs["gauss_newton"]
    return float((pairs.values + pairs.error_bounds)[0]) if len(pairs.values) else 0.0


def _sources(found: Findings) -> Variables:
    """Of outliers: shares of classes, of potential classes and of pairs of both, with their errors."""
    tables: dict[str, dict[str, Tensor]] = {}
    for name, cells in found.sources.items():
        mine = {"class": cells.sum(2), "logit": cells.sum(1), "class_pair": cells}
        for of, shares in mine.items():
            tables.setdefault(f"{of}_share", {})[name] = shares
            errors = share_errors(shares, found.pairs[name], _norm_of_g(found))
            tables.setdefault(f"{of}_share_error", {})[name] = errors
    axes = {"class": ("class",), "logit": ("cross_class",), "class_pair": ("class", "cross_class")}
    return {name: (("operator", "pair", *axes[name.partition("_share")[0]]), one) for name, one in tables.items()}


def _shares(found: Findings) -> Variables:
    means, errors = {}, {}
    for name, table in found.shares.items():
        of_g = table.clone()
        of_g[:, -1] = table[:, :-1].sum(1)  # what the residual leaves
        errors[name] = share_errors(of_g, found.pairs[name], _norm_of_g(found))
    for name, table in found.shares.items():
        above = found.pairs[name].values.cpu() > found.threshold(name)
        if above.any():
            means[name] = table.numpy()[above.numpy()].mean(0)
    return {
        "share": (("operator", "pair", "part"), found.shares),
        "share_error": (("operator", "pair", "part"), errors),
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
            count, values = int((values > found.threshold("gauss_newton")).sum()), values[:most]
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
    parts = {}
    if found.classed:
        parts = dict(zip(found.attribution.part_names, found.part_traces.T.tolist(), strict=False))
    of_parts: Variables = {
        "part_trace": (("part",), _row(parts, 0)),
        "part_trace_standard_error": (("part",), _row(parts, 1)),
    }
    return {
        "trace": (("operator",), _row(traces, 0)),
        "trace_standard_error": (("operator",), _row(traces, 1)),
        **(of_parts if found.classed else {}),
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
    counts = torch.bincount(projections.owners(found.parts.rows.labels)[counted], minlength=num_classes)
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
    problem = found.problem
    products, labels = products_of(problem), Labels(seed=found.seed)
    conditions = {
        "batches": problem.batches.num_batches,
        "threads": torch.get_num_threads(),
        **({"processes": problem.batches.group.size} if problem.batches.group.size > 1 else {}),
        "operations of a gradient": f"{found.operations:.2g}, from which an effort's probes, steps and rtol follow",
        "eigenpairs of H": len(found.pairs["hessian"].values),
        "rtol of eigenpairs": found.effort.rtol,
        "effort": found.effort.name,
        "probes × steps of densities": _told_densities(found),
        **products.notes,
        **({"finished before a stop": ", ".join(found.ledger.resumed)} if found.ledger.resumed else {}),
        "doubts": "; ".join(found.ledger.doubts) or "none: every eigenpair converged",
    }
    thresholds: dict[str, object] = {}
    if found.classed:
        attribution = found.attribution
        thresholds["bulk edge"] = [
            attribution.bulk_edge,
            "largest eigenvalue of H without any class or cross-class mean: what scatter within classes and "
            "the residual make by themselves",
        ]
        thresholds["outlier threshold"] = [attribution.threshold, f"{attribution.margin:g} times the bulk edge"]
    about = described(problem, labels, "Spectrum of", sentences(found), found.loss, found.accuracy)
    if not found.classed:
        del about["num_classes"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        **about,
        **_test_attributes(found),
        "gradient_norm": found.gradient_norm,
        "gradient_seconds": found.ledger.gradient_seconds,
        "memory_bytes": problem.memory,
        "peak_memory_bytes": peak,
        "provenance": provenance(**conditions),
        "thresholds": json.dumps(thresholds),
    }


def _told_densities(found: Findings) -> str:
    """How each was found, in one word if all were alike."""
    told = {
        f"{LETTERS[name]}{one.of}": f"{density.num_probes} × {density.num_steps}"
        if density.num_probes
        else "all eigenvalues"
        for one in (found, found.test)
        if one is not None
        for name, density in one.densities.items()
    }
    ways = set(told.values())
    return ways.pop() if len(ways) == 1 else ", ".join(f"{name}: {way}" for name, way in told.items())


def _test_attributes(found: Findings) -> dict[str, object]:
    if found.test is None:
        return {}
    problem = found.test.problem
    numbers = {
        "num_examples": problem.num_examples,
        "loss_value": found.test.loss,
        "accuracy": found.test.accuracy,
    }
    return {f"test_{name}": value for name, value in numbers.items()}


def _told_traces(found: Findings) -> str:
    """Of H, G and R; one that rounding alone leaves, as that of R of a network of ReLU, as zero."""
    traces = {name: _trace(found, name) for name in OPERATORS}
    least = ROUNDING * max(abs(value) for value, _ in traces.values())
    return ", ".join(
        f"{LETTERS[name]} {'0' if abs(value) + error <= least else measured(value, error)}"
        for name, (value, error) in traces.items()
    )


def sentences(found: Findings) -> list[str]:
    """The verdict: what the outliers are made of, whether averaging finds them, what G and R are to H."""
    lines = _of_classes(found) if found.classed else _of_values(found)
    lines.append(f"Traces, each by itself and ± its standard error: {_told_traces(found)}.")
    for split, one in _looks(found).items():
        bulks = {name: one.tails.get((name, "magnitude")) for name in OPERATORS}
        listed = [f"{LETTERS[name]} {_law(kept)}" for name, kept in bulks.items() if kept]
        on = "" if split == "train" else f"on the test data (loss {one.loss:.3g}, accuracy {one.accuracy:.1%}), "
        rest = "without outliers: " if found.classed else "of all: "
        lines += [f"Laws of the tails of |λ|, {on}{rest}{', '.join(listed)}."] if listed else []
    lines += precision(found.problem)
    if found.ledger.doubts:
        lines.append("Not everything converged: " + "; ".join(found.ledger.doubts))
    return lines


def _of_classes(found: Findings) -> list[str]:
    lines = list(found.attribution.verdicts)
    averages = [
        f"{shared:.2f} from the {level.replace('_', '-')} means (about "
        f"{float(f'{found.subspace_gradients[level]:.2g}'):,g} gradients)"
        for (level, name), shared in found.overlaps.items()
        if name == "hessian" and not math.isnan(shared)
    ]
    if averages:
        lines.append(
            f"Averaging alone finds the top {found.dimensions['class']} eigenvectors of H with overlap "
            f"{' and '.join(averages)}."
        )
    else:
        lines.append("The class means of gradients are zero, so that averaging finds no eigenvectors.")
    return lines


def _of_values(found: Findings) -> list[str]:
    """Of a problem without classes: its largest eigenvalues, and whether those of G are the same."""
    h, g = found.pairs["hessian"], found.pairs["gauss_newton"]
    tops = [
        f"{LETTERS[name]} {', '.join(measured(*one) for one in zip(values, errors, strict=True))}"
        for name, pairs in found.pairs.items()
        for values, errors in [(pairs.values[:3].tolist(), pairs.error_bounds[:3].tolist())]
    ]
    lines = [f"Largest eigenvalues, ± bounds of their errors where three digits show these: {'; '.join(tops)}."]
    num = min(h.vectors.shape[1], g.vectors.shape[1])
    if num:
        same = overlap(h.vectors[:, :num], g.vectors[:, :num])
        lines.append(f"The top {num} eigenvectors of H and of G span spaces that overlap by {same:.2f}.")
    lines.append("Without class labels there are no means of classes, and no outlier is told from the bulk.")
    return lines


def _law(kept: Mapping[str, Any]) -> str:
    if kept["verdict"] != "power law":
        return str(kept["verdict"])
    return f"power law |λ|^−{kept['exponent']:.2g} ({kept['exponent_low']:.2g} to {kept['exponent_high']:.2g})"

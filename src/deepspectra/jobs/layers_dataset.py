"""The layer-by-layer job: a labelled dataset of every layer's class structure, and its verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepspectra.analysis.gram_spectrum import GramSpectrum
from deepspectra.analysis.kronecker_quality import KroneckerQuality
from deepspectra.analysis.layers import Layers
from deepspectra.jobs.pages import UNLABELLED, Dataset, Labels, Variables, page_dataset
from deepspectra.problem.problem import Problem

KINDS = ("features", "errors", "gradients", "centred")
PARTS = ("mean", "class", "logit", "interaction", "within", "true")
STATISTICS = ("class_cosine", "class_error", "cross_cosine", "cross_error", "logit_cosine")
MEASURES = ("nc1", "nc2_norms", "nc2_angles", "nc2_simplex", "nc3", "nc4")
FITS = ("frobenius", "cosine", "spectral", "decades", "trace")
MOST_RANKS = 60  # eigenvalues kept of each spectrum
SERIES = ("gauss_newton", "hessian_positive", "hessian_negative")
BLOCK_MEASURES = ("residual", "trace", "trace_standard_error", "smallest")
POINTS = 160  # of a layer's density
SMALLEST = 1e-8  # of a layer's largest eigenvalue: what is drawn as zero
DEEP = 4  # layers of which a rank correlation with depth says something
EXPLAINED = 0.9  # cosine from which products of means stand for means of products


def layer_dataset(found: Layers, problem: Problem, labels: Labels = UNLABELLED) -> Dataset:
    """Every number of `layers(problem, effects="two-way")`."""
    ranks, spectra = min(MOST_RANKS, max(3 * problem.num_classes, 10)), _spectra(found)
    parts = {
        (*key, part): (max(spectrum.parts[part].tolist(), default=0.0), trace)
        for key, spectrum in spectra.items()
        for part, trace in zip(spectrum.part_names, spectrum.traces.tolist(), strict=True)
    }
    values = {key: one.values[:ranks] for key, one in spectra.items()}
    shares = {key: _in_places(one.shares[:ranks], one.part_names) for key, one in spectra.items()}
    collapses = {name: layer.collapse for name, layer in found.items()}
    kronecker, kinds = _kronecker(found)
    variables: Variables = {
        "layer_eigenvalue": (("layer", "kind", "rank"), values),
        "layer_share": (("layer", "kind", "rank", "layer_part"), shares),
        "layer_trace": (("layer", "kind", "layer_part"), {key: trace for key, (_, trace) in parts.items()}),
        "layer_largest": (("layer", "kind", "layer_part"), {key: most for key, (most, _) in parts.items()}),
        "khatri_rao": (("layer", "statistic", "moment"), _products(found)),
        "collapse": (("layer", "measure"), _numbers(collapses, MEASURES)),
        "layer_parameters": (("layer",), np.array([layer.num_parameters for layer in found.values()])),
        **_blocks(found),
        **kronecker,
    }
    coords = {
        "layer": list(found),
        "kind": list(KINDS),
        "layer_part": list(PARTS),
        "statistic": list(STATISTICS),
        "moment": ["mean", "deviation"],
        "measure": list(MEASURES),
        "series": list(SERIES),
        "block_measure": list(BLOCK_MEASURES),
        **kinds,
    }
    dataset = page_dataset(variables, coords, problem, labels, "Layers of", sentences(found), found.seconds)
    return dataset.assign_attrs(left_out=", ".join(found.left_out)) if found.left_out else dataset


def _spectra(found: Layers) -> dict[tuple[str, str], GramSpectrum]:
    """(layer, kind) → spectrum, where there is one."""
    return {
        (name, kind): spectrum
        for name, layer in found.items()
        for kind in KINDS
        if (spectrum := getattr(layer, kind)) is not None
    }


def _in_places(shares: Tensor, names: tuple[str, ...]) -> Tensor:
    """Columns of these parts among those of all."""
    table = shares.new_full((len(shares), len(PARTS)), math.nan)
    table[:, [PARTS.index(name) for name in names]] = shares
    return table


def _numbers(found: Mapping[Any, Any], names: tuple[str, ...]) -> dict[Any, list[Any]]:
    """Attributes of what was found, where something was."""
    return {key: [getattr(one, name) for name in names] for key, one in found.items() if one is not None}


def _products(found: Layers) -> dict[tuple[str, str], list[float]]:
    """Mean and deviation of every statistic of products of means."""
    known: dict[tuple[str, str], list[float]] = {}
    for layer, tables in _numbers({name: one.khatri_rao for name, one in found.items()}, STATISTICS).items():
        for statistic, cosines in zip(STATISTICS, tables, strict=True):
            finite = cosines[~cosines.isnan()]
            known[layer, statistic] = [float(finite.mean()), float(finite.std(correction=0))]
    return known


def _blocks(found: Layers) -> Variables:
    """The layers' blocks of G and H: sizes, largest eigenvalues, densities."""
    hessians = {name: layer.hessian for name, layer in found.items() if layer.hessian is not None}
    densities = {(name, SERIES[0]): (layer.gradients.density, 1) for name, layer in found.items()}
    for name, h in hessians.items():
        if not h.is_gauss_newton:
            densities |= {(name, SERIES[1]): (h.density, 1), (name, SERIES[2]): (h.density, -1)}
    curves = {
        key: density.smooth("log", sign=sign, num_points=POINTS, epsilon=SMALLEST)
        for key, (density, sign) in densities.items()
        if bool((density.nodes * sign > 0).any())
    }
    dims = ("layer", "series", "layer_point")
    return {
        "stable_rank": (("layer", "kind"), {key: one.stable_rank for key, one in _spectra(found).items()}),
        "hessian_eigenvalue": (("layer", "hessian_rank"), {name: h.values for name, h in hessians.items()}),
        "hessian_block": (("layer", "block_measure"), _numbers(hessians, BLOCK_MEASURES)),
        "layer_density": (dims, {key: curve.density for key, curve in curves.items()}),
        "layer_density_grid": (dims, {key: curve.grid for key, curve in curves.items()}),
    }


def _kronecker(found: Layers) -> tuple[Variables, dict[str, Any]]:
    """Variables and coordinates of Kronecker-factored approximations, if they were judged."""
    if found.kronecker is None:
        return {}, {}
    quality, kinds = found.kronecker, found.kronecker.kinds
    fits = {(name, kind): layer.fits[kind] for name, layer in quality.items() for kind in kinds}
    variables: Variables = {
        "kronecker_fit": (("block", "approximation", "fit"), _numbers(fits, FITS)),
        "kronecker_overlap": (
            ("block", "approximation", "size"),
            {key: fit.overlaps for key, fit in fits.items()},
        ),
    }
    ks = max((layer.ks for layer in quality.values()), key=len, default=())
    coords = {"block": list(quality), "approximation": list(kinds), "fit": list(FITS), "size": list(ks)}
    return variables, coords


def sentences(found: Layers) -> list[str]:
    """The verdict: what the largest eigenvalues are made of, whether structure grows with depth, what ⊗ explains."""
    lines = []
    live = [layer for layer in found.values() if float(layer.gradients.values[0]) > 0]
    if len(live) < len(found):
        zero = ", ".join(layer.name or "(model)" for layer in found.values() if layer not in live)
        lines.append(f"G is zero in {zero}: no output depends on it.")
    gradients = [layer for layer in live if layer.features is not None]
    if gradients:
        tops = [_top_part(layer.gradients) for layer in gradients]
        counts = {part: tops.count(part) for part in dict.fromkeys(tops)}
        listed = ", ".join(f"{part} in {count}" for part, count in sorted(counts.items(), key=lambda pair: -pair[1]))
        lines.append(
            f"Of {len(gradients)} layers with weights, the largest eigenvalue of the gradients is mostly {listed}."
        )
    between = [share for share in (_between(layer.features) for layer in gradients) if not math.isnan(share)]
    if between:
        # of three layers one order in six rises throughout, of four one in 24
        trend = f" (rank correlation with depth {_trend(between):.2f})" if len(between) >= DEEP else ""
        lines.append(
            f"Class means make {between[0]:.0%} of the features' scatter about their mean at the input and "
            f"{between[-1]:.0%} at the last layer{trend}."
        )
    products = [layer for layer in found.values() if layer.khatri_rao is not None]
    if products:
        cosines = [float(layer.khatri_rao.class_cosine.nanmean()) for layer in products if layer.khatri_rao]
        good = sum(cosine >= EXPLAINED for cosine in cosines)
        lines.append(
            f"Products of class means h ⊗ e stand for class means of gradients (cosine at least {EXPLAINED}) in "
            f"{good} of {len(products)} layers; the mean cosine runs from {min(cosines):.2f} to {max(cosines):.2f}."
        )
    lines += _centred_sentence(found) + _hessian_sentence(found)
    if found.kronecker is not None and len(found.kronecker):
        lines.append(_best_fit(found.kronecker))
    lines += [f"Left out is {name}: {reason}" for name, reason in found.left_out.items()]
    return lines


def _centred_sentence(found: Layers) -> list[str]:
    """What the mean feature does: whether it makes the logit means, and what class means carry without it."""
    layers = [
        layer
        for layer in found.values()
        if layer.centred is not None
        and layer.khatri_rao is not None
        and min(float(one.values[0]) for one in (layer.gradients, layer.centred)) > 0
    ]
    if not layers:
        return []
    before, after = (
        {part: sum(_top_share(one, part) for one in spectra) / len(layers) for part in ("logit", "class")}
        for spectra in (
            [layer.gradients for layer in layers],
            [layer.centred for layer in layers if layer.centred is not None],
        )
    )
    cosines = [float(layer.khatri_rao.logit_cosine.nanmean()) for layer in layers if layer.khatri_rao]
    return [
        "Without the mean feature the logit means' share of each layer's top C − 1 eigenvalues would be "
        f"{after['logit']:.0%} in place of {before['logit']:.0%}, and the class means' {after['class']:.0%} in "
        f"place of {before['class']:.0%}; logit means are products h̄ ⊗ e with a mean cosine of "
        f"{sum(cosines) / len(cosines):.2f}."
    ]


def _top_share(spectrum: GramSpectrum, part: str) -> float:
    """Of a part in the sum of as many top eigenvalues as there are class means."""
    return spectrum.share_of_top(part, len(spectrum.parts["class"]))


def _hessian_sentence(found: Layers) -> list[str]:
    """In how many layers the Hessian's block is that of G."""
    blocks = [(layer, layer.hessian) for layer in found.values() if layer.hessian is not None]
    if not blocks:
        return []
    apart = [(layer, h) for layer, h in blocks if not h.is_gauss_newton]
    if not apart:
        return [f"The Hessian's block is that of G, up to rounding, in all {len(blocks)} layers."]
    layer, h = max(apart, key=lambda pair: pair[1].residual)
    return [
        f"The Hessian's block is that of G in {len(blocks) - len(apart)} of {len(blocks)} layers; the residual is "
        f"largest in {layer.name}, {h.residual:.2g} times G's block, where the lowest eigenvalue is {h.smallest:.2g} "
        f"and the largest {float(h.values[0]):.2g}."
    ]


def _best_fit(quality: KroneckerQuality) -> str:
    """Which approximation is nearest to G in how many layers."""
    nearest = [min(layer.fits, key=lambda kind: layer.fits[kind].frobenius) for layer in quality.values()]
    counts = ", ".join(f"{kind.upper()} in {nearest.count(kind)}" for kind in quality.kinds if kind in nearest)
    errors = {kind: [layer.fits[kind].frobenius for layer in quality.values()] for kind in quality.kinds}
    ranges = ", ".join(f"{kind.upper()} {min(some):.0%} to {max(some):.0%}" for kind, some in errors.items())
    return f"Nearest to G's block: {counts} of {len(quality)} layers; relative Frobenius errors {ranges}."


def _top_part(spectrum: GramSpectrum) -> str:
    return spectrum.part_names[int(spectrum.shares[0].nan_to_num().argmax())]


def _between(features: GramSpectrum | None) -> float:
    """Share of the class means in the trace of the centred features; NaN of features that are all the same."""
    assert features is not None
    parts = dict(zip(features.part_names, features.traces.tolist(), strict=True))
    scatter = parts["class"] + parts["within"]
    return parts["class"] / scatter if scatter else math.nan


def _trend(values: list[float]) -> float:
    """Spearman's rank correlation with the order."""
    ranks = torch.tensor(values, dtype=torch.float64).argsort().argsort().double()
    order = torch.arange(len(values), dtype=torch.float64)
    return float(torch.corrcoef(torch.stack([ranks, order]))[0, 1])

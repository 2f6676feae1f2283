"""The layer-by-layer job: a labelled dataset of every layer's class structure, and its verdict."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from deepspectra.analysis.gram_spectrum import GramSpectrum
from deepspectra.analysis.kronecker_quality import KroneckerQuality
from deepspectra.analysis.layers import Layer, Layers
from deepspectra.jobs.pages import UNLABELLED, Labels, Variables, page_dataset
from deepspectra.problem.problem import Problem

if TYPE_CHECKING:
    import xarray as xr

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
EXPLAINED = 0.9  # cosine from which products of means stand for means of products


def layer_dataset(found: Layers, problem: Problem, labels: Labels = UNLABELLED) -> xr.Dataset:
    """Every number of `layers(problem, effects="two-way")`."""
    ranks = min(MOST_RANKS, max(3 * problem.num_classes, 10))
    shape = (len(found), len(KINDS))
    values = np.full((*shape, ranks), np.nan)
    shares = np.full((*shape, ranks, len(PARTS)), np.nan)
    traces, largest = (np.full((*shape, len(PARTS)), np.nan) for _ in range(2))
    products = np.full((len(found), len(STATISTICS), 2), np.nan)
    collapse = np.full((len(found), len(MEASURES)), np.nan)
    for j, layer in enumerate(found.values()):
        for i, spectrum in enumerate(_spectra(layer)):
            if spectrum is None:
                continue
            size = min(ranks, len(spectrum.values))
            values[j, i, :size] = spectrum.values[:size]
            for part, column, trace in zip(
                spectrum.part_names, spectrum.shares.T, spectrum.traces.tolist(), strict=True
            ):
                p = PARTS.index(part)
                shares[j, i, :size, p] = column[:size]
                traces[j, i, p] = trace
                largest[j, i, p] = max(spectrum.parts[part].tolist(), default=0.0)
        if layer.khatri_rao is not None:
            for i, name in enumerate(STATISTICS):
                table = getattr(layer.khatri_rao, name)
                table = table[~table.isnan()]
                products[j, i] = float(table.mean()), float(table.std(correction=0))
        if layer.collapse is not None:
            collapse[j] = [getattr(layer.collapse, name) for name in MEASURES]
    variables: Variables = {
        "layer_eigenvalue": (("layer", "kind", "rank"), values),
        "layer_share": (("layer", "kind", "rank", "layer_part"), shares),
        "layer_trace": (("layer", "kind", "layer_part"), traces),
        "layer_largest": (("layer", "kind", "layer_part"), largest),
        "khatri_rao": (("layer", "statistic", "moment"), products),
        "collapse": (("layer", "measure"), collapse),
        "layer_parameters": (("layer",), np.array([layer.num_parameters for layer in found.values()])),
    }
    kronecker, kinds = _kronecker(found)
    blocks, measures = _blocks(found)
    coords = {
        "layer": [layer.name or "(model)" for layer in found.values()],
        "kind": list(KINDS),
        "layer_part": list(PARTS),
        "statistic": list(STATISTICS),
        "moment": ["mean", "deviation"],
        "measure": list(MEASURES),
    }
    variables, coords = variables | kronecker | blocks, coords | kinds | measures
    subject, verdict = "Layers of", sentences(found)
    return page_dataset(
        variables, coords, problem, labels, subject=subject, verdict=verdict, seconds=found.seconds
    )


def _blocks(found: Layers) -> tuple[Variables, dict[str, Any]]:
    """Variables and coordinates of the layers' blocks of G and H: sizes, largest eigenvalues, densities."""
    hessians = [layer.hessian for layer in found.values()]
    num = max((len(h.values) for h in hessians if h is not None), default=1)
    ranks = np.full((len(found), len(KINDS)), np.nan)
    values, measures = np.full((len(found), num), np.nan), np.full((len(found), len(BLOCK_MEASURES)), np.nan)
    grids, curves = (np.full((len(found), len(SERIES), POINTS), np.nan) for _ in range(2))
    for j, (layer, h) in enumerate(zip(found.values(), hessians, strict=True)):
        ranks[j] = [math.nan if one is None else one.stable_rank for one in _spectra(layer)]
        drawn = [(layer.gradients.density, 1)]
        if h is not None:
            values[j, : len(h.values)] = h.values
            measures[j] = [getattr(h, name) for name in BLOCK_MEASURES]
            drawn += [] if h.is_gauss_newton else [(h.density, 1), (h.density, -1)]
        for i, (density, sign) in enumerate(drawn):
            if bool((density.nodes * sign > 0).any()):
                curve = density.smooth("log", sign=sign, num_points=POINTS, epsilon=SMALLEST)
                grids[j, i], curves[j, i] = curve.grid, curve.density
    variables = {
        "stable_rank": (("layer", "kind"), ranks),
        "hessian_eigenvalue": (("layer", "hessian_rank"), values),
        "hessian_block": (("layer", "block_measure"), measures),
        "layer_density": (("layer", "series", "layer_point"), curves),
        "layer_density_grid": (("layer", "series", "layer_point"), grids),
    }
    return variables, {"series": list(SERIES), "block_measure": list(BLOCK_MEASURES)}


def _kronecker(found: Layers) -> tuple[Variables, dict[str, Any]]:
    """Variables and coordinates of Kronecker-factored approximations, if they were judged."""
    if found.kronecker is None:
        return {}, {}
    quality = found.kronecker
    ks = max((layer.ks for layer in quality.values()), key=len, default=())
    shape = (len(quality), len(quality.kinds))
    errors, overlaps = np.full((*shape, len(FITS)), np.nan), np.full((*shape, len(ks)), np.nan)
    for j, layer in enumerate(quality.values()):
        for i, kind in enumerate(quality.kinds):
            fit = layer.fits[kind]
            errors[j, i] = [getattr(fit, name) for name in FITS]
            overlaps[j, i, : len(fit.overlaps)] = fit.overlaps
    dims = ("block", "approximation")
    variables: Variables = {
        "kronecker_fit": ((*dims, "fit"), errors),
        "kronecker_overlap": ((*dims, "size"), overlaps),
    }
    names = {
        "block": [layer.name or "(model)" for layer in quality.values()],
        "approximation": list(quality.kinds),
    }
    return variables, names | {"fit": list(FITS), "size": list(ks)}


def _spectra(layer: Layer) -> tuple[GramSpectrum | None, ...]:
    return layer.features, layer.errors, layer.gradients, layer.centred


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
        listed = ", ".join(
            f"{part} in {count}" for part, count in sorted(counts.items(), key=lambda pair: -pair[1])
        )
        lines.append(
            f"Of {len(gradients)} layers with weights, the largest eigenvalue of the gradients is mostly {listed}."
        )
    between = [share for share in (_between(layer.features) for layer in gradients) if not math.isnan(share)]
    if between:
        lines.append(
            f"Class means make {between[0]:.0%} of the features' scatter about their mean at the input and "
            f"{between[-1]:.0%} at the last layer (rank correlation with depth {_trend(between):.2f})."
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
    counts = ", ".join(
        f"{kind.upper()} in {nearest.count(kind)}" for kind in quality.kinds if kind in nearest
    )
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
    if len(values) < 2:
        return math.nan
    ranks = torch.tensor(values, dtype=torch.float64).argsort().argsort().double()
    order = torch.arange(len(values), dtype=torch.float64)
    return float(torch.corrcoef(torch.stack([ranks, order]))[0, 1])

"""Measures of every layer of one network, a number each, by which kinds of networks are compared."""

from __future__ import annotations

import math

from torch import Tensor

from deepspectra.algorithms.overlap import overlap
from deepspectra.analysis.dissect import dissected
from deepspectra.analysis.gram_spectrum import MARGIN, GramSpectrum
from deepspectra.analysis.layer_blocks import Blocks, norm_of, relative_error, top_pairs
from deepspectra.analysis.layers import layers
from deepspectra.kfac.exact_blocks import ExactBlock
from deepspectra.problem.cross_entropy import CrossEntropy
from deepspectra.problem.problem import Problem
from deepspectra.rows.spectrum import significant

MEASURES = {
    "input_ratio": "λ₁/λ₂ of E[xxᵀ]",
    "input_alignment": "(v₁·E[x])²/‖E[x]‖²",
    "gap": "λ_{C−1}/λ_C of the block of G",
    "output_gap": "τ_{C−1}/τ_C of E[M]",
    "rank_one": "σ₁/‖·‖_F of the top C − 1 eigenvectors",
    "closed_form": "overlap of E[M]'s top C − 1 with their closed form",
    "kfac_error": "‖G − S⊗A‖_F/‖G‖_F",
    "ekfac_error": "the same with G's diagonal in the eigenbasis of S⊗A",
    "cfac_error": "‖G − Σ S_c⊗A_c‖_F/‖G‖_F",
    "kfac_overlap": "overlap of the top C − 1 of S⊗A and G",
    "class_share": "class means in the top C − 1 eigenvalues",
    "logit_share": "logit means in them",
    "centred_class_share": "class means in them without the mean feature",
    "centred_logit_share": "logit means in them without the mean feature",
    "logit_product": "cosine of logit means and h̄ ⊗ e_k",
    "outliers": f"outliers of G: over {MARGIN} times the largest eigenvalue of the part within classes",
    "left_without_class": "outliers left without class means",
    "left_without_class_logit": "outliers left without class and logit means",
}
LEFT = {
    "outliers": (),
    "left_without_class": ("class",),
    "left_without_class_logit": ("class", "logit"),
}
Measured = dict[str, float]  # name of a measure → value
MOST_ROWS = 3000  # N (C − 1) for which the parts of a layer's eigenvalues are computed


def layer_measures(problem: Problem, seed: int = 0) -> dict[str, Measured]:
    """What `MEASURES` names, of every layer that multiplies features.

    They are what factors and eigenvectors of each block of G are like (`dissect`), how far Kronecker factors are from
    the block in the Frobenius norm, and, for class labels and up to `MOST_ROWS` rows N (C − 1), what the largest
    C − 1 eigenvalues are made of, how many are outliers, and how many of these class means and logit means leave
    (`layers`). What does not apply to a layer is left out.

    Args:
        problem: a network and data.
        seed: of random vectors.

    Raises:
        LossError, CurvatureError, MemoryBudgetError: as for `kronecker`.

    Cost: that of `dissect`, `kronecker` and `layers`.

    Source: Wu et al. 2020, arXiv 2010.04261, sections 3–5 and appendices; Papyan 2020, JMLR 21:252, section 6.
    """
    inner = max(1, problem.num_classes - 1)
    is_classifier = isinstance(problem.loss_function, CrossEntropy)
    blocks = Blocks(problem, ("kfac", "ekfac", "cfac") if is_classifier else ("kfac", "ekfac"))
    found = {name: _of_block(blocks, exact, inner, seed) for name, exact in blocks}
    if is_classifier and problem.num_examples * inner <= MOST_ROWS:
        for name, entry in layers(problem, hessian=False).items():
            if name not in found:
                continue
            found[name] |= spectrum_measures(entry.gradients, inner)
            if entry.centred is not None and entry.khatri_rao is not None:
                shares = _part_shares(entry.centred, inner)
                found[name] |= {f"centred_{key}": value for key, value in shares.items()}
                found[name]["logit_product"] = float(entry.khatri_rao.logit_cosine.nanmean())
    return found


def _of_block(blocks: Blocks, exact: ExactBlock, inner: int, seed: int) -> Measured:
    """What a layer's block of G is made of, and how far Kronecker-factored approximations are from it."""
    name, pairs = exact.place.name, top_pairs(exact, inner + 1, seed)
    norm, space = norm_of(exact, blocks.captures.problem.memory), pairs[1][:, :inner]
    measured = {
        f"{kind}_error": relative_error(exact, norm, operator.blocks[name])
        for kind, operator in blocks.approximations.items()
    }
    if space.shape[1] == inner:
        measured["kfac_overlap"] = overlap(space, blocks.factors.blocks[name].decomposed.top(inner)[1])
    if exact.place.groups == 1:
        layer = dissected(blocks, exact, pairs)
        measured |= {
            "input_ratio": layer.input_ratio,
            "input_alignment": layer.input_alignment,
            "gap": _ratio(layer.values, inner),
            "output_gap": _ratio(layer.output_values, inner),
            "rank_one": float(layer.rank_one[:inner].mean()),
            "closed_form": layer.closed_form,
        }
    return measured


def _ratio(values: Tensor, inner: int) -> float:
    """λ_{C−1}/λ_C; NaN where the latter is zero up to rounding."""
    there = len(values) > inner and bool(significant(values)[inner])
    return float(values[inner - 1] / values[inner]) if there else math.nan


def spectrum_measures(spectrum: GramSpectrum, num: int) -> Measured:
    """What makes the first eigenvalues of G, how many are outliers, and how many of these knock-outs leave."""
    counts = {key: float(spectrum.num_outliers(*removed)) for key, removed in LEFT.items()}
    return _part_shares(spectrum, num) | counts


def _part_shares(spectrum: GramSpectrum, num: int) -> Measured:
    """Of class means and of logit means in the sum of the largest eigenvalues."""
    return {f"{part}_share": spectrum.share_of_top(part, num) for part in ("class", "logit")}

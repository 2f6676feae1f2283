"""What changes from one kind of network to another: the same measures of every layer, over several trainings."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deepspectra.algorithms.overlap import overlap
from deepspectra.analysis.compare import compare
from deepspectra.analysis.dissect import dissected
from deepspectra.analysis.gram_spectrum import MARGIN, GramSpectrum, gram_spectrum
from deepspectra.analysis.layer_blocks import Blocks, norm_of, relative_error, top_pairs
from deepspectra.analysis.layers import layers
from deepspectra.argument_checks import LayerProgress, announced
from deepspectra.dataframes import text_table
from deepspectra.errors import OptionError
from deepspectra.kfac.exact_blocks import ExactBlock
from deepspectra.problem.cross_entropy import CrossEntropy
from deepspectra.problem.problem import Problem
from deepspectra.results import ByLayer, origin
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
    "shared": "overlap between networks at k = m",
    "shared_peak": "its highest",
}
SHOWN = ("input_ratio", "gap", "rank_one", "kfac_error", "cfac_error", "class_share", "logit_share", "shared")
WHOLE = "all layers"
LEFT = {
    "outliers": (),
    "left_without_class": ("class",),
    "left_without_class_logit": ("class", "logit"),
}
Sample = dict[str, dict[str, float]]  # layer → measure → value, of one network or of a pair
MOST_ROWS = 3000  # N (C − 1) for which the parts of a layer's eigenvalues are computed


@dataclass(frozen=True, repr=False)
class Study(ByLayer[Tensor]):
    """Measures of every layer that multiplies features, and of "all layers" together, in variants of a network.

    Entries are (variants, measures, samples) float64: of each network, or for "shared" and "shared_peak" of each pair
    of networks; NaN where a measure does not apply.

    Attributes:
        provenance: of the first network.
        variants: their names.
        measures: key → what is measured.
        losses: (variants, networks).
        accuracies: (variants, networks); NaN without class labels.
    """

    variants: tuple[str, ...]
    measures: Mapping[str, str]
    losses: Tensor
    accuracies: Tensor

    def of(self, variant: str, layer: str, measure: str) -> Tensor:
        """The samples (n,) of one measure that there are."""
        found = self[layer][self.variants.index(variant), list(self.measures).index(measure)]
        return found[~found.isnan()]

    def __str__(self) -> str:
        rows: list[list[float | str]] = []
        for layer in self:
            for j, variant in enumerate(self.variants):
                means = [float(self.of(variant, layer, key).mean()) for key in SHOWN]
                rows.append(["" if j else layer[-22:], variant, *means])
        notes = [f"{key}: {self.measures[key]}" for key in SHOWN]
        numbers = zip(self.variants, self.losses.tolist(), self.accuracies.tolist(), strict=True)
        for variant, losses, accuracies in numbers:
            accuracy = _listed(accuracies, ".1%")
            notes.append(f"{variant}: loss {_listed(losses, '.3g')}, training accuracy {accuracy}")
        notes.append(f"means over networks, or over pairs of them; {self.seconds:.3g} s")
        return text_table(("layer", "variant", *SHOWN), rows, *notes)


def _listed(values: list[float], form: str) -> str:
    return ", ".join(f"{value:{form}}" for value in values)


def study(
    variants: Mapping[str, Sequence[Problem]],
    *,
    seed: int = 0,
    progress: LayerProgress | None = None,
) -> Study:
    """The same measures of every layer in several variants of a network, such as with and without batch norm.

    Of every network: what its factors and eigenvectors are like (`dissect`), how far Kronecker factors are from G
    in the Frobenius norm, and for class labels and up to 3,000 rows N (C − 1) what the top eigenvalues are made of,
    how many of them are outliers, and how many of these class means and logit means explain (`layers`, and
    `gram_spectrum` for all layers together). Of every pair of networks of a variant: the overlap of their
    eigenspaces (`compare`).

    Args:
        variants: name → independently trained networks, one or more each, layers of the same name being compared.
        seed: of random vectors.
        progress: called with (networks and pairs of them done, how many in all, the next one).

    Raises:
        OptionError: no variants, or one without networks.
        ShapeError: networks of one variant that differ in their parameters.
        LossError, CurvatureError, MemoryBudgetError: as for `kronecker`.

    Cost: that of `dissect`, `kronecker` and `layers` for each network, and of `compare` for each pair.

    Source: Wu et al. 2020, arXiv 2010.04261, sections 3–5 and appendices, for batch norm, random labels and
    networks at initialisation.
    """
    began = time.perf_counter()
    if not variants or not all(len(networks) for networks in variants.values()):
        raise OptionError("study needs variants, each with at least one network.")
    asked = [
        (f"{variant}, {'two networks' if len(some) > 1 else 'one network'}", variant, some)
        for variant, networks in variants.items()
        for some in [*((one,) for one in networks), *itertools.combinations(networks, 2)]
    ]
    found: dict[str, list[Sample]] = {variant: [] for variant in variants}
    for _, variant, some in announced(asked, progress, len(asked)):
        found[variant].append(_of_pair(*some, seed) if len(some) == 2 else _of_network(some[0], seed))
    tables = _tables(found)
    widest = max(len(networks) for networks in variants.values())
    losses, accuracies = (torch.full((len(found), widest), torch.nan, dtype=torch.float64) for _ in range(2))
    for v, networks in enumerate(variants.values()):
        for n, problem in enumerate(networks):
            losses[v, n], accuracies[v, n] = problem.loss(), problem.accuracy()
    how = origin(began, next(iter(variants.values()))[0], seed=seed)
    return Study(tables, tuple(found), MEASURES, losses, accuracies, **how)


def _tables(found: Mapping[str, Sequence[Sample]]) -> dict[str, Tensor]:
    """Layer → (variants, measures, samples), all layers together last."""
    layers = dict.fromkeys(layer for samples in found.values() for one in samples for layer in one)
    shape = (len(found), len(MEASURES), max(len(samples) for samples in found.values()))
    tables = {
        layer: torch.full(shape, torch.nan, dtype=torch.float64)
        for layer in sorted(layers, key=lambda name: name == WHOLE)
    }
    for v, samples in enumerate(found.values()):
        for s, sample in enumerate(samples):
            for layer, measured in sample.items():
                for key, value in measured.items():
                    tables[layer][v, list(MEASURES).index(key), s] = value
    return tables


def _of_network(problem: Problem, seed: int) -> Sample:
    """Layer → measures of one network."""
    inner = max(1, problem.num_classes - 1)
    is_classifier = isinstance(problem.loss_function, CrossEntropy)
    blocks = Blocks(problem, ("kfac", "ekfac", "cfac") if is_classifier else ("kfac", "ekfac"))
    found = {name: _of_block(blocks, exact, inner, seed) for name, exact in blocks}
    if is_classifier and problem.num_examples * inner <= MOST_ROWS:
        for name, entry in layers(problem, hessian=False).items():
            if name not in found:
                continue
            found[name] |= _part_shares(entry.gradients, inner) | _outliers(entry.gradients)
            if entry.centred is not None and entry.khatri_rao is not None:
                shares = _part_shares(entry.centred, inner)
                found[name] |= {f"centred_{key}": value for key, value in shares.items()}
                found[name]["logit_product"] = float(entry.khatri_rao.logit_cosine.nanmean())
        whole = gram_spectrum(problem, effects="two-way", dtype=problem.dtype)
        found[WHOLE] = _part_shares(whole, inner) | _outliers(whole)
    return found


def _of_block(blocks: Blocks, exact: ExactBlock, inner: int, seed: int) -> dict[str, float]:
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


def _part_shares(spectrum: GramSpectrum, num: int) -> dict[str, float]:
    """Of class means and of logit means in the sum of the largest eigenvalues."""
    return {f"{part}_share": spectrum.share_of_top(part, num) for part in ("class", "logit")}


def _outliers(spectrum: GramSpectrum) -> dict[str, float]:
    """How many there are, and how many knock-outs leave."""
    return {key: float(spectrum.num_outliers(*removed)) for key, removed in LEFT.items()}


def _of_pair(one: Problem, other: Problem, seed: int) -> Sample:
    """Layer → overlaps of the eigenspaces of two networks."""
    found = {}
    for layer in compare(one, other, num_whole=0, seed=seed).values():
        at = min(layer.outputs, len(layer.ks)) - 1
        found[layer.name] = {"shared": float(layer.measured[at]), "shared_peak": layer.peak[1]}
    return found

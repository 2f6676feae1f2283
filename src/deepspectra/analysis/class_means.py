"""Class means and cross-class means, and the principal subspace they give without eigenanalysis."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deepspectra.algorithms.krylov import check_count, seeded
from deepspectra.analysis.sampled_subspace import overlap_bound, residual_norm, sampled_eigenspace
from deepspectra.errors import CurvatureError, MemoryBudgetError, MissingNameError, OptionError
from deepspectra.operators.parts import KINDS, Decomposition, decompose
from deepspectra.problem.problem import Problem
from deepspectra.results import Provenance
from deepspectra.rows.captures import layer_of
from deepspectra.rows.gradients import class_sums, labelled_loss
from deepspectra.rows.held import HeldRows
from deepspectra.rows.layers import (
    error_averages,
    layer_errors,
    layer_inputs,
    membership,
    refuse_missing,
    refuse_unequal,
)
from deepspectra.rows.projections import grouped, num_groups, positive

ROWS_PER_CHUNK = 2**14  # of parameter-sized factors, whose products are summed in float64


@dataclass(frozen=True)
class ClassMeans:
    """Weighted means of gradients or errors over classes and over (class, potential class) cells, or of features.

    Attributes:
        class_means: (C, P) g_c = Σ_{k≠c} w_{c,k} g_{c,k} / w_c, or the plain mean h_c of features; zero for an
            absent class, and where the weights w are too small for the dtype. All layers one after the other.
        cross_class_means: (C, C, P) g_{c,k}; None when level="class", and of features.
        class_weights: (C,) w_c; of features the shares N_c/N.
        cross_class_weights: (C, C) w_{c,k}, the diagonal belongs to the true class; None of features.
        of: "gradients", "features" or "errors".
        layers: layer → where it lies in the last dimension, as slices.
        seconds: wall-clock time spent.
        provenance: where it came from.
    """

    class_means: Tensor
    cross_class_means: Tensor | None
    class_weights: Tensor
    cross_class_weights: Tensor | None
    of: str
    layers: Mapping[str, tuple[slice, ...]]
    seconds: float
    provenance: Provenance

    def layer(self, name: str) -> ClassMeans:
        """The means of one layer."""
        if name not in self.layers:
            raise MissingNameError("layer", name, self.layers)
        cut, crossed = self.layers[name], self.cross_class_means
        means = torch.cat([self.class_means[:, piece] for piece in cut], -1)
        return replace(
            self,
            class_means=means,
            cross_class_means=None
            if crossed is None
            else torch.cat([crossed[..., piece] for piece in cut], -1),
            layers={name: (slice(0, means.shape[1]),)},
        )

    @property
    def mean(self) -> Tensor:
        """(P,) the weighted mean of the class means: of features their global mean h̄."""
        weights = (self.class_weights / self.class_weights.sum()).to(self.class_means)
        return weights @ self.class_means

    def __str__(self) -> str:
        norms = self.class_means.norm(dim=1).tolist()
        rows = [f"{'class':>6} {'weight w_c':>12} {'norm':>12}"]
        weights = self.class_weights.tolist()
        rows += [f"{c:>6} {w:>12.4g} {n:>12.4g}" for c, (w, n) in enumerate(zip(weights, norms, strict=True))]
        rows.append(
            f"class means of {self.of}, {len(norms)} classes, {self.class_means.shape[1]:,} numbers in "
            f"{len(self.layers)} layers"
        )
        return "\n".join(rows)


@dataclass(frozen=True)
class Subspace:
    """A principal subspace with its eigenvalues, by averaging alone.

    Attributes:
        values: (K,) descending, float64: eigenvalues of the part of G that the means make, a lower bound of
            G's own, pair by pair; or of the Hessian of the sample.
        vectors: (P, K) orthonormal eigenvectors.
        level: "class", "cross_class" or "sampled".
        seconds: wall-clock time spent.
        provenance: where it came from.
        certificate: how far the span is from an eigenspace of H; for "sampled".
    """

    values: Tensor
    vectors: Tensor
    level: str
    seconds: float
    provenance: Provenance
    certificate: Certificate | None = None

    def __str__(self) -> str:
        values = ", ".join(f"{value:.4g}" for value in self.values[:12].tolist())
        how = "from a sample" if self.certificate else "by averaging"
        text = f"{self.level} subspace of dimension {len(self.values)}, {how}: {values}"
        return f"{text}\n{self.certificate}" if self.certificate else text


@dataclass(frozen=True)
class Certificate:
    """What the full data says of a sampled subspace U: ‖(I − UUᵀ) H U‖_F, estimated by random combinations.

    Attributes:
        num_samples: examples drawn.
        num_checks: products with the full Hessian that were spent.
        residual_norm: the estimate; NaN without checks.
        standard_error: its own, by Student from the scatter of the checks; NaN with fewer than two. Two of them cover
            less than 95 % where one direction makes the residual: see docs/coverage.md.
        gap: between the last eigenvalue of U and the next, as the sample sees it.
        overlap_at_least: 1 − (residual/gap)² / K, from Davis and Kahan's sin Θ theorem, with two standard errors
            added to the residual; 0 if that is larger than the gap, NaN with fewer than two checks. A statistical
            statement: residual and gap are estimates.
    """

    num_samples: int
    num_checks: int
    residual_norm: float
    standard_error: float
    gap: float
    overlap_at_least: float

    def __str__(self) -> str:
        return (
            f"from {self.num_samples:,} examples; residual ‖(I − UUᵀ)HU‖ = {self.residual_norm:.3g} ± "
            f"{self.standard_error:.1g} by {self.num_checks} products, gap {self.gap:.3g}: overlap with the top "
            f"eigenspace at least {self.overlap_at_least:.3f} (statistical)"
        )


def class_means(
    problem: Problem,
    of: str = "gradients",
    *,
    level: str = "cross_class",
    groups: Tensor | Sequence[int] | None = None,
) -> ClassMeans:
    """Means over the examples of each class, and of each (class, potential class), of gradients, errors or features.

    g_{c,k} averages over the examples i of class c the gradient they would have were they of class k, with
    weights w_{i,k} = p_{i,k}/N; g_c averages g_{c,k} over k ≠ c. Over all k the mean is exactly zero. Errors
    e_{i,k} are averaged in the same way; features have no potential class, and h_c is their plain mean.

    Args:
        problem: one with cross-entropy and class labels.
        of: "gradients"; "features" that enter each layer with a matrix or a kernel; "errors" at the output of
            each layer with a matrix, a kernel or a table.
        level: "cross_class" for both kinds, "class" for the C class means alone.
        groups: (C,) the group of each class, as in `decompose`; C is then the number of groups.

    Raises:
        OptionError: another `of` or `level`, or groups that are not one number a class.
        LossError: the loss is not the cross-entropy of class labels.
        MemoryBudgetError: the means do not fit the problem's memory; C² P numbers are needed, or C P.
        CurvatureError: features and errors cannot be told apart by example.

    Cost: of gradients, class means one gradient; cross-class means C−1 backward passes on one forward pass. Of
    errors the latter without weight gradients; of features a forward pass. No eigenanalysis.

    Source: Papyan, JMLR 21:252 (2020), sections 4–6; the exclusion of k = c is forced by Σ_k p_k g_k = 0.
    """
    _check_level(level)
    began = time.perf_counter()
    if of == "gradients":
        return _gradient_means(problem, level, groups, began)
    if of not in KINDS:
        raise OptionError(f"of={of!r}; it is one of {', '.join(map(repr, KINDS))}.")
    parts = decompose(problem, hold=True, groups=groups)
    return _feature_means(parts, began) if of == "features" else _error_means(parts, level, began)


def _gradient_means(
    problem: Problem, level: str, groups: Tensor | Sequence[int] | None, began: float
) -> ClassMeans:
    labelled_loss(problem)
    found = grouped(groups, problem.num_classes, problem.device)
    size = num_groups(found, problem.num_classes)
    _refuse_beyond_memory(problem, size * size if level == "cross_class" else size)
    crossed = None
    if level == "cross_class":
        parts = decompose(problem, groups=found)
        cells = parts.projections.cell_weights
        factor = parts.factor("means").view(-1, size, size)  # √w_ck g_ck
        crossed = _divided(factor, cells.sqrt()).permute(1, 2, 0)
        sums = factor.diagonal(dim1=1, dim2=2) * cells.diagonal().sqrt().to(factor)
    else:
        sums, cells = class_sums(problem, found)
    classes = cells.clone().fill_diagonal_(0).sum(1)
    means = -_divided(sums, classes).T  # w_c g_c = −w_cc g_cc
    return ClassMeans(
        class_means=means,
        cross_class_means=crossed,
        class_weights=classes,
        cross_class_weights=cells,
        of="gradients",
        layers=_parameter_places(problem),
        seconds=time.perf_counter() - began,
        provenance=Provenance.of_rows("gradients", means),
    )


def _feature_means(parts: Decomposition, began: float) -> ClassMeans:
    """Σ_{i∈c} h_i / N_c, batch by batch."""
    rows = parts.rows
    assert isinstance(rows, HeldRows)
    member = membership(rows, parts.projections.groups)
    sizes = member.sum(0)
    sums: dict[str, Tensor] = {}
    shares, start = member / positive(sizes), 0
    for batch in rows.captures.features():
        share = shares[start : start + batch.num_rows]
        _add(sums, layer_inputs(batch.uses), share, rows.problem.memory)
        start += len(share)
    means, layers = _joined(sums)
    return ClassMeans(
        class_means=means,
        cross_class_means=None,
        class_weights=sizes / sizes.sum(),
        cross_class_weights=None,
        of="features",
        layers=layers,
        seconds=time.perf_counter() - began,
        provenance=Provenance.of_rows("features", means),
    )


def _error_means(parts: Decomposition, level: str, began: float) -> ClassMeans:
    """√w_{c,k} e_{c,k} = Bᵀ X, batch by batch, and what follows from them."""
    rows, projections = parts.rows, parts.projections
    assert isinstance(rows, HeldRows)
    size = projections.num_classes
    sums: dict[str, Tensor] = {}
    basis = error_averages(rows, projections, ())["means"]  # (R, C²)
    start = 0
    for batch in rows.captures.batches():
        share = basis[start : start + batch.num_rows * (rows.weights.shape[1] - 1)]
        _add(sums, layer_errors(batch.uses), share, rows.problem.memory)
        start += len(share)
    scaled, layers = _joined(sums)
    scaled = scaled.view(size, size, -1)
    cells, classes = projections.cell_weights, projections.class_weights
    off = cells.sqrt().fill_diagonal_(0).to(scaled)
    crossed = _divided(scaled.permute(2, 0, 1), cells.sqrt()).permute(1, 2, 0)
    return ClassMeans(
        class_means=_divided(torch.einsum("ck,ckd->dc", off, scaled), classes).T,
        cross_class_means=crossed if level == "cross_class" else None,
        class_weights=classes,
        cross_class_weights=cells,
        of="errors",
        layers=layers,
        seconds=time.perf_counter() - began,
        provenance=Provenance.of_rows("errors", scaled),
    )


def _divided(sums: Tensor, weights: Tensor) -> Tensor:
    """Sums (..., *weights.shape) by their weights; zero where these are, in the dtype of the sums."""
    given = weights.to(sums)
    return sums / positive(given) * (given > 0)


def _add(sums: dict[str, Tensor], found: dict[str, Tensor], share: Tensor, memory: int) -> None:
    """Add a batch's rows (n, D) of each layer, mixed by shares (n, m)."""
    if not sums:
        size = share.shape[1] * sum(rows.shape[1] * rows.element_size() for rows in found.values())
        if size > memory:
            raise MemoryBudgetError(
                f"{share.shape[1]:,} means of all layers take {size / 2**30:.1f} GiB; memory is "
                f"{memory / 2**30:.1f} GiB. Raise memory, or restrict the parameters."
            )
    refuse_missing(sums, found)
    for name, rows in found.items():
        if name in sums:
            refuse_unequal(name, {sums[name].shape[1], rows.shape[1]})
        sums[name] = sums.get(name, 0) + share.T.to(rows) @ rows


def _joined(sums: dict[str, Tensor]) -> tuple[Tensor, dict[str, tuple[slice, ...]]]:
    """All layers one after the other, and where each of them is."""
    sums = {name: total for name, total in sums.items() if total.shape[1]}
    if not sums:
        raise CurvatureError(
            "no layer multiplies features by a matrix, one row of features for each output row."
        )
    ends = list(itertools.accumulate((total.shape[1] for total in sums.values()), initial=0))
    places: dict[str, tuple[slice, ...]] = {}
    for name, (start, end) in zip(sums, itertools.pairwise(ends), strict=True):
        places[name] = (slice(start, end),)
    return torch.cat(list(sums.values()), 1), places


def _parameter_places(problem: Problem) -> dict[str, tuple[slice, ...]]:
    """Layer → where its parameters are in a vector (P,)."""
    places: dict[str, tuple[slice, ...]] = {}
    start = 0
    for name, value in problem.parameters.items():
        layer = layer_of(name)
        places[layer] = (*places.get(layer, ()), slice(start, start + value.numel()))
        start += value.numel()
    return places


def principal_subspace(
    problem: Problem,
    *,
    level: str = "class",
    num: int | None = None,
    num_samples: int | None = None,
    num_checks: int = 3,
    groups: Tensor | Sequence[int] | None = None,
    seed: int = 0,
) -> Subspace:
    """The top eigenspace of G and of the Hessian, by averaging gradients or from few examples.

    "class" spans the C class means, with the eigenvalues of G_class + G_true (collinear with them);
    "cross_class" spans all C² means, with the eigenvalues of G − G_within. Both parts are below G in the
    positive semi-definite order, so their eigenvalues are lower bounds.

    "sampled" is the top eigenspace of the Hessian of examples drawn by importance and weighted to be unbiased,
    with a certificate from a few products on all the data.

    Args:
        problem: one with cross-entropy and class labels.
        level: "class", "cross_class" or "sampled".
        num: how many directions; by default all that the means span, or C − 1 if sampled.
        num_samples: examples to draw; by default one in 15, but at least 500.
        num_checks: products with the full Hessian for the certificate; 0 for none.
        groups: (C,) the group of each class, as in `decompose`; not for "sampled".
        seed: of the draw and of the random vectors.

    Raises:
        OptionError: unknown level, an option out of range, or data that cannot be drawn from.
        LossError: the loss is not the cross-entropy of class labels.
        MemoryBudgetError: the means, or the basis, do not fit the problem's memory.

    Cost: one gradient ("class"), or C−1 backward passes on one forward pass ("cross_class"), and a QR
    factorisation of (P, C) or (P, C²), without a product with the matrix. "sampled": one forward pass, about
    2 K + 8 products on the drawn examples, and `num_checks` on all.

    Source: Papyan 2019, arXiv 1901.08244, section 5 (averaging in place of the power method). Departure: the
    weighted form, with the true-class part added by Σ_k p_k g_k = 0.
    """
    if level == "sampled":
        if groups is not None:
            raise OptionError("groups= belongs to averages; a sample has none.")
        return _sampled(problem, num, num_samples, num_checks=num_checks, seed=seed)
    _check_level(level)
    began = time.perf_counter()
    labelled_loss(problem)
    found = grouped(groups, problem.num_classes, problem.device)
    size = num_groups(found, problem.num_classes)
    _refuse_beyond_memory(problem, size * size if level == "cross_class" else size)
    if level == "class":
        values, vectors = _principal(_class_factor(*class_sums(problem, found)), num, level)
    else:
        values, vectors = subspace_of(decompose(problem, groups=found), level, num)
    provenance = Provenance.of_rows("means of gradients", vectors.T)
    return Subspace(values[: vectors.shape[1]], vectors, level, time.perf_counter() - began, provenance)


def _sampled(
    problem: Problem, num: int | None, num_samples: int | None, *, num_checks: int, seed: int
) -> Subspace:
    began = time.perf_counter()
    num = max(1, problem.num_classes - 1) if num is None else num
    check_count("num", num, largest=problem.num_parameters)
    check_count("num_checks", num_checks, smallest=0)
    if num_samples is not None:
        check_count("num_samples", num_samples, largest=problem.num_examples)
    found = sampled_eigenspace(problem, num, num_samples, seed)
    norm = error = float("nan")
    if num_checks:
        generator = seeded(seed + 1)
        norm, error = residual_norm(problem, found.vectors, num_checks, generator)
    gap = float(found.values[-1]) - found.following
    bound = overlap_bound(norm + 2 * error, gap, num)
    return Subspace(
        values=found.values,
        vectors=found.vectors,
        level="sampled",
        seconds=time.perf_counter() - began,
        provenance=Provenance.of_rows("Hessian of a sample", found.vectors.T, seed),
        certificate=Certificate(found.num_samples, num_checks, norm, error, gap, bound),
    )


def subspace_of(parts: Decomposition, level: str, num: int | None = None) -> tuple[Tensor, Tensor]:
    """All eigenvalues (K,) of the part of G that the means of a level make, and its first eigenvectors (P, num).

    From the Gram matrix of the means; eigenvalues at the level of rounding are left out.
    """
    if level == "class":
        cells = parts.projections.cell_weights
        true = parts.factor("true")
        return _principal(_class_factor(true * cells.diagonal().sqrt().to(true), cells), num, level)
    return _principal(parts.factor("means"), num, level)


def _class_factor(sums: Tensor, cells: Tensor) -> Tensor:
    """F (P, C) with F Fᵀ = G_class + G_true, from Σ_{i∈c} w_{i,c} g_{i,c} and w_{c,k}: the two are collinear."""
    own, classes = cells.diagonal(), cells.clone().fill_diagonal_(0).sum(1)
    scale = ((1 / positive(own) + 1 / positive(classes) * (classes > 0)) * (own > 0)).sqrt()
    return sums * scale.to(sums)


def _principal(factor: Tensor, num: int | None, level: str) -> tuple[Tensor, Tensor]:
    gram = _gram(factor)
    values, mixed = torch.linalg.eigh(gram)
    values, mixed = values.flip(0), mixed.flip(1)
    rank = int((values > values[0] * torch.finfo(factor.dtype).eps * len(values) ** 0.5).sum())
    if num is not None and not 1 <= num <= len(values):
        raise OptionError(f"num={num}: the {level} means span at most {len(values)} directions.")
    values, kept = values[:rank], min(rank, num or rank)
    return values, factor @ (mixed[:, :kept] / values[:kept].sqrt()).to(factor)


def _gram(factor: Tensor) -> Tensor:
    """FᵀF, summed in float64 over stretches of rows."""
    size = factor.shape[1]
    gram = torch.zeros(size, size, dtype=torch.float64, device=factor.device)
    for rows in torch.split(factor, ROWS_PER_CHUNK):
        gram += (rows.T @ rows).double()
    return gram


def _check_level(level: str) -> None:
    if level not in ("class", "cross_class"):
        raise OptionError(f"level={level!r}; it is 'class', 'cross_class' or, for a subspace, 'sampled'.")


def _refuse_beyond_memory(problem: Problem, columns: int) -> None:
    itemsize = torch.promote_types(problem.dtype, torch.float32).itemsize
    size = columns * problem.num_parameters * itemsize
    if size > problem.memory:
        raise MemoryBudgetError(
            f"{columns:,} means of {problem.num_parameters:,} parameters take {size / 2**30:.1f} GiB; memory is "
            f"{problem.memory / 2**30:.1f} GiB. Ask for level='class', put classes into groups, raise memory, or "
            "restrict the parameters."
        )

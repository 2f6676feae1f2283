"""Class means and cross-class means, and the principal subspace they give without eigenanalysis."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from deepspectra.errors import MemoryBudgetError, OptionError
from deepspectra.operators.parts import Decomposition, decompose
from deepspectra.operators.projections import positive
from deepspectra.problem import Problem
from deepspectra.results import Provenance


@dataclass(frozen=True)
class ClassMeans:
    """Weighted means of the gradients g_{i,k} over classes and over (class, potential class) cells.

    Attributes:
        class_means: (C, P) g_c = Σ_{k≠c} w_{c,k} g_{c,k} / w_c; zero for an absent class.
        cross_class_means: (C, C, P) g_{c,k}, or None when level="class".
        class_weights: (C,) w_c.
        cross_class_weights: (C, C) w_{c,k}; the diagonal belongs to the true class.
        seconds: wall-clock time spent.
        provenance: where it came from.
    """

    class_means: Tensor
    cross_class_means: Tensor | None
    class_weights: Tensor
    cross_class_weights: Tensor
    seconds: float
    provenance: Provenance

    def __str__(self) -> str:
        norms = self.class_means.norm(dim=1).tolist()
        rows = [f"{'class':>6} {'weight w_c':>12} {'‖g_c‖':>12}"]
        weights = self.class_weights.tolist()
        rows += [f"{c:>6} {w:>12.4g} {n:>12.4g}" for c, (w, n) in enumerate(zip(weights, norms, strict=True))]
        rows.append(f"class means of {len(norms)} classes, {self.class_means.shape[1]:,} parameters")
        return "\n".join(rows)


@dataclass(frozen=True)
class Subspace:
    """A principal subspace with its eigenvalues, by averaging alone.

    Attributes:
        values: (K,) descending eigenvalues of the part of G that the means make, float64; a lower bound of
            G's own, pair by pair.
        vectors: (P, K) its orthonormal eigenvectors.
        level: "class" or "cross_class".
        seconds: wall-clock time spent.
        provenance: where it came from.
    """

    values: Tensor
    vectors: Tensor
    level: str
    seconds: float
    provenance: Provenance

    def __str__(self) -> str:
        values = ", ".join(f"{value:.4g}" for value in self.values[:12].tolist())
        return f"{self.level} subspace of dimension {len(self.values)}, by averaging: {values}"


def class_means(problem: Problem, of: str = "gradients", *, level: str = "cross_class") -> ClassMeans:
    """Means of the gradients over the examples of each class, and of each (class, potential class).

    g_{c,k} averages over the examples i of class c the gradient they would have were they of class k, with
    weights w_{i,k} = p_{i,k}/N; g_c averages g_{c,k} over k ≠ c. Over all k the mean is exactly zero.

    Args:
        problem: one with cross-entropy and class labels.
        of: "gradients".
        level: "cross_class" for both kinds, "class" for the C class means alone.

    Raises:
        OptionError: another `of` or `level`.
        LossError: the loss is not the cross-entropy of class labels.
        MemoryBudgetError: the means do not fit the problem's memory; C² P numbers are needed, or C P.

    Cost: class means one gradient; cross-class means C−1 backward passes on one forward pass. No eigenanalysis.

    Source: Papyan, JMLR 21:252 (2020), section 6; the exclusion of k = c is forced by Σ_k p_k g_k = 0.
    """
    if of != "gradients":
        raise OptionError(f"of={of!r}; class means are there of 'gradients'.")
    _check_level(level)
    began = time.perf_counter()
    parts = decompose(problem)
    projections = parts.projections
    size = projections.num_classes
    cells = projections.cell_weights
    _refuse_beyond_memory(parts, size * size if level == "cross_class" else size)
    crossed = None
    own = cells.diagonal()
    if level == "cross_class":
        factor = parts.factor("means").view(-1, size, size)
        crossed = (factor / positive(cells).sqrt().to(factor)).permute(1, 2, 0)
        true = factor.diagonal(dim1=1, dim2=2).T
    else:
        true = parts.factor("true").T
    # w_c g_c = −w_cc g_cc, and `true` holds √w_cc g_cc
    scale = own.sqrt() / positive(projections.class_weights) * (projections.class_weights > 0)
    means = -true * scale.to(true)[:, None]
    return ClassMeans(
        class_means=means,
        cross_class_means=crossed,
        class_weights=projections.class_weights,
        cross_class_weights=cells,
        seconds=time.perf_counter() - began,
        provenance=Provenance.of(parts["class"]),
    )


def principal_subspace(problem: Problem, *, level: str = "class", num: int | None = None) -> Subspace:
    """The top eigenspace of G and of the Hessian, approximated by averaging gradients alone.

    "class" spans the C class means, with the eigenvalues of G_class + G_true (collinear with them);
    "cross_class" spans all C² means, with the eigenvalues of G − G_within. Both parts are below G in the
    positive semi-definite order, so their eigenvalues are lower bounds.

    Args:
        problem: one with cross-entropy and class labels.
        level: "class" or "cross_class".
        num: how many directions; by default all that the means span.

    Raises:
        OptionError: unknown level, or `num` out of range.
        LossError: the loss is not the cross-entropy of class labels.
        MemoryBudgetError: the means do not fit the problem's memory.

    Cost: one gradient ("class"), or C−1 backward passes on one forward pass ("cross_class"), and a QR
    factorisation of (P, C) or (P, C²). No product with the matrix.

    Source: Papyan 2019, arXiv 1901.08244, section 5 (averaging in place of the power method). Departure: the
    weighted form, with the true-class part added by Σ_k p_k g_k = 0.
    """
    _check_level(level)
    began = time.perf_counter()
    parts = decompose(problem)
    size = parts.projections.num_classes
    _refuse_beyond_memory(parts, size * size if level == "cross_class" else size)
    values, vectors = subspace_of(parts, level, num)
    return Subspace(values, vectors, level, time.perf_counter() - began, Provenance.of(parts["class"]))


def subspace_of(parts: Decomposition, level: str, num: int | None = None) -> tuple[Tensor, Tensor]:
    """Eigenvalues (K,) and orthonormal eigenvectors (P, K) of the part of G that the means of a level make."""
    if level == "class":
        own, classes = parts.projections.cell_weights.diagonal(), parts.projections.class_weights
        grown = (1 + own / positive(classes) * (classes > 0)).sqrt()
        factor = parts.factor("true")
        factor = factor * grown.to(factor)
    else:
        factor = parts.factor("means")
    basis, triangle = torch.linalg.qr(factor)
    left, singular, _ = torch.linalg.svd(triangle.double())
    rank = int((singular > singular[0] * torch.finfo(factor.dtype).eps * len(singular)).sum())
    if num is not None and not 1 <= num <= len(singular):
        raise OptionError(f"num={num}: the {level} means span at most {len(singular)} directions.")
    kept = min(rank, num or rank)
    return singular[:kept].square(), basis @ left[:, :kept].to(basis)


def _check_level(level: str) -> None:
    if level not in ("class", "cross_class"):
        raise OptionError(f"level={level!r}; it is 'class' or 'cross_class'.")


def _refuse_beyond_memory(parts: Decomposition, columns: int) -> None:
    problem, size = parts.problem, parts.num_bytes(columns)
    if size > problem.memory:
        raise MemoryBudgetError(
            f"{columns:,} means of {problem.num_parameters:,} parameters take {size / 2**30:.1f} GiB; memory is "
            f"{problem.memory / 2**30:.1f} GiB. Ask for level='class', raise memory, or restrict the parameters."
        )

"""The principal subspace without eigenanalysis: by averaging gradients, or from few examples with a certificate."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from deepspectra.algorithms.eigenpairs import unchallenged
from deepspectra.analysis.class_means import LEVELS, check_means
from deepspectra.argument_checks import check_choice, check_count, seeded
from deepspectra.confidence import standard_error
from deepspectra.errors import OptionError
from deepspectra.operators.curvature import Hessian
from deepspectra.operators.parts import Decomposition
from deepspectra.problem.problem import Problem
from deepspectra.results import Result, origin
from deepspectra.rows.example_sampling import importance
from deepspectra.rows.gradients import GradientRows, class_sums
from deepspectra.rows.projections import Groups, collinear

ROWS_PER_CHUNK = 2**14  # of parameter-sized factors, whose products are summed in float64
SHARE = 15  # of the examples one in so many is drawn,
FEWEST = 500  # but not fewer than have so many rows


@dataclass(frozen=True, repr=False)
class Subspace(Result):
    """A principal subspace with its eigenvalues, by averaging alone.

    Attributes:
        values: (K,) descending, float64: eigenvalues of the part of G that the means make, a lower bound of
            G's own, pair by pair; or of the Hessian of the sample.
        vectors: (P, K) orthonormal eigenvectors.
        level: "class", "cross_class" or "sampled".
        certificate: how far the span is from an eigenspace of H; for "sampled".
    """

    values: Tensor
    vectors: Tensor
    level: str
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


def principal_subspace(
    problem: Problem,
    *,
    level: str = "class",
    num: int | None = None,
    num_samples: int | None = None,
    num_checks: int = 3,
    groups: Groups | None = None,
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
        num_samples: examples to draw; by default one in 15, but so many that they have 500 rows.
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
    began = time.perf_counter()
    check_choice("level", level, (*LEVELS, "sampled"))
    found = check_means(problem, level, groups)
    if level == "class":
        sums, cells = class_sums(problem, found)
        values, vectors = _principal(_class_and_true(sums, cells), num, level)
    else:
        values, vectors = subspace_of(Decomposition(GradientRows(problem), groups=found), level, num)
    return Subspace(
        values=values[: vectors.shape[1]],
        vectors=vectors,
        level=level,
        **origin(began, vectors.T, "means of gradients"),
    )


def _sampled(problem: Problem, num: int | None, num_samples: int | None, *, num_checks: int, seed: int) -> Subspace:
    began = time.perf_counter()
    num = max(1, problem.num_classes - 1) if num is None else num
    check_count("num", num, largest=problem.num_parameters)
    check_count("num_checks", num_checks, smallest=0)
    if num_samples is not None:
        check_count("num_samples", num_samples, largest=problem.num_examples)
    generator = seeded(seed)
    if num_samples is None:
        num_all = len(importance(problem))
        num_samples = max(math.ceil(FEWEST * num_all / problem.num_examples), math.ceil(num_all / SHARE))
    few = Hessian(problem).sampled(generator, num_samples)
    krylov = unchallenged(few, num, generator)
    values, coefficients, residual_norms = krylov.ritz()
    values, vectors = values.flip(0), krylov.combine(coefficients.flip(1)[:, :num])
    beyond = float((values + residual_norms.flip(0))[num]) if len(values) > num else 0.0
    norm = error = float("nan")
    if num_checks:
        norm, error = residual_norm(problem, vectors, num_checks, seeded(seed + 1))
    gap = max(0.0, float(values[num - 1]) - beyond)  # the next value may lie above its Ritz value
    bound = overlap_bound(norm + 2 * error, gap, num)
    return Subspace(
        values=values[:num],
        vectors=vectors,
        level="sampled",
        **origin(began, vectors.T, "Hessian of a sample", seed=seed),
        certificate=Certificate(few.problem.num_examples, num_checks, norm, error, gap, bound),
    )


def subspace_of(parts: Decomposition, level: str, num: int | None = None) -> tuple[Tensor, Tensor]:
    """All eigenvalues (K,) of the part of G that the means of a level make, and its first eigenvectors (P, num).

    From the Gram matrix of the means; eigenvalues at the level of rounding are left out.
    """
    if level == "class":
        cells = parts.projections.cell_weights
        true = parts.factor("true")
        return _principal(_class_and_true(true * cells.diagonal().sqrt().to(true), cells), num, level)
    return _principal(parts.factor("means"), num, level)


def _class_and_true(sums: Tensor, cells: Tensor) -> Tensor:
    """F (P, C) with F Fᵀ = G_class + G_true, from Σ_{i∈c} w_{i,c} g_{i,c} and the weights w_{c,k}."""
    return sums * torch.hypot(*collinear(cells)).to(sums)


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


def residual_norm(
    problem: Problem, vectors: Tensor, num_checks: int, generator: torch.Generator
) -> tuple[float, float]:
    """‖(I − UUᵀ) H U‖_F on all the data from random combinations of the columns of U, and its standard error.

    Cost: `num_checks` products.
    """
    mixed = torch.randn(vectors.shape[1], num_checks, generator=generator, dtype=torch.float64)
    image = Hessian(problem) @ (vectors @ mixed.to(vectors))
    image -= vectors @ (vectors.T @ image)
    squares = image.double().square().sum(0).cpu()
    norm, error = float(squares.mean().sqrt()), float(standard_error(squares))
    return norm, error / (2 * norm) if norm > 0 else error


def overlap_bound(norm: float, gap: float, num: int) -> float:
    """At least so large is ‖Uᵀ X‖² / m, with ‖(I − UUᵀ) H U‖_F and the eigenvalues of X (P, m) so far above the rest.

    From Davis and Kahan's sin Θ theorem; 0 where it says nothing, NaN where the norm is.
    """
    if math.isnan(norm):
        return norm
    return max(0.0, 1 - (norm / gap) ** 2 / num) if norm < gap else 0.0

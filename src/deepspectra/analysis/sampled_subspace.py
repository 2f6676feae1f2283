"""The principal subspace from few examples, chosen by importance, with a certificate on all of them."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from deepspectra.algorithms.eigenpairs import unchallenged
from deepspectra.arguments import seeded
from deepspectra.confidence import standard_error
from deepspectra.operators.curvature import Hessian
from deepspectra.problem.problem import Problem

SHARE = 15  # of the examples one in so many is drawn,
FEWEST = 500  # but not fewer than these


class Sampled(NamedTuple):
    """Top eigenpairs of the sampled Hessian, and the next eigenvalue."""

    values: Tensor
    vectors: Tensor
    following: float
    num_samples: int


def sampled_eigenspace(problem: Problem, num: int, num_samples: int | None, seed: int) -> Sampled:
    """The `num` largest eigenpairs of the Hessian of an importance sample, by Lanczos."""
    generator = seeded(seed)
    wanted = num_samples or max(FEWEST, math.ceil(problem.num_examples / SHARE))
    few = Hessian(problem).sampled(generator, wanted)
    krylov = unchallenged(few, num, "largest", generator)
    values, coefficients, _ = krylov.ritz()
    return Sampled(
        values.flip(0)[:num],
        krylov.combine(coefficients.flip(1)[:, :num]),
        float(values.flip(0)[num]) if len(values) > num else 0.0,
        few.problem.num_examples,
    )


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

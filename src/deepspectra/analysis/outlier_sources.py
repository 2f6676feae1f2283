"""Which classes, pairs of classes and layers make an eigenvalue, and how sure that is."""

from __future__ import annotations

import torch
from torch import Tensor

from deepspectra.operators.parts import Decomposition
from deepspectra.problem.problem import Problem
from deepspectra.results import Eigenpairs


def class_pair_shares(parts: Decomposition, vectors: Tensor, values: Tensor) -> Tensor:
    """w_ck (g_ckᵀ u)²/λ for each pair (λ, u) and each pair of a true class c and a potential class k: (K, C, C).

    g_ck is the mean of the gradients that examples of class c would give under the label k, and w_ck its weight. Over
    all pairs of classes they sum to what class, logit, interaction and true have of λ; within and R have the rest.

    Args:
        parts: of `decompose(problem)`.
        vectors: (P, K) eigenvectors of H or G.
        values: (K,) their eigenvalues.

    Cost: a forward product a vector, a few vectors at a time.
    """
    size = parts.projections.num_classes
    cells = parts.rows.coordinates(parts.projections, vectors).double().square()
    return (cells / values.to(cells)).T.reshape(-1, size, size).cpu()


def layer_shares(problem: Problem, vectors: Tensor) -> Tensor:
    """Σ u_p² over the parameters p of each of `problem.layers`, for each vector u of length one: (K, layers)."""
    squares = torch.zeros(vectors.shape[1], len(problem.layers), dtype=torch.float64)
    start = 0
    for name, value in problem.parameters.items():
        mine = vectors[start : start + value.numel()].double().square().sum(0).cpu()
        squares[:, problem.layers.index(name.rpartition(".")[0])] += mine
        start += value.numel()
    return squares


def share_errors(shares: Tensor, pairs: Eigenpairs, norm: float) -> Tensor:
    """How far shares uᵀBu/λ of computed pairs may be from those of the exact ones: (K, ...), NaN where not known.

    For 0 ≤ B ≤ G, with t a bound of the sine between u and the eigenvector and b = ‖G‖/λ, Cauchy and Schwarz give
    |Δ| ≤ 2t √(s b) + t² b, and the error of λ adds s Δλ/λ. It holds wherever `Eigenpairs.angle_bounds` do, and for
    the residual's share with s that of G.

    Args:
        shares: (K, ...) of the first K pairs.
        pairs: K pairs or more.
        norm: a bound of ‖G‖.
    """
    sines, values, errors = (
        one.cpu().double()[: len(shares)] for one in (pairs.angle_bounds, pairs.values.abs(), pairs.error_bounds)
    )
    shape = (-1, *[1] * (shares.ndim - 1))
    t = torch.where(sines < 1, sines, torch.nan).reshape(shape)
    b, moved = (norm / values).reshape(shape), (errors / values).reshape(shape)
    s = shares.double().clamp_min(0)
    return 2 * t * (s * b).sqrt() + t * t * b + s * moved

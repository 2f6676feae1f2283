"""The nearest sum of Kronecker products to a block of G, without the block."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from deepspectra.errors import ConvergenceWarning
from deepspectra.kfac.blocks import across_errors, across_features
from deepspectra.kfac.exact_block import ExactBlock

RTOL = 1e-7  # of the norm of the sum, from one iteration to the next
MOST_ITERATIONS = 100


def nearest_sum(exact: ExactBlock, start: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """S (rank, groups, o, o) and A (rank, groups, d, d), float64, symmetric, with ‖G − Σ S_r ⊗ A_r‖_F least.

    Rearranged, the block is a matrix (o², d²) that takes A to Σ g A gᵀ over gradients g, and its transpose takes
    S to Σ gᵀ S g; the leading singular vectors are found by subspace iteration from `start` (groups, d, d).

    Source: Van Loan and Pitsianis 1993, Approximation with Kronecker products.

    Cost: of an iteration, about two second moments of errors and of features for each of the products.
    """
    groups, outputs, inputs = exact.place.shape
    rank = min(rank, outputs * (outputs + 1) // 2, inputs * (inputs + 1) // 2)
    generator = torch.Generator().manual_seed(0)
    # the first product starts at KFAC's A, already near; the others anywhere, of its size so that none is lost to
    # rounding
    drawn = torch.randn(rank - 1, groups, inputs, inputs, generator=generator, dtype=torch.float64)
    right = torch.cat([start[None], (drawn + drawn.mT).to(start) * start.abs().mean()])
    previous = 0.0
    for _ in range(MOST_ITERATIONS):
        right = _orthonormal(right)
        left = _swept(exact, right, to_left=True)
        norm = float(left.norm())
        if abs(norm - previous) <= RTOL * norm:
            return left, right
        previous = norm
        right = _swept(exact, _orthonormal(left), to_left=False)
    warnings.warn(
        f"{exact.name}: the nearest sum of {rank} Kronecker products has not settled to {RTOL:g} in "
        f"{MOST_ITERATIONS} iterations; two singular values are nearly equal.",
        ConvergenceWarning,
        stacklevel=4,
    )
    right = _orthonormal(right)
    return _swept(exact, right, to_left=True), right


def _orthonormal(matrices: Tensor) -> Tensor:
    """Of each group, in the Frobenius inner product."""
    rank, groups, size, _ = matrices.shape
    columns: Tensor = torch.linalg.qr(matrices.reshape(rank, groups, -1).permute(1, 2, 0)).Q
    basis = columns.permute(2, 0, 1).reshape(rank, groups, size, size)
    # signs are free; with positive traces the first product, of positive matrices, comes out positive
    trace = basis.diagonal(dim1=2, dim2=3).sum(2)
    return basis.where(trace[:, :, None, None] >= 0, -basis)


def _swept(exact: ExactBlock, matrices: Tensor, *, to_left: bool) -> Tensor:
    """Σ g A gᵀ or Σ gᵀ S g for each of several matrices (rank, groups, ...)."""
    _, outputs, inputs = exact.place.shape
    size = outputs if to_left else inputs
    total = matrices.new_zeros(*matrices.shape[:2], size, size)
    for found in exact.positions(exact.num_positions**2 * exact.batches[0][0].errors.shape[1]):
        features, errors = exact.factors(found)
        for index, matrix in enumerate(matrices.to(features)):
            if to_left:
                similar = across_features(features, matrix) @ features.mT  # (b, groups, T, T)
                total[index] += _weighted(errors, similar[:, :, None])
            else:
                similar = (errors.mT @ across_errors(matrix, errors)).sum(2)
                total[index] += _weighted(features.mT[:, :, None], similar[:, :, None])
    return total


def _weighted(columns: Tensor, similar: Tensor) -> Tensor:
    """Σ X Q Xᵀ of columns X (b, groups, j, k, T) and Q (b, groups, 1, T, T): (groups, k, k)."""
    single = columns.shape[4] == 1
    mixed = columns * similar if single else columns @ similar
    left, right = (x.permute(1, 3, 0, 2, 4).flatten(2) for x in (mixed, columns))  # (groups, k, b·j·T)
    return (left @ right.mT).double()

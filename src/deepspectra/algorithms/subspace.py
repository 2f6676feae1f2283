"""How much two subspaces share."""

from __future__ import annotations

import torch
from torch import Tensor

from deepspectra.errors import DataError, ShapeError


def overlap(U: Tensor, V: Tensor) -> float:
    """The overlap ‖QᵤᵀQᵥ‖²_F / k of two spans: 0 if orthogonal, 1 if one contains the other.

    Qᵤ and Qᵥ are orthonormal bases of the spans, found here in float64, and k is the smaller of their
    dimensions. It is the mean squared cosine of the principal angles. Two random subspaces of R^P of
    dimensions k ≤ l overlap by l/P.

    Args:
        U: columns (P, j), not necessarily orthonormal or independent, or one vector (P,).
        V: columns (P, l), or one vector (P,).

    Raises:
        ShapeError: not (P,) or (P, k) with one P.
        DataError: all columns are zero, or some entry is not finite.

    Source: Gur-Ari, Roberts and Dyer, arXiv 1812.04754, with k the smaller dimension where the two differ.
    """
    q_u, q_v = _basis(U, "U"), _basis(V, "V").to(U.device)
    if len(q_u) != len(q_v):
        raise ShapeError(f"U and V must have as many rows; got {len(q_u)} and {len(q_v)}.")
    smaller = min(q_u.shape[1], q_v.shape[1])
    return min(float((q_u.T @ q_v).square().sum()) / smaller, 1.0)


def _basis(columns: Tensor, name: str) -> Tensor:
    """Orthonormal basis (P, rank), float64."""
    if not isinstance(columns, Tensor) or columns.ndim not in (1, 2) or columns.numel() == 0:
        given = tuple(columns.shape) if isinstance(columns, Tensor) else type(columns).__name__
        raise ShapeError(f"{name} must be a tensor (P,) or (P, k) with k ≥ 1; got {given}.")
    block = columns.detach().double().reshape(len(columns), -1)
    if not bool(torch.isfinite(block).all()):
        raise DataError(f"{name} has NaN or infinite entries.")
    lengths = torch.linalg.vector_norm(block, dim=0)
    q, r = torch.linalg.qr(block / lengths.where(lengths > 0, torch.ones_like(lengths)))
    u, sizes, _ = torch.linalg.svd(r, full_matrices=False)
    eps = torch.finfo(columns.dtype if columns.is_floating_point() else torch.float64).eps
    kept = sizes > max(block.shape) ** 0.5 * eps * sizes[0]
    if not bool(kept.any()):
        raise DataError(f"{name} is zero and spans nothing.")
    basis: Tensor = q @ u[:, kept]
    return basis

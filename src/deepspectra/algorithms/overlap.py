"""How much two subspaces share."""

from __future__ import annotations

import torch
from torch import Tensor

from deepspectra.algorithms.long_vectors import inner_products, singular
from deepspectra.argument_checks import check_columns
from deepspectra.errors import DataError, ShapeError

COARSE = 2**-5  # length, relative, up to which what columns add to others may be the rounding of a short type


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
        DataError: all columns are zero, or some entry is not finite, complex or sparse.

    Source: Gur-Ari, Roberts and Dyer, arXiv 1812.04754, with k the smaller dimension where the two differ.
    """
    u, v = check_columns("U", U), check_columns("V", V).to(U.device)
    if len(u) != len(v):
        raise ShapeError(f"U and V must have as many rows; got {len(u)} and {len(v)}.")
    if u.dtype == v.dtype == torch.float32:  # inner products in float64 tell as much as their rounding leaves
        to_u, to_v = _orthonormalising(u, "U"), _orthonormalising(v, "V")
        cosines = to_u.T @ inner_products(u.T, v.T) @ to_v
    else:
        cosines = _basis(u, "U").T @ _basis(v, "V")
    return min(float(cosines.square().sum()) / min(cosines.shape), 1.0)


def _kept(sizes: Tensor, shape: tuple[int, ...], dtype: torch.dtype, name: str) -> Tensor:
    """Which singular values of columns of length 1, descending, are more than rounding."""
    eps = torch.finfo(dtype if dtype.is_floating_point else torch.float64).eps
    kept: Tensor = sizes > min(max(shape) ** 0.5 * eps, COARSE) * sizes[0]
    if not bool(kept.any()):
        raise DataError(f"{name} is zero and spans nothing.")
    return kept


def _orthonormalising(columns: Tensor, name: str) -> Tensor:
    """(k, rank) coefficients that make columns (P, k) orthonormal, float64."""
    gram = inner_products(columns.T, columns.T)
    lengths = gram.diagonal().sqrt()
    scale = 1 / lengths.where(lengths > 0, 1)
    sizes, u = singular(scale[:, None] * gram * scale)
    kept = _kept(sizes, columns.shape, columns.dtype, name)
    coefficients: Tensor = scale[:, None] * u[:, kept] / sizes[kept]
    return coefficients


def _basis(columns: Tensor, name: str) -> Tensor:
    """Orthonormal basis (P, rank), float64."""
    block = columns.double()
    lengths = torch.linalg.vector_norm(block, dim=0)
    q, r = torch.linalg.qr(block / lengths.where(lengths > 0, torch.ones_like(lengths)))
    u, sizes, _ = torch.linalg.svd(r, full_matrices=False)
    basis: Tensor = q @ u[:, _kept(sizes, columns.shape, columns.dtype, name)]
    return basis


def overlap_curve(U: Tensor, V: Tensor) -> Tensor:
    """‖UᵀV‖²_F / k of the first k orthonormal columns of each, for every k they both have: (K,) float64."""
    num = min(U.shape[1], V.shape[1])
    squares = (U[:, :num].double().T @ V[:, :num].double()).square()
    sums: Tensor = squares.cumsum(0).cumsum(1).diagonal().cpu()
    return sums / torch.arange(1, num + 1)

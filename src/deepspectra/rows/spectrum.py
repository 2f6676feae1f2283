"""A symmetric matrix without some of its parts, and which ranks are more than rounding."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

RANK_RTOL = 1e-6  # of the largest: a smaller singular value or eigenvalue is rounding


def without(
    matrix: Tensor,
    moment: Tensor,
    coordinates: Mapping[str, Tensor],
    gone: Collection[str],
    method: str = "subtraction",
) -> Tensor:
    """All eigenvalues, descending, of a matrix A without parts.

    Args:
        matrix: A (R, R), in any orthonormal coordinates.
        moment: (R, R), the sum of the parts there; A itself if it has no other.
        coordinates: part → Φ (R, r), the part being Φ Φᵀ; "means" is all of them together.
        gone: names of `coordinates`; "within", what the means leave of the moment; "residual", what A has beyond it.
            What goes with what is for `taken` to say.
        method: "subtraction", A − B, or "projection", (I − QQᵀ) A (I − QQᵀ) with Q a basis of B.
    """
    phi = _together(coordinates, gone)
    if method == "projection":
        q = range_of(phi)
        half = matrix - q @ (q.T @ matrix)
        left = half - (half @ q) @ q.T
    else:
        left = moment if "residual" in gone else matrix
        if "within" in gone:
            means = coordinates["means"]
            left = left - moment + means @ means.T
        left = left - phi @ phi.T
    found: Tensor = torch.linalg.eigvalsh(left).flip(0)
    return found


def _together(coordinates: Mapping[str, Tensor], gone: Collection[str]) -> Tensor:
    """Φ (R, ·) of all that is gone."""
    averages = [name for name in coordinates if name != "means"]
    if set(averages) <= set(gone):
        return coordinates["means"]
    means = coordinates["means"]
    return torch.cat([means[:, :0], *(coordinates[name] for name in averages if name in gone)], 1)


def range_of(columns: Tensor) -> Tensor:
    """Orthonormal columns that span the given ones, up to rounding."""
    inner, singular, _ = torch.linalg.svd(columns, full_matrices=False)
    basis: Tensor = inner[:, significant(singular)]
    return basis


def significant(values: Tensor) -> Tensor:
    """Which of some singular values, or eigenvalues, are more than rounding of the largest; none of none."""
    return values > RANK_RTOL * values.max() if len(values) else values > 0

"""What `trace`, `diagonal` and `frobenius_norm` share: a low-rank sketch that leaves out each vector in turn.

Half of the products take n random columns Ω to A Ω = Q R, the other half take the orthonormal Q to
A Q = Q H + Z with Z orthogonal to Q. The image of all ω_j but ω_i spans the range of

    P_i = Q (I − s_i s_iᵀ) Qᵀ,

which does not depend on ω_i. So A is a part that Q and A Q give exactly, and a remainder
B_i = (I − P_i) A (I − P_i) of which ω_i is a fresh, unbiased sample at no further product:

    B_i ω_i = g_i Q s_i − Z x_i   with   P_i ω_i = Q x_i   and   g_i = s_iᵀ (R e_i − H x_i).

The mean over i is unbiased. Source: Epperly, Tropp and Webber, SIAM J. Matrix Anal. Appl. 45 (2024), whose
XTrace and XDiag project from one side; for a symmetric A the projection from both leaves less to sample.
"""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from deepspectra.algorithms.counted import Products
from deepspectra.algorithms.lanczos import basis_capacity
from deepspectra.errors import FallbackWarning

CORRELATION = 2  # the estimates share all vectors but one: n of them scatter the mean like n/2 at the worst
ESSENTIAL = 1 - 1e-3  # leverage of a column that the others do not span


class Sketch(NamedTuple):
    """Letters as in the module's description; small matrices are float64, on the CPU."""

    omega: Tensor  # (P, n)
    Q: Tensor  # (P, r)
    Z: Tensor  # (P, r)
    H: Tensor  # (r, r)
    R: Tensor  # (r, n)
    W: Tensor  # (r, n), Qᵀ Ω
    S: Tensor  # (r, n), unit columns s_i, or 0 where the others span A ω_i too

    @property
    def X(self) -> Tensor:  # noqa: N802
        """(r, n), the coordinates x_i of P_i ω_i."""
        return self.W - self.S * (self.S * self.W).sum(0)

    @property
    def g(self) -> Tensor:
        """(n,), what A ω_i − A P_i ω_i has along Q s_i."""
        return (self.S * (self.R - self.H @ self.X)).sum(0)

    @property
    def sphere(self) -> Tensor:
        """(n,) (P − rank P_i) / ‖(I − P_i) ω_i‖²: brings a Gaussian ω_i to its mean squared length there."""
        squares = self.omega.square().sum(0, dtype=torch.float64).cpu() - self.X.square().sum(0)
        rank = len(self.H) - self.S.square().sum(0)
        return (len(self.omega) - rank) / squares


def sketch(run: Products, omega: Tensor) -> Sketch:
    """The sketch from random columns (P, n), by 2 n products and 3 n vectors of length P."""
    Q, R_ = torch.linalg.qr(run(omega))
    R, eps = _small(R_), torch.finfo(Q.dtype).eps
    U, sizes, Vh = torch.linalg.svd(R)
    kept = sizes > R.shape[1] * eps * sizes[0]
    if not bool(kept.all()):  # the columns reach all of A's range, or depend on each other
        Q, R = Q @ U[:, kept].to(Q), U[:, kept].T @ R
        U = torch.eye(len(R), dtype=torch.float64)
    Vh = Vh[kept]
    essential = Vh.square().sum(0) > ESSENTIAL
    S = U / sizes[kept] @ Vh * essential  # s_i ⟂ R e_j for j ≠ i
    S /= S.norm(dim=0).clamp_min(torch.finfo(torch.float64).tiny)
    Z = run(Q)
    H = Q.T @ Z
    Z -= Q @ H
    return Sketch(omega, Q, Z, _small(H), R, _small(Q.T @ omega), S)


def method_for(run: Products, num_products: int, name: str) -> str:
    """What the products and the memory allow: "exact", "leave-one-out" or "Hutchinson"."""
    half = num_products // 2
    if num_products >= run.size:
        return "exact"
    if half >= 2 and 3 * half <= basis_capacity(run.operator):
        return "leave-one-out"
    if half >= 2:
        warnings.warn(
            f"{name}: {3 * half} vectors do not fit A.memory = {run.operator.memory:,} bytes; independent "
            "random vectors are used, which is less accurate. Lower num_products or raise A.memory.",
            FallbackWarning,
            stacklevel=3,
        )
    return "Hutchinson"


def standard_error(deviations: Tensor, method: str) -> Tensor:
    """Of the mean of estimates over the last dimension; 0 when exact, NaN from a single one."""
    count = deviations.shape[-1]
    if method == "exact":
        return torch.zeros(deviations.shape[:-1], dtype=torch.float64)
    if count < 2:
        return torch.full(deviations.shape[:-1], math.nan, dtype=torch.float64)
    return deviations.std(-1) * math.sqrt((CORRELATION if method == "leave-one-out" else 1) / count)


def _small(matrix: Tensor) -> Tensor:
    return matrix.to(dtype=torch.float64, device="cpu")

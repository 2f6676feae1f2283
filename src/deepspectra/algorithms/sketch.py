"""What `trace`, `diagonal` and `frobenius_norm` share: a low-rank sketch that leaves out each vector in turn.

Half of the products take n random columns Ω to A Ω = Q R, the other half take the orthonormal Q to
A Q = Q H + Z with Z orthogonal to Q. The image of all ω_j but ω_i spans the range of

    P_i = Q (I − s_i s_iᵀ) Qᵀ,

which does not depend on ω_i. So A is a part that Q and A Q give exactly, and a remainder
B_i = (I − P_i) A (I − P_i) of which ω_i is a fresh, unbiased sample at no further product:

    B_i ω_i = g_i Q s_i − Z x_i   with   P_i ω_i = Q x_i   and   g_i = s_iᵀ (R e_i − H x_i).

The mean over i is unbiased. With q_i = Q s_i, and C what A has outside of Q, the squared norm of the remainder is

    ‖B_i‖² = h_i² + 2‖Z s_i‖² + ‖C‖²   with   h_i = s_iᵀ H s_i,

of which only ‖C‖² must be estimated, by ‖B_i ω_i‖². That gives the variance of each estimate, from two of them on;
their scatter would give it with the few degrees of freedom that they are, and hardly where one eigenvalue makes most
of the remainder. Source: Epperly, Tropp and Webber, SIAM J. Matrix Anal. Appl. 45 (2024), whose
XTrace and XDiag project from one side; for a symmetric A the projection from both leaves less to sample.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from deepspectra.algorithms.krylov import basis_capacity
from deepspectra.algorithms.probes import Products
from deepspectra.errors import FallbackWarning

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
    def h(self) -> Tensor:
        """(n,), what A has along q_i itself."""
        return (self.S * (self.H @ self.S)).sum(0)

    @property
    def dimensions(self) -> Tensor:
        """(n,) P − rank P_i, of the space that B_i acts on."""
        return len(self.omega) - len(self.H) + self.S.square().sum(0)

    @property
    def sphere(self) -> Tensor:
        """(n,) (P − rank P_i) / ‖(I − P_i) ω_i‖²: brings a Gaussian ω_i to its mean squared length there."""
        squares = self.omega.square().sum(0, dtype=torch.float64).cpu() - self.X.square().sum(0)
        return self.dimensions / squares

    def squares(self, gram: Tensor) -> Tensor:
        """(n,) ‖B_i ω_i‖² for ω_i on the sphere, with the Gram matrix (r, r) of Z."""
        return self.sphere * (self.g.square() + (self.X * (gram @ self.X)).sum(0))

    def remainders(self, gram: Tensor) -> tuple[Tensor, Tensor]:
        """(n,) ‖B_i q_i‖² and ‖B_i‖²."""
        beside = (self.S * (gram @ self.S)).sum(0)
        along = self.h.square() + beside
        rest = (self.squares(gram) - along - beside).mean().clamp_min(0)
        return along, along + beside + rest


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


def form_variances(squares: Tensor, traces: Tensor, dimensions: Tensor) -> Tensor:
    """Of ωᵀBω for ω on the sphere of radius √d in d dimensions, from ‖B‖² and tr B."""
    spread = (squares - traces.square() / dimensions).clamp_min(0)
    return 2 * dimensions / (dimensions + 2) * spread


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


def _small(matrix: Tensor) -> Tensor:
    return matrix.to(dtype=torch.float64, device="cpu")

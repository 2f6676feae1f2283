"""Trace, diagonal and Frobenius norm: three read-outs of one low-rank sketch that leaves out each vector in turn.

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

import math
import time
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepspectra.algorithms.long_vectors import inner_products, small, vectors_that_fit
from deepspectra.algorithms.probes import Probes, stream
from deepspectra.argument_checks import Progress, check_count
from deepspectra.confidence import standard_error, student_scale
from deepspectra.errors import FallbackWarning
from deepspectra.operators.base import Operator, as_operator
from deepspectra.results import Diagonal, Estimate, origin

ESSENTIAL = 1 - 1e-3  # leverage of a column that the others do not span
ROWS_PER_CHUNK = 2**14  # of the (P, n) estimates of a diagonal, in float64


def trace(A: Operator | Tensor, num_products: int = 64, seed: int = 0, progress: Progress | None = None) -> Estimate:
    """The trace of a symmetric operator, with a standard error.

    XTrace: with n = num_products // 2 Gaussian vectors Ω and the orthonormal basis Q of A Ω, each ω_i is left
    out in turn: tr(Q_iᵀ A Q_i) is exact and ω_i estimates the rest, outside Q_i. The mean of the n estimates
    is unbiased. A fast decaying spectrum leaves little to estimate; an operator of rank below n is done
    exactly.

    Args:
        A: an operator, or a symmetric matrix (P, P).
        num_products: products to spend, at most. From P on the result is exact, by P products.
        seed: of the random vectors.
        progress: called with (products so far, products expected).

    Returns:
        Estimate. The variance of each ω_iᵀ B_i ω_i is that of a Gaussian form, of whose ‖B_i‖² the sketch knows most.
        The n estimates share all vectors but one, so that their mean varies more than that of independent ones:
        three times as much is allowed for, about the most that was seen. Two standard errors covered the trace in 94
        to 100 % of 200 runs at 4 to 64 products on each of nine spectra (docs/coverage.md). Independent vectors (1 to
        3 products, or little memory) have Student's quantile in theirs.

    Raises:
        OptionError, ShapeError, DataError: an argument out of range or of a wrong shape.
        NonFiniteError: a product is NaN or infinite.

    Cost: num_products products; 3 num_products/2 vectors of length P. If these do not fit `A.memory`, independent
    vectors in blocks of 16 (plain Hutchinson), with a FallbackWarning.

    Source: Epperly, Tropp and Webber, SIAM J. Matrix Anal. Appl. 45 (2024), XTrace with their normalisation
    of Gaussian vectors; Hutchinson, Commun. Stat. 19 (1990).
    """
    value, error, how = _estimate(TRACE, A, num_products, seed, progress)
    return Estimate("trace", float(value), float(error), **how)


def frobenius_norm(
    A: Operator | Tensor, num_products: int = 64, seed: int = 0, progress: Progress | None = None
) -> Estimate:
    """‖A‖_F = (Σ_i λ_i²)^½ of a symmetric operator, with a standard error.

    Each of n = num_products // 2 Gaussian vectors is left out in turn: what the others' images span gives
    ‖A‖² − ‖B_i‖² exactly, and ‖B_i ω_i‖² estimates the remainder without bias. A fast decaying spectrum leaves
    little to estimate; an operator of rank below n is done exactly.

    Returns:
        Estimate, in the units of A. The estimate of ‖A‖² is unbiased; its root is given. The standard error is made
        as that of `trace`, with four times the variance for what the estimates share: two of them covered the norm in
        97 to 100 % of 200 runs at 4 to 64 products on each of nine spectra (docs/coverage.md); where all eigenvalues
        are ±λ, in 78 % at 4 products.

    Arguments, errors, cost and source: as `trace`.
    """
    value, error, how = _estimate(NORM, A, num_products, seed, progress)
    return Estimate("Frobenius norm", float(value), float(error), **how)


def diagonal(
    A: Operator | Tensor, num_products: int = 64, seed: int = 0, progress: Progress | None = None
) -> Diagonal:
    """The diagonal of a symmetric operator, with a standard error per entry.

    Each of n = num_products // 2 vectors of signs ±1 is left out in turn of a sketch of A. The diagonal of what the
    sketch holds is exact, and ω_i ∘ B_i ω_i estimates that of the remainder B_i. The mean of the n estimates is
    unbiased. An operator of rank below n is done exactly. The variance of an entry is the squared length of its row
    of B_i without the diagonal, over n: a spectrum that decays leaves little of it, one that is nearly flat more than
    A itself has.

    Returns:
        Diagonal. The standard errors are the scatter of the n estimates, with Student's quantile for their number
        and twice the variance for what they share. Two of them covered 97 to 100 % of the entries over 200 runs at 4
        to 64 products on each of nine spectra (docs/coverage.md). A row of few entries makes few different samples,
        which may be equal by chance; its own standard error then says little.

    Arguments, errors and cost: as `trace`; independent vectors make the mean of ω ∘ A ω.

    Source: Bekas, Kokiopoulou and Saad, Appl. Numer. Math. 57 (2007), for signs; XDiag of Epperly, Tropp and
    Webber, SIAM J. Matrix Anal. Appl. 45 (2024). Departure: the projection from both sides, with A Q at hand
    already, which takes a quarter to a half off the error of a decaying spectrum. Diag++ (Baston and
    Nakatsukasa, arXiv 2201.10684) spends its vectors either on the sketch or on samples.
    """
    value, error, how = _estimate(DIAGONAL, A, num_products, seed, progress)
    return Diagonal(value, error, **how)


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


def sketch(run: Probes, omega: Tensor) -> Sketch:
    """The sketch from random columns (P, n), by 2 n products and 3 n vectors of length P."""
    Q, R_ = torch.linalg.qr(run(omega))
    R, eps = small(R_), torch.finfo(Q.dtype).eps
    U, sizes, Vh = torch.linalg.svd(R)
    real = sizes > R.shape[1] * eps * sizes[0]
    if not bool(real.all()):  # the columns reach all of A's range, or depend on each other
        Q, R = Q @ U[:, real].to(Q), U[:, real].T @ R
        U = torch.eye(len(R), dtype=torch.float64)
    Vh = Vh[real]
    # A column's squared length in Vh is its leverage; below 1 the others span its image, and nothing is left out.
    essential = Vh.square().sum(0) > ESSENTIAL
    S = U / sizes[real] @ Vh * essential  # s_i ⟂ R e_j for j ≠ i
    S /= S.norm(dim=0).clamp_min(torch.finfo(torch.float64).tiny)
    Z = run(Q)
    H = Q.T @ Z
    Z -= Q @ H
    return Sketch(omega, Q, Z, small(H), R, small(Q.T @ omega), S)


class Found(NamedTuple):
    """A number or a vector, its standard error if estimates were independent, and what that is known by."""

    value: Tensor
    error: Tensor
    freedom: float = math.inf


class ReadOut(NamedTuple):
    """What one quantity takes of A, by each of the methods."""

    name: str
    draw: Callable[[Probes, int, torch.Generator], Tensor]
    exact: Callable[[Probes], Tensor]
    samples: Callable[[Tensor, Tensor], Tensor]  # (..., k) by random columns (P, k) and their products
    left_out: Callable[[Sketch], Found]
    shared: int  # times the variance of independent estimates' mean, at the worst, has that of left-out ones'
    finish: Callable[[Found], Found] = lambda found: found  # from what is estimated to the quantity


def _estimate(
    of: ReadOut, A: Operator | Tensor, num_products: int, seed: int, progress: Progress | None
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """The value, its standard error, and what a result says of how they were found."""
    began = time.perf_counter()
    operator = as_operator(A)
    check_count("num_products", num_products)
    run = Probes(operator, min(num_products, operator.shape[0]), progress)
    method, generator = _method(run, num_products, of.name), stream(seed, of.name)
    if method == "exact":
        value = of.exact(run)
        found = Found(value, torch.zeros_like(value))
    elif method == "leave-one-out":
        value, error, freedom = of.left_out(sketch(run, of.draw(run, num_products // 2, generator)))
        found = of.finish(Found(value, math.sqrt(of.shared) * error, freedom))
    else:
        found = of.finish(_mean(of.samples(*block) for block in run.samples(of.draw, generator)))
    value, error = (run.operator.back(part.to(run.like) if part.ndim else part) for part in found[:2])
    how = {"method": method, "num_products": run.spent, "degrees_of_freedom": found.freedom}
    return value, error, {**how, **origin(began, operator, seed=seed)}


def _method(run: Probes, num_products: int, name: str) -> str:
    """What the products and the memory allow: "exact", "leave-one-out" or "Hutchinson"."""
    half = num_products // 2
    if num_products >= run.size:
        return "exact"
    if half >= 2 and 3 * half <= vectors_that_fit(run.operator):
        return "leave-one-out"
    if half >= 2:
        warnings.warn(
            f"{name}: {3 * half} vectors do not fit A.memory = {run.operator.memory:,} bytes; independent "
            "random vectors are used, which is less accurate. Lower num_products or raise A.memory.",
            FallbackWarning,
            stacklevel=4,
        )
    return "Hutchinson"


def _mean(blocks: Iterable[Tensor]) -> Found:
    """The mean over the last dimension of blocks (..., k) of independent samples, one block in memory at a time."""
    count, mean, squares = 0, torch.zeros(1), torch.zeros(1)
    for block in blocks:
        samples, size = block.double(), block.shape[-1]
        own = samples.mean(-1)
        scatter = (samples - own[..., None]).square().sum(-1)
        if count:
            # Chan, Golub and LeVeque: sums of squares about two means, taken about the mean of both.
            scatter += squares + (own - mean).square() * (count * size / (count + size))
            own = mean + (own - mean) * (size / (count + size))
        count, mean, squares = count + size, own, scatter
    error = student_scale(count) * (squares / (count * max(count - 1, 1))).sqrt()
    return Found(mean, error, count - 1)


def _form_variances(squares: Tensor, traces: Tensor, dimensions: Tensor) -> Tensor:
    """Of ωᵀBω for ω on the sphere of radius √d in d dimensions, from ‖B‖² and tr B."""
    spread = (squares - traces.square() / dimensions).clamp_min(0)
    return 2 * dimensions / (dimensions + 2) * spread


def _trace_exactly(run: Probes) -> Tensor:
    return torch.stack([columns[rows].double().trace() for rows, columns in run.identity()]).sum()


def _forms(omega: Tensor, image: Tensor) -> Tensor:
    """P ωᵀAω/‖ω‖² (k,)."""
    forms = (omega * image).sum(0, dtype=torch.float64) / omega.square().sum(0, dtype=torch.float64)
    return len(omega) * forms.cpu()


def _trace_left_out(parts: Sketch) -> Found:
    """The mean of tr(P_i A) + ω_iᵀ B_i ω_i over i."""
    H, W, S, X = parts.H, parts.W, parts.S, parts.X
    outside = parts.sphere * (parts.g * (S * W).sum(0) - (X * (parts.R - H @ W)).sum(0))
    _, squares = parts.remainders(inner_products(parts.Z.T, parts.Z.T))
    traces = parts.h + (outside - parts.h).mean()  # of B_i: that of C is the same for all i
    variance = _form_variances(squares, traces, parts.dimensions).mean()
    return Found(H.trace() + (outside - parts.h).mean(), (variance / len(outside)).sqrt())


def _norm_exactly(run: Probes) -> Tensor:
    return torch.tensor(math.hypot(*(_length(columns) for _, columns in run.identity())), dtype=torch.float64)


def _length(columns: Tensor) -> float:
    """‖·‖_F, also where squares overflow: the first of these blocks sets the scale, and may be a small one."""
    largest = float(columns.abs().max())
    return largest * float((columns.double() / largest).norm()) if largest else 0.0


def _square_ratios(omega: Tensor, image: Tensor) -> Tensor:
    """P ‖Aω‖²/‖ω‖² (k,)."""
    image_norms, norms = (torch.linalg.vector_norm(columns, dim=0, dtype=torch.float64) for columns in (image, omega))
    ratios: Tensor = len(omega) * (image_norms / norms).square().cpu()
    return ratios


def _square_left_out(parts: Sketch) -> Found:
    """The mean of ‖A‖² − ‖B_i‖² + ‖B_i ω_i‖² over i.

    The variance of ‖B_i ω_i‖² takes tr B_i⁴. The vector along q_i is (I − P_i) A ω_i = B_i ω_i + Y_i ω_i with
    Y_i = (I − P_i) A P_i, and B_i makes of it tr B_i⁴ + ‖B_i Y_i‖² on average: as ‖B_i q_i‖² is known, and so are
    ‖B_i‖² and ‖Y_i‖², that is what is taken. Without Y_i an A of eigenvalues about ±λ would seem to leave none.
    """
    gram = inner_products(parts.Z.T, parts.Z.T)
    samples, (along, squares) = parts.squares(gram), parts.remainders(gram)
    beside = (parts.S * (gram @ parts.S)).sum(0)
    across = gram.trace() - beside + (parts.H @ parts.S).square().sum(0) - parts.h.square()  # ‖Y_i‖²
    value = parts.H.square().sum() + 2 * gram.trace() + (samples - along - beside).mean()
    variance = _form_variances(along * (squares + across), squares, parts.dimensions).mean()
    return Found(value.clamp_min(0), (variance / len(samples)).sqrt())


def _root(found: Found) -> Found:
    """From a square; to first order the error is that over twice the root."""
    norm = found.value.sqrt()
    return Found(norm, found.error / (2 * norm) if norm else found.error, found.freedom)


def _diagonal_exactly(run: Probes) -> Tensor:
    return torch.cat([columns[rows].diagonal() for rows, columns in run.identity()])


def _diagonal_left_out(parts: Sketch) -> Found:
    """The mean of diag(A − B_i) + ω_i ∘ B_i ω_i over i, a stretch of rows at a time; the error is the scatter's."""
    H, S, X, g, h = (small.to(parts.Q.device) for small in (parts.H, parts.S, parts.X, parts.g, parts.h))
    values, errors = torch.empty_like(parts.omega[:, 0]), torch.empty_like(parts.omega[:, 0])
    for rows in torch.split(torch.arange(len(values)), ROWS_PER_CHUNK):
        omega, Q, Z = (columns[rows[0] : rows[-1] + 1].double() for columns in (parts.omega, parts.Q, parts.Z))
        known = (Q * (Q @ H + 2 * Z)).sum(1)
        QS = Q @ S
        estimates = omega * (g * QS - Z @ X) - QS * (h * QS + 2 * Z @ S)
        values[rows] = (known + estimates.mean(1)).to(values)
        errors[rows] = standard_error(estimates, -1).to(errors)
    return Found(values, errors, parts.omega.shape[1] - 1)


TRACE = ReadOut("trace", Probes.gaussian, _trace_exactly, _forms, _trace_left_out, shared=3)
NORM = ReadOut(
    "Frobenius norm", Probes.gaussian, _norm_exactly, _square_ratios, _square_left_out, shared=4, finish=_root
)
DIAGONAL = ReadOut("diagonal", Probes.signs, _diagonal_exactly, torch.mul, _diagonal_left_out, shared=2)

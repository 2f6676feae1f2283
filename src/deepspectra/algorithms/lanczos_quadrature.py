"""Gauss quadrature of a spectrum by Lanczos' recurrence alone: three vectors a probe, whatever the steps.

Without reorthogonalisation the recurrence finds converged eigenvalues again and again. It is then the exact
recurrence of a larger matrix, whose eigenvalues lie within rounding of those of A, with the same mass at each
(Greenbaum, Linear Algebra Appl. 113, 1989). So the quadrature stays right: the copies of an eigenvalue share its
weight. Only their number means nothing, and they are merged:

1. Nodes closer than 100 ε‖A‖ become one, at their mean.
2. A copy on its way may stand alone in a gap, with a weight of ε² or so, by which Cullum and Willoughby (1985)
   know it: a node of less than 1e-5/P, a hundred-thousandth of an eigenvalue's mean weight, joins its neighbour.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepspectra.algorithms.krylov_basis import ROUNDING
from deepspectra.algorithms.long_vectors import vectors_that_fit
from deepspectra.algorithms.probes import BLOCK, Probes
from deepspectra.errors import MemoryBudgetError

VECTORS = 3  # of length P a probe: the last two and the product
NEGLIGIBLE = 1e-5  # weight of a node, in units of an eigenvalue's 1/P
ROWS_PER_CHUNK = 2**16  # of columns whose inner products are taken


def quadratures(
    run: Probes, known: Tensor, num_probes: int, num_steps: int, generator: torch.Generator
) -> list[tuple[Tensor, Tensor]]:
    """Nodes (m,) and weights (m,) of each Gaussian probe, on the complement of orthonormal rows (k, P)."""
    room = vectors_that_fit(run.operator)
    if room < VECTORS:
        raise MemoryBudgetError(
            f"a probe needs room for {VECTORS} vectors of length {run.size:,}, even without a basis; "
            f"A.memory = {run.operator.memory:,} bytes holds {room}. Raise A.memory."
        )
    known, eps = known.to(run.like), torch.finfo(run.like.dtype).eps
    found: list[tuple[Tensor, Tensor]] = []
    while len(found) < num_probes and len(known) < run.size:
        count = min(room // VECTORS, BLOCK, num_probes - len(found))
        for alpha, beta in _tridiagonals(run, known, count, num_steps, generator):
            nodes, vectors = torch.linalg.eigh(_tridiagonal(alpha, beta))
            found.append(_merged(nodes, vectors[0].square(), run.size, eps))
    return found


def _tridiagonals(
    run: Probes, known: Tensor, num_probes: int, num_steps: int, generator: torch.Generator
) -> list[tuple[list[float], list[float]]]:
    """α and β of Lanczos' recurrence from each of the probes, in lockstep."""
    found: list[tuple[list[float], list[float]]] = [([], []) for _ in range(num_probes)]
    running, eps = list(range(num_probes)), torch.finfo(run.like.dtype).eps
    current = run.gaussian(num_probes, generator)  # (P, g)
    _leave(known, current)
    current /= _dots(current, current).sqrt().to(current)
    previous = torch.zeros_like(current)
    beta = norm = torch.zeros(num_probes, dtype=torch.float64, device=current.device)
    for _ in range(num_steps):
        following = torch.addcmul(run(current), previous, -beta.to(current), out=previous)
        alpha = _dots(current, following)
        following.addcmul_(current, -alpha.to(current))
        _leave(known, following)
        before, beta = beta, _dots(following, following).sqrt()
        norm = torch.maximum(norm, torch.stack([before, alpha, beta]).norm(dim=0))  # ‖A q‖ as far as seen
        for probe, a, b in zip(running, alpha.tolist(), beta.tolist(), strict=True):
            found[probe][0].append(a)
            found[probe][1].append(b)
        going = beta > ROUNDING * eps * norm
        running = [probe for probe, goes in zip(running, going.tolist(), strict=True) if goes]
        if not running:
            break
        previous, current = current, following
        if not bool(going.all()):  # an invariant subspace ends a probe
            previous, current, beta, norm = previous[:, going], current[:, going], beta[going], norm[going]
        current /= beta.to(current)
    return found


def _leave(known: Tensor, columns: Tensor) -> None:
    """Project columns (P, g) off orthonormal rows (k, P), in place."""
    if len(known):
        columns.addmm_(known.T, known @ columns, alpha=-1)


def _dots(columns: Tensor, others: Tensor) -> Tensor:
    """Inner products (g,) of columns (P, g) with their like, in float64."""
    total = torch.zeros(columns.shape[1], dtype=torch.float64, device=columns.device)
    for left, right in zip(*(torch.split(block, ROWS_PER_CHUNK) for block in (columns, others)), strict=True):
        total += (left.double() * right.double()).sum(0)
    return total


def _tridiagonal(diagonal: list[float], off_diagonal: list[float]) -> Tensor:
    """The symmetric matrix (m, m); the last of the m off-diagonal entries belongs to the next step."""
    beside = torch.diag(torch.tensor(off_diagonal[:-1], dtype=torch.float64), 1)
    return torch.diag(torch.tensor(diagonal, dtype=torch.float64)) + beside + beside.T


def _merged(nodes: Tensor, weights: Tensor, size: int, eps: float) -> tuple[Tensor, Tensor]:
    """Ascending nodes with their copies merged, and the weights."""
    real = weights > NEGLIGIBLE / size
    kept = nodes[real]
    weights = _sums((nodes[:, None] - kept).abs().argmin(1), weights, len(kept))
    apart = kept.diff() > ROUNDING * eps * float(nodes.abs().max())
    cluster = torch.cat([torch.zeros(1, dtype=torch.bool), apart]).cumsum(0)
    count = int(cluster[-1]) + 1
    masses = _sums(cluster, weights, count)
    return _sums(cluster, weights * kept, count) / masses, masses


def _sums(index: Tensor, values: Tensor, count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.float64).index_add_(0, index, values)

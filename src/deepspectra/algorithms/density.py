"""Spectral density by block Lanczos quadrature, with converged pairs taken out exactly."""

from __future__ import annotations

import time
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from deepspectra.algorithms.counted import Products, Progress
from deepspectra.algorithms.lanczos import (
    Krylov,
    as_operator,
    basis_capacity,
    check_count,
    gaussian_rows,
    seeded,
)
from deepspectra.algorithms.recurrence import quadratures
from deepspectra.errors import DataError, FallbackWarning, MemoryBudgetError, OptionError, ShapeError
from deepspectra.operators.base import Operator
from deepspectra.results import Density, Eigenpairs, Provenance

LARGEST_BLOCK_BASIS = 2048  # vectors of a group of probes: its projected matrix is diagonalised on the CPU
INF = float("inf")
LOCK_RTOL = 1e-3  # relative residual at which a pair counts as an eigenvalue of its own


def density(
    A: Operator | Tensor,
    num_probes: int = 8,
    num_steps: int = 64,
    deflate: Eigenpairs | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    basis: str | None = None,
) -> Density:
    """The density (1/P) Σ_i δ(λ − λ_i) of a symmetric operator's spectrum, by stochastic Lanczos quadrature.

    Gaussian probes advance in lockstep, one block product a step, and share one fully reorthogonalised block
    Krylov basis. A probe z gets the Ritz values θ of the basis as nodes and (zᵀy)²/‖z‖² as weights: Gauss
    quadrature, exact for polynomials of degree 2·num_steps − 1, and for any spectrum once the basis is
    invariant. Pairs converged (residual ≤ 1e-3·|θ|) contiguously from either end are locked, as eigenvalues
    of weight exactly 1/P, which removes their variance. A run of equal values is locked only if it has fewer
    than there are probes in the block, since k probes see at most k copies of a multiple eigenvalue (so a
    single probe locks nothing).

    The random vectors of the run that made `deflate` are probes already: those that went num_steps far count
    among the num_probes and cost nothing.

    With `deflate`, probes and products are projected on the complement of its vectors, (I − VVᵀ)A(I − VVᵀ),
    and its values enter, sign kept, with weight 1/P each. Vectors that have not converged only blur: the
    projected operator's own density is still exact, and the values are Rayleigh quotients, off by at
    most ‖A v − λ v‖.

    With basis="none" each probe goes its own way by Lanczos' recurrence, in three vectors, and copies of
    converged eigenvalues are merged (`algorithms/recurrence.py`). Each probe's nodes and weights are then those
    of its own exact quadrature up to what the copies cost: after m steps it is as accurate as a reorthogonalised
    one of m less the number of copies. Nothing is locked, so outliers should be deflated; nodes closer than
    100 ε‖A‖ are one.

    Args:
        A: an operator, or a symmetric matrix (P, P).
        num_probes: random probes; the error band comes from their scatter.
        num_steps: products spent on each probe.
        deflate: eigenpairs of A known already.
        seed: of the probes.
        progress: called with (products so far, products expected).
        basis: "full" keeps and reorthogonalises the basis, "none" keeps three vectors a probe; None is "full"
            if one probe's basis fits `A.memory`, and otherwise "none" with a FallbackWarning.

    Returns:
        Density: nodes and weights that sum to 1.

    Raises:
        OptionError, ShapeError, DataError: an argument out of range or of a wrong shape.
        NonFiniteError: a product is NaN or infinite.
        MemoryBudgetError: with basis="full", not even one probe's basis fits `A.memory`; else, not even three
            vectors.

    Cost: num_probes·num_steps products at most, for the probes that `deflate` does not bring; a basis of at most
    `A.memory` bytes: probes are split into groups that fit, of at most 2048 vectors, and later groups run on the
    complement of the pairs locked before. With basis="none", 3 vectors a probe, in groups of 16 or what fits.

    Source: Golub and Meurant (2010) for the quadrature; Papyan, JMLR 21 (2020), appendix C, algorithm 3.
    Departures: (1) full reorthogonalisation, hence no ghosts; (2) the probes share a block basis;
    (3) locking; (4) several probes and a standard error. Gaussian and not Rademacher probes: results depend
    on the spectrum alone, not on the basis A is written in, and copies of a multiple eigenvalue are seen with
    probability one.
    """
    began = time.perf_counter()
    operator = as_operator(A)
    check_count("num_probes", num_probes)
    check_count("num_steps", num_steps)
    if basis not in (None, "full", "none"):
        raise OptionError(f"basis must be 'full', 'none' or None; got {basis!r}.")
    known = _known_rows(operator, deflate)
    groups, num_products = _free_groups(deflate, num_probes, num_steps), 0
    if len(groups) < num_probes:
        generator = seeded(seed)
        explore = _with_basis if _keeps_basis(operator, basis, num_steps, len(known)) else _without_basis
        fresh, num_products = explore(
            operator, known, num_probes - len(groups), num_steps, generator, progress
        )
        groups += fresh
    exact = torch.cat(
        [torch.zeros(0, dtype=torch.float64) if deflate is None else deflate.values.cpu().double()]
        + [group.locked for group in groups]
    )
    nodes, weights, probes = _assemble(exact, groups, operator.shape[0])
    return Density(
        nodes=nodes,
        weights=weights,
        probes=probes,
        num_probes=num_probes,
        num_steps=num_steps,
        deflation_residual=0.0 if deflate is None else deflate.worst,
        num_products=num_products,
        seconds=time.perf_counter() - began,
        provenance=Provenance.of(operator, seed),
    )


class _Group(NamedTuple):
    """What a group of probes found: locked values, and nodes (m,) with each probe's shares (g, m)."""

    locked: Tensor
    nodes: Tensor
    shares: Tensor
    inside: tuple[float, float]  # the open interval that its locking left to be resolved


def _free_groups(deflate: Eigenpairs | None, num_probes: int, num_steps: int) -> list[_Group]:
    """The random vectors of the run that found the pairs, each as a group of one, where they went far enough."""
    seen = None if deflate is None else deflate.quadrature
    if seen is None:
        return []
    far = [weights for weights, steps in zip(seen.weights, seen.num_steps, strict=True) if steps >= num_steps]
    nothing = torch.zeros(0, dtype=torch.float64)
    return [_Group(nothing, seen.nodes, weights[None], (-INF, INF)) for weights in far[:num_probes]]


def _keeps_basis(operator: Operator, basis: str | None, num_steps: int, num_known: int) -> bool:
    """Whether one probe's basis is kept: as asked, or if it fits."""
    size, fit = operator.shape[0], basis_capacity(operator)
    if basis == "none" or fit >= min(size, num_known + num_steps + 1):
        return basis != "none"
    room = (
        f"{num_steps} steps need room for {num_known + num_steps + 1} vectors of length {size:,}; "
        f"A.memory = {operator.memory:,} bytes holds {fit}."
    )
    if basis == "full":
        raise MemoryBudgetError(
            f"{room} Lower num_steps to {max(fit - num_known - 1, 0)}, raise A.memory, or use basis='none'."
        )
    warnings.warn(
        f"density: {room} The recurrence without a basis is used; it locks no eigenvalue. "
        "Deflate the outliers, raise A.memory, or pass basis='none' if that is meant.",
        FallbackWarning,
        stacklevel=3,
    )
    return False


def _without_basis(
    operator: Operator,
    known: Tensor,
    num_probes: int,
    num_steps: int,
    generator: torch.Generator,
    progress: Progress | None,
) -> tuple[list[_Group], int]:
    """What new probes find by the recurrence alone, each a group of one, and the products they take."""
    run = Products(operator, num_probes * num_steps, progress)
    nothing = torch.zeros(0, dtype=torch.float64)
    found = quadratures(run, known, num_probes, num_steps, generator)
    return [_Group(nothing, nodes, weights[None], (-INF, INF)) for nodes, weights in found], run.done


def _with_basis(
    operator: Operator,
    known: Tensor,
    num_probes: int,
    num_steps: int,
    generator: torch.Generator,
    progress: Progress | None,
) -> tuple[list[_Group], int]:
    """What new probes find on the complement of the known vectors, and the products they take."""
    sizes = _group_sizes(operator, num_probes, num_steps, len(known))
    krylov = Krylov(operator, _capacity(operator, sizes, num_steps, len(known)))
    _fix_known(krylov, known)
    groups: list[_Group] = []
    for j, size in enumerate(sizes):
        if krylov.spans_all:
            break
        room = sizes[j + 1] * (num_steps + 1) if j + 1 < len(sizes) else 0
        start = _advance(
            krylov, size, num_steps, generator, progress=progress, expected=num_probes * num_steps
        )
        groups.append(_quadrature(krylov, start, room))
    return groups, krylov.num_products


def _advance(
    krylov: Krylov,
    size: int,
    num_steps: int,
    generator: torch.Generator,
    *,
    progress: Progress | None,
    expected: int,
) -> Tensor:
    """Run `size` fresh probes for `num_steps` block products; their coefficients (r, size) at the start."""
    start = krylov.append(gaussian_rows(size, krylov.operator.shape[0], generator))
    for _ in range(num_steps):
        if krylov.num_pending == 0:
            break
        krylov.expand(krylov.num_pending)
        if progress is not None:
            progress(krylov.num_products, expected)
    return start


def _quadrature(krylov: Krylov, start: Tensor, room: int) -> _Group:
    """Nodes, shares and locked values of the basis; the locked vectors stay if a later group needs `room`."""
    values, coefficients, residual_norms = krylov.ritz()
    amplitudes = start.T @ coefficients[: len(start)]
    shares = (amplitudes / start.norm(dim=0)[:, None]).square()
    everything = krylov.num_fixed + krylov.num_basis == krylov.operator.shape[0]
    limit = len(krylov.rows) - krylov.num_fixed - room if room else len(values)
    bottom, top = _lockable(values, residual_norms, start.shape[1], max(limit, 0), everything)
    locked = torch.ones_like(values, dtype=torch.bool)
    locked[bottom : len(values) - top] = False
    inside = (float(values[bottom - 1]) if bottom else -INF, float(values[-top]) if top else INF)
    if room:
        krylov.contract(coefficients[:, locked])
        krylov.drop_pending()
        krylov.fix()
    return _Group(values[locked], values[~locked], shares[:, ~locked], inside)


def _lockable(
    values: Tensor, residual_norms: Tensor, num_probes: int, limit: int, everything: bool
) -> tuple[int, int]:
    """How many of the ascending values can be locked from below and from above."""
    count = len(values)
    if everything and count <= limit:
        return count, 0
    top = min(_run_length(values.flip(0), residual_norms.flip(0), num_probes), limit)
    bottom = min(_run_length(values, residual_norms, num_probes), limit - top)
    return (0, 0) if top + bottom >= count else (bottom, top)


def _run_length(values: Tensor, residual_norms: Tensor, num_probes: int) -> int:
    """Converged values from the front, up to the first run of equal ones as long as there are probes."""
    rounding = 10 * torch.finfo(torch.float64).eps * float(values.abs().max())
    v, r = values.tolist(), residual_norms.tolist()
    copies = 0
    for j in range(len(v)):
        if r[j] > LOCK_RTOL * abs(v[j]):
            return j
        equal = j > 0 and abs(v[j] - v[j - 1]) <= r[j] + r[j - 1] + rounding
        copies = copies + 1 if equal else 1
        if copies >= num_probes:
            return j + 1 - copies
    return len(v)


def _assemble(exact: Tensor, groups: list[_Group], size: int) -> tuple[Tensor, Tensor, Tensor]:
    """One quadrature: exact nodes of weight 1/P, and the rest shared equally among the probes."""
    num_probes = sum(len(group.shares) for group in groups)
    nodes, weights = [exact], [torch.full_like(exact, 1 / size)]
    probes = [torch.full(exact.shape, -1, dtype=torch.int64)]
    low, high, first = -INF, INF, num_probes
    for group in reversed(groups):
        first -= len(group.shares)
        kept = (group.nodes > low) & (group.nodes < high)  # what later groups locked, they know better
        kept = kept if bool(kept.any()) else torch.ones_like(kept)
        low, high = max(low, group.inside[0]), min(high, group.inside[1])
        if len(exact) == size or len(group.nodes) == 0:
            continue
        shares = group.shares[:, kept] / group.shares[:, kept].sum(1, keepdim=True)
        nodes.append(group.nodes[kept].repeat(len(shares)))
        weights.append((shares * (1 - len(exact) / size) / num_probes).flatten())
        probes.append(torch.arange(first, first + len(shares)).repeat_interleave(shares.shape[1]))
    total = torch.cat(weights)
    return torch.cat(nodes), total / total.sum(), torch.cat(probes)


def _group_sizes(operator: Operator, num_probes: int, num_steps: int, num_known: int) -> list[int]:
    """Sizes of the groups of probes, as equal as they can be."""
    size = operator.shape[0]
    fit = basis_capacity(operator)
    largest = num_probes if fit >= size else (fit - num_known) // (num_steps + 1)
    if size > LARGEST_BLOCK_BASIS:
        largest = max(1, min(largest, LARGEST_BLOCK_BASIS // num_steps))
    count = -(-num_probes // largest)
    return [num_probes // count + (j < num_probes % count) for j in range(count)]


def _capacity(operator: Operator, sizes: list[int], num_steps: int, num_known: int) -> int:
    """Rows for the largest group, and for as much again to be locked before later ones."""
    block = sizes[0] * (num_steps + 1)
    rows = num_known + (block if len(sizes) == 1 else 2 * block)
    return min(rows, operator.shape[0], basis_capacity(operator))


def _known_rows(operator: Operator, deflate: Eigenpairs | None) -> Tensor:
    """The vectors to deflate, as rows (k, P)."""
    size = operator.shape[0]
    if deflate is None:
        return torch.zeros(0, size)
    if not isinstance(deflate, Eigenpairs):
        raise OptionError(f"deflate must be the result of eigenpairs, or None; got {type(deflate).__name__}.")
    if deflate.vectors.shape[0] != size:
        raise ShapeError(
            f"deflate has vectors of length {deflate.vectors.shape[0]:,}, but A has {size:,} rows."
        )
    return deflate.vectors.T


def _fix_known(krylov: Krylov, known: Tensor) -> None:
    if len(known) == 0:
        return
    krylov.append(known)
    if krylov.num_pending < len(known):
        raise DataError("deflate.vectors are linearly dependent. Pass the result of eigenpairs as it is.")
    krylov.fix()

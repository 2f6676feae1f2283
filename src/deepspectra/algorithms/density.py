"""Spectral density by block Lanczos quadrature, with converged pairs taken out exactly."""

from __future__ import annotations

import math
import time
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from deepspectra.algorithms.krylov_basis import ROUNDING, Krylov
from deepspectra.algorithms.lanczos_quadrature import quadratures
from deepspectra.algorithms.long_vectors import norms_of, rows_on_device, rows_that_fit
from deepspectra.algorithms.probes import InUnits, Probes, stream
from deepspectra.argument_checks import Progress, check_choice, check_count
from deepspectra.errors import DataError, FallbackWarning, MemoryBudgetError, OptionError, ShapeError
from deepspectra.operators.base import Operator, as_operator
from deepspectra.quadrature import Density
from deepspectra.results import Eigenpairs, Provenance

BASES = (None, "full", "none")
LARGEST_BLOCK_BASIS = 2048  # vectors of a group of probes: its projected matrix is diagonalised on the CPU
FOLDS = 4  # of the probes of a group, at most: each is freed of what the others lock
LOCK_RTOL = 1e-4  # relative residual of a pair that is locked: what it leaves behind, its square, is rounding
LEAKED = 1e-9  # chance below which a vector that other probes found cannot be so near a probe
ANONYMOUS = ("operator", "matrix")  # names that tell no operator from another

# Of a spectrum: Ritz values and their residuals (2, k), from below and from above, inwards.
Ends = tuple[Tensor, Tensor]


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
    invariant.

    Pairs that have converged (residual ≤ 1e-4·|θ|) contiguously from either end are locked, as eigenvalues of
    weight 1/P, which removes their variance. A probe is freed only of pairs that other probes have locked, by a
    basis of their own inside the common one: chosen by what the probe itself has found, they would bias it, most of
    all copies of a multiple eigenvalue. Up to four folds of the probes lock for each other; a single probe locks
    nothing. Values that all folds lock are the exact ones of the result. If the basis spans R^P, all are exact.

    With `deflate`, probes and products are projected on the complement of its vectors, (I − VVᵀ)A(I − VVᵀ),
    and its values enter, sign kept, with weight 1/P each. The random vectors that found them count for nothing here:
    the pairs were chosen by what these vectors met. Probes are drawn anew, and differ from those vectors at equal
    seeds, too. Vectors that have not converged only blur: the projected operator's own density is still exact, and
    the values are Rayleigh quotients, off by at most ‖A v − λ v‖; the second moment lacks 2/P of the sum of the
    squared residuals. One product sees that the pairs are those of A.

    With basis="none" each probe goes its own way by Lanczos' recurrence, in three vectors, and copies of
    converged eigenvalues are merged (`algorithms/lanczos_quadrature.py`). Each probe's nodes and weights are then
    those of its own exact quadrature up to what the copies cost: after m steps it is as accurate as a
    reorthogonalised one of m less the number of copies. Nothing is locked, so outliers should be deflated; nodes
    closer than 100 ε‖A‖ are one.

    Args:
        A: an operator, or a symmetric matrix (P, P).
        num_probes: random probes.
        num_steps: products spent on each probe.
        deflate: eigenpairs of A known already.
        seed: of the probes; other estimates draw others at the same seed.
        progress: called with (products so far, products expected).
        basis: "full" keeps and reorthogonalises the basis, "none" keeps three vectors a probe; None is "full"
            if one probe's basis fits `A.memory`, or with the host's memory beside an accelerator's, and otherwise
            "none" with a FallbackWarning. It is held exactly, also where `A.basis` is a shorter type.

    Returns:
        Density: nodes and weights that sum to 1. How often its bands cover is in docs/coverage.md.

    Raises:
        OptionError, ShapeError, DataError: an argument out of range or of a wrong shape, pairs of another operator.
        NonFiniteError: a product is NaN or infinite.
        MemoryBudgetError: with basis="full", not even one probe's basis fits `A.memory`; else, not even three
            vectors.

    Cost: num_probes·num_steps products at most, and one with `deflate`; a basis of at most `A.memory` bytes: probes
    are split into groups that fit, of at most 2048 vectors, and later groups run on the complement of the pairs
    locked before. With basis="none", 3 vectors a probe, in groups of 16 or what fits.

    Source: Golub and Meurant (2010) for the quadrature; Papyan, JMLR 21 (2020), appendix C, algorithm 3.
    Departures: (1) full reorthogonalisation, hence no ghosts; (2) the probes share a block basis; (3) locking;
    (4) several probes, and standard errors from the variance that the spectrum gives a probe. Gaussian and not
    Rademacher probes: results depend on the spectrum alone, not on the basis A is written in, and copies of a
    multiple eigenvalue are seen with probability one.
    """
    began = time.perf_counter()
    operator = as_operator(A)
    check_count("num_probes", num_probes)
    check_count("num_steps", num_steps)
    check_choice("basis", basis, BASES)
    generator, scaled = stream(seed, "density"), InUnits(operator)
    run = Probes(scaled, num_probes * num_steps, progress)
    known = _known_rows(scaled, deflate, seed)
    keeps, told = _keeps_basis(scaled, basis, num_steps, len(known)), ""
    if keeps and operator.basis is not None:
        warnings.warn(
            f"density: its basis is held exactly, not in {str(operator.basis).removeprefix('torch.')}, whose "
            "rounding would let it lock nothing. For less memory pass basis='none'.",
            FallbackWarning,
            stacklevel=2,
        )
    if len(known) == operator.shape[0]:
        groups = [_complete(NO_ENDS, torch.zeros(0, dtype=torch.float64), num_probes)]
    elif keeps:
        groups, told = _with_basis(run, known, num_probes, num_steps, generator)
    else:
        groups = _without_basis(run, known, num_probes, num_steps, generator)
    values = torch.zeros(0) if deflate is None else deflate.values.cpu()
    unit = 2.0**scaled.exponent
    nodes, weights, probes, residuals = _assemble(values.double() / unit, groups, operator.shape[0])
    return Density(
        nodes=nodes * unit,
        weights=weights,
        probes=probes,
        residuals=residuals * unit,
        num_probes=num_probes,
        num_steps=num_steps,
        deflation_residual=0.0 if deflate is None else deflate.worst,
        num_deflated=len(known),
        others_below=math.inf if deflate is None else _others_below(deflate),
        merged=not keeps,
        num_products=run.spent + (deflate is not None),
        seconds=time.perf_counter() - began,
        provenance=Provenance.of(operator, seed=seed, basis=told),
    )


def _others_below(pairs: Eigenpairs) -> float:
    """Above which no eigenvalue of A on the complement of the pairs lies, if they are all the largest; else ∞.

    Were one there, A would have one more above the smallest pair than there are: it differs from its two blocks by
    the residuals R, and no eigenvalue by more than ‖R‖. The search itself ends at its tolerance, no more than ‖R‖.
    """
    if not pairs.converged or pairs.which != "largest" or not len(pairs.values):
        return math.inf
    return float(pairs.values.min() + 2 * pairs.residual_norms.norm())


NO_ENDS: Ends = (torch.zeros(2, 0, dtype=torch.float64), torch.zeros(2, 0, dtype=torch.float64))


class _Group(NamedTuple):
    """What some probes found on the complement of the same pairs: those, and nodes (m,) with shares (g, m)."""

    locked: Ends
    nodes: Tensor
    shares: Tensor


def _complete(locked: Ends, values: Tensor, num_probes: int) -> _Group:
    """The whole spectrum, from a basis that spans the complement of what was locked before."""
    ends = torch.zeros(2, 0, dtype=torch.float64), torch.stack([values, torch.zeros_like(values)])
    return _Group(_joined(locked, ends), values[:0], torch.zeros(num_probes, 0, dtype=torch.float64))


def _keeps_basis(operator: Operator, basis: str | None, num_steps: int, num_known: int) -> bool:
    """Whether one probe's basis is kept: as asked, or if it fits."""
    size, fit = operator.shape[0], _fitting(operator, num_known + num_steps + 1)
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
    run: Probes, known: Tensor, num_probes: int, num_steps: int, generator: torch.Generator
) -> list[_Group]:
    """What new probes find by the recurrence alone, each a group of one."""
    found = quadratures(run, known, num_probes, num_steps, generator)
    return [_Group(NO_ENDS, nodes, weights[None]) for nodes, weights in found]


def _with_basis(
    run: Probes, known: Tensor, num_probes: int, num_steps: int, generator: torch.Generator
) -> tuple[list[_Group], str]:
    """What new probes find on the complement of the known vectors; and in words, where the basis lay."""
    operator = run.operator
    sizes = _group_sizes(operator, num_probes, num_steps, len(known))
    krylov = Krylov(operator, _capacity(operator, sizes, num_steps, len(known)))
    if len(known):
        krylov.append(known)
        if krylov.num_pending < len(known):
            raise DataError("deflate.vectors are linearly dependent. Pass the result of eigenpairs as it is.")
        krylov.fix()
    groups: list[_Group] = []
    locked = NO_ENDS
    for j, size in enumerate(sizes):
        start = _advance(krylov, run, size, num_steps, generator)
        if krylov.num_fixed + krylov.num_basis == operator.shape[0]:
            groups = [_complete(locked, krylov.ritz().values, num_probes)]
            break
        groups += _folds(krylov, start, locked, num_steps)
        if j + 1 < len(sizes):
            locked = _joined(locked, _lock(krylov, room=sizes[j + 1] * (num_steps + 1)))
    return groups, krylov.rows.told


def _advance(krylov: Krylov, run: Probes, size: int, num_steps: int, generator: torch.Generator) -> Tensor:
    """Run `size` fresh probes for `num_steps` block products; their coordinates (num_basis, size)."""
    start = krylov.append_random(generator, size)
    for _ in range(num_steps):
        if krylov.num_pending == 0:
            break
        before = krylov.num_products
        krylov.expand(krylov.num_pending)
        run.count(krylov.num_products - before)
    return torch.nn.functional.pad(start, (0, 0, 0, krylov.num_basis - len(start)))


def _folds(krylov: Krylov, start: Tensor, locked: Ends, num_steps: int) -> list[_Group]:
    """Each fold of the probes on the complement of the pairs that the others lock.

    All in coordinates: the basis holds what the others alone would have built.
    """
    square = krylov.projected[: krylov.num_basis]
    matrix = (square + square.T) / 2
    count, groups = start.shape[1], []
    for mine in torch.tensor_split(torch.arange(count), min(FOLDS, count)):
        ends, vectors = NO_ENDS, matrix[:, :0]
        if len(mine) < count:
            others = torch.ones(count, dtype=torch.bool)
            others[mine] = False
            eps = torch.finfo(krylov.rows.like.dtype).eps
            space = _krylov_space(matrix, start[:, others], num_steps, eps)
            ends, vectors = _converged(krylov, matrix, space, space.shape[1], start[:, mine])
        # The rest of the coordinates is the complement of what is locked, where the fold's own quadrature lives.
        rest = torch.linalg.qr(vectors, mode="complete")[0][:, vectors.shape[1] :]
        nodes, turn = torch.linalg.eigh(rest.T @ matrix @ rest)
        shares = (start[:, mine].T @ rest @ turn).square().clamp_min(torch.finfo(torch.float64).tiny)
        groups.append(_Group(_joined(locked, ends), nodes, shares / shares.sum(1, keepdim=True)))
    return groups


def _krylov_space(matrix: Tensor, start: Tensor, num_steps: int, eps: float) -> Tensor:
    """Orthonormal columns (m, k) that span the first num_steps powers of the matrix (m, m) on start (m, g).

    It ends where what is new is as small as the rounding eps of the products that the matrix was made of: further
    directions would be those of rounding, and these are the other probes'.
    """
    largest, count = 0.0, 0
    rows = matrix.new_empty(min(len(matrix), num_steps * start.shape[1]), len(matrix))  # contiguous, filled in turn
    new = (start / start.norm(dim=0)).T
    for step in range(num_steps):
        size, space = float(new.norm(dim=1).max()), rows[:count]
        largest = max(largest, size) if step > 1 else size  # of images; the start's size is not the matrix's
        new = new - (new @ space.T) @ space
        _, sizes, new = torch.linalg.svd(new, full_matrices=False)
        new = new[sizes > ROUNDING * eps * largest][: len(rows) - count]
        if not len(new):
            break
        new = torch.linalg.qr((new - (new @ space.T) @ space).T)[0].T  # twice is enough
        rows[count : count + len(new)] = new
        count += len(new)
        new = new @ matrix
    return rows[:count].T


def _converged(
    krylov: Krylov, matrix: Tensor, space: Tensor, limit: int, foreign: Tensor | None = None
) -> tuple[Ends, Tensor]:
    """Ritz pairs of a part (m, k) of the basis, converged contiguously from either end; their coordinates (m, l).

    Vectors that hold more of a foreign probe (m, g) than chance would let them do not count.
    """
    values, turn = torch.linalg.eigh(space.T @ matrix @ space)
    vectors = space @ turn
    errors = krylov.projected @ vectors
    errors[: len(matrix)] -= vectors * values
    residual_norms = (errors.square().sum(0) + krylov.lost_squares(vectors)).clamp_min(0).sqrt()
    good = residual_norms <= LOCK_RTOL * values.abs()
    if foreign is not None:
        # An invariant space goes on by directions of rounding alone, and in the common basis these are the others'.
        # A Gaussian vector in d dimensions has more than s of its square along one direction with (1 − s)^((d−1)/2).
        dimensions = krylov.operator.shape[0] - krylov.num_fixed
        usual = 1 - LEAKED ** (2 / max(1, dimensions - 1))
        good &= (vectors.T @ (foreign / foreign.norm(dim=0))).square().amax(1) <= usual
    good = good.long()
    # cumprod ends at the first that has not converged: behind it an eigenvalue may still be unseen.
    top = min(int(good.flip(0).cumprod(0).sum()), limit)
    bottom = min(int(good.cumprod(0).sum()), limit - top, len(values) - top)
    pairs = torch.stack([values, residual_norms])
    ends = pairs[:, :bottom], pairs[:, len(values) - top :].flip(1)
    return ends, torch.cat([vectors[:, :bottom], vectors[:, len(values) - top :]], 1)


def _lock(krylov: Krylov, room: int) -> Ends:
    """Fix the converged pairs of the basis for later groups, which need `room`, and forget the rest of it."""
    square = krylov.projected[: krylov.num_basis]
    everything = torch.eye(len(square.T), dtype=torch.float64)
    limit = max(len(krylov.rows) - krylov.num_fixed - room, 0)
    ends, vectors = _converged(krylov, (square + square.T) / 2, everything, limit)
    krylov.contract(vectors, torch.zeros(krylov.num_pending, 0, dtype=torch.float64))
    krylov.fix()
    return ends


def _joined(ends: Ends, others: Ends) -> Ends:
    """Both, in order: from below they rise, from above they fall."""
    below, above = (torch.cat(pair, 1) for pair in zip(ends, others, strict=True))
    return below[:, below[0].argsort()], above[:, above[0].argsort(descending=True)]


def _agreed(ends: list[Tensor], counts: Tensor) -> Tensor:
    """Values that all groups lock, their mean over the probes, inwards up to the first on which they differ (2, k).

    With residuals, of the group that has it largest and is furthest from the mean.
    """
    found = torch.stack([end[:, : min(other.shape[1] for other in ends)] for end in ends])  # (groups, 2, k)
    values, reach = found[:, 0], found[:, 1].amax(0)
    rounding = 10 * torch.finfo(torch.float64).eps * values.abs().amax(0)
    same = (values.amax(0) - values.amin(0) <= 2 * reach + rounding).long()
    mean = counts / counts.sum() @ values
    return torch.stack([mean, reach + (values - mean).abs().amax(0)])[:, : int(same.cumprod(0).sum())]


def _assemble(known: Tensor, groups: list[_Group], size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One quadrature: exact nodes of weight 1/P, and the mean over the probes of what they have beside.

    Nodes, weights, probes, and residuals of what was locked.
    """
    counts = torch.tensor([len(group.shares) for group in groups], dtype=torch.float64)
    agreed = [_agreed(list(ends), counts) for ends in zip(*(group.locked for group in groups), strict=True)]
    exact, given = torch.cat([known, *(each[0] for each in agreed)]), torch.zeros_like(known)
    nodes, weights, probes = [exact], [torch.full_like(exact, 1 / size)], [torch.full(exact.shape, -1)]
    residuals = [torch.cat([given, *(each[1] for each in agreed)])]
    first, num_probes = 0, int(counts.sum())
    for group in groups:
        count = len(group.shares)
        # Values that only some groups lock stay theirs: they are known, but not to all probes.
        own, lost = torch.cat([e[:, both.shape[1] :] for e, both in zip(group.locked, agreed, strict=True)], 1)
        left = max(0.0, 1 - (len(exact) + len(own)) / size)
        shares = torch.cat([torch.full((count, len(own)), 1 / size, dtype=torch.float64), left * group.shares], 1)
        nodes.append(torch.cat([own, group.nodes]).repeat(count))
        residuals.append(torch.cat([lost, torch.zeros_like(group.nodes)]).repeat(count))
        weights.append(shares.flatten() / num_probes)
        probes.append(torch.arange(first, first + count).repeat_interleave(shares.shape[1]))
        first += count
    total = torch.cat(weights)
    return torch.cat(nodes), total / total.sum(), torch.cat(probes), torch.cat(residuals)


def _group_sizes(operator: Operator, num_probes: int, num_steps: int, num_known: int) -> list[int]:
    """Sizes of the groups of probes, as equal as they can be."""
    size = operator.shape[0]
    fit = _fitting(operator, num_known + num_steps + 1)
    largest = num_probes if fit >= size else (fit - num_known) // (num_steps + 1)
    if size > LARGEST_BLOCK_BASIS:
        largest = max(1, min(largest, LARGEST_BLOCK_BASIS // num_steps))
    count = -(-num_probes // largest)
    return [num_probes // count + (j < num_probes % count) for j in range(count)]


def _capacity(operator: Operator, sizes: list[int], num_steps: int, num_known: int) -> int:
    """Rows for the largest group, and for as much again to be locked before later ones."""
    block = sizes[0] * (num_steps + 1)
    rows = num_known + (block if len(sizes) == 1 else 2 * block)
    return min(rows, operator.shape[0], _fitting(operator, num_known + num_steps + 1))


def _fitting(operator: Operator, least: int) -> int:
    """Vectors of a basis that fit: in host memory, too, only where so many are not had without."""
    fit = rows_on_device(operator)
    return fit if fit >= least else rows_that_fit(operator)


def _known_rows(operator: InUnits, deflate: Eigenpairs | None, seed: int) -> Tensor:
    """The vectors to deflate, as rows (k, P), after a product to see that they are this operator's."""
    size = operator.shape[0]
    if deflate is None:
        return torch.zeros(0, size)
    if not isinstance(deflate, Eigenpairs):
        raise OptionError(f"deflate must be the result of eigenpairs, or None; got {type(deflate).__name__}.")
    if deflate.vectors.shape[0] != size:
        raise ShapeError(f"deflate has vectors of length {deflate.vectors.shape[0]:,}, but A has {size:,} rows.")
    theirs = deflate.provenance.operator
    if theirs != operator.name and not {theirs, operator.name} & set(ANONYMOUS):
        raise DataError(
            f"deflate holds eigenpairs of {theirs}, but A is {operator.name}. Pass eigenpairs of A itself."
        )
    refuse_others(operator, deflate, seed, "deflate")
    return deflate.vectors.T


def refuse_others(operator: InUnits, pairs: Eigenpairs, seed: int, name: str) -> None:
    """Raise DataError unless pairs are the operator's, as far as one product tells.

    A sum of the vectors with random signs, multiplied, is off by no more than the sum of their residuals.
    """
    vectors, count = pairs.vectors, pairs.vectors.shape[1]
    run = Probes(operator, 1, None)
    signs = (torch.randint(0, 2, (count, 1), generator=stream(seed, "deflation")) * 2 - 1).to(vectors)
    image = run(vectors @ signs)
    unit = 2.0**operator.exponent
    values = (pairs.values.double() / unit).to(image)
    gap = float(norms_of((image - vectors.to(image) @ (values[:, None] * signs.to(image))).T))
    # Rounding is relative to what is multiplied: ‖A‖ as far as seen, times the length √count of the sum.
    seen = pairs.separation.norm if pairs.separation else 0.0
    norm = max(float(norms_of(image.T)), float(values.abs().max()), count**0.5 * seen / unit)
    allowed = float(pairs.residual_norms.sum()) / unit + torch.finfo(operator.dtype).eps ** 0.5 * norm
    if not gap <= allowed:
        raise DataError(
            f"{name} holds eigenpairs of {pairs.provenance.operator}, but not of this {operator.name}: a product "
            f"differs from what they say by {gap * unit:.2g}, where their residuals allow {allowed * unit:.2g}. "
            "Pass eigenpairs of A itself, as it is now."
        )

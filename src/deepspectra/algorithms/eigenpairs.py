"""Extreme eigenpairs until converged: residuals measured, completeness challenged."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from deepspectra.algorithms.krylov import (
    Krylov,
    Ritz,
    as_operator,
    basis_capacity,
    basis_dtype,
    check_count,
    seeded,
)
from deepspectra.errors import ConvergenceWarning, DataError, MemoryBudgetError, OptionError, ShapeError
from deepspectra.operators.base import Operator
from deepspectra.results import Eigenpairs, Provenance, Separation

Progress = Callable[[int, int | None], object]

ENDS = ("largest", "smallest", "magnitude", "both")
MISSED = 2e-4  # probability at which a pair may be missing that lies beyond the last but one wanted,
AT_EDGE = 1e-2  # and at which one may that lies between that and the last: nothing but the last can be wrong
DEPTHS = (
    0.01,
    0.02,
    0.05,
    0.1,
    0.2,
    0.3,
    0.5,
    0.7,
)  # of the range within the last wanted value: may one hide there?
PATIENCE = (
    20,
    0.6,
)  # products of a challenge, or relative to those before it, after which it gives up unless told
REACH = 3  # residuals of a Ritz value within which its eigenvalue is taken to lie
ROUGH = 2e-2  # residual relative to the value, of pairs that others go on from
STEADY = 1 / 6  # variation of a sample that a search starts from, relative to the residual asked for
SPARE_VECTORS = 8  # the fewest basis vectors beyond `num` with which a restart makes headway


def eigenpairs(
    A: Operator | Tensor,
    num: int = 10,
    which: str = "largest",
    rtol: float = 1e-3,
    start: Tensor | str | None = None,
    max_products: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Eigenpairs:
    """Extreme eigenpairs of a symmetric operator, until converged.

    A pair has converged when its measured residual ‖A v − λ v‖ is at most rtol·|λ|. (Of eigenvalues below
    ε^(2/3)·‖A‖, which are zero to working precision ε, only max(rtol·ε^(2/3), 8 ε)·‖A‖ is asked.) Of values that
    differ by less than that, converged ones are preferred. All wanted pairs must then survive a challenge: a fresh
    random vector is followed until a pair that the search missed, such as a further copy of a multiple eigenvalue,
    would show along it. Whatever the spectrum and the start, a pair beyond the last but one wanted is missing from
    at most 1 of 5,000 results called converged, and from at most 1 of 100 one that differs from the last by more
    than its tolerance. The status is then "statistical"; it is "certified" if the basis has grown to span R^P.
    Without a gap after the wanted values this takes about as long as the search: unless `max_products` is given,
    the challenge gives up after 20 products, or .6 times those before it, and the result has not converged.
    How far down the challenge excludes unseen eigenvalues bounds the errors of values, vectors and span:
    `error_bounds`, `angle_bounds`, `subspace_angle_bound`.

    Args:
        A: an operator, or a symmetric matrix (P, P).
        num: how many pairs, K.
        which: "largest" | "smallest" | "magnitude" | "both" (⌈K/2⌉ largest and ⌊K/2⌋ smallest).
        rtol: residual relative to |λ|.
        start: "random" for a random vector, (P,) or (P, k) to start from a subspace (Rayleigh-Ritz on it costs k
            products), or the name of a start that the operator knows. H and G of cross-entropy know "sampled": the
            eigenvectors of the same operator on a sample drawn by importance, as small as rtol allows, of a
            quarter of the examples at most. None takes that where so many are enough, else a random vector.
        max_products: when to give up. Unless given, after max(20 K, 300), or when a challenge takes long.
        seed: of the random vectors.
        progress: called with (products so far, max_products) after every product.

    Returns:
        Eigenpairs, values descending. With `converged=False` and a ConvergenceWarning when something is
        missing, or may be.

    Raises:
        OptionError, ShapeError, DataError: an argument out of range, or of a wrong shape, or not finite.
        NonFiniteError: a product is NaN or infinite.
        MemoryBudgetError: fewer than K + 8 vectors fit `A.memory`.

    Cost: products as counted in the result, about 5 K of them with the sample if there is one; a basis of at
    most `A.memory` bytes, restarted when it is full; 4 P m flops a product for reorthogonalising twice against m
    vectors.

    Source: thick-restart Lanczos (Wu and Simon, SIAM J. Matrix Anal. Appl. 22, 2000). Departures: (1) the
    projected matrix is recorded in full, so that residuals are measured; (2) several residual directions may
    be pending, as in Ruhe's band Lanczos (Math. Comp. 33, 1979), and the one with the largest unconverged
    residual is multiplied next; (3) the challenge, which turns Kuczyński and Woźniakowski's bounds for Lanczos
    from a random vector (SIAM J. Matrix Anal. Appl. 13, 1992) into one for the spectrum that it meets.
    """
    return explore(A, num, which, rtol, start, max_products, seed, progress)[0]


def explore(
    A: Operator | Tensor,
    num: int = 10,
    which: str = "largest",
    rtol: float = 1e-3,
    start: Tensor | str | None = None,
    max_products: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[Eigenpairs, Krylov]:
    """`eigenpairs`, and the basis that it built, for whoever has more questions to the same operator."""
    began = time.perf_counter()
    operator = as_operator(A)
    _check_options(operator, num, which, rtol, max_products)
    budget = _enough_products(num) if max_products is None else max_products
    generator = seeded(seed)
    sampled, num_sample_products = start == "sampled", 0
    fits = which == "largest" and num <= _most_start_rows(operator, num, budget)
    num_samples = operator.sample_size(STEADY * rtol) if sampled or (start is None and fits) else 0
    if sampled or num_samples:
        start, num_sample_products = _of_sample(
            operator.sampled(generator, num_samples or None), num, which, rtol, generator
        )
    elif isinstance(start, str):
        start = None if start == "random" else operator.start_block(start)
    first = None if start is None else _start_rows(operator, start, num, budget)
    num_start = 1 if first is None else len(first)
    search = _Search(
        operator,
        num,
        which,
        rtol=rtol,
        budget=budget,
        num_start=num_start,
        generator=generator,
        progress=progress,
        patient=max_products is not None,
    )
    outcome = search.run(first)
    ritz, chosen = search.extract()
    result = Eigenpairs(
        values=ritz.values[chosen],
        vectors=search.krylov.combine(ritz.coefficients[:, chosen]),
        residual_norms=ritz.residual_norms[chosen],
        converged=outcome == "converged",
        num_products=search.krylov.num_products,
        seconds=time.perf_counter() - began,
        which=which,
        rtol=rtol,
        provenance=Provenance.of(operator, seed),
        separation=_separation(ritz, chosen, search.krylov.num_basis == operator.shape[0], search.limits),
        num_sample_products=num_sample_products,
    )
    if not result.converged:
        warnings.warn(_complaint(outcome, result, search.missed), ConvergenceWarning, stacklevel=3)
    return result, search.krylov


def unchallenged(operator: Operator, num: int, which: str, generator: torch.Generator) -> Krylov:
    """A basis of 2 K + 4 to 4 K + 20 products that has K pairs to a residual of 2 %, as far as it can tell.

    For whoever looks for missing pairs in another way.
    """
    most = min(4 * num + 20, operator.shape[0])
    search = _Search(
        operator, num, which, rtol=ROUGH, budget=most, num_start=1, generator=generator, progress=None
    )
    search.settle(2 * num + 4)
    return search.krylov


class _Edge(NamedTuple):
    """Where an end of the spectrum that is wanted stops, in values that grow towards that end."""

    side: float  # 1: the largest are wanted, −1: the smallest, whose values change sign here
    last: float  # wanted value
    tolerance: float  # of it
    second: float | None  # the last but one, if there is one
    depth: float  # from the last value to the other end

    def levels(self) -> list[float]:
        """From where on a hidden pair would be wanted, a copy of the second would, and others below."""
        edge = self.last + self.tolerance / 2
        return [edge, edge if self.second is None else self.second] + [
            self.last - depth * self.depth for depth in DEPTHS
        ]

    def chances(self) -> list[float]:
        """At which a pair beyond each level may be missing."""
        return [AT_EDGE, AT_EDGE if self.second is None else MISSED] + [AT_EDGE] * len(DEPTHS)


class _Search:
    """The state of one run: the basis, the wanted end, and the budget of products."""

    def __init__(
        self,
        operator: Operator,
        num: int,
        which: str,
        *,
        rtol: float,
        budget: int,
        num_start: int,
        generator: torch.Generator,
        progress: Progress | None,
        patient: bool = False,
    ) -> None:
        self.patient = patient  # whether a challenge may take all that is left of the budget
        self.num, self.which, self.rtol, self.budget = num, which, rtol, budget
        self.generator, self.progress = generator, progress
        self.eps = torch.finfo(basis_dtype(operator)).eps
        self.capacity = min(
            basis_capacity(operator), operator.shape[0], budget + max(num, num_start) + SPARE_VECTORS
        )
        if self.capacity < min(num + SPARE_VECTORS, operator.shape[0]):
            raise MemoryBudgetError(
                f"num={num} needs room for {num + SPARE_VECTORS} vectors of length {operator.shape[0]:,}; "
                f"A.memory = {operator.memory:,} bytes holds {self.capacity}. "
                "Ask for fewer pairs or raise A.memory."
            )
        self.krylov = Krylov(operator, self.capacity)
        self.norm = 0.0  # ‖A‖ as far as seen
        self.hidden: Tensor | None = None  # components of eigenvectors that a challenge might not have met
        self.challenged = False  # whether one has been passed, and all that it met is still in the basis
        self.missed = 1.0  # probability at which a wanted pair may be missing after it,
        self.limits: dict[float, float] = {}  # and values within which others may, by side

    def run(self, first: Tensor | None) -> str:
        """Search until the outcome is known: "converged", "budget", "challenge" or "stagnation"."""
        if first is not None:
            self._begin(first)
        while True:
            outcome = self.settle()
            if outcome == "settled" and self.challenged:
                return "converged"
            if outcome == "settled":
                outcome = self._challenge()
                self.hidden = None
            if outcome not in ("passed", "revealed"):
                return outcome

    def _begin(self, first: Tensor) -> None:
        self.krylov.append(first)
        if self.krylov.num_pending == 0:
            raise DataError("start is zero. Pass start=None for a random vector.")
        if self.krylov.num_pending > 1:  # Rayleigh-Ritz on the whole start, in one block product
            self.krylov.expand(self.krylov.num_pending)
            self._aim(self.krylov.ritz())

    def settle(self, least: int = 0) -> str:
        """Multiply until the wanted pairs have converged, and have no rivals or after `least` products, or cannot."""
        krylov, first = self.krylov, True
        best, best_at = float("inf"), 0
        while krylov.num_basis < krylov.operator.shape[0]:
            done = krylov.num_products
            # Large eigenproblems are not solved at every product.
            if krylov.num_basis and (first or done % (1 + krylov.num_basis // 100) == 0):
                ritz = krylov.ritz()
                self._aim(ritz)
                _, tolerances, residual_norms = self._wanted(ritz)
                smallest = torch.finfo(torch.float64).tiny
                excess = float((residual_norms / tolerances.clamp_min(smallest)).max())
                if len(ritz.values) < self.num:
                    pass
                elif excess <= 1:
                    rivals = self._rivals(ritz)
                    if done >= least and (least or not len(rivals)):
                        return "settled"
                    self._turn(self._residuals(ritz, rivals))
                elif excess < 0.9 * best:
                    best, best_at = excess, done
                elif done - best_at >= 10 and float(residual_norms.max()) <= 1e3 * self.eps * self.norm:
                    return "stagnation"
            if done >= self.budget:
                return "budget"
            self._multiply()
            first = False
        return self._judge_complete()

    def _judge_complete(self) -> str:
        """The basis spans R^P: every pair is there, with rounding as its residual."""
        _, tolerances, residual_norms = self._wanted(self.krylov.ritz())
        return "converged" if bool((residual_norms <= tolerances).all()) else "stagnation"

    def _challenge(self) -> str:
        """Follow a fresh random vector until no wanted pair can be hidden from it.

        Returns "passed", "revealed" when there is more to settle, or "challenge" when it takes too long.

        Let A' be A compressed to the complement of the basis Q. An eigenvector u of A without a part in Q is one
        of A'; for a value τ, Lanczos' recurrence of A' from the random x gives its components along the vectors
        met, in multiples of g = uᵀx. Their squares add up to at most 1, so |g| ≤ 1/√Σ, which a standard normal
        number is with a probability of at most √(2/πΣ). Σ grows as fast as polynomials can that are bounded on
        the rest of the spectrum of A', and with τ, where τ lies beyond all Ritz values of A'.
        """
        krylov, started = self.krylov, self.krylov.num_products
        self._make_room(2)
        if krylov.spans_all:
            while krylov.num_basis < krylov.operator.shape[0] and krylov.num_products < self.budget:
                self._multiply()
            return "revealed"
        before, tolerances, _ = self._wanted(krylov.ritz())
        edges = self._edges(krylov.ritz())
        sides = torch.tensor([[edge.side] for edge in edges], dtype=torch.float64)
        levels = torch.tensor([edge.levels() for edge in edges], dtype=torch.float64)
        allowed = torch.tensor([edge.chances() for edge in edges], dtype=torch.float64)
        direction = krylov.append_random(self.generator)[krylov.num_basis :]  # x less its part in Q
        self._turn(direction)
        self.hidden = torch.zeros(krylov.num_basis + 1, *levels.shape, dtype=torch.float64)
        self.hidden[-1] = 1 / direction.norm()
        chances, beyond = torch.ones_like(levels), torch.ones_like(levels, dtype=torch.bool)
        most = started + max(PATIENCE[0], PATIENCE[1] * started)
        while bool((chances > allowed)[:, :2].any()):
            if krylov.num_products >= (self.budget if self.patient else min(most, self.budget)):
                self.missed = float(chances[:, :2].max())
                return "challenge"
            self._multiply()
            column, newest = krylov.projected[:, -1], self.hidden[-1]
            rest = sides * levels * newest - torch.tensordot(column[: krylov.num_basis], self.hidden, 1)
            beyond &= sides * rest * newest >= 0  # a change of sign: a Ritz value lies beyond the level
            if not bool(beyond[:, 0].all()):
                return "revealed"
            left = column[krylov.num_basis :, None]
            if bool(left.any()):
                self._turn(left)
                following = rest / krylov.projected[krylov.num_basis, -1]
            else:  # the vectors met are all that x can show
                following = torch.full_like(rest, torch.inf)
            self.hidden = torch.cat([self.hidden, following[None]])
            chances = (math.pi / 2 * self.hidden.square().sum(0)).rsqrt().where(beyond, 1.0).clamp_max(1.0)
        self.limits = {
            edge.side: edge.side * float(level[fine].min())
            for edge, level, fine in zip(edges, levels, chances <= AT_EDGE, strict=True)
        }
        self.challenged = not _moved(self._wanted(krylov.ritz())[0], before, tolerances)
        return "passed" if self.challenged else "revealed"

    def _rivals(self, ritz: Ritz) -> Tensor:
        """Indices of Ritz values that, moved by their residuals, would be wanted more than the chosen."""
        rivals = torch.zeros(len(ritz.values), dtype=torch.bool)
        for edge in self._edges(ritz):
            values, limit = edge.side * ritz.values, edge.last + edge.tolerance
            rivals |= (values <= limit) & (values + ritz.residual_norms > limit)
        rivals[self._chosen(ritz)] = False
        return rivals.nonzero()[:, 0]

    def _edges(self, ritz: Ritz) -> list[_Edge]:
        """Where the wanted ends of the spectrum stop."""
        values, tolerances, _ = self._wanted(ritz)
        high, low = float(ritz.values[-1]), float(ritz.values[0])
        if self.which == "magnitude":
            order = values.abs().argsort()
            ends = [(1.0, order, values.abs()), (-1.0, order, values.abs())]
        else:
            above = {"largest": self.num, "smallest": 0, "both": (self.num + 1) // 2}[self.which]
            ranks = torch.arange(self.num)
            ends = [(1.0, ranks[:above].flip(0), values), (-1.0, ranks[above:], -values)]
        return [
            _Edge(
                side,
                float(sizes[order[0]]),
                float(tolerances[order[0]]),
                float(sizes[order[1]]) if len(order) > 1 else None,
                float(sizes[order[0]]) - (low if side > 0 else -high),
            )
            for side, order, sizes in ends
            if len(order)
        ]

    def _multiply(self) -> None:
        """One product; before it a restart if the basis is full, a random vector if none is pending."""
        self._make_room()
        if self.krylov.num_pending == 0:
            self.krylov.append_random(self.generator)
        self._make_room()
        self.krylov.expand(1)
        if self.progress is not None:
            self.progress(self.krylov.num_products, self.budget)

    def _make_room(self, rows: int = 1) -> None:
        """Restart unless there is room for so many more rows, or for all that R^P has."""
        krylov = self.krylov
        if self.capacity - krylov.num_rows >= min(rows, krylov.operator.shape[0] - krylov.num_rows):
            return
        available = self.capacity - krylov.num_pending - 1
        keep = min(max(self.num, (self.num + available) // 2), krylov.num_basis - 1)
        ritz = krylov.ritz()
        kept = ritz.coefficients[:, select(ritz.values, self.which, keep)]
        krylov.contract(kept)
        self.challenged = False
        if self.hidden is not None:
            self.hidden = torch.cat([torch.tensordot(kept.T, self.hidden[:-1], 1), self.hidden[-1:]])

    def _aim(self, ritz: Ritz) -> None:
        """Of several pending vectors, put first the direction of the largest unconverged wanted residual."""
        chosen = self._chosen(ritz)
        self._turn(
            self._residuals(ritz, chosen[ritz.residual_norms[chosen] > self._tolerances(ritz.values)[chosen]])
        )

    def _residuals(self, ritz: Ritz, which: Tensor) -> Tensor:
        """What the residuals of some Ritz pairs have along the pending vectors (w, k)."""
        return self.krylov.projected[self.krylov.num_basis :] @ ritz.coefficients[:, which]

    def _turn(self, directions: Tensor) -> None:
        """Of several pending vectors, put first the main one of some directions (w, k) among them."""
        if self.krylov.num_pending > 1 and directions.numel():
            self.krylov.turn(torch.linalg.svd(directions)[0][:, 0])

    def _wanted(self, ritz: Ritz) -> tuple[Tensor, Tensor, Tensor]:
        """Values, tolerances and residual norms of the wanted pairs."""
        chosen = self._chosen(ritz)
        return ritz.values[chosen], self._tolerances(ritz.values)[chosen], ritz.residual_norms[chosen]

    def _chosen(self, ritz: Ritz) -> Tensor:
        """Indices of the wanted Ritz values, descending; those that have not converged stand back by a tolerance.

        For a multiple eigenvalue has copies that are not wanted, and one should not be exchanged for another.
        """
        tolerances = self._tolerances(ritz.values)
        middle = 0.0 if self.which == "magnitude" else float(ritz.values.mean())
        back = torch.where(ritz.residual_norms > tolerances, tolerances, 0.0) * (ritz.values - middle).sign()
        order = (ritz.values - back).argsort()
        chosen = order[select((ritz.values - back)[order], self.which, min(self.num, len(order)))]
        return chosen.sort(descending=True).values

    def _tolerances(self, values: Tensor) -> Tensor:
        sizes = values.abs()
        self.norm = max(self.norm, float(sizes.max()))
        small = self.eps ** (2 / 3) * self.norm
        floor = max(self.rtol * small, 8 * self.eps * self.norm)
        return torch.where(sizes > small, self.rtol * sizes, floor)

    def extract(self) -> tuple[Ritz, Tensor]:
        """All Ritz pairs, and which of them are wanted, by descending value."""
        ritz = self.krylov.ritz()
        return ritz, self._chosen(ritz)


def _separation(ritz: Ritz, chosen: Tensor, complete: bool, limits: dict[float, float]) -> Separation:
    """Distances of the chosen values from where other eigenvalues may lie: near their Ritz values, or unseen."""
    offsets = (ritz.values[chosen, None] - ritz.values).abs()  # (K, m)
    distances = (offsets - REACH * ritz.residual_norms).clamp_min(0)
    distances[torch.arange(len(chosen)), chosen] = torch.inf
    if limits and not complete:
        values = ritz.values[chosen]
        unseen = torch.maximum(values - limits.get(1.0, math.inf), limits.get(-1.0, -math.inf) - values)
        distances = torch.cat([distances, unseen.clamp_min(0)[:, None]], 1)
    gaps = distances.min(1).values
    distances[:, chosen] = torch.inf
    return Separation(gaps, float(distances.min()), float(ritz.values.abs().max()), complete)


def select(values: Tensor, which: str, num: int) -> Tensor:
    """Indices of `num` of the ascending values (m,) at the wanted end, by descending value."""
    order = torch.arange(len(values)).flip(0)
    if which == "smallest":
        return order[len(values) - num :]
    if which == "both":
        return torch.cat([order[: (num + 1) // 2], order[len(values) - num // 2 :]])
    if which == "magnitude":
        return values.abs().argsort(descending=True)[:num].sort(descending=True).values
    return order[:num]


def _moved(values: Tensor, before: Tensor, tolerances: Tensor) -> bool:
    return bool(((values - before).abs() > tolerances).any())


def check_rtol(rtol: float) -> None:
    """Raise OptionError unless 0 < rtol < 1."""
    if not 0 < rtol < 1:
        raise OptionError(f"rtol must lie between 0 and 1; got {rtol!r}.")


def _check_options(operator: Operator, num: int, which: str, rtol: float, max_products: int | None) -> None:
    check_count("num", num, largest=operator.shape[0])
    if which not in ENDS:
        raise OptionError(f"which must be one of {', '.join(map(repr, ENDS))}; got {which!r}.")
    check_rtol(rtol)
    if max_products is not None:
        check_count("max_products", max_products, smallest=num)


def _start_rows(operator: Operator, block: Tensor, num: int, budget: int) -> Tensor:
    """The start as rows (k, P)."""
    size = operator.shape[0]
    if (
        not isinstance(block, Tensor)
        or block.ndim not in (1, 2)
        or block.shape[0] != size
        or block.numel() == 0
    ):
        given = tuple(block.shape) if isinstance(block, Tensor) else type(block).__name__
        raise ShapeError(f"start must be None, a name, or a tensor ({size},) or ({size}, k); got {given}.")
    if block.is_complex() or block.layout != torch.strided:
        raise DataError(
            f"start must be real and dense, as the eigenvectors will be; got {block.dtype}, {block.layout}."
        )
    rows = block.detach().reshape(size, -1).T
    largest = _most_start_rows(operator, num, budget)
    if len(rows) > largest:
        raise OptionError(
            f"start has {len(rows)} vectors; at most {max(largest, 0)} fit P, max_products and A.memory."
        )
    if not bool(torch.isfinite(rows).all()):
        raise DataError("start has NaN or infinite entries.")
    return rows


def _enough_products(num: int) -> int:
    """After which a search gives up unless told otherwise."""
    return max(20 * num, 300)


def _most_start_rows(operator: Operator, num: int, budget: int) -> int:
    """Rows for which there is room, for their products, and for what a restart keeps."""
    size, room = operator.shape[0], basis_capacity(operator) - SPARE_VECTORS
    return min(budget, size, size if room >= size else min(room // 2, room - num))


def _of_sample(
    few: Operator, num: int, which: str, rtol: float, generator: torch.Generator
) -> tuple[Tensor, int]:
    """The wanted eigenvectors (P, K) of the operator on few examples, and the products that they took."""
    budget = _enough_products(num)
    search = _Search(
        few, num, which, rtol=rtol, budget=budget, num_start=1, generator=generator, progress=None
    )
    search.run(None)
    ritz, chosen = search.extract()
    return search.krylov.combine(ritz.coefficients[:, chosen]), search.krylov.num_products


def _complaint(outcome: str, result: Eigenpairs, missed: float) -> str:
    worst = f"worst residual |Av − λv|/|λ| = {result.worst:.1e}, rtol = {result.rtol:.1e}"
    if outcome == "challenge":
        return (
            f"eigenpairs: residuals are small ({worst}), but {result.num_products} products do not show that no pair "
            f"is missing, such as a copy of a multiple eigenvalue: the probability is up to {missed:.1g}. "
            f"Pass max_products above {result.num_products}, the more the smaller the gap after the wanted values."
        )
    if outcome == "stagnation":
        return f"eigenpairs: {worst}: the rounding of this dtype allows no less. Raise rtol or use float64."
    return (
        f"eigenpairs: not converged after max_products={result.num_products}: {worst}. "
        "Raise max_products, ask for fewer pairs, or raise rtol."
    )

"""Extreme eigenpairs until converged: residuals measured, completeness challenged."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from deepspectra.algorithms.lanczos import (
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
from deepspectra.results import Eigenpairs, Provenance, Quadrature, Separation

Progress = Callable[[int, int | None], object]

ENDS = ("largest", "smallest", "magnitude", "both")
STAND_STILL = 1  # products over which converged pairs must not change before they are challenged
SHORTEST_CHALLENGE = 5  # products of the search for missing copies, or a quarter of the basis if that is more
REACH = 3  # residuals of a Ritz value within which its eigenvalue is taken to lie
ROUGH = 2e-2  # residual relative to the value, of pairs that others go on from
SAMPLE_CHALLENGES = 2  # of the pairs of a sample, which a search starts from: products with it are cheap
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
    ε^(2/3)·‖A‖, which are zero to working precision ε, only max(rtol·ε^(2/3), 8 ε)·‖A‖ is asked.) All wanted
    pairs must then stand still and survive a challenge: a fresh random vector and at least 5 products along it,
    which would reveal a missed pair or a further copy of a multiple eigenvalue, and products along any other
    Ritz vector whose residual leaves room for a wanted eigenvalue, until it leaves none beyond the tolerance.
    Completeness is therefore probabilistic, unless the basis has grown to span R^P, when it is certain: the
    result's `status` says which. What the run saw of the rest of the spectrum bounds the errors of values,
    vectors and span: `error_bounds`, `angle_bounds`, `subspace_angle_bound`.

    Args:
        A: an operator, or a symmetric matrix (P, P).
        num: how many pairs, K.
        which: "largest" | "smallest" | "magnitude" | "both" (⌈K/2⌉ largest and ⌊K/2⌋ smallest).
        rtol: residual relative to |λ|.
        start: "random" for a random vector, (P,) or (P, k) to start from a subspace (Rayleigh-Ritz on it costs k
            products), or the name of a start that the operator knows. H and G of cross-entropy know "sampled": the
            eigenvectors of the same operator on a sample drawn by importance, as small as rtol allows, of a
            quarter of the examples at most. None takes that where so many are enough, else a random vector, which a
            `density` that deflates the pairs counts among its probes.
        max_products: when to give up; max(20 K, 300) unless given.
        seed: of the random vectors.
        progress: called with (products so far, max_products) after every product.

    Returns:
        Eigenpairs, values descending. With `converged=False` and a ConvergenceWarning when something is
        missing.

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
    residual is multiplied next; (3) the challenge.
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
        quadrature=search.quadrature(ritz, chosen),
        separation=_separation(ritz, chosen, search.krylov.num_basis == operator.shape[0]),
        num_sample_products=num_sample_products,
    )
    if not result.converged:
        warnings.warn(_complaint(outcome, result, budget), ConvergenceWarning, stacklevel=3)
    return result, search.krylov


def unchallenged(operator: Operator, num: int, which: str, generator: torch.Generator) -> Krylov:
    """A basis of 2 K + 4 to 4 K + 20 products that has K pairs to a residual of 2 %, as far as it can tell.

    For whoever looks for missing pairs in another way.
    """
    most = min(4 * num + 20, operator.shape[0])
    search = _Search(
        operator, num, which, rtol=ROUGH, budget=most, num_start=1, generator=generator, progress=None
    )
    search.settle(2 * num + 4, stand_still=0)
    return search.krylov


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
    ) -> None:
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
        self.num_steps: list[int] = []  # products spent along each random vector that the basis tracks
        self.follows_newest = False  # whether products go along the newest of them

    def run(self, first: Tensor | None) -> str:
        """Search until the outcome is known: "converged", "budget", "challenge" or "stagnation"."""
        if first is not None:
            self._begin(first)
        while True:
            outcome = self.settle()
            if outcome != "settled":
                return outcome
            before = self._wanted(self.krylov.ritz())[0]
            if not self._challenge():
                return "challenge"
            values, tolerances, residual_norms = self._wanted(self.krylov.ritz())
            if bool((residual_norms <= tolerances).all()) and not _moved(values, before, tolerances):
                return "converged"

    def _begin(self, first: Tensor) -> None:
        self.krylov.append(first)
        if self.krylov.num_pending == 0:
            raise DataError("start is zero. Pass start=None for a random vector.")
        if self.krylov.num_pending > 1:  # Rayleigh-Ritz on the whole start, in one block product
            self.krylov.expand(self.krylov.num_pending)
            self._aim(self.krylov.ritz())

    def settle(self, least: int = 0, stand_still: int = STAND_STILL) -> str:
        """Multiply, `least` times or more, until the wanted pairs have converged and stand still, or cannot."""
        still, since, best, best_at = None, 0, float("inf"), 0
        while True:
            if self.krylov.num_basis == self.krylov.operator.shape[0]:
                return self._judge_complete()
            if self.krylov.num_products >= self.budget:
                return "budget"
            self._multiply()
            done = self.krylov.num_products
            if done % (
                1 + self.krylov.num_basis // 100
            ):  # large eigenproblems are not solved at every product
                continue
            ritz = self.krylov.ritz()
            self._aim(ritz)
            if len(ritz.values) < self.num:
                continue
            values, tolerances, residual_norms = self._wanted(ritz)
            excess = float((residual_norms / tolerances.clamp_min(torch.finfo(torch.float64).tiny)).max())
            if excess > 1:
                still = None
                if excess < 0.9 * best:
                    best, best_at = excess, done
                elif done - best_at >= 10 and float(residual_norms.max()) <= 1e3 * self.eps * self.norm:
                    return "stagnation"
                continue
            if still is None or _moved(values, still, tolerances):
                still, since = values, done
            if done >= least and done - since >= stand_still:
                return "settled"

    def _judge_complete(self) -> str:
        """The basis spans R^P: every pair is there, with rounding as its residual."""
        _, tolerances, residual_norms = self._wanted(self.krylov.ritz())
        return "converged" if bool((residual_norms <= tolerances).all()) else "stagnation"

    def _challenge(self) -> bool:
        """Follow a fresh random vector, then whatever rivals the wanted pairs; False if the budget ends first.

        Before it what is pending is multiplied once, for it may hide the direction of a missing copy.
        """
        shortest, followed = max(SHORTEST_CHALLENGE, self.krylov.num_basis // 4), 0
        while self.krylov.num_basis < self.krylov.operator.shape[0]:
            if followed == 1 and not self.krylov.spans_all:
                self._make_room()
                self._append_random()
            if 1 <= followed < shortest:
                self._turn(torch.eye(self.krylov.num_pending, dtype=torch.float64)[:, -1:])  # the newest
            elif followed >= shortest:
                ritz = self.krylov.ritz()
                rivals = self._rivals(ritz)
                if len(rivals) == 0:
                    break
                self.follows_newest = False
                self._turn(self._residuals(ritz, rivals))
            if self.krylov.num_products >= self.budget:
                return False
            self._multiply()
            followed += 1
        self.follows_newest = False
        return True

    def _rivals(self, ritz: Ritz) -> Tensor:
        """Indices of other Ritz values that, moved by their residuals, would be wanted more than the chosen."""
        chosen = select(ritz.values, self.which, self.num)
        rest = torch.ones(len(ritz.values), dtype=torch.bool)
        rest[chosen] = False
        others = rest.nonzero()[:, 0]
        values, reach = ritz.values[others], ritz.residual_norms[others]
        slack = self._outward(ritz.values[chosen]) * self._tolerances(ritz.values)[chosen]
        order = torch.cat([ritz.values[chosen] + slack, values + reach, values - reach]).sort()
        best = order.indices[select(order.values, self.which, self.num)] - self.num
        rivals: Tensor = others[best[best >= 0] % max(len(others), 1)]
        return rivals

    def _outward(self, values: Tensor) -> Tensor:
        """±1 (K,): the side on which the end lies that a descending value is wanted for."""
        if self.which == "magnitude":
            return values.sign()
        above = {"largest": self.num, "smallest": 0, "both": (self.num + 1) // 2}[self.which]
        return torch.where(torch.arange(self.num) < above, 1.0, -1.0)

    def _append_random(self) -> None:
        self.krylov.append_random(self.generator)
        self.num_steps.append(0)
        self.follows_newest = True

    def _multiply(self) -> None:
        """One product; before it a restart if the basis is full, a random vector if none is pending."""
        self._make_room()
        if self.krylov.num_pending == 0:
            self._append_random()
        self._make_room()
        self.krylov.expand(1)
        if self.follows_newest:
            self.num_steps[-1] += 1
        if self.progress is not None:
            self.progress(self.krylov.num_products, self.budget)

    def _make_room(self) -> None:
        krylov = self.krylov
        if krylov.num_rows < self.capacity or krylov.spans_all:
            return
        available = self.capacity - krylov.num_pending - 1
        keep = min(max(self.num, (self.num + available) // 2), krylov.num_basis - 1)
        ritz = krylov.ritz()
        krylov.contract(ritz.coefficients[:, select(ritz.values, self.which, keep)])
        self.num_steps, self.follows_newest = [], False

    def _aim(self, ritz: Ritz) -> None:
        """Of several pending vectors, put first the direction of the largest unconverged wanted residual."""
        chosen = select(ritz.values, self.which, min(self.num, len(ritz.values)))
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
        chosen = select(ritz.values, self.which, self.num)
        return ritz.values[chosen], self._tolerances(ritz.values)[chosen], ritz.residual_norms[chosen]

    def _tolerances(self, values: Tensor) -> Tensor:
        sizes = values.abs()
        self.norm = max(self.norm, float(sizes.max()))
        small = self.eps ** (2 / 3) * self.norm
        floor = max(self.rtol * small, 8 * self.eps * self.norm)
        return torch.where(sizes > small, self.rtol * sizes, floor)

    def extract(self) -> tuple[Ritz, Tensor]:
        """All Ritz pairs, and which of them are wanted, by descending value."""
        ritz = self.krylov.ritz()
        return ritz, select(ritz.values, self.which, min(self.num, len(ritz.values)))

    def quadrature(self, ritz: Ritz, chosen: Tensor) -> Quadrature | None:
        """What the tracked random vectors say of the spectrum beyond the chosen pairs."""
        rest = torch.ones(len(ritz.values), dtype=torch.bool)
        rest[chosen] = False
        shares = (self.krylov.tracked[: self.krylov.num_basis].T @ ritz.coefficients[:, rest]).square()
        if not self.num_steps or not bool(rest.any()):
            return None
        weights = shares / shares.sum(1, keepdim=True)
        return Quadrature(ritz.values[rest], weights, tuple(self.num_steps))


def _separation(ritz: Ritz, chosen: Tensor, complete: bool) -> Separation:
    """Distances of the chosen values from where the eigenvalues of the other Ritz values are taken to lie."""
    offsets = (ritz.values[chosen, None] - ritz.values).abs()  # (K, m)
    distances = (offsets - REACH * ritz.residual_norms).clamp_min(0)
    distances[torch.arange(len(chosen)), chosen] = torch.inf
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
    """The wanted eigenvectors (P, K) of the operator on few examples, and the products that they took.

    What they lack the search on all examples will hardly find, so they are challenged more than once.
    """
    budget = _enough_products(num)
    search = _Search(
        few, num, which, rtol=rtol, budget=budget, num_start=1, generator=generator, progress=None
    )
    for _ in range(SAMPLE_CHALLENGES):
        search.run(None)
    ritz, chosen = search.extract()
    return search.krylov.combine(ritz.coefficients[:, chosen]), search.krylov.num_products


def _complaint(outcome: str, result: Eigenpairs, budget: int) -> str:
    worst = f"worst residual |Av − λv|/|λ| = {result.worst:.1e}, rtol = {result.rtol:.1e}"
    if outcome == "challenge":
        return (
            f"eigenpairs: residuals are small ({worst}) but max_products={budget} left no products "
            "to check that no pair is missing. Raise max_products."
        )
    if outcome == "stagnation":
        return f"eigenpairs: {worst}: the rounding of this dtype allows no less. Raise rtol or use float64."
    return (
        f"eigenpairs: not converged after max_products={budget}: {worst}. "
        "Raise max_products, ask for fewer pairs, or raise rtol."
    )

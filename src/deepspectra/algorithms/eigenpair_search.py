"""The search for extreme eigenpairs in a Krylov basis: thick-restart Lanczos until settled, then challenged."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from deepspectra.algorithms.krylov_basis import Krylov, Ritz
from deepspectra.algorithms.long_vectors import rows_that_fit, vector_dtype
from deepspectra.argument_checks import Progress
from deepspectra.errors import DataError, MemoryBudgetError
from deepspectra.operators.base import Operator

# Products of a challenge, or relative to those before it, after which it gives up unless told.
PATIENCE = (20, 0.6)
SPARE_VECTORS = 8  # the fewest basis vectors beyond `num` with which a restart makes headway
MISSED = 2e-4  # probability at which a pair may be missing that lies beyond the last but one wanted,
AT_EDGE = 1e-2  # and at which one may that lies between that and the last: nothing but the last can be wrong
# Parts of the range within the last wanted value: from how far down on may none hide?
DEPTHS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7)


class Wanted(NamedTuple):
    """Which pairs, and how exactly: `num` of the end `which`, to residuals of `rtol` relative to |λ|."""

    num: int
    which: str
    rtol: float


class Search:
    """The state of one run: the basis, the wanted end, and the budget of products."""

    def __init__(
        self,
        operator: Operator,
        wanted: Wanted,
        budget: int,
        generator: torch.Generator,
        *,
        num_start: int = 1,
        progress: Progress | None = None,
        patient: bool = False,
    ) -> None:
        self.num, self.which, self.rtol = wanted
        self.budget, self.generator, self.progress = budget, generator, progress
        self.patient = patient  # whether a challenge may take all that is left of the budget
        self.eps = torch.finfo(vector_dtype(operator)).eps
        self.capacity = min(
            rows_that_fit(operator), operator.shape[0], budget + max(self.num, num_start) + SPARE_VECTORS
        )
        if self.capacity < min(self.num + SPARE_VECTORS, operator.shape[0]):
            raise MemoryBudgetError(
                f"num={self.num} needs room for {self.num + SPARE_VECTORS} vectors of length {operator.shape[0]:,}; "
                f"A.memory = {operator.memory:,} bytes holds {self.capacity}. "
                "Ask for fewer pairs or raise A.memory."
            )
        self.krylov = Krylov(operator, self.capacity)
        self.norm = 0.0  # ‖A‖ as far as seen
        self.challenge: Challenge | None = None  # the one that is on
        self.challenged = False  # whether one has been passed, and all that it met is still in the basis
        self.missed = 1.0  # probability at which a wanted pair may be missing after it,
        self.limits: dict[float, float] = {}  # and values within which others may, by side

    def begin(self, first: Tensor) -> None:
        """Rayleigh-Ritz on a start, rows (k, P), which are not needed after that."""
        self.krylov.append(first)
        if self.krylov.num_pending == 0:
            raise DataError("start is zero. Pass start=None for a random vector.")
        if self.krylov.num_pending > 1:  # on the whole start, in one block product
            self.krylov.expand(self.krylov.num_pending)
            self._aim(self.krylov.ritz())

    def run(self) -> str:
        """Search until the outcome is known: "converged", "budget", "challenge" or "stagnation"."""
        while True:
            outcome = self.settle()
            if outcome == "settled" and self.challenged:
                return "converged"
            if outcome == "settled":
                outcome = self._challenge()
                self.challenge = None
            if outcome not in ("passed", "revealed"):
                return outcome

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
                _, tolerances, residual_norms = self._of_wanted(ritz)
                smallest = torch.finfo(torch.float64).tiny
                excess = float((residual_norms / tolerances.clamp_min(smallest)).max())
                if len(ritz.values) < self.num:
                    pass
                elif excess <= 1:
                    rivals = self._rivals(ritz)
                    if done >= least and (least or not len(rivals)):
                        return "settled"
                    # A rival's residual may hide a wanted value: its direction comes next.
                    self._turn(self._residuals(ritz, rivals))
                elif excess < 0.9 * best:
                    best, best_at = excess, done
                # Ten products without a tenth of progress are none, but only rounding excuses them.
                elif done - best_at >= 10 and self._is_rounding(ritz, tolerances, residual_norms):
                    return "stagnation"
            if done >= self.budget:
                return "budget"
            self._multiply()
            first = False
        # The basis spans R^P: every pair is there, with rounding as its residual.
        _, tolerances, residual_norms = self._of_wanted(self.krylov.ritz())
        return "converged" if bool((residual_norms <= tolerances).all()) else "stagnation"

    def _is_rounding(self, ritz: Ritz, tolerances: Tensor, residual_norms: Tensor) -> bool:
        """Whether residuals of the wanted pairs are rounding, of products or of the rows that are held."""
        if self.krylov.rows.is_rounded:
            return bool((self.lost(ritz, self._chosen(ritz)) > tolerances).any())
        return float(residual_norms.max()) <= 1e3 * self.eps * self.norm

    def _challenge(self) -> str:
        """Follow a fresh random vector until no wanted pair can be hidden from it (`Challenge`).

        Returns "passed", "revealed" when there is more to settle, or "challenge" when it takes too long.
        """
        krylov, started = self.krylov, self.krylov.num_products
        self._make_room(2)
        if krylov.num_rows == krylov.operator.shape[0]:
            while krylov.num_basis < krylov.operator.shape[0] and krylov.num_products < self.budget:
                self._multiply()
            return "revealed"
        before, tolerances, _ = self._of_wanted(krylov.ritz())
        edges = self._edges(krylov.ritz())
        direction = krylov.append_random(self.generator)[krylov.num_basis :]  # x less its part in Q
        self._turn(direction)
        self.challenge = challenge = Challenge(edges, krylov.num_basis, direction)
        most = started + max(PATIENCE[0], PATIENCE[1] * started)
        while not challenge.passed:
            if krylov.num_products >= (self.budget if self.patient else min(most, self.budget)):
                self.missed = challenge.missed
                return "challenge"
            self._multiply()
            if challenge.reveals(krylov.projected[: krylov.num_basis, -1]):
                return "revealed"
            left = krylov.projected[krylov.num_basis :, -1:]
            if bool(left.any()):
                self._turn(left)  # all that the product adds is then along the next vector
                challenge.follow(float(krylov.projected[krylov.num_basis, -1]))
            else:
                challenge.follow(0.0)
                if not challenge.passed:  # a Ritz value on the very edge, and x has no more to show
                    return "revealed"
        self.limits = challenge.limits()
        # Pairs that moved while x was followed have to settle, and to be challenged, anew.
        moved = (self._of_wanted(krylov.ritz())[0] - before).abs() > tolerances
        self.challenged = not bool(moved.any())
        return "passed" if self.challenged else "revealed"

    def _rivals(self, ritz: Ritz) -> Tensor:
        """Indices of Ritz values that, moved by their residuals, would be wanted more than the chosen."""
        rivals = torch.zeros(len(ritz.values), dtype=torch.bool)
        for edge in self._edges(ritz):
            values, limit = edge.side * ritz.values, edge.last + edge.tolerance
            rivals |= (values <= limit) & (values + ritz.residual_norms > limit)
        rivals[self._chosen(ritz)] = False
        return rivals.nonzero()[:, 0]

    def _edges(self, ritz: Ritz) -> list[Edge]:
        """Where the wanted ends of the spectrum stop."""
        values, tolerances, _ = self._of_wanted(ritz)
        high, low = float(ritz.values[-1]), float(ritz.values[0])
        if self.which == "magnitude":  # a hidden value of either sign would be wanted from the same size on
            order = values.abs().argsort()
            ends = [(1.0, order, values.abs()), (-1.0, order, values.abs())]
        else:
            above = {"largest": self.num, "smallest": 0, "both": (self.num + 1) // 2}[self.which]
            ranks = torch.arange(self.num)
            ends = [(1.0, ranks[:above].flip(0), values), (-1.0, ranks[above:], -values)]
        return [
            Edge(
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
        # Half of the room beside the wanted: fewer would forget what converges next, more would restart too often.
        keep = min(max(self.num, (self.num + available) // 2), krylov.num_basis - 1)
        ritz = krylov.ritz()
        kept = ritz.coefficients[:, select(ritz.values, self.which, keep)]
        krylov.contract(kept)
        self.challenged = False  # what was met and is not kept could hide a pair again
        if self.challenge is not None:
            self.challenge.contract(kept)

    def _aim(self, ritz: Ritz) -> None:
        """Of several pending vectors, put first the direction of the largest unconverged wanted residual."""
        chosen = self._chosen(ritz)
        self._turn(self._residuals(ritz, chosen[ritz.residual_norms[chosen] > self.tolerances(ritz.values)[chosen]]))

    def _residuals(self, ritz: Ritz, which: Tensor) -> Tensor:
        """What the residuals of some Ritz pairs have along the pending vectors (w, k)."""
        return self.krylov.projected[self.krylov.num_basis :] @ ritz.coefficients[:, which]

    def _turn(self, directions: Tensor) -> None:
        """Of several pending vectors, put first the main one of some directions (w, k) among them."""
        if self.krylov.num_pending > 1 and directions.numel():
            self.krylov.turn(torch.linalg.svd(directions)[0][:, 0])

    def _of_wanted(self, ritz: Ritz) -> tuple[Tensor, Tensor, Tensor]:
        """Values, tolerances and residual norms of the wanted pairs."""
        chosen = self._chosen(ritz)
        return ritz.values[chosen], self.tolerances(ritz.values)[chosen], ritz.residual_norms[chosen]

    def _chosen(self, ritz: Ritz) -> Tensor:
        """Indices of the wanted Ritz values, descending; those that have not converged stand back by a tolerance.

        For a multiple eigenvalue has copies that are not wanted, and one should not be exchanged for another.
        """
        tolerances = self.tolerances(ritz.values)
        # Outwards is away from zero for magnitudes, and away from the middle of the spectrum for its ends.
        middle = 0.0 if self.which == "magnitude" else float(ritz.values.mean())
        back = torch.where(ritz.residual_norms > tolerances, tolerances, 0.0) * (ritz.values - middle).sign()
        order = (ritz.values - back).argsort()
        chosen = order[select((ritz.values - back)[order], self.which, min(self.num, len(order)))]
        return chosen.sort(descending=True).values

    def tolerances(self, values: Tensor) -> Tensor:
        """Residual norms that are asked for of these values."""
        sizes = values.abs()
        self.norm = max(self.norm, float(sizes.max()))
        # A value far below ‖A‖ is rounding's: relative to itself, no residual of it would ever be small.
        small = self.eps ** (2 / 3) * self.norm
        floor = max(self.rtol * small, 8 * self.eps * self.norm)
        return torch.where(sizes > small, self.rtol * sizes, floor)

    def lost(self, ritz: Ritz, which: Tensor) -> Tensor:
        """Norms of what residuals of some Ritz pairs have of what no row represents."""
        return self.krylov.lost_squares(ritz.coefficients[:, which]).clamp_min(0).sqrt()

    def extract(self) -> tuple[Ritz, Tensor]:
        """All Ritz pairs, and which of them are wanted, by descending value."""
        ritz = self.krylov.ritz()
        return ritz, self._chosen(ritz)


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


class Edge(NamedTuple):
    """Where an end of the spectrum that is wanted stops, in values that grow towards that end."""

    side: float  # 1: the largest are wanted, −1: the smallest, whose values change sign here
    last: float  # wanted value
    tolerance: float  # of it
    second: float | None  # the last but one, if there is one
    depth: float  # from the last value to the other end

    def levels(self) -> list[float]:
        """From where on a hidden pair would be wanted, a copy of the second would, and others below.

        If the second is a copy of the last, so is any other of it, which is wanted no more than the last is.
        """
        edge = self.last + self.tolerance / 2
        return [edge, edge if self.second is None else max(edge, self.second)] + [
            self.last - depth * self.depth for depth in DEPTHS
        ]

    def chances(self) -> list[float]:
        """At which a pair beyond each level may be missing."""
        return [AT_EDGE, AT_EDGE if self.second is None else MISSED] + [AT_EDGE] * len(DEPTHS)


class Challenge:
    """May a wanted pair hide from a random vector x? Components along the vectors met, for each edge and level.

    Let A' be A compressed to the complement of the basis Q. An eigenvector u of A without a part in Q is one of A';
    for a value τ, Lanczos' recurrence of A' from the random x gives its components along the vectors met, in
    multiples of g = uᵀx. Their squares add up to at most 1, so |g| ≤ 1/√Σ, which a standard normal number is with a
    probability of at most √(2/πΣ). Σ grows as fast as polynomials can that are bounded on the rest of the spectrum of
    A', and with τ, where τ lies beyond all Ritz values of A'.

    Where rows are held rounded, q + δ, the recurrence is that of the rows as they are, and only starts anew with uᵀδ
    at each of them: components are then g c + z, of which z comes from the roundings and not from g. All of them
    together are at most about 1 as before (rows are orthonormal to about ε/√P), which leaves g an interval of length
    2/√Σ, wherever its middle is; a normal number's density is nowhere above 1/√2π, so that the chance is the same.
    What is taken for granted is that roundings do not know u.

    Args:
        edges: where the wanted ends of the spectrum stop.
        num_basis: vectors in the basis before x, along which such an eigenvector has none.
        direction: what x adds to the basis; the next vector is along it.
    """

    def __init__(self, edges: list[Edge], num_basis: int, direction: Tensor) -> None:
        self.sides = torch.tensor([[edge.side] for edge in edges], dtype=torch.float64)
        self.levels = torch.tensor([edge.levels() for edge in edges], dtype=torch.float64)
        self.allowed = torch.tensor([edge.chances() for edge in edges], dtype=torch.float64)
        self.hidden = torch.zeros(num_basis + 1, *self.levels.shape, dtype=torch.float64)
        self.hidden[-1] = 1 / direction.norm()  # uᵀx = g, in multiples of g
        self.chances = torch.ones_like(self.levels)
        self.beyond = torch.full(self.levels.shape, True)  # no Ritz value of A' lies beyond the level

    @property
    def passed(self) -> bool:
        """Whether no wanted pair can be hidden but with the chances allowed."""
        return not bool((self.chances > self.allowed)[:, :2].any())

    @property
    def missed(self) -> float:
        """The probability at which a wanted pair may be missing."""
        return float(self.chances[:, :2].max())

    def reveals(self, column: Tensor) -> bool:
        """Take in what the newest product has along the basis (m,): whether a Ritz value lies among the wanted."""
        newest = self.hidden[-1]
        # uᵀA q = τ uᵀq, and A q has these parts: what they leave of τ uᵀq is uᵀ of the next vector.
        self.rest = self.sides * self.levels * newest - torch.tensordot(column, self.hidden, 1)
        # A change of sign: a Ritz value lies beyond the level.
        self.beyond &= self.sides * self.rest * newest >= 0
        return not bool(self.beyond[:, 0].all())

    def follow(self, length: float) -> None:
        """Go on to the next vector, of which the newest product has this much; 0: x can show no more."""
        following = self.rest / length if length else torch.full_like(self.rest, torch.inf)
        self.hidden = torch.cat([self.hidden, following[None]])
        chances = (math.pi / 2 * self.hidden.square().sum(0)).rsqrt()
        self.chances = chances.where(self.beyond, 1.0).clamp_max(1.0)

    def contract(self, coefficients: Tensor) -> None:
        """A restart has replaced the basis by combinations (m, k) of it; the next vector stays."""
        turned = torch.tensordot(coefficients.T, self.hidden[:-1], 1)
        self.hidden = torch.cat([turned, self.hidden[-1:]])

    def limits(self) -> dict[float, float]:
        """The value of each side beyond which an unseen pair lies with a chance of no more than 1 in 100."""
        fine = self.chances <= AT_EDGE
        return {
            side: side * float(level[good].min())
            for (side,), level, good in zip(self.sides.tolist(), self.levels, fine, strict=True)
        }

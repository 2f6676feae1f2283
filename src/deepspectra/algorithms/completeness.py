"""The challenge of a search: may a wanted pair hide from a random vector?

Let A' be A compressed to the complement of the basis Q. An eigenvector u of A without a part in Q is one of A'; for a
value τ, Lanczos' recurrence of A' from the random x gives its components along the vectors met, in multiples of
g = uᵀx. Their squares add up to at most 1, so |g| ≤ 1/√Σ, which a standard normal number is with a probability of at
most √(2/πΣ). Σ grows as fast as polynomials can that are bounded on the rest of the spectrum of A', and with τ, where
τ lies beyond all Ritz values of A'.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

MISSED = 2e-4  # probability at which a pair may be missing that lies beyond the last but one wanted,
AT_EDGE = 1e-2  # and at which one may that lies between that and the last: nothing but the last can be wrong
# Parts of the range within the last wanted value: from how far down on may none hide?
DEPTHS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7)


class Edge(NamedTuple):
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


class Challenge:
    """Components along the vectors met of eigenvectors that x might not have shown, for each edge and level.

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

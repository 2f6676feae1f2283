"""What the first moments of a measure leave open of it: the inequalities of Chebyshev, Markov and Stieltjes.

A Gauss quadrature knows as many moments of a measure as its Jacobi matrix has diagonal entries, twice. Two measures
with the same moments differ by no more in the mass below x than Christoffel's function at x. Every choice of the
last diagonal entry makes a quadrature of the same moments but one, and each of these pins the distribution function
at its own nodes: the mass below a node is at least that of the nodes before it, the mass up to it at most that and
its own.

Source: Akhiezer, The Classical Moment Problem (1965), section 2.5; Golub and Meurant, Matrices, Moments and
Quadrature with Applications (2010), section 6.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

PINS = 9  # choices of the last diagonal entry, odd so that none is infinite: bounds a ninth wider than need be, or so
VANISHED = 1e-14  # an off-diagonal entry, relative to the nodes, that ends the recurrence
LARGEST = 1e150  # of a polynomial; its square is no longer finite
FAR = 1e9  # from the spectrum, in units of it: as good as infinitely far


class Jacobi(NamedTuple):
    """The recurrence x p_k = β_k p_{k+1} + α_k p_k + β_{k−1} p_{k−1} of a measure's orthonormal polynomials.

    Attributes:
        diagonal: (m,) α.
        beside: (m − 1,) β.
        mass: of the measure.
        complete: whether it has no more polynomials: it is its own Gauss quadrature.
    """

    diagonal: Array
    beside: Array
    mass: float
    complete: bool

    @classmethod
    def of(cls, nodes: Array, weights: Array, wanted: int) -> Jacobi:
        """Of a discrete measure (M,), for as many polynomials as are wanted, or as it has.

        By Lanczos' recurrence with full reorthogonalisation: wanted² M operations.
        """
        mass, largest = float(weights.sum()), float(np.abs(nodes).max(initial=0)) or 1.0
        count, x = min(wanted, len(nodes)), nodes / largest
        basis = np.zeros((count, len(x)))
        basis[0] = np.sqrt(weights / mass)
        diagonal, beside = np.zeros(count), np.zeros(count - 1)
        for k in range(count):
            image = x * basis[k]
            diagonal[k] = basis[k] @ image
            if k + 1 == count:
                break
            for _ in range(2):
                image -= (basis[: k + 1] @ image) @ basis[: k + 1]
            beside[k] = np.linalg.norm(image)
            if beside[k] <= VANISHED:
                diagonal, beside = diagonal[: k + 1], beside[:k]
                break
            basis[k + 1] = image / beside[k]
        return cls(diagonal * largest, beside * largest, mass, len(diagonal) < wanted)

    def christoffel(self, x: Array) -> Array:
        """Christoffel's function at x (k,): the most that a measure of these moments can have there.

        It is mass/Σ p_k(x)² over the orthonormal polynomials, and the smallest ∫p² of those with p(x) = 1.
        """
        unit = float(np.abs(self.diagonal).max() + self.beside.max(initial=0)) or 1.0
        alpha, beta = self.diagonal / unit, self.beside / unit
        at = np.clip(x / unit, -FAR, FAR)
        previous, current, total = np.zeros_like(at), np.ones_like(at), np.ones_like(at)
        for k in range(len(beta)):
            before = beta[k - 1] if k else 0.0
            previous, current = current, ((at - alpha[k]) * current - before * previous) / beta[k]
            grown = np.abs(current) > LARGEST
            total = np.where(grown, math.inf, total + np.where(grown, 0.0, current) ** 2)
            previous, current = np.where(grown, 0.0, previous), np.where(grown, 0.0, current)
        found: Array = self.mass / total
        return found

    def mass_below(self, x: Array) -> tuple[Array, Array]:
        """The least mass below x (k,), and the most at or below x, of measures with these moments.

        Nodes are known up to rounding: ask beside them, not at them.
        """
        if self.complete:
            nodes, weights = self._quadrature(0.0)
            sums = np.concatenate([[0.0], weights.cumsum()])
            return sums[np.searchsorted(nodes, x, side="left")], sums[np.searchsorted(nodes, x, side="right")]
        order = np.argsort(x, kind="stable")
        at = x[order]
        most = self.christoffel(at)
        low, high = np.zeros_like(at), np.full_like(at, self.mass)
        for turn in range(PINS):
            nodes, weights = self._quadrature(math.tan(math.pi * turn / PINS))
            sums = np.concatenate([[0.0], weights.cumsum()])  # of the nodes before each
            up_to = np.searchsorted(nodes, at, side="right")
            below = np.searchsorted(nodes, at, side="left")
            low = np.maximum(low, np.maximum(sums[up_to] - most, sums[np.maximum(up_to - 1, 0)]))
            after = np.append(sums[1:], self.mass)
            high = np.minimum(high, np.minimum(sums[below] + most, after[below]))
        back = np.argsort(order, kind="stable")
        rising = np.maximum.accumulate(low), np.minimum.accumulate(high[::-1])[::-1]
        return rising[0][back], rising[1][back]

    def _quadrature(self, raised: float) -> tuple[Array, Array]:
        """Nodes and weights, with the last diagonal entry raised by so many times the one beside it."""
        from scipy.linalg import eigh_tridiagonal  # noqa: PLC0415  (SciPy's import takes a while)

        diagonal = self.diagonal.copy()
        if len(self.beside):
            diagonal[-1] += raised * self.beside[-1]
        nodes, vectors = eigh_tridiagonal(diagonal, self.beside)
        return nodes, self.mass * vectors[0] ** 2

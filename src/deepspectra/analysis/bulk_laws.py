"""The laws of matrices without structure, Marchenko-Pastur's and Wigner's semicircle, fitted to a bulk."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from deepspectra.algorithms.long_vectors import unit_of

Array = npt.NDArray[np.float64]
Name = Literal["Marchenko-Pastur", "semicircle"]

CLOSE = 0.02  # a law that is nowhere further off than this describes the bulk
MOST_OUTSIDE = 0.05  # share of the eigenvalues that may lie outside a law's support, as outliers
EDGE = 4.0  # half-widths times n^(−2/3) by which the edge of n eigenvalues fluctuates, at most
LEVEL = 0.01  # at which a law is rejected
FEWEST_INSIDE = 50  # eigenvalues that tell one law of a bulk from another
COARSEST = 0.04  # error of the distribution function above which no law of a bulk is accepted
ANGLES = np.linspace(math.pi, 0, 2049)
RATIOS = np.geomspace(1e-4, 1, 129)
GROWTH, GUMBEL = (0.13, 0.42), 0.25  # of n times the distance of n eigenvalues that repel each other


class Sample(NamedTuple):
    """Eigenvalues (n,), ascending, the number of eigenvalues that each stands for, and the error of counts.

    `error_above(x)` is the standard error of how many lie above x; None if they are known one by one.
    """

    values: Array
    counts: Array
    error_above: Callable[[float], float] | None = None

    @property
    def total(self) -> float:
        """How many eigenvalues there are."""
        return float(self.counts.sum())

    def where(self, chosen: npt.NDArray[np.bool_]) -> Sample:
        """Those of them, by a mask (n,)."""
        return Sample(self.values[chosen], self.counts[chosen], self.error_above)

    def merged(self, width: float) -> Sample:
        """Values within a width of the first of them as one: their mean."""
        if not (np.diff(self.values) <= width).any():
            return self
        starts, at = [], 0
        while at < len(self.values):
            starts.append(at)
            at = int(np.searchsorted(self.values, self.values[at] + width, side="right"))
        first, counts = self.values[starts], np.add.reduceat(self.counts, starts)
        beyond = self.values - np.repeat(first, np.diff([*starts, len(self.values)]))
        return Sample(first + np.add.reduceat(self.counts * beyond, starts) / counts, counts, self.error_above)

    def within(self, low: float, high: float) -> Sample:
        """Those between two values."""
        return self.where((self.values >= low) & (self.values <= high))

    def quantiles(self, shares: Array) -> Array:
        """Where the distribution function reaches these shares."""
        mass = (self.counts.cumsum() - self.counts / 2) / self.total
        return np.interp(shares, mass, self.values)

    def steps(self) -> tuple[Array, Array]:
        """The distribution function just below and just above each value.

        A quadrature node stands for eigenvalues on both sides of it: what is below and above half of its weight.
        """
        above = self.counts.cumsum() / self.total
        below = above - self.counts / self.total
        return (below, above) if self.error_above is None else ((below + above) / 2,) * 2


@dataclass(frozen=True)
class BulkLaw:
    """Marchenko-Pastur's law or the semicircle, fitted by the first two moments of what lies in its support.

    Attributes:
        name: "Marchenko-Pastur" | "semicircle".
        centre: mean of the law: σ² of Marchenko-Pastur.
        ratio: γ ≤ 1 of Marchenko-Pastur, dimension over sample size or the reverse; NaN of the semicircle.
        low: where the law's support begins.
        high: where it ends, the bulk's edge.
        num_inside: eigenvalues in the support, and as far beyond as edges fluctuate.
        num_outside: the others, left out of the fit.
        distance: Kolmogorov-Smirnov, of those inside.
        p_value: of as large a distance in a random matrix of that law and size, whose eigenvalues repel each other:
            about √n times smaller than of independent draws; NaN where nodes blur it.
        resolved: to what the distribution function is known, two standard errors; 0 of exact eigenvalues.
    """

    name: Name
    centre: float
    ratio: float
    low: float
    high: float
    num_inside: float
    num_outside: float
    distance: float
    p_value: float
    resolved: float

    @property
    def accepted(self) -> bool:
        """At most 5 % outside, at least 50 inside, and a distance within .02, known to .04, or by chance at 1 %."""
        few = self.num_outside <= MOST_OUTSIDE * (self.num_inside + self.num_outside)
        near = self.distance <= CLOSE or self.p_value >= LEVEL
        return few and near and self.num_inside >= FEWEST_INSIDE and self.resolved <= COARSEST

    @property
    def possible(self) -> bool:
        """Whether it may hold for all that is known of quadrature nodes."""
        outside = self.num_outside - self.resolved * self.num_inside
        total = self.num_inside + self.num_outside
        return self.distance <= self.resolved and outside <= MOST_OUTSIDE * total


def fit_bulk_law(name: Name, sample: Sample) -> BulkLaw:
    """One of the two, to the bulk of some eigenvalues."""
    unit = unit_of(float(np.abs(sample.values).max(initial=0.0)))  # squares of the values may over- or underflow
    low, high, centre, ratio = _fit(name, sample._replace(values=sample.values / unit))
    low, high, centre = low * unit, high * unit, centre * unit
    inside = sample.within(*_reach(name, low, high, sample.total))
    distance = _distance(name, inside, low, high, ratio)
    exact = sample.error_above is None
    return BulkLaw(
        name=name,
        centre=centre,
        ratio=ratio,
        low=low,
        high=high,
        num_inside=inside.total,
        num_outside=sample.total - inside.total,
        distance=distance,
        p_value=_p_value(distance, inside.total) if exact else math.nan,
        resolved=_resolved(inside),
    )


def _fit(name: Name, sample: Sample) -> tuple[float, float, float, float]:
    """Edges, mean and ratio: from quartiles first, that outliers cannot reach, then from moments inside."""
    low, high, centre, ratio = _from_quartiles(name, sample)
    total = math.inf
    for _ in range(50):
        inside = sample.within(*_reach(name, low, high, sample.total))
        if inside.total == total or len(inside.values) < 2:
            break
        total = inside.total
        centre = float(inside.values @ inside.counts) / total
        spread = float(np.square(inside.values - centre) @ inside.counts) / total
        low, high, centre, ratio = _law(name, centre, spread)
    return low, high, centre, ratio


def _law(name: Name, centre: float, spread: float) -> tuple[float, float, float, float]:
    """Edges, mean and ratio of the law with this mean and variance."""
    if name == "semicircle":
        half = 2 * math.sqrt(spread)
        return centre - half, centre + half, centre, math.nan
    ratio = min(spread / centre**2, 1.0)  # zeros are no part of it: the wider of the two matrices
    root = math.sqrt(ratio)
    return centre * (1 - root) ** 2, centre * (1 + root) ** 2, centre, ratio


def _from_quartiles(name: Name, sample: Sample) -> tuple[float, float, float, float]:
    first, median, third = sample.quantiles(np.array([0.25, 0.5, 0.75]))
    if name == "semicircle":
        unit = _quantile(name, -2.0, 2.0, math.nan, 0.75)
        return _law(name, float(median), float((third - first) / (2 * unit)) ** 2)
    spans, medians = _quartiles_by_ratio()
    ratio = float(np.interp((third - first) / median, spans, RATIOS))
    centre = float(median / np.interp(ratio, RATIOS, medians))
    return _law(name, centre, ratio * centre**2)


@cache
def _quartiles_by_ratio() -> tuple[Array, Array]:
    """(third − first quartile)/median and median/mean of Marchenko-Pastur's law, by ratio."""
    spans, medians = [], []
    for ratio in RATIOS:
        low, high, *_ = _law("Marchenko-Pastur", 1.0, ratio)
        first, median, third = (_quantile("Marchenko-Pastur", low, high, ratio, share) for share in (0.25, 0.5, 0.75))
        spans.append((third - first) / median)
        medians.append(median)
    return np.array(spans), np.array(medians)


def _table(name: Name, low: float, high: float, ratio: float) -> tuple[Array, Array]:
    """Points and the distribution function at them: in x = middle + half cos θ both densities are smooth."""
    half = (high - low) / 2
    points = low + half * (1 + np.cos(ANGLES))
    density = np.sin(ANGLES) ** 2
    if name == "Marchenko-Pastur":
        # sin²θ/(1 + γ + 2√γ cos θ), at γ = 1 of the form 0/0 in θ = π
        root = math.sqrt(ratio)
        below = (1 - root) ** 2 + 2 * root * (1 + np.cos(ANGLES))
        density = np.divide(density, below, out=np.ones_like(density), where=below > 0)
    mass = np.concatenate([[0.0], ((density[1:] + density[:-1]) / 2).cumsum()])
    return points, mass / mass[-1]


def _quantile(name: Name, low: float, high: float, ratio: float, share: float) -> float:
    points, mass = _table(name, low, high, ratio)
    return float(np.interp(share, mass, points))


def _reach(name: Name, low: float, high: float, size: float) -> tuple[float, float]:
    """The support, and as far beyond as the edge of so many eigenvalues fluctuates."""
    margin = EDGE * (high - low) / 2 * size ** (-2 / 3)
    return low - margin, high + margin


def _distance(name: Name, inside: Sample, low: float, high: float, ratio: float) -> float:
    if not len(inside.values):
        return 1.0
    expected = np.interp(inside.values, *_table(name, low, high, ratio))
    return float(max(np.abs(expected - step).max() for step in inside.steps()))


def _resolved(inside: Sample) -> float:
    """Two standard errors of the distribution function, the largest on a grid of quantiles."""
    if inside.error_above is None or not len(inside.values):
        return 0.0
    places = inside.quantiles(np.linspace(0.1, 0.9, 9))
    return 2 * max(inside.error_above(float(x)) for x in places) / inside.total


def _p_value(distance: float, size: float) -> float:
    """Of a distance at so many rigid eigenvalues: n D is about .13 + .42 log n, and Gumbel's law about that median.

    Simulated, with fitted parameters, for both laws at all ratios and n = 50 to 3,000: they are alike.
    """
    excess = (size * distance - GROWTH[0] - GROWTH[1] * math.log(max(size, 2.0))) / GUMBEL
    return -math.expm1(-math.log(2) * math.exp(-excess)) if excess > -5 else 1.0

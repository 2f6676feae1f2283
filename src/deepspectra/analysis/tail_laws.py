"""Power law, exponential and log-normal, fitted to the tail of a spectrum above each of many thresholds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from deepspectra.analysis.bulk_laws import Array, Sample

Name = Literal["power law", "exponential", "log-normal"]
Other = Literal["exponential", "log-normal"]

FEWEST = 25  # effective eigenvalues to which a tail is fitted
NUM_THRESHOLDS = 128  # at most, spread evenly over the logarithm of the number above
NUM_BLURRED = 32  # of quadrature nodes: what is known of a count takes a while
CRITICAL = {  # of √n D with fitted parameters: 1 % for the power law, 5 % for the others (Stephens 1974)
    "power law": 1.308,
    "exponential": 1.094,
    "log-normal": 0.895,
}
PARTS = (1, 2, 4)  # the tail, its upper half and quarter: a wrong x_min moves them apart
ROUNDING = 1e-6  # of a log-likelihood
LARGEST_BLOCK = 2**22  # entries of thresholds × values at once
SKETCHED = 128  # values at which most thresholds are ruled out


class Scan(NamedTuple):
    """A law fitted above each of k thresholds."""

    thresholds: Array  # (k,) ascending
    counts: Array  # (k,) eigenvalues at or above
    effective: Array  # (k,) as many independent, exactly known ones would say as much
    rates: Array  # (k,) 1/mean of t: log(x/x_min), or x − x_min of the exponential
    heights: Array  # (k,) h of the log-normal; ∞ elsewhere
    distances: Array  # (k,) Kolmogorov-Smirnov

    @property
    def best(self) -> int:
        """Where the law is nearest to the values (Clauset, Shalizi and Newman 2009)."""
        return int(self.distances.argmin())

    def held(self, name: Name) -> npt.NDArray[np.bool_]:
        """Above which thresholds the law is not rejected."""
        root = np.sqrt(self.effective)
        return (self.distances - 0.2 / self.effective) * (root + 0.26 + 0.5 / root) <= CRITICAL[name]

    def reach(self, good: npt.NDArray[np.bool_]) -> float:
        """How many eigenvalues lie above the lowest of some thresholds; 0 if there is none."""
        return float(self.counts[good].max()) if good.any() else 0.0


@dataclass(frozen=True)
class PowerLaw:
    """A density ∝ x^−α for x ≥ x_min.

    Attributes:
        exponent: α.
        low: where the interval of α begins: it spans those of the fits to the tail, to its upper half and quarter.
        high: where it ends.
        x_min: where the power law begins.
        num_tail: eigenvalues at or above it.
        effective: as many independent, exactly known eigenvalues would say as much of α.
        distance: Kolmogorov-Smirnov, of the tail from the law.
        p_value: of so large a distance if the law holds (semiparametric bootstrap).
        reach: eigenvalues above the lowest x_min at which the law is not rejected at 1 %.
    """

    exponent: float
    low: float
    high: float
    x_min: float
    num_tail: float
    effective: float
    distance: float
    p_value: float
    reach: float


NO_POWER_LAW = PowerLaw(*[math.nan] * 9)


@dataclass(frozen=True)
class Alternative:
    """A law beside the power law.

    Attributes:
        name: "exponential" | "log-normal".
        ratio: log-likelihood of the power law less that of the alternative, above `x_min`: positive for the power
            law. 0 if the best log-normal is the power law, its limit.
        p_value: of so large a ratio of either sign if the two are equally far from the truth (Vuong 1989). The
            log-normal has the power law among its limits: of so large a ratio if the power law holds.
        reach: eigenvalues above the lowest x_min from which on it is not rejected and, as fitted there, no
            less likely than the power law for those that this reaches.
    """

    name: Other
    ratio: float
    p_value: float
    reach: float


def scan(name: Name, sample: Sample, thresholds: Array) -> Scan:
    """The law by maximum likelihood, weights included, and its distance above each threshold.

    Cost: len(thresholds) × len(values) exponentials.
    """
    fit = _fitted(name, sample, thresholds)
    return fit._replace(distances=_distances(name, sample, fit, np.arange(len(thresholds)), 1))


def _fitted(name: Name, sample: Sample, thresholds: Array) -> Scan:
    """The law above each threshold, with no distances yet."""
    x, w = sample.values, sample.counts
    t, offsets = (x, thresholds) if name == "exponential" else (np.log(x), np.log(thresholds))
    first = np.searchsorted(x, thresholds)
    counts, sums = (_from_above(v)[first] for v in (w, w * (t - t[0])))
    shift = offsets - t[0]
    means = np.maximum(sums / counts - shift, np.finfo(float).tiny)
    heights = np.full(len(first), math.inf)
    if name == "log-normal":
        squares = _from_above(w * (t - t[0]) ** 2)[first]
        heights = _height((squares / counts - 2 * shift * sums / counts + shift**2) / means**2)
    unknown = np.full(len(first), math.nan)
    return Scan(thresholds, counts, _effective(sample, thresholds, counts), 1 / means, heights, unknown)


def _distances(name: Name, sample: Sample, fit: Scan, some: npt.NDArray[np.int_], stride: int) -> Array:
    """Distances above some of the thresholds, at every so many-th value: no larger than at all of them."""
    x, w, ranks = sample.values[::stride], sample.counts[::stride], sample.counts.cumsum()[::stride]
    t, offsets = (x, fit.thresholds) if name == "exponential" else (np.log(x), np.log(fit.thresholds))
    first = np.searchsorted(x, fit.thresholds)
    distances = np.zeros(len(some))
    step = max(1, LARGEST_BLOCK // len(x))
    for k in range(0, len(some), step):
        rows = some[k : k + step]
        start, counts = int(first[rows].min()), fit.counts[rows, None]
        if start == len(x):
            continue
        scaled = np.maximum((t[start:] - offsets[rows, None]) * fit.rates[rows, None], 0)
        mass = _mass(scaled, fit.heights[rows])
        above = (ranks[start:] - (sample.total - counts)) / counts
        below = above - w[start:] / counts
        if sample.error_above is not None:
            below = above = (below + above) / 2  # a node stands for what lies on both sides of it
        apart = np.maximum(np.abs(mass - above), np.abs(mass - below))
        apart[np.arange(start, len(x)) < first[rows, None]] = 0
        distances[k : k + step] = apart.max(1)
    return distances


def comes_nearer(sample: Sample, distance: float) -> bool:
    """Whether above some threshold the power law is nearer to the values than that.

    Most thresholds are ruled out by a few of the values, which are a bound from below.
    """
    fit = _fitted("power law", sample, thresholds_of(sample))
    rest = np.arange(len(fit.thresholds))
    for num in (SKETCHED, 8 * SKETCHED, len(sample.values)):  # the last at all of them
        rest = rest[_distances("power law", sample, fit, rest, 1 + (len(sample.values) - 1) // num) < distance]
    return len(rest) > 0


def thresholds_of(sample: Sample) -> Array:
    """Where a tail may begin: above are enough eigenvalues, known well enough; none if nothing is resolved."""
    x = np.unique(sample.values)
    # Above the largest is nothing to fit, however many are as large; of quadrature nodes a tail begins between two.
    x = x[:-1] if sample.error_above is None else np.sqrt(x[1:]) * np.sqrt(x[:-1])
    if not len(x):
        return x
    counts = _from_above(sample.counts)[np.searchsorted(sample.values, x)]
    x, counts = x[counts >= FEWEST], counts[counts >= FEWEST]
    most = NUM_THRESHOLDS if sample.error_above is None else NUM_BLURRED
    if len(x) > most:
        ranks = np.geomspace(counts[-1], counts[0], most)
        x = x[np.unique(len(x) - 1 - np.searchsorted(counts[::-1], ranks * (1 - 1e-12)))]
    if sample.error_above is None:
        return x
    counts = _from_above(sample.counts)[np.searchsorted(sample.values, x)]
    return x[_effective(sample, x, counts) >= FEWEST]


def power_law(sample: Sample, fit: Scan, confidence: float, num_draws: int, seed: int) -> PowerLaw:
    """The power law where it is nearest, against spectra drawn from it, each fitted with an x_min of its own."""
    best, distance = fit.best, float(fit.distances[fit.best])
    low, high = _interval(fit, confidence)
    nearer = sum(comes_nearer(drawn, distance) for drawn in _resampled(sample, fit, num_draws, seed))
    return PowerLaw(
        exponent=1 + float(fit.rates[best]),
        low=low,
        high=high,
        x_min=float(fit.thresholds[best]),
        num_tail=float(fit.counts[best]),
        effective=float(fit.effective[best]),
        distance=distance,
        p_value=(1 + num_draws - nearer) / (1 + num_draws),
        reach=fit.reach(fit.held("power law")),
    )


def _interval(fit: Scan, confidence: float) -> tuple[float, float]:
    """Of α: (α − 1)/(its estimate) of n draws is a mean of n exponential variables.

    At one x_min that interval covers too seldom: x_min has been chosen, and often lies where the law has not set in.
    """
    from scipy.special import gammaincinv  # noqa: PLC0415  (SciPy's import takes a while)

    wanted = fit.counts[fit.best] / np.array(PARTS)
    rows = np.abs(fit.counts[:, None] - wanted).argmin(0)
    sizes, rates = fit.effective[rows], fit.rates[rows]
    lows, highs = (rates * gammaincinv(sizes, (1 + sign * confidence) / 2) / sizes for sign in (-1, 1))
    return 1 + float(lows.min()), 1 + float(highs.max())


def _resampled(sample: Sample, fit: Scan, num: int, seed: int) -> Iterator[Sample]:
    """Spectra of as many eigenvalues as are effective: of the law from x_min on, of the values below it.

    Source: Clauset, Shalizi and Newman 2009, section 4.1.
    """
    rng, best = np.random.default_rng(seed), fit.best
    x_min, share = fit.thresholds[best], min(fit.counts[best] / sample.total, 1.0)
    size = max(FEWEST, round(float(fit.effective[best] / share)))
    body = sample.values < x_min
    shares = sample.counts[body] / max(float(sample.counts[body].sum()), np.finfo(float).tiny)
    for _ in range(num):
        num_tail = int(rng.binomial(size, share))
        drawn = x_min * np.exp(rng.exponential(1 / fit.rates[best], num_tail))
        if num_tail < size:
            drawn = np.concatenate([rng.choice(sample.values[body], size - num_tail, p=shares), drawn])
        yield Sample(np.sort(drawn), np.ones(size))


def compare(name: Other, sample: Sample, power: Scan, other: Scan) -> Alternative:
    """The alternative against the power law, both above the power law's x_min."""
    ratio, variance = _ratio(name, sample, power, power.best, other, power.best)
    if name == "exponential":
        p_value = math.erfc(abs(ratio) / math.sqrt(2 * variance)) if variance else 1.0
    else:  # at the edge of the family: half a χ² of one degree of freedom
        p_value = math.erfc(math.sqrt(-ratio)) / 2 if ratio < 0 else 1.0
    first = int(power.held("power law").argmax())  # 0 without any
    likely = [_ratio(name, sample, power, first, other, k)[0] <= ROUNDING for k in range(first + 1)]
    good = other.held(name)
    good[: first + 1] &= likely
    good[first + 1 :] = False
    return Alternative(name, ratio, p_value, other.reach(good))


def _ratio(name: Other, sample: Sample, power: Scan, here: int, other: Scan, below: int) -> tuple[float, float]:
    """Log-likelihood of the power law less that of another, fitted above a lower threshold, for those above `here`.

    And its variance, by Vuong (1989).
    """
    x_min, rate, num = (float(each[here]) for each in (power.thresholds, power.rates, power.effective))
    start = int(np.searchsorted(sample.values, x_min))
    x, shares = sample.values[start:], sample.counts[start:] / sample.counts[start:].sum()
    apart = math.log(rate) - rate * np.log(x / x_min) - _log_density(name, other, below, x, x_min)
    mean = float(shares @ apart)
    return num * mean, num * float(shares @ np.square(apart - mean))


def _from_above(values: Array) -> Array:
    """Sums of each and all after it, and 0."""
    return np.concatenate([values[::-1].cumsum()[::-1], [0.0]])


def _effective(sample: Sample, thresholds: Array, counts: Array) -> Array:
    """1/(1/n + e²), e the relative error of the count: scatter of draws, and of what is known of them."""
    if sample.error_above is None:
        return counts
    errors = np.array([sample.error_above(float(x)) for x in thresholds]) / counts
    return np.asarray(1 / (1 / counts + errors**2))


# A normal variable from h standard deviations above its mean on, t beyond: log-normal tails in t = log(x/x_min). As h
# grows it becomes exponential, which is the power law.


def _mills(h: Array) -> Array:
    """φ(h)/(1 − Φ(h)), the mean of a normal variable above h."""
    from scipy.special import log_ndtr  # noqa: PLC0415  (SciPy's import takes a while)

    return np.asarray(np.exp(-0.5 * h**2 - 0.5 * math.log(2 * math.pi) - log_ndtr(-h)))


@cache
def _heights() -> tuple[Array, Array]:
    """E t²/(E t)² by h, ascending from 1 to 2."""
    h = np.concatenate([-np.geomspace(1e3, 1, 257)[:-1], np.linspace(-1, 30, 1025)])
    mean = _mills(h) - h
    return (1 - h * mean) / mean**2, h


def _height(ratios: Array) -> Array:
    known, h = _heights()
    return np.where(ratios >= known[-1], math.inf, np.interp(ratios, known, h))


def _mass(scaled: Array, heights: Array) -> Array:
    """Distribution functions (k, n) at t in units of its mean."""
    mass = -np.expm1(-scaled)
    curved = np.isfinite(heights)
    if curved.any():
        from scipy.special import log_ndtr  # noqa: PLC0415  (SciPy's import takes a while)

        h = heights[curved][:, None]
        mass[curved] = -np.expm1(log_ndtr(-h - scaled[curved] * (_mills(h) - h)) - log_ndtr(-h))
    return np.asarray(mass)


def _log_density(name: Name, fit: Scan, k: int, x: Array, x_min: float) -> Array:
    """Of log x, for x ≥ x_min, of the law as fitted above threshold k, which is no larger."""
    rate, first = float(fit.rates[k]), float(fit.thresholds[k])
    if name == "exponential":
        return math.log(rate) - rate * (x - x_min) + np.log(x)
    scaled, begin = rate * np.log(x / first), rate * math.log(x_min / first)
    h = float(fit.heights[k])
    if math.isinf(h):
        return math.log(rate) - (scaled - begin)
    mean = float(_mills(np.array(h))) - h  # in standard deviations
    here = h + mean * begin
    hazard = float(_mills(np.array(here)))
    beyond = mean * (scaled - begin)
    return math.log(rate * mean * hazard) - beyond * (here + beyond / 2)

"""Whether the bulk of a spectrum is Marchenko-Pastur's, a semicircle or heavy-tailed, and how sure that is."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from deepspectra.analysis.bulk_laws import BulkLaw, Sample, fit_bulk_law
from deepspectra.analysis.tail_laws import (
    NO_POWER_LAW,
    Alternative,
    Other,
    PowerLaw,
    compare,
    power_law,
    scan,
    thresholds_of,
)
from deepspectra.argument_checks import check_count
from deepspectra.dataframes import Tabular, text_table
from deepspectra.errors import DataError, OptionError
from deepspectra.quadrature import ROUNDING, Density
from deepspectra.results import Eigenpairs, Provenance, Result

if TYPE_CHECKING:
    import pandas

Side = Literal["magnitude", "positive", "negative"]
Verdict = Literal[
    "Marchenko-Pastur",
    "semicircle",
    "power law",
    "exponential",
    "log-normal",
    "none of these",
    "undecided",
    "not resolved",
]

FURTHER = 2.25  # times the power law's reach at which another law holds and the power law does not
FEW, AS_FAR = 500, 1.6  # of so few eigenvalues, laws that reach so much further are not told from it; up to
SURE, ALMOST = 900, 2.1  # as many, such that reach so much further: those of log-normal draws often do
ALIKE = 0.9  # times the log-normal's reach at which the exponential, the simpler law, is taken
ENOUGH = 50  # effective eigenvalues that a power law is called on
ENOUGH_BLURRED = 100  # of quadrature nodes, above whose x_min a log-normal's curvature may hide
LEVEL = 0.005  # of the goodness of fit below which a power law is rejected
OTHERS: tuple[Other, ...] = ("exponential", "log-normal")
SIDES = {"magnitude": "x = |λ|", "positive": "x = λ > 0", "negative": "x = −λ > 0"}


class Exact(Protocol):
    """A result that holds all non-zero eigenvalues, such as `GramSpectrum`."""

    @property
    def values(self) -> Tensor:
        """The eigenvalues."""


@dataclass(frozen=True, repr=False)
class Tail(Result, Tabular):
    """The laws of a spectrum's bulk and tail, and which of them holds.

    Attributes:
        side: "magnitude" | "positive" | "negative": x = |λ|, λ or −λ is what is judged.
        verdict: "Marchenko-Pastur" | "semicircle" | "power law" | "exponential" | "log-normal" | "none of these" |
            "undecided" | "not resolved".
        why: the verdict in words.
        num: eigenvalues judged.
        num_zero: left out because they are zero up to rounding.
        num_above: left out as outliers, larger than `above`.
        power_law: fitted to the tail; its numbers are NaN where nothing is resolved.
        alternatives: "exponential" and "log-normal" → how they compare with it.
        bulk_laws: "Marchenko-Pastur" (where all that is judged has one sign) and "semicircle" → their fits.
        resolved_from: the smallest x from which on a tail is known well enough to be judged; ∞ if there is none.
        confidence: of the interval of α.
    """

    side: Side
    verdict: Verdict
    why: str
    num: float
    num_zero: float
    num_above: float
    power_law: PowerLaw
    alternatives: Mapping[str, Alternative]
    bulk_laws: Mapping[str, BulkLaw]
    resolved_from: float
    confidence: float

    def to_dataframe(self) -> pandas.DataFrame:
        """One row: side, verdict and the numbers of the power law."""
        import pandas  # noqa: PLC0415  (its import takes a while)

        return pandas.DataFrame([{"side": self.side, "verdict": self.verdict, **asdict(self.power_law)}])

    def __str__(self) -> str:
        rows = []
        law = self.power_law
        if self.alternatives:
            words = f"α = {law.exponent:.3g} in [{law.low:.3g}, {law.high:.3g}] from x = {law.x_min:.3g}"
            rows.append(_row("power law", words, law.reach, law.distance, law.p_value))
        for name, other in self.alternatives.items():
            words = f"log-likelihood {-other.ratio:+.3g} there"
            rows.append(_row(name, words, other.reach, math.nan, other.p_value))
        for name, bulk in self.bulk_laws.items():
            words = f"on [{bulk.low:.3g}, {bulk.high:.3g}]"
            if name == "Marchenko-Pastur":
                words = f"σ² = {bulk.centre:.3g}, γ = {bulk.ratio:.3g}, {words}"
            rows.append(_row(name, words, bulk.num_inside, bulk.distance, bulk.p_value))
        return text_table(
            ("", "covers", "distance", "p"),
            rows,
            f"tail of {self.provenance.operator}, {SIDES[self.side]}: {self.num:,.0f} eigenvalues judged, "
            f"{self.num_zero:,.0f} zeros and {self.num_above:,.0f} outliers left out, {self.seconds:.3g} s",
            f"{self.verdict}: {self.why}",
        )


def _row(name: str, words: str, covers: float, *numbers: float) -> tuple[str | float, ...]:
    return f"{name:<17} {words}", f"{covers:,.0f}", *numbers


def tail(
    spectrum: Tensor | Density | Exact,
    *,
    side: Side = "magnitude",
    above: float = math.inf,
    confidence: float = 0.95,
    num_draws: int = 200,
    seed: int = 0,
) -> Tail:
    """Which law the bulk of a spectrum follows: Marchenko-Pastur's, the semicircle, a power law, or a lighter tail.

    A bulk law is fitted by its first two moments to what lies inside its support, and is accepted if no more than 5 %
    of the eigenvalues lie outside, 50 or more inside, and it is nowhere further off than .02, or than chance makes it
    at 1 %: eigenvalues of a random matrix repel each other, so that chance is (.13 + .42 log n)/n, not 1/√n.

    Otherwise the tail is judged. The power law is fitted by maximum likelihood above the x_min where it is nearest,
    and rejected if fewer than .5 % of the spectra drawn from it are as far from their own fits. Each law has a reach:
    how many of the largest eigenvalues it is not rejected for. Above a high enough x_min much looks like a power law:
    an exponential or a log-normal that reaches 2.25 times as far is taken instead. Draws are independent, and
    eigenvalues scatter no more than draws: p is too large for them rather than too small. Where a
    log-normal reaches 2.1 times as far, and of fewer than 500 eigenvalues 1.6 times, the two are not told apart:
    "undecided". Log-normal draws are called a power law in 4 % of cases from 700 eigenvalues on, 10 % at 600, 17 % at
    500, 2 % at 400: compare the reaches.

    Quadrature nodes enter with their weights, at an effective number of eigenvalues: 1/(1/n + e²) with e the relative
    error of the count above x_min, from probes and resolution (`Density.count_above`). Where that is below 25 nothing
    is fitted, below 50 nothing judged, below 100 no power law called, and nothing while a law of the bulk may hold
    for all that is known of the distribution; it is taken to hold only if that is known to .04.

    Args:
        spectrum: all eigenvalues (n,), a result that holds them as `values`, or a `Density`.
        side: judge |λ|, or the positive or the negative eigenvalues. The semicircle is always fitted to both signs.
        above: leave out what is larger, as outliers. It should lie in a gap: a power law cut off is none.
        confidence: of the interval of α, each of the three that it spans.
        num_draws: spectra drawn for the goodness of fit; fewer than 200 reject nothing.
        seed: of the draws.

    Raises:
        OptionError: an option out of range.
        DataError: no eigenvalues on that side, not finite ones, or only the largest (`Eigenpairs`).

    Cost: 3 times 128 n exponentials, and num_draws times about 10 n and a sort: a second for 4,000 eigenvalues. No
    products.

    Source: Clauset, Shalizi and Newman 2009, SIAM Review 51(4): x_min, fit, goodness of fit, likelihood ratios.
    Departures: (1) the interval spans those of the fits to the tail, its upper half and quarter, since that of
    the tail alone covers too seldom, x_min being chosen; (2) reach, since above the x_min of a power law log-normals
    pass for one more often than not; (3) weights; (4) the log-normals have the power law as their limit and
    are compared as such (Malevergne, Pisarenko and Sornette 2011).
    """
    began = time.perf_counter()
    _check(side, confidence, num_draws)
    signed, provenance = _read(spectrum)
    rounding = _rounding(signed, provenance)
    if len(signed.values) and np.ptp(signed.values) <= rounding:
        raise DataError(f"all {signed.total:,.0f} eigenvalues are {signed.values[0]:.6g}: there is no tail to judge.")
    live = signed.where(np.abs(signed.values) > rounding)
    every = _seen_from(live, side)
    # What differs by rounding are copies of one eigenvalue, and no tail.
    sample = every.where(every.values <= above).merged(rounding)
    two_sided = live.where(np.abs(live.values) <= above).merged(rounding)
    if not len(sample.values):
        raise DataError(
            f"no eigenvalue with {SIDES[side]} is left up to above={above:.3g}, and none but zeros without it. "
            "Choose another side, or raise `above`."
        )
    bulk_laws = {"semicircle": fit_bulk_law("semicircle", two_sided)}
    if side != "magnitude" or two_sided.values[0] > 0 or two_sided.values[-1] < 0:
        bulk_laws = {"Marchenko-Pastur": fit_bulk_law("Marchenko-Pastur", sample), **bulk_laws}
    thresholds = thresholds_of(sample)
    law = NO_POWER_LAW
    alternatives: dict[str, Alternative] = {}
    if len(thresholds):
        fit = scan("power law", sample, thresholds)
        law = power_law(sample, fit, confidence, num_draws, seed)
        alternatives = {name: compare(name, sample, fit, scan(name, sample, thresholds)) for name in OTHERS}
    verdict, why = _judge(sample.total, bulk_laws, law, alternatives)
    return Tail(
        side=side,
        verdict=verdict,
        why=why,
        num=sample.total,
        num_zero=signed.total - live.total,
        num_above=every.total - sample.total,
        power_law=law,
        alternatives=alternatives,
        bulk_laws=bulk_laws,
        resolved_from=float(thresholds[0]) if len(thresholds) else math.inf,
        confidence=confidence,
        seconds=time.perf_counter() - began,
        provenance=provenance,
    )


def _check(side: str, confidence: float, num_draws: int) -> None:
    if side not in SIDES:
        raise OptionError(f"side must be one of {', '.join(SIDES)}; got {side!r}.")
    if not 0 < confidence < 1:
        raise OptionError(f"confidence must lie between 0 and 1; got {confidence!r}.")
    check_count("num_draws", num_draws)


def _read(spectrum: Tensor | Density | Exact) -> tuple[Sample, Provenance]:
    """The eigenvalues of both signs, ascending."""
    if isinstance(spectrum, Eigenpairs):
        raise DataError(
            "eigenpairs hold the ends of a spectrum, and a tail is judged against all of it. Pass all eigenvalues, "
            "or a density."
        )
    if isinstance(spectrum, Density):
        nodes, order = spectrum.nodes.sort()
        counts = spectrum.weights[order] * spectrum.size
        blurred = spectrum if bool((spectrum.probes >= 0).any()) else None
        return Sample(nodes.numpy(), counts.numpy(), _error_above(blurred) if blurred else None), spectrum.provenance
    values = spectrum if isinstance(spectrum, Tensor) else spectrum.values
    if values.dim() != 1 or not values.is_floating_point() or not bool(values.isfinite().all()):
        raise DataError(
            f"eigenvalues must be finite floating-point numbers of shape (n,); got {values.dtype} of shape "
            f"{tuple(values.shape)}, {int(values.isfinite().sum())} of them finite."
        )
    known = None if isinstance(spectrum, Tensor) else getattr(spectrum, "provenance", None)
    found = values.detach().double().cpu().sort().values.numpy()
    return Sample(found, np.ones(len(found))), known or Provenance.of(values, "eigenvalues")


def _rounding(signed: Sample, provenance: Provenance) -> float:
    """Up to which size an eigenvalue is zero, for its rounding is as large.

    That of nodes does not grow with P, and that of a dense matrix's eigenvalues, by a norm of errors that are
    independent of each other, as √n; n ε, the bound of a rank, would be far too much.
    """
    units = ROUNDING if signed.error_above else max(ROUNDING, math.sqrt(len(signed.values)))
    epsilon = torch.finfo(getattr(torch, provenance.dtype)).eps
    return float(units * epsilon * np.abs(signed.values).max(initial=0.0))


def _error_above(density: Density) -> Callable[[float], float]:
    return cache(lambda x: density.count_above(x)[1])  # dear, and each law asks for it


def _seen_from(signed: Sample, side: Side) -> Sample:
    """X = |λ|, λ or −λ, where positive, ascending."""
    error = signed.error_above
    if side == "positive":
        return signed.where(signed.values > 0)
    mirrored = Sample(-signed.values[::-1], signed.counts[::-1], error and (lambda x: error(-x)))
    if side == "negative":
        return mirrored.where(mirrored.values > 0)
    order = np.abs(signed.values).argsort()
    both = error and (lambda x: error(x) + error(-x))
    return Sample(np.abs(signed.values)[order], signed.counts[order], both)


def _judge(
    total: float, bulk_laws: Mapping[str, BulkLaw], law: PowerLaw, others: Mapping[str, Alternative]
) -> tuple[Verdict, str]:
    """The verdict, and in words with numbers why."""
    accepted = [bulk for bulk in bulk_laws.values() if bulk.accepted]
    if accepted:
        return _bulk_verdict(min(accepted, key=lambda bulk: bulk.distance))
    more = "Spend more steps or probes, or take all eigenvalues."
    for bulk in bulk_laws.values():
        if bulk.possible:
            known = f"off by {bulk.distance:.2g}, and known to {bulk.resolved:.2g} only"
            return "not resolved", f"it may be the law {bulk.name}, {known}. {more}"
    if not others or law.effective < ENOUGH > law.effective * law.reach / law.num_tail:
        words = f"of {total:,.0f} eigenvalues no tail is known as well as {ENOUGH} of them would tell it"
        return "not resolved", f"{words}. {more}"
    return _tail_verdict(total, law, others)


def _bulk_verdict(bulk: BulkLaw) -> tuple[Verdict, str]:
    chance = "" if math.isnan(bulk.p_value) else f", as a random matrix is with p = {bulk.p_value:.2g}"
    known = f", known to {bulk.resolved:.2g}" if bulk.resolved else ""
    return bulk.name, (
        f"the distribution of {bulk.num_inside:,.0f} eigenvalues is nowhere further off than {bulk.distance:.2g}"
        f"{known}{chance}; {bulk.num_outside:,.0f} lie outside of [{bulk.low:.3g}, {bulk.high:.3g}]."
    )


def _tail_verdict(total: float, law: PowerLaw, others: Mapping[str, Alternative]) -> tuple[Verdict, str]:
    """Among the power law and lighter ones: by how far each of them reaches."""
    exponential, rival = others["exponential"], others["log-normal"]
    power = (
        f"a power law of α = {law.exponent:.3g} in [{law.low:.3g}, {law.high:.3g}] holds for the largest "
        f"{law.reach:,.0f} of {total:,.0f} eigenvalues (p = {law.p_value:.2g})"
    )
    beside = f"an exponential does for {exponential.reach:,.0f}, a log-normal for {rival.reach:,.0f}"
    if exponential.reach >= ALIKE * rival.reach:
        rival = exponential
    if rival.reach >= max(FURTHER * law.reach, ENOUGH):
        return rival.name, f"it holds for the largest {rival.reach:,.0f}; {power}."
    if law.p_value < LEVEL or not law.reach:
        return "none of these", f"{power}; {beside}; no law of a bulk is near."
    as_far = AS_FAR if total < FEW else ALMOST if total < SURE else FURTHER
    if exponential.reach >= law.reach or rival.reach >= as_far * law.reach:
        return "undecided", f"{power}; {beside}: they are not told apart."
    if law.effective < min(law.num_tail, ENOUGH_BLURRED):
        few = f"what is known of its tail says no more than {law.effective:,.0f} eigenvalues would"
        return "undecided", f"{power}; {beside}; {few}."
    if total >= SURE:
        return "power law", f"{power}; {beside}."
    doubt = f"Of {total:,.0f} eigenvalues a log-normal is taken for one in up to a sixth of the cases."
    return "power law", f"{power}; {beside}. {doubt}"

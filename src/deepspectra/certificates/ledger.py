"""The account of a bound: every nat that it is charged, and the bound computed from nothing else.

A PAC-Bayes bound holds for one prior that was fixed before the data were seen. Whatever else is to hold with it
(another prior scale, another candidate, another event) must be paid for by a union bound; what is not entered here
was not paid.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from deepspectra.argument_checks import check_number
from deepspectra.certificates.binomial_bounds import BOUNDS, check_delta
from deepspectra.dataframes import text_table
from deepspectra.errors import OptionError

FORMS = ("maurer", "langford")


@dataclass(frozen=True)
class Grid:
    """Prior variances λ_j = c · exp(−j/b), j = 1, 2, …, of which each has a share 6/(π² j²) of δ.

    Source: Langford and Caruana 2001; Dziugaite and Roy 2017, arXiv 1703.11008, section 3.1. Departure: j ≥ 1 is
    enforced; code of the time let λ reach c and so subtracted nats that nobody had. By default steps are of a quarter
    in log λ, and not of a hundredth: a place then costs some 8 nats in place of 15.
    """

    precision: float = 4.0  # b
    largest: float = 100.0  # c

    def __post_init__(self) -> None:
        check_number("precision", self.precision, 0)
        check_number("largest", self.largest, 0)

    def nearest(self, variance: float) -> int:
        """The j whose λ_j is nearest in ratio, at least 1."""
        return max(1, round(self.precision * math.log(self.largest / variance)))

    def variance(self, place: int) -> float:
        """λ_j."""
        return self.largest * math.exp(-place / self.precision)

    def nats(self, place: float) -> float:
        """log(π² j²/6), what λ_j costs.

        Raises:
            OptionError: j < 1, which is no place of the grid.
        """
        if not place >= 1:
            raise OptionError(
                f"j={place:.3g} is no place of the grid: λ must be at most {self.variance(1):.6g}. "
                "Take a grid with a larger c."
            )
        return 2 * math.log(place) + math.log(math.pi**2 / 6)


@dataclass(frozen=True)
class Ledger:
    """What a bound on n examples is charged, in nats, and the probabilities with which its parts may fail.

    Attributes:
        num_examples: n, on which the error is measured and of which the prior knows nothing.
        delta: probability that the PAC-Bayes bound fails.
        divergence: name of a layer → KL of its posterior from its prior.
        charges: what it is for → nats, of union bounds.
        others: name of another event that must not fail → its probability.
        seeds: name → seed, of what was drawn.
        form: "maurer", (KL + log(2√n/δ))/n, or "langford", (KL + log(n/δ))/(n − 1).
        bound: "kl" | "quadratic" | "lambda".
    """

    num_examples: int
    delta: float = 0.025
    divergence: Mapping[str, float] = field(default_factory=dict)
    charges: Mapping[str, float] = field(default_factory=dict)
    others: Mapping[str, float] = field(default_factory=dict)
    seeds: Mapping[str, int] = field(default_factory=dict)
    form: str = "maurer"
    bound: str = "kl"

    def __post_init__(self) -> None:
        check_delta("delta", self.delta)
        if self.form not in FORMS or self.bound not in BOUNDS:
            raise OptionError(
                f"form={self.form!r} and bound={self.bound!r}; expected one of {', '.join(FORMS)} and of "
                f"{', '.join(BOUNDS)}."
            )
        negative = [name for name, nats in {**self.divergence, **self.charges}.items() if not nats >= 0]
        if negative:
            raise OptionError(f"{', '.join(negative)}: nats of a ledger must be at least 0.")

    def charged(self, what: str, nats: float) -> Ledger:
        """With one more term of a union bound."""
        if what in self.charges:
            raise OptionError(f"{what!r} is in the ledger already.")
        return replace(self, charges={**self.charges, what: nats})

    def tried(self, what: str, num: int) -> Ledger:
        """With log(num), for a choice among so many priors that was made with the data of the bound in sight."""
        if num < 1:
            raise OptionError(f"{what}: {num} were tried; expected at least 1.")
        return self.charged(f"{what}, {num} tried", math.log(num))

    def must_hold(self, event: str, delta: float) -> Ledger:
        """With another event, which fails with probability δ at most."""
        check_delta("delta", delta)
        return replace(self, others={**self.others, event: delta})

    @property
    def confidence(self) -> float:
        """1 less all δ: with which everything holds at once."""
        return 1 - self.delta - sum(self.others.values())

    @property
    def total_divergence(self) -> float:
        """KL(Q ‖ P), nats."""
        return math.fsum(self.divergence.values())

    @property
    def nats_an_example(self) -> float:
        """c, what the bound allows between the observed and the true risk."""
        n, paid = self.num_examples, self.total_divergence + math.fsum(self.charges.values())
        if self.form == "maurer":
            return (paid + math.log(2 * math.sqrt(n) / self.delta)) / n
        return (paid + math.log(n / self.delta)) / (n - 1)

    def certified(self, risk: float) -> float:
        """The upper bound on the true risk, where the empirical one is at most `risk`."""
        return BOUNDS[self.bound](risk, self.nats_an_example)

    def rows(self) -> list[tuple[str, float]]:
        """What is charged, in nats, the price of confidence last."""
        n = self.num_examples
        sure = 2 * math.sqrt(n) if self.form == "maurer" else n
        name = "log(2√n/δ)" if self.form == "maurer" else "log(n/δ)"
        kl = [(f"KL of {layer}", nats) for layer, nats in self.divergence.items()]
        return [*kl, *self.charges.items(), (name, math.log(sure / self.delta))]

    def __str__(self) -> str:
        held = ", ".join(f"{name} {delta:g}" for name, delta in {"bound": self.delta, **self.others}.items())
        seeds = ", ".join(f"{name} {seed}" for name, seed in self.seeds.items())
        return text_table(
            ("charged", "nats"),
            self.rows(),
            f"{self.nats_an_example:.4g} nats an example ({self.num_examples:,} of them); may fail: {held}; "
            f"all hold with probability {self.confidence:.4g}" + (f"; seeds: {seeds}" if seeds else ""),
        )

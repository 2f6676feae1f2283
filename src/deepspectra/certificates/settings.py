"""How a posterior is found and certified, and the published ways to find one."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from deepspectra.argument_checks import check_choice, check_count, check_number
from deepspectra.certificates.binomial_bounds import BOUNDS, check_delta
from deepspectra.certificates.posterior import BASES, SIDES
from deepspectra.errors import OptionError

LOSSES = ("error", "log", "cross_entropy")
STARTS = ("prior", "trained")
NUM_STEPS = 5000
SMALLEST_BATCH, LARGEST_BATCH = 50, 500
WARM_UP = {2: 0.03}  # share of the epochs, by the number of classes;
WARM_UP_OF_MANY = 0.3  # of more
# Wu et al. 2020, arXiv 2010.04261, section 6 and algorithm 1: from trained weights, the cross-entropy of a draw plus
# the square root of the complexity, variances that begin at the squared weights. "Base": of the weights themselves;
# "Appr": in the basis of the trained weights; "Iter": in one found anew, whose variances keep their places; "Iter.M":
# the same with the outputs' factor in closed form.
_PUBLISHED: dict[str, Any] = {
    "start": "trained",
    "loss": "cross_entropy",
    "warm_up": 0.0,
    "num_directions": 10**9,
    "transports": False,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "base": _PUBLISHED | {"basis": "standard", "refreshes": ()},
    "appr": _PUBLISHED | {"basis": "kfac", "sides": "both", "refreshes": ()},
    "iter": _PUBLISHED | {"basis": "kfac", "sides": "both", "refreshes": tuple(k / 10 for k in range(1, 10))},
    "iter.m": _PUBLISHED
    | {"basis": "closed_form", "sides": "both", "refreshes": tuple(k / 10 for k in range(1, 10))},
}


@dataclass(frozen=True)
class Settings:
    """How a posterior is found and certified; none of this touches the validity of the bound.

    Attributes:
        basis: of the posterior's variances: "ekfac", "kfac" or "standard" (the weights' own); "closed_form" is
            "kfac" with the outputs' factor of a ReLU network from its weights alone.
        sides: of the layers that are turned, "inputs" (U_A) or "both" (U_S too, which costs a product a layer).
        bound: "kl", or the weaker "quadratic" and "lambda".
        loss: what is minimised in the end: "error", the 0-1 loss integrated given the last features; its "log"; or
            the "cross_entropy" of a draw, at the price of the square-root bound.
        start: of the posterior's mean: the "prior", or "trained" from there on the cross-entropy.
        epochs: passes of descent over the examples of the bound; by default so many that they are 5,000 steps.
        warm_up: share of the epochs in which the log loss is minimised at a price of 1/n a nat; by default a few
            hundredths of them for two classes and a third for more, which begin farther from any good error.
        batch_size: examples a step; by default a hundredth of all, between 50 and 500.
        rate: first step of the means, in standard deviations of the prior; of log variances it is 2.5 times that.
        refreshes: shares of the epochs after which the basis is that of the network as it then is.
        transports: variances are carried over when the basis changes, or else keep their places.
        num_directions: of the first layer's inputs that are kept, if these are the examples' own.
        num_curvature: examples from which the basis is found.
        passes: over the examples, for the Monte-Carlo estimate of the posterior's error.
        delta, monte_carlo_delta, disagreement_delta: with what probability each part may fail.
        minutes: to stop descent after; None for all epochs.
    """

    basis: str = "ekfac"
    sides: str = "inputs"
    bound: str = "kl"
    loss: str = "error"
    start: str = "prior"
    epochs: int | None = None
    warm_up: float | None = None
    batch_size: int | None = None
    rate: float = 0.02
    refreshes: tuple[float, ...] = (0.03, 0.1, 0.3, 0.6)
    transports: bool = True
    num_directions: int = 128
    num_curvature: int = 4000
    passes: int = 30
    delta: float = 0.025
    monte_carlo_delta: float = 0.01
    disagreement_delta: float = 0.01
    minutes: float | None = None

    def __post_init__(self) -> None:
        for name, choices in (
            ("basis", BASES),
            ("sides", SIDES),
            ("bound", tuple(BOUNDS)),
            ("loss", LOSSES),
            ("start", STARTS),
        ):
            check_choice(name, getattr(self, name), choices)
        for name in ("epochs", "batch_size", "num_directions", "num_curvature", "passes"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), 0 if name == "epochs" else 1)
        for name in ("delta", "monte_carlo_delta", "disagreement_delta"):
            check_delta(name, getattr(self, name))
        if not self.delta + self.monte_carlo_delta + self.disagreement_delta < 1:
            raise OptionError("delta, monte_carlo_delta and disagreement_delta must sum to less than 1.")
        check_number("rate", self.rate, 0)
        if self.minutes is not None:
            check_number("minutes", self.minutes, 0)
        if self.warm_up is not None and self.warm_up not in (0, 1):
            check_number("warm_up", self.warm_up, 0, 1)
        if not isinstance(self.refreshes, (tuple, list)):
            raise OptionError(f"refreshes={self.refreshes!r}; expected shares of the epochs, such as (0.1, 0.3).")
        for share in self.refreshes:
            check_number("each of refreshes", share, 0, 1)
        if not isinstance(self.transports, bool):
            raise OptionError(f"transports={self.transports!r}; expected True or False.")

    @classmethod
    def of(cls, variant: str | None = None, **options: Any) -> Settings:
        """These options, over those of a published variant if one is named.

        Raises:
            OptionError: no such variant or option, or a value out of range.
        """
        known = {one.name for one in fields(cls)}
        if unknown := [name for name in options if name not in known]:
            raise OptionError(
                f"{', '.join(unknown)}: no such setting; there are variant, {', '.join(sorted(known))}."
            )
        if variant is not None:
            check_choice("variant", variant, tuple(VARIANTS))
            options = VARIANTS[variant] | options
        return cls(**options)

    @classmethod
    def asked(cls, **options: Any) -> dict[str, Any]:
        """Those of these options that are not None, as `of` takes them.

        Raises:
            OptionError: see `of`; before a network is trained for them.
        """
        settings = {name: value for name, value in options.items() if value is not None}
        cls.of(**settings)
        return settings

    def sentences(self, prior: str) -> list[str]:
        """What these settings make of the posterior about a prior of this kind, and what not."""
        found = []
        if self.start == "trained":
            basis = "the weights themselves" if self.basis == "standard" else "the curvature's eigenbasis"
            found.append(
                "The posterior starts at trained weights and pays for their distance from the prior; its variances "
                f"are along {basis}."
            )
        if self.loss == "cross_entropy":
            found.append(
                "It minimises the cross-entropy of a draw and the square root of its complexity, as published, and "
                "not the bound; descent on the bound itself is the default."
            )
        elif prior != "learnt":
            found.append(
                "The posterior minimises the bound, not the error: it stays as near to its prior as it can afford, "
                "and a network trained for its error errs less."
            )
        return found

    def batch_size_of(self, num_examples: int) -> int:
        """Examples a step."""
        return self.batch_size or min(LARGEST_BATCH, max(SMALLEST_BATCH, num_examples // 100))

    def epochs_of(self, num_examples: int) -> int:
        """Passes over the examples."""
        if self.epochs is not None:
            return self.epochs
        return math.ceil(NUM_STEPS / math.ceil(num_examples / self.batch_size_of(num_examples)))

    def refreshed(self, num_epochs: int) -> set[int]:
        """After how many epochs of so many the basis is found anew."""
        after = {max(1, round(share * num_epochs)) for share in self.refreshes}
        return {epoch for epoch in after if epoch < num_epochs}

    def warm_up_of(self, num_classes: int) -> float:
        """The share of epochs with the log loss."""
        return WARM_UP.get(num_classes, WARM_UP_OF_MANY) if self.warm_up is None else self.warm_up

"""Descent on a PAC-Bayes bound, over the posterior's means and variances and the prior's scales."""

from __future__ import annotations

import math
import time

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from deepspectra.argument_checks import LayerProgress, check_choice, check_count, seeded
from deepspectra.certificates.binomial_bounds import BOUNDS, check_delta, price
from deepspectra.certificates.ledger import Ledger
from deepspectra.certificates.losses import error_probability, log_loss
from deepspectra.certificates.networks import Examples, GaussianNetwork
from deepspectra.certificates.posterior import (
    BASES,
    SIDES,
    closed_form,
    coordinates,
    drawn_problem,
    take,
)
from deepspectra.certificates.priors import Store
from deepspectra.certificates.stochastic_layers import PooledDraws
from deepspectra.errors import OptionError
from deepspectra.problem.problem import Problem

LOSSES = ("error", "log")
SMOOTHING = 0.98  # of the running estimate of the risk
RAMP = 50  # steps over which the step sizes rise
EXPECTED = 40.0  # nats of a ledger beside the divergence: what the price of a nat is figured with


@dataclass(frozen=True)
class Settings:
    """How a posterior is found and certified; none of this touches the validity of the bound.

    Attributes:
        basis: of the posterior's variances: "ekfac", "kfac" or "standard" (the weights' own).
        sides: of the layers that are turned, "inputs" (U_A) or "both" (U_S too, which costs a product a layer).
        bound: "kl", or the weaker "quadratic" and "lambda".
        loss: what is minimised in the end: "error", the 0-1 loss integrated given the last features, or its "log".
        epochs: passes of descent over the examples of the bound.
        warm_up: share of the epochs in which the log loss is minimised at a price of 1/n a nat.
        batch_size: examples a step.
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
    epochs: int = 40
    warm_up: float = 0.3
    batch_size: int = 500
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
        ):
            check_choice(name, getattr(self, name), choices)
        for name in ("epochs", "batch_size", "num_directions", "num_curvature", "passes"):
            check_count(name, getattr(self, name), 0 if name == "epochs" else 1)
        for name in ("delta", "monte_carlo_delta", "disagreement_delta"):
            check_delta(name, getattr(self, name))
        if self.minutes is not None and not self.minutes > 0:
            raise OptionError(f"minutes={self.minutes!r} must be positive, or None.")


@dataclass
class Descent:
    """One descent, epoch by epoch; kept after each, and taken up where it was left.

    Attributes:
        network: that is changed.
        plain: a network of the same layers, with plain weights.
        examples: of the bound.
        problem: whose data and memory the curvature's problems take.
        ledger: n, and the bound.
    """

    network: GaussianNetwork
    plain: nn.Module
    examples: Examples
    problem: Problem
    ledger: Ledger
    settings: Settings
    seed: int
    curve: list[tuple[float, float]] = field(default_factory=list)  # (risk, KL) of each epoch
    risk: float = 0.5

    def run(self, store: Store | None, name: str, progress: LayerProgress | None) -> None:
        """All epochs, or as many as there are minutes for: then the steps shrink sooner, and end as small."""
        settings, began = self.settings, time.perf_counter()
        epoch, num_epochs, spent = 0, settings.epochs, 0.0
        kept = store.read(name) if store is not None else None
        if kept is not None:
            epoch, num_epochs, spent = kept["epoch"], kept["num_epochs"], kept["seconds"]
            self.curve, self.risk = [tuple(one) for one in kept["curve"]], kept["risk"]
            self.network.restore(kept["network"])
        else:
            self.refresh(0)
        inputs = self.network.prepared(self.examples.inputs)
        optimizer = self._optimizer()
        if kept is not None:
            optimizer.load_state_dict(kept["optimizer"])
        while epoch < num_epochs:
            if epoch and any(epoch == max(1, round(share * num_epochs)) for share in settings.refreshes):
                self.refresh(epoch)
                optimizer = self._optimizer()
            if progress is not None:
                progress(epoch, num_epochs, self._status(name))
            self._epoch(inputs, optimizer, epoch, num_epochs)
            epoch += 1
            elapsed = spent + time.perf_counter() - began
            num_epochs = self._in_time(epoch, num_epochs, elapsed)
            if store is not None:
                store.write(
                    name,
                    {
                        "epoch": epoch,
                        "num_epochs": num_epochs,
                        "seconds": elapsed,
                        "curve": list(self.curve),
                        "risk": self.risk,
                        "network": self.network.state(),
                        "optimizer": optimizer.state_dict(),
                    },
                )

    def refresh(self, epoch: int) -> None:
        """Turn to the coordinates of the network as it is; at first, with the variances of the quadratic model."""
        chosen = torch.randperm(len(self.examples), generator=seeded(self.seed + epoch))
        some = self.examples.some(chosen[: self.settings.num_curvature].sort().values)
        if epoch:
            problem = drawn_problem(self.network, self.plain, some, self.problem)
        else:
            problem = Problem(self.plain, (some.inputs, some.labels), memory=self.problem.memory)
        found = coordinates(problem, self.network, self.settings.basis, self.settings.sides)
        if epoch:  # inputs stay what they are, and what was prepared of them
            found = {name: one for name, one in found.items() if name != self.network.first}
        ranked = {name: layer.log_ratio.detach().clone() for name, layer in self.network.layers.items()}
        take(self.network, found, self.settings.num_directions)
        if not epoch:
            closed_form(self.network, found, len(self.examples) / 10)
        elif not self.settings.transports:
            for name in found:
                self.network.layers[name].log_ratio.data.copy_(ranked[name])

    def _optimizer(self) -> torch.optim.Optimizer:
        layers, rate = self.network.layers.values(), self.settings.rate
        groups = [
            {"params": [layer.mean for layer in layers], "rate": rate},
            {"params": [layer.log_ratio for layer in layers], "rate": 2.5 * rate},
            {"params": [layer.log_scale for layer in layers], "rate": rate},
        ]
        return torch.optim.Adam(groups, lr=rate)

    def _epoch(self, inputs: Tensor, optimizer: torch.optim.Optimizer, epoch: int, num_epochs: int) -> None:
        settings, n = self.settings, len(self.examples)
        seed = self.seed * 1000 + epoch
        self.network.draw_from(PooledDraws(seed))
        order = torch.randperm(n, generator=seeded(seed)).split(settings.batch_size)
        total, divergence = 0.0, 0.0
        for step, chosen in enumerate(order):
            done = (epoch + step / len(order)) / num_epochs
            ramp = min(1.0, (epoch * len(order) + step + 1) / RAMP)
            for group in optimizer.param_groups:
                group["lr"] = group["rate"] * ramp * (1 + math.cos(math.pi * done)) / 2
            errors = error_probability(self.network.outputs(inputs[chosen]), self.examples.labels[chosen])
            divergences = sum(layer.divergence(errors.dtype) for layer in self.network.layers.values())
            assert isinstance(divergences, Tensor)
            divergence, mean = float(divergences.detach()), errors.mean()
            if done < settings.warm_up or settings.loss == "log":
                value = log_loss(errors).mean() + divergences / n
            else:
                nats = (divergence + EXPECTED) / n
                value = mean + price(settings.bound, self.risk, nats, n) * divergences
            optimizer.zero_grad()
            value.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total += float(mean.detach()) * len(chosen)
            self.risk = SMOOTHING * self.risk + (1 - SMOOTHING) * float(mean.detach())
        self.curve.append((total / n, divergence))

    def _in_time(self, epoch: int, num_epochs: int, seconds: float) -> int:
        """How many epochs there will be, at the pace so far."""
        if self.settings.minutes is None:
            return num_epochs
        return max(epoch, min(num_epochs, int(60 * self.settings.minutes / (seconds / epoch))))

    def _status(self, name: str) -> str:
        if not self.curve:
            return name
        risk, divergence = self.curve[-1]
        bound = BOUNDS[self.settings.bound](risk, (divergence + EXPECTED) / len(self.examples))
        return f"{name}: error {risk:.3f}, KL {divergence:.0f}, about {bound:.3f}"

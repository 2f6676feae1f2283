"""Descent on a PAC-Bayes bound, over the posterior's means and variances and the prior's scales."""

from __future__ import annotations

import copy
import functools
import math
import time
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from deepspectra.argument_checks import LayerProgress, seeded
from deepspectra.certificates.binomial_bounds import BOUNDS, price
from deepspectra.certificates.ledger import Grid
from deepspectra.certificates.losses import error_probability, log_loss
from deepspectra.certificates.networks import Examples, GaussianNetwork
from deepspectra.certificates.posterior import (
    closed_form,
    coordinates,
    drawn_problem,
    squared_weights,
    take,
)
from deepspectra.certificates.priors import Store, learn
from deepspectra.certificates.settings import Settings
from deepspectra.certificates.stochastic_layers import Draws, PooledDraws
from deepspectra.problem.memory_budget import measured, refuse_beyond, share
from deepspectra.problem.problem import Problem

SMOOTHING = 0.98  # of the running estimate of the risk
TRAINING_EPOCHS = 5  # of a posterior that starts at a trained network
SETTLED = 0.7  # share of the epochs after which λ stays on its grid
POOL = 4  # times the examples of a basis, from which they are drawn in proportion to p (1 − p) of the error, and
CERTAIN = 0.003  # where there is no doubt
RAMP = 50  # steps over which the step sizes rise
EXPECTED = 40.0  # nats of a ledger beside the divergence: what the price of a nat is figured with


@dataclass
class Descent:
    """One descent, epoch by epoch; kept after each, and taken up where it was left.

    Attributes:
        network: that is changed.
        plain: a network of the same layers, with plain weights.
        examples: of the bound.
        problem: whose data and memory the curvature's problems take.
        grid: of the prior's scales; None where they stay what they are.
    """

    network: GaussianNetwork
    plain: nn.Module
    examples: Examples
    problem: Problem
    grid: Grid | None
    settings: Settings
    seed: int
    curve: list[tuple[float, float]] = field(default_factory=list)  # (risk, KL) of each epoch
    risk: float = 0.5

    def __post_init__(self) -> None:
        self.fit(len(self.examples))

    def fit(self, num_examples: int) -> None:
        """Have what the first layer needs of the inputs found anew each time, if that of so many does not fit."""
        name = self.network.first
        if name is not None:
            outputs, inputs = self.network.layers[name].prior_mean.shape
            numbers = num_examples * (min(inputs, self.settings.num_directions) + 1 + outputs)
            if numbers * self.examples.inputs.element_size() > share(self.problem.memory, "factors"):
                self.network.first = None

    def run(self, store: Store | None, name: str, progress: LayerProgress | None) -> None:
        """All epochs, or as many as there are minutes for: then the steps shrink sooner, and end as small."""
        settings, began = self.settings, time.perf_counter()
        epoch, num_epochs, spent = 0, self.num_epochs, 0.0
        kept = store.read(name) if store is not None else None
        if kept is not None:
            epoch, num_epochs, spent = kept["epoch"], kept["num_epochs"], kept["seconds"]
            self.curve, self.risk = [tuple(one) for one in kept["curve"]], kept["risk"]
            self.network.restore(kept["network"])
            num_epochs = self._in_time(epoch, spent)  # there may be more minutes than there were
        else:
            self.begin()
        inputs = self.network.prepared(self.examples.inputs)
        size = self.step_bytes(inputs, self.settings.batch_size_of(len(self.examples)))
        refuse_beyond(size, self.problem.memory, "a step of descent takes", "Lower batch_size, or raise memory.")
        optimizer = self.optimizer()
        if kept is not None:
            optimizer.load_state_dict(kept["optimizer"])
        while epoch < num_epochs:
            if epoch in settings.refreshed(num_epochs):
                self.refresh(epoch)
                inputs = self.network.prepared(self.examples.inputs) if settings.sides == "both" else inputs
                optimizer = self.optimizer()
            if self.grid is not None and epoch >= SETTLED * num_epochs:
                self._settle(self.grid)
            if progress is not None:
                progress(epoch, num_epochs, self._status(name))
            self.descend(inputs, optimizer, epoch, num_epochs)
            epoch += 1
            elapsed = spent + time.perf_counter() - began
            num_epochs = self._in_time(epoch, elapsed)
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

    def step_bytes(self, inputs: Tensor, batch_size: int) -> int:
        """Bytes that the graph of a step takes with so many examples, of prepared inputs, from those of a few.

        Convolutions draw weights for each example.
        """
        labels, sizes = self.examples.labels, []
        for few in (2, 4):
            outputs = functools.partial(self.network.outputs, inputs[:few])
            sizes.append(measured(lambda f=outputs, k=few: error_probability(f(), labels[:k]))[1])
        each = max(0, sizes[1] - sizes[0]) // max(1, min(4, len(labels)) - 2)
        return sizes[0] + max(0, batch_size - 2) * each

    @property
    def num_epochs(self) -> int:
        """That are planned."""
        return self.settings.epochs_of(len(self.examples))

    def begin(self) -> None:
        """Turn to the coordinates of the prior's centre, or of the network that was trained from there."""
        start = self.plain
        if self.settings.start == "trained":
            start = copy.deepcopy(self.plain)
            learn(start, self.examples, TRAINING_EPOCHS, self.seed)
        some = self._some(0)
        problem = Problem(start, (some.inputs, some.labels), memory=self.problem.memory)
        found = coordinates(problem, self.network, self.settings.basis, self.settings.sides)
        take(self.network, found, self.settings.num_directions)
        if self.settings.start == "trained":
            self.network.centre(start)
            squared_weights(self.network)
        else:
            closed_form(self.network, found, len(self.examples) / 10)

    def refresh(self, epoch: int) -> None:
        """Turn to the coordinates of the network as it is now; the first layer's inputs, if they are data, stay."""
        network = self.network
        network.draw_from(Draws(self.seed + epoch))
        problem = drawn_problem(network, self.plain, self._some(epoch), self.problem)
        found = coordinates(problem, network, self.settings.basis, self.settings.sides)
        if network.first is not None and self.settings.sides == "inputs":
            del found[network.first]
        ranked = {name: network.layers[name].log_ratio.detach().clone() for name in found}
        take(network, found, self.settings.num_directions)
        if not self.settings.transports:
            for name, log_ratio in ranked.items():
                network.layers[name].log_ratio.data.copy_(log_ratio)

    @torch.no_grad()
    def _some(self, epoch: int) -> Examples:
        """From which a basis is found: once there is a network, mostly those whose label it may get wrong.

        Only their error moves when weights do, so it is in their features' moments that variances should be diagonal.
        """
        generator, num = seeded(self.seed + epoch), self.settings.num_curvature
        pool = self.examples.some(torch.randperm(len(self.examples), generator=generator)[: POOL * num])
        doubt = torch.ones(len(pool))
        if epoch:
            self.network.draw_from(Draws(self.seed + epoch))
            chunk = self.network.chunk
            parts = zip(torch.split(pool.inputs, chunk), torch.split(pool.labels, chunk), strict=True)
            errors = [error_probability(self.network.outputs(self.network.prepared(x)), y) for x, y in parts]
            doubt = (torch.cat(errors) * (1 - torch.cat(errors)) + CERTAIN).float().cpu()
        chosen = torch.multinomial(doubt, min(num, len(pool)), generator=generator)
        return pool.some(chosen.sort().values)

    def optimizer(self) -> torch.optim.Optimizer:
        """Of means, variances and scales."""
        layers, rate = self.network.layers.values(), self.settings.rate
        groups = [
            {"params": [layer.mean for layer in layers], "rate": rate, "settles": False},
            {"params": [layer.log_ratio for layer in layers], "rate": 2.5 * rate, "settles": False},
            {"params": [layer.log_scale for layer in layers], "rate": rate, "settles": True},
        ]
        return torch.optim.Adam(groups, lr=rate)

    def _settle(self, grid: Grid) -> None:
        """Put λ on its grid while means and variances can still follow, for a coarse grid is a cheap one."""
        for layer in self.network.layers.values():
            layer.log_scale.data.fill_(math.log(grid.variance(grid.nearest(layer.scale))))

    def descend(self, inputs: Tensor, optimizer: torch.optim.Optimizer, epoch: int, num_epochs: int) -> None:
        """One epoch, of prepared inputs."""
        settings, n = self.settings, len(self.examples)
        seed = (self.seed * 1000 + epoch) % 2**63
        self.network.draw_from(PooledDraws(seed))
        order = torch.split(torch.randperm(n, generator=seeded(seed)), settings.batch_size_of(n))
        warm_up = settings.warm_up_of(len(self.network.layers[self.network.output].prior_mean))
        total, divergence = 0.0, 0.0
        for step, chosen in enumerate(order):
            done = (epoch + step / len(order)) / num_epochs
            ramp = min(1.0, (epoch * len(order) + step + 1) / RAMP)
            for group in optimizer.param_groups:
                settled = self.grid is None or epoch >= SETTLED * num_epochs
                group["lr"] = 0 if group["settles"] and settled else group["rate"]
                group["lr"] *= ramp * (1 + math.cos(math.pi * done)) / 2
            here = chosen.to(inputs.device)
            labels, outputs = self.examples.labels[here], self.network.outputs(inputs[here])
            errors = error_probability(outputs, labels)
            divergences = sum(layer.divergence(errors.dtype) for layer in self.network.layers.values())
            assert isinstance(divergences, Tensor)
            divergence, mean = float(divergences.detach()), errors.mean()
            nats = (divergence + EXPECTED) / n
            if settings.loss == "cross_entropy":
                value = F.cross_entropy(outputs.drawn(self.network.draws), labels)
                value = value + divergences / (4 * n * math.sqrt(nats / 2))
            elif done < warm_up or settings.loss == "log":
                value = log_loss(errors).mean() + divergences / n
            else:
                value = mean + price(settings.bound, self.risk, nats, n) * divergences
            optimizer.zero_grad()
            value.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total += float(mean.detach()) * len(chosen)
            self.risk = SMOOTHING * self.risk + (1 - SMOOTHING) * float(mean.detach())
        self.curve.append((total / n, divergence))

    def _in_time(self, epoch: int, seconds: float) -> int:
        """How many epochs there will be, at the pace so far."""
        if self.settings.minutes is None or not epoch:
            return self.num_epochs
        return max(epoch, min(self.num_epochs, int(60 * self.settings.minutes / (seconds / epoch))))

    def _status(self, name: str) -> str:
        if not self.curve:
            return name
        risk, divergence = self.curve[-1]
        bound = BOUNDS[self.settings.bound](risk, (divergence + EXPECTED) / len(self.examples))
        return f"{name}: error {risk:.3f}, KL {divergence:.0f}, about {bound:.3f}"

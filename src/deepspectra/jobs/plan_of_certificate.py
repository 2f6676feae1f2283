"""The stages of a certificate, foreseen: a few steps of each are done on some of the examples, and timed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch

from deepspectra.argument_checks import seeded
from deepspectra.certificates.certify import num_wrong
from deepspectra.certificates.networks import examples_of
from deepspectra.certificates.optimise import TRAINING_EPOCHS, Descent
from deepspectra.certificates.plain_networks import EPOCHS, HELD_OUT
from deepspectra.certificates.priors import Prepared, Prior, learn, prepare
from deepspectra.certificates.settings import Settings
from deepspectra.certificates.stochastic_layers import Draws
from deepspectra.jobs.pace import Stage, now
from deepspectra.problem.problem import Problem

STEPS = 8  # of descent that are timed, after as many that warm up
FEWEST = 256  # examples that training and draws are timed on
STATES = 4  # numbers for each that descent changes: itself, its gradient, and two moments
SQUARES = (
    4  # matrices of each side of a layer that are in float64 while it is turned: old, new, their product, squares
)


class _Some:
    """Some of the examples, and seconds that work with them takes for all of them."""

    def __init__(self, problem: Problem, settings: Settings) -> None:
        self.problem, self.settings = problem, settings
        self.all = examples_of(problem)
        few = min(len(self.all), max(FEWEST, STEPS * settings.batch_size_of(len(self.all))))
        self.few = self.all.some(torch.randperm(len(self.all), generator=seeded(0))[:few])

    @property
    def scale(self) -> float:
        """How many times as many there are in all."""
        return len(self.all) / len(self.few)

    @property
    def curved(self) -> float:
        """The same of the examples from which a basis is found."""
        most = self.settings.num_curvature
        return min(most, len(self.all)) / min(most, len(self.few))

    def timed(self, work: Callable[[], object]) -> float:
        """Seconds of it, once."""
        began = now(self.problem.device)
        work()
        return now(self.problem.device) - began

    def training(self) -> float:
        """Seconds of an epoch of a plain network's training, of all examples."""
        twin = copy.deepcopy(self.problem.model).requires_grad_(True)
        learn(twin, self.few.some(torch.arange(min(len(self.few), 2))), 1, 0)  # what happens only once
        return self.scale * self.timed(lambda: learn(twin, self.few, 1, 0))


def of_certificate(problem: Problem, priors: Sequence[Prior], settings: Settings) -> Iterator[Stage]:
    """Of each prior's descent, bases and draws, and of what stands beside the certificate."""
    some = _Some(problem, settings)
    training = some.training()
    for number, prior in enumerate(priors):
        of = f", prior {number + 1}" if len(priors) > 1 else ""
        yield from _of_prior(some, prior, training, of)
    if all(prior.kind != "learnt" for prior in priors):  # about a learnt one there is the prior's network
        yield Stage("binomial bound", 0, EPOCHS * (1 - HELD_OUT) * training, 0)


def _of_prior(some: _Some, prior: Prior, training: float, of: str) -> Iterator[Stage]:
    settings, learnt = some.settings, prior.kind == "learnt"
    if learnt:
        yield Stage(f"learning the prior{of}", 0, prior.epochs * prior.share * training, 0)
    made = prepare(replace(prior, epochs=1), some.problem.model, some.few, 0)
    num = round(len(some.all) * (1 - prior.share)) if learnt else len(some.all)
    descent = _descent(some, made, prior, num)
    epochs, limit = settings.epochs_of(num), some.problem.memory
    named = f"descent, {epochs:,} epochs{of}"
    step = descent.step_bytes(made.network.prepared(made.bound.inputs[:4]), settings.batch_size_of(num))
    if step > limit:  # too much to be timed: about two gradients an epoch
        yield Stage(named, 0, 2 * epochs * training, step, limit)
        return
    basis = some.curved * some.timed(descent.begin)
    basis = max(basis, some.curved * some.timed(lambda: descent.refresh(1)))
    started = TRAINING_EPOCHS * training if settings.start == "trained" else 0.0
    layers = made.network.layers.values()
    changed = sum(one.nbytes for layer in layers for one in (layer.mean, layer.log_ratio))
    held = float(STATES * changed + sum(layer.prior_mean.nbytes for layer in layers))
    sides = [(layer.prior_mean.shape, layer.prior_mean.itemsize) for layer in layers]
    held += sum(width * (o * o * (settings.sides == "both") + d * d) for (o, d), width in sides)  # rotations
    turned = max(8 * SQUARES * (o * o + d * d) for (o, d), _ in sides)
    yield Stage(f"bases{of}", 0, started + (1 + len(settings.refreshed(epochs))) * basis, held + turned)
    inputs = made.network.prepared(made.bound.inputs)
    optimizer = descent.optimizer()
    _ = some.timed(lambda: descent.descend(inputs, optimizer, 0, 2))
    scale = num / len(made.bound)
    epoch = scale * some.timed(lambda: descent.descend(inputs, optimizer, 1, 2))
    beside = scale * inputs.numel() * inputs.element_size()
    seconds = epochs * epoch if settings.minutes is None else min(epochs * epoch, 60 * settings.minutes)
    yield Stage(named, 0, seconds, held + beside + step, limit)
    draw = scale * some.timed(lambda: num_wrong(made.network, inputs, made.bound.labels, 1, Draws(1)))
    drawn = descent.step_bytes(inputs, min(num, made.network.chunk))  # no graph, and no more than one would take
    yield Stage(f"draws for the certificate{of}", 0, settings.passes * draw, beside + drawn)
    yield Stage(f"check of the noise{of}", 0, basis, held + turned)


def _descent(some: _Some, made: Prepared, prior: Prior, num: int) -> Descent:
    """With the steps that it has on all the examples of the bound, and what it keeps of them."""
    settings = replace(some.settings, batch_size=some.settings.batch_size_of(num), start="prior", epochs=1)
    descent = Descent(made.network, made.plain, made.bound, some.problem, prior.places, settings, 0)
    descent.fit(num)
    return descent

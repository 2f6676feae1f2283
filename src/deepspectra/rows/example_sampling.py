"""Few examples in place of all: drawn by importance, weighted to be unbiased.

In a trained classifier few examples make most of the curvature: those the network is unsure of. An example's
share of tr G is about q_i = (1 − ‖p_i‖²)(1 + ‖h_i‖²), with p_i the softmax and h_i the last features, which one
forward pass gives. Examples drawn with probability π_i ∝ q_i and weighted by 1/π_i give an unbiased estimate
of every curvature operator, whose top eigenspace costs a fraction of the full data's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from deepspectra.derivatives.products import products_of
from deepspectra.errors import LossError
from deepspectra.problem.cross_entropy import CrossEntropy
from deepspectra.problem.example_subsets import drawn_problem, sum_by_example
from deepspectra.problem.problem import Problem, per_problem


def drawn(problem: Problem, num_samples: int, generator: torch.Generator) -> Problem:
    """The problem on about so many of its examples, weighted to be unbiased. Cost: one forward pass."""
    probabilities = inclusion(importance(problem), num_samples)
    chosen = systematic(probabilities, generator)
    sample = drawn_problem(problem, chosen, 1 / probabilities[chosen])
    products_of(sample).inherit(products_of(problem))
    return sample


@per_problem
def importance(problem: Problem) -> Tensor:
    """q_i of every example, in the order of the batches, float64; over its rows, such as tokens, they are summed.

    Cost: one forward pass, once a problem.
    """
    loss = problem.loss_function
    if not isinstance(loss, CrossEntropy):
        raise LossError(f"importance is known for cross-entropy; this problem's loss is {loss.name}.")
    with _last_features(problem) as features:

        def sizes(batch: Any) -> Tensor:
            outputs, targets = problem.values(batch)
            p = outputs.double().softmax(-1)
            size = loss.curvature_weights(outputs, targets).double() * (1 - p.square().sum(-1)).clamp_min(0)
            h = features()
            return size * (1 + h.double().square().sum(-1)) if h is not None and len(h) == len(size) else size

        found = list(problem.fixed_batches().mapped(sizes))
    return sum_by_example(problem, found)


@contextmanager
def _last_features(problem: Problem) -> Iterator[Any]:
    """A function that returns the inputs (n, d) of the linear layer called last, or None without one."""
    seen: list[Tensor] = []

    def remember(_module: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
        seen[:] = [inputs[0].detach().flatten(0, -2)]

    hooks = [
        module.register_forward_hook(remember)
        for module in problem.model.modules()
        if isinstance(module, nn.Linear) and module.out_features == problem.num_classes
    ]
    try:
        yield lambda: seen.pop() if seen else None
    finally:
        for hook in hooks:
            hook.remove()


def inclusion(sizes: Tensor, num_samples: int) -> Tensor:
    """Probabilities π (N,) ∝ sizes, at most 1, with sum num_samples (or the number of positive sizes)."""
    num_samples = min(num_samples, int((sizes > 0).sum()))
    certain = torch.zeros_like(sizes, dtype=torch.bool)
    while True:
        rest = sizes.where(~certain, 0)
        left = num_samples - int(certain.sum())
        probabilities = (rest * (left / rest.sum()) if left else rest * 0).where(~certain, 1.0)
        beyond = (probabilities >= 1) & ~certain
        if not bool(beyond.any()):
            return probabilities
        certain |= beyond


def num_enough(sizes: Tensor, variation: float) -> int:
    """The fewest draws for which Σ q_i/π_i over those drawn, an estimate of Σ q_i, varies by so much, relatively.

    Its variance is Σ q_i² (1/π_i − 1), were the draws independent. None are needed where all q_i are 0.
    """
    least, most = 0, int((sizes > 0).sum())
    while most - least > 1:
        middle = (least + most) // 2
        probabilities = inclusion(sizes, middle).where(sizes > 0, 1.0)
        variance = float((sizes * (sizes / probabilities - sizes)).sum())
        enough = variance <= (variation * float(sizes.sum())) ** 2
        least, most = (least, middle) if enough else (middle, most)
    return most


def systematic(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """Indices drawn with the given inclusion probabilities: one uniform number, then steps of one along their sum.

    Along rows sorted by class, each class gets its share almost exactly.
    """
    offset = float(torch.rand((), generator=generator, dtype=torch.float64))
    ends = probabilities.cpu().double().cumsum(0) - offset
    before = torch.cat([torch.tensor([-offset], dtype=torch.float64), ends[:-1]])
    return (ends.ceil() > before.ceil()).nonzero()[:, 0]

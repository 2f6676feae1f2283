"""Errors of random combinations of a row's scalars, where there are too many outputs to backpropagate each."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from deepspectra.errors import FallbackWarning
from deepspectra.problem.cross_entropy import CrossEntropy
from deepspectra.problem.losses import ElementwiseLoss, Loss
from deepspectra.problem.problem import Problem
from deepspectra.rows.captures import Captured, Captures, captures_of, curvature_root, rows_an_example

MOST_PASSES = 512  # backward passes up to which every scalar is backpropagated, unless told otherwise,
SAMPLES = 16  # and combinations that are drawn beyond
RANKS_APART = 2**32  # seeds of processes that share the examples


class DrawnCaptures(Captures):
    """Features and errors of each example's own random combinations of the scalars of its rows.

    With F F^T the curvature of all its outputs, an example has `samples` scalars F ε / √samples, ε of independent
    random signs, so that second moments of errors are those of all scalars on average. Each pass over the data draws
    anew.

    Cost: a forward and `samples` backward passes without weight gradients each time that the data are gone through.
    """

    def __init__(self, problem: Problem, samples: int, seed: int) -> None:
        self.samples = samples
        # of every process its own draws, as of every example
        generator = torch.Generator().manual_seed(seed + RANKS_APART * problem.batches.group.rank)

        def weigh(outputs: Tensor, targets: Tensor) -> Tensor:
            shape = (len(outputs), outputs[:1].numel(), samples)
            signs = torch.randint(2, shape, generator=generator).to(outputs.device, torch.float64) * 2 - 1
            drawn = combined(problem.loss_function, outputs, targets, problem.total_weight, signs)
            return drawn.div(samples**0.5).to(outputs)

        super().__init__(problem, weigh, joint=True)

    def batches(self) -> Iterator[Captured]:
        """Each batch, of new draws."""
        self.release()
        return super().batches()

    def shares(self) -> Iterator[Captured]:
        """A process's share of the batches, of new draws."""
        self.release()
        return super().shares()


def combined(loss: Loss, outputs: Tensor, targets: Tensor, total_weight: float, mixing: Tensor) -> Tensor:
    """F ε (n, C, s) float64 for ε (n, C, s), with some F_i F_iᵀ = ∂²(Σ ω ℓ / Σ ω)/∂z_i², never formed if it is large.

    Of cross-entropy F = √a (diag √p − p √pᵀ), of losses that are sums over elements it is diagonal.
    """
    if isinstance(loss, CrossEntropy):
        p = outputs.double().softmax(-1)[:, :, None]
        mixed = p.sqrt() * mixing
        curvature = loss.curvature_weights(outputs, targets).double() / total_weight
        return curvature.sqrt()[:, None, None] * (mixed - p * mixed.sum(1, keepdim=True))
    if isinstance(loss, ElementwiseLoss):
        diagonal = loss.curvature(outputs, targets, torch.ones_like(outputs)).flatten(1).double()
        return (diagonal.clamp_min(0) / total_weight).sqrt()[:, :, None] * mixing
    return curvature_root(loss, outputs, targets, total_weight) @ mixing


def all_or_drawn(problem: Problem, samples: int | None, seed: int) -> Captures:
    """With errors of all scalars, or of fewer combinations of them; None takes all up to 512 an example."""
    num = 0 if samples == 0 else num_scalars(problem)
    if num > MOST_PASSES and samples is None:
        samples = SAMPLES
        warnings.warn(
            f"each example has {num:,} scalars to backpropagate; of {samples} random combinations of them "
            "instead the factors are right on average, with the errors that standard_errors tells. Pass samples= "
            "for another number, or samples=0 for all scalars.",
            FallbackWarning,
            stacklevel=3,
        )
    return DrawnCaptures(problem, samples, seed) if samples and samples < num else captures_of(problem)


def num_scalars(problem: Problem) -> int:
    """Scalars that carry an example's curvature, so many a row: C − 1 for cross-entropy, C for other losses."""
    known = isinstance(problem.loss_function, CrossEntropy)
    if known and problem.splits_by_class:
        return problem.num_classes - 1
    outputs, _ = next(problem.row_batches())
    return rows_an_example(problem) * (outputs[:1].numel() - known)

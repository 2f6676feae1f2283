"""The part of trained weights that class means explain: at rest under weight decay W = −(1/η) Ave e hᵀ."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deepspectra.problem.problem import Problem
from deepspectra.results import ByLayer, origin
from deepspectra.rows.averages import positive
from deepspectra.rows.captures import Captures, layer_of
from deepspectra.rows.gradients import labelled_loss
from deepspectra.rows.parameter_uses import Matrix, Use
from deepspectra.rows.spectrum import RANK_RTOL, range_of


@dataclass(frozen=True)
class LayerWeights:
    """One layer's weight W (outputs, inputs), beside what gradient descent with weight decay would settle at.

    Attributes:
        name: of the parameter.
        singular_values: of W, descending.
        class_singular_values: (≤ C,) of −(1/η) Σ_c (N_c/N) e_c h_cᵀ, with e_c and h_c the class means of true-label
            errors and of features, and η the decay below.
        rest_cosine: between W and −∇_W of the loss; 1 at rest.
        class_cosine: between W and the product of class means.
        class_share: ‖P_e W P_h‖² / ‖W‖², P_e and P_h the projections on the spans of the C class means of errors
            and of features: how much of W lives between them.
        baseline: the same for random spans of these dimensions, a product of two ratios of dimensions.
        decay: −⟨W, ∇_W⟩ / ‖W‖², the weight decay for which the layer would be at rest.
    """

    name: str
    singular_values: Tensor
    class_singular_values: Tensor
    rest_cosine: float
    class_cosine: float
    class_share: float
    baseline: float
    decay: float


class Weights(ByLayer[LayerWeights]):
    """Every fully connected weight, beside the class means of its features and errors."""

    def __str__(self) -> str:
        head = ("σ₁", "at rest", "class cos", "share", "random", "decay")
        return self._table(
            head,
            lambda layer: (
                float(layer.singular_values[0]),
                layer.rest_cosine,
                layer.class_cosine,
                layer.class_share,
                layer.baseline,
                layer.decay,
            ),
            "cosines of W with −∇ and with products of class means; share of W between their spans; "
            f"{self.seconds:.3g} s",
        )


def weights(problem: Problem) -> Weights:
    """How much of each fully connected weight the class means of features and errors explain.

    Training with weight decay η comes to rest at W = −(1/η) (1/N) Σ e_i h_iᵀ with the errors e_i of the true labels.
    If within-class scatter adds little, the top singular values of W are those of the class means.

    Args:
        problem: one with cross-entropy and class labels, one row an example. Weights used once, at one position of
            each example; others are left out.

    Raises:
        LossError: the loss is not the cross-entropy of class labels.
        CurvatureError: features and errors cannot be told apart by example.

    Cost: two gradients, and a singular value decomposition of each weight.

    Source: Papyan 2020, JMLR 21:252, on weights, as a claim; the measures are this library's.
    """
    began = time.perf_counter()
    sums = _class_sums(problem)
    gradient = problem.unflatten(problem.gradient())
    # errors of an example sum to zero up to the network's rounding, which is no direction of their span
    coarsest = max(torch.finfo(dtype).eps for dtype in {problem.dtype} | problem.casts)
    rounding = max(RANK_RTOL, 4 * coarsest)
    found = {}
    for name, (features, errors, sizes) in sums.items():
        weight = problem.parameters[name].detach().double()
        means = features / positive(sizes)
        found[layer_of(name)] = _explained(name, weight, gradient[name].double(), means, errors, rounding)
    return Weights(found, **origin(began, problem))


def _class_sums(problem: Problem) -> dict[str, list[Tensor]]:
    """Weight → Σ_{i∈c} h_i (C, inputs), Σ_{i∈c} e_i (C, outputs) and N_c (C, 1), of fully connected layers."""
    loss = labelled_loss(problem)

    def weigh(outputs: Tensor, targets: Tensor) -> Tensor:
        return loss.gradient(outputs, targets)[:, :, None] / problem.total_weight

    found: dict[str, list[Tensor]] = {}
    for batch in Captures(problem, weigh).batches():  # the loss itself: one scalar an example
        member = torch.nn.functional.one_hot(loss.labels(batch.targets), problem.num_classes).double()
        member = member * (batch.weights > 0)[:, None]
        uses = Counter(use.slice.name for use in batch.uses)
        for use in batch.uses:
            name = use.slice.name
            if uses[name] > 1 or use.num_examples != len(member) or not _is_plain(use, problem):
                continue
            each = use.inputs.double(), use.errors[:, 0, :, 0].double(), torch.ones_like(member[:, :1])
            before: Sequence[Tensor | float] = found.get(name, (0.0, 0.0, 0.0))
            found[name] = [total + member.T @ rows for total, rows in zip(before, each, strict=True)]
    return found


def _is_plain(use: Use, problem: Problem) -> bool:
    """A whole matrix, used at one position of each example."""
    return (
        type(use) is Matrix
        and not use.slice.transposed
        and use.slice.shape == tuple(problem.parameters[use.slice.name].shape)
        and use.errors.shape[3] == 1
    )


def _explained(
    name: str, weight: Tensor, gradient: Tensor, features: Tensor, errors: Tensor, rounding: float
) -> LayerWeights:
    """Of W, ∇_W, the class means of features (C, inputs) and the class sums of errors (C, outputs)."""
    product = -errors.T @ features
    norm = weight.norm()
    decay = float(-(weight * gradient).sum() / norm**2)
    # spans of the class means; of errors each alike, for those of a class that is fitted are small and count as much
    left, right = range_of((errors / positive(errors.norm(dim=1, keepdim=True))).T, rounding), range_of(features.T)
    inside = (left.T @ weight @ right).square().sum() / norm**2
    return LayerWeights(
        name=name,
        singular_values=torch.linalg.svdvals(weight).cpu(),
        class_singular_values=torch.linalg.svdvals(product)[: len(features)].cpu() / (abs(decay) or float("nan")),
        rest_cosine=_cosine(weight, -gradient),
        class_cosine=_cosine(weight, product),
        class_share=float(inside),
        baseline=left.shape[1] * right.shape[1] / weight.numel(),
        decay=decay,
    )


def _cosine(one: Tensor, other: Tensor) -> float:
    return float((one * other).sum() / (one.norm() * other.norm()).clamp_min(torch.finfo(one.dtype).tiny))

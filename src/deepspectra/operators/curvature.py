"""Hessian, Gauss-Newton, residual and empirical Fisher of a problem."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from deepspectra.derivatives.products import products_of
from deepspectra.errors import LossError, OptionError
from deepspectra.operators.base import Operator
from deepspectra.problem.cross_entropy import CrossEntropy
from deepspectra.problem.example_subsets import can_draw
from deepspectra.problem.memory_budget import share
from deepspectra.problem.problem import Problem, check_problem
from deepspectra.rows.example_sampling import drawn, importance, num_enough
from deepspectra.rows.gradients import GradientRows

FEWEST = 1000  # examples from which on it can pay to seek eigenvectors on a sample first,
SHARE = 1 / 4  # of no more of them than this,
SMALLEST = 100  # and no fewer than these


class Curvature(Operator):
    """An operator on the parameters of a problem.

    Attributes:
        by_importance: the `importance` of an example is about its share of this operator's trace.
    """

    by_importance = False

    def __init__(self, problem: Problem, name: str) -> None:
        check_problem(problem)
        name = f"{name} with batch norm in training mode" if problem.mode == "train" else name
        dtype = torch.promote_types(problem.dtype, torch.float32)
        super().__init__(problem.num_parameters, dtype=dtype, device=problem.device, name=name)
        self.problem = problem
        self.products = products_of(problem)
        self.memory, self.basis = share(problem.memory, "basis"), problem.basis
        self.group = problem.batches.group

    @property
    def rounding(self) -> float | None:
        """The relative error of products, if they are computed in half precision or TF32 and it was measured."""
        return max(self.products.choice.rounding.values(), default=None)

    def lends(self, num_bytes: int) -> AbstractContextManager[object]:
        """See `Operator`: room for graphs, which are let go where they and the vectors do not fit it."""
        allowance = self.products.allowance
        return allowance.lent(min(num_bytes, allowance.size - allowance.reserved))

    def places(self, names: Sequence[str]) -> list[int]:
        """Where parameters of these names stand among all."""
        order = {name: j for j, name in enumerate(self.problem.parameters)}
        return sorted(order[name] for name in names)

    def sample_size(self, error: float) -> int:
        """Examples whose trace of this operator varies by so much from draw to draw; 0 if it takes too many to pay.

        Eigenvectors of samples of equal variation are about equally good, whatever the network and the data.
        Cost: one forward pass, once a problem.
        """
        if not self.by_importance or self.problem.num_examples < FEWEST or not can_draw(self.problem):
            return 0
        sizes = importance(self.problem)
        num = max(SMALLEST, num_enough(sizes, error))
        return num if len(sizes) >= FEWEST and num <= SHARE * len(sizes) else 0

    def sampled(self, generator: torch.Generator, num_samples: int | None = None) -> Curvature:
        """The same operator on examples drawn by importance, a quarter of all unless told otherwise."""
        num = num_samples or math.ceil(SHARE * len(importance(self.problem)))
        few = copy.copy(self)
        few.problem = drawn(self.problem, num, generator)
        few.products = products_of(few.problem)
        return few

    def start_block(self, kind: str) -> Tensor:
        """The averaged means as starting vectors: "class_means" or "cross_class_means"."""
        rows = GradientRows(self.problem)
        projections = rows.projections()
        if kind == "class_means":
            return rows.factor(projections, projections.basis("class"))
        if kind == "cross_class_means":
            return rows.cells(projections)
        raise OptionError(
            f"start={kind!r}; it is None, a tensor, 'random', 'sampled', 'class_means' or 'cross_class_means'."
        )


class Hessian(Curvature):
    """H = ∂²L/∂θ², symmetric, of the mean loss over all the data.

    H = G + R with `GaussNewton` and `Residual` (Papyan 2019, arXiv 1901.08244, section 2).

    Args:
        problem: the model, data and loss.
        way: "double backward" | "linearize", from now on for all second derivatives of this problem; unless told, the
            first that is right for the network.

    Raises:
        OptionError: there is no such way, or a call within the caller's autocast or inference mode.
        NonFiniteError: a product is NaN or infinite.
        CurvatureError: no way of differentiating the network twice is right, or not the one asked for.

    Cost: at construction, once a problem, a check in float64 on a few examples. Then
    1.4–2.7 gradients a product with a vector; a block shares the primal pass of batches whose graphs do not
    fit in memory.
    """

    by_importance = True

    def __init__(self, problem: Problem, way: str | None = None) -> None:
        super().__init__(problem, "Hessian")
        self.products.choice.way(way)

    def _apply(self, block: Tensor) -> Tensor:
        return self.products.hessian(block).div_(self.problem.total_weight)


class Residual(Curvature):
    """R = H − G = (1/N) Σ_i Σ_k (∂ℓ_i/∂z_k) ∂²z_{ik}/∂θ²: what the curvature of the network itself adds.

    Computed by itself, not as a difference: the second derivative of Σ_k r_k z_k with r = ∂ℓ/∂z held fixed.
    Options, errors and cost: as `Hessian`.
    """

    def __init__(self, problem: Problem, way: str | None = None) -> None:
        super().__init__(problem, "residual")
        self.products.choice.way(way)

    def _apply(self, block: Tensor) -> Tensor:
        return self.products.residual(block).div_(self.problem.total_weight)

    def diagonal_blocks(self, blocks: Sequence[tuple[Sequence[str], Tensor]]) -> list[Tensor]:
        """Diagonal blocks times vectors of their own, (P_j, K) for parameters of these names, in one pass."""
        found = self.products.residuals([(block, self.places(names)) for names, block in blocks])
        return [product / self.problem.total_weight for product in found]


class HessianBlock(Operator):
    """A diagonal block of H: what the parameters of one layer see of each other.

    The blocks of all layers share the graphs of the network's batches: while these are kept, a product costs no
    primal pass, and of the backward passes only what lies between the layer and the outputs.

    Args:
        hessian: of the whole problem.
        names: of the parameters of the block.
    """

    def __init__(self, hessian: Hessian, names: Sequence[str]) -> None:
        self.hessian, self.among = hessian, hessian.places(names)
        size = sum(hessian.problem.parameters[name].numel() for name in names)
        super().__init__(size, dtype=hessian.dtype, device=hessian.device, name="Hessian of a layer")
        self.memory, self.group = hessian.memory, hessian.group

    def lends(self, num_bytes: int) -> AbstractContextManager[object]:
        """Of the whole Hessian's graphs."""
        return self.hessian.lends(num_bytes)

    def _apply(self, block: Tensor) -> Tensor:
        return self.hessian.products.hessian(block, self.among) / self.hessian.problem.total_weight


class GaussNewton(Curvature):
    """G = (1/N) Σ_i J_iᵀ (∂²ℓ_i/∂z²) J_i; for softmax cross-entropy the Fisher matrix of the model.

    Not the empirical Fisher matrix. Cost: 1.2–1.9 gradients a product.

    Args:
        problem: the model, data and loss.
        way: of J v: "double backward" | "linearize", from now on for all first derivatives of this problem; unless
            told, the faster of those that are right for the network, by timing both where there is much to do.

    Raises:
        OptionError: there is no such way, or a call within the caller's autocast or inference mode.
        NonFiniteError: a product is NaN or infinite.
        CurvatureError: the network's first derivatives are wrong, or by the way asked for.
    """

    by_importance = True

    def __init__(self, problem: Problem, way: str | None = None) -> None:
        super().__init__(problem, "Gauss-Newton")
        self.products.choice.linearize(way)

    def _apply(self, block: Tensor) -> Tensor:
        return self.products.sandwich(self.problem.loss_function.curvatures, block).div_(self.problem.total_weight)


class EmpiricalFisher(Curvature):
    """F = (1/N) Σ_i ω_i ∇ℓ_i ∇ℓ_iᵀ with the labels of the data; a different matrix from G.

    One gradient a row. With class weights ω, ∇ℓ_i is that of the unweighted loss of row i.
    Options and cost: as `GaussNewton`; errors too, and LossError where rows interact in the loss.
    """

    def __init__(self, problem: Problem, way: str | None = None) -> None:
        super().__init__(problem, "empirical Fisher")
        problem.refuse_interacting_rows()
        self.products.choice.linearize(way)

    def _apply(self, block: Tensor) -> Tensor:
        return self.products.sandwich(self._outer, block) / self.problem.total_weight

    def _outer(self, outputs: Tensor, targets: Tensor, tangents: Tensor) -> Tensor:
        """r_i (r_iᵀ t_i) / ω_i with r_i the gradient of ω_i ℓ_i in the outputs of row i."""
        loss = self.problem.loss_function
        slope = loss.gradient(outputs, targets).detach()
        weights = loss.weights(outputs, targets).to(slope)
        if (weights <= 0).any():
            if not isinstance(loss, CrossEntropy):
                raise LossError("the empirical Fisher matrix needs positive row weights.")
            weights = torch.where(weights > 0, weights, 1)
        inner = (slope * tangents).flatten(2).sum(2) / weights
        return slope * inner.view(*inner.shape, *[1] * (slope.ndim - 1))

"""Ways of differentiating: second derivatives of scalars, and the Jacobian of outputs."""

from __future__ import annotations

import contextlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from deepspectra.derivatives.convolution_derivatives import Convolutions
from deepspectra.problem.evaluated_model import Tree, differentiable, leaves_of
from deepspectra.problem.problem import Problem

Scalar = Callable[[Tree], Tensor]


# -- ways of differentiating a scalar function twice ---------------------------------------------------------


class Way(ABC):
    """A graph of v ↦ (∂²s/∂θ²) v for a scalar function s of the parameters."""

    name: str

    @abstractmethod
    def __init__(self, function: Scalar, parameters: Tree) -> None: ...

    @abstractmethod
    def __call__(
        self, tangent: list[Tensor], *, batched: bool = False, among: Sequence[int] | None = None
    ) -> list[Tensor]:
        """The product, one tensor a parameter; with `batched`, of K tangents stacked in front.

        With `among`, of the diagonal block of these parameters: tangents and products of these alone.
        """


class DoubleBackward(Way):
    """Backward through the backward pass, whose graph is retained (Pearlmutter 1994)."""

    name = "double backward"

    def __init__(self, function: Scalar, parameters: Tree) -> None:
        leaves = leaves_of(parameters)
        self.leaves = list(leaves.values())
        with torch.enable_grad(), differentiable(), Convolutions():
            value = function(leaves)
            gradient = (
                torch.autograd.grad(value, self.leaves, create_graph=True, allow_unused=True)
                if value.requires_grad
                else (None,) * len(self.leaves)  # no selected parameter enters
            )
        # Where they come from, without their numbers: of P of these nothing is made.
        self.gradient = {j: get_gradient_edge(g) for j, g in enumerate(gradient) if g is not None and g.requires_grad}

    def __call__(
        self, tangent: list[Tensor], *, batched: bool = False, among: Sequence[int] | None = None
    ) -> list[Tensor]:
        """See `Way`; a block costs only what lies between its layer and the outputs."""
        chosen = range(len(self.leaves)) if among is None else among
        live = [(self.gradient[j], part) for j, part in zip(chosen, tangent, strict=True) if j in self.gradient]
        if not live:
            return [torch.zeros_like(part) for part in tangent]
        with differentiable():
            return list(
                torch.autograd.grad(
                    [gradient for gradient, _ in live],
                    [self.leaves[j] for j in chosen],
                    [part for _, part in live],
                    retain_graph=True,
                    materialize_grads=True,
                    is_grads_batched=batched,
                )
            )


class Linearized(Way):
    """Forward over reverse: the gradient linearised once, its tangent map evaluated per vector."""

    name = "linearize"

    def __init__(self, function: Scalar, parameters: Tree) -> None:
        self.names, self.values = list(parameters), parameters
        with warnings.catch_warnings(), differentiable():
            warnings.simplefilter("ignore")  # the tracer warns about its own bookkeeping
            self.linear = _linearized(torch.func.grad(function), parameters)

    def __call__(
        self, tangent: list[Tensor], *, batched: bool = False, among: Sequence[int] | None = None
    ) -> list[Tensor]:
        """See `Way`; a block costs as much as the whole."""
        linear = torch.func.vmap(self.linear) if batched else self.linear
        names = self.names if among is None else [self.names[j] for j in among]
        given = dict(zip(names, tangent, strict=True))
        lead = tangent[0].shape[:1] if batched else ()
        for name, value in self.values.items():
            if name not in given:
                given[name] = value.new_zeros(()).expand((*lead, *value.shape))
        product = linear({name: given[name] for name in self.names})
        return [product[name] for name in names]


def _linearized(function: Callable[[Tree], Any], parameters: Tree) -> Callable[[Tree], Any]:
    """The tangent map of a function, its constants folded now rather than at the first call."""
    _, linear = torch.func.linearize(function, parameters)
    linear({name: torch.zeros_like(value) for name, value in parameters.items()})
    return linear


# -- the Jacobian of the outputs -----------------------------------------------------------------------------


class OutputGraph:
    """Outputs of one batch with their graph: outputs, targets and u ↦ Jᵀ u."""

    def __init__(
        self, problem: Problem, batch: Any, mode: contextlib.AbstractContextManager[Any] | None = None
    ) -> None:
        leaves = leaves_of(problem.parameters)
        self.names, self.leaves = list(leaves), list(leaves.values())
        with torch.enable_grad(), differentiable(), mode or contextlib.nullcontext():
            self.graph, self.targets = problem.evaluate(leaves, batch)
        self.outputs = self.graph.detach()

    def pull(self, cotangent: Tensor, *, batched: bool = False) -> list[Tensor]:
        """Jᵀ u, one tensor a parameter; with `batched`, of K cotangents stacked in front."""
        parts: tuple[Tensor | None, ...] = (None,) * len(self.leaves)
        if self.graph.requires_grad:
            with differentiable():
                parts = torch.autograd.grad(
                    self.graph,
                    self.leaves,
                    cotangent,
                    retain_graph=True,
                    allow_unused=True,  # and filled here: PyTorch forgets the columns of a block
                    is_grads_batched=batched,
                )
        lead = cotangent.shape[:1] if batched else ()
        return [
            leaf.new_zeros((*lead, *leaf.shape)) if part is None else part
            for leaf, part in zip(self.leaves, parts, strict=True)
        ]


class Jacobian(OutputGraph):
    """J = ∂z/∂θ of one batch: v ↦ J v beside u ↦ Jᵀ u."""

    def __init__(self, problem: Problem, batch: Any, *, linearize: bool) -> None:
        super().__init__(problem, batch, None if linearize else Convolutions())
        self._linear: Callable[[Tree], Tensor] | None = None
        self._transposed: list[tuple[int, GradientEdge]] = []
        if linearize:
            with warnings.catch_warnings(), differentiable():
                warnings.simplefilter("ignore")
                self._linear = _linearized(lambda p: problem.evaluate(p, batch)[0], problem.parameters)
        elif self.graph.requires_grad:
            # J v as the derivative of the linear map u ↦ Jᵀ u, by reverse mode alone
            self._dummy = torch.zeros_like(self.outputs, requires_grad=True)
            with torch.enable_grad(), differentiable():
                parts = torch.autograd.grad(
                    self.graph, self.leaves, self._dummy, create_graph=True, allow_unused=True
                )
            self._transposed = [(j, get_gradient_edge(part)) for j, part in enumerate(parts) if part is not None]

    def push(self, tangent: list[Tensor], *, batched: bool = False) -> Tensor:
        """J v, of the outputs' shape; with `batched`, of K tangents stacked in front."""
        if self._linear is not None:
            linear = torch.func.vmap(self._linear) if batched else self._linear
            return linear(dict(zip(self.names, tangent, strict=True)))
        if not self._transposed:
            lead = tangent[0].shape[:1] if batched else ()
            return self.outputs.new_zeros((*lead, *self.outputs.shape))
        (product,) = torch.autograd.grad(
            [part for _, part in self._transposed],
            self._dummy,
            [tangent[j] for j, _ in self._transposed],
            retain_graph=True,
            is_grads_batched=batched,
        )
        return product

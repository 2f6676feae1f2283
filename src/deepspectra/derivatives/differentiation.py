"""Ways of differentiating: second derivatives of scalars, the Jacobian of outputs, and their checks.

No one order of differentiation wins on every network, and some are silently wrong on some operations, so
there are several, and each is checked once on the network at hand.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deepspectra.derivatives.convolution import Convolutions
from deepspectra.problem.evaluation import differentiable
from deepspectra.problem.problem import Problem

SINGLE_EASE = 1e-3  # by which errors are judged more leniently where float32 inside limits what can be seen
GOOD = 1e-6  # a relative error at which no further step size or point is tried
POINTS = 3
Tree = dict[str, Tensor]
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
        leaves = {name: value.detach().requires_grad_() for name, value in parameters.items()}
        self.leaves = list(leaves.values())
        with torch.enable_grad(), differentiable(), Convolutions():
            value = function(leaves)
            gradient = (
                torch.autograd.grad(value, self.leaves, create_graph=True, allow_unused=True)
                if value.requires_grad
                else (None,) * len(self.leaves)  # no selected parameter enters
            )
        self.gradient = {j: g for j, g in enumerate(gradient) if g is not None and g.requires_grad}

    def __call__(
        self, tangent: list[Tensor], *, batched: bool = False, among: Sequence[int] | None = None
    ) -> list[Tensor]:
        """See `Way`; a block costs only what lies between its layer and the outputs."""
        chosen = range(len(self.leaves)) if among is None else among
        live = [
            (self.gradient[j], part) for j, part in zip(chosen, tangent, strict=True) if j in self.gradient
        ]
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


class Forward:
    """Outputs of one batch with their graph: outputs, targets and u ↦ Jᵀ u."""

    def __init__(self, problem: Problem, batch: Any) -> None:
        leaves = {name: value.detach().requires_grad_() for name, value in problem.parameters.items()}
        self.names, self.leaves = list(leaves), list(leaves.values())
        with torch.enable_grad(), differentiable():
            self.graph, self.targets = problem.evaluate(leaves, batch)
        self.outputs = self.graph.detach()

    def pull(self, cotangent: Tensor, *, batched: bool = False) -> list[Tensor]:
        """Jᵀ u, one tensor a parameter; with `batched`, of K cotangents stacked in front."""
        if not self.graph.requires_grad:
            lead = cotangent.shape[:1] if batched else ()
            return [leaf.new_zeros((*lead, *leaf.shape)) for leaf in self.leaves]
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


class Jacobian(Forward):
    """J = ∂z/∂θ of one batch: v ↦ J v beside u ↦ Jᵀ u."""

    def __init__(self, problem: Problem, batch: Any, *, linearize: bool) -> None:
        super().__init__(problem, batch)
        self._linear: Callable[[Tree], Tensor] | None = None
        self._transposed: list[tuple[int, Tensor]] = []
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
            self._transposed = [(j, part) for j, part in enumerate(parts) if part is not None]

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


# -- checks --------------------------------------------------------------------------------------------------


def curvature_error(sample: Problem, way: type[Way]) -> float:
    """Relative error of a way on a small float64 problem: its symmetry, and against differences of gradients."""
    return _least_error(sample, lambda moved, generator: _curvature_error(moved, way, generator))


def jacobian_error(sample: Problem, *, linearize: bool) -> float:
    """Relative error of J v against differences of outputs, and of ⟨u, J v⟩ = ⟨Jᵀu, v⟩."""
    return _least_error(sample, lambda moved, generator: _jacobian_error(moved, linearize, generator))


def block_error(sample: Problem, way: type[Way]) -> float:
    """Relative difference of a block's products from those of its vectors, one by one."""
    batch = next(iter(sample.batches))
    graph = way(
        lambda parameters: sample.loss_function.total(*sample.evaluate(parameters, batch)), sample.parameters
    )
    directions = _directions(sample)
    together = graph([torch.stack(parts) for parts in zip(*directions, strict=True)], batched=True)
    return _difference(together, [graph(direction) for direction in directions])


def jacobian_block_error(sample: Problem, *, linearize: bool) -> float:
    """The same of J v and of Jᵀ u."""
    jacobian = Jacobian(sample, next(iter(sample.batches)), linearize=linearize)
    u, v = _directions(sample)
    pushed = jacobian.push(u), jacobian.push(v)
    both = jacobian.push([torch.stack(pair) for pair in zip(u, v, strict=True)], batched=True)
    size = float(torch.stack(pushed).norm()) + 1e-300
    error = float((both - torch.stack(pushed)).norm()) / size
    pulled = [jacobian.pull(part) for part in pushed]
    together = jacobian.pull(torch.stack(pushed), batched=True)
    return max(error, _difference(together, pulled))


def _difference(together: list[Tensor], alone: list[list[Tensor]]) -> float:
    stacked = [torch.stack(parts) for parts in zip(*alone, strict=True)]
    gaps = [a - b for a, b in zip(together, stacked, strict=True)]
    return _norm(gaps) / (_norm(stacked) + 1e-300)


def _directions(sample: Problem) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    u, v = (_direction(sample, generator) for _ in range(2))
    return list(u.values()), list(v.values())


def _least_error(sample: Problem, error: Callable[[Problem, torch.Generator], float]) -> float:
    """Of a few points beside the parameters: what is wrong is wrong everywhere.

    A point moved a little at random is away from kinks that sit exactly at the parameters (a zero bias before a
    ReLU), but differences can still step across one by chance.
    """
    best = float("inf")
    for seed in range(POINTS):
        generator = torch.Generator().manual_seed(seed)
        moved = {name: value + 1e-3 * _noise(value, generator) for name, value in sample.parameters.items()}
        best = min(best, error(sample.variant(parameters=moved), generator))
        if best < GOOD:
            break
    return best


def _curvature_error(sample: Problem, way: type[Way], generator: torch.Generator) -> float:
    base = sample.parameters
    batch = next(iter(sample.batches))

    def value(parameters: Tree) -> Tensor:
        return sample.loss_function.total(*sample.evaluate(parameters, batch))

    graph = way(value, base)
    u, v = (_direction(sample, generator) for _ in range(2))
    hu, hv = graph(list(u.values())), graph(list(v.values()))
    scale = _norm(hu) * _norm(list(v.values())) + _norm(hv) * _norm(list(u.values()))
    asymmetry = abs(_dot(list(u.values()), hv) - _dot(list(v.values()), hu)) / scale if scale else 0.0

    def gradient(step: float) -> list[Tensor]:
        leaves = {n: (p + step * v[n]).detach().requires_grad_() for n, p in base.items()}
        with torch.enable_grad(), differentiable():
            total = value(leaves)
            if not total.requires_grad:
                return [torch.zeros_like(leaf) for leaf in leaves.values()]
            return list(torch.autograd.grad(total, list(leaves.values()), materialize_grads=True))

    single = _computes_in_single(sample, base, v, batch)
    size = _norm(gradient(0.0))

    def gap(step: float) -> tuple[float, float]:
        difference = [(a - b) / (2 * step) for a, b in zip(gradient(step), gradient(-step), strict=True)]
        return _norm([d - h for d, h in zip(difference, hv, strict=True)]), _norm(hv)

    return max(_difference_error(gap, size, single=single), asymmetry * (SINGLE_EASE if single else 10))


def _difference_error(gap: Callable[[float], tuple[float, float]], size: float, *, single: bool) -> float:
    """The least relative gap between a derivative and differences over several step sizes.

    `gap` gives (gap, size of the derivative) at a step, `size` is that of what is differenced, whose rounding a
    small step enlarges. Large networks of ReLUs need small steps, which cross no kink; the search ends early.
    """
    noise, steps = (1e-6, (1e-2, 1e-3)) if single else (1e-13, (1e-7, 1e-8, 1e-6, 1e-5, 1e-9, 1e-4))
    best = float("inf")
    for step in steps:
        difference, derivative = gap(step)
        best = min(best, difference / (derivative + noise * size / step + 1e-300))
        if best < GOOD:
            break
    return best * (SINGLE_EASE if single else 1)


def _computes_in_single(sample: Problem, base: Tree, v: Tree, batch: Any) -> bool:
    """Whether a float64 model computes in float32 inside, as some norms and attentions do.

    Then outputs do not follow a change too small for float32, and differences carry float32 noise.
    """
    change = []
    for step in (1e-10, 1e-4):
        ahead, behind = (
            sample.values(batch, {n: p + s * v[n] for n, p in base.items()})[0] for s in (step, -step)
        )
        change.append((ahead - behind).double() / (2 * step))
    return float((change[0] - change[1]).norm()) > 0.05 * float(change[1].norm())


def _jacobian_error(sample: Problem, linearize: bool, generator: torch.Generator) -> float:
    batch = next(iter(sample.batches))
    jacobian = Jacobian(sample, batch, linearize=linearize)
    v = _direction(sample, generator)
    pushed = jacobian.push(list(v.values()))
    u = torch.randn(pushed.shape, generator=generator, dtype=torch.float64).to(pushed)
    left, right = float((u * pushed).sum()), _dot(jacobian.pull(u), list(v.values()))
    scale = float(u.norm() * pushed.norm()) + 1e-300
    single = _computes_in_single(sample, sample.parameters, v, batch)

    def gap(step: float) -> tuple[float, float]:
        ahead, behind = (
            sample.values(batch, {n: p + s * v[n] for n, p in sample.parameters.items()})[0]
            for s in (step, -step)
        )
        return float(((ahead - behind) / (2 * step) - pushed).norm()), float(pushed.norm())

    error = _difference_error(gap, float(jacobian.outputs.norm()), single=single)
    return max(error, abs(left - right) / scale * (SINGLE_EASE if single else 1))


def _direction(problem: Problem, generator: torch.Generator) -> Tree:
    """A random direction of all parameters, zero where PyTorch calls the derivative zero by decree: at padding."""
    direction = {name: _noise(value, generator) for name, value in problem.parameters.items()}
    names = {id(p): name for name, p in problem.model.named_parameters()}
    for module in problem.model.modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.padding_idx is not None:
            name = names.get(id(module.weight))
            if name in direction:
                direction[name][module.padding_idx] = 0
    return direction


def _noise(value: Tensor, generator: torch.Generator) -> Tensor:
    """A random direction of the size of the parameter, so that every layer is tried at its own scale."""
    noise = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value)
    size = float(value.norm()) / max(1, value.numel()) ** 0.5
    return noise * (size if size > 0 else 0.1)


def _dot(a: list[Tensor], b: list[Tensor]) -> float:
    return float(sum((x * y).sum() for x, y in zip(a, b, strict=True)))


def _norm(a: list[Tensor]) -> float:
    return math.sqrt(_dot(a, a))

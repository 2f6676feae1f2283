"""Whether a way of differentiating is right on a network, judged on a few of its examples.

No one order of differentiation wins on every network, and some are silently wrong on some operations: each is held
against its own symmetry and against finite differences.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from deepspectra.derivatives.ways import Jacobian, Way
from deepspectra.problem.evaluation import Tree, differentiable
from deepspectra.problem.problem import Problem

SINGLE_EASE = 1e-3  # by which errors are judged more leniently where float32 inside limits what can be seen
GOOD = 1e-6  # a relative error at which no further step size or point is tried
POINTS = 3


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

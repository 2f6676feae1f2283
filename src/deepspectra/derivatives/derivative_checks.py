"""Whether a way of differentiating is right on a network, judged on a few of its examples.

No one order of differentiation wins on every network, and some are silently wrong on some operations: each is held
against its own symmetry and against finite differences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from deepspectra.derivatives.ways import Jacobian, Way
from deepspectra.problem.evaluated_model import Tree
from deepspectra.problem.problem import Problem

SINGLE_EASE = 1e-3  # by which errors are judged more leniently where float32 inside limits what can be seen
GOOD = 1e-6  # a relative error at which no further step size or point is tried
POINTS = 3


def curvature_error(sample: Problem, way: type[Way]) -> float:
    """Relative error of a way on a small float64 problem: its symmetry, and against differences of gradients."""

    def error(moved: Problem, generator: torch.Generator) -> float:
        u, v = (_direction(moved, generator) for _ in range(2))
        graph = _graph(moved, way)
        image = graph(v)
        mismatch = _mismatch((v, image), (u, graph(u)))
        del graph, u  # of a large network nothing is kept that is not needed any more

        def gradient(step: float) -> Tensor:
            return moved.variant(parameters=_along(moved, v, step)).gradient().mul_(moved.total_weight)

        return _misfit(moved, v, _flat(image), mismatch, gradient)

    return _least_error(sample, error)


def jacobian_error(sample: Problem, *, linearize: bool) -> float:
    """Relative error of J v against differences of outputs, and of ⟨u, J v⟩ = ⟨Jᵀu, v⟩."""

    def error(moved: Problem, generator: torch.Generator) -> float:
        jacobian = Jacobian(moved, next(iter(moved.batches)), linearize=linearize)
        v = _direction(moved, generator)
        pushed = jacobian.push(v)
        u = torch.randn(pushed.shape, generator=generator, dtype=torch.float64).to(pushed)
        mismatch = _mismatch((v, [pushed]), ([u], jacobian.pull(u)))
        del jacobian
        return _misfit(moved, v, pushed.flatten(), mismatch, lambda step: _outputs(moved, v, step).flatten())

    return _least_error(sample, error)


def block_error(sample: Problem, way: type[Way]) -> float:
    """Relative difference of a block's products from those of its vectors, one by one."""
    graph = _graph(sample, way)
    u, v = _directions(sample)
    return _apart(graph(_stacked(u, v), batched=True), _stacked(graph(u), graph(v)))


def jacobian_block_error(sample: Problem, *, linearize: bool) -> float:
    """The same of J v and of Jᵀ u."""
    jacobian = Jacobian(sample, next(iter(sample.batches)), linearize=linearize)
    u, v = _directions(sample)
    pushed = torch.stack([jacobian.push(u), jacobian.push(v)])
    together = jacobian.push(_stacked(u, v), batched=True)
    pulled = _stacked(*(jacobian.pull(part) for part in pushed))
    return max(_apart([together], [pushed]), _apart(jacobian.pull(pushed, batched=True), pulled))


def curvature_rounding(coarse: Problem, fine: Problem, way: type[Way]) -> float:
    """Relative difference of a product with H of a problem from that of the same weights in a finer type."""
    v = _direction(fine, torch.Generator().manual_seed(0))
    found, right = (_graph(one, way)([part.to(one.dtype) for part in v]) for one in (coarse, fine))
    return _apart([part.to(fine.dtype) for part in found], right)


def jacobian_rounding(coarse: Problem, fine: Problem, *, linearize: bool) -> float:
    """The same of J v."""
    v = _direction(fine, torch.Generator().manual_seed(0))
    found, right = (
        Jacobian(one, next(iter(one.batches)), linearize=linearize).push([part.to(one.dtype) for part in v])
        for one in (coarse, fine)
    )
    return _apart([found.to(fine.dtype)], [right.to(fine.dtype)])


def _graph(sample: Problem, way: type[Way]) -> Way:
    """What the way makes of the loss of the one batch."""
    batch = next(iter(sample.batches))
    return way(lambda p: sample.loss_function.total(*sample.evaluate(p, batch)), sample.parameters)


def _mismatch(pushed: tuple[list[Tensor], list[Tensor]], pulled: tuple[list[Tensor], list[Tensor]]) -> float:
    """Of a linear map on v and its transpose on u: ⟨u, J v⟩ − ⟨Jᵀu, v⟩, relatively."""
    (v, image), (u, back) = pushed, pulled
    scale = _inner(u, u) ** 0.5 * _inner(image, image) ** 0.5 + _inner(back, back) ** 0.5 * _inner(v, v) ** 0.5
    return abs(_inner(u, image) - _inner(back, v)) / scale if scale else 0.0


def _misfit(
    sample: Problem, v: list[Tensor], image: Tensor, mismatch: float, function: Callable[[float], Tensor]
) -> float:
    """Of a linear map: the gap of its image of v from differences along v, and the mismatch with its transpose."""
    single = _computes_in_single(sample, v)
    gap = _difference_error(function, image, single=single)
    return max(gap, mismatch * (SINGLE_EASE if single else 10))


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


def _difference_error(function: Callable[[float], Tensor], derivative: Tensor, *, single: bool) -> float:
    """The least relative gap between the derivative of function(step) at 0 and differences over several steps.

    A small step enlarges the rounding of what is differenced. Large networks of ReLUs need small steps, which cross
    no kink; the search ends early.
    """
    noise, steps = (1e-6, (1e-2, 1e-3)) if single else (1e-13, (1e-7, 1e-8, 1e-6, 1e-5, 1e-9, 1e-4))
    best = float("inf")
    size, own = float(function(0.0).norm()), float(derivative.norm())
    for step in steps:
        gap = float((_difference(function, step) - derivative).norm())
        best = min(best, gap / (own + noise * size / step + 1e-300))
        if best < GOOD:
            break
    return best * (SINGLE_EASE if single else 1)


def _computes_in_single(sample: Problem, v: list[Tensor]) -> bool:
    """Whether a float64 model computes in float32 inside, as some norms and attentions do.

    Then outputs do not follow a change too small for float32, and differences carry float32 noise.
    """
    small, large = (_difference(lambda t: _outputs(sample, v, t).double(), step) for step in (1e-10, 1e-4))
    return float((small - large).norm()) > 0.05 * float(large.norm())


def _difference(function: Callable[[float], Tensor], step: float) -> Tensor:
    return (function(step) - function(-step)) / (2 * step)


def _outputs(sample: Problem, v: list[Tensor], step: float) -> Tensor:
    return sample.values(next(iter(sample.batches)), _along(sample, v, step))[0]


def _along(sample: Problem, v: list[Tensor], step: float) -> Tree:
    """The parameters, moved along a direction."""
    return {name: p + step * part for (name, p), part in zip(sample.parameters.items(), v, strict=True)}


def _directions(sample: Problem) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return _direction(sample, generator), _direction(sample, generator)


def _direction(problem: Problem, generator: torch.Generator) -> list[Tensor]:
    """A random direction of all parameters, zero where PyTorch calls the derivative zero by decree: at padding."""
    direction = {name: _noise(value, generator) for name, value in problem.parameters.items()}
    names = {id(p): name for name, p in problem.model.named_parameters()}
    for module in problem.model.modules():
        padding, table = getattr(module, "padding_idx", None), getattr(module, "weight", None)
        if padding is not None and (name := names.get(id(table))) in direction:
            direction[name][padding] = 0
    return list(direction.values())


def _noise(value: Tensor, generator: torch.Generator) -> Tensor:
    """A random direction of the size of the parameter, so that every layer is tried at its own scale."""
    noise = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value)
    size = float(value.norm()) / max(1, value.numel()) ** 0.5
    return noise * (size if size > 0 else 0.1)


def _inner(parts: list[Tensor], others: list[Tensor]) -> float:
    return sum(float(part.reshape(-1) @ other.reshape(-1)) for part, other in zip(parts, others, strict=True))


def _flat(parts: Iterable[Tensor]) -> Tensor:
    return torch.cat([part.reshape(-1) for part in parts])


def _stacked(*vectors: list[Tensor]) -> list[Tensor]:
    return [torch.stack(parts) for parts in zip(*vectors, strict=True)]


def _apart(found: list[Tensor], right: list[Tensor]) -> float:
    """The relative difference of two lists of tensors."""
    return float((_flat(found) - _flat(right)).norm()) / (float(_flat(right).norm()) + 1e-300)

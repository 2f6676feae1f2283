"""Capturing features and errors: every use of a parameter as the network makes it.

Operations are seen as the network calls them, so that fused, tied and reused parameters are found wherever they
are used. How each orders examples, and that the uses found are all there are, is measured on a few examples; a
parameter that fails is differentiated one example at a time.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from deepspectra.batches import map_tensors, tensors
from deepspectra.convolution import read_call
from deepspectra.errors import CurvatureError
from deepspectra.evaluation import differentiable
from deepspectra.problem import Problem
from deepspectra.uses import LAYOUTS, Alone, Convolution, Layout, Lookup, Matrix, Slice, Use, Vectors

TOLERANCE = 1e-7  # relative, in float64, of products by features and errors against those by backpropagation
PLANNED_SCALARS = 2  # of each row, on which uses are checked
ROUTED = {torch.float64: 1e-6, torch.float32: 1e-2}  # relative, of errors of examples that are weighted
ROUTED_HALF = 0.2
ROUNDING = 1e-13  # of the largest gradient of a parameter, for parameters without effect


class Watch(TorchFunctionMode):
    """Sees every operation that uses one of the parameters."""

    def __init__(self, leaves: dict[str, Tensor]) -> None:
        super().__init__()
        self.names = {id(leaf): name for name, leaf in leaves.items()}
        self.uses: list[tuple[Use, Tensor]] = []  # with the output of the operation, in the graph

    def find(self, tensor: Any) -> Slice | None:
        """Which stretch of which parameter a tensor is, if any."""
        if not isinstance(tensor, Tensor):
            return None
        if id(tensor) in self.names:
            return Slice(self.names[id(tensor)], 0, tuple(tensor.shape))
        base = tensor._base
        if base is None or id(base) not in self.names:
            return None
        start = int(tensor.storage_offset() - base.storage_offset())
        for transposed, view in ((False, tensor), (True, tensor.mT if tensor.ndim == 2 else tensor)):
            if view.is_contiguous():
                return Slice(self.names[id(base)], start, tuple(view.shape), transposed)
        return None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        rule = RULES.get(func)
        if rule is not None:
            output = func(*args, **kwargs)
            try:
                uses = rule(self.find, output, *args, **kwargs)
            except TypeError:  # called in a form that the rule does not know
                uses = []
            self.uses += [(use, output) for use in uses]
            return output.clone() if uses else output  # what follows may write into it
        if isinstance(func, FunctionType) and any(self.find(leaf) for leaf in tensors((args, kwargs))):
            inside = _opened(func)
            if inside is not None:
                with self:
                    return inside(*args, **kwargs)
        return func(*args, **kwargs)


def _opened(func: FunctionType) -> FunctionType | None:
    """A function of torch.nn.functional that runs its own body, so that the operations in it are seen."""
    checks = [name for name in func.__code__.co_names if name.startswith("has_torch_function")]
    if func.__module__ != functional.__name__ or not checks:
        return None
    names = {**func.__globals__, **dict.fromkeys(checks, lambda *_: False)}
    inside = FunctionType(func.__code__, names, func.__name__, func.__defaults__, func.__closure__)
    inside.__kwdefaults__ = func.__kwdefaults__
    return inside


Find = Callable[[Any], Slice | None]


def _bias(find: Find, bias: Any, axis: int) -> list[Use]:
    found = find(bias)
    return [Vectors(found, None, (axis,))] if found and len(found.shape) == 1 else []


def _linear(find: Find, output: Tensor, input: Tensor, weight: Any, bias: Any = None) -> list[Use]:
    found = find(weight)
    matrix: list[Use] = [Matrix(found, input.detach())] if found and len(found.shape) == 2 else []
    return matrix + _bias(find, bias, output.ndim - 2)


def _matmul(find: Find, output: Tensor, input: Tensor, other: Any) -> list[Use]:
    found = find(other)
    if not found or len(found.shape) != 2 or input.ndim < 2:
        return []
    turned = Slice(found.name, found.start, found.shape, not found.transposed)
    return [Matrix(turned, input.detach())]


def _addmm(find: Find, output: Tensor, input: Any, mat1: Tensor, mat2: Any) -> list[Use]:
    return _matmul(find, output, mat1, mat2) + _bias(find, input, output.ndim - 2)


def _convolution(
    find: Find,
    output: Tensor,
    input: Tensor,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> list[Use]:
    call = read_call(output.ndim - 2, input, weight, bias, stride, padding, dilation, groups)
    if call is None:
        return []
    found = find(weight)
    kernel: list[Use] = []
    if found and not found.transposed and len(found.shape) == output.ndim:
        kernel = [Convolution(found, input.detach(), call[-1])]
    return kernel + _bias(find, bias, 0)


def _embedding(
    find: Find,
    output: Tensor,
    input: Tensor,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> list[Use]:
    found = find(weight)
    if not found or found.transposed or max_norm is not None or scale_grad_by_freq:
        return []
    if padding_idx is not None and padding_idx < 0:
        padding_idx += found.shape[0]
    return [Lookup(found, input.detach(), padding_idx)]


def _normalisation(function: Callable[..., Tensor]) -> Callable[..., list[Use]]:
    """The rule of y = normalised x · weight + bias."""
    signature = inspect.signature(function)

    def rule(find: Find, output: Tensor, *args: Any, **kwargs: Any) -> list[Use]:
        call = signature.bind(*args, **kwargs)
        weight, bias = find(call.arguments.get("weight")), find(call.arguments.get("bias"))
        shape = call.arguments.get("normalized_shape")
        dims = output.ndim - 1
        axes = (0,) if shape is None else tuple(range(dims - len(shape), dims))
        uses: list[Use] = []
        if weight:
            call.arguments.update(weight=None, **({"bias": None} if "bias" in signature.parameters else {}))
            with torch.no_grad():
                uses.append(Vectors(weight, function(*call.args, **call.kwargs).detach(), axes))
        if bias:
            uses.append(Vectors(bias, None, axes))
        return uses

    return rule


RULES: dict[Any, Callable[..., list[Use]]] = {
    functional.linear: _linear,
    torch.matmul: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    torch.mm: _matmul,
    Tensor.mm: _matmul,
    torch.addmm: _addmm,
    torch.conv1d: _convolution,
    torch.conv2d: _convolution,
    functional.embedding: _embedding,
    **{
        function: _normalisation(function)
        for function in (
            functional.batch_norm,
            functional.instance_norm,
            functional.layer_norm,
            functional.group_norm,
            functional.rms_norm,
        )
    },
}


# -- capture -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What was learned on a few examples.

    Attributes:
        layouts: of each use, in the order of the network's calls; None if the use is not understood.
        single: of each use, whether its output had one entry an example along the dimension of the examples.
        alone: parameters to be differentiated one example at a time.
    """

    layouts: tuple[Layout | None, ...]
    single: tuple[bool, ...]
    alone: tuple[str, ...]


def count_examples(batch: Any, num_rows: int) -> int:
    """How many examples a batch of so many rows holds.

    Raises:
        CurvatureError: rows are not spread evenly over examples.
    """
    num_examples = next((len(leaf) for leaf in tensors(batch) if leaf.ndim), 0)
    if not num_examples or num_rows % num_examples:
        raise CurvatureError(
            f"a batch of {num_examples} examples gives {num_rows} rows: features and errors by example need the "
            "same number of rows for each."
        )
    return num_examples


def plan(sample: Problem, weigh: Callable[[Tensor, Tensor], Tensor], *, joint: bool = False) -> Plan:
    """How to capture a problem's gradients, learned on a sample of it in float64.

    Args:
        sample: the same network on a few examples, at least two if a batch of the problem has as many.
        weigh: of outputs and targets, cotangents (n, C, m).
        joint: as in `capture`.
    """
    (batch,) = list(sample.batches)[:1]

    def few(outputs: Tensor, targets: Tensor) -> Tensor:
        weights = weigh(outputs, targets)[:, :, :PLANNED_SCALARS]
        return weights.reshape(num_examples, -1, weights.shape[2]) if joint else weights

    watch, leaves, outputs, targets = _forward(sample, batch)
    num_examples = count_examples(batch, len(outputs))
    generator = torch.Generator().manual_seed(0)
    cotangent = torch.randn(outputs.shape, generator=generator, dtype=torch.float64).to(outputs)
    codes = torch.linspace(1, 2, num_examples, dtype=torch.float64).to(outputs)
    rows = codes.repeat_interleave(len(outputs) // num_examples).view(-1, *[1] * (outputs.ndim - 1))
    ends = [output for _, output in watch.uses]
    layouts: list[Layout | None] = []
    if ends:
        pairs = zip(_errors(outputs, ends, cotangent), _errors(outputs, ends, rows * cotangent), strict=True)
        layouts = [next((lay for lay in LAYOUTS if lay.fits(*pair, codes)), None) for pair in pairs]
    single = tuple(
        layout is not None and _single(layout, output, num_examples)
        for layout, output in zip(layouts, ends, strict=True)
    )
    found = Plan(tuple(layouts), single, ())
    held = capture(sample, batch, found, few)
    weights = few(outputs.detach(), targets)
    mixed = torch.randn(weights.shape[0], weights.shape[2], generator=generator, dtype=torch.float64).to(
        outputs
    )
    along = torch.einsum("ncm,nm->nc", weights, mixed).view(outputs.shape)
    truth = torch.autograd.grad(
        outputs, list(leaves.values()), along, materialize_grads=True, retain_graph=True
    )
    rounding = ROUNDING * torch.stack([gradient.norm() for gradient in truth]).max()
    shaped = mixed.view(num_examples, -1, 1)
    alone = []
    for name, gradient in zip(leaves, truth, strict=True):
        total = torch.zeros(gradient.numel(), dtype=gradient.dtype, device=gradient.device)
        for use in held:
            if use.slice.name == name:
                piece = use.pull(shaped, slice(None))
                total[use.slice.start : use.slice.start + use.slice.numel] += piece.flatten()
        wrong = (total - gradient.flatten()).norm() > TOLERANCE * gradient.norm() + rounding
        if wrong or _overlapping({use.slice for use in held if use.slice.name == name}):
            alone.append(name)
    return Plan(found.layouts, single, tuple(alone))


def _overlapping(slices: set[Slice]) -> bool:
    """Whether different stretches of a parameter share numbers."""
    places = sorted({(s.start, s.start + s.numel, s.shape) for s in slices})
    return any(second[0] < first[1] for first, second in itertools.pairwise(places))


def capture(
    problem: Problem,
    batch: Any,
    plan: Plan,
    weigh: Callable[[Tensor, Tensor], Tensor],
    names: frozenset[str] | None = None,
    *,
    joint: bool = False,
) -> list[Use]:
    """Features and errors of a batch for the scalars Σ_c W_{n,c,a} z_{n,c}, W (n, C, m) = weigh(outputs, targets).

    Each example has J = m scalars for each of its rows, row by row; or J = m that are sums over its rows, if these
    are `joint`. Parameters that `names` leaves out are skipped.

    Raises:
        CurvatureError: the examples are not spread over an operation as they were on the plan's few.

    Cost: a forward pass and J backward passes that stop at the outputs of layers, about a third of a gradient
    each, and one more for operations that see several rows an example; for parameters that the plan sets alone,
    J backward passes of every example by itself.
    """
    watch, leaves, outputs, targets = _forward(problem, batch)
    num_examples = count_examples(batch, len(outputs))
    if len(watch.uses) != len(plan.layouts):
        raise CurvatureError(
            f"the network used its parameters {len(watch.uses)} times on one batch and {len(plan.layouts)} times "
            "on another; features and errors by example need the same operations for every batch."
        )
    wanted = set(leaves if names is None else names)
    chosen, routed = [], []
    for (use, output), layout, single in zip(watch.uses, plan.layouts, plan.single, strict=True):
        if layout is None or use.slice.name not in wanted - set(plan.alone):
            continue
        _check_rows(use, output, layout, num_examples)
        chosen.append((use, output, layout))
        if not (single and _single(layout, output, num_examples)):
            routed.append(chosen[-1])
    weights = weigh(outputs.detach(), targets)
    if joint:  # as if all outputs of an example were one row
        weights = weights.reshape(num_examples, -1, weights.shape[2])
    uses = [use for use, _, _ in chosen]
    for use, _, layout in chosen:
        use.arrange(layout, num_examples)
    _fill(chosen, routed, outputs, weights, num_examples)
    for name in plan.alone:
        if name in wanted:
            uses.append(_one_by_one(problem, batch, name, weights, num_examples))
    return uses


def _forward(problem: Problem, batch: Any) -> tuple[Watch, dict[str, Tensor], Tensor, Tensor]:
    leaves = {name: value.detach().requires_grad_() for name, value in problem.parameters.items()}
    with torch.enable_grad(), differentiable(), Watch(leaves) as watch:
        outputs, targets = problem.evaluate(leaves, batch)
    return watch, leaves, outputs, targets


def _errors(outputs: Tensor, ends: list[Tensor], cotangent: Tensor) -> tuple[Tensor, ...]:
    with differentiable():
        return torch.autograd.grad(outputs, ends, cotangent, retain_graph=True, materialize_grads=True)


def _single(layout: Layout, output: Tensor, num_examples: int) -> bool:
    """Whether an output has one entry an example along the dimension of the examples."""
    return output.shape[layout.dim] == num_examples


def _check_rows(use: Use, output: Tensor, layout: Layout, num_examples: int) -> None:
    """An operation sees as many rows of each example."""
    for tensor in (output, use.given):
        if tensor is not None and (tensor.ndim <= layout.dim or tensor.shape[layout.dim] % num_examples):
            raise _uneven(use)


def _uneven(use: Use) -> CurvatureError:
    return CurvatureError(
        f"an operation with parameter {use.slice.name!r} sees a different number of rows of each example, or in "
        "another order than on other batches (is an example's way through the network chosen by its values?). "
        "Use batch_size=1, or leave the parameter out by parameters=."
    )


def _fill(chosen: list[Any], routed: list[Any], outputs: Tensor, weights: Tensor, num_examples: int) -> None:
    """Backpropagate every scalar of every row to the outputs of the uses, and have them keep the errors.

    Where rows could be routed by their values, the errors of all scalars, mixed by random signs, are compared with
    those of scalars that are weighted by example besides.
    """
    if not chosen or not weights.shape[2]:
        return
    ends = {id(output): output for _, output, _ in chosen}
    num_rows, scalars = len(weights) // num_examples, weights.shape[2]
    by_row = weights.view(num_examples, num_rows, -1, scalars)
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(2, (num_rows * scalars,), generator=generator).mul(2).sub(1).tolist()
    mixed = {id(output): torch.zeros_like(output, requires_grad=False) for _, output, _ in routed}
    along = torch.zeros_like(outputs, requires_grad=False)
    for index in range(num_rows * scalars):
        row, scalar = divmod(index, scalars)
        cotangent = torch.zeros_like(outputs)
        cotangent.view(num_examples, num_rows, -1)[:, row] = by_row[:, row, :, scalar]
        found = dict(zip(ends, _errors(outputs, list(ends.values()), cotangent), strict=True))
        for use, output, layout in chosen:
            use.put(index, num_rows * scalars, layout.examples_first(found[id(output)], num_examples))
        if routed:
            along += signs[index] * cotangent
            for key in mixed:
                mixed[key] += signs[index] * found[key]
    if routed and num_examples > 1:
        _check_routes(routed, outputs, along, mixed, num_examples)


def _check_routes(
    routed: list[Any], outputs: Tensor, along: Tensor, mixed: dict[int, Tensor], num_examples: int
) -> None:
    """Errors of a cotangent that is weighted by example are the weighted errors of the cotangent itself."""
    generator = torch.Generator().manual_seed(1)
    codes = (1 + torch.rand(num_examples, generator=generator, dtype=torch.float64)).to(outputs)
    rows = codes.repeat_interleave(len(outputs) // num_examples)
    ends = {id(output): output for _, output, _ in routed}
    weighted = rows.view(-1, *[1] * (along.ndim - 1)) * along
    coded = dict(zip(ends, _errors(outputs, list(ends.values()), weighted), strict=True))
    for use, output, layout in routed:
        plain, other = (layout.examples_first(kind[id(output)], num_examples) for kind in (mixed, coded))
        difference = (codes.view(-1, *[1] * (plain.ndim - 1)) * plain - other).abs()
        limit = ROUTED.get(outputs.dtype, ROUTED_HALF)
        if difference.numel() and difference.max() > limit * other.abs().max():
            raise _uneven(use)


@dataclass(frozen=True)
class _Example:
    """Cuts one example from what has one row an example."""

    index: int
    num_examples: int

    def __call__(self, leaf: Tensor) -> Tensor:
        if not leaf.ndim or len(leaf) != self.num_examples:
            return leaf
        return leaf[self.index : self.index + 1]


def _one_by_one(problem: Problem, batch: Any, name: str, weights: Tensor, num_examples: int) -> Alone:
    """Gradients (B, J, ...) of one parameter by examples that pass the network alone."""
    value = problem.parameters[name]
    by_row = weights.view(num_examples, -1, *weights.shape[1:])
    rows = []
    for b in range(num_examples):
        single = map_tensors(_Example(b, num_examples), batch)
        leaf = value.detach().requires_grad_()
        with torch.enable_grad(), differentiable():
            outputs, _ = problem.evaluate({**problem.parameters, name: leaf}, single)
        for r in range(by_row.shape[1]):
            for scalar in range(weights.shape[2]):
                cotangent = torch.zeros_like(outputs)
                cotangent.view(by_row.shape[1], -1)[r] = by_row[b, r, :, scalar].flatten()
                with differentiable():
                    (gradient,) = torch.autograd.grad(
                        outputs, leaf, cotangent, retain_graph=True, materialize_grads=True
                    )
                rows.append(gradient.flatten())
    gradients = torch.stack(rows).view(num_examples, -1, value.numel())
    return Alone(Slice(name, 0, tuple(value.shape)), gradients)

"""What every use of a parameter takes in and sends back: features and errors, example by example.

An operation that is linear in a parameter gives example i the gradient Σ_t e_t h_tᵀ, with features h_t that enter
it and errors e_t that backpropagation brings to its output, summed over the positions t (pixels, tokens) where
the parameter is used. With features and errors at hand, gradients of single examples need not be formed: their
products with vectors, inner products and averages follow from the two, at a fraction of the cost.

Operations are seen as the network calls them, so that fused, tied and reused parameters are found wherever they
are used. How each orders examples, and that the uses found are all there are, is measured on a few examples; a
parameter that fails is differentiated one example at a time.
"""

from __future__ import annotations

import inspect
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from deepspectra.batches import map_tensors, tensors
from deepspectra.errors import CurvatureError
from deepspectra.problem import Problem, differentiable

TOLERANCE = 1e-7  # relative, in float64, of products by features and errors against those by backpropagation


@dataclass(frozen=True)
class Slice:
    """The contiguous stretch of a parameter that an operation uses, or its transpose.

    Attributes:
        name: of the parameter.
        start: where the stretch begins in the flattened parameter.
        shape: of the stretch as it lies in memory.
        transposed: the operation uses the transpose of that.
    """

    name: str
    start: int
    shape: tuple[int, ...]
    transposed: bool = False

    @property
    def numel(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


class Use(ABC):
    """One use of a stretch of a parameter in a batch of B examples: a map linear in the parameter.

    `given` is what the operation was given, as it was; `arrange` puts the examples first, and `hold` takes the
    errors (B, J, ...) of J scalars an example.
    """

    def __init__(self, slice: Slice, given: Tensor | None) -> None:
        self.slice = slice
        self.given = given
        self.errors = torch.empty(0)
        self.num_examples = 0

    def arrange(self, layout: Layout, num_examples: int) -> None:
        """Put the examples first in what was given."""
        self.num_examples = num_examples
        if self.given is not None:
            self.given = layout.examples_first(self.given, num_examples)

    def hold(self, errors: Tensor) -> None:
        """Keep errors (B, J, s, *output shape without its batch dimension)."""
        self.errors = errors

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        held = [self.errors] if self.given is None else [self.errors, self.given]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    @abstractmethod
    def push(self, tangents: Tensor) -> Tensor:
        """Scalars (B, J, K) that tangents (K, *shape) of the stretch bring."""

    @abstractmethod
    def pull(self, mixed: Tensor, chosen: slice | Tensor) -> Tensor:
        """Σ over chosen examples and scalars of mixed (b, J, K) times gradients: (K, *shape)."""

    @abstractmethod
    def formed(self, chunk: slice) -> Tensor:
        """Gradients (B, J, rows of the chunk × columns) themselves, for a chunk of the stretch's rows."""

    def inner(self, other: Use) -> Tensor:
        """Inner products (B·J, B'·J') of gradients, without forming them."""
        raise NotImplementedError

    def inner_cost(self) -> float:
        """Multiplications a pair of gradients that `inner` takes; infinite if it cannot."""
        return math.inf


class Vectors(Use):
    """Uses of few numbers, whose gradients are held as they are: biases, and scales of normalised features."""

    def __init__(self, slice: Slice, given: Tensor | None, axes: tuple[int, ...]) -> None:
        super().__init__(slice, given)
        self.axes = axes  # of the output (without batch and s) that the stretch lies along

    def hold(self, errors: Tensor) -> None:
        """Sum over positions."""
        if self.given is not None:
            errors = errors * self.given[:, None]
            self.given = None
        kept = {3 + axis for axis in self.axes}
        summed = [axis for axis in range(2, errors.ndim) if axis not in kept]
        self.errors = (errors.sum(summed) if summed else errors).flatten(2)

    def push(self, tangents: Tensor) -> Tensor:
        return self.errors @ tangents.reshape(len(tangents), -1).T.to(self.errors)

    def pull(self, mixed: Tensor, chosen: slice | Tensor) -> Tensor:
        flat = mixed.flatten(0, 1).T @ self.errors[chosen].flatten(0, 1)
        return flat.view(-1, *self.slice.shape)

    def formed(self, chunk: slice) -> Tensor:
        lead = self.slice.shape[:1] or (1,)
        return self.errors.view(*self.errors.shape[:2], *lead, -1)[:, :, chunk].flatten(2)


class Matrix(Use):
    """A matrix W (o, d) that takes features h_t (d) to outputs (o): gradients Σ_t e_t h_tᵀ."""

    @property
    def size(self) -> tuple[int, int]:
        """(o, d)."""
        rows, *columns = self.slice.shape
        pair = (rows, math.prod(columns))
        return pair[::-1] if self.slice.transposed else pair

    def arrange(self, layout: Layout, num_examples: int) -> None:
        """Features (B, T, d)."""
        super().arrange(layout, num_examples)
        assert self.given is not None
        self.given = self.given.reshape(num_examples, -1, self.given.shape[-1])

    def hold(self, errors: Tensor) -> None:
        """Errors (B, J, T, o)."""
        self.errors = errors.reshape(*errors.shape[:2], -1, errors.shape[-1])

    def features(self, chosen: slice | Tensor = slice(None)) -> Tensor:
        """h (b, T, d)."""
        assert self.given is not None
        return self.given[chosen]

    def outputs(self, tangents: Tensor) -> Tensor:
        """W h of each of K matrices (K, o, d): (B, K, T, o)."""
        return torch.einsum("btd,kod->bkto", self.features(), tangents)

    def push(self, tangents: Tensor) -> Tensor:
        if self.slice.transposed:
            tangents = tangents.mT
        out = self.outputs(tangents.reshape(len(tangents), *self.size).to(self.errors))
        return self.errors.flatten(2) @ out.flatten(2).mT

    def pull(self, mixed: Tensor, chosen: slice | Tensor) -> Tensor:
        errors = self.errors[chosen]
        combined = (mixed.mT @ errors.flatten(2)).view(len(errors), -1, *errors.shape[2:])  # (b, K, T, o)
        pulled = self.gradients(combined, chosen)
        return (pulled.mT if self.slice.transposed else pulled).reshape(-1, *self.slice.shape)

    def gradients(self, combined: Tensor, chosen: slice | Tensor) -> Tensor:
        """Σ_b Σ_t e_t h_tᵀ for errors (b, K, T, o): (K, o, d)."""
        return torch.einsum("bkto,btd->kod", combined, self.features(chosen))

    def formed(self, chunk: slice) -> Tensor:
        features, errors = self.features(), self.errors
        if self.slice.transposed:
            return torch.einsum("bjto,btd->bjdo", errors, features[..., chunk]).flatten(2)
        part = errors[..., chunk].transpose(2, 3).flatten(1, 2)  # (B, J·rows, T)
        return (part @ features).view(*errors.shape[:2], -1)

    def inner(self, other: Use) -> Tensor:
        """Σ_{t,s} (h_tᵀh'_s)(e_tᵀe'_s), features first: an error is mixed over positions, then multiplied."""
        assert isinstance(other, Matrix)
        total = self.errors.new_empty(len(self.errors), self.errors.shape[1], other.errors.shape[:2].numel())
        theirs = other.errors
        if self.errors.shape[2] == theirs.shape[2] == 1:
            features = self.features()[:, 0] @ other.features()[:, 0].T
            errors = self.errors.flatten(0, 1)[:, 0] @ theirs.flatten(0, 1)[:, 0].T
            products = errors.view(*self.errors.shape[:2], *theirs.shape[:2]) * features[:, None, :, None]
            return products.flatten(0, 1).flatten(1)
        for b, mine in enumerate(self.errors):
            similar = torch.einsum("td,csd->cts", self.features(slice(b, b + 1))[0], other.features())
            mixed = similar[:, None] @ theirs  # (B', J', T, o)
            total[b] = mine.flatten(1) @ mixed.flatten(2).flatten(0, 1).T
        return total.flatten(0, 1)

    def inner_cost(self) -> float:
        """Multiplications a pair of gradients."""
        scalars, positions, outputs = self.errors.shape[1:]
        mixing = positions * outputs * (positions / scalars + 1)
        return mixing + positions**2 * self.size[1] / scalars**2


class Convolution(Matrix):
    """A convolution's kernel; its features are the patches of the input."""

    def __init__(self, slice: Slice, given: Tensor, settings: tuple[Any, ...], groups: int) -> None:
        super().__init__(slice, given)
        self.settings = settings  # stride, padding, dilation
        self.groups = groups

    def arrange(self, layout: Layout, num_examples: int) -> None:
        """Images (B, s, c, ...)."""
        Use.arrange(self, layout, num_examples)

    def hold(self, errors: Tensor) -> None:
        """Errors (B, J, s·T, o)."""
        moved = errors.movedim(3, -1)  # (B, J, s, ..., o)
        self.spatial = moved.shape[3:-1]
        self.errors = moved.reshape(*moved.shape[:2], -1, moved.shape[-1])

    def features(self, chosen: slice | Tensor = slice(None)) -> Tensor:
        """Patches (b, s·T, d)."""
        assert self.given is not None
        images = self.given[chosen]
        flat = images.flatten(0, 1)
        stride, padding, dilation = self.settings
        kernel = self.slice.shape[2:]
        if len(kernel) == 1:
            flat = flat[:, :, None]
            kernel, stride, padding, dilation = (1, *kernel), (1, *stride), (0, *padding), (1, *dilation)
        patches = F.unfold(flat, kernel, dilation, padding, stride).mT  # (b·s, T, d)
        return patches.reshape(len(images), -1, patches.shape[-1])

    def outputs(self, tangents: Tensor) -> Tensor:
        assert self.given is not None
        images = self.given.flatten(0, 1)
        convolve = torch.conv1d if len(self.slice.shape) == 3 else torch.conv2d
        rows = []
        for tangent in tangents:
            out = convolve(images, tangent.view(self.slice.shape), None, *self.settings, self.groups)
            rows.append(out.movedim(1, -1).reshape(self.num_examples, -1, out.shape[1]))
        return torch.stack(rows, 1)

    def gradients(self, combined: Tensor, chosen: slice | Tensor) -> Tensor:
        assert self.given is not None
        images = self.given[chosen]
        kernel = torch.empty(self.slice.shape, dtype=images.dtype, device=images.device)
        stride, padding, dilation = self.settings
        parts = []
        for errors in combined.unbind(1):
            shaped = errors.reshape(-1, *self.spatial, errors.shape[-1]).movedim(-1, 1)
            _, gradient, _ = torch.ops.aten.convolution_backward(
                shaped.contiguous(),
                images.flatten(0, 1),
                kernel,
                None,
                stride,
                padding,
                dilation,
                False,
                [0] * len(stride),
                self.groups,
                [False, True, False],
            )
            parts.append(gradient.flatten(1))
        return torch.stack(parts)

    def formed(self, chunk: slice) -> Tensor:
        if self.groups == 1:
            return super().formed(chunk)
        errors, features = self.errors, self.features()
        width = features.shape[-1] // self.groups
        each = errors.shape[-1] // self.groups
        parts = []
        for row in range(*chunk.indices(errors.shape[-1])):
            mine = features[..., row // each * width : (row // each + 1) * width]
            parts.append(errors[..., row] @ mine)
        return torch.cat(parts, -1)

    def inner_cost(self) -> float:
        """Infinite for grouped kernels, which are small."""
        return math.inf if self.groups > 1 else super().inner_cost()


class Lookup(Use):
    """Rows of a table (V, d), taken by index."""

    def __init__(self, slice: Slice, given: Tensor, padding: int | None) -> None:
        super().__init__(slice, given)
        self.padding = padding

    def arrange(self, layout: Layout, num_examples: int) -> None:
        """Indices (B, T)."""
        super().arrange(layout, num_examples)
        assert self.given is not None
        self.given = self.given.reshape(num_examples, -1)

    def hold(self, errors: Tensor) -> None:
        """Errors (B, J, T, d); none where the padding is taken."""
        self.errors = errors.reshape(*errors.shape[:2], -1, errors.shape[-1])
        if self.padding is not None:
            self.errors = self.errors * (self.given != self.padding)[:, None, :, None]

    def push(self, tangents: Tensor) -> Tensor:
        rows = tangents.to(self.errors)[:, self.given]  # (K, B, T, d)
        return torch.einsum("bjtd,kbtd->bjk", self.errors, rows)

    def pull(self, mixed: Tensor, chosen: slice | Tensor) -> Tensor:
        assert self.given is not None
        errors = self.errors[chosen]
        combined = torch.einsum("bjk,bjtd->kbtd", mixed, errors).flatten(1, 2)
        total = errors.new_zeros(mixed.shape[-1], *self.slice.shape)
        return total.index_add_(1, self.given[chosen].flatten(), combined)

    def formed(self, chunk: slice) -> Tensor:
        assert self.given is not None
        start, stop, _ = chunk.indices(self.slice.shape[0])
        here = (self.given >= start) & (self.given < stop)
        index = (self.given - start).where(here, 0)
        errors = self.errors * here[:, None, :, None]
        total = errors.new_zeros(*errors.shape[:2], stop - start, errors.shape[-1])
        return total.scatter_add_(2, index[:, None, :, None].expand_as(errors), errors).flatten(2)

    def inner(self, other: Use) -> Tensor:
        """Σ over positions that take the same row."""
        assert isinstance(other, Lookup) and self.given is not None and other.given is not None
        rows = []
        for mine, errors in zip(self.given, self.errors, strict=True):
            same = (mine[:, None, None] == other.given).to(errors)  # (T, B', T')
            mixed = torch.einsum("tcs,clsd->cltd", same, other.errors)
            rows.append(errors.flatten(1) @ mixed.flatten(2).flatten(0, 1).T)
        return torch.cat(rows)

    def inner_cost(self) -> float:
        """Multiplications a pair of gradients."""
        scalars, positions, width = self.errors.shape[1:]
        return positions * width * (positions / scalars + 1)


class Alone(Vectors):
    """A parameter whose uses are not understood: gradients of single examples, one by one."""

    def __init__(self, slice: Slice, gradients: Tensor) -> None:
        super().__init__(slice, None, ())
        self.num_examples = len(gradients)
        self.errors = gradients.flatten(2)


# -- how an operation orders examples ------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """Where the B examples are in a tensor: blocks of its first dimension, interleaved in it, or the second."""

    kind: str

    def examples_first(self, tensor: Tensor, num_examples: int) -> Tensor:
        """(B, s, ...), with s what else the dimension of the examples held; 1 if nothing."""
        if self.kind == "second":
            return tensor.transpose(0, 1)[:, None]
        if self.kind == "interleaved":
            return tensor.reshape(-1, num_examples, *tensor.shape[1:]).transpose(0, 1)
        return tensor.reshape(num_examples, -1, *tensor.shape[1:])

    def fits(self, errors: Tensor, coded: Tensor, codes: Tensor) -> bool:
        """Whether errors, and errors of scalars multiplied by an example's code, agree with this order."""
        if errors.shape[self.kind == "second"] % len(codes):
            return False
        plain, other = (self.examples_first(tensor, len(codes)) for tensor in (errors, coded))
        wide = codes.view(-1, *[1] * (plain.ndim - 1)) * plain
        return torch.allclose(wide, other, rtol=1e-6, atol=1e-9 * float(other.abs().max()))


LAYOUTS = (Layout("blocks"), Layout("interleaved"), Layout("second"))


# -- operations ----------------------------------------------------------------------------------------------


class Watch(TorchFunctionMode):
    """Sees every operation that uses one of the parameters."""

    def __init__(self, leaves: dict[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
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
        start = tensor.storage_offset() - base.storage_offset()
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
    if func.__module__ != F.__name__ or not checks:
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
    dims = output.ndim - 2
    if input.ndim != output.ndim or isinstance(padding, str):
        return []
    settings = tuple(
        [value] * dims if isinstance(value, int) else list(value) * (dims // len(value))
        for value in (stride, padding, dilation)
    )
    found = find(weight)
    kernel: list[Use] = []
    if found and not found.transposed and len(found.shape) == dims + 2:
        kernel = [Convolution(found, input.detach(), settings, groups)]
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
    F.linear: _linear,
    torch.matmul: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    torch.mm: _matmul,
    Tensor.mm: _matmul,
    torch.addmm: _addmm,
    torch.conv1d: _convolution,
    torch.conv2d: _convolution,
    F.embedding: _embedding,
    **{
        function: _normalisation(function)
        for function in (F.batch_norm, F.instance_norm, F.layer_norm, F.group_norm, F.rms_norm)
    },
}


# -- capture -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What was learned on a few examples.

    Attributes:
        layouts: of each use, in the order of the network's calls; None if the use is not understood.
        alone: parameters to be differentiated one example at a time.
    """

    layouts: tuple[Layout | None, ...]
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


def plan(problem: Problem, sample: Problem, weigh: Callable[[Tensor, Tensor], Tensor]) -> Plan:
    """How to capture a problem's gradients, learned on a sample of it in float64.

    Args:
        problem: whose parameters count.
        sample: the same network on a few examples.
        weigh: of outputs and targets, cotangents (n, C, m).
    """
    (batch,) = list(sample.batches)[:1]
    watch, leaves, outputs, targets = _forward(sample, batch)
    num_examples = count_examples(batch, len(outputs))
    generator = torch.Generator().manual_seed(0)
    cotangent = torch.randn(outputs.shape, generator=generator, dtype=torch.float64).to(outputs)
    codes = torch.linspace(1, 2, num_examples, dtype=torch.float64).to(outputs)
    rows = codes.repeat_interleave(len(outputs) // num_examples)[:, None]
    ends = [output for _, output in watch.uses]
    layouts: list[Layout | None] = []
    if ends:
        pairs = zip(_errors(outputs, ends, cotangent), _errors(outputs, ends, rows * cotangent), strict=True)
        layouts = [next((lay for lay in LAYOUTS if lay.fits(*pair, codes)), None) for pair in pairs]
    found = Plan(tuple(layouts), ())
    held = capture(sample, batch, found, weigh)
    weights = weigh(outputs.detach(), targets)
    mixed = torch.randn(weights.shape[0], weights.shape[2], generator=generator, dtype=torch.float64).to(outputs)
    along = torch.einsum("ncm,nm->nc", weights, mixed)
    truth = torch.autograd.grad(outputs, list(leaves.values()), along, materialize_grads=True, retain_graph=True)
    shaped = mixed.view(num_examples, -1, 1)
    alone = []
    for name, gradient in zip(leaves, truth, strict=True):
        total = torch.zeros(gradient.numel(), dtype=gradient.dtype, device=gradient.device)
        for use in held:
            if use.slice.name == name:
                piece = use.pull(shaped, slice(None))
                total[use.slice.start : use.slice.start + use.slice.numel] += piece.flatten()
        wrong = (total - gradient.flatten()).norm() > TOLERANCE * gradient.norm()
        if wrong or _overlapping({use.slice for use in held if use.slice.name == name}):
            alone.append(name)
    return Plan(found.layouts, tuple(alone))


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
) -> list[Use]:
    """Features and errors of a batch for the scalars Σ_c W_{n,c,a} z_{n,c}, W (n, C, m) = weigh(outputs, targets).

    Each example has J = m scalars for each of its rows, row by row. Parameters that `names` leaves out are
    skipped.

    Cost: a forward pass and J backward passes that stop at the outputs of layers, about a third of a gradient
    each; for parameters that the plan sets alone, J backward passes of every example by itself.
    """
    watch, leaves, outputs, targets = _forward(problem, batch)
    num_examples = count_examples(batch, len(outputs))
    if len(watch.uses) != len(plan.layouts):
        raise CurvatureError(
            f"the network used its parameters {len(watch.uses)} times on one batch and {len(plan.layouts)} times "
            "on another; features and errors by example need the same operations for every batch."
        )
    wanted = set(leaves if names is None else names)
    chosen = [
        (use, output, layout)
        for (use, output), layout in zip(watch.uses, plan.layouts, strict=True)
        if layout is not None and use.slice.name in wanted - set(plan.alone)
    ]
    weights = weigh(outputs.detach(), targets)
    uses = [use for use, _, _ in chosen]
    for use, _, layout in chosen:
        use.arrange(layout, num_examples)
    _fill(chosen, outputs, weights, num_examples)
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


def _fill(chosen: list[Any], outputs: Tensor, weights: Tensor, num_examples: int) -> None:
    """Backpropagate every scalar of every row to the outputs of the uses, and have them hold the errors."""
    if not chosen:
        return
    ends = {id(output): output for _, output, _ in chosen}
    num_rows, scalars = len(outputs) // num_examples, weights.shape[2]
    errors: dict[int, Tensor] = {}
    by_row = weights.view(num_examples, num_rows, -1, scalars)
    for row in range(num_rows):
        for scalar in range(scalars):
            cotangent = torch.zeros_like(outputs)
            cotangent.view(num_examples, num_rows, -1)[:, row] = by_row[:, row, :, scalar]
            found = _errors(outputs, list(ends.values()), cotangent)
            for key, error in zip(ends, found, strict=True):
                layout = next(lay for _, output, lay in chosen if id(output) == key)
                first = layout.examples_first(error, num_examples)
                if key not in errors:
                    errors[key] = first.new_empty(num_examples, num_rows * scalars, *first.shape[1:])
                errors[key][:, row * scalars + scalar] = first
    for use, output, _ in chosen:
        use.hold(errors[id(output)])


def _one_by_one(problem: Problem, batch: Any, name: str, weights: Tensor, num_examples: int) -> Alone:
    """Gradients (B, J, ...) of one parameter by examples that pass the network alone."""
    value = problem.parameters[name]
    by_row = weights.view(num_examples, -1, *weights.shape[1:])
    rows = []
    for b in range(num_examples):
        single = map_tensors(lambda leaf, b=b: leaf[b : b + 1] if len(leaf) == num_examples else leaf, batch)
        leaf = value.detach().requires_grad_()
        with torch.enable_grad(), differentiable():
            outputs, _ = problem.evaluate({**problem.parameters, name: leaf}, single)
        for r in range(by_row.shape[1]):
            for scalar in range(weights.shape[2]):
                cotangent = torch.zeros_like(outputs)
                cotangent[r] = by_row[b, r, :, scalar]
                with differentiable():
                    (gradient,) = torch.autograd.grad(
                        outputs, leaf, cotangent, retain_graph=True, materialize_grads=True
                    )
                rows.append(gradient.flatten())
    gradients = torch.stack(rows).view(num_examples, -1, value.numel())
    return Alone(Slice(name, 0, tuple(value.shape)), gradients)

"""One use of a parameter in a batch: features that enter it, errors that come back, and products of the two.

An operation that is linear in a parameter gives example i the gradient Σ_t e_t h_tᵀ, with features h_t that enter
it and errors e_t that backpropagation brings to its output, summed over the positions t (pixels, tokens) where
the parameter is used. Products of such gradients with vectors, their inner products and their averages follow
from features and errors, at a fraction of the cost of forming gradients.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from deepspectra.derivatives.convolution_derivatives import Settings, gradients


@dataclass(frozen=True)
class Slice:
    """The contiguous stretch of a parameter that an operation uses, or its transpose."""

    name: str  # of the parameter
    start: int  # where the stretch begins in the flattened parameter
    shape: tuple[int, ...]  # of the stretch as it lies in memory
    transposed: bool = False  # the operation uses the transpose of that

    @property
    def numel(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


class Use(ABC):
    """One use of a stretch of a parameter in a batch of B examples: a map linear in the parameter.

    `given` is what the operation was given, as it was; `arrange` puts the examples first, and `put` takes the
    errors of one of J scalars an example.
    """

    needs_given = True  # once all errors are there
    groups = 1  # of outputs, each with features of its own

    def __init__(self, slice: Slice, given: Tensor | None) -> None:
        self.slice = slice
        self.given = given
        self.errors = torch.empty(0)
        self.num_examples = 0
        self.num_rows = 0  # of outputs, of all its examples
        self.is_whole = False  # a whole batch is its one example, since rows belong to no single ones

    def arrange(self, layout: Layout, num_examples: int) -> None:
        """Put the examples first in what was given."""
        self.num_examples = num_examples
        if self.given is not None:
            self.given = layout.examples_first(self.given, num_examples)

    def put(self, scalar: int, num_scalars: int, errors: Tensor) -> None:
        """Take errors (B, s, *output shape without its batch dimension) of a scalar."""
        reduced = self.reduce(errors)
        if not scalar:
            self.errors = reduced.new_empty(len(reduced), num_scalars, *reduced.shape[1:])
        self.errors[:, scalar] = reduced
        if scalar == num_scalars - 1 and not self.needs_given:
            self.given = None

    @abstractmethod
    def reduce(self, errors: Tensor) -> Tensor:
        """What gradients need of a scalar's errors, (B, ...)."""

    @property
    def inputs(self) -> Tensor:
        """All that enters, (B, D)."""
        assert self.given is not None
        return self.given.flatten(1)

    @property
    def alike(self) -> tuple[object, ...]:
        """What uses of other examples have in common with this one if they can be joined."""
        shape = None if self.given is None else self.given.shape[1:]
        return self.slice, type(self), shape, self.errors.shape[1:]

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


class Vectors(Use):
    """Uses of few numbers, whose gradients are held as they are: biases, and scales of normalised features."""

    needs_given = False

    def __init__(self, slice: Slice, given: Tensor | None, axes: tuple[int, ...]) -> None:
        super().__init__(slice, given)
        self.axes = axes  # of the output (without batch and s) that the stretch lies along

    def reduce(self, errors: Tensor) -> Tensor:
        """Summed over positions: (B, numbers)."""
        if self.given is not None:
            errors = errors * self.given
        own = {2 + axis for axis in self.axes}
        summed = [axis for axis in range(1, errors.ndim) if axis not in own]
        return (errors.sum(summed) if summed else errors).flatten(1)

    def push(self, tangents: Tensor) -> Tensor:
        """Scalars (B, J, K) that tangents (K, *shape) bring."""
        return self.errors @ tangents.reshape(len(tangents), -1).T.to(self.errors)

    def pull(self, mixed: Tensor, chosen: slice | Tensor) -> Tensor:
        """Σ of mixed (b, J, K) times gradients: (K, *shape)."""
        flat = mixed.flatten(0, 1).T @ self.errors[chosen].flatten(0, 1)
        return flat.view(-1, *self.slice.shape)

    def formed(self, chunk: slice) -> Tensor:
        """Gradients (B, J, rows of the chunk × columns)."""
        lead = self.slice.shape[:1] or (1,)
        return self.errors.view(*self.errors.shape[:2], *lead, -1)[:, :, chunk].flatten(2)


class Matrix(Use):
    """A matrix W (o, d) that takes features h_t (d) to outputs (o): gradients Σ_t e_t h_tᵀ."""

    given: Tensor

    @property
    def size(self) -> tuple[int, int]:
        """(o, d)."""
        rows, *columns = self.slice.shape
        pair = (rows, math.prod(columns))
        return pair[::-1] if self.slice.transposed else pair

    def arrange(self, layout: Layout, num_examples: int) -> None:
        """Features (B, T, d)."""
        super().arrange(layout, num_examples)
        self.given = self.given.reshape(num_examples, -1, self.given.shape[-1])

    def reduce(self, errors: Tensor) -> Tensor:
        """(B, o, T)."""
        return errors.reshape(errors.shape[0], -1, errors.shape[-1]).mT

    def features(self, chosen: slice | Tensor = slice(None)) -> Tensor:
        """Of chosen examples, (b, T, d)."""
        return self.given[chosen]

    def outputs(self, tangents: Tensor) -> Tensor:
        """W h of each of K matrices (K, o, d): (B, K, o, T)."""
        return torch.einsum("btd,kod->bkot", self.features(), tangents)

    def push(self, tangents: Tensor) -> Tensor:
        """Scalars (B, J, K) that tangents (K, *shape) bring."""
        if self.slice.transposed:
            tangents = tangents.mT
        out = self.outputs(tangents.reshape(len(tangents), *self.size).to(self.errors))
        return self.errors.flatten(2) @ out.flatten(2).mT

    def pull(self, mixed: Tensor, chosen: slice | Tensor) -> Tensor:
        """Σ of mixed (b, J, K) times gradients: (K, *shape)."""
        pulled = self.gradients(self.combined(mixed, chosen), chosen)
        return (pulled.mT if self.slice.transposed else pulled).reshape(-1, *self.slice.shape)

    def combined(self, mixed: Tensor, chosen: slice | Tensor) -> Tensor:
        """Errors of chosen examples, combined by mixed (b, J, K): (b, K, o, T)."""
        errors = self.errors[chosen]
        return (mixed.mT @ errors.flatten(2)).view(len(errors), mixed.shape[2], *errors.shape[2:])

    def gradients(self, combined: Tensor, chosen: slice | Tensor) -> Tensor:
        """Σ_b Σ_t e_t h_tᵀ for errors (b, K, o, T): (K, o, d)."""
        return torch.einsum("bkot,btd->kod", combined, self.features(chosen))

    def formed(self, chunk: slice) -> Tensor:
        """Gradients (B, J, rows of the chunk × columns)."""
        features, errors = self.features(), self.errors
        if self.slice.transposed:
            return torch.einsum("bjot,btd->bjdo", errors, features[..., chunk]).flatten(2)
        part = errors[:, :, chunk].flatten(1, 2)  # (B, J·rows, T)
        return (part @ features).view(*errors.shape[:2], -1)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Features (B, T, d) and errors (B, J, o, T)."""
        return self.features(), self.errors

    @staticmethod
    def inner(mine: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> Tensor:
        """Σ_{t,s} (h_tᵀh'_s)(e_tᵀe'_s): errors are mixed by the similarity of features, then multiplied."""
        features, errors = mine
        others, their_errors = theirs
        if errors.shape[3] == their_errors.shape[3] == 1:
            similar = features[:, 0] @ others[:, 0].T
            products = errors.flatten(0, 1)[..., 0] @ their_errors.flatten(0, 1)[..., 0].T
            products = products.view(*errors.shape[:2], *their_errors.shape[:2]) * similar[:, None, :, None]
            return products.flatten(0, 1).flatten(1)
        rows = []
        for feature, error in zip(features, errors, strict=True):
            similar = (others.flatten(0, 1) @ feature.T).view(
                len(others), 1, others.shape[1], len(feature)
            )  # (b', 1, T', T)
            mixed = their_errors @ similar  # (b', J', o, T)
            rows.append(error.flatten(1) @ mixed.flatten(2).flatten(0, 1).T)
        return torch.cat(rows)

    def inner_cost(self) -> float:
        """Multiplications a pair of gradients."""
        scalars, outputs, positions = self.errors.shape[1:]
        mixing = positions * outputs * (positions / scalars + 1)
        return mixing + positions**2 * self.size[1] / scalars**2


class Convolution(Matrix):
    """A convolution's kernel; its features are the patches of the input."""

    def __init__(self, slice: Slice, given: Tensor, settings: Settings) -> None:
        super().__init__(slice, given)
        self.settings = settings
        self.groups = settings[-1]

    def arrange(self, layout: Layout, num_examples: int) -> None:
        """Images (B, s, c, ...)."""
        Use.arrange(self, layout, num_examples)

    def reduce(self, errors: Tensor) -> Tensor:
        """(B, o, s·T)."""
        self.spatial = errors.shape[3:]
        return errors.transpose(1, 2).flatten(2)

    def features(self, chosen: slice | Tensor = slice(None)) -> Tensor:
        """Patches (b, s·T, d)."""
        images = self.given[chosen]
        flat = images.flatten(0, 1)
        kernel = self.slice.shape[2:]
        stride, padding, dilation = (tuple(values) for values in self.settings[:3])
        if len(kernel) == 1:
            flat = flat[:, :, None]
            kernel, stride, padding, dilation = (1, *kernel), (1, *stride), (0, *padding), (1, *dilation)
        patches = functional.unfold(flat, kernel, dilation, padding, stride).mT  # (b·s, T, d)
        return patches.reshape(len(images), -1, patches.shape[-1])

    def outputs(self, tangents: Tensor) -> Tensor:
        """The convolution with each of K kernels: (B, K, o, s·T)."""
        images = self.given.flatten(0, 1)
        rows = []
        for tangent in tangents:
            out = torch.convolution(images, tangent.view(self.slice.shape), None, *self.settings)
            rows.append(self.reduce(out.view(self.num_examples, -1, *out.shape[1:])))
        return torch.stack(rows, 1)

    def gradients(self, combined: Tensor, chosen: slice | Tensor) -> Tensor:
        """Gradients to the kernel for errors (b, K, o, s·T): (K, o, d)."""
        images = self.given[chosen].flatten(0, 1)
        kernel = torch.empty(self.slice.shape, dtype=images.dtype, device=images.device)
        parts = []
        for errors in combined.unbind(1):
            shaped = errors.view(*errors.shape[:2], -1, *self.spatial).transpose(1, 2).flatten(0, 1)
            _, gradient = gradients(shaped, images, kernel, self.settings, (False, True))
            assert gradient is not None
            parts.append(gradient.flatten(1))
        return torch.stack(parts)

    def formed(self, chunk: slice) -> Tensor:
        """Gradients (B, J, rows of the chunk × columns)."""
        if self.groups == 1:
            return super().formed(chunk)
        errors, features = self.errors, self.features()
        width = features.shape[-1] // self.groups
        each = errors.shape[2] // self.groups
        parts = []
        for row in range(*chunk.indices(errors.shape[2])):
            mine = features[..., row // each * width : (row // each + 1) * width]
            parts.append(errors[:, :, row] @ mine)
        return torch.cat(parts, -1)

    def inner_cost(self) -> float:
        """Infinite for grouped kernels, which are small."""
        return math.inf if self.groups > 1 else super().inner_cost()


class Lookup(Use):
    """Rows of a table (V, d), taken by index."""

    given: Tensor

    def __init__(self, slice: Slice, given: Tensor, padding: int | None) -> None:
        super().__init__(slice, given)
        self.padding = padding

    def arrange(self, layout: Layout, num_examples: int) -> None:
        """Indices (B, T)."""
        super().arrange(layout, num_examples)
        self.given = self.given.reshape(num_examples, -1)

    def reduce(self, errors: Tensor) -> Tensor:
        """(B, T, d); zero where the padding is taken."""
        errors = errors.reshape(errors.shape[0], -1, errors.shape[-1])
        return errors if self.padding is None else errors * (self.given != self.padding)[:, :, None]

    def push(self, tangents: Tensor) -> Tensor:
        """Scalars (B, J, K) that tangents (K, *shape) bring."""
        rows = tangents.to(self.errors)[:, self.given]  # (K, B, T, d)
        return torch.einsum("bjtd,kbtd->bjk", self.errors, rows)

    def pull(self, mixed: Tensor, chosen: slice | Tensor) -> Tensor:
        """Σ of mixed (b, J, K) times gradients: (K, *shape)."""
        errors = self.errors[chosen]
        combined = torch.einsum("bjk,bjtd->kbtd", mixed, errors).flatten(1, 2)
        total = errors.new_zeros(mixed.shape[-1], *self.slice.shape)
        return total.index_add_(1, self.given[chosen].flatten(), combined)

    def formed(self, chunk: slice) -> Tensor:
        """Gradients (B, J, rows of the chunk × columns)."""
        start, stop, _ = chunk.indices(self.slice.shape[0])
        here = (self.given >= start) & (self.given < stop)
        index = (self.given - start).where(here, 0)
        errors = self.errors * here[:, None, :, None]
        total = errors.new_zeros(*errors.shape[:2], stop - start, errors.shape[-1])
        return total.scatter_add_(2, index[:, None, :, None].expand_as(errors), errors).flatten(2)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Indices (B, T) and errors (B, J, T, d)."""
        return self.given, self.errors

    @staticmethod
    def inner(mine: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> Tensor:
        """Σ over positions that take the same row."""
        rows = []
        for index, errors in zip(*mine, strict=True):
            same = (index[:, None, None] == theirs[0]).to(errors)  # (T, b', T')
            mixed = torch.einsum("tcs,clsd->cltd", same, theirs[1])
            rows.append(errors.flatten(1) @ mixed.flatten(2).flatten(0, 1).T)
        return torch.cat(rows)

    def inner_cost(self) -> float:
        """Multiplications a pair of gradients."""
        scalars, positions, width = self.errors.shape[1:]
        return positions * width * (positions / scalars + 1)


class Alone(Vectors):
    """A parameter whose uses are not understood: its gradients themselves are its errors."""

    def reduce(self, errors: Tensor) -> Tensor:
        """(B, numbers)."""
        return errors.flatten(1)


def as_slice(chosen: Tensor) -> slice | Tensor:
    """Ascending indices as a slice, which is not copied, if they have no gap."""
    first, last = int(chosen[0]), int(chosen[-1]) + 1
    return slice(first, last) if last - first == len(chosen) else chosen


Stretch = tuple[str, int, tuple[int, ...]]  # of which parameter, from where, of which shape


def by_stretch(uses: list[Use]) -> dict[Stretch, list[Use]]:
    """Uses of each stretch of a parameter, transposed or not, whose gradients add up."""
    found: dict[Stretch, list[Use]] = {}
    for use in uses:
        found.setdefault((use.slice.name, use.slice.start, use.slice.shape), []).append(use)
    return found


def joined(lists: list[list[Use]]) -> list[Use] | None:
    """Uses of some examples after those of others, one by one; None if they are not alike."""
    first = lists[0]
    if any([use.alike for use in uses] != [use.alike for use in first] for uses in lists):
        return None
    result = []
    for mine in zip(*lists, strict=True):
        use = copy.copy(mine[0])
        use.errors = torch.cat([one.errors for one in mine])
        given = [one.given for one in mine if one.given is not None]
        use.given = torch.cat(given) if given else None
        use.num_examples = sum(one.num_examples for one in mine)
        use.num_rows = sum(one.num_rows for one in mine)
        result.append(use)
    return result


@dataclass(frozen=True)
class Layout:
    """Where the B examples are in a tensor: blocks of its first dimension, interleaved in it, or the second."""

    kind: str

    @property
    def dim(self) -> int:
        """The dimension that the examples are in."""
        return int(self.kind == "second")

    def divides(self, tensor: Tensor | None, num_examples: int) -> bool:
        """Whether a tensor has as many entries for each example."""
        if tensor is None:
            return True
        size = tensor.shape[self.dim] if tensor.ndim > self.dim else 0
        return size == num_examples if self.kind == "second" else size % num_examples == 0

    def differs(self, tensor: Tensor, num_examples: int) -> bool:
        """Whether it is another order than those before it in `LAYOUTS`, of a tensor that it divides."""
        return self.divides(tensor, num_examples) and (self.kind != "interleaved" or len(tensor) != num_examples)

    def examples_first(self, tensor: Tensor, num_examples: int) -> Tensor:
        """(B, s, ...), with s what else the dimension of the examples held; 1 if nothing."""
        if self.kind == "second":
            return tensor.transpose(0, 1)[:, None]
        total, *rest = tensor.shape or (num_examples,)
        size = total // num_examples
        if self.kind == "interleaved":
            return tensor.reshape(size, num_examples, *rest).transpose(0, 1)
        return tensor.reshape(num_examples, size, *rest)

    def fits(self, errors: Tensor, coded: Tensor, codes: Tensor, limit: float) -> bool:
        """Whether errors, and errors of scalars multiplied by an example's code, agree with this order."""
        if not errors.numel():
            return True
        plain, other = (self.examples_first(tensor, len(codes)).flatten(1) for tensor in (errors, coded))
        gaps, sizes = (codes[:, None] * plain - other).abs().amax(1), other.abs().amax(1)
        return bool((gaps <= limit * (sizes + 1e-2 * sizes.max())).all())


BLOCKS = Layout("blocks")
LAYOUTS = (BLOCKS, Layout("interleaved"), Layout("second"))

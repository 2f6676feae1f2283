"""G's own block of one place: whose it is, features and errors at every position, and products made of these.

The place of a block is a weight with its bias, or a vector of parameters alone. In its own order its numbers are a
matrix (groups, outputs, inputs) whose last input is the bias: gradients are Σ_t e_t h_tᵀ over positions t, with
features h_t that end with 1.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from deepspectra.errors import CurvatureError
from deepspectra.operators.base import Operator
from deepspectra.rows.captures import layer_of
from deepspectra.rows.parameter_uses import Convolution, Lookup, Matrix, Slice, Use, as_slice

CHUNK_BYTES = 2**26  # of patches, errors or gradients that are treated at a time
COMPARED = 16  # examples by whose errors a bias is recognised


@dataclass(frozen=True)
class ParameterBlock:
    """A weight with its bias, or a vector alone."""

    name: str  # of the layer if nothing else belongs to it, or of the parameters
    kind: type[Use]  # of the uses of its weight
    weight: Slice  # the stretch of a parameter that is used
    bias: Slice | None  # that of the bias, if errors say that there is one
    groups: int  # of a grouped convolution, or 1

    @property
    def is_matrix(self) -> bool:
        """Whether features are multiplied."""
        return issubclass(self.kind, (Matrix, Lookup))

    @property
    def shape(self) -> tuple[int, int, int]:
        """(groups, outputs, inputs)."""
        groups, outputs, inputs = self._weight_of(torch.empty(self.weight.shape, device="meta")).shape
        return groups, outputs, inputs + (self.bias is not None)

    def join(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """(groups, outputs, inputs) of tensors of the shapes of weight and bias."""
        matrix = self._weight_of(weight)
        if self.bias is None or bias is None:
            return matrix
        return torch.cat([matrix, bias.reshape(*matrix.shape[:2], 1)], 2)

    def split(self, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
        """Of numbers (K, n) in its own order: what belongs to the weight and to the bias, each (K, *its shape)."""
        matrix, bias = matrix.reshape(-1, *self.shape), None
        if self.bias is not None:
            bias, matrix = matrix[..., -1].flatten(1), matrix[..., :-1]
        if not self.is_matrix or self.groups > 1:
            return matrix.reshape(-1, *self.weight.shape), bias
        turned = self.weight.transposed or self.kind is Lookup
        matrix = matrix[:, 0]
        return (matrix.mT if turned else matrix).reshape(-1, *self.weight.shape), bias

    def ordered(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """(n,) its numbers, in its own order, of tensors that are named and shaped as the parameters."""
        pieces = (
            parameters[some.name].flatten()[some.start : some.start + some.numel].view(some.shape)
            for some in (self.weight, self.bias)
            if some is not None
        )
        return self.join(*pieces).flatten()

    def mine(self, uses: list[Use]) -> list[Use]:
        """The uses of its weight among those of a batch."""
        return [use for use in uses if use.slice == self.weight]

    def with_ones(self, features: Tensor, scale: Tensor | None = None) -> Tensor:
        """(b, T, groups, inputs) of features (b, T, d): ending with 1 where there is a bias, times a scale (b, T)."""
        groups, _, inputs = self.shape
        wide = features.new_empty(*features.shape[:2], groups, inputs)
        if self.bias is not None:
            wide[..., -1] = 1
        wide[..., : inputs - (self.bias is not None)] = torch.unflatten(features, 2, (groups, -1))
        return wide if scale is None else wide.mul_(scale[:, :, None, None].to(wide))

    def by_group(self, errors: Tensor) -> Tensor:
        """(b, J, o, T) → (b, J, groups, o / groups, T)."""
        return torch.unflatten(errors, 2, (self.groups, -1))

    def _weight_of(self, weight: Tensor) -> Tensor:
        if not self.is_matrix:
            return weight.reshape(1, 1, -1)
        matrix = weight.flatten(1)
        if self.weight.transposed or self.kind is Lookup:
            matrix = matrix.mT
        return matrix.reshape(self.groups, -1, matrix.shape[1])


def places(uses: list[Use], sizes: dict[str, int]) -> list[ParameterBlock]:
    """What a batch's uses say of the parameters with these sizes."""
    by_slice: dict[Slice, list[Use]] = {}
    for use in uses:
        by_slice.setdefault(use.slice, []).append(use)
    _refuse_mixed(by_slice)
    vectors = {key: mine for key, mine in by_slice.items() if not isinstance(mine[0], (Matrix, Lookup))}
    biases = {}
    for key, mine in by_slice.items():
        if key not in vectors:
            found = next((other for other in vectors if _is_bias(mine, key, vectors[other], other)), None)
            if found is not None:
                biases[key] = found
                del vectors[found]
    return [
        ParameterBlock(_name(key, biases.get(key), sizes), type(mine[0]), key, biases.get(key), mine[0].groups)
        for key, mine in by_slice.items()
        if key not in biases.values()
    ]


def _refuse_mixed(by_slice: dict[Slice, list[Use]]) -> None:
    kinds: dict[str, set[tuple[type[Use], tuple[int, ...], bool]]] = {}
    for key, mine in by_slice.items():
        for use in mine:
            kinds.setdefault(key.name, set()).add((type(use), key.shape, key.transposed))
    for name, found in kinds.items():
        if len(found) > 1:
            ways = sorted(("transposed " if turned else "") + kind.__name__ for kind, _, turned in found)
            raise CurvatureError(
                f"parameter {name!r} is used in different ways ({', '.join(ways)}), so its gradients are no "
                "products of one kind of features and errors. Leave it out with problem.restrict(...)."
            )


def _is_bias(mine: list[Use], key: Slice, others: list[Use], other: Slice) -> bool:
    """Whether a vector's gradients are sums of the errors of a matrix of the same layer."""
    if layer_of(key.name) != layer_of(other.name) or len(other.shape) != 1 or len(mine) != len(others):
        return False
    few = slice(None, None, max(1, mine[0].num_examples // COMPARED))
    matrix = [use.errors[few] for use in mine if isinstance(use, Matrix)]
    if not matrix or matrix[0].shape[2] != other.numel:
        return False
    summed = sum(errors.sum(3) for errors in matrix)
    scale = max(float(errors.abs().sum(3).max()) for errors in matrix)
    missed = summed - sum(use.errors[few] for use in others)
    assert isinstance(missed, Tensor)
    return bool(missed.abs().max() <= torch.finfo(missed.dtype).eps ** 0.5 * scale)


def _name(weight: Slice, bias: Slice | None, sizes: dict[str, int]) -> str:
    layer = layer_of(weight.name)
    taken = weight.numel + (bias.numel if bias else 0)
    if layer and taken == sum(size for name, size in sizes.items() if layer_of(name) == layer):
        return layer
    if weight.numel == sizes[weight.name]:
        return weight.name
    return f"{weight.name}[{weight.start}:{weight.start + weight.numel}]"


# -- positions ------------------------------------------------------------------------------------------------


class Positions(NamedTuple):
    """Some examples' features and errors at every position."""

    features: Tensor  # (b, T, d), or indices (b, T) of rows of a table
    errors: Tensor  # (b, J, o, T)
    counts: Tensor  # (b, T) what each position counts in averages of features, float64

    def dense_features(self, num_rows: int) -> Tensor:
        """(b, T, d), rows of an identity for indices."""
        if self.features.is_floating_point():
            return self.features
        return torch.nn.functional.one_hot(self.features, num_rows).to(self.errors)

    def reduced(self, num_rows: int) -> Positions:
        """One position an example: the mean of its features, the sum of its errors."""
        features = self.dense_features(num_rows)
        total = self.counts.sum(1, keepdim=True)
        share = self.counts / total.where(total > 0, 1)
        mean = torch.einsum("bt,btd->bd", share.to(features), features)[:, None]
        return Positions(mean, self.errors.sum(3, keepdim=True), total / max(1, self.counts.shape[1]))


def positions(
    uses: list[Use], weights: Tensor | None = None, chosen: Tensor | None = None, numbers: int = 0
) -> Iterator[Positions]:
    """Of all uses of one place, some examples at a time, for which so many more numbers each fit a chunk.

    Weights (B, R) are those of the examples' rows, 1 by default; all examples unless some are chosen.
    """
    num, device = uses[0].num_examples, uses[0].errors.device
    weights = torch.ones(num, 1, dtype=torch.float64, device=device) if weights is None else weights
    for use in uses:
        numbers += use.errors[0].numel()
        if isinstance(use, Convolution):
            numbers += use.errors.shape[3] * use.slice.numel // use.slice.shape[0] * use.groups
    size = max(1, CHUNK_BYTES // (max(1, numbers) * uses[0].errors.element_size()))
    for chunk in torch.split(torch.arange(num, device=device) if chosen is None else chosen, size):
        some = as_slice(chunk)
        each = [_of_use(use, weights[some], some) for use in uses]
        if len(each) == 1:
            yield each[0]
            continue
        features, errors, counts = zip(*each, strict=True)
        yield Positions(torch.cat(features, 1), torch.cat(errors, 3), torch.cat(counts, 1))


def _of_use(use: Use, rows: Tensor, some: Tensor | slice) -> Positions:
    """Of one use, given the weights (b, R) of some examples' rows."""
    errors = single(use.errors[some])
    if isinstance(use, Lookup):
        features, errors = use.given[some], errors.mT
    else:
        assert isinstance(use, Matrix)
        features = single(use.features(some))
    num = features.shape[1]
    counts = rows if rows.shape[1] == num else rows.mean(1, keepdim=True).expand(-1, num)
    if isinstance(use, Lookup) and use.padding is not None:
        counts = counts * (features != use.padding)
    return Positions(features, errors, counts)


def num_positions(uses: list[Use]) -> int:
    """T, of all uses together."""
    return sum(use.errors.shape[2 if isinstance(use, Lookup) else 3] for use in uses)


def single(numbers: Tensor) -> Tensor:
    """In single precision at least: products of half precision would be rounded to three digits."""
    return numbers.to(torch.promote_types(numbers.dtype, torch.float32))


# -- the block -------------------------------------------------------------------------------------------------


class ExactBlock(Operator):
    """G's block of one place, in the place's own order, by features and errors: uses, one list a batch.

    Cost: of a product, two products of the features with a matrix of the weight's shape.
    """

    def __init__(self, place: ParameterBlock, batches: list[list[Use]], dtype: torch.dtype) -> None:
        groups, outputs, inputs = place.shape
        device = batches[0][0].errors.device
        super().__init__(groups * outputs * inputs, dtype=dtype, device=device, name=f"G of {place.name}")
        self.place = place
        self.remembered: dict[str, Tensor] = {}  # what is known of it from one question to the next
        self.batches = [
            [_widened(use) for use in batch if use.slice in (place.weight, place.bias)] for batch in batches
        ]
        self.num_rows = sum(math.prod(batch[0].errors.shape[:2]) for batch in self.batches)

    def _apply(self, block: Tensor) -> Tensor:
        pieces = zip((self.place.weight, self.place.bias), self.place.split(block.T), strict=True)
        tangents = {stretch: piece for stretch, piece in pieces if piece is not None}
        totals = {stretch: torch.zeros_like(piece) for stretch, piece in tangents.items()}
        for batch in self.batches:
            scalars = functools.reduce(torch.add, (use.push(tangents[use.slice]) for use in batch))
            for use in batch:
                totals[use.slice] += use.pull(scalars, slice(None)).view_as(totals[use.slice])
        joined = [self.place.join(*each) for each in zip(*totals.values(), strict=True)]
        return torch.stack(joined).flatten(1).T

    @functools.cached_property
    def trace(self) -> float:
        """Σ ‖g‖²."""
        return self.inner(None, None)

    def inner(self, left: Tensor | None, right: Tensor | None) -> float:
        """⟨G, S ⊗ A⟩ = Σ tr(S g A gᵀ), of factors (groups, o, o) and (groups, d, d), or identities.

        From similarities of positions, or from gradients, whichever is less to multiply.
        """
        groups, outputs, inputs = self.place.shape
        scalars = self.batches[0][0].errors.shape[1]
        num = self.num_positions
        # with g = Σ_t e_t h_tᵀ, tr(S g A gᵀ) = Σ_{t,s} (e_tᵀ S e_s)(h_tᵀ A h_s): multiplications an example
        of_similarities = num * (inputs**2 + scalars * outputs**2 + num * (inputs + scalars * outputs))
        of_gradients = scalars * outputs * inputs * (outputs + inputs + num)
        by_similarities = of_similarities < of_gradients
        total = 0.0
        for found in self.positions(num**2 if by_similarities else scalars * groups * outputs * inputs):
            features, errors = self.factors(found)
            if by_similarities:
                similar = (features if right is None else across_features(features, right)) @ features.mT
                turned = errors if left is None else across_errors(left, errors)
                alike = turned.mT @ errors if num > 1 else (turned * errors).sum(3, keepdim=True)
                pairs = alike.sum(2)
                total += float((similar * pairs).double().sum())
            else:
                gradients = errors @ features[:, :, None]
                turned = gradients if left is None else left[:, None] @ gradients
                turned = turned if right is None else turned @ right[:, None]
                total += float((gradients * turned).double().sum())
        return total

    @property
    def num_positions(self) -> int:
        """T, of all uses together."""
        return num_positions(self.place.mine(self.batches[0]))

    def factors(self, found: Positions) -> tuple[Tensor, Tensor]:
        """Features (b, groups, T, d) and errors (b, groups, J, o, T)."""
        features = self.place.with_ones(found.dense_features(self.place.shape[2])).transpose(1, 2)
        return features, self.place.by_group(found.errors).transpose(1, 2)

    def gradients(self) -> Iterator[Tensor]:
        """The rows (m, n) of a root of the block, a chunk at a time."""
        groups, outputs, inputs = self.place.shape
        for found in self.positions(groups * outputs * inputs * self.batches[0][0].errors.shape[1]):
            features, errors = self.factors(found)
            gradients = errors @ features[:, :, None]  # (b, groups, J, o, d)
            yield gradients.transpose(1, 2).flatten(2).flatten(0, 1)

    def positions(self, numbers: int = 0) -> Iterator[Positions]:
        """Features and errors of some examples at a time, for which so many more numbers each fit a chunk."""
        for batch in self.batches:
            yield from positions(self.place.mine(batch), numbers=numbers)


def _widened(use: Use) -> Use:
    """A use whose features and errors are in single precision at least; itself if they are."""
    if use.errors.dtype.itemsize >= torch.float32.itemsize:
        return use
    wide = copy.copy(use)
    wide.errors = single(use.errors)
    if use.given is not None and use.given.is_floating_point():
        wide.given = single(use.given)
    return wide


def across_features(features: Tensor, matrix: Tensor) -> Tensor:
    """H A for features (b, groups, T, d) and A (groups, d, d), as one product a group."""
    rows = features.transpose(0, 1)
    return (rows.flatten(1, 2) @ matrix).view(*rows.shape[:3], -1).transpose(0, 1)


def across_errors(matrix: Tensor, errors: Tensor) -> Tensor:
    """S e for symmetric S (groups, o, o) and errors (b, groups, J, o, T)."""
    if errors.shape[4] == 1:
        return across_features(errors[..., 0], matrix)[..., None]
    return matrix[:, None] @ errors

"""Second moments of features and of errors, place by place: what Kronecker factors are made of.

A *place* is a weight with its bias, or a vector of parameters alone. In its own order its numbers are a matrix
(groups, outputs, inputs) whose last input is the bias: gradients are Σ_t e_t h_tᵀ over positions t, with features
h_t that end with 1.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from deepspectra.errors import CurvatureError, FallbackWarning
from deepspectra.operators.base import Operator
from deepspectra.operators.captures import layer_of
from deepspectra.uses import Convolution, Lookup, Matrix, Slice, Use

LARGEST_VECTOR = 4096  # numbers of a vector whose exact block is held; of longer ones its diagonal
CHUNK_BYTES = 2**26  # of patches, errors or gradients that are treated at a time
PANEL = 128  # columns of a symmetric product of which only the lower half is computed
COMPARED = 16  # examples by whose errors a bias is recognised
LONG = 32  # positions from which errors are multiplied example by example


@dataclass(frozen=True)
class Place:
    """A weight with its bias, or a vector alone.

    Attributes:
        name: of the layer if nothing else belongs to it, or of the parameters.
        kind: the type of the uses of its weight.
        weight: the stretch of a parameter that is used.
        bias: that of the bias, if errors say that there is one.
        groups: of a grouped convolution, or 1.
    """

    name: str
    kind: type[Use]
    weight: Slice
    bias: Slice | None
    groups: int

    @property
    def is_matrix(self) -> bool:
        """Whether features are multiplied."""
        return issubclass(self.kind, (Matrix, Lookup))

    @property
    def shape(self) -> tuple[int, int, int]:
        """(groups, outputs, inputs)."""
        groups, outputs, inputs = self._weight_of(torch.empty(self.weight.shape, device="meta")).shape
        return groups, outputs, inputs + (self.bias is not None)

    def join(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(groups, outputs, inputs) of tensors of the shapes of weight and bias."""
        matrix = self._weight_of(weight)
        if self.bias is None or bias is None:
            return matrix
        return torch.cat([matrix, bias.reshape(*matrix.shape[:2], 1)], 2)

    def split(self, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
        """Of (K, groups, outputs, inputs): what belongs to the weight and to the bias, each (K, *its shape)."""
        bias = None
        if self.bias is not None:
            bias, matrix = matrix[..., -1].flatten(1), matrix[..., :-1]
        if not self.is_matrix or self.groups > 1:
            return matrix.reshape(-1, *self.weight.shape), bias
        turned = self.weight.transposed or self.kind is Lookup
        matrix = matrix[:, 0]
        return (matrix.mT if turned else matrix).reshape(-1, *self.weight.shape), bias

    def index(self, starts: dict[str, int]) -> Tensor:
        """(n,) where its numbers, in its own order, lie in the vector of all parameters."""

        def numbers(stretch: Slice) -> Tensor:
            start = starts[stretch.name] + stretch.start
            return torch.arange(start, start + stretch.numel).view(stretch.shape)

        return self.join(numbers(self.weight), None if self.bias is None else numbers(self.bias)).flatten()

    def mine(self, uses: list[Use]) -> list[Use]:
        """The uses of its weight among those of a batch."""
        return [use for use in uses if use.slice == self.weight]

    def _weight_of(self, weight: Tensor) -> Tensor:
        if not self.is_matrix:
            return weight.reshape(1, 1, -1)
        matrix = weight.flatten(1)
        if self.weight.transposed or self.kind is Lookup:
            matrix = matrix.mT
        return matrix.reshape(self.groups, -1, matrix.shape[1])


def places(uses: list[Use], sizes: dict[str, int]) -> list[Place]:
    """What a batch's uses say of the parameters with these sizes.

    Raises:
        CurvatureError: one parameter is used in different ways.
    """
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
    result = []
    for key, mine in by_slice.items():
        if key in biases.values():
            continue
        groups = mine[0].groups if isinstance(mine[0], Convolution) else 1
        name = _name(key, biases.get(key), sizes)
        result.append(Place(name, type(mine[0]), key, biases.get(key), groups))
    return result


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


@dataclass(frozen=True)
class Positions:
    """Some examples' features and errors at every position.

    Attributes:
        features: (b, T, d), or indices (b, T) of rows of a table.
        errors: (b, J, o, T).
        counts: (b, T) what each position counts in averages of features, float64.
    """

    features: Tensor
    errors: Tensor
    counts: Tensor

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
        return Positions(mean, self.errors.sum(3, keepdim=True), self.counts.mean(1, keepdim=True))


def positions(uses: list[Use], weights: Tensor, chosen: Tensor) -> Positions:
    """Of chosen examples, over all uses of one place; weights (B, R) are those of the examples' rows."""
    first, last = int(chosen[0]), int(chosen[-1]) + 1
    some = slice(first, last) if last - first == len(chosen) else chosen  # a slice is not copied
    mine = []
    for use in uses:
        errors = use.errors[some]
        if isinstance(use, Lookup):
            assert use.given is not None
            features, errors = use.given[some], errors.mT
        else:
            assert isinstance(use, Matrix)
            features = use.features(some)
        rows, num = weights[some], features.shape[1]
        counts = rows if rows.shape[1] == num else rows.mean(1, keepdim=True).expand(-1, num)
        if isinstance(use, Lookup) and use.padding is not None:
            counts = counts * (features != use.padding)
        mine.append(Positions(features, errors, counts))
    if len(mine) == 1:
        return mine[0]
    return Positions(
        torch.cat([one.features for one in mine], 1),
        torch.cat([one.errors for one in mine], 3),
        torch.cat([one.counts for one in mine], 1),
    )


def chunks(uses: list[Use], chosen: Tensor, numbers: int = 0) -> Iterator[Tensor]:
    """Chosen examples, a few at a time, for which patches, errors and so many more numbers fit a chunk."""
    for use in uses:
        numbers += use.errors[0].numel()
        if isinstance(use, Convolution):
            numbers += use.errors.shape[3] * use.slice.numel // use.slice.shape[0] * use.groups
    size = max(1, CHUNK_BYTES // (max(1, numbers) * uses[0].errors.element_size()))
    return iter(torch.split(chosen, size))


def with_ones(place: Place, features: Tensor, scale: Tensor | None = None) -> Tensor:
    """(b, T, groups, inputs): features ending with 1 where there is a bias, times a scale (b, T)."""
    groups, _, inputs = place.shape
    wide = features.new_empty(*features.shape[:2], groups, inputs)
    if place.bias is not None:
        wide[..., -1] = 1
    wide[..., : inputs - (place.bias is not None)] = features.reshape(*features.shape[:2], groups, -1)
    return wide if scale is None else wide.mul_(scale[:, :, None, None].to(wide))


def by_group(errors: Tensor, groups: int) -> Tensor:
    """(b, J, o, T) → (b, J, groups, o / groups, T)."""
    return errors.view(*errors.shape[:2], groups, -1, errors.shape[3])


def across_features(features: Tensor, matrix: Tensor) -> Tensor:
    """H A for features (b, groups, T, d) and A (groups, d, d), as one product a group."""
    rows = features.transpose(0, 1)
    return (rows.flatten(1, 2) @ matrix).view(*rows.shape[:3], -1).transpose(0, 1)


def across_errors(matrix: Tensor, errors: Tensor) -> Tensor:
    """S e for symmetric S (groups, o, o) and errors (b, groups, J, o, T)."""
    if errors.shape[4] == 1:
        return across_features(errors[..., 0], matrix)[..., None]
    return matrix[:, None] @ errors


def second_moment(rows: Tensor) -> Tensor:
    """Σ r rᵀ of rows (n, groups, k): (groups, k, k), of which the lower half counts."""
    if rows.shape[1] > 1:
        turned = rows.transpose(0, 1)
        return turned.mT @ turned
    flat = rows[:, 0]
    size = flat.shape[1]
    lower = flat.new_zeros(size, size)
    for start in range(0, size, PANEL):
        stop = min(start + PANEL, size)
        torch.mm(flat[:, start:stop].T, flat[:, :stop], out=lower[start:stop, :stop])
    return lower[None]


# -- sums over the data ---------------------------------------------------------------------------------------


class Moments:
    """Σ α h hᵀ and Σ e eᵀ of one place, apart for each of several sets of examples.

    Attributes:
        inputs: (sets, groups, d, d) float64, or (sets, groups, d) where features are rows of an identity.
        outputs: (sets, groups, o, o).
        mass: (sets,) Σ α.
    """

    def __init__(self, place: Place, num_sets: int, sharing: str, device: torch.device) -> None:
        self.place = place
        self.sharing = sharing
        groups, outputs, inputs = place.shape
        self.is_diagonal = place.kind is Lookup and sharing == "expand"
        if not place.is_matrix:
            num_sets, self.is_diagonal = 1, inputs > LARGEST_VECTOR
            if self.is_diagonal:
                warnings.warn(
                    f"{place.name}: {inputs:,} numbers that multiply no known features; of their exact block the "
                    f"diagonal stands for the whole, which is held up to {LARGEST_VECTOR:,}.",
                    FallbackWarning,
                    stacklevel=2,
                )
        square = (inputs,) if self.is_diagonal else (inputs, inputs)
        empty = torch.zeros(num_sets, dtype=torch.float64, device=device)
        self.inputs = empty.new_zeros(num_sets, groups, *square)
        self.outputs = empty.new_zeros(num_sets, groups, outputs, outputs)
        self.mass = empty

    def add(self, uses: list[Use], weights: Tensor, sets: Tensor) -> None:
        """A batch: uses of the place, weights (B, R) of rows and the set of each example (B,)."""
        if not self.place.is_matrix:
            rows = sum(use.errors for use in uses).flatten(0, 1)[:, None]  # type: ignore[union-attr]
            self.inputs[0] += rows.double().square().sum(0) if self.is_diagonal else second_moment(rows)
            self.outputs[0], self.mass[0] = 1, 1
            return
        for which in set(sets.tolist()):
            for chosen in chunks(uses, (sets == which).nonzero().flatten()):
                found = positions(uses, weights, chosen)
                if self.sharing == "reduce":
                    found = found.reduced(self.place.shape[2])
                self._add_features(found, which)
                self._add_errors(found.errors, which)
                self.mass[which] += found.counts.sum()

    def _add_features(self, found: Positions, which: int) -> None:
        if self.is_diagonal:
            self.inputs[which, 0].index_add_(0, found.features.flatten(), found.counts.flatten())
        else:
            rows = with_ones(self.place, found.features, found.counts.sqrt())
            self.inputs[which] += second_moment(rows.flatten(0, 1))

    def _add_errors(self, errors: Tensor, which: int) -> None:
        groups, outputs, _ = self.place.shape
        if groups == 1 and errors.shape[3] >= LONG:
            flat = errors.flatten(0, 1)
            total = torch.addbmm(flat.new_zeros(outputs, outputs), flat, flat.mT)[None]
        else:
            total = second_moment(by_group(errors, groups).permute(0, 1, 4, 2, 3).flatten(0, 2))
        self.outputs[which] += total

    def factors(self) -> tuple[Tensor, Tensor]:
        """S (sets, groups, o, o) and A (sets, groups, d, d) or (sets, groups, d), of sets that count."""
        counted = self.mass > 0
        inputs = self.inputs if self.is_diagonal else _mirrored(self.inputs)
        shape = (-1, *[1] * (inputs.ndim - 1))
        return _mirrored(self.outputs)[counted], inputs[counted] / self.mass[counted].view(shape)


def _mirrored(lower: Tensor) -> Tensor:
    return lower.tril() + lower.tril(-1).mT


class Squares:
    """Σ (u_iᵀ g v_j)² over the gradients g (o, d) of one place.

    Attributes:
        total: (groups, o, d) float64.
    """

    def __init__(self, place: Place, left: Tensor, right: Tensor | None) -> None:
        self.place = place
        self.left = left
        self.right = right
        self.total = torch.zeros(place.shape, dtype=torch.float64, device=left.device)

    def add(self, uses: list[Use], weights: Tensor) -> None:
        """A batch's uses of the place."""
        every = torch.arange(uses[0].num_examples, device=uses[0].errors.device)
        groups, outputs, inputs = self.place.shape
        scalars = uses[0].errors.shape[1]
        single = len(uses) == 1 and uses[0].errors.shape[2 if isinstance(uses[0], Lookup) else 3] == 1
        for chosen in chunks(uses, every, 0 if single else groups * outputs * inputs * scalars):
            found = positions(uses, weights, chosen)
            errors = by_group(found.errors, groups)
            if self.right is None:
                self._add_rows(found.features, self.left.mT @ found.errors)
                continue
            features = with_ones(self.place, found.dense_features(inputs)).transpose(1, 2)
            if single:
                self._add_single(features[:, :, 0], errors[..., 0])
            else:
                self._add_gradients(features, errors.transpose(1, 2))

    def _add_single(self, features: Tensor, errors: Tensor) -> None:
        """Of features (b, groups, d) and errors (b, J, groups, o) at one position: (Σ_j (uᵀe)²) (hᵀv)²."""
        assert self.right is not None
        num, scalars = errors.shape[:2]
        rotated = errors.flatten(0, 1).transpose(0, 1) @ self.left  # (groups, b·J, o)
        squares = rotated.square_().view(len(rotated), num, scalars, -1).sum(2)
        self.total += (squares.mT @ (features.transpose(0, 1) @ self.right).square_()).double()

    def _add_gradients(self, features: Tensor, errors: Tensor) -> None:
        """Of features (b, groups, T, d) and errors (b, groups, J, o, T), what is less to rotate of the two ways."""
        assert self.right is not None
        groups, outputs, inputs = self.place.shape
        scalars, num_positions = errors.shape[2], errors.shape[4]
        of_factors = num_positions * (inputs**2 + scalars * outputs**2)
        first = of_factors < scalars * outputs * inputs * (outputs + inputs)
        left = self.left[:, None]  # (groups, 1, o, o)
        if first:
            features, errors = features @ self.right, left.mT @ errors
        gradients = errors.flatten(2, 3) @ features  # (b, groups, J·o, d)
        if not first:
            gradients = gradients @ self.right
            gradients = left.mT @ gradients.view(*gradients.shape[:2], scalars, outputs, inputs)
        squares = gradients.square_().sum(0).view(groups, scalars, outputs, inputs)
        self.total += squares.sum(1).double()

    def _add_rows(self, index: Tensor, rotated: Tensor) -> None:
        """For rows of a table: positions of an example that take the same row add up first."""
        same = (index[:, :, None] == index[:, None]).to(rotated)  # (b, T, T)
        gathered = (rotated @ same[:, None]).square().sum(1) / same.sum(1)[:, None]  # (b, o, T)
        self.total[0].index_add_(1, index.flatten(), gathered.transpose(0, 1).flatten(1).double())


# -- G's own block --------------------------------------------------------------------------------------------


class ExactBlock(Operator):
    """G's block of one place, in the place's own order, by features and errors.

    Args:
        place: which parameters.
        batches: uses of the place, and of its bias, one list a batch.
        dtype: of products.

    Cost: of a product, two products of the features with a matrix of the weight's shape.
    """

    def __init__(self, place: Place, batches: list[list[Use]], dtype: torch.dtype) -> None:
        groups, outputs, inputs = place.shape
        device = batches[0][0].errors.device
        super().__init__(groups * outputs * inputs, dtype=dtype, device=device, name=f"G of {place.name}")
        self.place = place
        self.batches = [
            [use for use in batch if use.slice in (place.weight, place.bias)] for batch in batches
        ]
        self.num_rows = sum(math.prod(batch[0].errors.shape[:2]) for batch in self.batches)

    def _apply(self, block: Tensor) -> Tensor:
        weight, bias = self.place.split(block.T.reshape(-1, *self.place.shape))
        total_weight = torch.zeros_like(weight)
        total_bias = None if bias is None else torch.zeros_like(bias)
        for batch in self.batches:
            scalars = torch.zeros(())
            for use in batch:
                tangents = weight if use.slice == self.place.weight else bias
                assert tangents is not None
                scalars = scalars + use.push(tangents)
            for use in batch:
                total = total_weight if use.slice == self.place.weight else total_bias
                assert total is not None
                total += use.pull(scalars, slice(None)).view_as(total)
        pairs = zip(total_weight, total_weight if total_bias is None else total_bias, strict=True)
        joined = [self.place.join(one, None if total_bias is None else other) for one, other in pairs]
        return torch.stack(joined).flatten(1).T

    @property
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
        uses = self.place.mine(self.batches[0])
        return sum(use.errors.shape[2 if isinstance(use, Lookup) else 3] for use in uses)

    def factors(self, found: Positions) -> tuple[Tensor, Tensor]:
        """Features (b, groups, T, d) and errors (b, groups, J, o, T)."""
        groups, _, inputs = self.place.shape
        features = with_ones(self.place, found.dense_features(inputs)).transpose(1, 2)
        return features, by_group(found.errors, groups).transpose(1, 2)

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
            uses = self.place.mine(batch)
            every = torch.arange(uses[0].num_examples, device=self.device)
            weights = torch.ones(len(every), 1, dtype=torch.float64, device=self.device)
            for chosen in chunks(uses, every, numbers):
                yield positions(uses, weights, chosen)

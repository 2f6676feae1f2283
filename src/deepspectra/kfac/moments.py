"""Second moments of features and of errors, place by place: what Kronecker factors are made of."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from deepspectra.errors import FallbackWarning
from deepspectra.kfac.exact_blocks import ParameterBlock, Positions, num_positions, positions, single
from deepspectra.rows.captures import Captured
from deepspectra.rows.parameter_uses import Lookup, Use

LARGEST_VECTOR = 4096  # numbers of a vector whose exact block is held; of longer ones its diagonal
PANEL = 128  # columns of a symmetric product of which only the lower half is computed
LONG = 32  # positions from which errors are multiplied example by example
MOST_REPLICATES = 8  # sets of draws whose scatter tells the error of their sum


def second_moment(rows: Tensor) -> Tensor:
    """Σ r rᵀ of rows (n, groups, k): (groups, k, k), of which the lower half counts."""
    if rows.shape[1] > 1:
        turned = rows.transpose(0, 1)
        return turned.mT @ turned
    # panel by panel up to the diagonal: half the multiplications of a full product, in calls that are still large
    flat = rows[:, 0]
    size = flat.shape[1]
    lower = flat.new_zeros(size, size)
    for start in range(0, size, PANEL):
        stop = min(start + PANEL, size)
        torch.mm(flat[:, start:stop].T, flat[:, :stop], out=lower[start:stop, :stop])
    return lower[None]


class Replicates:
    """A sum over the scalars of examples; where these are draws, apart for up to 8 sets of draws."""

    def __init__(self, shape: tuple[int, ...], num_draws: int, device: torch.device) -> None:
        self.num_draws = num_draws  # scalars of an example, if they are draws; 0 if they are all there are
        self.sums = torch.zeros(num_replicates(num_draws), *shape, dtype=torch.float64, device=device)

    def of(self, scalars: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Each sum with its own of the scalars (b, J, ...) of some examples."""
        num = len(self.sums)
        return ((part, scalars[:, j::num]) for j, part in enumerate(self.sums))

    @property
    def total(self) -> Tensor:
        """The sum."""
        return self.sums.sum(0)

    @property
    def variance(self) -> Tensor:
        """Of each number of a sum of draws; NaN of a single draw."""
        # sets of unequal numbers of draws: each set's sum over its share estimates the total, the more draws it
        # has the better, and Σ share (estimate − total)² / (sets − 1) is right whatever the shares
        num = len(self.sums)
        draws = self.sums.new_tensor([len(range(j, self.num_draws, num)) for j in range(num)])
        shares = draws.view(-1, *[1] * (self.sums.ndim - 1)) / self.num_draws
        scatter = (shares * (self.sums / shares - self.total).square()).sum(0)
        return scatter.div(num - 1) if num > 1 else scatter.fill_(torch.nan)


def num_replicates(num_draws: int) -> int:
    """Of sums over so many draws; 1 if there are none."""
    return min(max(1, num_draws), MOST_REPLICATES)


class Moments:
    """Σ α h hᵀ and Σ e eᵀ of one place, apart for each of several sets of examples."""

    def __init__(
        self, place: ParameterBlock, num_sets: int, sharing: str, device: torch.device, num_draws: int = 0
    ) -> None:
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
        drawn = (outputs, outputs) if place.is_matrix else square
        # Σ α (sets,); Σ α h hᵀ (sets, groups, d, d), or (sets, groups, d) where features are rows of an identity; and
        # Σ e eᵀ (sets, groups, o, o), or of a vector of parameters alone its block (1, 1, d, d), or diagonal
        self.mass = torch.zeros(num_sets, dtype=torch.float64, device=device)
        self.inputs = self.mass.new_zeros(num_sets, groups, *(square if place.is_matrix else ()))
        self.errors = Replicates((num_sets, groups, *drawn), num_draws, device)

    def add(self, uses: list[Use], weights: Tensor, sets: Tensor) -> None:
        """A batch: uses of the place, weights (B, R) of rows and the set of each example (B,)."""
        if not self.place.is_matrix:
            errors = sum(single(use.errors) for use in uses)
            assert isinstance(errors, Tensor)
            for total, mine in self.errors.of(errors):
                rows = mine.flatten(0, 1)[:, None]
                total[0] += rows.double().square().sum(0) if self.is_diagonal else second_moment(rows)
            return
        for which in set(sets.tolist()):
            for each in positions(uses, weights, (sets == which).nonzero().flatten()):
                found = each.reduced(self.place.shape[2]) if self.sharing == "reduce" else each
                self._add_features(found, which)
                for total, errors in self.errors.of(found.errors):
                    total[which] += self._second_moment(errors)
                self.mass[which] += found.counts.sum()

    def _add_features(self, found: Positions, which: int) -> None:
        if self.is_diagonal:
            self.inputs[which, 0].index_add_(0, found.features.flatten(), found.counts.flatten())
        else:
            rows = self.place.with_ones(found.features, found.counts.sqrt())
            self.inputs[which] += second_moment(rows.flatten(0, 1))

    def _second_moment(self, errors: Tensor) -> Tensor:
        """Σ e eᵀ of errors (b, J, o, T): (groups, o, o)."""
        groups, outputs, _ = self.place.shape
        # of many positions e eᵀ example by example, where positions are next to each other in memory; of few it
        # pays to bring them together into one product
        if groups == 1 and errors.shape[3] >= LONG:
            flat = errors.flatten(0, 1)
            return torch.addbmm(flat.new_zeros(outputs, outputs), flat, flat.mT)[None]
        return second_moment(self.place.by_group(errors).permute(0, 1, 4, 2, 3).flatten(0, 2))

    def together(self) -> Moments:
        """Those of all sets as of one."""
        whole = copy.copy(self)
        whole.mass, whole.inputs = self.mass.sum(0, keepdim=True), self.inputs.sum(0, keepdim=True)
        whole.errors = copy.copy(self.errors)
        whole.errors.sums = self.errors.sums.sum(1, keepdim=True)
        return whole

    def factors(self) -> tuple[Tensor, Tensor]:
        """S (sets, groups, o, o) and A (sets, groups, d, d) or (sets, groups, d), of sets that count."""
        total = _mirrored(self.errors.total) if self._is_square else self.errors.total
        if not self.place.is_matrix:
            return torch.ones_like(self.mass)[:, None, None, None], total
        counted = self.mass > 0
        inputs = self.inputs if self.is_diagonal else _mirrored(self.inputs)
        shape = (-1, *[1] * (inputs.ndim - 1))
        return total[counted], inputs[counted] / self.mass[counted].view(shape)

    def variance(self) -> float:
        """Of Σ S ⊗ A, summed over its numbers: what the draws leave open of it."""
        if not self.errors.num_draws:
            return 0.0
        each = _mirrored(self.errors.variance) if self._is_square else self.errors.variance
        if not self.place.is_matrix:
            return float(each.sum())
        _, inputs = self.factors()
        return float((each[self.mass > 0].sum((2, 3)) * inputs.square().flatten(2).sum(2)).sum())

    @property
    def _is_square(self) -> bool:
        """Whether sums of errors are matrices."""
        return self.place.is_matrix or not self.is_diagonal


def _mirrored(lower: Tensor) -> Tensor:
    return lower.tril() + lower.tril(-1).mT


class Squares:
    """Σ (u_iᵀ g v_j)² over the gradients g (o, d) of one place."""

    def __init__(self, place: ParameterBlock, left: Tensor, right: Tensor | None, num_draws: int = 0) -> None:
        self.place = place
        self.left = left
        self.right = right
        self.sums = Replicates(place.shape, num_draws, left.device)

    def add(self, uses: list[Use]) -> None:
        """A batch's uses of the place."""
        groups, outputs, inputs = self.place.shape
        scalars = uses[0].errors.shape[1]
        one_position = num_positions(uses) == 1
        for found in positions(uses, numbers=0 if one_position else groups * outputs * inputs * scalars):
            if self.right is None:
                for total, mine in self.sums.of(found.errors.to(self.left)):
                    self._add_rows(total, found.features, self.left.mT @ mine)
                continue
            features = self.place.with_ones(found.dense_features(inputs)).transpose(1, 2).to(self.left)
            for total, mine in self.sums.of(self.place.by_group(found.errors).to(self.left)):
                if one_position:
                    self._add_single(total, features[:, :, 0], mine[..., 0])
                else:
                    self._add_gradients(total, features, mine.transpose(1, 2))

    def _add_single(self, total: Tensor, features: Tensor, errors: Tensor) -> None:
        """Of features (b, groups, d) and errors (b, J, groups, o) at one position: (Σ_j (uᵀe)²) (hᵀv)²."""
        assert self.right is not None
        # uᵀ g v = (uᵀe)(hᵀv): squares factor, so no gradient is formed and the scalars of an example add up first
        num, scalars = errors.shape[:2]
        rotated = errors.flatten(0, 1).transpose(0, 1) @ self.left  # (groups, b·J, o)
        squares = rotated.square_().view(len(rotated), num, scalars, -1).sum(2)
        total += (squares.mT @ (features.transpose(0, 1) @ self.right).square_()).double()

    def _add_gradients(self, total: Tensor, features: Tensor, errors: Tensor) -> None:
        """Of features (b, groups, T, d) and errors (b, groups, J, o, T), what is less to rotate of the two ways."""
        assert self.right is not None
        groups, outputs, inputs = self.place.shape
        scalars, num_positions = errors.shape[2], errors.shape[4]
        # Uᵀ(Σ_t e_t h_tᵀ)V: rotating factors is a product a position, rotating the gradient one whatever T is
        of_factors = num_positions * (inputs**2 + scalars * outputs**2)
        first = of_factors < scalars * outputs * inputs * (outputs + inputs)
        left = self.left[:, None]  # (groups, 1, o, o)
        if first:
            features, errors = features @ self.right, left.mT @ errors
        gradients = errors.flatten(2, 3) @ features  # (b, groups, J·o, d)
        if not first:
            gradients = gradients @ self.right
            gradients = left.mT @ gradients.view(*gradients.shape[:2], scalars, outputs, inputs)
        # the sum over examples in the working precision is short, a chunk; over chunks it is in double
        squares = gradients.square_().sum(0).view(groups, scalars, outputs, inputs)
        total += squares.sum(1).double()

    def _add_rows(self, total: Tensor, index: Tensor, rotated: Tensor) -> None:
        """For rows of a table: positions of an example that take the same row add up first."""
        # each of the n positions that share a row sees the whole sum of theirs, so its square is counted n times
        same = (index[:, :, None] == index[:, None]).to(rotated)  # (b, T, T)
        gathered = (rotated @ same[:, None]).square().sum(1) / same.sum(1)[:, None]  # (b, o, T)
        total[0].index_add_(1, index.flatten(), gathered.transpose(0, 1).flatten(1).double())


def add_squares(batches: Iterable[Captured], squares: Iterable[Squares]) -> None:
    """Each batch's uses to the sums of their own place."""
    totals = list(squares)
    for batch in batches if totals else ():
        for total in totals:
            total.add(total.place.mine(batch.uses))

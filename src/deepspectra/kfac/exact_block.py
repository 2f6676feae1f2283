"""G's own block of one place, by features and errors: products, inner products, gradients."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from deepspectra.kfac.blocks import Place, Positions, by_group, num_positions, positions, single, with_ones
from deepspectra.operators.base import Operator
from deepspectra.rows.parameter_uses import Use


class ExactBlock(Operator):
    """G's block of one place, in the place's own order, by features and errors: uses, one list a batch.

    Cost: of a product, two products of the features with a matrix of the weight's shape.
    """

    def __init__(self, place: Place, batches: list[list[Use]], dtype: torch.dtype) -> None:
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

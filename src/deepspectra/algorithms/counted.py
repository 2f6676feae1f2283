"""Blocks of columns of length P: random ones, the identity's, and their products, checked and counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from deepspectra.algorithms.lanczos import basis_dtype, gaussian_rows
from deepspectra.errors import NonFiniteError
from deepspectra.operators.base import Operator

Progress = Callable[[int, int | None], object]

BLOCK = 16  # vectors multiplied at once


class Products:
    """Products in blocks, checked and counted."""

    def __init__(self, operator: Operator, expected: int, progress: Progress | None) -> None:
        self.operator, self.expected, self.progress = operator, expected, progress
        self.size, self.done = operator.shape[0], 0
        self.like = torch.empty(0, dtype=basis_dtype(operator), device=operator.device)

    def __call__(self, columns: Tensor) -> Tensor:
        """A times columns (P, k)."""
        if columns.shape[1] <= BLOCK:
            return self._block(columns)
        products = torch.empty_like(columns)
        for first in range(0, columns.shape[1], BLOCK):
            products[:, first : first + BLOCK] = self._block(columns[:, first : first + BLOCK])
        return products

    def _block(self, columns: Tensor) -> Tensor:
        product = (self.operator @ columns).detach().to(self.like)
        self.done += columns.shape[1]
        if not bool(torch.isfinite(product).all()):
            raise NonFiniteError(
                f"a product with {self.operator.name} is NaN or infinite. "
                "Check the weights and the data, or use a wider dtype."
            )
        if self.progress is not None:
            self.progress(self.done, self.expected)
        return product

    def gaussian(self, count: int, generator: torch.Generator) -> Tensor:
        """Standard normal columns (P, count)."""
        return gaussian_rows(count, self.size, generator).T.to(self.like).contiguous()

    def signs(self, count: int, generator: torch.Generator) -> Tensor:
        """Columns (P, count) of independent signs ±1."""
        return self.gaussian(count, generator).signbit().to(self.like) * 2 - 1

    def samples(
        self, draw: Callable[[int, torch.Generator], Tensor], generator: torch.Generator
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Blocks of independent random columns with their products."""
        for first in range(0, self.expected, BLOCK):
            columns = draw(min(BLOCK, self.expected - first), generator)
            yield columns, self(columns)

    def identity(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The rows (k,) of blocks of A, and those columns (P, k) of it."""
        for rows in torch.split(torch.arange(self.size), BLOCK):
            block = torch.zeros(self.size, len(rows)).to(self.like)
            block[rows, torch.arange(len(rows))] = 1
            yield rows, self(block)

"""Columns that ask an operator: random ones and the identity's, and their products, scaled, checked and counted."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from deepspectra.algorithms.long_vectors import gaussian_rows, vector_dtype
from deepspectra.argument_checks import Progress, check_seed
from deepspectra.errors import NonFiniteError
from deepspectra.operators.base import Operator

BLOCK = 16  # vectors multiplied at once
# Products of such sizes, or their inverses, can be squared and summed.
SAFE = {torch.float32: 2.0**40, torch.float64: 2.0**200}


def stream(seed: int, purpose: str) -> torch.Generator:
    """A generator of this seed for one purpose: equal seeds of different estimates draw independent vectors.

    Raises:
        OptionError: the seed is not an integer of 64 bits.
    """
    check_seed(seed)
    digest = hashlib.blake2b(f"{purpose} {seed}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))


class InUnits(Operator):
    """2^−e A, with e such that its products can be squared; 0 where those of A can, and for short types.

    The first product decides. One that overflows, or loses digits to underflow, is taken again of a vector that is
    a power of two shorter or longer, as are all that follow. Powers of two change no digit. Operators that refuse to
    overflow are not asked again: those of a problem raise NonFiniteError themselves, and that passes through.
    A product that is not finite in any units is given as it is; `Probes` refuses it.

    Attributes:
        exponent: e.
        num_repeated: products taken again.
    """

    def __init__(self, operator: Operator) -> None:
        super().__init__(operator.shape[0], dtype=operator.dtype, device=operator.device, name=operator.name)
        self.operator, self.memory, self.group = operator, operator.memory, operator.group
        self.exponent = self.num_repeated = 0
        self._shift, self._decided = 0, operator.dtype not in SAFE

    def _apply(self, block: Tensor) -> Tensor:
        if not self._decided:
            return self._decide(block)
        product = self.operator @ (block * 2.0**self._shift if self._shift else block)
        scale = self.exponent + self._shift
        return product * 2.0**-scale if scale else product

    def _decide(self, block: Tensor) -> Tensor:
        product = self.operator @ block
        largest, limits = _largest(product), torch.finfo(self.dtype)
        if largest == 0:
            return product
        self._decided = True
        if 1 / SAFE[self.dtype] <= largest <= SAFE[self.dtype]:
            return product
        if not limits.tiny / limits.eps <= largest <= limits.max:
            shift = round(math.log2(limits.max)) // (2 if largest < 1 else -2)
            again = self.operator @ (block * 2.0**shift)
            self.num_repeated = block.shape[1]
            size = _largest(again)
            if 0 < size < math.inf:
                self._shift, product, largest = shift, again, size
            elif not largest < math.inf:
                return product
        scale = math.frexp(largest)[1]
        self.exponent = scale - self._shift
        return product * 2.0**-scale

    def back(self, value: Tensor) -> Tensor:
        """What is linear in 2^−e A, as it is of A; ∞ beyond what its type holds."""
        half = self.exponent // 2  # 2^e alone may be more than a float holds
        return value * 2.0**half * 2.0 ** (self.exponent - half)


def _largest(product: Tensor) -> float:
    """The largest size of a number in it, NaN if there is one."""
    low, high = product.aminmax()
    return float(torch.maximum(-low, high))


class Probes:
    """The columns that one run asks an operator with, and their products.

    Products are taken in blocks, in units in which they can be squared, and refused where they are not finite.

    Attributes:
        operator: the operator in those units.
        expected: products that the run will take, for `progress`.
        done: products so far; `spent`, with those taken again.
        size: P.
        like: an empty tensor of the dtype and device of columns.
    """

    def __init__(self, operator: Operator, expected: int, progress: Progress | None) -> None:
        self.operator = operator if isinstance(operator, InUnits) else InUnits(operator)
        self.expected, self.progress = expected, progress
        self.size, self.done = operator.shape[0], 0
        self.like = torch.empty(0, dtype=vector_dtype(operator), device=operator.device)

    def __call__(self, columns: Tensor) -> Tensor:
        """A times columns (P, k)."""
        if columns.shape[1] <= BLOCK:
            return self._block(columns)
        products = torch.empty_like(columns)
        for first in range(0, columns.shape[1], BLOCK):
            products[:, first : first + BLOCK] = self._block(columns[:, first : first + BLOCK])
        return products

    @property
    def spent(self) -> int:
        """Products, with those taken again."""
        return self.done + self.operator.num_repeated

    def _block(self, columns: Tensor) -> Tensor:
        product = (self.operator @ columns).detach().to(self.like)
        if product.numel() and not math.isfinite(_largest(product)):
            raise NonFiniteError(
                f"a product with {self.operator.name} is NaN or infinite. "
                "Check the weights and the data, or use a wider dtype."
            )
        self.count(columns.shape[1])
        return product

    def count(self, num_products: int) -> None:
        """Add products to those done, and tell of them."""
        self.done += num_products
        if self.progress is not None:
            self.progress(self.done, self.expected)

    def gaussian(self, count: int, generator: torch.Generator) -> Tensor:
        """Standard normal columns (P, count)."""
        return gaussian_rows(count, self.size, generator, self.like).T.contiguous()

    def signs(self, count: int, generator: torch.Generator) -> Tensor:
        """Columns (P, count) of independent signs ±1."""
        return self.gaussian(count, generator).signbit().to(self.like).mul_(2).sub_(1)

    def samples(
        self, draw: Callable[[Probes, int, torch.Generator], Tensor], generator: torch.Generator
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Blocks of independent random columns, `gaussian` or `signs`, with their products."""
        for first in range(0, self.expected, BLOCK):
            columns = draw(self, min(BLOCK, self.expected - first), generator)
            yield columns, self(columns)

    def identity(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The rows (k,) of blocks of A, and those columns (P, k) of it."""
        for rows in torch.split(torch.arange(self.size), BLOCK):
            block = torch.zeros(self.size, len(rows)).to(self.like)
            block[rows, torch.arange(len(rows))] = 1
            yield rows, self(block)

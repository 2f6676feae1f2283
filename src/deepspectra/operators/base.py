"""What is multiplied: the contract of a symmetric linear operator, and its algebra.

An operator is a symmetric map of R^P known by its products alone. A new one supplies `_apply` on a block
(P, K); products with vectors, sums, multiples, the dense matrix and the SciPy adaptor follow.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepspectra.errors import MemoryBudgetError, OptionError, ShapeError

DEFAULT_MEMORY = 4 * 2**30  # bytes an algorithm may hold in basis vectors, unless the operator says otherwise
LARGEST_DENSE = 20_000  # rows of the largest matrix `dense` will form


class Operator(ABC):
    """A symmetric linear map of R^P.

    Attributes:
        shape: (P, P).
        dtype: the type of its products.
        device: where its products live.
        name: what it is, for tables and provenance.
        memory: bytes an algorithm may hold in vectors of length P.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    name: str = "operator"
    memory: int = DEFAULT_MEMORY

    def __init__(self, size: int, *, dtype: torch.dtype, device: torch.device | str, name: str) -> None:
        self.shape = (size, size)
        self.dtype = dtype
        self.device = torch.device(device)
        self.name = name

    @abstractmethod
    def _apply(self, block: Tensor) -> Tensor:
        """Multiply a block (P, K) of this operator's dtype and device."""

    def start_block(self, kind: str) -> Tensor:
        """Starting vectors (P, K) that this operator knows to be good, by name; most know none."""
        raise OptionError(
            f"start={kind!r}: {self.name} has no class structure to start from. "
            "Pass start=None or a (P, K) tensor, or use an operator made from a Problem."
        )

    def sample_size(self, error: float) -> int:
        """Examples that `sampled` needs for eigenvectors to about this error; 0: not known, or too many to pay."""
        return 0

    def sampled(self, generator: torch.Generator, num_samples: int | None = None) -> Operator:
        """The same operator on a few examples, whose eigenvectors are nearly its own; most know none."""
        raise OptionError(f"start='sampled': {self.name} is not made of examples. Pass start=None.")

    def __matmul__(self, other: Tensor) -> Tensor:
        """Product with a vector (P,) or a block (P, K), of the same shape."""
        if not isinstance(other, Tensor):
            raise ShapeError(
                f"{self.name} @ x: x must be a tensor (P,) or (P, K), got {type(other).__name__}."
            )
        size = self.shape[0]
        if other.ndim not in (1, 2) or other.shape[0] != size:
            raise ShapeError(
                f"{self.name} @ x: x must have shape ({size},) or ({size}, K), got {tuple(other.shape)}."
            )
        block = other.to(dtype=self.dtype, device=self.device)
        if other.ndim == 1:
            return self._apply(block[:, None])[:, 0]
        return self._apply(block) if block.shape[1] else block.clone()

    def __add__(self, other: Operator) -> Operator:
        return Sum([(1.0, self), (1.0, other)])

    def __sub__(self, other: Operator) -> Operator:
        return Sum([(1.0, self), (-1.0, other)])

    def __mul__(self, scale: float) -> Operator:
        return Sum([(float(scale), self)])

    __rmul__ = __mul__

    def __neg__(self) -> Operator:
        return Sum([(-1.0, self)])

    def __repr__(self) -> str:
        return f"<{self.name}, {self.shape[0]:,} × {self.shape[1]:,}, {self.dtype}, {self.device}>"

    def dense(self) -> Tensor:
        """The matrix (P, P), by products with the identity; costs P products and refuses P > 20,000."""
        size = self.shape[0]
        if size > LARGEST_DENSE:
            raise MemoryBudgetError(
                f"dense(): {self.name} has {size:,} rows; the limit is {LARGEST_DENSE:,}. "
                "Restrict the problem to fewer parameters, or use eigenpairs and density."
            )
        matrix = torch.empty(size, size, dtype=self.dtype, device=self.device)
        identity = torch.eye(size, dtype=self.dtype, device=self.device)
        for columns in torch.split(torch.arange(size, device=self.device), 64):
            matrix[:, columns] = self._apply(identity[:, columns])
        return matrix

    def to_scipy(self) -> Any:
        """A `scipy.sparse.linalg.LinearOperator` with the same products."""
        from scipy.sparse.linalg import LinearOperator  # noqa: PLC0415  (SciPy's import takes a while)

        dtype = np.dtype("float64") if self.dtype == torch.float64 else np.dtype("float32")

        def apply(block: np.ndarray) -> np.ndarray:
            columns = torch.from_numpy(np.ascontiguousarray(block))
            product = (self @ columns).cpu()
            return product.to(
                torch.promote_types(product.dtype, torch.float32)
            ).numpy()  # NumPy has no bfloat16

        return LinearOperator(
            self.shape,
            matvec=lambda v: apply(v.reshape(-1)),
            rmatvec=lambda v: apply(v.reshape(-1)),
            matmat=apply,
            rmatmat=apply,
            dtype=dtype,
        )


class Sum(Operator):
    """Σ_j s_j A_j: sums, differences and multiples of operators of one size."""

    terms: list[tuple[float, Operator]]

    def __init__(self, terms: list[tuple[float, Operator]]) -> None:
        first = terms[0][1]
        flat: list[tuple[float, Operator]] = []
        for scale, operator in terms:
            if not isinstance(operator, Operator):
                raise ShapeError(
                    f"an operator can be added to an operator, not to {type(operator).__name__}."
                )
            if operator.shape != first.shape:
                raise ShapeError(f"sizes differ: {first!r} and {operator!r}.")
            inner = operator.terms if isinstance(operator, Sum) else [(1.0, operator)]
            flat += [(scale * factor, term) for factor, term in inner]
        self.terms = flat
        name = " ".join(_signed(scale, term.name, j == 0) for j, (scale, term) in enumerate(flat))
        super().__init__(first.shape[0], dtype=first.dtype, device=first.device, name=name)
        self.memory = min(term.memory for _, term in flat)

    def _apply(self, block: Tensor) -> Tensor:
        total = torch.zeros_like(block)
        for scale, operator in self.terms:
            total.add_((operator @ block).to(block), alpha=scale)
        return total

    def start_block(self, kind: str) -> Tensor:
        """That of the first term."""
        return self.terms[0][1].start_block(kind)

    def sampled(self, generator: torch.Generator, num_samples: int | None = None) -> Operator:
        """Each term on its own examples."""
        return Sum([(scale, term.sampled(generator, num_samples)) for scale, term in self.terms])


def _signed(scale: float, name: str, first: bool) -> str:
    sign = "−" if scale < 0 else ("" if first else "+")
    factor = "" if abs(scale) == 1 else f"{abs(scale):g}·"
    return f"{sign}{'' if first else ' '}{factor}{name}"


class Matrix(Operator):
    """A symmetric matrix (P, P) held in memory."""

    def __init__(self, matrix: Tensor, name: str = "matrix") -> None:
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ShapeError(f"a square matrix is needed, got {tuple(matrix.shape)}.")
        super().__init__(matrix.shape[0], dtype=matrix.dtype, device=matrix.device, name=name)
        self.matrix = matrix

    def _apply(self, block: Tensor) -> Tensor:
        return self.matrix @ block


class LowRank(Operator):
    """F diag(d) Fᵀ with F (P, r) held in memory; d is 1 unless given."""

    def __init__(self, factor: Tensor, diagonal: Tensor | None = None, name: str = "low rank") -> None:
        super().__init__(factor.shape[0], dtype=factor.dtype, device=factor.device, name=name)
        self.factor = factor
        self.diagonal = diagonal

    def _apply(self, block: Tensor) -> Tensor:
        inner = self.factor.T @ block
        if self.diagonal is not None:
            inner = self.diagonal.to(inner)[:, None] * inner
        return self.factor @ inner


class Projected(Operator):
    """(I − QQᵀ) A (I − QQᵀ): A with the span of the orthonormal columns of Q (P, r) projected out."""

    def __init__(self, operator: Operator, basis: Tensor, name: str | None = None) -> None:
        super().__init__(
            operator.shape[0],
            dtype=operator.dtype,
            device=operator.device,
            name=name or f"{operator.name}, projected",
        )
        self.operator = operator
        self.basis = basis
        self.memory = operator.memory

    def _apply(self, block: Tensor) -> Tensor:
        return self._outside(self.operator @ self._outside(block))

    def _outside(self, block: Tensor) -> Tensor:
        return block - self.basis @ (self.basis.T @ block)


class Function(Operator):
    """An operator given by a function on blocks (P, K), for experiments and tests."""

    def __init__(
        self,
        apply: Callable[[Tensor], Tensor],
        size: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        name: str = "function",
    ) -> None:
        super().__init__(size, dtype=dtype, device=device, name=name)
        self.function = apply

    def _apply(self, block: Tensor) -> Tensor:
        return self.function(block)

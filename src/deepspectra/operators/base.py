"""What is multiplied: the contract of a symmetric linear operator, and its algebra.

An operator is a symmetric map of R^P known by its products alone. A new one supplies `_apply` on a block
(P, K); products with vectors from both sides, sums, multiples, shifts, the dense matrix and the SciPy adaptor follow.
"""

from __future__ import annotations

import functools
import math
import numbers
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepspectra.argument_checks import check_count
from deepspectra.errors import DataError, MemoryBudgetError, NonFiniteError, OptionError, ShapeError
from deepspectra.problem.memory_budget import free_memory
from deepspectra.problem.parallel import ALONE, Group

DEFAULT_MEMORY = 4 * 2**30  # bytes an algorithm may hold in basis vectors, unless the operator says otherwise
HOST_SHARE = 1 / 2  # of the host's free memory, that a basis may take beside its accelerator's
LARGEST_DENSE = 20_000  # rows of the largest matrix `dense` will form


class Operator(ABC):
    """A symmetric linear map of R^P.

    ``A @ x`` and ``x @ A`` multiply tensors (P,), (P, K) and (K, P); ``A + B``, ``A - B``, ``c * A``, ``A / c``,
    ``-A`` and `shifted`, A + c I, are operators again. Products with complex tensors are complex, and those with
    tensors that require gradients can be backpropagated.

    Attributes:
        shape: (P, P).
        dtype: the type of its products.
        device: where its products live.
        name: what it is, for tables and provenance.
        memory: bytes an algorithm may hold in vectors of length P, on the device.
        basis: the type in which `eigenpairs` holds its basis: None for that of vectors, or torch.bfloat16 for half of
            float32's bytes, and residuals no smaller than its rounding.
        group: the processes that multiply together, all with the same vectors, and can share out a basis of them.
    """

    memory: int = DEFAULT_MEMORY
    basis: torch.dtype | None = None
    group: Group = ALONE

    def __init__(self, size: int, *, dtype: torch.dtype, device: torch.device | str, name: str) -> None:
        self.shape = (size, size)
        self.dtype = dtype
        self.device = torch.device(device)
        self.name = name

    @abstractmethod
    def _apply(self, block: Tensor) -> Tensor:
        """Multiply a block (P, K) of this operator's dtype and device."""

    def __matmul__(self, other: Tensor) -> Tensor:
        """Product with a vector (P,) or a block (P, K), of the same shape."""
        self._check_factor(other, other, f"{self.name} @ x", "({size},) or ({size}, K)")
        columns = self._product(other[:, None] if other.ndim == 1 else other)
        return columns[:, 0] if other.ndim == 1 else columns

    def __rmatmul__(self, other: Tensor) -> Tensor:
        """Product of a vector (P,) or of rows (K, P) with the operator, of the same shape."""
        turned = other.T if isinstance(other, Tensor) and other.ndim == 2 else other
        self._check_factor(other, turned, f"x @ {self.name}", "({size},) or (K, {size})")
        return self @ other if other.ndim == 1 else self._product(turned).T

    __array_ufunc__ = None  # NumPy leaves its arrays and scalars to the operators of this class

    def _check_factor(self, given: object, turned: object, what: str, shapes: str) -> None:
        """Raise ShapeError unless it is a tensor whose first dimension, once turned, is P."""
        if isinstance(given, Operator):
            raise ShapeError(
                f"{self.name} @ {given.name}: a product of operators is symmetric only if they commute, so it is no "
                "operator. Multiply a tensor by one after the other: A @ (B @ x)."
            )
        if isinstance(given, np.ndarray):
            raise ShapeError(
                f"{what}: x must be a tensor, got a NumPy array. Use torch.from_numpy(x), or the operator's "
                "to_scipy(), which takes arrays and gives arrays."
            )
        shapes = shapes.format(size=self.shape[0])
        if not isinstance(turned, Tensor):
            raise ShapeError(f"{what}: x must be a tensor {shapes}, got {type(given).__name__}.")
        if turned.ndim not in (1, 2) or turned.shape[0] != self.shape[0]:
            assert isinstance(given, Tensor)
            raise ShapeError(f"{what}: x must have shape {shapes}, got {tuple(given.shape)}.")

    def _product(self, columns: Tensor) -> Tensor:
        """With any columns (P, K)."""
        if columns.layout != torch.strided:
            columns = columns.to_dense()
        if columns.is_complex():
            num = columns.shape[1]
            parts = self._product(torch.cat([columns.real, columns.imag], 1))
            parts = parts.to(torch.promote_types(parts.dtype, torch.float32))  # no shorter complex numbers
            return torch.complex(parts[:, :num], parts[:, num:])
        block = columns.to(dtype=self.dtype, device=self.device)
        if not block.shape[1]:
            return block.clone()
        if block.requires_grad and torch.is_grad_enabled():
            product: Tensor = _Differentiable.apply(block, self)  # type: ignore[no-untyped-call]
            return product
        return self._apply(block)

    @property
    def T(self) -> Operator:  # noqa: N802  (the name that NumPy and PyTorch give it)
        """Itself: operators are symmetric."""
        return self

    mT = T  # noqa: N815

    def __add__(self, other: Operator | float) -> Operator:
        return self if _is_zero(other) else Sum([(1.0, self), (1.0, self._summand(other))])

    __radd__ = __add__  # sum() begins with 0

    def __sub__(self, other: Operator | float) -> Operator:
        return self if _is_zero(other) else Sum([(1.0, self), (-1.0, self._summand(other))])

    def __rsub__(self, other: Operator | float) -> Operator:
        return -self + other

    def __mul__(self, scale: float) -> Operator:
        return Sum([(self._scale(scale), self)])

    __rmul__ = __mul__

    def __truediv__(self, scale: float) -> Operator:
        divisor = self._scale(scale)
        if not divisor:
            raise OptionError(f"{self.name} / 0 is not defined.")
        return Sum([(1 / divisor, self)])

    def __neg__(self) -> Operator:
        return Sum([(-1.0, self)])

    def shifted(self, c: float) -> Operator:
        """A + c I: all eigenvalues moved by c, eigenvectors as they are; ``A + c * Identity(P)`` is the same.

        Raises:
            OptionError: c is not a finite real number.

        Cost: that of A.
        """
        return self + Sum([(self._scale(c), Identity(self.shape[0], dtype=self.dtype, device=self.device))])

    def _summand(self, other: object) -> Operator:
        """What can be added."""
        if isinstance(other, Operator):
            return other
        advice = f" For {self.name} + c I write A.shifted(c), or A + c * Identity(P)." if _is_number(other) else ""
        raise ShapeError(f"an operator can be added to an operator, not to {type(other).__name__}.{advice}")

    def _scale(self, value: object) -> float:
        """A finite real number that multiplies an operator."""
        if isinstance(value, Operator):
            raise OptionError(
                f"{self.name} and {value.name}: operators are not multiplied by each other. Multiply a tensor by one "
                "after the other, A @ (B @ x), or an operator by a number."
            )
        if isinstance(value, Tensor) and value.requires_grad:
            raise OptionError(
                f"{self.name} is multiplied by plain numbers, and this one requires a gradient, which would be lost. "
                "Multiply the product instead: c * (A @ x)."
            )
        if not _is_number(value):
            given = f"{type(value).__name__}" + (f" {tuple(value.shape)}" if hasattr(value, "shape") else "")
            raise OptionError(f"{self.name} can be multiplied and divided by a real number, not by {given}.")
        if not math.isfinite(number := float(value)):  # type: ignore[arg-type]
            raise OptionError(f"{self.name} can be multiplied and divided by a finite number, not by {number}.")
        return number

    def lends(self, num_bytes: int) -> AbstractContextManager[object]:
        """For a while, room for bytes of long vectors beyond `memory`: what products keep to be faster makes way.

        Only as far as both do not fit what the two may take together; later products keep it again.
        """
        return nullcontext()

    def host_memory(self) -> int:
        """Bytes of the host's memory for rows of a basis that an accelerator has no room for; 0 on the CPU."""
        if self.device.type == "cpu":
            return 0
        return min(self.group.every(int(HOST_SHARE * free_memory(torch.device("cpu")))))

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
            double = np.complex128 if np.iscomplexobj(block) else np.float64  # PyTorch knows no longer ones
            product = (self @ torch.from_numpy(np.ascontiguousarray(block, double))).cpu()
            return product.to(torch.promote_types(product.dtype, torch.float32)).numpy()  # there is no bfloat16

        return LinearOperator(
            self.shape,
            matvec=lambda v: apply(v.reshape(-1)),
            rmatvec=lambda v: apply(v.reshape(-1)),
            matmat=apply,
            rmatmat=apply,
            dtype=dtype,
        )


class _Differentiable(torch.autograd.Function):
    """A product that can be backpropagated to its columns; A is its own transpose."""

    @staticmethod
    def forward(ctx: Any, block: Tensor, operator: Operator) -> Tensor:
        """A X."""
        ctx.operator = operator
        return operator._apply(block)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """A times the gradient."""
        return ctx.operator @ gradients[0], None


def _is_number(value: object) -> bool:
    """A real number: of Python or NumPy, or a tensor or array of one."""
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex()
    if isinstance(value, np.ndarray):
        return value.size == 1 and value.dtype.kind in "iuf"
    return isinstance(value, numbers.Real)


def _is_zero(value: object) -> bool:
    return _is_number(value) and not value


class Identity(Operator):
    """The identity I of R^P, to shift spectra: A + c I. In a sum it takes dtype and device of the other terms.

    Args:
        size: P.
        dtype: of products.
        device: where they live.
    """

    def __init__(self, size: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> None:
        check_count("size", size)
        super().__init__(size, dtype=dtype, device=device, name="I")

    def _apply(self, block: Tensor) -> Tensor:
        return block.clone()


class Sum(Operator):
    """Σ_j s_j A_j: sums, differences and multiples of operators of one size.

    Products have the widest dtype among the terms', and the device of the first that is not an identity.
    """

    terms: list[tuple[float, Operator]]

    def __init__(self, terms: list[tuple[float, Operator]]) -> None:
        first = terms[0][1]
        flat: list[tuple[float, Operator]] = []
        for scale, operator in terms:
            if operator.shape != first.shape:
                raise ShapeError(f"sizes differ: {first!r} and {operator!r}.")
            inner = operator.terms if isinstance(operator, Sum) else [(1.0, operator)]
            flat += [(scale * factor, term) for factor, term in inner]
        name = " ".join(_signed(scale, term.name, j == 0) for j, (scale, term) in enumerate(flat))
        others = [term for _, term in flat if not isinstance(term, Identity)] or [first]
        dtype = functools.reduce(torch.promote_types, (term.dtype for term in others))
        super().__init__(first.shape[0], dtype=dtype, device=others[0].device, name=name)
        unit = Identity(first.shape[0], dtype=dtype, device=self.device)
        self.terms: list[tuple[float, Operator]] = [
            (scale, unit if isinstance(term, Identity) else term) for scale, term in flat
        ]
        self.memory = min(term.memory for term in others)
        self.basis = next((term.basis for term in others if term.basis is not None), None)
        self.group = max((term.group for term in others), key=lambda group: group.size)

    def lends(self, num_bytes: int) -> AbstractContextManager[object]:
        """Room of all terms, which mostly share it."""
        stack = ExitStack()
        for _, operator in self.terms:
            stack.enter_context(operator.lends(num_bytes))
        return stack

    def _apply(self, block: Tensor) -> Tensor:
        total = torch.zeros_like(block)
        for scale, operator in self.terms:
            total.add_((operator @ block).to(block), alpha=scale)
        return total


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


def as_operator(A: Operator | Tensor) -> Operator:
    """`A` itself, or a symmetric matrix (P, P) as an operator.

    Raises:
        ShapeError: neither an operator nor a square matrix, or of size 0.
        DataError: the matrix is complex or not symmetric.
        NonFiniteError: it has NaN or infinite entries.
    """
    if isinstance(A, Operator):
        return A
    if not isinstance(A, Tensor):
        raise ShapeError(f"A must be an Operator or a symmetric (P, P) tensor, got {type(A).__name__}.")
    if A.ndim != 2 or A.shape[0] != A.shape[1] or A.shape[0] == 0:
        raise ShapeError(f"A must be a square matrix (P, P) with P ≥ 1, got {tuple(A.shape)}.")
    if A.is_complex():
        raise DataError(f"A must be real, got {A.dtype}.")
    matrix = A.detach() if A.is_floating_point() else A.to(torch.float64)
    if not bool(torch.isfinite(matrix).all()):
        raise NonFiniteError("A has NaN or infinite entries.")
    asymmetry = float((matrix - matrix.T).abs().max())
    if asymmetry > torch.finfo(matrix.dtype).eps ** 0.5 * float(matrix.abs().max()):
        raise DataError(
            f"A must be symmetric, but |A − Aᵀ| reaches {asymmetry:.2g}. Pass (A + A.T) / 2 if that is meant."
        )
    return Matrix(matrix)

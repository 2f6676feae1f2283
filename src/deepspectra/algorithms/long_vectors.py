"""A few vectors of length P as rows: how many fit, random ones, and norms, inner products, bases beyond float32 sums.

What they make is small: float64, on the CPU. Rows may be spread over processes, each of which has its share of every
row (`Spread`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from deepspectra.argument_checks import check_choice
from deepspectra.operators.base import Operator

COLUMNS_PER_CHUNK = 2**16  # of rows, that are copied in float64 or rotated at once
DRAWN = 2**20  # random numbers that are made at once, in float64
STRETCH = 1024  # numbers whose norm is taken in their own type,
SAFE_SQUARES = (1e-14, 1e14)  # if the largest of them lies between these


def vector_dtype(operator: Operator) -> torch.dtype:
    """The operator's own type, or float32 if that is shorter: a basis in half precision is not orthogonal."""
    return torch.promote_types(operator.dtype, torch.float32)


def vectors_that_fit(operator: Operator) -> int:
    """Vectors of length P that fit the operator's memory budget."""
    return int(operator.memory // (operator.shape[0] * vector_dtype(operator).itemsize))


def rows_that_fit(operator: Operator) -> int:
    """Rows of a basis that fit the operator's memory budget, and on an accelerator the host's memory beside."""
    exact = sum(room_for_rows(operator, vector_dtype(operator)))
    if operator.basis is None or exact >= operator.shape[0]:
        return exact
    held = sum(room_for_rows(operator, stored_type(operator)))
    return min(held, operator.shape[0] - 1)  # for rows that span R^P are not rounded


def rows_on_device(operator: Operator) -> int:
    """Those of them, in the operator's own type, that need no host memory."""
    return room_for_rows(operator, vector_dtype(operator))[0]


def room_for_rows(operator: Operator, dtype: torch.dtype) -> tuple[int, int]:
    """Rows of a type that fit the memory budget, and the host's memory beside: of each a process has its share."""
    width = operator.group.width(operator.shape[0]) * dtype.itemsize
    return int(operator.memory // width), int(operator.host_memory() // width)


def stored_type(operator: Operator, capacity: int = 0) -> torch.dtype:
    """The type in which a basis of so many rows is held: its own where it can span R^P, as only exact rows tell.

    Raises:
        OptionError: rows cannot be held in the type asked for.
    """
    check_choice("basis", operator.basis, (None, torch.bfloat16))
    if operator.basis is None or capacity >= operator.shape[0]:
        return vector_dtype(operator)
    return operator.basis


def gaussian_rows(count: int, size: int, generator: torch.Generator, like: Tensor | None = None) -> Tensor:
    """Standard normal rows (count, P), drawn in float64 on the CPU, so that every type and device gets the same ones.

    Some at a time, as long rows in float64 would be the most that a search holds beside its basis.
    """
    like = torch.empty(0, dtype=torch.float64) if like is None else like
    rows = like.new_empty(count, size)
    flat, start = rows.view(-1), 0
    # PyTorch makes normal numbers by sixteens, and the last ones anew: stretches of so many are those of the whole.
    while start < len(flat):
        stop = start + DRAWN if start + DRAWN + 16 <= len(flat) else len(flat)
        flat[start:stop] = torch.randn(stop - start, generator=generator, dtype=torch.float64)
        start = stop
    return rows


def combine_rows(rows: Tensor, matrix: Tensor) -> Tensor:
    """Matrix (k, k) times rows (k, P), in the place of those if they lie one behind the other."""
    small_matrix = matrix.to(rows)
    if not rows.is_contiguous():
        return small_matrix @ rows
    for columns in torch.split(rows, COLUMNS_PER_CHUNK, dim=1):
        columns.copy_(small_matrix @ columns)
    return rows


def orthonormal_rows(block: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal rows (k, P) and coefficients (k, k), by falling norm, with block = coefficientsᵀ · rows.

    The block is overwritten: it may be as large as all else that there is.
    """
    if len(block) == 0:
        return block, torch.zeros(0, 0, dtype=torch.float64)
    if len(block) == 1:
        return _unit(block, norms_of(block)[0])
    if block.dtype == torch.float32:  # float64 resolves what its rounding leaves: products, no QR
        sizes, u = singular(inner_products(block, block))
        return combine_rows(block, (u / sizes.clamp_min(torch.finfo(block.dtype).tiny)).T), sizes[:, None] * u.T
    q, r = torch.linalg.qr(block.T)
    u, sizes, vh = torch.linalg.svd(small(r), full_matrices=False)
    return (q @ u.to(q)).T, sizes[:, None] * vh


class Spread:
    """How rows of length P lie on processes: each has its share (k, ·) of all of them, and what is small is of all.

    Rows that are multiplied, or come from outside, are whole (k, P).
    """

    def __init__(self, operator: Operator) -> None:
        self.group, self.size = operator.group, operator.shape[0]
        self.mine = self.group.share(self.size)

    def part(self, rows: Tensor) -> Tensor:
        """What this process has of whole rows."""
        return rows[:, self.mine]

    def whole(self, part: Tensor) -> Tensor:
        """Rows of which each process has its part."""
        return self.group.whole(part, self.size)

    def sum(self, inner: Tensor) -> Tensor:
        """Inner products of rows from those of the parts."""
        if self.group.size == 1:
            return inner
        total = inner.double()
        self.group.sum(total)
        return total.to(inner)

    def norms(self, part: Tensor) -> Tensor:
        """Of rows, as `norms_of` has them."""
        mine = norms_of(part)
        return mine if self.group.size == 1 else norms_of(self.group.whole(mine[:, None], self.group.size))

    def orthonormal(self, part: Tensor) -> tuple[Tensor, Tensor]:
        """As `orthonormal_rows`, which overwrites them; several rows are few and brought together for it."""
        if self.group.size == 1 or len(part) == 0:
            return orthonormal_rows(part)
        if len(part) == 1:
            return _unit(part, self.norms(part)[0])
        rows, coefficients = orthonormal_rows(self.whole(part))
        return self.part(rows), coefficients


def _unit(row: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    """A row of this norm, or of all its parts, divided by it in its place."""
    row.div_(norm.clamp_min(torch.finfo(row.dtype).tiny).to(row))
    # With the strides of a new row, by which matrix products choose how they sum.
    return row.view(-1)[None], small(norm.reshape(1, 1))


def singular(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values, falling, and right singular vectors of columns with this Gram matrix (k, k)."""
    squares, vectors = torch.linalg.eigh(gram)
    return squares.flip(0).clamp_min(0).sqrt(), vectors.flip(1)


def inner_products(rows: Tensor, others: Tensor) -> Tensor:
    """Inner products (k, l) of rows (k, P) and (l, P), multiplied and summed in float64, on the CPU."""
    total = torch.zeros(len(rows), len(others), dtype=torch.float64, device=rows.device)
    pieces = (torch.split(matrix, COLUMNS_PER_CHUNK, dim=1) for matrix in (rows, others))
    for left, right in zip(*pieces, strict=True):
        total += left.double() @ right.double().T
    return total.cpu()


def norms_of(rows: Tensor) -> Tensor:
    """Norms (k,) of rows (k, P) in float64: of stretches in the rows' own type, then of those, which is faster."""
    low, high = SAFE_SQUARES
    low_high = rows.aminmax() if rows.numel() else (0.0, 0.0)
    largest = max(-float(low_high[0]), float(low_high[1]))
    if not low < largest < high:
        unit = unit_of(largest)
        wide: Tensor = torch.linalg.vector_norm(rows.double() / unit, dim=1) * unit
        return wide
    count = rows.shape[1] // STRETCH
    stretches = rows[:, : count * STRETCH].reshape(len(rows), count, STRETCH)
    rest = rows[:, count * STRETCH :]
    norms: Tensor = torch.cat([stretches.norm(dim=2), rest.norm(dim=1, keepdim=True)], 1).double().norm(dim=1)
    return norms


def unit_of(size: float) -> float:
    """A power of four near a size whose square, or product with ε, could under- or overflow; 1 for others."""
    low, high = SAFE_SQUARES
    if low < size < high or not 0 < size < float("inf"):
        return 1.0
    return 4.0 ** round(math.log(size, 4))


def small(matrix: Tensor) -> Tensor:
    """What is small, where it is computed with: in float64, on the CPU."""
    return matrix.to(dtype=torch.float64, device="cpu")

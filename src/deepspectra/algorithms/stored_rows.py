"""The rows of a Krylov basis: the one place that knows where they lie and in which type.

They lie on the operator's device in the type of its vectors. Of those that do not fit its memory budget the rest lies
in host memory, some rows at a time as they are reached; all of them may be held in a shorter type (`Operator.basis`).
What does not lie on the device in the working type is brought there in stretches of columns, used and forgotten.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from deepspectra.algorithms.long_vectors import (
    COLUMNS_PER_CHUNK,
    room_for_rows,
    stored_type,
    vector_dtype,
)
from deepspectra.operators.base import Operator

NUMBERS = (2**24, 2**20)  # that are brought to the device at once: an accelerator, or the CPU, whose caches hold them
HOST_ROWS = 8  # that are added in host memory together, at least
ROWS_TOGETHER = 8  # that are whole in the working type at once, where all are copied


class StoredRows:
    """So many rows, or this process's part of each, as a basis asks for them: whole, in products, in rotations.

    Args:
        operator: whose vectors they are.
        capacity: how many there can be. Memory not reached is not touched.

    Attributes:
        like: an empty tensor of the working type and device.
        dtype: in which they are held.
    """

    def __init__(self, operator: Operator, capacity: int) -> None:
        mine = operator.group.share(operator.shape[0])
        self.like = torch.empty(0, dtype=vector_dtype(operator), device=operator.device)
        self.dtype = stored_type(operator, capacity)
        self.capacity, self.width = capacity, mine.stop - mine.start
        self._form = _Form(self.like, self.dtype, self.width)
        on_device, on_host = room_for_rows(operator, self.dtype)
        first = min(capacity, max(on_device, capacity - on_host))
        self._segments = [_Segment(0, first, self._form, self.like.device)]

    def __len__(self) -> int:
        return self.capacity

    @property
    def is_rounded(self) -> bool:
        """Whether they are held in a shorter type than they are made in."""
        return self._form.is_rounded

    @property
    def are_shared(self) -> bool:
        """Whether what is taken is a view: all lie in one piece, on the device and in the working type."""
        return len(self._segments) == 1 and self._segments[0].is_at_hand

    @property
    def num_on_host(self) -> int:
        """How many lie, or have room, in host memory."""
        return self._segments[-1].last - self._segments[0].last

    @property
    def told(self) -> str:
        """In words, where and how they lie, if not exactly on the device."""
        name = str(self.dtype).removeprefix("torch.")
        rounded = f"the basis was held in {name}" if self.is_rounded else ""
        hosted = f"{self.num_on_host} vectors of the basis lay in host memory" if self.num_on_host else ""
        return " and ".join(filter(None, [hosted, rounded]))

    def __getitem__(self, which: slice) -> Tensor:
        """Successive ones (k, ·) in the working type; shared, not copied, where they lie so."""
        first, last, _ = which.indices(self.capacity)
        return self._read(first, max(first, last), slice(None))

    def stored(self, count: int) -> Tensor:
        """The first so many as they are held; shared, not copied, where one piece of memory holds all."""
        held = [segment.rows[span] for segment, span, _ in self._spans(0, count)]
        return held[0] if len(held) == 1 else torch.cat([rows.cpu() for rows in held or [self._segments[0].rows[:0]]])

    def put(self, first: int, rows: Tensor, columns: slice = slice(None)) -> Tensor:
        """Keep rows (k, ·), or some columns of them, from this number on; squared norms (k,) of their rounding."""
        squares = torch.zeros(len(rows), dtype=torch.float64)
        for segment, span, mine in self._spans(first, first + len(rows)):
            squares[mine] += segment.write(span, columns, rows[mine])
        return squares

    def num_bytes(self, count: int) -> int:
        """Bytes of the first so many on the device, those of the process; 0 of what was released."""
        on_device = min(count, self._segments[0].last) if self._segments else 0
        return int(on_device * self.width * self.dtype.itemsize)

    def release(self) -> None:
        """Give back the memory of all; nothing more can be asked of them."""
        self._segments = []

    def copy(self, others: StoredRows, count: int) -> None:
        """Keep the first so many of others."""
        for first in range(0, count, ROWS_TOGETHER):
            self.put(first, others[first : min(first + ROWS_TOGETHER, count)])

    def inner(self, count: int, block: Tensor) -> Tensor:
        """Inner products (count, k) of the first so many with rows (k, ·)."""
        parts = [segment.inner(span, block) for segment, span, _ in self._spans(0, count)]
        return parts[0] if len(parts) == 1 else torch.cat([block.new_zeros(0, len(block)), *parts])

    def gram(self, first: int, last: int) -> Tensor:
        """Inner products (k, k) of successive rows among each other, multiplied and summed in float64, on the CPU."""
        total = torch.zeros(last - first, last - first, dtype=torch.float64, device=self.like.device)
        step = max(1, self._form.step(last - first) // 4)  # for they are in float64, too
        for start in range(0, self.width, step):
            rows = self._read(first, last, slice(start, start + step)).double()
            total += rows @ rows.T
        return total.cpu()

    def subtract(self, coefficients: Tensor, block: Tensor) -> None:
        """Take their combinations with coefficients (count, k) from rows (k, ·), in place."""
        for segment, span, mine in self._spans(0, len(coefficients)):
            for columns, rows in segment.pieces(span):
                block[:, columns].addmm_(coefficients[mine].T, rows, alpha=-1)

    def combine(self, first: int, coordinates: Tensor) -> Tensor:
        """Combinations (k, ·) of those from this number on, with coordinates (n, k)."""
        coordinates = coordinates.to(self.like)
        if self.are_shared:
            return (self[first : first + len(coordinates)].T @ coordinates).T
        total = self.like.new_zeros(coordinates.shape[1], self.width)
        for segment, span, mine in self._spans(first, first + len(coordinates)):
            for columns, rows in segment.pieces(span):
                total[:, columns].addmm_(coordinates[mine].T, rows)
        return total

    def rotate(self, first: int, last: int, basis: Tensor, pending: Tensor | None) -> Tensor:
        """Replace m of these rows by k combinations (k, m) of them, and the w behind by l, in place.

        Without `pending` (l, w) those behind only move up. Returns squared norms (k + l,) of what rounding adds.
        """
        k, m = basis.shape
        small, small_pending = basis.to(self.like), None if pending is None else pending.to(self.like)
        squares = torch.zeros(k + (last - first - m if pending is None else len(pending)), dtype=torch.float64)
        step = COLUMNS_PER_CHUNK if self.are_shared else self._form.step(last - first)
        for start in range(0, max(1, self.width), step):  # in place: no second basis fits the memory
            columns = slice(start, start + step)
            old = self._read(first, last, columns)
            turned = old[m:].clone() if small_pending is None else small_pending @ old[m:]
            squares[:k] += self.put(first, small @ old[:m], columns)
            squares[k:] += self.put(first + k, turned, columns)
        return squares

    def _read(self, first: int, last: int, columns: slice) -> Tensor:
        """Some columns of successive rows, in the working type."""
        parts = [segment.here(segment.rows[span, columns]) for segment, span, _ in self._spans(first, last)]
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts) if parts else self.like.new_empty(0, self.width)[:, columns]

    def _spans(self, first: int, last: int) -> Iterator[tuple[_Segment, slice, slice]]:
        """The segments that have rows of these numbers, which of theirs they are, and which of these."""
        while (end := self._segments[-1].last) < last:
            row = max(1, self.width * self.dtype.itemsize)
            fitting = 2 ** (HOST_ROWS * row - 1).bit_length() // row  # pinned memory comes in powers of two
            count = min(fitting, self.capacity - end)
            self._segments.append(_Segment(end, count, self._form, torch.device("cpu")))
        for segment in self._segments:
            low, high = max(first, segment.first), min(last, segment.last)
            if low < high:
                yield (
                    segment,
                    slice(low - segment.first, high - segment.first),
                    slice(low - first, high - first),
                )


class _Form(NamedTuple):
    """How rows are made (an empty tensor of their type and device) and held (type, and length)."""

    like: Tensor
    dtype: torch.dtype
    width: int

    @property
    def is_rounded(self) -> bool:
        """Whether they are held in a shorter type than they are made in."""
        return self.dtype != self.like.dtype

    def step(self, count: int) -> int:
        """Columns of so many rows that are brought to the device at once."""
        return max(1, NUMBERS[self.like.device.type == "cpu"] // max(1, count))


class _Segment:
    """Successive rows in one piece of memory, which knows nothing of the whole: it goes when that is let go."""

    def __init__(self, first: int, count: int, form: _Form, device: torch.device) -> None:
        self.first, self.last, self.form = first, first + count, form
        pinned = form.like.device.type == "cuda" and device.type == "cpu"
        self.rows = torch.empty(count, form.width, dtype=form.dtype, device=device, pin_memory=pinned)
        self.is_at_hand = not form.is_rounded and device == form.like.device

    def here(self, rows: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Some of these rows, or of their columns, on the device, in the working type unless told otherwise."""
        like = self.form.like
        if rows.device != like.device:  # one by one: a stretch of a row goes straight from pinned memory
            rows = torch.stack([row.to(like.device, non_blocking=True) for row in rows])
        return rows.to(dtype or like.dtype)

    def pieces(self, span: slice) -> Iterator[tuple[slice, Tensor]]:
        """Stretches of columns, and what these rows have there until the next: all at once where they are at hand."""
        rows = self.rows[span]
        if self.is_at_hand:
            yield slice(None), rows
            return
        step = min(self.form.step(len(rows)), self.form.width)
        # One place for all: new memory each time costs more than its use.
        place = self.form.like.new_empty(len(rows), step)
        for start in range(0, self.form.width, max(1, step)):
            columns = slice(start, start + step)
            held = rows[:, columns]
            yield columns, place[:, : held.shape[1]].copy_(self.here(held, held.dtype))

    def inner(self, span: slice, block: Tensor) -> Tensor:
        """Inner products (n, k) of some of its rows with rows (k, ·)."""
        if self.is_at_hand:
            return self.rows[span] @ block.T
        total = torch.zeros(span.stop - span.start, len(block), dtype=torch.float64, device=block.device)
        for columns, rows in self.pieces(span):
            total += rows @ block[:, columns].T
        return total.to(block)

    def write(self, span: slice, columns: slice, rows: Tensor) -> Tensor:
        """Keep rows (k, ·); squared norms (k,) of their rounding."""
        places = self.rows[span, columns]
        if not self.form.is_rounded:
            places.copy_(rows)
            return torch.zeros(len(rows), dtype=torch.float64)
        few, norms = self.form.step(rows.shape[1]), list[Tensor]()
        for some, place in zip(torch.split(rows, few), torch.split(places, few), strict=True):
            held = some.to(place.dtype)
            place.copy_(held)
            norms.append(torch.linalg.vector_norm(held.to(some.dtype).sub_(some), dim=1))
        return torch.cat(norms).cpu().double().square()

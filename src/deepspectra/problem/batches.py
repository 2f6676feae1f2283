"""Data as a fixed set of batches: the same examples at every pass, whatever they came from."""

from __future__ import annotations

import copy
import itertools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from deepspectra.argument_checks import check_count
from deepspectra.errors import DataError, DeepSpectraError, MemoryBudgetError, NondeterminismError, first_line
from deepspectra.problem.batch_trees import (
    examples,
    is_table,
    length,
    map_tensors,
    num_bytes,
    other_lengths,
    tensors,
)
from deepspectra.problem.parallel import ALONE, Group

Pair = tuple[Tensor, Tensor]
Result = TypeVar("Result")
LARGEST_DEFAULT_BATCH = 512
NUMBERS_PER_BATCH = 2**18  # a default batch holds about this many input numbers
EXAMPLES_BY_NAME = 8  # of a default batch of mappings: their models may have thousands of outputs a position


@dataclass(frozen=True)
class Move:
    """Brings a copy of a batch to a device, and its floating-point tensors to a dtype.

    Always a copy: loaders may use their buffers again, and users their tensors.
    """

    device: torch.device
    dtype: torch.dtype

    def __call__(self, batch: Any) -> Any:
        """The batch, moved."""
        return map_tensors(self._one, batch)

    def _one(self, tensor: Tensor) -> Tensor:
        dtype = self.dtype if tensor.is_floating_point() else tensor.dtype
        return tensor.detach().to(self.device, dtype, copy=True)


class Batches:
    """The batches of a data source, held in memory when they fit and read anew at each pass when not.

    What is read is copied, and what is held is not read again. Where processes share the work each holds its own
    share, and all bring each other what they ask for: every one of them must then ask.

    Args:
        source: DataLoader, Dataset, (x, y) tensors, or a list of batches.
        batch_size: examples a batch for tensors and data sets; DataLoaders and lists bring their own.
        move: brings a batch to its device and dtype.
        budget: bytes the batches may occupy in memory.
        pairs: batches are pairs (x, y), so a list of two tensors is such a pair and not two batches.

    """

    def __init__(self, source: Any, *, batch_size: int | None, move: Move, budget: int, pairs: bool = True) -> None:
        self._move = move
        read, sized = _reader(source, batch_size, pairs)
        self._source: Iterable[Any] | None = read
        self.brought = not sized  # the batches are the source's own, as those of a loader or a list are
        self.is_given = batch_size is not None or not sized  # their size is the user's choice
        held: list[Any] | None = []
        self._most: int | None = None  # examples of a batch, if there were more
        self._lengths: list[int] = []
        size, marks = 0, []
        for batch in _read(read):
            self._lengths.append(length(batch))
            marks.append(_fingerprint(batch))
            if held is not None:
                held.append(move(batch))
                size += num_bytes(held[-1])
                held = held if size <= budget else None
        self.marks = marks  # of each batch as it was read
        self.mark = _total(marks)  # differs for other examples, up to rounding the same in any order
        if not marks:
            raise DataError("the data is empty: it yielded no batch, and at least one is needed.")
        self.held = held  # the batches, moved, if they fit
        self.num_batches = len(marks)
        if isinstance(source, (DataLoader, Dataset)) or held is None:
            self._check_second_pass(marks)
        if held is not None:
            self._source = None

    group: Group = ALONE  # the processes that share the work

    def __iter__(self) -> Iterator[Any]:
        """Every batch, whoever holds it."""
        if self.held is None:
            return map(self._move, self._given())
        if self.group.size == 1:
            return iter(self.held)
        # the first is asked for most, and everyone has it
        return itertools.chain(self.held[:1], self.group.in_turn(self.held.__getitem__, self.num_batches, 1))

    def mine(self) -> Iterator[tuple[int, Any]]:
        """The batches of this process's share, each with its place among all."""
        if self.held is not None:
            return ((j, batch) for j, batch in enumerate(self.held) if self.group.owns(j))
        assert self._source is not None
        return ((j, self._move(piece)) for j, piece in enumerate(self._given()) if self.group.owns(j))

    def _given(self) -> Iterator[Any]:
        """Batches as the source gives them, cut where they are too large."""
        assert self._source is not None
        return (piece for batch in _read(self._source) for piece in _halves(batch, self._most))

    def mapped(self, function: Callable[[Any], Result]) -> Iterator[Result]:
        """What a function makes of every batch, in order, each made by the process that has the batch."""
        if self.group.size == 1:
            return map(function, self)
        mine = self.mine()
        return self.group.in_turn(lambda _: function(next(mine)[1]), self.num_batches)

    def order(self) -> Tensor:
        """One number for each example, in their order, which changes with it and with no cut.

        Cost: the data are read once, and those of other processes brought to all.
        """
        return torch.cat(list(self.mapped(example_marks)))

    def recut(self, batch_size: int | None, most: int) -> Batches:
        """The same examples as `resize` and `limit` cut them, whatever sizes at least as large they had."""
        other = copy.copy(self)
        other.resize(batch_size)
        other.limit(most)
        return other

    def shared(self, group: Group, *, cuts: bool) -> Batches:
        """The same among several processes; where it may be cut and nobody chose sizes, cut into equal shares."""
        other = copy.copy(self)
        other.group = group
        whole = self._whole() if cuts and not self.is_given else None
        if whole is not None:
            count = math.ceil(self.num_batches / group.size) * group.size
            other._cut(whole, math.ceil(length(whole) / count))
        if other.held is not None:
            other.held = [batch if not j or group.owns(j) else None for j, batch in enumerate(other.held)]
        return other

    def moved(self, move: Move) -> Batches:
        """The same batches on another device or in another dtype, held if these are."""
        other = copy.copy(self)
        other._move = move
        other.held = None if self.held is None else [move(batch) for batch in self.held]
        return other

    def sort_by_label(self) -> Tensor | None:
        """Put labelled examples in order of class, so that most batches hold one class; the order (N,), if they are.

        Sums over a class then touch its own batches only. Nothing happens unless every batch is held and is
        a pair of one input tensor and integer labels (B,), of equal shapes but for B.
        """
        held = self.held or []
        whole = self._whole() if all(map(is_labelled, held)) else None
        if whole is None:
            return None
        order: Tensor = whole[1].argsort(stable=True)
        self._cut(examples(whole, order), max(self._lengths))
        return order

    def resize(self, batch_size: int | None) -> None:
        """Cut the examples, in their order, into equal batches of about so many, unless the user chose a size.

        Nothing happens either without a size, or unless every batch is held and nothing but tensors, of equal shapes
        but for their lengths.
        """
        whole = None if self.is_given else self._whole()
        if whole is not None and batch_size is not None:
            num = length(whole)
            self._cut(whole, math.ceil(num / max(1, round(num / batch_size))))

    def limit(self, most: int) -> None:
        """Halve batches of more than so many examples until none is left, whoever chose their size."""
        if max(self._lengths) <= most:
            return
        if self.held is not None:
            self.held = [piece for batch in self.held for piece in _halves(batch, most)]
        self._most = most
        self._lengths = [cut.stop - cut.start for n in self._lengths for cut in _halved(0, n, most)]
        self.num_batches = len(self._lengths)

    def join(self) -> bool:
        """Make one batch of all examples, or say False: cutting was the user's choice, or they are no tensors."""
        if self.num_batches > 1:
            if self.is_given or (self.held and next(other_lengths(self.held[0]), None) is not None):
                return False
            if self.held is None:
                raise MemoryBudgetError(
                    "the data must be one batch, and does not fit a quarter of the memory. Raise memory=, or pass "
                    "batches of your own: data=[(x, y), ...]."
                )
            columns = zip(*(tensors(batch) for batch in self.held), strict=True)
            joined = iter([torch.cat(column) for column in columns])
            self.held = [map_tensors(lambda _: next(joined), self.held[0])]
            self._lengths = [length(self.held[0])]
            self.num_batches = 1
        return True

    def _whole(self) -> Any:
        """One batch of all, where these are held and nothing but tensors, of equal shapes but for their lengths."""
        held = self.held or []
        if not held or not all(map(is_table, held)):
            return None
        columns = [list(tensors(batch)) for batch in held]
        if len({tuple((leaf.shape[1:], leaf.dtype) for leaf in column) for column in columns}) != 1:
            return None
        joined = iter([torch.cat(column) for column in zip(*columns, strict=True)])
        return map_tensors(lambda _: next(joined), held[0])

    def _cut(self, whole: Any, batch_size: int) -> None:
        self.held = list(_pieces(whole, batch_size))
        self._lengths = list(map(length, self.held))
        self.num_batches = len(self.held)

    def _check_second_pass(self, marks: list[tuple[float, float]]) -> None:
        assert self._source is not None
        again = [_fingerprint(batch) for batch in _read(self._source)]
        if not again:
            raise NondeterminismError(
                "a second pass over the data brought nothing: it can be read once only. Read it into a list first, "
                "data=list(...), and pass that."
            )
        if not _close(self.mark, _total(again)):
            raise NondeterminismError(
                "the data differs between two passes (random augmentation, or a shuffling loader with "
                "drop_last or a weighted sampler?); every product would use another operator. Turn that off, "
                "or freeze one pass: data=list(loader)."
            )
        in_order = len(marks) == len(again) and all(map(_close, marks, again))
        if self.held is None and not in_order:
            raise NondeterminismError(
                "the loader shuffles and the data is too large to be held in memory. "
                "Use shuffle=False, or raise memory=."
            )


def _pieces(batch: Any, size: int) -> Iterator[Any]:
    """A batch in pieces of so many examples, the last of what is left."""
    for start in range(0, length(batch), size):
        yield examples(batch, slice(start, start + size))


def _halves(batch: Any, most: int | None) -> Iterator[Any]:
    """A batch in pieces of at most so many examples."""
    if most is None or length(batch) <= most:
        yield batch
    else:
        yield from (examples(batch, cut) for cut in _halved(0, length(batch), most))


def _halved(start: int, stop: int, most: int) -> Iterator[slice]:
    """Cuts halved again until none is of more: so those of a smaller number lie within those of a larger."""
    if stop - start <= most:
        yield slice(start, stop)
    else:
        middle = (start + stop + 1) // 2
        yield from _halved(start, middle, most)
        yield from _halved(middle, stop, most)


def is_pair(batch: Any) -> bool:
    """Whether a batch is a pair of tensors with a row for each example."""
    return (
        isinstance(batch, (tuple, list))
        and len(batch) == 2
        and all(isinstance(part, Tensor) and part.ndim > 0 and part.layout == torch.strided for part in batch)
        and len(batch[0]) == len(batch[1])
    )


def is_labelled(batch: Any) -> bool:
    """Whether a batch is a pair of one input tensor (B, ...) and integer labels (B,)."""
    return is_pair(batch) and batch[1].ndim == 1 and not batch[1].is_floating_point()


def _fingerprint(batch: Any) -> tuple[float, float]:
    """(Σ u, Σ u²) of its examples' marks u: whether batches hold the same examples, in any order within the batch."""
    marks = example_marks(batch)
    return float(marks.sum()), float(marks.square().sum())


def example_marks(batch: Any) -> Tensor:
    """(B,) float64: one number of each example, over all its tensors, which tells it from others."""
    leaves = [leaf for leaf in tensors(batch) if leaf.ndim and len(leaf)]
    if not leaves:
        return torch.zeros(0, dtype=torch.float64)
    rows = torch.zeros(max(len(leaf) for leaf in leaves), dtype=torch.float64)
    for position, leaf in enumerate(leaves):
        numbers = leaf.detach()
        numbers = numbers if leaf.layout == torch.strided else numbers.to_dense()
        numbers = torch.view_as_real(numbers) if numbers.is_complex() else numbers
        flat = numbers.reshape(len(leaf), -1).to("cpu", torch.float64).nan_to_num(nan=math.pi)
        weights = torch.cos(torch.arange(1, flat.shape[1] + 1, dtype=torch.float64) * (position + 1.37))
        rows[: len(leaf)] += flat @ weights
    return rows


def _total(marks: list[tuple[float, float]]) -> tuple[float, float]:
    """The mark of all batches together."""
    return sum(a for a, _ in marks), sum(b for _, b in marks)


def _close(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return all(math.isclose(a, b, rel_tol=1e-7, abs_tol=1e-9) for a, b in zip(one, other, strict=True))


def _read(source: Iterable[Any]) -> Iterator[Any]:
    """The batches of a source, whose failures say where they happened."""
    batches: Iterator[Any] | None = None
    count = 0
    while True:
        try:
            batches = iter(source) if batches is None else batches
            batch = next(batches)
        except StopIteration:
            return
        except (DeepSpectraError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            where = source.fault(count) if isinstance(source, _OfDataset) else ""
            raise DataError(
                f"reading batch {count} of the data failed{where}: {type(error).__name__}: {first_line(error)}"
            ) from error
        count += 1
        yield batch


def _reader(source: Any, batch_size: int | None, pairs: bool) -> tuple[Iterable[Any], bool]:
    """What reads the batches as often as they are asked for, and whether their size is ours to choose."""
    if batch_size is not None:
        check_count("batch_size", batch_size)
    if isinstance(source, (tuple, list)) and any(isinstance(part, np.ndarray) for part in source):
        raise DataError("data holds NumPy arrays; pass tensors: (torch.from_numpy(x), torch.from_numpy(y)).")
    pair = isinstance(source, tuple) or pairs
    if pair and isinstance(source, (tuple, list)) and len(source) == 2 and isinstance(source[1], Tensor):
        return _tensor_reader(source, batch_size)
    if isinstance(source, (list, DataLoader)) or (isinstance(source, tuple) and source):
        return source, False
    if isinstance(source, Dataset):
        if isinstance(source, IterableDataset) or not hasattr(source, "__len__"):
            return _OfDataset(source, batch_size or LARGEST_DEFAULT_BATCH), True
        if not len(source):
            raise DataError("the data set is empty: it has length 0, and at least one example is needed.")
        return _OfDataset(source, batch_size), True
    raise DataError(
        f"data of type {type(source).__name__} cannot be read; expected a DataLoader, a Dataset, a pair of "
        "tensors (x, y), or a list of batches."
    )


@dataclass
class _OfDataset:
    """Batches of a data set's items, in order."""

    source: Any
    batch_size: int | None

    def __iter__(self) -> Iterator[Any]:
        if self.batch_size is None:
            self.batch_size = default_batch_size(self.source[0])
        return iter(DataLoader(self.source, batch_size=self.batch_size, shuffle=False))

    def fault(self, batch: int) -> str:
        """Which item of a batch is at fault, as far as it can be told."""
        size = self.batch_size or 1
        if isinstance(self.source, IterableDataset) or not hasattr(self.source, "__len__"):
            return f", after item {batch * size - 1}" if batch else ", before the first item"
        shapes: dict[str, int] = {}
        for index in range(batch * size, min((batch + 1) * size, len(self.source))):
            try:
                item = self.source[index]
            except Exception:
                return f", at item {index}"
            shapes.setdefault(str([tuple(leaf.shape) for leaf in tensors(item)]), index)
        if len(shapes) > 1:
            told = " and ".join(f"{shape[1:-1]} (item {index})" for shape, index in list(shapes.items())[:2])
            return f": its items differ in shape, {told}; pass a DataLoader with a collate_fn that pads them"
        return f", which holds items {batch * size} to {(batch + 1) * size - 1}"


def _tensor_reader(pair: Any, batch_size: int | None) -> tuple[Iterable[Any], bool]:
    """The same for tensors. Sparse ones are one batch, which nobody cuts."""
    leaves = list(tensors(pair))
    if any(leaf.layout != torch.strided for leaf in leaves):
        return [tuple(pair)], False
    lengths = {leaf.shape[0] if leaf.ndim else -1 for leaf in leaves}
    if len(lengths) != 1 or -1 in lengths:
        shapes = ", ".join(str(tuple(leaf.shape)) for leaf in leaves)
        raise DataError(f"data tensors must have one row an example; their shapes are {shapes}.")
    (length,) = lengths
    if not length:
        raise DataError("the data is empty: its tensors have no rows.")
    size = batch_size or default_batch_size(map_tensors(lambda leaf: leaf[0], pair))
    cuts = [slice(start, start + size) for start in range(0, length, size)]
    return [map_tensors(operator.itemgetter(cut), tuple(pair)) for cut in cuts], True


def default_batch_size(example: Any) -> int:
    """Examples a batch before the model has seen any: many of small inputs, at most 512, at least 32."""
    if isinstance(example, Mapping):
        return EXAMPLES_BY_NAME
    numbers = max(1, sum(leaf.numel() for leaf in tensors(example)))
    return min(LARGEST_DEFAULT_BATCH, max(32, NUMBERS_PER_BATCH // numbers))

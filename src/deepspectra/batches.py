"""Data as a fixed set of batches: the same examples at every pass, whatever they came from."""

from __future__ import annotations

import copy
import math
from collections import UserDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from deepspectra.errors import DataError, NondeterminismError, OptionError

LARGEST_DEFAULT_BATCH = 512
NUMBERS_PER_BATCH = 2**18  # a default batch holds about this many input numbers


def map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Apply a function to every tensor of nested lists, tuples, mappings and dataclasses."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, Mapping):
        mapped = {key: map_tensors(function, value) for key, value in tree.items()}
        return _of_class(tree, mapped) if isinstance(tree, (dict, UserDict)) else mapped
    if is_dataclass(tree) and not isinstance(tree, type):
        twin = copy.copy(tree)
        for name in _fields(tree):
            object.__setattr__(twin, name, map_tensors(function, getattr(tree, name)))
        return twin
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(map_tensors(function, value) for value in tree))
    if isinstance(tree, (list, tuple)):
        return type(tree)(map_tensors(function, value) for value in tree)
    return tree


def tensors(tree: Any) -> Iterator[Tensor]:
    """Every tensor of nested lists, tuples, mappings and dataclasses."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from tensors(value)
    elif is_dataclass(tree) and not isinstance(tree, type):
        for name in _fields(tree):
            yield from tensors(getattr(tree, name))
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from tensors(value)


def _of_class(tree: Any, mapped: dict[Any, Any]) -> Any:
    """The mapped values in a mapping of the class of the original, with its other attributes."""
    try:
        twin = copy.copy(tree)
        for key, value in mapped.items():
            twin[key] = value
    except TypeError:  # one that cannot be written
        return mapped
    return twin


def _fields(tree: Any) -> list[str]:
    return [field.name for field in fields(tree) if hasattr(tree, field.name)]


def num_bytes(tree: Any) -> int:
    """Bytes of every tensor in a tree."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors(tree))


@dataclass(frozen=True)
class Move:
    """Brings a batch to a device, and its floating-point tensors to a dtype."""

    device: torch.device
    dtype: torch.dtype

    def __call__(self, batch: Any) -> Any:
        """The batch, moved."""
        return map_tensors(self._one, batch)

    def _one(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, self.dtype if tensor.is_floating_point() else tensor.dtype)


class Batches:
    """The batches of a data source, held in memory when they fit and read anew at each pass when not.

    Args:
        source: DataLoader, Dataset, (x, y) tensors, or a list of batches.
        batch_size: examples a batch for tensors and data sets; DataLoaders and lists bring their own.
        move: brings a batch to its device and dtype.
        budget: bytes the batches may occupy in memory.
        pairs: batches are pairs (x, y), so a list of two tensors is such a pair and not two batches.

    Attributes:
        held: the batches, moved, if they are held.
        num_batches: how many there are.
        mark: two numbers that differ for other examples, up to rounding the same in any order.

    Raises:
        DataError: nothing to read, or a source that cannot be read twice.
        NondeterminismError: a second pass brings other examples, or the source is too large to be held and
            brings them in another order.
    """

    def __init__(
        self, source: Any, *, batch_size: int | None, move: Move, budget: int, pairs: bool = True
    ) -> None:
        self._move = move
        self._read, sized = _reader(source, batch_size, pairs)
        self._is_sized = batch_size is not None or not sized
        held: list[Any] | None = []
        size, marks = 0, []
        for batch in self._read():
            marks.append(_fingerprint(batch))
            if held is not None:
                held.append(move(batch))
                size += num_bytes(held[-1])
                held = held if size <= budget else None
        self.mark = _total(marks)
        if not marks:
            raise DataError("the data is empty: it yielded no batch, and at least one is needed.")
        self.held = held
        self.num_batches = len(marks)
        if isinstance(source, (DataLoader, Dataset)) or held is None:
            self._check_second_pass(marks)

    def __iter__(self) -> Iterator[Any]:
        if self.held is not None:
            return iter(self.held)
        return (self._move(batch) for batch in self._read())

    def moved(self, move: Move) -> Batches:
        """The same batches on another device or in another dtype, held if these are."""
        other = copy.copy(self)
        other._move = move
        other.held = None if self.held is None else [move(batch) for batch in self.held]
        return other

    def sort_by_label(self) -> None:
        """Put labelled examples in order of class, so that most batches hold one class.

        Sums over a class then touch its own batches only. Nothing happens unless every batch is held and is
        a pair of one input tensor and integer labels (B,), of equal shapes but for B.
        """
        held = self.held or []
        whole = self._whole() if all(map(is_labelled, held)) else None
        if whole is None:
            return
        inputs, labels = whole
        order = labels.argsort(stable=True)
        self._cut(inputs[order], labels[order], max(len(y) for _, y in held))

    def resize(self, batch_size: int) -> None:
        """Cut the examples, in their order, into equal batches of about so many, unless the user chose a size.

        Nothing happens either unless every batch is held and is a pair of tensors of equal shapes but for their
        lengths.
        """
        whole = None if self._is_sized else self._whole()
        if whole is None:
            return
        count = max(1, round(len(whole[0]) / batch_size))
        self._cut(*whole, math.ceil(len(whole[0]) / count))

    def _whole(self) -> tuple[Tensor, Tensor] | None:
        """Inputs and targets of all batches, where these are held pairs of equal shapes but for their lengths."""
        pairs = self.held or []
        if not all(map(is_pair, pairs)) or len({(x.shape[1:], x.dtype, y.shape[1:]) for x, y in pairs}) != 1:
            return None
        inputs, targets = zip(*pairs, strict=True)
        return torch.cat(inputs), torch.cat(targets)

    def _cut(self, inputs: Tensor, targets: Tensor, batch_size: int) -> None:
        self.held = list(zip(torch.split(inputs, batch_size), torch.split(targets, batch_size), strict=True))
        self.num_batches = len(self.held)

    def _check_second_pass(self, marks: list[tuple[float, float]]) -> None:
        again = [_fingerprint(batch) for batch in self._read()]
        totals = self.mark, _total(again)
        if not _close(totals[0][0], totals[1][0]) or not _close(totals[0][1], totals[1][1]):
            raise NondeterminismError(
                "the data differs between two passes (random augmentation, or a shuffling loader with "
                "drop_last or a weighted sampler?); every product would use another operator. Turn that off, "
                "or freeze one pass: data=list(loader)."
            )
        same_order = len(marks) == len(again) and all(
            _close(a, c) and _close(b, d) for (a, b), (c, d) in zip(marks, again, strict=True)
        )
        if self.held is None and not same_order:
            raise NondeterminismError(
                "the loader shuffles and the data is too large to be held in memory. "
                "Use shuffle=False, or raise memory=."
            )


def is_pair(batch: Any) -> bool:
    """Whether a batch is a pair of tensors with a row for each example."""
    return (
        isinstance(batch, (tuple, list))
        and len(batch) == 2
        and all(isinstance(part, Tensor) and part.ndim > 0 for part in batch)
        and len(batch[0]) == len(batch[1])
    )


def is_labelled(batch: Any) -> bool:
    """Whether a batch is a pair of one input tensor (B, ...) and integer labels (B,)."""
    return is_pair(batch) and batch[1].ndim == 1 and not batch[1].is_floating_point()


def _fingerprint(batch: Any) -> tuple[float, float]:
    """Two numbers that tell whether batches hold the same examples, in any order within the batch.

    Each example is hashed to one number u, over all its tensors; the mark is (Σ u, Σ u²).
    """
    leaves = [leaf for leaf in tensors(batch) if leaf.ndim and len(leaf)]
    if not leaves:
        return 0.0, 0.0
    rows = torch.zeros(max(len(leaf) for leaf in leaves), dtype=torch.float64)
    for position, leaf in enumerate(leaves):
        flat = leaf.detach().reshape(len(leaf), -1).to("cpu", torch.float64).nan_to_num(nan=math.pi)
        weights = torch.cos(torch.arange(1, flat.shape[1] + 1, dtype=torch.float64) * (position + 1.37))
        rows[: len(leaf)] += flat @ weights
    return float(rows.sum()), float(rows.square().sum())


def _total(marks: list[tuple[float, float]]) -> tuple[float, float]:
    """The mark of all batches together."""
    return sum(a for a, _ in marks), sum(b for _, b in marks)


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-7, abs_tol=1e-9)


def _reader(source: Any, batch_size: int | None, pairs: bool) -> tuple[Callable[[], Iterable[Any]], bool]:
    """A function that reads the batches, and whether their size is ours to choose."""
    if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
        raise OptionError(f"batch_size must be a positive integer, got {batch_size!r}.")
    if isinstance(source, DataLoader):
        return lambda: source, False
    if isinstance(source, (tuple, list)) and any(isinstance(part, np.ndarray) for part in source):
        raise DataError("data holds NumPy arrays; pass tensors: (torch.from_numpy(x), torch.from_numpy(y)).")
    pair = isinstance(source, tuple) or pairs
    if pair and isinstance(source, (tuple, list)) and len(source) == 2 and isinstance(source[1], Tensor):
        return _tensor_reader(source, batch_size), True
    if isinstance(source, list) or (isinstance(source, tuple) and source):
        return lambda: source, False
    if isinstance(source, Dataset):
        if isinstance(source, IterableDataset) or not hasattr(source, "__len__"):
            return lambda: DataLoader(source, batch_size=batch_size or LARGEST_DEFAULT_BATCH), True
        if not len(source):
            raise DataError("the data set is empty: it has length 0, and at least one example is needed.")
        size = batch_size or default_batch_size(source[0])
        return lambda: DataLoader(source, batch_size=size, shuffle=False), True
    raise DataError(
        f"data of type {type(source).__name__} cannot be read; expected a DataLoader, a Dataset, a pair of "
        "tensors (x, y), or a list of batches."
    )


def _tensor_reader(pair: Any, batch_size: int | None) -> Callable[[], Iterable[Any]]:
    leaves = list(tensors(pair))
    lengths = {leaf.shape[0] if leaf.ndim else -1 for leaf in leaves}
    if len(lengths) != 1 or -1 in lengths:
        shapes = ", ".join(str(tuple(leaf.shape)) for leaf in leaves)
        raise DataError(f"data tensors must have one row an example; their shapes are {shapes}.")
    (length,) = lengths
    if not length:
        raise DataError("the data is empty: its tensors have no rows.")
    size = batch_size or default_batch_size(map_tensors(lambda leaf: leaf[0], pair))

    def rows(start: int) -> Any:
        return map_tensors(lambda leaf: leaf[start : start + size], tuple(pair))

    return lambda: map(rows, range(0, length, size))


def default_batch_size(example: Any) -> int:
    """Examples a batch before the model has seen any: many of small inputs, at most 512, at least 32."""
    numbers = max(1, sum(leaf.numel() for leaf in tensors(example)))
    return min(LARGEST_DEFAULT_BATCH, max(32, NUMBERS_PER_BATCH // numbers))

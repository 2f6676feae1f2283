"""Batches as trees of containers with tensors at their leaves, whose first axis is that of the examples."""

from __future__ import annotations

import copy
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


def map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Apply a function to every tensor of nested lists, tuples, mappings and dataclasses."""
    if isinstance(tree, Tensor):
        return function(tree)
    plain = isinstance(tree, (dict, UserDict))  # a model's output may be a dataclass too
    if plain or (isinstance(tree, Mapping) and not is_dataclass(tree)):
        mapped = {key: map_tensors(function, value) for key, value in tree.items()}
        return _of_class(tree, mapped) if plain else mapped
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
    else:
        for part in _parts(tree):
            yield from tensors(part)


def length(batch: Any) -> int:
    """The length of a batch's first tensor: how many examples it has, where they lie along the first dimension."""
    return next((len(leaf) for leaf in tensors(batch) if leaf.ndim), 0)


def examples(batch: Any, chosen: Tensor | slice) -> Any:
    """Some of a batch's examples, which lie along the first dimension of its tensors."""
    return map_tensors(lambda leaf: leaf[chosen] if leaf.ndim else leaf, batch)


def other_lengths(tree: Any) -> Iterator[int]:
    """Lengths of lists of numbers or texts and of NumPy arrays among the tensors of a tree."""
    parts = _parts(tree)
    nested = any(isinstance(part, (Tensor, Mapping, list, tuple)) for part in parts)
    if (isinstance(tree, np.ndarray) and tree.ndim) or (isinstance(tree, (list, tuple)) and parts and not nested):
        yield len(tree)
    for part in parts:
        yield from other_lengths(part)


def _parts(tree: Any) -> list[Any]:
    """What a list, tuple, mapping or dataclass holds."""
    if isinstance(tree, (list, tuple)):
        return list(tree)
    if isinstance(tree, Mapping):
        return list(tree.values())
    if is_dataclass(tree) and not isinstance(tree, type):
        return [getattr(tree, name) for name in _fields(tree)]
    return []


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
    """Bytes of every tensor in a tree, of sparse ones those of their values."""
    every = (leaf if leaf.layout == torch.strided else leaf.to_sparse().values() for leaf in tensors(tree))
    return sum(leaf.element_size() * leaf.numel() for leaf in every)


def is_table(batch: Any) -> bool:
    """Whether a batch is nothing but tensors with a row for each example."""
    if isinstance(batch, Tensor):
        return batch.ndim > 0 and batch.layout == torch.strided
    parts = _parts(batch)
    return bool(parts) and all(map(is_table, parts)) and len(set(map(length, parts))) == 1

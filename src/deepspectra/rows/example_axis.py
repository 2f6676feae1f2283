"""How the examples lie in a batch: measured by passing a few of them alone."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deepspectra.problem.batch_cut_checks import AGREE, AGREE_HALF
from deepspectra.problem.batch_trees import map_tensors, tensors
from deepspectra.problem.evaluated_model import differentiable
from deepspectra.problem.problem import Problem

MOST_LEFT_OUT = 2  # tensors as long as there are examples that hold something else


@dataclass(frozen=True)
class Examples:
    """How the examples lie in a batch's tensors and in its rows.

    It is never read from lengths alone, which may be equal by chance: a reading holds if a few examples that pass the
    network alone give the rows that they gave in their batch.
    """

    leaf: int  # the tensor, in the batch's order, whose length along `dim` is the number of examples
    dim: int  # of tensors, that examples are in
    cut: frozenset[int]  # which tensors hold one entry an example there
    interleaved: bool  # the first row of all examples, then the second; or else example by example
    apart: bool  # examples that passed the network alone gave their rows

    def rows(self, batch: Any, num_rows: int) -> Tensor | None:
        """Which rows are whose, (B, R); None if they are not spread evenly."""
        leaves = list(tensors(batch))
        if self.leaf >= len(leaves) or leaves[self.leaf].ndim <= self.dim:
            return None
        size = leaves[self.leaf].shape[self.dim]
        if not size or num_rows % size:
            return None
        every = torch.arange(num_rows)
        return every.view(-1, size).T if self.interleaved else every.view(size, -1)

    def one(self, batch: Any, index: int) -> Any:
        """A batch of one example."""
        numbers = itertools.count()
        return map_tensors(lambda leaf: leaf.narrow(self.dim, index, 1) if next(numbers) in self.cut else leaf, batch)


def find_examples(sample: Problem, batch: Any, outputs: Tensor) -> Examples | None:
    """How examples lie in a batch, found by passing a few of them alone; by its shapes if none can pass alone."""
    first: Examples | None = None
    for one in _readings(batch, len(outputs)):
        rows = one.rows(batch, len(outputs))
        assert rows is not None
        alone = _alone(sample, batch, one, len(rows))
        for order in dict.fromkeys((one.dim == 1, one.dim == 0)):
            read = dataclasses.replace(one, interleaved=order, apart=True)
            if alone is not None and agree(alone, outputs, read.rows(batch, len(outputs))):
                return read
        first = one if first is None and one.dim == 0 else first
    return first


def _readings(batch: Any, num_rows: int) -> Iterator[Examples]:
    """Every way in which so many rows could come from examples of a batch, the likeliest first."""
    leaves = list(tensors(batch))
    for dim in (0, 1):
        long = [j for j, leaf in enumerate(leaves) if leaf.ndim > dim]
        for size in dict.fromkeys(leaves[j].shape[dim] for j in long):
            every = [j for j in long if leaves[j].shape[dim] == size]
            single = size == 1 and len(every) == len(long)  # or else something that all examples share
            if size and num_rows % size == 0 and (size > 1 or single):
                for left_out in range(min(len(every), MOST_LEFT_OUT + 1)):
                    for cut in itertools.combinations(every, len(every) - left_out):
                        yield Examples(cut[0], dim, frozenset(cut), interleaved=False, apart=False)


def _alone(sample: Problem, batch: Any, reading: Examples, size: int) -> dict[int, Tensor] | None:
    """What a few of so many examples give alone, by index; None if they cannot pass alone."""
    found = {}
    for index in sorted({0, size // 2, size - 1}) if size > 1 else []:
        try:
            with torch.no_grad(), differentiable():
                found[index] = sample.evaluate(sample.parameters, reading.one(batch, index))[0]
        except Exception:  # a model of batches of one size, or of one graph
            return None
    return found


def agree(alone: dict[int, Tensor], outputs: Tensor, rows: Tensor | None) -> bool:
    """Whether examples alone give their rows of the outputs."""
    if rows is None:
        return False
    limit = AGREE.get(outputs.dtype, AGREE_HALF) * float(outputs.detach().abs().max())
    for index, found in alone.items():
        expected = outputs.detach()[rows[index].to(outputs.device)]
        if found.shape != expected.shape or not bool(((found - expected).abs() <= limit).all()):
            return False
    return True

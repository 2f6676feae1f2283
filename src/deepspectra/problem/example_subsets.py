"""Problems on some of the examples of another: a few rows to try things on, and weighted draws."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor

from deepspectra.errors import DataError, OptionError
from deepspectra.problem.batches import Batches, Move, map_tensors, num_bytes
from deepspectra.problem.cross_entropy import CrossEntropy, DrawnCrossEntropy
from deepspectra.problem.problem import Problem


def small_problem(problem: Problem, num_rows: int, dtype: torch.dtype, rows: Any = None) -> Problem:
    """The problem on a few rows that count, or on one batch that cannot be cut, in another dtype.

    On those of `some_rows`, if they are known. Every process has all of it.
    """
    move = Move(problem.device, dtype)
    batch = some_rows(problem, num_rows) if rows is None else rows
    batches = Batches([move(batch)], batch_size=None, move=move, budget=4 * num_bytes(batch) + 1)
    return problem.cast(dtype, batches)


def some_rows(problem: Problem, num_rows: int) -> Any:
    """A batch of at most so many rows that count, or a whole batch that cannot be cut.

    Of the first batch that has so many, or of the one that has most.
    """
    most, found = 0, None
    for batch in problem.fixed_batches():
        outputs, targets = problem.values(batch)
        (counted,) = (problem.loss_function.weights(outputs, targets) > 0).nonzero(as_tuple=True)
        if len(counted) <= most:
            continue
        most, found = len(counted), batch
        if problem.cuts and problem.reads_pairs and len(outputs) == len(batch[1]):
            chosen = counted[:: max(1, len(counted) // num_rows)][:num_rows]
            found = map_tensors(operator.itemgetter(chosen), batch)
        if most >= num_rows:
            break
    if found is None:
        raise DataError("no row counts: every target is ignored or has weight 0.")
    return found


def can_draw(problem: Problem) -> bool:
    """Examples can be drawn: batches are (x, labels), and the loss is cross-entropy."""
    return isinstance(problem.loss_function, CrossEntropy) and problem.splits_by_class


def drawn_problem(problem: Problem, chosen: Tensor, weights: Tensor) -> Problem:
    """The problem on chosen examples (ascending indices in the order of its batches), each with a weight.

    Losses and derivatives are Σ m_i ω_i (·)_i over the chosen examples, divided by Σ ω_i over all: unbiased
    when each is drawn with probability 1/m_i.
    """
    loss = problem.loss_function
    if not can_draw(problem) or not isinstance(loss, CrossEntropy):
        raise OptionError(
            "examples can be drawn from batches (x, labels), one label an example, with cross-entropy only."
        )
    inputs, targets, start = [], [], 0
    for batch in problem.batches:
        here = (chosen >= start) & (chosen < start + len(batch[1]))
        index = (chosen[here] - start).to(batch[1].device)
        pairs = [batch[1][index].double(), weights[here].to(batch[1].device, torch.float64)]
        inputs.append(batch[0][index])
        targets.append(torch.stack(pairs, 1))
        start += len(batch[1])
    move = Move(problem.device, problem.dtype)
    data = torch.cat(inputs), torch.cat(targets)
    batches = Batches(data, batch_size=None, move=move, budget=problem.memory // 4)
    batches.resize(problem.batch_size)
    found = problem.variant(loss_function=DrawnCrossEntropy(loss), batches=batches)
    found.total_weight = problem.total_weight
    found.batches = batches.shared(problem.batches.group, cuts=True)
    return found


def class_batches(
    problem: Problem, groups: Tensor | None = None, among: Collection[int] | None = None
) -> Iterator[Any]:
    """A process's batches, split so that each holds one class, or one of `groups` (C,), where they can be split.

    With `among` those of these classes or groups only.
    """
    for _, batch in problem.fixed_batches().mine():
        if not problem.can_split(batch):
            yield batch
            continue
        inputs, labels = batch
        if groups is not None:  # ignored rows, which may have any label, count with those of class 0
            known = labels.where((labels >= 0) & (labels < len(groups)), 0)
            labels = groups.to(labels.device)[known]
        for label in torch.unique(labels):
            if among is None or int(label) in among:
                chosen = labels == label
                yield batch if chosen.all() else (inputs[chosen], batch[1][chosen])

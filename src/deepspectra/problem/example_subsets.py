"""Problems on some of the examples of another: a few rows to try things on, and weighted draws."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deepspectra.argument_checks import check_count
from deepspectra.errors import DataError, OptionError
from deepspectra.problem.batch_trees import examples, length, num_bytes
from deepspectra.problem.batches import Batches, Move, Pair
from deepspectra.problem.cross_entropy import CrossEntropy, DrawnCrossEntropy
from deepspectra.problem.evaluated_model import Forward
from deepspectra.problem.memory_budget import share
from deepspectra.problem.problem import Problem

FEWEST_EXAMPLES = 2  # of a few rows to try things on, where an example has several


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
        counts = _counts(problem, batch)
        (counted,) = counts.nonzero(as_tuple=True)
        if len(counted) <= most:
            continue
        most, found = len(counted), batch
        each = _rows_an_example(problem, batch, len(counts))
        if each:
            owners = torch.unique(counted // each)
            num = max(FEWEST_EXAMPLES if each > 1 else 1, num_rows // each)  # of one alone nobody sees how they lie
            found = examples(batch, owners[:: max(1, len(owners) // num)][:num])
        if most >= num_rows:
            break
    if found is None:
        raise DataError("no row counts: every target is ignored or has weight 0.")
    return found


def _rows_an_example(problem: Problem, batch: Any, num_rows: int) -> int:
    """How many rows each example of a batch gives, one after the other; 0 if it cannot be cut into examples."""
    num = length(batch)
    return num_rows // num if problem.cuts and num and num_rows % num == 0 else 0


def evenly_spread(total: int, num: int) -> Tensor:
    """Which of a number of things are `num` of them, evenly spread: booleans (total,); all where that is too many."""
    return (torch.arange(total + 1) * num // total).diff() > 0


def limited(problem: Problem, num: int) -> Problem:
    """The problem on examples, evenly spread, with so many rows that count; on whole batches if these are not cut.

    Of examples with many rows, such as sentences, with about so many, of those examples where some count.

    Raises:
        OptionError: fewer than one.
    """
    check_count("limit", num)
    chosen = _chosen_examples(problem, num) if problem.cuts else torch.empty(0, dtype=torch.long)
    start, seen, batches = 0, 0, []
    for batch in problem.fixed_batches():
        if problem.cuts:
            here = chosen[(chosen >= start) & (chosen < start + length(batch))] - start
            batches += [examples(batch, here.to(problem.device))] if len(here) else []
            start += length(batch)
        elif seen < num and (counted := int(_counts(problem, batch).sum())):
            batches.append(batch)
            seen += counted
    move = Move(problem.device, problem.dtype)
    return problem.variant(batches=Batches(batches, batch_size=None, move=move, budget=share(problem.memory, "data")))


def _chosen_examples(problem: Problem, num: int) -> Tensor:
    """Ascending indices of examples, evenly spread over those where rows count, with about so many such rows.

    Cost: a forward pass, or one of the first batch where every example is a row that counts.
    """
    total, first = sum(map(length, problem.batches)), next(iter(problem.fixed_batches()))
    if problem.num_examples == total and len(_counts(problem, first)) == length(first):
        return evenly_spread(total, num).nonzero()[:, 0]

    def some_count(batch: Any) -> Tensor:
        counts = _counts(problem, batch)
        each = _rows_an_example(problem, batch, len(counts))
        return counts.view(-1, each).any(1) if each else counts.new_ones(length(batch))

    owners = torch.cat(list(problem.fixed_batches().mapped(some_count))).nonzero()[:, 0].cpu()
    few = max(1, num * len(owners) // problem.num_examples)
    return owners[evenly_spread(len(owners), few)]


def _counts(problem: Problem, batch: Any) -> Tensor:
    """Which rows of a batch count."""
    return problem.loss_function.weights(*problem.values(batch)) > 0


def first_batch(problem: Problem) -> Problem:
    """The problem on its first batch that has rows that count."""
    for batch in problem.fixed_batches():
        if bool(_counts(problem, batch).any()):
            break
    move = Move(problem.device, problem.dtype)
    return problem.variant(batches=Batches([batch], batch_size=None, move=move, budget=problem.memory))


def can_draw(problem: Problem) -> bool:
    """Examples can be drawn: batches can be cut into them, and the loss is the cross-entropy of labels."""
    loss = problem.loss_function
    if not isinstance(loss, CrossEntropy) or not problem.cuts:
        return False
    return problem.splits_by_class or not next(problem.row_batches())[1].is_floating_point()


def sum_by_example(problem: Problem, each: Iterable[Tensor]) -> Tensor:
    """Sums over the rows of each example of numbers (n,) for the rows of each batch; of a row if it is not cut."""
    pairs = zip(problem.fixed_batches(), each, strict=True)
    return torch.cat([row.view(-1, _rows_an_example(problem, batch, len(row)) or 1).sum(1) for batch, row in pairs])


def drawn_problem(problem: Problem, chosen: Tensor, weights: Tensor) -> Problem:
    """The problem on chosen examples (ascending indices in the order of its batches), each with a weight.

    An example may have many rows, as a sentence has tokens; they have its weight.

    Losses and derivatives are Σ m_i ω_i (·)_i over the chosen examples, divided by Σ ω_i over all: unbiased
    when each is drawn with probability 1/m_i.
    """
    loss = problem.loss_function
    if not can_draw(problem) or not isinstance(loss, CrossEntropy):
        raise OptionError("examples can be drawn from batches that can be cut, with cross-entropy of labels only.")
    drawn, start = [], 0
    for batch in problem.batches:
        here = (chosen >= start) & (chosen < start + length(batch))
        if bool(here.any()):
            index = (chosen[here] - start).to(problem.device)
            drawn.append((examples(batch, index), weights[here].to(problem.device, torch.float64)))
        start += length(batch)
    changes: dict[str, Any] = {}
    if problem.splits_by_class:  # weights stand beside the labels
        drawn = [(x, torch.stack([labels.double(), times], 1)) for (x, labels), times in drawn]
    else:
        function = Weighted(problem._module.function, loss)
        changes = {"_module": problem._module.recast(problem.model, function), "reads_pairs": False}
    move = Move(problem.device, problem.dtype)
    batches = Batches(drawn, batch_size=None, move=move, budget=share(problem.memory, "data"), pairs=False)
    batches.is_given = False
    batches.resize(problem.batch_size)
    found = problem.variant(loss_function=DrawnCrossEntropy(loss), batches=batches, **changes)
    found.total_weight = problem.total_weight
    found.batches = batches.shared(problem.batches.group, cuts=True)
    return found


def problem_of_rows(problem: Problem, chosen: Tensor, num_rows: int) -> Problem:
    """The problem on chosen ones of its so many rows (ascending indices), where each is all of an example."""
    if sum(map(length, problem.batches)) != num_rows:
        raise OptionError(
            "rows cannot be taken out by themselves: examples have several each, as sentences have tokens."
        )
    return drawn_problem(problem, chosen, torch.ones(len(chosen), dtype=torch.float64))


@dataclass(frozen=True)
class Weighted:
    """A forward function of batches with a weight m for each example: targets are (n, 2), labels beside weights."""

    function: Forward
    loss: CrossEntropy

    def __call__(self, model: nn.Module, batch: Any) -> Pair:
        """Logits (n, C) and targets (n, 2) of all rows of the examples."""
        inner, times = batch
        outputs, labels = self.loss.rows(*self.function(model, inner))
        times = times.double().repeat_interleave(len(labels) // len(times))
        return outputs, torch.stack([labels.double(), times], 1)


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

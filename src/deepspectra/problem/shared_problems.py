"""A problem among several processes: each goes through its share of the data, and all have the same results."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable

import torch
from torch import Tensor

from deepspectra.errors import DataError, FallbackWarning, MemoryBudgetError
from deepspectra.problem.batch_trees import tensors
from deepspectra.problem.parallel import Group, current
from deepspectra.problem.problem import Problem, check_problem


def sharded(problem: Problem) -> Problem:
    """The problem with its work shared among all processes of torch.distributed's default group.

    To be called by every one of them, with the same model and *all* the data: not with a `DistributedSampler`, which
    leaves each a part. Batches are then dealt in turn; where nobody chose their sizes they are first cut so that all
    shares are alike. From then on every process calls the same functions of this library in the same order, as in
    any program of torch.distributed, and gets the same results, equal bit by bit; files are to be written by one.
    Where there is no group, or it has one process, the problem itself.

    A process goes forth and back through its own batches, keeps their graphs, and brings sums or rows to the others:
    losses, gradients, products, class means, moments. Features, errors and gradients of single examples are brought
    to all, which then hold them all, as they do N × C probabilities and all vectors. What needs no pass over the
    data, such as eigenvalues of dense matrices, is done by every process.

    Args:
        problem: made alike in every process, but for the memory. A model within DistributedDataParallel is fine.

    Returns:
        The problem to be used in its place. Its `memory`, of each process, is the least of all, and batches are cut
        by it.

    Raises:
        DataError: the processes have different weights, data, parameters or losses.
        MemoryBudgetError: some hold the data in memory, and others have to read them anew at each pass.
        ProcessError: one of them ended, or does not answer.

    Cost: the data and weights are read once more. Of a product, two sums of P numbers over the network in addition.
    """
    check_problem(problem)
    group = current(problem.device)
    if group.size == 1 or problem.batches.group.size > 1:
        return problem
    found = _with_least_memory(problem, group)
    _check_alike(found, group)
    found.batches = found.batches.shared(group, cuts=found.cuts)
    if found.batches.num_batches < group.size and group.rank == 0:
        warnings.warn(
            f"{group.size} processes share {found.batches.num_batches} batches, so that some have nothing to do. "
            "Pass smaller batches, or start fewer processes.",
            FallbackWarning,
            stacklevel=2,
        )
    return found


def _with_least_memory(problem: Problem, group: Group) -> Problem:
    """The problem with the least memory of all, in batches as that cuts them."""
    batches = problem.batches
    mine = problem.memory, problem.batch_size, problem.most_examples, batches.held is not None
    memories, sizes, limits, holding = zip(*group.every(mine), strict=True)
    if len(set(holding)) > 1:
        raise MemoryBudgetError(
            f"the data is held by {sum(holding)} of the {group.size} processes, and does not fit a quarter of the "
            "memory of the others. Pass the same memory= in each."
        )
    size, most = min((size for size in sizes if size is not None), default=None), min(limits)
    found = problem.variant(memory=min(memories), batch_size=size, most_examples=most)
    if problem.cuts:
        found.batches = batches.recut(size, most)
    return found


def _check_alike(problem: Problem, group: Group) -> None:
    """Raise DataError unless all have the same."""
    model, batches = problem.model, problem.batches
    mine = {
        "number of examples": str(problem.num_examples),
        "parameters": str(problem.parameter_names),
        "dtypes": f"{problem.dtype}, {problem.mode}",
        "weights": _digest([*model.parameters(), *model.buffers()]),
        "losses": problem.loss_function.name,
        "batches": _digest(tensors(batches.held or []), " ".join(f"{a:.5e} {b:.5e}" for a, b in batches.marks)),
    }
    every = group.every(mine)
    for name in mine:
        if len({one[name] for one in every}) > 1:
            raise DataError(
                f"the problems of the {group.size} processes differ in their {name}. Each must be given the same "
                "model, from the same checkpoint, and all the data in the same order, without a DistributedSampler "
                "and without shuffling: sharded() has each take its own share."
            )


def _digest(every: Iterable[Tensor], text: str = "") -> str:
    """Of a text and the numbers of some tensors."""
    found = hashlib.sha256(text.encode())
    for tensor in every:
        dense = tensor.detach() if tensor.layout == torch.strided else tensor.detach().to_dense()
        found.update(dense.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()

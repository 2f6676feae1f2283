"""Whether batches may be cut into their examples, told by a few of these alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from deepspectra.errors import DataError, FallbackWarning, OptionError
from deepspectra.problem.batch_trees import length, map_tensors, other_lengths, tensors
from deepspectra.problem.batches import Batches, Pair
from deepspectra.problem.evaluated_model import Evaluated, Tree, Trial
from deepspectra.problem.input_checks import CALLER, check_outputs, check_same

FEW = 3  # examples that are evaluated alone to see whether the others of their batch matter
FEWEST = 2  # examples of a batch that tell whether others of it matter
AGREE = {torch.float64: 1e-5, torch.float32: 5e-3}  # relative; kernels differ with the size of a batch
AGREE_HALF = 0.1
Evaluate = Callable[[Any], Pair]  # of a batch, its outputs and targets


class Kind(Enum):
    """What a batch is to the network, told by a few of its examples alone."""

    FIRST = "the first dimension of its tensors is that of its examples, each treated by itself"
    SECOND = "the second is: positions of a sequence come first"
    INFLUENCED = "examples give other outputs alone than within it"
    WHOLE = "it cannot be cut: its rows are nodes of a graph, or their number is another"


def settle_cuts(module: Evaluated, batches: Batches, parameters: Tree, first: Trial, mode: str) -> tuple[Trial, bool]:
    """Make one batch of all examples where they may not be cut; the first batch, and whether batches may be cut."""

    def evaluate(batch: Any) -> Pair:
        return module.values(parameters, batch)

    dtype, tried, outputs = next(iter(parameters.values())).dtype, first.batch, first.pair[0]
    if mode == "eval" and length(tried) < FEWEST and batches.num_batches > 1:  # one example tells nothing
        tried = next((batch for batch in batches if length(batch) >= FEWEST), tried)
        outputs = outputs if tried is first.batch else evaluate(tried)[0]
    kind = _kind(evaluate, tried, outputs, dtype) if mode == "eval" else Kind.WHOLE
    if kind is Kind.INFLUENCED:
        check_outputs(outputs)
        check_same(outputs, evaluate(tried)[0])
        if not batches.brought or batches.num_batches > 1:
            raise DataError(_influence(module.model))
        warnings.warn(
            "the rows of the one batch influence each other; it is taken as a whole.",
            FallbackWarning,
            stacklevel=CALLER,
        )
    if kind is Kind.FIRST or (kind is Kind.SECOND and batches.brought):
        return first, kind is Kind.FIRST
    if batches.num_batches == 1:
        return first, False
    if batches.join():
        (batch,) = batches
        return Trial(batch, evaluate(batch)), False
    if kind is Kind.SECOND:
        raise DataError(
            "examples lie along the second dimension of the data, after positions, and batch_size= cuts the first. "
            "Leave it out, or pass batches of your own: data=[(x, y), ...]."
        )
    if mode == "train":
        raise OptionError(
            f"mode='train' is for one batch, and the data has {batches.num_batches}; pass data=[(x, y)]."
        )
    return first, False


def cut_anew(
    module: Evaluated,
    batches: Batches,
    parameters: Tree,
    first: Trial,
    sizes: tuple[int | None, int],
    *,
    by_label: bool,
) -> None:
    """Sort the examples and cut them into batches of another size; the first of these gives what they gave before.

    The sizes are that of batches that are ours to choose, and the most examples that any may have.

    Cost: a forward pass of the batch.
    """
    order = batches.sort_by_label() if by_label else None
    batches.resize(sizes[0])
    batches.limit(sizes[1])
    before, batch = length(first.batch), next(iter(batches))
    size = length(batch)
    here = torch.arange(size) if order is None else order[:size].cpu()
    common = here < before
    if (order is None and size == before) or not bool(common.any()):
        return
    again, _ = module.values(parameters, batch)
    outputs, again = first.pair[0].reshape(before, -1), again.reshape(size, -1)
    if again.shape[1] != outputs.shape[1]:
        return
    here, common = here.to(outputs.device), common.to(outputs.device)
    limit = AGREE.get(next(iter(parameters.values())).dtype, AGREE_HALF) * float(outputs.abs().max())
    if not float((outputs[here[common]] - again[common]).abs().max()) <= limit:
        raise DataError(_influence(module.model))


def _kind(evaluate: Evaluate, batch: Any, outputs: Tensor, dtype: torch.dtype) -> Kind:
    """Find out by evaluating a few examples of a batch alone, with the outputs of all of it at hand."""
    first = _agrees(evaluate, batch, outputs, dtype, 0)
    if first:
        return Kind.FIRST
    if _agrees(evaluate, batch, outputs, dtype, 1):
        return Kind.SECOND
    return Kind.WHOLE if first is None else Kind.INFLUENCED


def _influence(model: nn.Module) -> str:
    """What to say of a model whose examples influence each other, with the module to blame if it is known."""
    guilty = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None
    ]
    cause = (
        f"Module {guilty[0]!r} normalises by statistics of the batch; use track_running_stats=True, or a "
        "normalisation of single examples."
        if guilty
        else "Does forward average, sort or attend over the batch? Have it treat every example by itself."
    )
    return (
        "the examples of a batch influence each other in evaluation mode: a few of them alone give other "
        f"outputs than within their batch, so that every result would depend on batch_size. {cause} If one batch is "
        "meant as a whole (a graph, a set), pass it as such: data=[(x, y)]."
    )


def _agrees(evaluate: Evaluate, batch: Any, outputs: Tensor, dtype: torch.dtype, dim: int) -> bool | None:
    """Whether a few examples give by themselves what they give in their batch; None if it cannot be cut.

    `dim` is that of the examples: 1 where the positions of a sequence come first.
    """
    leaves = [leaf for leaf in tensors(batch) if leaf.ndim]
    lead = leaves[0].shape[: dim + 1] if leaves else torch.Size()
    if (
        len(lead) <= dim
        or lead[dim] < 2
        or any(leaf.layout != torch.strided or leaf.shape[: dim + 1] != lead for leaf in leaves)
        or lead[dim] in other_lengths(batch)  # rows that only the network could cut
        or not outputs.numel()
        or outputs.numel() % lead.numel()
    ):
        return None
    # not those that come first, and not all: what is cut off must matter as little
    count = min(FEW, lead[dim] - 1)
    step = lead[dim] // count
    chosen = torch.arange(lead[dim] - 1 - (count - 1) * step, lead[dim], step, device=outputs.device)
    try:
        cut = map_tensors(lambda leaf: leaf.index_select(dim, chosen) if leaf.ndim else leaf, batch)
        alone, _ = evaluate(cut)
    except Exception:  # a model of batches of one size, or of one graph
        return None
    within = outputs.reshape(*lead, -1).index_select(dim, chosen)
    if alone.numel() != within.numel():
        return None
    difference = (alone.reshape(within.shape) - within).abs().max()
    return bool(difference <= AGREE.get(dtype, AGREE_HALF) * outputs.abs().max())

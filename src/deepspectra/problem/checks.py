"""What a model and its data must be, before anything is computed from them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from deepspectra.errors import DataError, DeepSpectraError, OptionError, ParameterError, first_line
from deepspectra.problem.batches import map_tensors, other_lengths, tensors

FEW = 3  # examples that are evaluated alone to see whether the others of their batch matter
AGREE = {torch.float64: 1e-5, torch.float32: 5e-3}  # relative; kernels differ with the size of a batch
AGREE_HALF = 0.1
Evaluate = Callable[[Any], tuple[Tensor, Tensor]]  # of a batch, its outputs and targets


def check_model(model: nn.Module) -> None:
    """Refuse models that cannot be copied, cast or differentiated."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            what = f"its module {name!r}" if name else "the model"
            raise ParameterError(f"{what} is compiled by torch.jit; pass the module that it was made from.")
    values = [*model.named_parameters(), *model.named_buffers()]
    for name, value in values:
        if nn.parameter.is_lazy(value):
            raise ParameterError(
                f"parameter {name!r} has no shape yet; pass one batch through the lazy model before."
            )
        if value.is_meta:
            raise ParameterError(
                f"{name!r} is on the meta device and has no values; load the weights before."
            )
        if value.is_complex():
            raise ParameterError(
                f"{name!r} is complex; only real parameters and buffers are supported. Hold the real and imaginary "
                "parts as two real tensors."
            )


def usable(device: torch.device | str) -> torch.device:
    """A device that tensors can be put on."""
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise OptionError(f"device={device!r} cannot be used here: {first_line(error)}") from error
    return found


def check_finite(batch: Any) -> None:
    """Refuse numbers that are none."""
    for leaf in tensors(batch):
        numbers = leaf if leaf.layout == torch.strided else leaf.to_sparse().values()
        if leaf.is_floating_point() and not torch.isfinite(numbers).all():
            raise DataError(f"the data contains NaN or infinite values, in a tensor {tuple(leaf.shape)}.")


def told(tree: Any) -> str:
    """Shapes and types of the tensors of a tree."""
    return ", ".join(f"{tuple(leaf.shape)} {leaf.dtype}" for leaf in tensors(tree)) or type(tree).__name__


@contextlib.contextmanager
def reported(kind: type[DeepSpectraError], what: str) -> Iterator[None]:
    """Failures of the user's code as errors of this library, with the original as cause."""
    try:
        yield
    except (DeepSpectraError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise kind(f"{what}: {first_line(error)}") from error


# -- the examples of a batch ---------------------------------------------------------------------------------


class Rows(Enum):
    """What a batch is to the network, told by a few of its examples alone."""

    FIRST = "the first dimension of its tensors is that of its examples, each treated by itself"
    SECOND = "the second is: positions of a sequence come first"
    INFLUENCED = "examples give other outputs alone than within it"
    WHOLE = "it cannot be cut: its rows are nodes of a graph, or their number is another"


def examples_are_rows(evaluate: Evaluate, batch: Any, outputs: Tensor, dtype: torch.dtype) -> Rows:
    """Find out by evaluating a few examples alone.

    Args:
        evaluate: outputs and targets of a batch, without gradients.
        batch: a batch.
        outputs: its outputs.
        dtype: in which the model computes.

    Cost: a forward pass of a few examples.
    """
    first = _agrees(evaluate, batch, outputs, dtype, 0)
    if first:
        return Rows.FIRST
    if _agrees(evaluate, batch, outputs, dtype, 1):
        return Rows.SECOND
    return Rows.WHOLE if first is None else Rows.INFLUENCED


def influence(model: nn.Module) -> str:
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
    chosen = torch.tensor(_few(lead[dim]), device=outputs.device)
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


def _few(size: int) -> list[int]:
    """A few of so many examples, not all, and not those that come first: what is cut off must matter as little."""
    count = min(FEW, size - 1)
    return [size - 1 - j * (size // count) for j in reversed(range(count))]

"""What a model and its data must be, before anything is computed from them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from deepspectra.batches import map_tensors, tensors
from deepspectra.errors import DataError, DeepSpectraError, OptionError, ParameterError, first_line

FEW = 3  # examples that are evaluated alone to see whether the others of their batch matter
AGREE = {torch.float64: 1e-5, torch.float32: 5e-3}  # relative; kernels differ with the size of a batch
AGREE_HALF = 0.1
Evaluate = Callable[[Any], tuple[Tensor, Tensor]]  # of a batch, its outputs and targets


def check_model(model: nn.Module) -> None:
    """Refuse models that cannot be copied, cast or differentiated."""
    if isinstance(model, torch.jit.ScriptModule):
        raise ParameterError("the model is compiled by torch.jit; pass the module that it was made from.")
    values = [*model.named_parameters(), *model.named_buffers()]
    for name, value in values:
        if nn.parameter.is_lazy(value):
            raise ParameterError(
                f"parameter {name!r} has no shape yet; pass one batch through the lazy model before."
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
        if leaf.is_floating_point() and not torch.isfinite(leaf).all():
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


# -- examples that influence each other ---------------------------------------------------------------------


def check_independence(
    model: nn.Module, evaluate: Evaluate, batch: Any, outputs: Tensor, dtype: torch.dtype, *, reorder: bool
) -> None:
    """Examples do not depend on the others of their batch, where a batch can be cut into examples.

    Args:
        model: whose modules may be to blame.
        evaluate: outputs and targets of a batch, without gradients.
        batch: a batch with more than one example.
        outputs: its outputs.
        dtype: in which the model computes.
        reorder: where a batch cannot be cut, the order of its examples must not matter either.

    Raises:
        DataError: they do.
    """
    agreed = _agrees(evaluate, batch, outputs, dtype, _few)
    if agreed is None and reorder:
        agreed = _agrees(evaluate, batch, outputs, dtype, _backwards)
    if agreed is not False or _agrees(evaluate, batch, outputs, dtype, _few, 1):
        return
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
    raise DataError(
        "the examples of a batch influence each other in evaluation mode: a few of them alone give other "
        f"outputs than within their batch, so that every result would depend on batch_size. {cause}"
    )


def _agrees(
    evaluate: Evaluate,
    batch: Any,
    outputs: Tensor,
    dtype: torch.dtype,
    choose: Callable[[int], list[int]],
    dim: int = 0,
) -> bool | None:
    """Whether chosen examples give by themselves what they give in their batch; None if it cannot be cut.

    `dim` is that of the examples: 1 where the positions of a sequence come first.
    """
    leaves = [leaf for leaf in tensors(batch) if leaf.ndim]
    lead = leaves[0].shape[: dim + 1] if leaves else torch.Size()
    if len(lead) <= dim or lead[dim] < 2 or any(leaf.shape[: dim + 1] != lead for leaf in leaves):
        return None
    chosen = torch.tensor(choose(lead[dim]), device=outputs.device)
    if not outputs.numel() or outputs.numel() % lead.numel():
        return None
    cut = map_tensors(lambda leaf: leaf.index_select(dim, chosen) if leaf.ndim else leaf, batch)
    try:
        alone, _ = evaluate(cut)
    except Exception:  # a model of batches of one size, or of one graph
        return None
    within = outputs.reshape(*lead, -1).index_select(dim, chosen)
    if alone.numel() != within.numel():
        return None
    difference = (alone.reshape(within.shape) - within).abs().max()
    return bool(difference <= AGREE.get(dtype, AGREE_HALF) * outputs.abs().max())


def _few(size: int) -> list[int]:
    """A few of so many examples, not all."""
    count = min(FEW, size - 1)
    return [j * (size // count) for j in range(count)]


def _backwards(size: int) -> list[int]:
    return list(range(size - 1, -1, -1))

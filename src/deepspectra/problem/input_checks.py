"""What model, data and loss must be: refused beforehand, or found out by a gradient of one batch."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from deepspectra.errors import (
    CurvatureError,
    DataError,
    DeepSpectraError,
    FallbackWarning,
    LossError,
    NondeterminismError,
    NonFiniteError,
    OptionError,
    ParameterError,
    first_line,
)
from deepspectra.problem.batch_trees import tensors
from deepspectra.problem.double_precision import HALF
from deepspectra.problem.evaluated_model import Evaluated, Trial, gradient, nodes, reached, refuse_modes
from deepspectra.problem.losses import Loss
from deepspectra.problem.memory_budget import Saved, saved_by
from deepspectra.problem.model_copy import named_tensors, twins
from deepspectra.problem.parallel import is_spread

CHECKPOINTS = "activation checkpointing must be off where it is not by torch.utils.checkpoint.checkpoint"
CALLER = 3  # frames up from a warning given here to the code that made the problem


def check_given(model: object, forward: object, dtype: object, mode: str) -> None:
    """Refuse arguments of a problem that cannot be used, and a call within a mode that would change all results."""
    if not isinstance(model, nn.Module):
        raise ParameterError(f"model must be an nn.Module, got {type(model).__name__}.")
    if forward is not None and not callable(forward):
        raise OptionError(f"forward must be a function (model, batch) → (outputs, targets), got {forward!r}.")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise OptionError(f"dtype must be a floating-point type such as torch.float64, got {dtype!r}.")
    if mode not in ("eval", "train"):
        raise OptionError(f"mode={mode!r}; it is 'eval' or 'train'.")
    refuse_modes()
    _check_model(model)


def _check_model(model: nn.Module) -> None:
    """Refuse models that cannot be copied, cast or differentiated."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            what = f"its module {name!r}" if name else "the model"
            raise ParameterError(f"{what} is compiled by torch.jit; pass the module that it was made from.")
    if not any(p.is_floating_point() or p.is_complex() for p in model.parameters()):
        raise ParameterError("the model has no parameters.")
    for name, value in named_tensors(model).items():
        if nn.parameter.is_lazy(value):
            raise ParameterError(
                f"parameter {name!r} has no shape yet; pass one batch through the lazy model before."
            )
        if is_spread(value):
            raise ParameterError(
                f"{name!r} is a DTensor, spread over processes (fully_shard, tensor parallelism). Gather the weights "
                "by torch.distributed.checkpoint.state_dict.get_model_state_dict(model, "
                "options=StateDictOptions(full_state_dict=True)), load them into a plain copy of the model in every "
                "process, and share the data instead: sharded(Problem(plain, data))."
            )
        if value.is_meta:
            raise ParameterError(f"{name!r} is on the meta device and has no values; load the weights before.")
        if value.is_complex():
            raise ParameterError(
                f"{name!r} is complex; only real parameters and buffers are supported. Hold the real and imaginary "
                "parts as two real tensors."
            )


def usable_device(device: torch.device | str) -> torch.device:
    """A device that tensors can be put on."""
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, TypeError, ImportError) as error:
        raise OptionError(f"device={device!r} cannot be used here: {first_line(error)}") from error
    return found


def check_finite(batch: Any) -> None:
    """Refuse numbers that are none."""
    for leaf in tensors(batch):
        numbers = leaf if leaf.layout == torch.strided else leaf.to_sparse().values()
        if leaf.is_floating_point() and not torch.isfinite(numbers).all():
            raise DataError(f"the data contains NaN or infinite values, in a tensor {tuple(leaf.shape)}.")


def shapes_of(tree: Any) -> str:
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


def check_gradient(
    module: Evaluated, loss: Loss, trainable: Collection[str], first: Trial, given: nn.Module
) -> Saved:
    """Check that a batch's gradient in all trainable parameters can be had, and misses no way; what it keeps.

    The graph of the outputs ends at all tensors that they depend on. Parameters of the copy or of the user's model
    (as it was `given`) among these are reached by a way that cannot be followed.

    Cost: a gradient of the batch.
    """
    model = module.model
    own = {name: p for name, p in model.named_parameters() if name in trainable}
    theirs = twins(model, given)
    names = {id(p): name for name, p in own.items()}
    names |= {id(theirs[name]): name for name in own if name in theirs}
    every = {name: p.detach() for name, p in own.items()}

    def strangers(value: Tensor) -> list[str]:
        return sorted({names[id(leaf)] for leaf in reached(value) if id(leaf) in names})

    def graph() -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
        for p in own.values():
            p.requires_grad_()  # so that the graph shows where these are reached
        try:
            leaves, outputs, value = module.graph(loss, every, first.batch)
        finally:
            for p in own.values():
                p.requires_grad_(False)
        return outputs, value, gradient(value, leaves)

    with reported(CurvatureError, f"the loss cannot be backpropagated ({CHECKPOINTS})"):
        (outputs, value, parts), saved = saved_by(model, graph)
    check_same(loss.rows(*first.pair)[0], outputs.detach())
    if any("CheckpointFunction" in node.name() for node in nodes(outputs)):
        raise CurvatureError(
            f"the forward pass is checkpointed, and what is run again has no parameters: {CHECKPOINTS}."
        )
    if missed := strangers(outputs):
        raise ParameterError(
            f"the network reaches {', '.join(missed[:5])} by another way than as parameters of its modules, such as "
            "a custom autograd function or a tensor kept from an earlier pass, which cannot be followed. Have "
            "forward read them from their modules."
        )
    if missed := strangers(value):
        raise LossError(
            f"the loss reads the parameters {', '.join(missed[:5])} itself, beside the outputs (a penalty such as "
            "weight decay?). Leave that term out of loss= and add its curvature to the operator: H.shifted(2 * c) "
            "for c·‖θ‖²."
        )
    if all(part is None for part in parts):
        raise ParameterError(
            "no parameter of the model has any effect on the loss. Does forward= call the model it is given, and not "
            "another one, and outside of no_grad and inference_mode?"
        )
    dtype = next(iter(every.values())).dtype
    half = saved.dtypes & HALF
    if half and dtype not in half:
        warnings.warn(
            f"the network computes in {', '.join(sorted(map(str, half)))} inside (autocast in its forward?), though "
            f"the problem is in {dtype}: its derivatives are as coarse as that, as results tell.",
            FallbackWarning,
            stacklevel=CALLER,
        )
    return saved


def check_outputs(outputs: Tensor) -> None:
    """Raise NonFiniteError for outputs that are no numbers."""
    if not torch.isfinite(outputs).all():
        raise NonFiniteError("the model's outputs contain NaN or infinite values; check weights, inputs and dtype.")


def check_same(first: Tensor, again: Tensor) -> None:
    """Raise NondeterminismError unless two passes gave the same."""
    if first.shape != again.shape or not torch.allclose(
        first, again, rtol=1e-5, atol=1e-6 * float(first.abs().max())
    ):
        raise NondeterminismError(
            "the model gives different outputs for one batch in evaluation mode (functional dropout with "
            "training=True, or random noise in forward?). Make forward deterministic."
        )

"""Which loss is meant by a name, an nn loss module or a callable."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Hashable
from typing import Any

import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from deepspectra.errors import LossError
from deepspectra.problem.cross_entropy import CrossEntropy, NegativeLogLikelihood
from deepspectra.problem.losses import ElementwiseLoss, Loss, MeanLoss, SquaredError

# Functions, the modules that they are the functions of, and what we have for these; of subclasses nothing is known.
KNOWN: list[tuple[Any, type[nn.Module], Callable[[Any], Loss]]] = [
    (
        F.cross_entropy,
        nn.CrossEntropyLoss,
        lambda m: CrossEntropy(m.weight, m.ignore_index, m.label_smoothing),
    ),
    (F.nll_loss, nn.NLLLoss, lambda m: NegativeLogLikelihood(m.weight, m.ignore_index)),
    (F.mse_loss, nn.MSELoss, lambda _: SquaredError()),
    (F.l1_loss, nn.L1Loss, ElementwiseLoss),
    (F.smooth_l1_loss, nn.SmoothL1Loss, ElementwiseLoss),
    (F.huber_loss, nn.HuberLoss, ElementwiseLoss),
    (F.binary_cross_entropy, nn.BCELoss, ElementwiseLoss),
    (F.binary_cross_entropy_with_logits, nn.BCEWithLogitsLoss, ElementwiseLoss),
    (F.poisson_nll_loss, nn.PoissonNLLLoss, ElementwiseLoss),
    (F.soft_margin_loss, nn.SoftMarginLoss, ElementwiseLoss),
]
MODULES = {function: module for function, module, _ in KNOWN}
LOSSES = {module: loss for _, module, loss in KNOWN}
Given = str | nn.Module | Callable[[Any, Tensor], Tensor] | Loss  # what a user may give for a loss
NAMED: dict[str, type[Loss]] = {"cross_entropy": CrossEntropy, "mse": SquaredError}


def resolve(loss: Given) -> Loss:
    """The `Loss` for what a user may give: a name, an nn loss module, or a callable.

    Functions of `torch.nn.functional`, and `functools.partial` of them, are read as the modules of these arguments.
    """
    if isinstance(loss, Loss):
        return loss
    if isinstance(loss, str):
        if loss not in NAMED:
            raise LossError(
                f"unknown loss {loss!r}; known names: {', '.join(NAMED)}; or pass a loss of torch.nn, such as "
                "nn.BCEWithLogitsLoss(), or a function of outputs and targets."
            )
        return NAMED[loss]()
    if not callable(loss):
        raise LossError(f"a loss is a name, an nn loss module or a callable, not {type(loss).__name__}.")
    given = _module_of(loss)
    reduction = getattr(given, "reduction", "mean")
    if reduction not in ("mean", "batchmean"):
        raise LossError(
            f"{type(given).__name__} has reduction={reduction!r}; the loss must be a mean over the examples: "
            "use reduction='mean'."
        )
    return LOSSES.get(type(given), MeanLoss)(given)


def _module_of(loss: Any) -> Any:
    """The nn module that a function of torch.nn.functional, or a partial of one, is; anything else as it is."""
    function: Any = loss
    options: dict[str, Any] = {}
    while isinstance(function, functools.partial) and not function.args:
        function, options = function.func, {**function.keywords, **options}
    module = MODULES.get(function) if isinstance(function, Hashable) else None
    if module is not None and set(options) <= set(inspect.signature(module).parameters):
        return module(**options)
    return loss

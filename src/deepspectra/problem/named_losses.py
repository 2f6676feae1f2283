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

# Functions, and the modules that they are the functions of.
ELEMENTWISE: dict[Any, type[nn.Module]] = {
    F.l1_loss: nn.L1Loss,
    F.smooth_l1_loss: nn.SmoothL1Loss,
    F.huber_loss: nn.HuberLoss,
    F.binary_cross_entropy: nn.BCELoss,
    F.binary_cross_entropy_with_logits: nn.BCEWithLogitsLoss,
    F.poisson_nll_loss: nn.PoissonNLLLoss,
    F.soft_margin_loss: nn.SoftMarginLoss,
}
FUNCTIONS = {
    F.cross_entropy: nn.CrossEntropyLoss,
    F.nll_loss: nn.NLLLoss,
    F.mse_loss: nn.MSELoss,
    **ELEMENTWISE,
}
NAMED: dict[str, type[Loss]] = {"cross_entropy": CrossEntropy, "mse": SquaredError}


def resolve(loss: str | nn.Module | Callable[[Any, Tensor], Tensor] | Loss) -> Loss:
    """The `Loss` for what a user may give: a name, an nn loss module, or a callable.

    Functions of `torch.nn.functional`, and `functools.partial` of them, are read as the modules of these arguments.
    """
    if isinstance(loss, Loss):
        return loss
    if isinstance(loss, str):
        if loss not in NAMED:
            raise LossError(f"unknown loss {loss!r}; known names: {', '.join(NAMED)}; or pass a callable.")
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
    plain = type(given)  # not isinstance: a subclass may compute something else
    if isinstance(given, nn.CrossEntropyLoss) and plain is nn.CrossEntropyLoss:
        found: Loss = CrossEntropy(given.weight, given.ignore_index, given.label_smoothing)
    elif isinstance(given, nn.NLLLoss) and plain is nn.NLLLoss:
        found = NegativeLogLikelihood(given.weight, given.ignore_index)
    elif plain is nn.MSELoss:
        found = SquaredError()
    elif isinstance(given, nn.Module) and plain in ELEMENTWISE.values():
        found = ElementwiseLoss(given)
    else:
        found = MeanLoss(given)
    return found


def _module_of(loss: Any) -> Any:
    """The nn module that a function of torch.nn.functional, or a partial of one, is; anything else as it is."""
    function: Any = loss
    options: dict[str, Any] = {}
    while isinstance(function, functools.partial) and not function.args:
        function, options = function.func, {**function.keywords, **options}
    module = FUNCTIONS.get(function) if isinstance(function, Hashable) else None
    if module is not None and set(options) <= set(inspect.signature(module).parameters):
        return module(**options)
    return loss

"""The model as it is evaluated: a copy that does not train, and operations that can be differentiated twice."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from deepspectra.errors import DataError, FallbackWarning, ParameterError

Forward = Callable[[nn.Module, Any], tuple[Tensor, Tensor]]


class Evaluated(nn.Module):
    """A model with its forward function, so that parameters are replaced however the function reaches them."""

    def __init__(self, model: nn.Module, function: Forward) -> None:
        super().__init__()
        self.model = model
        self.function = function

    def forward(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Outputs and targets."""
        pair = self.function(self.model, batch)
        if not isinstance(pair, tuple) or len(pair) != 2 or not all(isinstance(t, Tensor) for t in pair):
            kind = f"tuple of {len(pair)}" if isinstance(pair, tuple) else type(pair).__name__
            raise DataError(
                f"forward returned a {kind}; it must return a pair of tensors (outputs, targets)."
            )
        return pair


def forward_pair(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """The model's outputs for the first of a pair (x, y), and the second."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2 or not isinstance(batch[1], Tensor):
        kind = (
            f"{type(batch).__name__} of {len(batch)}" if hasattr(batch, "__len__") else type(batch).__name__
        )
        raise DataError(
            f"a batch is a {kind}; expected a pair (x, y). For other batches pass "
            "forward=lambda model, batch: (outputs, targets)."
        )
    outputs = model(batch[0])
    if not isinstance(outputs, Tensor):
        raise DataError(
            f"the model returns {type(outputs).__name__}, not a tensor; pass "
            "forward=lambda model, batch: (outputs, targets) to pick the outputs."
        )
    return outputs, batch[1]


def evaluation_copy(model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A copy of the model in evaluation mode; says so when the model was in training mode and it matters."""
    random = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm)
    if any(module.training and isinstance(module, random) for module in model.modules()):
        warnings.warn(
            "the model is in training mode with dropout or batch norm; the spectrum is that of evaluation "
            "mode (dropout off, running statistics). Call model.eval() to say so yourself.",
            FallbackWarning,
            stacklevel=4,
        )
    try:
        twin = copy.deepcopy(model)
    except RuntimeError as error:
        raise ParameterError(f"the model cannot be copied: {error}") from error
    twin = twin.eval().requires_grad_(False).to(device=device, dtype=dtype)
    for p in twin.parameters():
        p.grad = None
    return twin


@contextlib.contextmanager
def differentiable() -> Iterator[None]:
    """Evaluate by operations that have second derivatives: plain attention instead of the fused kernels."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)

"""A model's derivatives as plain PyTorch gives them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def truth(model: nn.Module, loss: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """Gradient (P,) and Hessian (P, P) by plain double backward in the model's own parameters."""
    parameters = [p for p in model.parameters() if p.requires_grad]

    def flat(value: Tensor, **options: Any) -> Tensor:
        parts = torch.autograd.grad(value, parameters, materialize_grads=True, **options)
        return torch.cat([part.flatten() for part in parts])

    gradient = flat(loss(), create_graph=True)
    return gradient.detach(), torch.stack([flat(entry, retain_graph=True) for entry in gradient])


class OnceDifferentiable(torch.autograd.Function):
    """tanh, whose backward refuses to be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = torch.tanh(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return g * (1 - y**2)

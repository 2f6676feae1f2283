"""Convolutions whose second derivatives are made of the fast primitives alone.

PyTorch differentiates a convolution's backward pass through convolutions of unusual shapes (batch and channels
exchanged), which cost more than what they stand for. Written as a node of its own, the backward pass of a
convolution is differentiated by two convolutions, one gradient to an input and one to a weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.overrides import TorchFunctionMode

CONVOLUTIONS = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}
Settings = tuple[list[int], list[int], list[int], bool, list[int], int]


class Convolutions(TorchFunctionMode):
    """Within this mode `torch.conv1d`, `conv2d` and `conv3d` are differentiated twice as said above.

    A call in another form (an input without batch dimension) is left as it is.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        num_dims = CONVOLUTIONS.get(func)
        if num_dims is not None:
            call = read_call(num_dims, *args, **(kwargs or {}))
            if call is not None:
                return _Convolution.apply(*call)  # type: ignore[no-untyped-call]
        return func(*args, **(kwargs or {}))


def read_call(
    num_dims: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> tuple[Tensor, Tensor, Tensor | None, Settings] | None:
    """What `torch.convolution` needs for the call, or None if this module does not treat its form."""
    if input.ndim != num_dims + 2 or not input.is_floating_point():
        return None
    stride, dilation = (_each(value, num_dims) for value in (stride, dilation))
    if padding == "same" and set(stride) == {1}:
        spans = [size * (kernel - 1) for size, kernel in zip(dilation, weight.shape[2:], strict=True)]
        padding = [span // 2 for span in spans]
        if any(span % 2 for span in spans):  # one more at the end, as PyTorch does
            input = functional.pad(input, [end for span in reversed(spans) for end in (0, span % 2)])
    elif isinstance(padding, str) and padding != "valid":
        return None  # PyTorch says what is wrong
    padding = _each(0 if padding == "valid" else padding, num_dims)
    return input, weight, bias, (stride, padding, dilation, False, [0] * num_dims, groups)


def _each(value: Any, num_dims: int) -> list[int]:
    """One number a dimension."""
    values = [value] if isinstance(value, int) else list(value)
    return values * num_dims if len(values) == 1 else values


class _Convolution(torch.autograd.Function):
    """y = x * w + b."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, settings: Settings) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.settings = settings
        return torch.convolution(x, w, b, *settings)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        wanted = tuple(ctx.needs_input_grad[:2])
        to_x = to_w = None
        if any(wanted):
            to_x, to_w = _Backward.apply(g, *ctx.saved_tensors, ctx.settings, wanted)  # type: ignore[no-untyped-call]
        to_b = g.sum([0, *range(2, g.ndim)]) if ctx.needs_input_grad[2] else None
        return to_x, to_w, to_b, None


class _Backward(torch.autograd.Function):
    """(g, x, w) ↦ gradients to x and to w; linear in g."""

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, w: Tensor, settings: Settings, wanted: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        ctx.save_for_backward(g, x, w)
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        return gradients(g, x, w, settings, wanted)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, along_x: Tensor | None, along_w: Tensor | None) -> tuple[Tensor | None, ...]:
        g, x, w = ctx.saved_tensors
        needs_g, needs_x, needs_w = ctx.needs_input_grad[:3]
        to_g = to_x = to_w = None
        if along_x is not None:
            to_g = torch.convolution(along_x, w, None, *ctx.settings) if needs_g else None
            to_w = gradients(g, along_x, w, ctx.settings, (False, True))[1] if needs_w else None
        if along_w is not None:
            if needs_g:
                other = torch.convolution(x, along_w, None, *ctx.settings)
                to_g = other if to_g is None else to_g + other
            to_x = gradients(g, x, along_w, ctx.settings, (True, False))[0] if needs_x else None
        return to_g, to_x, to_w, None, None


def gradients(
    g: Tensor, x: Tensor, w: Tensor, settings: Settings, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """What an error g of the output sends to the input x and to the kernel w, as far as wanted."""
    to_x, to_w, _ = torch.ops.aten.convolution_backward(g, x, w, None, *settings, [*wanted, False])
    return to_x if wanted[0] else None, to_w if wanted[1] else None

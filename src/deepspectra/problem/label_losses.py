"""The softmax cross-entropy of labels with first and second derivatives in closed form.

Autograd would keep a dozen arrays of rows × classes to differentiate log(1 + Σ_{k≠y} exp(z_k − z_y)) twice, most of
a graph where the classes are a vocabulary. Here it keeps two, the outputs and the slope, and passes over them a few
times. 1 − p_y, of which the derivatives of a fitted network are made, is never a difference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

NUMBERS_AT_ONCE = 2**20  # of arrays that are passed over, a few rows at a time


def label_losses(outputs: Tensor, labels: Tensor) -> Tensor:
    """−log softmax(z)_y (n,) of outputs (n, C) and labels (n,), differentiable twice, by either mode.

    Cost: three passes over (n, C); as many more for each derivative.
    """
    losses: Tensor = _Losses.apply(outputs, labels[:, None])  # type: ignore[no-untyped-call]
    return losses


def _by_rows(function: Callable[..., tuple[Tensor, ...]], *arrays: Tensor) -> tuple[Tensor, ...]:
    """What a function makes of arrays (n, ...), a few rows at a time, so that steps between stay in a cache."""
    width = max(1, NUMBERS_AT_ONCE // arrays[0].shape[1])
    if len(arrays[0]) <= width:
        return function(*arrays)
    pieces = (function(*some) for some in zip(*(torch.split(array, width) for array in arrays), strict=True))
    return tuple(map(torch.cat, zip(*pieces, strict=True)))


# Nothing is written in place: what is traced and called again would be written twice.


def _ratios(outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """exp(z_k − z_y − m) for k ≠ y and 0 for y (n, C), their sums, and m = max(0, max_k z_k − z_y), (n, 1) each."""
    ahead = outputs - outputs.gather(1, labels)
    most = ahead.amax(1, keepdim=True)  # of y it is 0
    ratios = (ahead - most).exp().scatter(1, labels, 0.0)
    wide = torch.promote_types(outputs.dtype, torch.float32)
    return ratios, ratios.sum(1, keepdim=True, dtype=wide), most.to(wide)


def _loss(outputs: Tensor, labels: Tensor) -> tuple[Tensor]:
    _, total, most = _ratios(outputs, labels)
    return ((most + (total + (-most).expm1()).log1p())[:, 0].to(outputs.dtype),)


def _slope(outputs: Tensor, labels: Tensor, scale: Tensor) -> tuple[Tensor]:
    ratios, total, most = _ratios(outputs, labels)
    factor = scale[:, None] / (total + (-most).exp())
    return ((ratios * factor.to(ratios)).scatter(1, labels, (-factor * total).to(ratios)),)


def _bent(slope: Tensor, labels: Tensor, scale: Tensor, tangents: Tensor) -> tuple[Tensor, Tensor]:
    """Of a slope a (p − e_y) (n, C): a (diag p − p pᵀ) t, and (p − e_y)ᵀ t (n,), which is 0 where a (n,) is.

    With t counted from t_y, so that p_y is multiplied by nothing.
    """
    ahead = tangents - tangents.gather(1, labels)
    mean = (slope[:, None] @ ahead[..., None])[:, 0] / scale.where(scale != 0, 1)[:, None]
    own = -(scale[:, None] + slope.gather(1, labels)) * mean
    return ((ahead - mean) * slope).scatter(1, labels, own), mean[:, 0]


class _Losses(Function):
    """Outputs (n, C) and labels (n, 1) → losses (n,)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(outputs: Tensor, labels: Tensor) -> Tensor:
        return _by_rows(_loss, outputs, labels)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None]:
        outputs, labels = ctx.saved_tensors
        return _Slope.apply(outputs, labels, scale), None  # type: ignore[no-untyped-call]

    @staticmethod
    def jvp(ctx: Any, tangents: Tensor, _: None) -> Tensor:
        outputs, labels = ctx.saved_tensors
        slope: Tensor = _Slope.apply(outputs, labels, torch.ones_like(outputs[:, 0]))  # type: ignore[no-untyped-call]
        return (slope * tangents).sum(1)


class _Slope(Function):
    """Outputs, labels and a factor a (n,) of each row → a (p − e_y), the losses' derivative (n, C)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(outputs: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
        return _by_rows(_slope, outputs, labels, scale)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        _, labels, scale = inputs
        ctx.save_for_backward(output, labels, scale)
        ctx.save_for_forward(output, labels, scale)

    @staticmethod
    def backward(ctx: Any, tangents: Tensor) -> tuple[Tensor, None, Tensor]:
        bent, mean = _by_rows(_bent, *ctx.saved_tensors, tangents)
        return bent, None, mean

    @staticmethod
    def jvp(ctx: Any, tangents: Tensor, _: None, scaled: Tensor | None) -> Tensor:
        slope, labels, scale = ctx.saved_tensors
        bent, *_rest = _by_rows(_bent, slope, labels, scale, tangents)
        return bent if scaled is None else bent + slope * (scaled / scale.where(scale != 0, 1))[:, None]

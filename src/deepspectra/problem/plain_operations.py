"""What stands for operations of PyTorch whose second derivatives are wrong or missing, or that run in no float64."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import checkpoint


def weight_norm(direction: Tensor, length: Tensor, dim: int = 0) -> Tensor:
    """G v / ‖v‖ by its formula: the fused kernel's second derivatives are wrong (torch 2.13)."""
    return direction * (length / torch.norm_except_dim(direction, 2, dim))


def grouped_mm(
    rows: Tensor, weights: Tensor, offs: Tensor | None = None, bias: Tensor | None = None, **options: Any
) -> Tensor:
    """Rows (n, k), of which those before offs[i] and after the last are multiplied by weights[i] (k, m): (n, m).

    In float64, which the kernel does not take; it is asked for all else.
    """
    if rows.dtype != torch.float64 or rows.ndim != 2 or weights.ndim != 3 or offs is None:
        return _GROUPED_MM(rows, weights, offs=offs, bias=bias, **options)
    ends = [0, *offs.tolist(), len(rows)]
    parts = [rows[start:end] @ weight for start, end, weight in zip(ends, ends[1:], weights, strict=False)]
    product = torch.cat([*parts, rows.new_zeros(len(rows) - ends[-2], weights.shape[2])])
    return product if bias is None else product + bias


def std(*args: Any, **options: Any) -> Tensor:
    """The root of the variance, constant where that is 0 (dead units): of `torch.std` second derivatives are NaN."""
    return _STD(*args, **options) if "out" in options else _root(torch.var(*args, **options))


def std_mean(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """The same beside the mean."""
    variance, mean = torch.var_mean(*args, **options)
    return _root(variance), mean


def _root(variance: Tensor) -> Tensor:
    """√x, constant at 0."""
    return variance.where(variance != 0, 1).sqrt().where(variance != 0, 0)


def _nothing_kept(*_: Any, **__: Any) -> Iterator[None]:
    """Stands around a checkpointed function, and does nothing."""
    yield


class _Called:
    """What a checkpointed function is called by."""

    @staticmethod
    def apply(function: Callable[..., Any], _preserve: bool, *args: Any) -> Any:
        return function(*args)


_STD = torch.std
_GROUPED_MM: Callable[..., Tensor] = vars(torch).get("_grouped_mm")  # type: ignore[assignment]

# Where an operation is reached, by which name, and what stands for it. Of torch.utils.checkpoint.checkpoint these are
# the names by which it calls its two kinds, and what runs the function alone.
PLAIN: tuple[tuple[Any, str, Any], ...] = (
    (checkpoint, "_checkpoint_without_reentrant_generator", _nothing_kept),
    (checkpoint, "CheckpointFunction", _Called),
    (torch, "_weight_norm", weight_norm),
    (sys.modules["torch.nn.utils.weight_norm"], "_weight_norm", weight_norm),
    (torch, "_grouped_mm", grouped_mm),
    (torch, "std", std),
    (torch, "std_mean", std_mean),
    (Tensor, "std", std),
)

"""How precisely a network computes: coarser than it could, or in float32 inside, whatever type it is in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

HALF = frozenset({torch.bfloat16, torch.float16})


def names_single(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operation is asked for float32 by name."""
    return func is Tensor.float or any(value is torch.float32 for value in (*args, *kwargs.values()))


class DoubleThroughout(TorchFunctionMode):
    """Within this mode float64 stands wherever a network asks for float32.

    Norms, attention and losses of language models cast up to float32, for the sake of models in half precision. In a
    float64 model that casts down, and seven digits are left of derivatives that should have fifteen.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not names_single(func, args, kwargs):
            return func(*args, **kwargs)
        func = Tensor.double if func is Tensor.float else func
        return func(*map(_double, args), **{name: _double(value) for name, value in kwargs.items()})


def _double(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value

"""Arguments that many functions take, and checks of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from deepspectra.errors import DataError, OptionError, ShapeError

Progress = Callable[[int, int | None], object]  # of products so far, and of those expected
LayerProgress = Callable[[int, int | None, str], object]  # of layers done, of all, and the next one's name
Item = TypeVar("Item", bound=tuple[Any, ...])


def announced(layers: Iterable[Item], progress: LayerProgress | None, total: int, before: int = 0) -> Iterator[Item]:
    """The same layers, each named before it is looked at; so many were done before."""
    for done, layer in enumerate(layers, before):
        if progress is not None:
            progress(done, total, layer[0])
        yield layer


def check_count(name: str, value: object, smallest: int = 1, largest: int | None = None) -> None:
    """Raise OptionError unless `value` is an integer of [smallest, largest]."""
    if not isinstance(value, int) or isinstance(value, bool) or not smallest <= value <= (largest or value):
        limit = f"at least {smallest}" + ("" if largest is None else f" and at most {largest:,}")
        raise OptionError(f"{name} must be an integer, {limit}; got {value!r}.")


def check_number(name: str, value: object, above: float, below: float = math.inf) -> None:
    """Raise OptionError unless `value` is a number with above < value < below; never NaN, infinite or a bool."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not above < value < below:
        limit = f"above {above:g}" + ("" if below == math.inf else f" and below {below:g}")
        raise OptionError(f"{name} must be a finite number {limit}; got {value!r}.")


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Raise OptionError unless `value` is one of the choices."""
    if value not in choices:
        raise OptionError(f"{name}={value!r}; it is one of {', '.join(map(repr, choices))}.")


def check_columns(name: str, value: object, size: int | None = None) -> Tensor:
    """Columns (P, k), or one (P,), as (P, k): raises ShapeError, or DataError if complex, sparse or not finite."""
    rows = "P" if size is None else f"{size}"
    is_shaped = isinstance(value, Tensor) and value.ndim in (1, 2) and value.numel() > 0
    if not isinstance(value, Tensor) or not is_shaped or value.shape[0] != (size or value.shape[0]):
        given = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ShapeError(f"{name} must be a tensor ({rows},) or ({rows}, k) with k ≥ 1; got {given}.")
    if value.is_complex() or value.layout != torch.strided:
        raise DataError(f"{name} must be real and dense; got {value.dtype}, {value.layout}.")
    if not bool(torch.isfinite(value).all()):
        raise DataError(f"{name} has NaN or infinite entries.")
    return value.detach().reshape(len(value), -1)


def check_margin(margin: float) -> None:
    """Raise OptionError unless the margin is a number from 1 on."""
    if not 1 <= margin < float("inf"):
        raise OptionError(f"margin={margin}: it is at least 1.")


def check_rtol(rtol: float) -> None:
    """Raise OptionError unless 0 < rtol < 1."""
    if not 0 < rtol < 1:
        raise OptionError(f"rtol must lie between 0 and 1; got {rtol!r}.")


def check_seed(seed: int) -> None:
    """Raise OptionError unless `seed` is an integer of 64 bits."""
    check_count("seed", seed, -(2**63), 2**63 - 1)


def seeded(seed: int) -> torch.Generator:
    """A generator on the CPU, so that every device gets the same numbers.

    Raises:
        OptionError: not an integer of 64 bits.
    """
    check_seed(seed)
    return torch.Generator().manual_seed(seed)

"""The parameters of a problem: which of a model are meant, of what type, and as one vector."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from deepspectra.errors import FallbackWarning, NonFiniteError, ParameterError, ShapeError


def select_parameters(
    model: nn.Module, trainable: Collection[str], parameters: str | Sequence[str] | None
) -> dict[str, Tensor]:
    """The trainable parameters by name, or those that globs choose; a tied one answers to each of its names."""
    patterns = [parameters] if isinstance(parameters, str) else parameters
    if patterns is not None and not (
        isinstance(patterns, Sequence) and all(isinstance(pattern, str) for pattern in patterns)
    ):
        raise ParameterError(
            f"parameters must be a glob over names, such as '*.weight', or a list of globs, got {parameters!r}."
        )
    found = {name: p for name, p in model.named_parameters() if name in trainable}
    if patterns is not None:
        names: dict[int, set[str]] = {}
        for name, p in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(p), set()).add(name)
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for group in names.values() for name in group):
                known = ", ".join(list(found)[:8]) + (", …" if len(found) > 8 else "")
                raise ParameterError(f"parameters={pattern!r} matches no parameter; there are: {known}.")
        found = {
            name: p
            for name, p in found.items()
            if any(fnmatchcase(alias, pattern) for alias in names[id(p)] for pattern in patterns)
        }
    if not found:
        raise ParameterError(
            f"no trainable parameter is selected (parameters={parameters!r}); frozen parameters "
            "(requires_grad=False) are held fixed. Unfreeze some, or select others."
        )
    for name, value in found.items():
        if not torch.isfinite(value).all():
            raise NonFiniteError(f"parameter {name!r} holds NaN or infinite values.")
    return {name: p.detach() for name, p in found.items()}


def common_dtype(model: nn.Module) -> torch.dtype:
    """The type of the model's parameters; the widest, with a word, of several."""
    found = {p.dtype for p in model.parameters() if p.is_floating_point()}
    widest = functools.reduce(torch.promote_types, found)
    if len(found) > 1:
        warnings.warn(
            f"the model's parameters are of the types {', '.join(sorted(map(str, found)))}; all are taken in "
            f"{widest}. Pass dtype= to choose.",
            FallbackWarning,
            stacklevel=3,
        )
    return widest


def flatten(tree: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> Tensor:
    """The vector (P,) of tensors that are named and shaped as the parameters, in their order."""
    if set(tree) != set(parameters):
        odd = sorted(set(tree) ^ set(parameters))
        raise ShapeError(f"flatten needs exactly the selected parameters; these differ: {odd[:5]}.")
    for name, value in parameters.items():
        if tree[name].shape != value.shape:
            raise ShapeError(f"{name}: expected {tuple(value.shape)}, got {tuple(tree[name].shape)}.")
    return torch.cat([tree[name].reshape(-1) for name in parameters])


def unflatten(vector: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a vector (P,), named and shaped as the parameters."""
    sizes = [value.numel() for value in parameters.values()]
    if vector.shape != (sum(sizes),):
        raise ShapeError(f"expected a vector ({sum(sizes)},), got {tuple(vector.shape)}.")
    parts = zip(torch.split(vector, sizes), parameters.items(), strict=True)
    return {name: part.view(value.shape) for part, (name, value) in parts}

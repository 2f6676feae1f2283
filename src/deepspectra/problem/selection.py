"""Which parameters of a model are meant."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from deepspectra.errors import NonFiniteError, ParameterError


def selected(
    model: nn.Module, trainable: Collection[str], parameters: str | Sequence[str] | None
) -> dict[str, Tensor]:
    """The trainable parameters by name, or those that globs choose; a tied one answers to each of its names.

    Raises:
        ParameterError: nothing is selected, or a glob matches nothing or is none.
        NonFiniteError: a selected one holds NaN or infinite values.
    """
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

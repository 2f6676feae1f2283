"""What no bound survives: examples that are repeated, and test inputs that are among the examples."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from deepspectra.certificates.networks import CHUNK, Examples
from deepspectra.errors import DataError, DependenceWarning

SHARE = 0.01  # of equal rows, up to which they are taken for chance: data sets of images have a few


def check_independence(examples: Examples, unseen: Mapping[str, Tensor]) -> None:
    """Warn of repeated examples, and raise DataError for test inputs, by name, that are among them.

    Only where they are more than chance explains. Cost: every input is read once.
    """
    num, marks = len(examples), set(_marks(examples.inputs))
    repeats = num - len(marks)
    if repeats > SHARE * num:
        warnings.warn(
            f"{repeats:,} of {num:,} inputs are repeats of others. The bound is one for independent examples, and "
            "void where some were drawn again, as by a sampler with replacement or by augmentation: give each once.",
            DependenceWarning,
            stacklevel=3,
        )
    for name, inputs in unseen.items():
        known = sum(mark in marks for mark in _marks(inputs.to(examples.inputs)))
        if known > SHARE * len(inputs):
            raise DataError(
                f"{known:,} of {len(inputs):,} inputs of {name} are among the examples of the problem, from which "
                "the posterior is found. Give inputs that nothing has seen."
            )


def _marks(inputs: Tensor) -> list[int]:
    """A number for each input, the same for equal ones."""
    parts = (part.detach().cpu().flatten(1).double() + 0.0 for part in torch.split(inputs, CHUNK))  # −0 is 0
    return [hash(row.tobytes()) for part in parts for row in part.numpy()]

"""Standard errors of means, and the intervals that they make: two of them are always a 95 % band."""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor

from deepspectra.errors import OptionError

COVERED = math.erf(math.sqrt(2))  # by two standard deviations of a normal variable: 95.4 %

Number = TypeVar("Number", float, Tensor)


def standard_error(samples: Tensor, dim: int = 0) -> Tensor:
    """Of the mean of independent samples over one dimension; two of them are a 95 % band, however few there are.

    The scatter over √n, times Student's quantile over the normal one. NaN from one sample.
    """
    count = samples.shape[dim]
    if count < 2:
        return samples.mean(dim) * math.nan
    largest = samples.abs().amax(dim, keepdim=True).clamp_min(torch.finfo(samples.dtype).tiny)
    scatter = (samples / largest).std(dim) * largest.squeeze(dim)  # squares of the samples may overflow
    return scatter * (student_scale(count) / math.sqrt(count))


def student_scale(count: int) -> float:
    """By how much more scatters over √n two must be for a 95 % band if it is known from `count` samples alone."""
    return _quantile(COVERED, count - 1) / 2 if count > 1 else math.nan


def interval(value: Number, error: Number, freedom: float, confidence: float) -> tuple[Number, Number]:
    """What `confidence` takes, if two errors are what `COVERED` takes."""
    if not 0 < confidence < 1:
        raise OptionError(f"confidence must lie between 0 and 1, such as 0.95; got {confidence!r}.")
    half = 2 * _quantile(confidence, freedom) / _quantile(COVERED, freedom) * error
    return value - half, value + half


def _quantile(confidence: float, freedom: float) -> float:
    """Of |t| for Student's t, or the normal distribution; NaN without a degree of freedom."""
    from scipy.special import ndtri, stdtrit  # noqa: PLC0415  (SciPy's import takes a while)

    share = (1 + confidence) / 2
    return float(ndtri(share) if math.isinf(freedom) else stdtrit(freedom, share))

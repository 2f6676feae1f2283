"""Standard errors of means, and the intervals that they make: two of them are always a 95 % band."""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor

from deepspectra.errors import OptionError

COVERED = math.erf(math.sqrt(2))  # by two standard deviations of a normal variable: 95.4 %
ROUNDING = 1e-6  # of a count

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
    _check(confidence)
    half = 2 * _quantile(confidence, freedom) / _quantile(COVERED, freedom) * error
    return value - half, value + half


def count_interval(
    low: Tensor, high: Tensor, size: float, num_probes: int, confidence: float
) -> tuple[Tensor, Tensor]:
    """How many k of `size` eigenvalues a set holds, if the mean share that probes see of it lies between two bounds.

    The share that a Gaussian probe sees is a Beta(k/2, (size − k)/2) variable, and the mean over n of them nearly a
    Beta(nk/2, n(size − k)/2) one, which scatters no less. Each k that this gives a chance of at least
    (1 − confidence)/2 on either side is kept. Counts are whole numbers.
    """
    from scipy.special import betainc  # noqa: PLC0415  (SciPy's import takes a while)

    _check(confidence)
    slack = ROUNDING / size
    shares = torch.stack([(low - slack).clamp_min(0), (high + slack).clamp_max(1)]).numpy()
    # The chance of no more than is seen falls with k: whole numbers are halved, up to rounding, to the first that has
    # too little of it for the lower end, and to the last that has enough for the upper one.
    ends = 2, *[1] * low.ndim
    chance = torch.tensor([1 + confidence, 1 - confidence]).view(ends) / 2
    beside = torch.tensor([ROUNDING, -ROUNDING], dtype=torch.float64).view(ends)
    limits = [[-1, 0], [math.ceil(size - ROUNDING), math.floor(size + ROUNDING) + 1]]
    below, above = torch.tensor(limits, dtype=torch.float64).view(2, *ends).expand(2, 2, *low.shape)
    while bool((above - below > 1).any()):
        count = ((below + above) / 2).floor()
        a, b = (num_probes / 2 * k.numpy() for k in (count + beside, size - count - beside))
        more = torch.from_numpy(betainc(a, b, shares)) > chance
        below, above = torch.where(more, count, below), torch.where(more, above, count)
    least, most = above[0], below[1]
    return torch.minimum(least, most).clamp_min(0), torch.maximum(least, most)


def _check(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise OptionError(f"confidence must lie between 0 and 1, such as 0.95; got {confidence!r}.")


def _quantile(confidence: float, freedom: float) -> float:
    """Of |t| for Student's t, or the normal distribution; NaN without a degree of freedom."""
    from scipy.special import ndtri, stdtrit  # noqa: PLC0415  (SciPy's import takes a while)

    share = (1 + confidence) / 2
    return float(ndtri(share) if math.isinf(freedom) else stdtrit(freedom, share))

"""Two standard errors are a 95 % band, and intervals have the quantiles that they should."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import norm, t

import deepspectra as ds
from deepspectra.confidence import standard_error
from deepspectra.errors import OptionError
from spectra import Function


def test_an_interval_has_students_quantile_where_the_scatter_is_all_that_is_known() -> None:
    samples = torch.tensor([1.0, 4.0, 2.0], dtype=torch.float64)
    error = float(standard_error(samples))
    assert 2 * error == pytest.approx(t.ppf(norm.cdf(2), 2) * float(samples.std()) / math.sqrt(3))
    A = Function(lambda block: block * torch.arange(50.0)[:, None], 50)
    one = ds.trace(A, 3)
    low, high = one.interval(0.9)
    assert (high - low) / 2 == pytest.approx(one.standard_error * 2 * t.ppf(0.95, 2) / t.ppf(norm.cdf(2), 2))
    many = ds.trace(A, 32)
    low, high = many.interval()
    assert (high - low) / 2 == pytest.approx(many.standard_error * norm.ppf(0.975))
    assert (low + high) / 2 == pytest.approx(many.value)
    assert ds.diagonal(A, 8).interval(0.5)[1].shape == (50,)
    with pytest.raises(OptionError, match="confidence"):
        many.interval(1.0)

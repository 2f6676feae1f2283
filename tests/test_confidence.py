"""Two standard errors are a 95 % band, and intervals have the quantiles that they should."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import norm, t

import deepspectra as ds
from deepspectra.confidence import COVERED, interval, standard_error, student_scale
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


def test_two_errors_are_the_interval_of_two_normal_deviations() -> None:
    """Of 95.4 %, whatever the degrees of freedom; of other shares by the quotient of quantiles."""
    for freedom in (1, 4, math.inf):
        assert interval(3.0, 0.5, freedom, COVERED) == pytest.approx((2.0, 4.0))
    low, high = interval(torch.zeros(2), torch.tensor([1.0, 2.0]), 4, 0.9)
    half = t.ppf(0.95, 4) / t.ppf(norm.cdf(2), 4) * torch.tensor([2.0, 4.0])
    torch.testing.assert_close(high, half.float())
    torch.testing.assert_close(low, -half.float())
    for confidence in (0, 1, 95):
        with pytest.raises(OptionError, match=r"between 0 and 1, such as 0\.95"):
            interval(0.0, 1.0, 4, confidence)


def test_the_error_of_a_mean_is_known_from_two_samples_on_and_at_any_scale() -> None:
    samples = torch.tensor([[1.0, 2.0], [3.0, 4.0], [4.0, 9.0]], dtype=torch.float64)
    expected = samples.std(0) / math.sqrt(3) * student_scale(3)
    torch.testing.assert_close(standard_error(samples), expected)
    torch.testing.assert_close(standard_error(samples.T, 1), expected)
    torch.testing.assert_close(standard_error(1e200 * samples) / 1e200, expected)
    assert standard_error(samples[:1]).isnan().all()
    assert math.isnan(student_scale(1))

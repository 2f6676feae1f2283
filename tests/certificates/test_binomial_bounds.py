"""Bounds on a probability from a share: exact to the stated digits, and never broken more often than they say."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from deepspectra.certificates.binomial_bounds import (
    BOUNDS,
    binomial_bound,
    kl,
    kl_inverse,
    lambda_bound,
    monte_carlo_bound,
    price,
    quadratic_bound,
)
from deepspectra.errors import OptionError

SHARES = st.one_of(st.just(0.0), st.just(1.0), st.floats(1e-9, 1 - 1e-9))
NATS = st.floats(1e-14, 20)


def _plain(q, p):
    """The definition, in exact rational arithmetic up to its logarithms."""
    total = 0.0
    for a, b in ((Fraction(q), Fraction(p)), (1 - Fraction(q), 1 - Fraction(p))):
        if a:
            total += float(a) * (math.log(a / b) if not 0.5 < a / b < 2 else math.log1p(float(a / b - 1)))
    return total


@given(SHARES, st.floats(0.001, 0.999))
def test_kl_is_its_definition(q, p):
    assert kl(q, p) == pytest.approx(_plain(q, p), rel=1e-9, abs=1e-15)


@given(SHARES, NATS)
def test_no_larger_probability_is_within_c_and_the_inverse_is(q, c):
    found = kl_inverse(q, c)
    assert q <= found <= 1
    if found - 1e-10 > q:
        assert kl(q, found - 1e-10) <= c
    if found + 1e-10 < 1:
        assert kl(q, found + 1e-10) > c


def test_the_inverse_keeps_its_digits_where_c_is_tiny():
    # there kl(q ‖ q + d) is d²/(2 q (1 − q)), which p itself would not resolve below √eps
    for c in (1e-12, 1e-16, 1e-20):
        assert kl_inverse(0.3, c) - 0.3 == pytest.approx(math.sqrt(2 * 0.3 * 0.7 * c), rel=2e-5, abs=1e-16)
    assert kl_inverse(0, 0.01) == pytest.approx(-math.expm1(-0.01), rel=1e-14)
    assert kl_inverse(0.2, 0) == pytest.approx(0.2, abs=1e-300)
    assert kl_inverse(1, 0.5) == kl_inverse(0.4, math.inf) == 1


@given(st.floats(0, 1), st.floats(1e-6, 2))
def test_relaxations_are_never_below_the_kl_bound(risk, c):
    assert quadratic_bound(risk, c) >= kl_inverse(risk, c) - 1e-12
    assert lambda_bound(risk, c) >= kl_inverse(risk, c) - 1e-12


@pytest.mark.parametrize("bound", ["kl", "quadratic", "lambda"])
def test_the_price_of_a_nat_is_the_ratio_of_the_bounds_derivatives(bound):
    function, risk, c, n, h = BOUNDS[bound], 0.04, 0.03, 1000, 1e-6
    by_risk = function(risk + h, c) - function(risk - h, c)
    by_nats = (function(risk, c + h) - function(risk, c - h)) / n
    assert price(bound, risk, c, n) == pytest.approx(by_nats / by_risk, rel=1e-5)


@given(st.integers(0, 40), st.sampled_from([0.01, 0.025, 0.3]))
def test_the_binomial_bound_leaves_exactly_delta_below_the_count(errors, delta):
    found = binomial_bound(errors, 40, delta)
    if errors == 40:
        assert found == 1
    else:
        assert binom.cdf(errors, 40, found) == pytest.approx(delta, rel=1e-9)
        assert found <= kl_inverse(errors / 40, math.log(1 / delta) / 40) + 1e-12


def test_the_monte_carlo_bound_holds_for_draws_of_unequal_means():
    generator = torch.Generator().manual_seed(0)
    means = torch.rand(200, generator=generator, dtype=torch.float64) ** 3
    draws = torch.rand(4000, 200, generator=generator, dtype=torch.float64) < means
    bounds = torch.tensor([monte_carlo_bound(float(share), 200, 0.1) for share in draws.double().mean(1)])
    assert float((bounds < means.mean()).double().mean()) <= 0.1


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: kl_inverse(1.2, 0.1), "q=1.2"),
        (lambda: kl_inverse(0.2, -1), "c=-1"),
        (lambda: kl_inverse(0.2, math.nan), "c=nan"),
        (lambda: kl(0.2, -0.1), "p=-0.1"),
        (lambda: binomial_bound(5, 4, 0.1), "5 errors of 4"),
        (lambda: binomial_bound(1, 4, 0.0), "delta must be .* got 0.0"),
    ],
)
def test_what_is_no_probability_is_refused_with_its_value(call, words):
    with pytest.raises(OptionError, match=words):
        call()

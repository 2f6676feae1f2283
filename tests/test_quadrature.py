"""A density as nodes and weights: counts, moments, distribution functions, and curves with their error bands."""

from __future__ import annotations

import math

import pytest
import torch
from reproductions.coverage import cases
from scipy.stats import norm

import deepspectra as ds
from deepspectra.algorithms.density import density
from deepspectra.errors import OptionError
from deepspectra.quadrature import christoffel
from spectra import broadened, integral, rotated, trained


@pytest.fixture(scope="module")
def sample():
    return density(rotated(torch.cat([trained(300), -0.2 * torch.rand(100).double() - 0.01])), 4, 30)


def test_a_curve_integrates_to_the_mass_it_shows(sample):
    linear = sample.smooth(num_points=4000)
    assert integral(linear.density, linear.grid) == pytest.approx(linear.mass, abs=1e-3)
    logarithmic = sample.smooth("log")
    assert logarithmic.mass == pytest.approx(1, abs=1e-12)
    assert integral(logarithmic.density, logarithmic.grid.log10()) == pytest.approx(1, abs=1e-3)
    sides = [sample.smooth("log", sign=sign) for sign in (1, -1)]
    assert sum(side.mass for side in sides) == pytest.approx(1, abs=1e-9)
    assert sides[1].mass == pytest.approx(sample.cdf(0.0), abs=1e-9)


def test_a_curve_has_the_width_and_the_points_asked_for(sample):
    curve = sample.smooth(width=0.05, num_points=77)
    assert curve.width == 0.05
    assert curve.grid.shape == curve.density.shape == curve.standard_error.shape == (77,)


def test_the_error_band_covers_the_exact_curve(sample):
    values = trained(300)
    inside = []
    for seed in range(10):
        curve = density(rotated(values), 8, 20, seed=seed).smooth(width=0.003)
        gap = (curve.density - broadened(curve.grid, values, 0.003)).abs()
        inside.append(
            float((gap <= 2 * curve.standard_error + 0.02 * float(curve.density.max())).double().mean())
        )
    assert sum(inside) / len(inside) > 0.8


def test_one_probe_has_no_error_band_and_says_so():
    result = density(rotated(trained(100)), 1, 20)
    curve = result.smooth()
    assert bool(curve.standard_error.isnan().all())
    assert bool(torch.isfinite(curve.density).all())
    assert math.isnan(result.count_above(0.5)[1])
    assert "no error band" in str(result)


def test_the_cdf_is_a_step_function(sample):
    grid = torch.linspace(-2, 2, 30).reshape(5, 6)
    steps = sample.cdf(grid)
    assert steps.shape == (5, 6)
    assert bool((steps.flatten().diff() >= 0).all())
    assert (sample.cdf(-1e9), sample.cdf(1e9)) == (0.0, 1.0)
    assert isinstance(sample.cdf(0.1), float)
    top = float(sample.nodes.max())
    assert sample.cdf(top) == 1.0
    assert sample.cdf(top - 1e-9) == pytest.approx(1 - 1 / 400, abs=1e-9)


def test_counts_and_means_are_those_of_the_weights(sample):
    assert sample.count_above(0.05)[0] == pytest.approx(10, abs=1e-9)
    assert sample.count_above(0.05)[1] == pytest.approx(0, abs=1e-9)  # all ten are locked
    assert sample.mean == pytest.approx(float(sample.nodes @ sample.weights))


def test_the_printed_table_ends_with_a_verdict(sample):
    assert (
        str(sample)
        .splitlines()[-1]
        .startswith("density of matrix: 4 probes × 30 steps, error band over probes")
    )


@pytest.mark.parametrize(
    "options",
    [
        {"scale": "loglog"},
        {"width": 0.0},
        {"width": math.inf},
        {"num_points": 1},
        {"sign": 2},
        {"epsilon": 0.0},
    ],
)
def test_bad_smoothing_is_refused(sample, options):
    with pytest.raises(OptionError):
        sample.smooth(**options)


def test_the_interval_of_a_mean_eigenvalue_has_the_normal_quantile_and_covers_it() -> None:
    case = cases()["decaying"]
    truth, inside = float(case.values.mean()), 0
    for seed in range(60):
        found = ds.density(case.matrix, 4, 8, seed=seed)
        low, high = found.mean_interval(0.8)
        assert (low + high) / 2 == pytest.approx(found.mean)
        assert (high - low) / 2 == pytest.approx(found.mean_standard_error * norm.ppf(0.9))
        inside += low <= truth <= high
    assert inside >= 0.7 * 60  # of which .8 are stated
    exact = ds.density(torch.diag(torch.arange(4.0)), 1, 8)
    assert exact.mean_interval() == pytest.approx((1.5, 1.5))
    with pytest.raises(OptionError, match="confidence"):
        exact.mean_interval(0)


def test_christoffels_function_is_the_least_square_of_a_polynomial_that_is_one_at_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    nodes, weights = torch.linspace(-1, 1, 40).double(), torch.rand(40, generator=generator).double()
    powers = nodes[:, None] ** torch.arange(6)
    gram = powers.T @ (weights[:, None] * powers) / weights.sum()
    expected = 1 / float(torch.linalg.inv(gram)[0, 0])
    assert christoffel(nodes, weights / weights.sum(), 6) == pytest.approx(expected, rel=1e-9)

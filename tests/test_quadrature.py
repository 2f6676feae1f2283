"""A density as nodes and weights: counts, moments, distribution functions, and curves with their error bands."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from reproductions.coverage import cases
from scipy.stats import norm

import deepspectra as ds
from deepspectra.algorithms.density import density
from deepspectra.algorithms.eigenpairs import eigenpairs
from deepspectra.errors import OptionError
from deepspectra.operators.base import Matrix
from deepspectra.quadrature import Density
from deepspectra.results import Provenance
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
        inside.append(float((gap <= 2 * curve.standard_error + 0.02 * float(curve.density.max())).double().mean()))
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
    assert str(sample).splitlines()[-1].startswith("density of matrix: 4 probes × 30 steps, error band over probes")


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


# --- bands of the mass ---------------------------------------------------------------------------------


def points(values):
    """Of both signs, over seven decades, and evenly."""
    largest = float(values.abs().max())
    decades = largest * torch.logspace(-7, 0.1, 60, dtype=torch.float64)
    far = torch.tensor([-1e3, 1e3]) * largest
    return torch.cat([far, -decades, 1.2 * torch.linspace(-largest, largest, 60), decades]).sort().values


def test_an_exact_density_has_no_band():
    found = density(torch.diag(torch.arange(10.0)), 2, 16)
    x = torch.linspace(-1, 10, 23, dtype=torch.float64)
    for bound in found.cdf_band(x):
        torch.testing.assert_close(bound, found.cdf(x))
    for bound in found.mass_band(x):
        torch.testing.assert_close(bound, found.cdf(x).diff())


@pytest.mark.parametrize("basis", ["full", "none"])
@pytest.mark.parametrize("num_probes", [1, 3])
def test_bands_rise_from_zero_to_one_and_grow_with_confidence(basis, num_probes):
    values = torch.cat([torch.logspace(0, -6, 150).double(), -torch.logspace(-2, -6, 50).double()])
    found, x = density(rotated(values), num_probes, 12, basis=basis), points(values)
    low, high = found.cdf_band(x)
    assert bool((low.diff() >= 0).all() and (high.diff() >= 0).all())
    assert (float(low[0]), float(high[0]), float(low[-1]), float(high[-1])) == (0, 0, 1, 1)
    one = 1.001 / len(values)  # counts are whole numbers, and what the probes see is not
    assert bool((low <= found.cdf(x) + one).all() and (found.cdf(x) <= high + one).all())
    wider = found.cdf_band(x, 0.999)
    assert bool((wider[0] <= low).all() and (high <= wider[1]).all())
    assert float((wider[1] - wider[0]).sum()) > float((high - low).sum())


def test_masses_of_bins_are_known_better_than_differences_of_the_distribution_function():
    values = torch.linspace(-1, 1, 400, dtype=torch.float64)
    found, edges = density(rotated(values), 2, 100), torch.linspace(-1, 1, 21, dtype=torch.float64)
    low, high = found.cdf_band(edges)
    least, most = found.mass_band(edges)
    assert bool((least >= low[1:] - high[:-1] - 1e-9).all() and (most <= high[1:] - low[:-1] + 1e-9).all())
    assert float((most - least).mean()) < 0.9 * float((high[1:] - low[:-1]).mean())
    assert bool((least <= 0.05 + 1e-9).all() and (most >= 0.05 - 1e-9).all())


def test_more_steps_and_more_probes_make_a_band_narrower():
    values = torch.cat([torch.logspace(0, -6, 300).double(), -torch.logspace(-2, -6, 100).double()])
    x, matrix = points(values), rotated(values)
    widths = []
    for num_probes, num_steps in ((1, 10), (4, 10), (4, 40)):
        low, high = density(matrix, num_probes, num_steps).cdf_band(x)
        widths.append(float((high - low).mean()))
    assert widths[0] > widths[1] > 1.5 * widths[2]


def test_a_density_that_was_asked_for_a_band_is_saved_as_any_other(tmp_path):
    found, x = density(rotated(torch.linspace(-1, 1, 50)), 2, 4), torch.linspace(-1, 1, 5)
    band = found.cdf_band(x)
    torch.save(found, tmp_path / "density.pt")
    with torch.serialization.safe_globals([Density, Provenance]):
        again = torch.load(tmp_path / "density.pt", weights_only=True)
    for one, other in zip(band, again.cdf_band(x), strict=True):
        torch.testing.assert_close(one, other)


def test_copies_and_zeros_are_known_exactly_where_a_probe_knows_its_measure():
    values = torch.cat([torch.full((40,), 2.0), torch.zeros(50), torch.full((10,), -1.0)])
    x = torch.tensor([-2.0, -0.5, 1.0, 3.0])
    low, high = density(rotated(values), 4, 16).cdf_band(x)
    truth = torch.tensor([0.0, 0.1, 0.6, 1.0])
    assert bool((low <= truth).all() and (truth <= high).all())
    assert float((high - low).max()) < 0.3  # of 4 probes that are no longer told from their moments
    assert (float(high[0]), float(low[-1])) == (0, 1)


@pytest.mark.parametrize("width", [1e-7, 1e-4, 1e-3])
def test_locked_pairs_of_a_cluster_leave_open_where_in_it_they_lie(width):
    """Each is converged, to its residual, and stands for no single one of fifty near eigenvalues."""
    cluster = 1 + width * torch.linspace(0, 1, 50, dtype=torch.float64)
    values = torch.cat([cluster, torch.zeros(150, dtype=torch.float64)])
    x = 1 + width * torch.linspace(0.05, 0.95, 10, dtype=torch.float64)
    truth, seeds = (values <= x[:, None]).double().mean(1), range(40)
    held, counted = torch.zeros(len(x)), 0
    for seed in seeds:
        found = density(values.diag(), 4, 16, seed=seed)
        low, high = found.cdf_band(x)
        held += ((low <= truth + 1e-12) & (truth <= high + 1e-12)).double()
        count, error = found.count_above(float(x[4]))
        counted += abs(count - 200 * (1 - float(truth[4]))) <= 2 * error
        (start, end) = found.mass_band(torch.tensor([0.5, 1.5], dtype=torch.float64))
        assert end - start < 0.2  # nothing is loose away from it
    assert held.min() >= 0.9 * len(seeds)
    assert counted >= 0.9 * len(seeds)


def test_deflated_pairs_widen_a_band_by_what_they_may_move():
    values = torch.cat([torch.tensor([10.0, 8.0, 6.0]), torch.linspace(0, 1, 197)]).double()
    A, x = Matrix(rotated(values)), torch.linspace(-0.5, 12, 101, dtype=torch.float64)
    truth = (values <= x[:, None]).double().mean(1)
    widths = []
    for rtol in (1e-8, 5e-2):
        pairs = replace(eigenpairs(A, 3, rtol=rtol), converged=False)  # or gaps between them would be certain
        found = density(A, 3, 30, deflate=pairs)
        low, high = found.cdf_band(x)
        assert float(((low <= truth + 1e-9) & (truth <= high + 1e-9)).double().mean()) > 0.9
        widths.append((high - low)[x > 1.5].sum())
    assert found.num_deflated == 3
    assert float(widths[0]) < 0.2 * float(widths[1])


def test_what_is_asked_of_a_band_is_checked():
    found = density(rotated(torch.linspace(-1, 1, 50)), 2, 4)
    with pytest.raises(OptionError, match="confidence"):
        found.cdf_band(torch.zeros(1), 1.0)
    for edges in (
        torch.zeros(1),
        torch.tensor([1.0, 0.0]),
        torch.tensor([[0.0, 1.0]]),
        torch.tensor([0.0, math.nan]),
    ):
        with pytest.raises(OptionError, match="edges"):
            found.mass_band(edges)


@pytest.mark.parametrize("seed", range(8))
def test_rough_pairs_leave_counts_between_them_certain_where_gaps_are_wide(seed):
    """By Sylvester's law of inertia: residuals move eigenvalues, but none past the middle of a wide gap."""
    outliers = torch.tensor([21.0, 13, 9, 8.5, 6, 5], dtype=torch.float64)
    values = torch.cat([outliers, trained(300) * 0.5])
    matrix = rotated(values, seed)
    found = density(matrix, 2, 12, deflate=eigenpairs(matrix, 6, rtol=3e-2, seed=seed), seed=seed)
    assert found.deflation_residual > 1e-4
    assert 4 < found.others_below < 6
    middle = torch.tensor([17.0, 11, 7.3], dtype=torch.float64)
    low, high = found.cdf_band(middle)
    truth = (values <= middle[:, None]).double().mean(1)
    assert bool(((low - truth).abs() < 1e-12).all() and ((high - truth).abs() < 1e-12).all())
    least, most = found.mass_band(middle.flip(0))
    assert (least * len(values)).tolist() == pytest.approx([2, 1])
    assert (most * len(values)).tolist() == pytest.approx([2, 1])
    low, high = found.cdf_band(found.exact[-4:])  # where residuals may move an eigenvalue to either side
    assert bool((high > low).all())


def test_pairs_that_may_lack_one_leave_all_counts_open():
    matrix = rotated(torch.cat([torch.tensor([9.0, 5, 4]), 0.1 * torch.rand(50)]).double())
    pairs = replace(eigenpairs(matrix, 2, rtol=1e-2), converged=False)
    assert density(matrix, 2, 8, deflate=pairs).others_below == math.inf


def test_a_band_at_nan_is_refused_and_numbers_are_taken():
    found = density(rotated(torch.linspace(-1, 1, 50)), 2, 4)
    with pytest.raises(OptionError, match="NaN"):
        found.cdf_band(torch.tensor([0.0, math.nan]))
    low, high = found.cdf_band(0.0)
    assert low.shape == high.shape == ()
    assert [float(bound) for bound in found.cdf_band(torch.tensor([2]))] == [1.0, 1.0]

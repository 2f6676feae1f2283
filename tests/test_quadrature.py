"""Bands of the mass, against spectra that are known."""

import math

import pytest
import torch

from deepspectra.algorithms.density import density
from deepspectra.errors import OptionError
from spectra import rotated


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

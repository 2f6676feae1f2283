"""Bands of the mass, against spectra that are known."""

import math

import pytest
import torch

from deepspectra.algorithms.density import density
from deepspectra.algorithms.eigenpairs import eigenpairs
from deepspectra.errors import OptionError
from deepspectra.operators.base import Matrix
from deepspectra.quadrature import Density
from deepspectra.results import Provenance
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


def test_deflated_pairs_widen_a_band_by_what_they_may_move():
    values = torch.cat([torch.tensor([10.0, 8.0, 6.0]), torch.linspace(0, 1, 197)]).double()
    A, x = Matrix(rotated(values)), torch.linspace(-0.5, 12, 101, dtype=torch.float64)
    truth = (values <= x[:, None]).double().mean(1)
    widths = []
    for rtol in (1e-8, 5e-2):
        found = density(A, 3, 30, deflate=eigenpairs(A, 3, rtol=rtol))
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

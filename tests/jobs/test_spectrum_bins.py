"""Histograms of spectra: exact ones hold every eigenvalue, and bands of the others hold the truth."""

import numpy as np
import pytest
import torch

import deepspectra as ds
from deepspectra import zoo
from deepspectra.algorithms.dense_spectrum import of_all
from deepspectra.jobs.spectrum_bins import ENOUGH, VIEWS, binned
from deepspectra.results import Provenance


def exact(values, size=None):
    return of_all(values, Provenance("matrix", size or len(values), "float64", "cpu", None))


def inside(values, bins, view, size=None):
    """The share of eigenvalues in each bin."""
    found = values.abs().numpy() if view == "magnitude" else values.numpy()
    ends = zip(bins.start, bins.end, strict=True)
    return np.array([((found > start) & (found <= end)).sum() for start, end in ends]) / (size or len(found))


def like_a_network(seed, num=600):
    """Ten outliers over a bulk of both signs and many decades."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 10 ** (-6 * torch.rand(num - 10, generator=generator, dtype=torch.float64) ** 1.5 - 1.2)
    signs = torch.where(torch.rand(num - 10, generator=generator) < 0.7, 1.0, -1.0)
    return torch.cat([sizes * signs, torch.linspace(0.3, 3, 10, dtype=torch.float64)])


@pytest.mark.parametrize("view", VIEWS)
def test_of_a_known_spectrum_bins_hold_what_is_in_them_and_all_of_it(view):
    values = like_a_network(0)
    bins = binned(exact(values), view)
    np.testing.assert_array_equal(bins.start[1:], bins.end[:-1])
    np.testing.assert_allclose(bins.mass, inside(values, bins, view), atol=1e-12)
    np.testing.assert_array_equal(bins.low, bins.high)
    assert bins.mass.sum() == pytest.approx(1)
    counts = bins.mass * len(values)
    assert ((counts < 0.5) | (counts > 0.5)).all()
    if view != "linear":
        assert np.median(counts[counts > 0]) >= ENOUGH  # not the places of single eigenvalues


def test_outliers_stand_in_bins_of_their_own_on_a_linear_axis():
    values = like_a_network(1)
    bins = binned(exact(values), "linear")
    alone = (bins.mass * len(values)).round() == 1
    assert alone[bins.start > 0.2].sum() == 10
    assert bins.end[alone].max() < values.max() + 0.1
    gaps = (bins.start > 0.35) & (bins.mass == 0)
    assert gaps.any()


@pytest.mark.parametrize("view", VIEWS)
def test_zeros_that_are_known_are_in_no_bin(view):
    values = like_a_network(2).abs()
    density = exact(values, size=1000)
    bins = binned(density, view, zeros=0.4)
    np.testing.assert_allclose(bins.mass, inside(values, bins, view, size=1000), atol=1e-12)
    assert bins.mass.sum() == pytest.approx(0.6)
    assert (bins.start >= 0).all() or view == "signed"


@pytest.mark.parametrize("steps", [8, 48])
def test_bins_of_an_estimate_hold_the_truth_within_their_bands(steps):
    held, total = 0, 0
    for seed in range(6):
        values = like_a_network(seed, num=1500)
        matrix = torch.diag(values)
        density = ds.density(matrix, num_probes=2, num_steps=steps, seed=seed)
        for view in VIEWS:
            bins = binned(density, view)
            truth = inside(values, bins, view)
            some = (bins.high > 0) | (truth > 0)
            held += int(((bins.low - 1e-9 <= truth) & (truth <= bins.high + 1e-9))[some].sum())
            total += int(some.sum())
            assert bins.mass.sum() == pytest.approx(1)
    assert held >= 0.95 * total


def test_more_products_make_more_bins():
    matrix = torch.diag(like_a_network(3, num=1500))
    few, many = (binned(ds.density(matrix, 2, steps), "signed") for steps in (8, 128))

    def known(bins):
        return int(((bins.high - bins.low <= bins.mass) & (bins.mass > 0)).sum())

    assert known(few) >= 1
    assert known(many) >= known(few) + 5


def test_a_spectrum_of_one_value_has_bins():
    for values in (torch.ones(5), -torch.ones(5), torch.tensor([1e-300, 2.0])):
        for view in VIEWS:
            bins = binned(exact(values.double()), view)
            assert bins.mass.sum() == pytest.approx(1)


@pytest.mark.slow
@pytest.mark.parametrize("widths", [(32, 16), (24, 24), (40,)])
@pytest.mark.parametrize("effort", ["quick", "standard"])
def test_bins_of_networks_hold_dense_truth(widths, effort):
    """Of networks of some 3,000 parameters, forced to random vectors as if they were beyond dense matrices."""
    data = zoo.load("digits", per_class=40)
    with torch.random.fork_rng():
        torch.manual_seed(len(widths))
        net = zoo.mlp((1, 8, 8), 10, widths=widths)
    zoo.train(net, data, zoo.recipe("mlp-small", "digits", len(data)), seed=0)
    net = net.double().eval()
    problem = ds.Problem(net, (data.inputs.double(), data.targets))
    counts = {"quick": (4, 24), "standard": (4, 256)}[effort]
    found = ds.analyze(problem, num_probes=counts[0], num_steps=counts[1], progress=False).dataset
    held = []
    for name, operator in (("hessian", ds.Hessian), ("residual", ds.Residual)):
        values = torch.linalg.eigvalsh(operator(problem).dense())
        for view in VIEWS:
            bins = found.sel(split="train", operator=name, view=view).dropna("bin")
            low, high = bins.bin_low.values, bins.bin_high.values
            table = type("Table", (), {"start": bins.bin_start.values, "end": bins.bin_end.values})
            truth = inside(values, table, view)
            some = (high > 0) | (truth > 0)
            held += ((low - 1e-9 <= truth) & (truth <= high + 1e-9))[some].tolist()
    assert np.mean(held) >= 0.9

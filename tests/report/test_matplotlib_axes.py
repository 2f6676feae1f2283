"""Figures in matplotlib's axes: the numbers of the dataset are what is drawn, and style is the user's."""

import functools
import sys

import numpy as np
import pytest
import torch

import deepspectra as ds
from deepspectra.errors import DataError, OptionError
from deepspectra.report.drawing import OPERATOR_COLOURS
from nets import trained_on_digits

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def _closed():
    yield
    sys.modules["matplotlib.pyplot"].close("all") if "matplotlib.pyplot" in sys.modules else None


@functools.cache
def analysis():
    net, data = trained_on_digits(6, (8,), epochs=20)
    return ds.analyze(ds.Problem(net, (data.inputs, data.targets)), num_probes=2, num_steps=16, progress=False)


def hessian():
    return analysis().dataset.sel(operator="hessian", split="train")


@pytest.mark.parametrize(("name", "view"), [("spectrum", "linear"), ("magnitude_spectrum", "magnitude")])
def test_a_spectrum_is_the_histogram_with_its_outliers(name, view):
    ax = analysis().plot(name, linewidth=2.5)
    width, _ = ax.figure.get_size_inches()
    assert width == pytest.approx(3.3)
    steps = next(one for one in ax.patches if one.get_label().startswith("Hessian H"))
    outside = float(hessian().sel(view=view).bin_mass.where(hessian().sel(view=view).bin_start <= 0).sum())
    assert ("farther left" in steps.get_label()) == (view == "magnitude" and outside >= 0.005)
    assert steps.get_linewidth() == 2.5
    found = steps.get_data()
    bins = hessian().sel(view=view).dropna("bin")
    for j, start in enumerate(found.edges[:-1]):
        (at,) = np.flatnonzero(np.isclose(bins.bin_start, start, rtol=1e-7, atol=1e-12))[:1] or (None,)
        if at is None or np.isnan(found.values[j]):
            continue
        one = bins.isel(bin=int(at))
        size = one.bin_end - one.bin_start if view == "linear" else np.log10(one.bin_end / one.bin_start)
        assert found.values[j] == pytest.approx(float(one.bin_mass / size), rel=1e-6)
    dots = [line.get_xdata() for line in ax.lines if line.get_color() == OPERATOR_COLOURS["hessian"]]
    expected = hessian().eigenvalue.values[hessian().is_outlier.values == 1]
    np.testing.assert_allclose(np.sort(dots[0]), np.sort(expected), rtol=1e-6)


def test_shares_are_bars_that_end_at_one_hundred():
    ax = analysis().plot("shares")
    ends = {}
    for bar in ax.patches:
        place = round(bar.get_y() + bar.get_height() / 2)
        ends[place] = ends.get(place, 0) + bar.get_width()
    assert len(ends) == int(hessian().num_outliers)
    assert list(ends.values()) == pytest.approx([100] * len(ends))


def test_knockouts_are_dots_in_the_axes_that_are_given():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    _, axes = pyplot.subplots(1, 2)
    assert analysis().plot("knockouts", axes[1]) is axes[1]
    assert not axes[0].collections
    limit = float(hessian().outlier_threshold)
    values = hessian().knockout_value.sel({"knockout": "class", "method": "subtraction"}).values
    (row,) = [j for j, label in enumerate(axes[1].get_yticklabels()) if label.get_text() == "class\nsubtraction"]
    drawn = axes[1].collections[row].get_offsets()[:, 0]
    assert (drawn > limit).sum() == (values > limit).sum()
    assert float(max(drawn)) == pytest.approx(float(np.nanmax(values)))


def test_what_cannot_be_drawn_is_said(monkeypatch):
    with pytest.raises(OptionError, match="there are spectrum, magnitude_spectrum, shares, knockouts"):
        analysis().plot("cost")
    regression = ds.Problem(torch.nn.Linear(3, 1), (torch.randn(9, 3), torch.randn(9, 1)), "mse")
    found = ds.analyze(regression, num=2, progress=False)
    assert found.plot().get_xlabel() == "|λ|"
    with pytest.raises(DataError, match="no share of hessian"):
        found.plot("shares")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(OptionError, match=r"deepspectra\[plot\]"):
        analysis().plot("shares")

"""What is saved of a comparison is what was found."""

import numpy as np
import pytest
import torch
from torch import nn

import deepspectra as ds
from deepspectra.jobs.compare_dataset import CURVES, comparison_dataset, sentences
from deepspectra.jobs.pages import Labels


@pytest.fixture(scope="module")
def problems():
    found = []
    for seed in range(2):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()
        found.append(ds.Problem(model, (torch.randn(18, 4).double(), torch.arange(18) % 3)))
    return found


def test_curves_are_saved_by_layer_as_far_as_each_goes(problems):
    found = ds.compare(*problems, num=6, num_whole=3)
    dataset = comparison_dataset(found, problems[0], Labels("net", "noise"))
    assert list(dataset["layer"].values) == list(found)
    for name, layer in found.items():
        for curve in CURVES:
            saved = dataset["overlap_curve"].sel(layer=name, curve=curve).dropna("dimension").values
            np.testing.assert_allclose(saved, getattr(layer, curve).numpy())
        assert int(dataset["layer_outputs"].sel(layer=name)) == layer.outputs
    np.testing.assert_allclose(dataset["overlap_whole"].values, found.whole.numpy())
    assert dataset.attrs["title"] == "Two trainings of net on noise"
    assert dataset.attrs["verdict"] == " ".join(sentences(found))


def test_the_verdict_names_the_layer_and_the_height_of_the_peak(problems):
    found = ds.compare(*problems, num=6, num_whole=0)
    said = sentences(found)
    heights = {name: float(layer.measured.max()) for name, layer in found.items()}
    best = max(heights, key=heights.get)
    assert said[0].startswith(f"The two networks share most in {best}: ")
    assert f"overlap by {heights[best]:.2f}" in said[0]
    assert len(said) == 2, "nothing is said of all parameters if nothing was measured"

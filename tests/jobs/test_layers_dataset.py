"""What is saved of layers is what was found."""

import numpy as np
import pytest

import deepspectra as ds
from deepspectra.jobs.layers_dataset import KINDS, MEASURES, layer_dataset, sentences
from nets import CASES


@pytest.fixture(scope="module")
def problem():
    return CASES["conv_batchnorm"]().problem()


@pytest.fixture(scope="module")
def found(problem):
    return ds.layers(problem, effects="two-way")


def test_spectra_shares_and_collapse_are_saved_by_layer_and_kind(found, problem):
    dataset = layer_dataset(found, problem)
    assert list(dataset["layer"].values) == list(found)
    for name, layer in found.items():
        for kind in KINDS:
            spectrum = getattr(layer, kind)
            saved = dataset.sel(layer=name, kind=kind)
            if spectrum is None:
                assert bool(saved["layer_eigenvalue"].isnull().all())
                continue
            values = saved["layer_eigenvalue"].dropna("rank").values
            np.testing.assert_allclose(values, spectrum.values[: len(values)].numpy())
            for part, trace in zip(spectrum.part_names, spectrum.traces.tolist(), strict=True):
                assert float(saved["layer_trace"].sel(layer_part=part)) == pytest.approx(trace)
        collapse = dataset["collapse"].sel(layer=name)
        assert bool(collapse.isnull().all()) == (layer.collapse is None)
        if layer.collapse is not None:
            expected = [getattr(layer.collapse, measure) for measure in MEASURES]
            np.testing.assert_allclose(collapse.values, expected)
        assert int(dataset["layer_parameters"].sel(layer=name)) == layer.num_parameters


def test_the_verdict_counts_layers_and_says_where_h_is_g(found):
    said = " ".join(sentences(found))
    weighty = [layer for layer in found.values() if layer.features is not None]
    assert f"Of {len(weighty)} layers with weights" in said
    assert f"The Hessian's block is that of G, up to rounding, in all {len(found)} layers." in said
    assert "Nearest to G's block" not in said, "Kronecker factors were not asked for"

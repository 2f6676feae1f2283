"""Measures of layers against the functions that they come from."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

import deepspectra as ds
from deepspectra import zoo
from deepspectra.analysis import layer_blocks
from deepspectra.analysis.layer_measures import MEASURES, layer_measures, spectrum_measures
from nets import labels

SHAPE = (1, 4, 4)


def network(seed: int, *, batch_norm: bool = False) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))
    if batch_norm:
        model = zoo.normalised(model, SHAPE)
        model(torch.rand(40, *SHAPE))
    return model.eval()


def problem(seed: int, **options: bool) -> ds.Problem:
    torch.manual_seed(9)
    return ds.Problem(network(seed, **options).double(), (torch.rand(30, *SHAPE).double(), labels(30, 3)))


def test_measures_are_those_of_the_functions_they_come_from() -> None:
    one = problem(0)
    found = layer_measures(one)
    assert list(found) == ["1", "3"]
    for name, measured in found.items():
        assert set(measured) <= set(MEASURES)
        dissected = ds.dissect(one, num=3)[name]
        assert measured["input_ratio"] == pytest.approx(dissected.input_ratio)
        assert measured["gap"] == pytest.approx(float(dissected.values[1] / dissected.values[2]))
        quality = ds.kronecker_quality(one, ("kfac", "cfac"), ks=(2,))[name]
        assert measured["kfac_error"] == pytest.approx(quality.fits["kfac"].frobenius)
        assert measured["cfac_error"] == pytest.approx(quality.fits["cfac"].frobenius)
        layer = ds.layers(one)[name]
        expected = layer.gradients.values[:2] @ layer.gradients.shares[:2, 0] / layer.gradients.values[:2].sum()
        assert measured["class_share"] == pytest.approx(float(expected))
        expected = layer.centred.values[:2] @ layer.centred.shares[:2, 1] / layer.centred.values[:2].sum()
        assert measured["centred_logit_share"] == pytest.approx(float(expected))
    assert math.isnan(found["3"]["output_gap"])  # τ_C is zero: the outputs' curvature has rank C − 1


def test_counts_are_of_eigenvalues_over_the_edge_of_the_spectrum_itself() -> None:
    whole = ds.gram_spectrum(problem(1, batch_norm=True), effects="two-way")
    found, edge = spectrum_measures(whole, 2), 1.25 * float(whole.parts["within"][0])
    for key, removed in (("outliers", ()), ("left_without_class", ("class", "true")),
                         ("left_without_class_logit", ("class", "logit", "true"))):  # fmt: skip
        values = whole.knockout(*removed) if removed else whole.values
        assert found[key] == int((values > edge).sum())
    assert found["logit_share"] == whole.share_of_top("logit", 2)


def test_a_network_of_any_convex_loss_has_fewer_measures() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)).double()
    regression = ds.Problem(model, (torch.randn(20, 4).double(), torch.randn(20, 2).double()), loss="mse")
    measured = layer_measures(regression)["0"]
    assert measured["kfac_error"] > 0
    assert not {"cfac_error", "class_share"} & set(measured)


def test_each_block_is_decomposed_once_a_network(monkeypatch) -> None:
    networks = [problem(0), problem(1)]
    made = []
    for name in ("_moment", "gram_of"):  # of the layer with fewer parameters than rows, and of the other one
        monkeypatch.setattr(layer_blocks, name, _recorded(name, getattr(layer_blocks, name), made))
    monkeypatch.setattr(layer_blocks, "REMEMBERED", 20)
    for one in networks:
        layer_measures(one)
    assert sorted(made) == ["_moment"] * 2 + ["gram_of"] * 2
    _, exact = next(iter(layer_blocks.Blocks(networks[0])))
    values, _, vectors = layer_blocks.dense_spectrum(exact, 21)
    assert len(made) == 5
    assert vectors.shape[1] == 21
    torch.testing.assert_close(exact @ vectors, vectors * values[:21])


def _recorded(name: str, function: Callable, made: list[str]) -> Callable:
    def call(*given):
        made.append(name)
        return function(*given)

    return call

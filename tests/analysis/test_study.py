"""What changes from one kind of network to another: measures against the functions that they come from."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

import deepspectra as ds
from deepspectra import zoo
from deepspectra.analysis import layer_blocks
from deepspectra.analysis.study import LEFT, MEASURES
from deepspectra.errors import OptionError, ShapeError
from deepspectra.jobs.pages import Labels
from deepspectra.jobs.study_dataset import sentences, study_dataset
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


@pytest.fixture(scope="module")
def found():
    return ds.study({"plain": [problem(0), problem(1)], "batch norm": [problem(j, batch_norm=True) for j in (0, 1)]})


def test_measures_are_those_of_the_functions_they_come_from(found) -> None:
    assert found.variants == ("plain", "batch norm")
    assert list(found) == ["1", "3", "all layers"]
    assert {table.shape for table in found.values()} == {(2, len(MEASURES), 3)}
    dissected = [ds.dissect(problem(j), num=3) for j in (0, 1)]
    for layer in list(found)[:-1]:
        assert found.of("plain", layer, "input_ratio").tolist() == pytest.approx(
            [some[layer].input_ratio for some in dissected]
        )
        assert found.of("plain", layer, "gap").tolist() == pytest.approx(
            [float(some[layer].values[1] / some[layer].values[2]) for some in dissected]
        )
        quality = ds.kronecker_quality(problem(0), ("kfac", "cfac"), ks=(2,))[layer]
        assert float(found.of("plain", layer, "kfac_error")[0]) == pytest.approx(quality.fits["kfac"].frobenius)
        assert float(found.of("plain", layer, "cfac_error")[0]) == pytest.approx(quality.fits["cfac"].frobenius)
        together = ds.compare(problem(0, batch_norm=True), problem(1, batch_norm=True))[layer]
        at = min(together.outputs, len(together.ks)) - 1
        shared = found.of("batch norm", layer, "shared")
        assert shared.tolist() == pytest.approx([float(together.measured[at])])
        gradients = ds.layers(problem(0))[layer].gradients
        expected = gradients.values[:2] @ gradients.shares[:2, 0] / gradients.values[:2].sum()
        assert float(found.of("plain", layer, "class_share")[0]) == pytest.approx(float(expected))
        centred = ds.layers(problem(0))[layer].centred
        expected = centred.values[:2] @ centred.shares[:2, 1] / centred.values[:2].sum()
        assert float(found.of("plain", layer, "centred_logit_share")[0]) == pytest.approx(float(expected))
    whole = ds.gram_spectrum(problem(1), effects="two-way")
    edge = 1.25 * float(whole.parts["within"][0])
    for key, removed in (("outliers", ()), ("left_without_class", ("class", "true")),
                         ("left_without_class_logit", ("class", "logit", "true"))):  # fmt: skip
        values = whole.knockout(*removed) if removed else whole.values
        assert float(found.of("plain", "all layers", key)[1]) == int((values > edge).sum())
    assert not len(found.of("plain", "all layers", "kfac_error"))
    assert not len(found.of("plain", "3", "output_gap"))  # τ_C is zero: the outputs' curvature has rank C − 1
    assert found.losses.tolist()[0] == pytest.approx([problem(0).loss(), problem(1).loss()])
    assert found.accuracies.tolist()[1][0] == pytest.approx(problem(0, batch_norm=True).accuracy())


def test_it_says_what_falls_and_what_rises(found) -> None:
    said = sentences(found)
    ratios = [
        torch.stack([found.of(v, layer, "input_ratio").mean() for layer in list(found)[:-1]]).mean()
        for v in found.variants
    ]
    assert said[0].startswith("Outliers of G → left without class means → ")
    counts = [found.of("plain", "all layers", key).mean() for key in LEFT]
    assert "plain " + " → ".join(f"{float(count):.3g}" for count in counts) in said[0]
    assert said[1].startswith("From plain to batch norm")
    assert f"{float(ratios[0]):.3g}, then {float(ratios[1]):.3g}" in said[2]
    assert str(found).count("batch norm") >= 3
    dataset = study_dataset(found, problem(0), Labels("small", "noise"), name="batch-norm")
    assert dataset["study"].dims == ("variant", "layer", "measured", "sample")
    assert dataset.attrs["title"] == "Study of batch-norm: small on noise"
    assert "accuracy" not in dataset.attrs


def test_one_network_of_any_convex_loss_has_fewer_measures() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)).double()
    regression = ds.Problem(model, (torch.randn(20, 4).double(), torch.randn(20, 2).double()), loss="mse")
    found = ds.study({"alone": [regression]})
    assert len(found.of("alone", "0", "kfac_error")) == 1
    for measure in ("cfac_error", "class_share", "shared"):
        assert not len(found.of("alone", "0", measure))
    assert math.isnan(float(found.accuracies[0, 0]))
    assert sentences(found) == ["2 layers of alone."]


def test_bad_variants_are_refused() -> None:
    with pytest.raises(OptionError, match="at least one network"):
        ds.study({})
    with pytest.raises(OptionError, match="at least one network"):
        ds.study({"plain": []})
    torch.manual_seed(0)
    other = nn.Sequential(nn.Flatten(), nn.Linear(16, 7), nn.ReLU(), nn.Linear(7, 3)).double()
    odd = ds.Problem(other, (torch.rand(9, *SHAPE).double(), labels(9, 3)))
    with pytest.raises(ShapeError, match="same parameters"):
        ds.study({"plain": [problem(0), odd]})


def test_each_block_is_decomposed_once_a_network(monkeypatch) -> None:
    networks = [problem(0), problem(1)]
    made = []
    for name in ("_moment", "gram_of"):  # of the layer with fewer parameters than rows, and of the other one
        monkeypatch.setattr(layer_blocks, name, _recorded(name, getattr(layer_blocks, name), made))
    monkeypatch.setattr(layer_blocks, "REMEMBERED", 20)
    ds.study({"plain": networks})
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

"""The ready cell: networks of the zoo, trained once and looked at several times."""

import math

import numpy as np
import pytest
import torch

import deepspectra as ds
from deepspectra import errors, zoo
from deepspectra.jobs.sweep_zoo import ZooCell

AXES = {"model": ["mlp"], "per_class": [5, 8], "epochs": [0, 4], "seed": [1]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("zoo")
    ds.sweep(ds.ZooCell(training_epochs=6), AXES, path, looks="epochs", executor=1, progress=False)
    return path


def test_measures_are_those_of_a_network_trained_and_looked_at_by_hand(folder):
    data = zoo.load("digits", per_class=8, seed=1)
    network = zoo.build("mlp", input_shape=(1, 8, 8), num_classes=10, seed=1)
    recipe = zoo.recipe("mlp", "digits", 80)
    kept = {}

    def keep(history):
        kept[len(history)] = {name: value.clone() for name, value in network.state_dict().items()}

    zoo.train(
        network,
        data,
        epochs=6,
        learning_rate=recipe.learning_rate,
        batch_size=recipe.batch_size,
        seed=1,
        progress=keep,
    )
    network.load_state_dict(kept[4])
    problem = ds.Problem(network, (data.inputs, data.targets))
    spectrum = ds.gram_spectrum(problem, effects="two-way")
    found = ds.gather(folder).sel(model="mlp", per_class=8, epochs=4, seed=1)
    assert found.status == "done"
    torch.testing.assert_close(torch.tensor(found.value.values), spectrum.values[:100])
    assert found.loss == pytest.approx(problem.loss(), rel=1e-6)
    assert found.accuracy == problem.accuracy()
    assert found.test_accuracy == zoo.accuracy(network, zoo.load("digits", split="test"))
    assert found.outliers == spectrum.num_outliers()
    assert found.bulk_edge == pytest.approx(spectrum.bulk_edge)
    assert found.left_class_subtraction == spectrum.num_outliers("class")
    left = spectrum.knockout("class", "logit", method="projection")
    np.testing.assert_allclose(found.value_without_class_logit_projection, left[:20], rtol=1e-6)
    assert found.left_class_logit_projection == int((left > spectrum.threshold()).sum())
    parts = [found[f"trace_{name}"].item() for name in spectrum.part_names]
    assert sum(parts) == pytest.approx(found.trace.item())
    shares = spectrum.shares[: spectrum.num_outliers()].mean(0)
    assert found.share_logit == pytest.approx(float(shares[spectrum.part_names.index("logit")]))
    bump, within = (spectrum.parts[name].log10() for name in ("interaction", "within"))
    assert found.bump_distance == pytest.approx(float(bump.median() - within.median()))
    assert found.bump_clearance == pytest.approx(float(bump.median() - within.max()))
    assert (found.epoch, found.rate) == (4, recipe.learning_rate)


def test_a_cell_needs_no_more_memory_than_it_says(folder):
    found = ds.gather(folder)
    for size in (5, 8):
        said = ZooCell().memory(model="mlp", per_class=size, epochs=(0, 4))
        assert found.peak_memory.sel(per_class=size).max() < said
    assert ZooCell().memory(per_class=100) > ZooCell().memory(per_class=10) + 8 * 8 * 8900**2


def test_one_training_is_the_same_whichever_epochs_are_looked_at(folder, tmp_path):
    cell = ZooCell(training_epochs=6)
    found = ds.gather(folder).sel(model="mlp", per_class=5, seed=1)
    single = cell(per_class=5, epochs=4, seed=1)
    assert single["loss"] == pytest.approx(found.loss.sel(epochs=4).item(), rel=1e-6)
    looks = list(cell(per_class=5, epochs=(3, 4), seed=1))
    assert looks[1]["loss"] == single["loss"]
    assert looks[0]["loss"] != single["loss"]
    assert cell(per_class=5, seed=1)["loss"] == cell(per_class=5, epochs=6, seed=1)["loss"]


def test_progress_is_a_share_of_the_epochs():
    cell = ZooCell(training_epochs=6)
    (found,) = cell(per_class=5, progress=(0.66,), seed=1)
    assert found["epoch"] == 4
    assert found["loss"] == cell(per_class=5, epochs=4, seed=1)["loss"]


def test_the_best_of_some_rates_is_looked_at():
    cell = ZooCell(training_epochs=6, rates=(0.1, 1, 1e8))
    found = cell(per_class=5)
    rate = zoo.recipe("mlp", "digits", 50).learning_rate
    assert found["rates"] == [0.1 * rate, rate, 1e8 * rate]
    assert found["rate_test_accuracy"][2] == 0  # diverges
    assert found["rate_loss"][2] == math.inf
    assert found["rate"] == found["rates"][int(np.argmax(found["rate_test_accuracy"]))]
    chosen = ZooCell(training_epochs=6)(per_class=5, learning_rate=found["rate"])
    assert chosen["loss"] == found["loss"]
    assert max(found["rate_test_accuracy"]) == found["test_accuracy"] == chosen["test_accuracy"]


def test_networks_vary_by_batch_norm_and_by_their_labels():
    cell = ZooCell(training_epochs=1)
    plain, normed, drawn = (cell(per_class=5, **o) for o in ({}, {"batch_norm": True}, {"random_labels": True}))
    assert plain["num_parameters"] == normed["num_parameters"]
    assert len({one["loss"] for one in (plain, normed, drawn)}) == 3
    data = zoo.load("digits", per_class=5).relabelled(0)
    network = zoo.build("mlp", input_shape=data.input_shape, num_classes=10)
    zoo.train(network, data, zoo.recipe("mlp", "digits", 50), epochs=1)
    assert drawn["loss"] == pytest.approx(ds.Problem(network, (data.inputs, data.targets)).loss())


def test_every_layer_is_measured_where_that_is_asked_for(tmp_path):
    cell = ZooCell(training_epochs=2, by_layer=True)
    axes = {"model": ["mlp", "lenet"], "classes": [3], "batch_norm": [False], "per_class": [5]}
    found = ds.sweep(cell, axes, tmp_path, executor=1, progress=False)
    assert (found.status == "done").all()
    assert found.layer.sel(model="lenet").values.ravel()[0] == "conv1"
    data = zoo.load("digits", per_class=5).of_classes(3)
    network = zoo.build("mlp", input_shape=data.input_shape, num_classes=3)
    zoo.train(network, data, zoo.recipe("mlp", "digits", 15), epochs=2)
    expected = ds.kronecker_quality(ds.Problem(network, (data.inputs, data.targets)), ("kfac",))
    one = found.sel(model="mlp").squeeze()
    assert [name for name in one.layer.values if name] == list(expected)
    errors = [layer.fits["kfac"].frobenius for layer in expected.values()]
    np.testing.assert_allclose(one.layer_kfac_error.values[: len(errors)], errors, rtol=1e-4)
    for model in axes["model"]:
        said = cell.memory(model=model, per_class=5, classes=3)
        assert found.peak_memory.sel(model=model).max() < said


def test_a_training_that_diverges_keeps_its_earlier_looks():
    looks = ZooCell(training_epochs=3)(per_class=5, learning_rate=1e6, epochs=(0, 3))
    assert next(looks)["loss"] > 0
    with pytest.raises(errors.NonFiniteError, match="lower it"):
        next(looks)


def test_epochs_beyond_the_training_are_refused():
    for looks in ({"epochs": (0, 4)}, {"progress": (0.5, 1.2)}, {"epochs": (1,), "progress": (1,)}):
        with pytest.raises(errors.OptionError, match=r"from 0 to 3 epochs or to 1.*--training-epochs"):
            ZooCell(training_epochs=3)(per_class=5, **looks)


def test_a_sweep_is_of_one_length_of_training(folder, tmp_path):
    with pytest.raises(
        errors.FileError, match=r"version 2 ZooCell\(training_epochs=6.* now 2 ZooCell\(training_epochs=7"
    ):
        ds.sweep(ZooCell(training_epochs=7), AXES, folder, looks="epochs", progress=False)
    assert ZooCell(tmp_path).version == ZooCell().version


def test_the_trace_of_the_residual_is_measured_when_asked_for():
    found = ZooCell(training_epochs=1, residual_products=4)(per_class=5)
    assert found["trace_residual_error"] > 0
    assert "trace_residual" not in ZooCell(training_epochs=1)(per_class=5)

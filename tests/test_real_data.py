"""The main job on the papers' data sets; skipped, saying why, where they are not."""

import numpy as np
import pytest

import deepspectra as ds
from deepspectra import zoo


@pytest.mark.parametrize(
    ("model", "data", "size", "per_class"), [("lenet", "mnist", 32, 13), ("mlp-bn", "fashion", None, 20)]
)
def test_a_trained_network_has_outliers_that_the_means_explain(data_root, model, data, size, per_class):
    examples = zoo.load(data, root=data_root, per_class=per_class, size=size)
    net = zoo.build(model, input_shape=tuple(examples.inputs.shape[1:]), num_classes=10)
    recipe = zoo.recipe(model, data, len(examples))
    zoo.train(net, examples, epochs=20, learning_rate=4 * recipe.learning_rate, batch_size=recipe.batch_size)
    problem = ds.Problem(net, (examples.inputs, examples.targets))
    assert problem.accuracy() > 0.9
    found = ds.analyze(problem, num_probes=1, num_steps=8, progress=False).dataset
    count = int(found.num_outliers.sel(operator="hessian"))
    assert 3 <= count <= 13
    np.testing.assert_allclose(found.share.sel(operator="hessian").sum("part"), 1, atol=1e-9)
    left = found.knockout_outliers.sel({"operator": "hessian", "method": "subtraction"})
    assert float(left.sel(knockout="class + logit")) <= float(left.sel(knockout="class")) <= count
    overlap = found.subspace_overlap.sel(operator="hessian")
    assert float(overlap.sel(level="cross_class")) > float(overlap.sel(level="class")) > 0.5


@pytest.mark.slow
def test_resnet_on_cifar_reports(data_root):
    examples = zoo.load("cifar10", root=data_root, per_class=2)
    net = zoo.build("resnet18", input_shape=(3, 32, 32), num_classes=10).eval()
    problem = ds.Problem(net, (examples.inputs, examples.targets))
    found = ds.analyze(problem, num=4, num_probes=1, num_steps=4, progress=False)
    assert found.dataset.attrs["num_parameters"] == 11_173_962

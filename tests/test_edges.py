"""Data and networks at the edge of what is defined: nothing within classes, G = 0, one output, few examples."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import deepspectra as ds
from deepspectra.errors import DeepSpectraError, LossError, OptionError

NUM = 30


def data(num: int = NUM) -> tuple[Tensor, Tensor]:
    """Examples of three classes in turn."""
    return torch.randn(num, 6), torch.arange(num) % 3


def mlp(outputs: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, outputs))


class Squared(nn.Module):
    """A square matrix that multiplies its own transpose, as many rows as some examples."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)
        self.w = nn.Parameter(torch.randn(6, 6) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)) @ (self.w @ self.w.T))


def test_a_parameter_that_multiplies_itself_has_its_part_of_g():
    problem = ds.Problem(Squared(), data(), dtype=torch.float64)
    operator = ds.GaussNewton(problem)
    dense = operator @ torch.eye(operator.shape[0], dtype=torch.float64)
    expected = torch.linalg.eigvalsh(dense).flip(0)
    found = ds.gram_spectrum(problem).values
    assert torch.allclose(found, expected[: len(found)], atol=1e-12 * float(expected[0]))


def test_names_that_are_not_there_are_key_errors_that_list_those_that_are():
    problem = ds.Problem(mlp(), data())
    found = ds.layers(problem, hessian=False)
    parts = ds.decompose(problem)
    collapsed = ds.collapse(problem)
    for ask in (
        lambda: found["nope"],
        lambda: collapsed["nope"],
        lambda: parts["nope"],
        lambda: ds.decompose(problem, "errors").layer("nope"),
    ):
        with pytest.raises(KeyError, match="nope'; there are ") as caught:
            ask()
        assert isinstance(caught.value, DeepSpectraError)
        assert str(caught.value).startswith("no ")
    assert "nope" not in parts
    assert collapsed.get("nope") is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_layers_of_half_precision_are_near_those_of_double(dtype):
    model, (x, y) = mlp(), data()
    expected = ds.layers(ds.Problem(model, (x, y)), dtype=torch.float64, hessian=False)
    found = ds.layers(ds.Problem(model.to(dtype), (x.to(dtype), y)), hessian=False)
    for one, other in zip(found, expected, strict=True):
        assert one.collapse.nc1 == pytest.approx(other.collapse.nc1, rel=0.1)
        assert float(one.gradients.values[0]) == pytest.approx(float(other.gradients.values[0]), rel=0.05)


@pytest.mark.parametrize(
    "call",
    [
        ds.gram_spectrum,
        ds.layers,
        ds.kronecker,
        ds.kronecker_quality,
        ds.dissect,
        ds.collapse,
        ds.regions,
        lambda problem: ds.analyze(problem, progress=False),
    ],
)
def test_the_cross_entropy_of_one_output_is_refused(call):
    x, y = data()
    with pytest.raises(LossError, match="one output is zero"):
        call(ds.Problem(nn.Linear(6, 1), (x, y * 0)))


@pytest.mark.parametrize("option", ["num", "num_probes", "num_steps", "rtol"])
def test_an_analysis_refuses_options_of_zero(option):
    with pytest.raises(OptionError, match=option):
        ds.analyze(ds.Problem(mlp(), data()), progress=False, **{option: 0})


def test_layers_refuse_no_eigenvalues():
    with pytest.raises(OptionError, match="num"):
        ds.layers(ds.Problem(mlp(), data()), num=0)


@pytest.mark.parametrize("num", [1, 2, 5])
def test_regions_of_fewer_examples_than_groups(num):
    problem = ds.Problem(mlp(), data(num))
    found = ds.regions(problem)
    assert bool(found.whole.standard_errors.isnan().all()) == (num == 1)
    with pytest.raises(OptionError, match="num_groups"):
        ds.regions(problem, num_groups=8)


@pytest.mark.parametrize("loss", ["mse", nn.CrossEntropyLoss()])
def test_without_class_labels_kronecker_quality_leaves_cfac_out(loss):
    x, _ = data()
    problem = ds.Problem(mlp(), (x, torch.rand(NUM, 3).softmax(1)), loss=loss)
    assert ds.kronecker_quality(problem).kinds == ("kfac", "ekfac")


def test_dissected_regression_of_one_output_has_no_closed_form():
    x, _ = data()
    found = ds.dissect(ds.Problem(mlp(1), (x, torch.randn(NUM, 1)), loss="mse"))
    assert len(found) == 2
    assert all(math.isnan(layer.closed_form) and math.isnan(layer.closed_range) for layer in found.values())

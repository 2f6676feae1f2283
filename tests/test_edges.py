"""Data and networks at the edge of what is defined: nothing within classes, G = 0, one output, few examples."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import Tensor, nn

import deepspectra as ds
from deepspectra.errors import CurvatureError, DeepSpectraError, LossError, OptionError
from deepspectra.jobs.layers_dataset import layer_dataset

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
    for one, other in zip(found.values(), expected.values(), strict=True):
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


class Dead(nn.Module):
    """A layer that no example passes, and one that is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.unused = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(4, 4)
        self.a.bias.data.fill_(-100)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)))


def zero() -> ds.Problem:
    """A problem whose outputs do not depend on the selected parameters: G = H = 0."""
    model = mlp()
    model[-1].weight.data.zero_()
    return ds.Problem(model, data(), parameters="0.*")


def visible(page: str) -> str:
    """What a reader sees of a page, without its charts."""
    return re.sub(r"<[^>]*>", " ", re.sub(r"<(script|style).*?</\1>", "", page, flags=re.DOTALL))


@pytest.mark.parametrize("make", [lambda: ds.Problem(mlp(), data(3)), lambda: ds.Problem(Dead(), data()), zero])
def test_an_analysis_of_what_is_partly_zero_has_a_page_without_nan(make, tmp_path):
    found = ds.analyze(make(), progress=False, num_probes=1, num_steps=4)
    page = visible(found.to_html(tmp_path / "page.html").read_text())
    assert not re.search(r"\b(nan|NaN|None|inf)\b", page + found.verdict)
    found.save(tmp_path)
    assert ds.load(tmp_path).verdict == found.verdict


def test_without_scatter_within_classes_the_bulk_of_g_is_zero_and_all_else_are_outliers():
    found = ds.analyze(ds.Problem(mlp(), data(3)), progress=False, num_probes=1, num_steps=4).dataset
    assert float(found["bulk_edge"].sel(operator="gauss_newton")) == 0
    assert int(found["num_outliers"].sel(operator="gauss_newton")) == 6  # N (C − 1)


def test_of_a_g_that_is_zero_an_analysis_has_no_pairs():
    found = ds.analyze(zero(), progress=False, num_probes=1, num_steps=4)
    assert set(found.vectors) == {"hessian"}
    assert bool(found.dataset["eigenvalue"].sel(operator="gauss_newton").isnull().all())
    assert float(found.dataset["trace"].sel(operator="gauss_newton")) == 0


def test_layers_of_a_dead_layer_say_that_it_is_zero():
    problem = ds.Problem(Dead(), data())
    found = ds.layers(problem)
    assert set(found) == {"a", "b"}
    assert not bool(found["a"].gradients.values.any())
    assert math.isnan(found["a"].gradients.stable_rank)
    assert found["a"].hessian.residual == 0
    assert float(found["b"].gradients.values[0]) > 0
    verdict = layer_dataset(found, problem).attrs["verdict"]
    assert "G is zero in a" in verdict
    assert "nan" not in verdict
    assert "–" in str(found)


def test_a_dead_layer_is_left_out_of_a_dissection():
    found = ds.dissect(ds.Problem(Dead(), data()))
    assert set(found) == {"b"}
    assert str(found)
    assert ds.dissect(zero()).whole is None


def test_a_gram_spectrum_of_zero_has_no_shares():
    text = str(ds.gram_spectrum(zero()))
    assert "–" in text
    assert "0 of 49" in text


@pytest.mark.parametrize("of", ["gradients", "errors"])
def test_regions_of_zero_are_open(of):
    found = ds.regions(zero(), of).whole
    assert found.moved("class") is None
    assert found.makes("class", "outliers") is None


def test_regions_of_a_hessian_need_gradients():
    with pytest.raises(CurvatureError, match="G is zero"):
        ds.regions(zero(), "hessian")


def test_ekfac_of_half_precision_is_near_that_of_double():
    model, (x, y) = mlp(), data()
    expected = ds.kronecker(ds.Problem(model, (x.double(), y), dtype=torch.float64), "ekfac").trace
    half = ds.Problem(model.half(), (x.half(), y))
    assert ds.kronecker(half, "ekfac").trace == pytest.approx(expected, rel=0.02)


class Tokens(nn.Module):
    """A language model of one table and one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.o = nn.Embedding(5, 6), nn.Linear(6, 5)

    def forward(self, t: Tensor) -> Tensor:
        return self.o(torch.tanh(self.e(t)))


def ragged() -> ds.Problem:
    """Batches of examples with 4 and with 6 tokens."""
    shapes = ((3, 4), (2, 6))
    batches = [(torch.randint(0, 5, shape), torch.randint(0, 5, shape)) for shape in shapes]
    return ds.Problem(Tokens(), batches, dtype=torch.float64)


def test_layers_of_unequal_numbers_of_tokens_keep_their_gradients():
    problem = ragged()
    found = ds.layers(problem, hessian=False)
    assert all(layer.errors is None for layer in found.values())
    assert found["o"].features is not None  # one row a token
    total = sum(float(layer.gradients.values.sum()) for layer in found.values())
    assert total == pytest.approx(float(ds.gram_spectrum(problem).values.sum()))


class Pooled(nn.Module):
    """A classifier of the mean over tokens: one row an example."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.o = nn.Linear(6, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.tanh(self.a(x)).mean(1))


def test_layers_of_unequal_numbers_of_positions_keep_what_has_one_size():
    batches = [(torch.randn(6, length, 6), torch.arange(6) % 3) for length in (4, 5)]
    found = ds.layers(ds.Problem(Pooled(), batches), hessian=False)
    assert found["a"].features is None
    assert found["a"].errors is None
    assert found["a"].khatri_rao is None
    assert found["o"].features is not None
    assert found["o"].khatri_rao is not None


@pytest.mark.parametrize("call", [lambda p: ds.regions(p, "errors"), lambda p: ds.class_means(p, "errors")])
def test_errors_of_unequal_numbers_of_positions_are_refused(call):
    with pytest.raises(CurvatureError, match="unequal numbers of positions"):
        call(ragged())


def test_outputs_without_a_class_dimension_are_those_of_one_column():
    model, (x, y) = mlp(1), data()
    y = (y > 0).float()
    flat = ds.Problem(nn.Sequential(model, nn.Flatten(0)), (x, y), loss=nn.BCEWithLogitsLoss())
    column = ds.Problem(model, (x, y[:, None]), loss=nn.BCEWithLogitsLoss())
    for kind in ("kfac", "ekfac", "optimal"):
        found, expected = (ds.kronecker(problem, kind).eigenvalues() for problem in (flat, column))
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-7 * float(expected[0]))
    assert ds.kronecker_quality(flat).kinds == ("kfac", "ekfac")
    found, expected = (ds.dissect(problem)["0.0" if problem is flat else "0"] for problem in (flat, column))
    assert torch.allclose(found.values, expected.values, rtol=1e-5)


class Alone(nn.Module):
    """A weight used in a way that is not understood, so that its examples pass alone."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(6) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.w.sin()).sum(1)


def test_outputs_without_a_class_dimension_of_examples_that_pass_alone():
    x, y = data()
    problem = ds.Problem(Alone(), (x, (y > 0).float()), loss=nn.BCEWithLogitsLoss(), dtype=torch.float64)
    operator = ds.GaussNewton(problem)
    dense = operator @ torch.eye(6, dtype=torch.float64)
    found = ds.kronecker(problem) @ torch.eye(6, dtype=torch.float64)  # of a vector the exact block
    assert torch.allclose(found, dense)

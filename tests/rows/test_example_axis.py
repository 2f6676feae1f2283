"""Where the examples of a batch lie: features and errors are right in any order, or refused with the reason.

Time first, graphs whose nodes are rows, batches sorted inside the model, ways chosen by values, parameters that few
examples use, tensors that are as long as the batch by chance. Truth is the dense G of plain autograd, row by row.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deepspectra as ds
from deepspectra.errors import CurvatureError
from example_orders import NETWORKS, classes, made, named, pair, random, same_values, truth, xy
from reference import error, projections


@pytest.mark.parametrize("name", NETWORKS)
def test_the_exact_spectrum_is_that_of_the_dense_matrix(name: str) -> None:
    problem, true = made(name)
    found = ds.gram_spectrum(problem)
    assert same_values(found.values, true.dense)
    total = float(true.dense.trace())
    for part, values in found.parts.items():  # so rows have their own labels
        projected = projections(true.weights, true.labels)[part] @ true.rows
        assert float(values.sum()) == pytest.approx(float(projected.square().sum()), abs=1e-10 * total)


@pytest.mark.parametrize("name", ["time first", "attention, time first"])
def test_time_first_is_batch_first_in_every_exact_way(name: str) -> None:
    torch.manual_seed(0)
    net, batches, _ = NETWORKS[name]()
    net = net.double().eval()

    def turned(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        return model(batch[0].T).transpose(0, 1).flatten(0, 1), batch[1].flatten()

    first = ds.Problem(net, batches)
    second = ds.Problem(net, [(x.T.contiguous(), y.T.contiguous()) for x, y in batches], forward=turned)
    one_by_one = zip(*(ds.layers(problem, hessian=False).values() for problem in (first, second)), strict=True)
    for one, two in one_by_one:
        assert one.name == two.name
        assert error(one.gradients.traces, two.gradients.traces) < 1e-10
        assert (one.features is None) == (two.features is None)
        if one.features is not None:
            assert error(one.features.traces, two.features.traces) < 1e-10
            assert one.collapse.nc1 == pytest.approx(two.collapse.nc1)
    for kind, sharing in (("kfac", "expand"), ("kfac", "reduce"), ("ekfac", "expand")):
        found = [ds.kronecker(problem, kind, sharing=sharing).eigenvalues() for problem in (first, second)]
        assert error(*found) < 1e-8
    for of in ("features", "errors"):
        found = [ds.class_means(problem, of=of).class_means for problem in (first, second)]
        assert error(*found) < 1e-10


@pytest.mark.parametrize(
    ("name", "plain"), [("sorted", nn.Identity()), ("sorted, first batch in order", nn.Identity())]
)
def test_a_network_that_sorts_is_the_one_that_does_not(name: str, plain: nn.Module) -> None:
    torch.manual_seed(0)
    net, batches, _ = NETWORKS[name]()
    net = net.double().eval()
    twin = ds.Problem(nn.Sequential(net.a, nn.Tanh(), net.o, plain), batches)
    problem = ds.Problem(net, batches)
    one_by_one = zip(*(ds.layers(each, hessian=False).values() for each in (problem, twin)), strict=True)
    for one, two in one_by_one:
        for what in ("features", "errors", "gradients"):
            mine, other = getattr(one, what), getattr(two, what)
            assert error(mine.values, other.values) < 1e-10
            assert error(mine.traces, other.traces) < 1e-10
        assert one.collapse.nc1 == pytest.approx(two.collapse.nc1)
    for kind in ("kfac", "ekfac", "cfac"):
        assert error(ds.kronecker(problem, kind).dense(), ds.kronecker(twin, kind).dense()) < 1e-10


def test_features_of_rows_that_belong_to_no_example_are_not_made_up() -> None:
    """A graph may have as many edges as nodes; then edges are no rows."""
    problem, _ = made("as many messages as nodes")
    layers = ds.layers(problem, hessian=False)
    assert all(layer.features is None and layer.collapse is None for layer in layers.values())
    with pytest.raises(CurvatureError, match="one row of features for each output row"):
        ds.collapse(problem)
    problem, _ = made("listed")
    with pytest.raises(CurvatureError, match="on some batches only"):
        ds.collapse(problem)


@pytest.mark.parametrize("name", ["sorted", "packed", "experts", "masked layer", "nodes"])
def test_single_precision_finds_the_same_order(name: str) -> None:
    problem, true = made(name)
    dense = true.dense
    found = ds.gram_spectrum(problem.to(torch.float32), dtype=torch.float32).values
    assert float(found[0]) == pytest.approx(float(torch.linalg.eigvalsh(dense)[-1]), rel=1e-4)
    assert float(found.sum()) == pytest.approx(float(dense.trace()), rel=1e-4)


class Stateful(nn.Module):
    """Makes a state in single precision, and so runs in no other; sorts its examples if asked."""

    def __init__(self, dtype: torch.dtype, *, sorting: bool) -> None:
        super().__init__()
        self.dtype, self.sorting = dtype, sorting
        self.cell, self.scale = nn.GRUCell(4, 3), nn.Parameter(torch.randn(3))
        self.out = nn.Linear(3, 3)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        order = x[:, 0].argsort() if self.sorting else torch.arange(len(x))
        state = torch.zeros(len(x), 3, dtype=self.dtype)
        for _ in range(2):
            state = self.cell(x[order], torch.sin(state * self.scale))
        return self.out(state)[order.argsort()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sorting", [False, True])
def test_networks_that_run_in_their_own_precision_only(dtype: torch.dtype, sorting: bool) -> None:
    x, y = xy(9)
    twin = Stateful(torch.float64, sorting=sorting)
    net = Stateful(dtype, sorting=sorting)
    net.load_state_dict({key: value.to(dtype) for key, value in twin.state_dict().items()})
    twin.load_state_dict(net.state_dict())
    x = x.to(dtype).double()
    dense = truth(twin, [(x, y)], pair).dense
    problem = ds.Problem(net, (x.to(dtype), y))
    rel = 1e-4 if dtype == torch.float32 else 0.05
    found = ds.gram_spectrum(problem, dtype=torch.float32).values
    assert float(found.sum()) == pytest.approx(float(dense.trace()), rel=rel)
    assert float(found[0]) == pytest.approx(float(torch.linalg.eigvalsh(dense)[-1]), rel=rel)
    assert ds.kronecker(problem, "ekfac").trace == pytest.approx(float(dense.trace()), rel=rel)


def test_links_that_come_with_the_batch_may_join_its_examples_at_last() -> None:
    class Linked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor, links: Tensor) -> Tensor:
            return self.out(torch.tanh(links @ self.a(x)))

    links = [torch.eye(5).double(), torch.rand(5, 5).double()]
    data = [{"x": random(5, 4), "links": some, "y": classes(5)} for some in links]
    net = Linked().double()
    problem = ds.Problem(net, data, forward=named("x", "links"))
    assert same_values(ds.gram_spectrum(problem).values, truth(net, data, named("x", "links")).dense)


def test_a_first_batch_of_one_sentence_does_not_tell_where_examples_lie() -> None:
    torch.manual_seed(0)
    net, batches, _ = NETWORKS["time first"]()

    def turned(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        return model(batch[0].T).transpose(0, 1).flatten(0, 1), batch[1].flatten()

    x, y = (part.T.contiguous() for part in batches[0])
    problem = ds.Problem(net.double().eval(), [(x[:1], y[:1]), (x[1:], y[1:])], forward=turned)
    assert same_values(ds.gram_spectrum(problem).values, ds.GaussNewton(problem).dense())

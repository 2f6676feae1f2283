"""Rows held as features and errors are the rows through the network."""

from __future__ import annotations

import pytest
import torch

import deepspectra as ds
from deepspectra.errors import MemoryBudgetError
from deepspectra.rows.gradients import GradientRows
from deepspectra.rows.held_rows import HeldRows
from example_orders import made, random
from nets import CASES, CLASSIFICATION, chunks, held
from reference import error


@pytest.mark.parametrize("name", ["time first, flat", "nodes", "sorted", "experts", "listed"])
def test_rows_held_are_rows_through_the_network(name: str) -> None:
    problem, _ = made(name)
    rows, through = HeldRows(problem), GradientRows(problem)
    order = torch.arange(len(rows.labels)) if rows.order is None else rows.order
    assert (rows.order is not None) == (name == "time first, flat")
    block, carried = random(problem.num_parameters, 2), random(*rows.weights.shape, 2)
    products = rows.apply(block), rows.transpose(carried)
    assert rows.captures.hold()
    assert error(rows.apply(block), products[0]) < 1e-12
    assert error(rows.transpose(carried), products[1]) < 1e-12
    assert error(products[0][order.argsort()], through.apply(block)) < 1e-12
    assert error(products[1], through.transpose(carried[order.argsort()])) < 1e-12


@pytest.mark.parametrize("name", CLASSIFICATION)
def test_products_with_held_rows_are_those_through_the_network(name: str) -> None:
    problem = CASES[name]().problem()
    rows, through = held(problem), GradientRows(problem)
    block = torch.randn(problem.num_parameters, 3, dtype=torch.float64)
    carried = torch.randn(*rows.weights.shape, 3, dtype=torch.float64)
    carried[::2, :, 1] = 0  # a column that lives on some examples only
    assert error(rows.apply(block), through.apply(block)) < 1e-12
    assert error(rows.transpose(carried), through.transpose(carried)) < 1e-12


def test_released_rows_go_through_the_network_again() -> None:
    problem = CASES["relu_mlp"]().problem()
    rows = held(problem)
    block = torch.randn(problem.num_parameters, 2, dtype=torch.float64)
    before = rows.apply(block)
    rows.captures.release()
    assert error(rows.apply(block), before) < 1e-12


def test_the_gram_matrix_does_not_depend_on_batches_nor_on_memory() -> None:
    """Held at once, or captured parameter by parameter; in batches of any size."""
    case = CASES["layernorm_gelu"]()
    whole = ds.gram_spectrum(case.problem())
    x, y = case.tensors
    ragged = ds.gram_spectrum(ds.Problem(case.model, chunks(x, y, [1, len(x) - 1])))
    assert error(ragged.values, whole.values) < 1e-12
    rows = HeldRows(case.problem())
    rows.captures.limit = 0
    assert not rows.captures.hold()
    rows.captures.limit = max(rows.captures.bytes_by_layer.values())
    assert len(rows.captures._groups()) > 1
    small = torch.linalg.eigvalsh(rows.gram()).flip(0)
    assert error(small[: len(whole.values)], whole.values) < 1e-12


def test_memory_is_refused_beforehand() -> None:
    problem = CASES["relu_mlp"]().problem()
    rows = HeldRows(problem)
    rows.captures.limit = 1
    with pytest.raises(MemoryBudgetError, match="features and errors of layer"):
        rows.gram()
    problem.memory = 1000
    with pytest.raises(MemoryBudgetError, match="60 rows"):
        HeldRows(problem).gram()


class Tagger(torch.nn.Module):
    """A class for each token, of which no other matters."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.hidden, self.head = torch.nn.Embedding(9, 6), torch.nn.Linear(6, 5), torch.nn.Linear(5, 3)

    def forward(self, tokens):
        return self.head(torch.tanh(self.hidden(self.table(tokens))))


def test_tokens_that_are_ignored_take_no_rows():
    torch.manual_seed(0)
    net, tokens = Tagger().double(), torch.randint(0, 9, (6, 20))
    labels = torch.full((6, 20), -100)
    labels[:, :3] = torch.arange(18).view(6, 3) % 3
    counts = labels >= 0
    padded = ds.Problem(net, (tokens, labels), batch_size=2, memory="900KB")
    alone = ds.Problem(net, (tokens[counts], labels[counts]))
    rows = HeldRows(padded)
    assert rows.num_reduced == len(rows.gram()) == 2 * 18
    v = torch.randn(36, 2, dtype=torch.float64)
    torch.testing.assert_close(rows.gram() @ v, rows.apply_reduced(rows.transpose_reduced(v)))
    found, expected = ds.gram_spectrum(padded), ds.gram_spectrum(alone)
    torch.testing.assert_close(found.values, expected.values)
    torch.testing.assert_close(found.traces, expected.traces)
    for of in ("gradients", "features"):
        mine, other = (ds.regions(one, of, num_groups=0) for one in (padded, alone))
        torch.testing.assert_close(mine.whole.values, other.whole.values, equal_nan=True)
    mine, other = (ds.layers(one, hessian=False) for one in (padded, alone))
    for name, layer in other.items():
        torch.testing.assert_close(mine[name].gradients.values, layer.gradients.values)
        assert float(mine[name].errors.values.sum()) == pytest.approx(float(layer.errors.values.sum()))

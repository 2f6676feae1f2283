"""What may be cut into batches and examples is found out; what may not stays whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import deepspectra as ds
from deepspectra import errors
from given import HALVES, UNEVEN, X, Y, mlp, refused, seeded_mlp
from nets import Case
from reference import Reference, error
from truth import truth


class Tagger(nn.Module):
    """Positions first: (T, B, 5) to (T, B, 3)."""

    def __init__(self, *, transformer: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix = nn.TransformerEncoderLayer(5, 1, 4, 0.0) if transformer else nn.GRU(5, 5)
        self.last = nn.Linear(5, 3)
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.mix(x)
        return self.last(mixed[0] if isinstance(mixed, tuple) else mixed)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("transformer", [False, True])
def test_sequences_whose_positions_come_first_are_never_cut(transformer: bool) -> None:
    x, y = torch.randn(40, 4, 5, dtype=torch.float64), torch.arange(160).view(40, 4) % 3
    model = Tagger(transformer=transformer)

    def loss() -> Tensor:
        return functional.cross_entropy(model(x).flatten(0, 1), y.flatten())

    expected = float(loss().detach())
    for data in ((x, y), [(x, y)]):
        problem = ds.Problem(model, data, memory="100KB")
        assert not problem.cuts
        assert problem.batches.num_batches == 1
        assert problem.loss() == pytest.approx(expected, rel=1e-12)
    problem = ds.Problem(model, (x, y))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        gradient = torch.autograd.grad(loss(), list(model.parameters()))
    assert error(problem.gradient(), torch.cat([part.flatten() for part in gradient])) < 1e-12
    assert ds.class_means(problem).class_means.isfinite().all()


class Nodes(nn.Module):
    """Rows are the nodes of one graph."""

    def __init__(self, size: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.o = nn.Linear(5, 4), nn.Linear(4, 3)
        self.register_buffer("adjacency", torch.eye(size) + torch.eye(size).roll(1, 0))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.adjacency @ self.o(torch.tanh(self.adjacency @ self.a(x)))


@pytest.mark.parametrize("size", [12, 700])
def test_nodes_of_a_graph_stay_together_and_in_order(size: int) -> None:
    """Of 700 the first 512 alone are no batch of the network's."""
    x, y = torch.randn(size, 5, dtype=torch.float64), torch.randint(3, (size,))
    model = Nodes(size)
    _, hessian = truth(model, lambda: functional.cross_entropy(model(x), y))
    for data in ((x, y), [(x, y)]):
        problem = ds.Problem(model, data)
        assert not problem.splits_by_class
        assert error(ds.Hessian(problem).dense(), hessian) < 1e-9


class Attending(nn.Module):
    """Each row attends to all others of its batch: a set."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.o = nn.Linear(5, 4).double(), nn.Linear(4, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.o(torch.tanh((h @ h.T).softmax(1) @ h))


def test_rows_that_influence_each_other_are_taken_as_the_one_batch_that_is_given() -> None:
    model = Attending()
    for data, options in (((X, UNEVEN), {}), ((X, UNEVEN), {"batch_size": 12}), (HALVES, {})):
        with pytest.raises(errors.DataError, match=r"influence each other.*data=\[\(x, y\)\]"):
            ds.Problem(model, data, **options)
    with pytest.warns(errors.FallbackWarning, match="taken as a whole"):
        problem = ds.Problem(model, [(X, UNEVEN)])
    _, hessian = truth(model, lambda: functional.cross_entropy(model(X), UNEVEN))
    assert error(ds.Hessian(problem).dense(), hessian) < 1e-9


def test_examples_that_come_first_are_cut_and_sorted_as_before() -> None:
    problem = ds.Problem(seeded_mlp(), HALVES)
    assert problem.cuts
    assert problem.splits_by_class
    assert torch.equal(torch.cat([y for _, y in problem.batches]), UNEVEN.sort().values)


def test_a_batch_size_that_would_cut_positions_is_refused() -> None:
    x, y = torch.randn(6, 4, 5, dtype=torch.float64), torch.arange(24).view(6, 4) % 3
    with pytest.raises(errors.DataError, match=r"second dimension.*batch_size="):
        ds.Problem(Tagger(transformer=False), (x, y), batch_size=2)


def test_a_first_batch_of_one_example_hides_no_influence() -> None:
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = seeded_mlp()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x - x.mean(0))

    with pytest.raises(errors.DataError, match="influence each other"):
        ds.Problem(Centred(), [(X[:1], UNEVEN[:1]), (X[1:], UNEVEN[1:])])


class OverBatch(nn.Module):
    """Attention of each example to all others of its batch."""

    def forward(self, x: Tensor) -> Tensor:
        return (x @ x.T).softmax(-1) @ x


@pytest.mark.parametrize("batch_size", [5, 12])
def test_examples_that_influence_each_other(batch_size: int) -> None:
    without_statistics = mlp(nn.BatchNorm1d(6, track_running_stats=False)).eval()
    caught = refused(
        errors.DataError,
        "influence each other.*batch_size",
        lambda: ds.Problem(without_statistics, (X, Y), batch_size=batch_size),
    )
    assert "'1'" in str(caught), "the module is named"
    assert "track_running_stats" in str(caught)
    refused(
        errors.DataError,
        "influence each other",
        lambda: ds.Problem(mlp(OverBatch()), (X, Y), batch_size=batch_size),
    )


def test_examples_in_a_fixed_order_that_labels_would_sort() -> None:
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()
            self.register_buffer("neighbours", torch.eye(12).roll(1, 0).double())

        def forward(self, x: Tensor) -> Tensor:
            return self.neighbours @ self.inner(x)

    graph = Graph()
    expected = Reference(Case(graph, [(X, Y)])).hessian
    for data in ((X, Y), [(X, Y)]):
        problem = ds.Problem(graph, data)
        assert not problem.cuts
        assert error(ds.Hessian(problem).dense(), expected) < 1e-9


def test_positions_that_come_before_examples_may_influence_each_other() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.last = nn.RNN(5, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.rnn(x)[0].flip(0).cumsum(0))

    x, y = torch.randn(6, 4, 5, dtype=torch.float64), torch.arange(24).view(6, 4) % 3
    assert ds.Problem(Recurrent().double(), [(x, y)]).num_examples == 24

"""Graphs are kept while they fit, and never change a number."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import deepspectra as ds
from deepspectra import errors, zoo
from deepspectra.derivatives.kept_graphs import Allowance, Graphs
from deepspectra.errors import MemoryBudgetError
from given import X, Y, mlp
from nets import OPERATORS, digits_problem
from reference import case_and_reference, error

RTOL = 1e-9


def test_a_graph_that_does_not_fit_says_what_to_lower() -> None:
    model = nn.Sequential(nn.Linear(5, 64), nn.Tanh(), nn.Linear(64, 3)).double()
    for operator in (ds.Hessian, ds.GaussNewton):
        problem = ds.Problem(model, (X, Y), memory="1KB")
        with pytest.raises(errors.MemoryBudgetError, match=r"batch_size.*memory") as caught:
            operator(problem) @ torch.ones(problem.num_parameters, dtype=torch.float64)
        assert isinstance(caught.value, MemoryError)


@pytest.mark.parametrize("name", ["relu_mlp", "layernorm_gelu", "attention_function"])
def test_a_small_memory_budget_changes_the_time_and_not_the_product(name: str) -> None:
    """Graphs that do not fit are made anew; what cannot work at all is refused."""
    case, ref = case_and_reference(name)
    V = torch.randn(ref.num_parameters, 6, dtype=torch.float64)
    worked = 0
    for memory in (30_000, 100_000, 300_000, "1MiB", "1GiB"):
        try:
            problem = case.problem(memory=memory)
            found = {kind: operator(problem) @ V for kind, operator in OPERATORS.items()}
        except MemoryBudgetError:
            assert not worked, "what fits less memory fits more"
            continue
        worked += 1
        for kind, product in found.items():
            assert error(product, getattr(ref, kind) @ V) < RTOL, (memory, kind)
    assert worked >= 2


USES: dict[str, Callable[[ds.Problem], object]] = {
    **{kind: lambda p, make=make: make(p) @ torch.ones(p.num_parameters) for kind, make in OPERATORS.items()},
    "eigenpairs": lambda p: ds.eigenpairs(ds.Hessian(p), 2, rtol=1e-2),
    "density": lambda p: ds.density(ds.GaussNewton(p), num_probes=2),
    "class means": ds.class_means,
    "principal subspace": ds.principal_subspace,
    "parts": lambda p: [part @ torch.ones(p.num_parameters) for part in ds.decompose(p, hold=True).values()],
    "attribution": lambda p: ds.attribute(ds.Hessian(p), ds.decompose(p, effects="two-way"), max_products=3),
    "exact spectrum": ds.gram_spectrum,
    "layers": ds.layers,
    "regions": lambda p: ds.regions(p, num_groups=0),
    "factors": ds.kronecker,
}


@pytest.mark.filterwarnings("ignore::deepspectra.errors.DeepSpectraWarning")
@pytest.mark.parametrize("use", USES)
def test_a_problem_that_is_dropped_gives_its_memory_back_at_once(use: str) -> None:
    """Kept graphs, data and the copy of the model die with the last reference: no cycle holds them."""
    data = zoo.load("digits", per_class=4)
    model = zoo.mlp((1, 8, 8), 10, widths=(6,))
    ds.Hessian(ds.Problem(model, data)).dense()  # PyTorch loads its compiler and keeps this call's frames
    problem = ds.Problem(model, data)
    kept = weakref.ref(problem.model)
    gc.collect()
    gc.disable()
    try:
        result = USES[use](problem)
        del problem, result
        assert kept() is None
    finally:
        gc.enable()


@pytest.fixture(scope="module")
def problem():
    return digits_problem()


def test_a_sample_and_all_share_the_memory_for_graphs(problem):
    H = ds.Hessian(problem)
    H @ torch.ones(problem.num_parameters, dtype=torch.float64)
    kept = H.products.graphs.num_bytes()
    assert kept > 0
    few = H.sampled(torch.Generator().manual_seed(0), 100)
    few @ torch.ones(problem.num_parameters, dtype=torch.float64)
    more, allowance = few.products.graphs.num_bytes(), H.products.allowance
    assert more > 0
    assert H.products.graphs.num_bytes() == kept
    assert allowance.room() == allowance.size - kept - more
    assert allowance.reserve(allowance.size)
    assert H.products.graphs.num_bytes() == few.products.graphs.num_bytes() == 0
    few @ torch.ones(problem.num_parameters, dtype=torch.float64)
    assert few.products.graphs.num_bytes() == 0
    allowance.give_back(allowance.size)
    few @ torch.ones(problem.num_parameters, dtype=torch.float64)
    assert allowance.room() < allowance.size
    del few
    assert allowance.room() == allowance.size


def test_what_is_reserved_is_not_there_for_graphs_until_it_is_given_back() -> None:
    allowance = Allowance(100)
    assert allowance.reserve(60)
    assert allowance.room() == 40
    assert not allowance.reserve(41)
    with allowance.lent(40) as granted:
        assert granted
        assert allowance.room() == 0
        with allowance.lent(1) as more:
            assert not more
        assert allowance.room() == 0, "what was not granted is not given back"
    assert allowance.room() == 40
    allowance.give_back(60)
    assert allowance.room() == 100


def test_what_stays_for_later_goes_when_its_room_is_needed() -> None:
    allowance, spare = Allowance(100), ["features"]
    allowance.leave(spare, 50)
    assert allowance.spare is spare
    assert allowance.reserve(50)
    assert allowance.spare is spare
    assert allowance.reserve(1)
    assert allowance.spare is None


def test_graphs_that_fit_are_built_once_and_dropped_for_what_is_reserved() -> None:
    problem, built = ds.Problem(mlp(), [(X[:6], Y[:6]), (X[6:], Y[6:])], memory="1MB"), []

    def build(batch: Any) -> torch.Tensor:
        built.append(len(batch[1]))
        return torch.zeros(1000, dtype=torch.float64)

    graphs = Graphs(problem)
    for _ in range(2):
        assert [index for index, _ in graphs.each("a kind", build)] == [0, 1]
    assert built == [6, 6]
    assert graphs.num_bytes() == 2 * 8000
    assert graphs.largest("a kind") == 8000
    assert graphs.allowance.reserve(graphs.allowance.size)
    assert graphs.num_bytes() == 0
    list(graphs.each("a kind", build))
    assert built == [6, 6, 6, 6]
    assert graphs.num_bytes() == 0


def test_a_graph_that_is_wanted_once_is_not_kept_and_its_size_is_known() -> None:
    graphs = Graphs(ds.Problem(mlp(), (X, Y)))
    assert len(graphs.once("a kind", torch.zeros, 100)) == 100
    assert graphs.num_bytes() == 0
    assert graphs.largest("a kind") == 400
    graphs.once("a kind", torch.zeros, 10)
    assert graphs.largest("a kind") == 400

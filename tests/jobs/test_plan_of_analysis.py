"""The stages of an analysis are planned as they run, and hold what they hold."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn

import deepspectra as ds
from deepspectra.errors import ConvergenceWarning, MemoryBudgetError
from deepspectra.jobs.effort import Effort
from deepspectra.jobs.estimate import plan_of_analysis
from deepspectra.jobs.pace import Pace
from deepspectra.jobs.plan_of_analysis import most_products, pairs_stage, ranged, typical_products
from nets import classified
from spectra import diagonal


def test_means_of_batches_that_are_not_split_by_class_are_planned_pass_by_pass() -> None:
    """Of C classes and C² cells each takes a backward pass of its own, where else all classes share them."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 10))
    data, effort = (torch.randn(100, 5), torch.arange(100) % 10), Effort("quick", 0, 3e-2, None, 2, 4, False, 0)
    ratios = []
    for forward in (None, lambda model, batch: (model(batch[0]), batch[1])):
        plan = plan_of_analysis(ds.Problem(net, [data], forward=forward), effort, 3, 10)
        seconds = {stage.name: stage.seconds for stage in plan.stages}
        ratios.append(seconds["averaging: cross-class means"] / seconds["averaging: class means"])
    assert ratios == pytest.approx([7 / 2, 52 / 6.5])


def test_products_of_pairs_grow_with_their_number_and_end_with_the_space() -> None:
    assert [typical_products(num, 10_000) for num in (1, 10, 40)] == [15, 35, 110]
    assert [most_products(num, 10_000) for num in (1, 10, 40)] == [300, 300, 800]
    assert typical_products(40, 30) == most_products(40, 30) == 30


@pytest.mark.parametrize("gap", [True, False])
def test_pairs_take_no_more_products_than_are_planned_at_most(gap: bool) -> None:
    """With a gap behind them about the typical number; without one they are given up."""
    torch.manual_seed(0)
    problem = ds.Problem(nn.Linear(199, 100), (torch.randn(400, 199), torch.arange(400) % 100))
    pace, size = Pace(problem), problem.num_parameters
    stage = next(ranged(lambda counted: iter([pairs_stage(pace, "hessian", 7, counted)])))
    assert (stage.products, stage.products_at_most) == (typical_products(7, size), most_products(7, size))
    assert stage.seconds_at_most > stage.seconds
    assert stage.bytes_at_most > stage.whole_bytes
    values = torch.linspace(1, 2, size)
    if gap:
        values[:7] += torch.arange(3, 10)
    with contextlib.nullcontext() if gap else pytest.warns(ConvergenceWarning):
        found = ds.eigenpairs(diagonal(values), 7, rtol=1e-5)
    assert found.converged == gap
    if gap:
        assert found.num_products <= 2 * stage.products
    else:
        assert 2 * stage.products < found.num_products <= stage.products_at_most


def test_a_plan_says_what_it_takes_at_most() -> None:
    plan = ds.estimate(classified(200), effort="quick")
    slow = [stage.name for stage in plan.stages if stage.products_at_most > stage.products]
    assert slow == ["top eigenpairs of H"]
    assert plan.products_at_most == plan.num_products + max(s.products_at_most - s.products for s in plan.stages)
    assert plan.seconds_at_most > plan.total_seconds
    kept = {stage.name: stage.bytes_at_most - stage.whole_bytes for stage in plan.stages}
    assert kept["averaging: class means"] > 0  # the basis stays until knock-outs
    assert kept["density of H"] == 0
    line = next(line for line in str(plan).splitlines() if line.startswith("top eigenpairs of H"))
    assert f"{plan.stages[1].products} to {plan.stages[1].products_at_most}" in line
    assert "Where the spectrum has no gaps behind the top eigenpairs, at most" in plan.told


def test_pairs_are_planned_beside_their_basis_and_graphs_only_where_those_fit_too() -> None:
    for memory, stay in (("1GB", True), (10_800, False)):
        pace = Pace(classified(memory=memory))
        graphs, room = pace.graphs("hessian"), pace.problem.memory // 4 // pace.row
        assert graphs <= pace.problem.memory // 2
        stage = pairs_stage(pace, "hessian", 1, typical_products)
        rows = min(stage.products, room)
        beside = graphs if stay else 0
        assert stage.num_bytes == max(graphs + rows * pace.row, beside + (rows + 1) * pace.row)


@pytest.mark.filterwarnings("ignore::deepspectra.errors.ConvergenceWarning")
def test_means_that_are_not_held_and_knock_outs_without_room_are_planned_as_they_run() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(30, 40), nn.Tanh(), nn.Linear(40, 20))
    data = (torch.randn(200, 30), torch.arange(200) % 20)
    vector = 4 * sum(p.numel() for p in net.parameters())
    effort = Effort("quick", 0, 3e-2, None, 2, 4, False, 0)
    for num_vectors, held, fits in ((2000, True, True), (150, False, True), (60, False, False)):
        problem = ds.Problem(net, data, memory=num_vectors * vector)
        plan = {stage.name: stage for stage in plan_of_analysis(problem, effort, 2, 20).stages}
        assert ("map of the means" in plan) == held == ds.decompose(problem, effects="two-way").holds_means()
        assert plan["top eigenpairs of H"].fits
        assert plan["attribution of H"].fits == fits
        with contextlib.nullcontext() if fits else pytest.raises(MemoryBudgetError, match="knock-outs"):
            hessian, parts = ds.Hessian(problem), ds.decompose(problem, effects="two-way")
            ds.attribute(hessian, parts, pairs=ds.eigenpairs(hessian, 2, rtol=3e-2), max_products=1)

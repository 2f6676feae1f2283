"""The stages of an analysis are planned as they run, and hold what they hold."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn

import deepspectra as ds
from deepspectra.errors import MemoryBudgetError
from deepspectra.jobs.effort import Effort
from deepspectra.jobs.estimate import plan_of_analysis
from deepspectra.jobs.pace import Pace
from deepspectra.jobs.plan_of_analysis import num_products_of, pairs_stage
from nets import classified


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
    assert [num_products_of(num, 10_000) for num in (1, 10, 40)] == [15, 35, 110]
    assert num_products_of(40, 30) == 30


def test_pairs_are_planned_beside_their_basis_and_graphs_only_where_those_fit_too() -> None:
    for memory, stay in (("1GB", True), (10_800, False)):
        pace = Pace(classified(memory=memory))
        graphs, room = pace.graphs("hessian"), pace.problem.memory // 4 // pace.row
        assert graphs <= pace.problem.memory // 2
        stage = pairs_stage(pace, "hessian", 1)
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

"""What is measured on one batch: bytes and seconds of all batches, and which layers bend."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import deepspectra as ds
from deepspectra.derivatives.products import products_of
from deepspectra.jobs.pace import Pace
from deepspectra.jobs.plan_of_analysis import pairs_stage, typical_products
from deepspectra.problem.parallel import Group
from deepspectra.rows.captures import captures_of
from nets import language_model


def problem_of(activation: type[nn.Module], num: int = 60, batch_size: int = 20) -> ds.Problem:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), activation(), nn.Linear(8, 3))
    return ds.Problem(net, (torch.randn(num, 5), torch.arange(num) % 3), batch_size=batch_size)


def test_graphs_of_all_batches_are_foreseen_from_one() -> None:
    problem = problem_of(nn.Tanh)
    foreseen = Pace(problem).graphs("hessian")
    _ = ds.Hessian(problem) @ torch.ones(problem.num_parameters)
    assert foreseen == products_of(problem).graphs.num_bytes() > 0


def test_features_and_errors_of_all_batches_are_foreseen_from_some() -> None:
    problem = problem_of(nn.Tanh)
    pace = Pace(problem)
    captures = captures_of(problem)
    assert captures.hold()
    held = {name: sum(use.num_bytes for uses in batches for use in uses) for name, batches in captures.by_layer()}
    assert {name: layer.num_bytes for name, layer in pace.rows.layers.items()} == pytest.approx(held)
    assert [layer.size for layer in pace.rows.layers.values()] == [48, 27]


def test_layers_bend_where_the_outputs_are_not_linear_in_them() -> None:
    assert Pace(problem_of(nn.ReLU)).bent == {}
    assert list(Pace(problem_of(nn.Tanh)).bent) == ["0"]


def test_products_that_do_not_fit_pay_for_their_graphs() -> None:
    problem = problem_of(nn.Tanh)
    pace = Pace(problem)
    free = pace.product("hessian")
    problem.memory = 1
    assert pace.product("hessian") == pytest.approx(free + pace.building("hessian"))


def test_processes_share_out_a_basis() -> None:
    problem = problem_of(nn.Tanh)
    problem.memory = 4 * 4 * problem.num_parameters * 9  # of which a basis has a quarter: 9 vectors of float32
    pace = Pace(problem)
    alone = pairs_stage(pace, "hessian", 4, typical_products)
    assert not alone.fits
    problem.batches.group = Group(size=2)
    assert pace.vector == 4 * 75
    assert pace.row == 4 * 38
    assert pairs_stage(pace, "hessian", 4, typical_products).fits


def test_timing_a_step_takes_no_more_than_a_basis_may(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_of(nn.Tanh)
    problem.memory = 4 * 3 * 4 * problem.num_parameters  # 3 vectors
    timed = []
    monkeypatch.setattr(torch.Tensor, "new_ones", lambda one, *size: timed.append(size) or torch.ones(*size))
    assert Pace(problem).step > 0
    assert timed == [(3, 75)]


def test_a_batch_by_names_is_measured() -> None:
    pace = Pace(language_model().problem())
    assert pace.gradient > 0
    assert pace.graphs("gauss_newton") > 0
    assert pace.step > 0

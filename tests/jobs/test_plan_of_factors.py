"""Judging Kronecker factors is planned block by block, as it runs, and what it would refuse does not fit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import deepspectra as ds
from deepspectra.errors import CurvatureError, MemoryBudgetError
from deepspectra.jobs.pace import Pace
from nets import classified, tied_tokens

KINDS = ("kfac", "ekfac", "cfac")


def judged(plan: ds.Plan) -> dict[str, float]:
    """Seconds of the blocks of a plan."""
    lead = "Kronecker factors of "
    return {one.name.removeprefix(lead): one.seconds for one in plan.stages if one.name.startswith(lead)}


def test_the_blocks_of_a_plan_are_those_that_are_judged() -> None:
    plan = ds.estimate(classified(), "layers", kronecker=KINDS)
    found = ds.layers(classified(), kronecker=KINDS)
    assert found.kronecker is not None
    assert set(judged(plan)) == set(found.kronecker)
    assert all(seconds > 0 for seconds in judged(plan).values())
    assert not judged(ds.estimate(classified(), "layers"))


def test_classes_of_their_own_factors_cost_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of "cfac" no eigenvectors have a closed form."""
    monkeypatch.setattr(Pace, "timed", lambda *_: 1e-3)
    plain, classed = (ds.estimate(classified(300), "layers", kronecker=kinds) for kinds in (("kfac",), ("cfac",)))
    assert sum(judged(classed).values()) > sum(judged(plain).values())
    sizes = [{one.name: one.num_bytes for one in plan.stages}["Kronecker factors"] for plan in (plain, classed)]
    assert sizes[1] == 3 * sizes[0]


def test_factors_that_do_not_fit_are_planned_so_and_refused() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1000, 2), nn.Tanh(), nn.Linear(2, 3))
    problem = ds.Problem(net, (torch.randn(20, 1000), torch.arange(20) % 3), memory="30MB")
    assert ds.estimate(problem, "layers").fits
    plan = ds.estimate(problem, "layers", kronecker=("cfac",))
    assert [one.name for one in plan.stages if not one.fits] == ["Kronecker factors"]
    with pytest.raises(MemoryBudgetError, match="Kronecker factors"):
        ds.layers(problem, kronecker=("cfac",))


def test_a_network_without_factors_has_the_plan_of_the_rest() -> None:
    problem = tied_tokens()
    plans = [ds.estimate(problem, "layers", kronecker=kinds) for kinds in ((), ("kfac",))]
    assert [one.name for one in plans[0].stages] == [one.name for one in plans[1].stages]
    with pytest.raises(CurvatureError, match="used in different ways"):
        ds.layers(problem, kronecker=("kfac",))

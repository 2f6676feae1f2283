"""What looks at features and errors is planned step by step, and what it would refuse does not fit the plan."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import deepspectra as ds
from deepspectra.analysis.regions import OF as KINDS_OF_REGIONS
from deepspectra.errors import CurvatureError, MemoryBudgetError, OptionError
from nets import classified, tied_tokens


class _Once(torch.autograd.Function):
    """x², whose slope knows no slope of its own."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, error: torch.Tensor) -> torch.Tensor:
        return 2 * ctx.saved_tensors[0] * error


class OnceOnly(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Once.apply(x)


def wide(memory: str) -> ds.Problem:
    """Few rows of many features."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3000, 2), nn.Tanh(), nn.Linear(2, 3))
    return ds.Problem(net, (torch.randn(20, 3000), torch.arange(20) % 3), memory=memory)


@pytest.mark.parametrize(
    ("job", "run", "memory"),
    [("layers", ds.layers, 50_000), ("regions", ds.regions, 500_000)],  # Gram matrices take 55 and 2,880 kB
)
def test_what_a_plan_calls_too_large_a_job_refuses_and_with_fewer_examples_it_runs(
    job: str, run: Any, memory: int
) -> None:
    large = ds.estimate(classified(150, memory=memory), job)
    assert not large.fits
    with pytest.raises(MemoryBudgetError):
        run(classified(150, memory=memory))
    few = int(large.advice.rpartition("--limit ")[2].rstrip("."))
    assert ds.estimate(classified(few, memory=memory), job).fits
    run(classified(few, memory=memory))


@pytest.mark.parametrize("kind", KINDS_OF_REGIONS)
def test_regions_fit_a_plan_where_their_rows_do(kind: str) -> None:
    plan = ds.estimate(wide("400kB"), "regions", of=[kind], num_groups=0)
    assert plan.fits == (kind == "errors")
    if plan.fits:
        ds.regions(wide("400kB"), kind, num_groups=0)
    else:
        with pytest.raises(MemoryBudgetError):
            ds.regions(wide("400kB"), kind, num_groups=0)


def test_tied_weights_which_have_no_kronecker_factors_are_planned_where_none_are_needed() -> None:
    problem = tied_tokens()
    for job in ("layers", "regions"):
        assert ds.estimate(problem, job).fits
    with pytest.raises(CurvatureError, match="used in different ways"):
        ds.estimate(problem, "compare")
    assert "exact spectrum of G" in [one.name for one in ds.estimate(problem, "analyze", "quick").stages]


def test_one_kind_of_rows_may_be_named_and_an_unknown_one_is_refused() -> None:
    one, several = (ds.estimate(classified(12), "regions", of=of) for of in ("gradients", ["gradients"]))
    assert [stage.name for stage in one.stages] == [stage.name for stage in several.stages]
    for of in ("gradient", ["gradients", "inputs"]):
        with pytest.raises(OptionError, match=r"of='(gradient|inputs)'; it is one of"):
            ds.estimate(classified(12), "regions", of=of)


def test_kronecker_factors_that_do_not_fit_are_foreseen() -> None:
    plan = ds.estimate(wide("100MB"), "compare")
    assert [one.name for one in plan.stages if not one.fits] == ["Kronecker factors"]
    with pytest.raises(MemoryBudgetError, match="Kronecker factors"):
        ds.compare(wide("100MB"), wide("100MB"))


@pytest.mark.parametrize("job", ["layers", "regions", "compare"])
def test_errors_of_many_classes_are_foreseen_and_not_computed(job: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepspectra.jobs.pace.captures_of", None)
    net = nn.Sequential(nn.Embedding(400, 2), nn.Linear(2, 400))
    tokens = torch.randint(0, 400, (4, 6), generator=torch.Generator().manual_seed(0))
    problem = ds.Problem(net, (tokens, tokens), memory="24MB")  # 6 tokens x 399 scalars x 6 positions x 400: 23 MB
    plan = ds.estimate(problem, job)
    assert [one.name for one in plan.stages] == ["features and errors"]
    assert not plan.fits
    assert plan.peak_bytes == 4 * 6 * 399 * 6 * 400 * 4


def test_layers_without_second_derivatives_have_a_plan_without_blocks_of_h() -> None:
    plan = ds.estimate(classified(activation=OnceOnly()), "layers")
    assert [one.name for one in plan.stages] == [
        "features and errors",
        "averages of rows",
        "spectra of 0",
        "spectra of 2",
    ]


def test_every_step_of_regions_that_is_announced_was_foreseen():
    problem = classified(12)
    plan = ds.estimate(problem, "regions", num_groups=2)
    for of in KINDS_OF_REGIONS:
        announced = []
        ds.regions(problem, of, num_groups=2, progress=lambda _, __, name, names=announced: names.append(name))
        assert set(announced) <= set(plan.work(of)), of
        assert all(seconds > 0 for seconds in plan.work(of).values())

"""What a job will take is told from one batch: its stages are those that run, and what does not fit is refused."""

from __future__ import annotations

import contextlib
import functools
import gc
import io
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import deepspectra as ds
from deepspectra.cli import app
from deepspectra.errors import (
    CurvatureError,
    DataError,
    LossError,
    MemoryBudgetError,
    OptionError,
)
from deepspectra.jobs import stages
from deepspectra.jobs.effort import EFFORTS
from deepspectra.jobs.estimate import JOBS, foreseen
from deepspectra.jobs.estimate import _advice as advice_of
from deepspectra.jobs.pace import Stage
from deepspectra.jobs.sweep_cell import _forget_peak, _peak
from deepspectra.operators.base import Operator
from nets import classified, trained_on_digits

UNFORESEEN = {"checking derivatives", "measuring one batch", "class structure"}  # once, small


def regression(num: int) -> ds.Problem:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2))
    return ds.Problem(net, (torch.randn(num, 5), torch.randn(num, 2)), loss="mse")


@pytest.mark.parametrize(
    ("make", "level"),
    [
        (classified, {}),
        (classified, {"exact_rows": 10}),
        (classified, {"exact_rows": 10, "dense": 0, "num_steps": 3}),
        (lambda: regression(20), {}),
    ],
    ids=["exact", "G by products", "drawn", "no classes"],
)
def test_the_stages_of_a_plan_are_those_that_run(
    make: Any, level: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(EFFORTS, "quick", EFFORTS["quick"]._replace(**level))
    plan = ds.estimate(make(), effort="quick")
    costs = ds.analyze(make(), effort="quick", progress=False).dataset
    ran = [name for name in costs.coords["stage"].values.tolist() if name not in UNFORESEEN]
    assert [one.name for one in plan.stages if one.name not in UNFORESEEN] == ran
    products = dict(zip(costs.coords["stage"].values.tolist(), costs["cost_products"].values.tolist(), strict=True))
    densities = [one for one in plan.stages if one.name.startswith("density")]
    assert densities
    assert {one.name: one.products for one in densities} == {one.name: products[one.name] for one in densities}


def test_an_analysis_tells_the_plan_that_an_estimate_gives(capsys: pytest.CaptureFixture[str]) -> None:
    ds.analyze(classified(), effort="quick", num_probes=2, num_steps=3)
    told = " ".join(capsys.readouterr().err.split())
    plan = ds.estimate(classified(), effort="quick")
    assert plan.what in plan.told
    assert plan.what.split("density")[0] in told  # all eigenvalues there, 2 × 3 products here
    assert "beside model and data, foreseen from one batch" in told


def test_of_test_data_the_stages_that_run_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of G is known there, too, and nothing is averaged or knocked out."""
    plans = []
    real = stages._plan_of
    monkeypatch.setattr(stages, "_plan_of", lambda found: plans.append(real(found)) or plans[-1])
    with contextlib.redirect_stderr(io.StringIO()):
        costs = ds.analyze(classified(), test=classified(30), effort="quick").dataset
    ran = [name for name in costs.coords["stage"].values.tolist() if name.endswith(" on test data")]
    foreseen = [one.name for one in plans[1].stages if not one.name.startswith("class structure")]
    assert foreseen == ran
    assert "exact spectrum of G on test data" in ran
    assert "knock-outs" in plans[0].what
    assert "knock-outs" not in plans[1].what


def test_of_many_classes_groups_are_planned_as_they_are_analysed() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 101))
    plan = ds.estimate(ds.Problem(net, (torch.randn(101, 4), torch.arange(101))), effort="quick")
    assert "13 top eigenpairs" in plan.what  # of 10 groups
    vectors = {one.name: one.num_bytes for one in plan.stages}["averaging: class means"]
    assert vectors == 10 * 4 * sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("job", ["layers", "regions"])
def test_what_a_job_refuses_has_no_plan_and_stops_none(job: str) -> None:
    one = ds.Problem(nn.Linear(4, 1), (torch.randn(6, 4), torch.zeros(6, dtype=torch.long)))
    for problem in (regression(6), one):
        with pytest.raises(LossError):
            ds.estimate(problem, job)
        assert foreseen(ds.estimate, problem, job) is None


def test_a_command_begins_where_nothing_can_be_foreseen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: Any, **__: Any) -> None:
        raise CurvatureError("no plan")

    def begins(*_: Any, **__: Any) -> None:
        raise DataError("begun")

    monkeypatch.setattr("deepspectra.cli.estimate", refuses)
    monkeypatch.setattr("deepspectra.cli.layers", begins)
    words = ["layers", "--model", "mlp-small", "--per-class", "3", "--epochs", "0", "--out", str(tmp_path / "out")]
    found = CliRunner().invoke(app, words)
    assert str(found.exception) == "begun"


@pytest.mark.parametrize("job", JOBS)
def test_every_job_has_a_plan(job: str) -> None:
    plan = ds.estimate(classified(), job, effort="quick")
    assert plan.fits
    assert all(one.seconds >= 0 and one.num_bytes >= 0 for one in plan.stages)
    assert plan.total_seconds == sum(one.seconds for one in plan.stages) > 0
    table = plan.to_dataframe()
    at_most = ["products_at_most", "seconds_at_most", "bytes_at_most"]
    assert list(table.columns) == ["stage", "products", "seconds", "bytes", "fits", *at_most]
    assert (table.seconds_at_most >= table.seconds).all()
    assert len(table) == len(plan.stages)
    assert "in all" in str(plan)
    assert "<pre" in plan._repr_html_()


@pytest.mark.parametrize(
    ("job", "effort", "stage", "advice"),
    [
        ("regions", "", Stage("cubes", 0, 80, 0, grows=3), "Ten seconds or less with --limit 29."),  # a half, rounded
        ("layers", "", Stage("moments", 0, 80, 0), "Ten seconds or less with --limit 7."),  # an eighth
        ("layers", "", Stage("moments", 0, 8000, 0), "For less: --limit 3 or more."),  # as many as classes
        (
            "analyze",
            "standard",
            Stage("pairs", 0, 8000, 0),
            "For less: --effort quick, or --limit for fewer examples.",
        ),
        ("analyze", "quick", Stage("pairs", 0, 8000, 0), "For less: --limit for fewer examples."),
    ],
)
def test_advice_is_what_would_help(job: str, effort: str, stage: Stage, advice: str) -> None:
    assert advice_of(classified(), job, effort, [stage]) == advice


def test_advice_where_a_stage_may_have_nothing() -> None:
    told = advice_of(classified(), "analyze", "quick", [Stage("pairs", 0, 1, 9, limit=0)])
    assert re.match(r"It does not fit: \S+ MB for pairs, which may have 0 MB of the ", told)
    assert told.endswith("Raise memory, lower batch_size, or look at part of the network by parameters=.")


def test_errors_of_networks_without_classes_are_all_outputs() -> None:
    plan, found = ds.estimate(regression(20), "compare"), ds.compare(regression(20), regression(20))
    assert plan.fits
    assert set(plan.work()) == {"0", "2"} == set(found)


def test_pairs_that_do_not_fit_are_told_and_refused() -> None:
    tight = classified(memory=12_000)
    plan = ds.estimate(tight, effort="quick")
    assert not plan.fits
    assert "top eigenpairs of H" in plan.advice
    with pytest.raises(MemoryBudgetError):
        ds.analyze(tight, effort="quick", progress=False)


def test_a_basis_in_bfloat16_or_beside_on_the_host_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = classified()
    exact = ds.estimate(problem, "compare").stages[-1]
    problem.basis = torch.bfloat16
    rounded = ds.estimate(problem, "compare").stages[-1]
    assert rounded.products == exact.products + 2 * 2 * problem.num_classes  # residuals of both are measured
    tight = classified(memory=12_000)
    assert not ds.estimate(tight, "compare").stages[-1].fits
    monkeypatch.setattr(Operator, "host_memory", lambda _: 10**6)
    plan = ds.estimate(tight, "compare")
    assert plan.stages[-1].fits
    assert plan.stages[-1].host_bytes > 0
    assert "lie in host memory" in str(plan)


def test_unknown_jobs_are_refused() -> None:
    with pytest.raises(OptionError, match="'analyze', 'layers', 'regions', 'compare'"):
        ds.estimate(classified(), "sweep")


def test_the_command_trains_nothing_writes_nothing_and_gives_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["estimate", "--model", "mlp-small", "--per-class", "10", "--job", "layers"]
    found = CliRunner().invoke(app, [*words, "--json"])
    assert found.exit_code == 0, found.output
    said = json.loads(found.stdout)
    assert said["fits"]
    assert said["seconds"] == pytest.approx(sum(one["seconds"] for one in said["stages"]))
    assert not list(tmp_path.iterdir())
    words[-1] = "regions"
    few = CliRunner().invoke(app, [*words, "--of", "features", "--json"])
    assert {one["of"] for one in json.loads(few.stdout)["stages"]} == {"", "features"}
    assert CliRunner().invoke(app, [*words, "--of", "feature"]).exception.args[0].startswith("--of feature: expected")
    words[-1] = "layers"
    judged = CliRunner().invoke(app, [*words, "--kronecker", "--json"])
    assert any(one["name"].startswith("Kronecker factors of ") for one in json.loads(judged.stdout)["stages"])
    tight = CliRunner().invoke(app, [*words, "--memory", "300kB"])
    assert tight.exit_code == 2
    assert "It does not fit" in " ".join(tight.output.split())


@pytest.mark.slow
@pytest.mark.parametrize("job", ["analyze", "layers", "layers with Kronecker factors", "regions", "certify"])
def test_an_estimate_is_within_a_factor_of_two_of_what_the_job_takes(job: str) -> None:
    """In seconds of this process, with one thread."""
    net, data = trained_on_digits(30, (32, 32), epochs=5)
    make = lambda: ds.Problem(net, (data.inputs, data.targets))  # noqa: E731
    run = {"analyze": functools.partial(ds.analyze, effort="quick", progress=False), "layers": ds.layers}
    run |= {"regions": ds.regions, "certify": ds.certify}
    kinds = ("kfac", "ekfac", "cfac") if "Kronecker" in job else ()
    run["layers with Kronecker factors"] = functools.partial(ds.layers, kronecker=kinds)
    run[job](make())  # libraries are read
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        plan = ds.estimate(make(), job.split(maxsplit=1)[0], "quick", of=["gradients"], kronecker=kinds)
        began = time.process_time()
        run[job](make())
        spent = time.process_time() - began
    finally:
        torch.set_num_threads(threads)
    assert spent / 2 <= plan.total_seconds <= 2 * spent


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system counts no peak of memory anew")
@pytest.mark.parametrize("job", ["analyze", "layers", "layers with Kronecker factors"])
def test_an_estimate_foresees_the_peak_of_memory(job: str) -> None:
    """But for libraries and what their routines take for themselves."""
    net, data = trained_on_digits(20, (512, 512), epochs=20, batch=32)
    make = lambda: ds.Problem(net, (data.inputs, data.targets))  # noqa: E731
    kinds = ("kfac", "ekfac", "cfac") if "Kronecker" in job else ()
    plan = ds.estimate(make(), job.split(maxsplit=1)[0], "quick", kronecker=kinds)
    problem = make()
    gc.collect()
    _forget_peak()
    before = _peak()
    if job == "analyze":
        ds.analyze(problem, effort="quick", progress=False)
    else:
        ds.layers(problem, kronecker=kinds)
    assert plan.peak_bytes / 2 <= _peak() - before <= 1.5 * plan.peak_bytes + 150e6

"""What an analysis costs and how much it does: the first in a unit measured beside it, the second by size alone."""

import json

import pytest
import torch
from torch import nn

import deepspectra as ds
from deepspectra.errors import OptionError
from deepspectra.jobs.effort import (
    EFFORTS,
    count_operations,
    effort_for,
)
from deepspectra.jobs.stage_meter import Ledger


def problem_of(net, x):
    torch.manual_seed(0)
    return ds.Problem(net, (x, torch.arange(len(x)) % 2))


@pytest.mark.parametrize(
    ("net", "shape", "multiplications"),
    [
        (lambda: nn.Linear(7, 2), (7,), 7 * 2),
        (lambda: nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 2)), (7,), 7 * 9 + 9 * 2),
        (
            lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 16, 2)),
            (1, 6, 6),
            4 * 9 * 16 + 64 * 2,
        ),
    ],
)
def test_a_gradient_takes_three_forward_passes_of_two_operations_a_multiplication(net, shape, multiplications):
    problem = problem_of(net(), torch.randn(10, *shape))
    value, operations = count_operations(problem, problem.loss)
    assert value == problem.loss()
    least = 6 * 10 * problem.num_parameters
    assert operations == max(6 * 10 * multiplications, least)


def test_what_pytorch_does_not_count_takes_two_operations_a_parameter():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.out = nn.GRU(3, 5, batch_first=True), nn.Linear(5, 2)

        def forward(self, x):
            return self.out(self.cell(x)[0][:, -1])

    problem = problem_of(Recurrent(), torch.randn(8, 4, 3))
    assert count_operations(problem, problem.loss)[1] >= 6 * 8 * problem.num_parameters


def test_effort_follows_what_is_asked_for_and_size():
    problem = problem_of(nn.Linear(3, 2), torch.randn(8, 3))
    for name, level in EFFORTS.items():
        found = [effort_for(problem, operations, name) for operations in (1.0, 1e9, 1e10, 1e12, 1e30)]
        steps = [effort.num_steps for effort in found]
        assert steps == sorted(steps, reverse=True)
        assert steps[0] == level.num_steps
        assert (steps[-1] == level.num_steps) == (name == "paper")
        assert [effort.dense for effort in found][:1] == [True]
        assert not found[-1].dense
    each = [effort_for(problem, 1e10, name) for name in EFFORTS]
    assert each == sorted(each, key=lambda effort: effort.num_probes * effort.num_steps)


def test_the_plan_is_told_before_the_work(capsys):
    problem = problem_of(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(8, 3))
    ds.analyze(problem)
    told = " ".join(capsys.readouterr().err.split())
    assert "standard: 5 top eigenpairs of H and of G" in told
    assert "density of H and of R by all eigenvalues, of G by all eigenvalues of 8 gradients." in told
    assert "Spectra are exact." in told
    ds.analyze(problem, num_probes=2, num_steps=3)
    assert "2 × 3 products" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_where_parameters_are_few_every_eigenvalue_is_exact(dtype):
    torch.manual_seed(1)
    x = torch.randn(400, 5)
    net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 20))
    problem = ds.Problem(net, (x, torch.arange(400) % 20), dtype=dtype)  # 7,600 gradients: G by products
    found = ds.analyze(problem, progress=False).dataset
    double = problem.to(torch.float64)
    for name, operator in (
        ("hessian", ds.Hessian),
        ("gauss_newton", ds.GaussNewton),
        ("residual", ds.Residual),
    ):
        exact = torch.linalg.eigvalsh(operator(double).dense())
        nodes = torch.from_numpy(found["density_node"].sel(operator=name).dropna("node").values).sort().values
        assert len(nodes) == len(exact)
        assert float((nodes - exact).abs().max()) <= 20 * torch.finfo(dtype).eps * float(exact.abs().max())
    assert set(found["density_probe"].values.ravel().tolist()) <= {-1, -2}
    assert not (found["bin_low"] < found["bin_high"]).any()
    assert float(found["trace_standard_error"].max()) == 0


def test_an_unknown_effort_is_refused():
    problem = problem_of(nn.Linear(3, 2), torch.randn(8, 3))
    with pytest.raises(OptionError, match="'quick', 'standard', 'paper'"):
        ds.analyze(problem, effort="best")


def test_a_slow_machine_does_the_same(monkeypatch):
    """A clock that says that every gradient takes minutes changes the bill, and no number."""
    problem = problem_of(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(8, 3))
    quick = ds.analyze(problem, progress=False).dataset

    def minutes(ledger):
        ledger.gradient_seconds = 100.0
        return 100.0

    monkeypatch.setattr(Ledger, "_time_gradient", minutes)
    slow = ds.analyze(problem, progress=False).dataset
    timed = [name for name in quick if name.startswith("cost_")]
    assert slow.attrs["gradient_seconds"] == 100
    assert json.loads(quick.attrs["provenance"])["probes × steps of densities"] == "all eigenvalues"
    assert quick.drop_vars(timed).equals(slow.drop_vars(timed))

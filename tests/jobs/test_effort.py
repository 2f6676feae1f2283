"""What an analysis costs and how much it does: the first in a unit measured beside it, the second by size alone."""

import json

import pytest
import torch
from torch import nn

import deepspectra as ds
from deepspectra.jobs.effort import EFFORTS, count_operations, effort_for
from deepspectra.jobs.ledger import Ledger


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
def test_a_gradient_takes_three_forward_passes_of_two_operations_a_multiplication(
    net, shape, multiplications
):
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


def test_effort_follows_size_and_falls():
    problem = problem_of(nn.Linear(3, 2), torch.randn(8, 3))
    found = [effort_for(problem, operations) for operations in (1.0, 4.9e9, 5.1e9, 9e10, 1.1e11, 1e30)]
    assert found == [EFFORTS[j] for j in (0, 0, 1, 1, 2, 2)]


def test_a_slow_machine_does_the_same(monkeypatch):
    """A clock that says that every gradient takes minutes changes the bill, and no number."""
    problem = problem_of(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(8, 3))
    quick = ds.analyze(problem, progress=False).dataset

    def minutes(ledger):
        ledger.gradient_seconds = 100.0
        return 100.0

    monkeypatch.setattr(Ledger, "_time_gradient", minutes)
    slow = ds.analyze(problem, progress=False).dataset
    timed = [name for name in quick if name.startswith("cost_") or name == "subspace_gradients"]
    assert slow.attrs["gradient_seconds"] == 100
    assert json.loads(quick.attrs["provenance"])["probes × steps of densities"] == "4 × 24"
    assert quick.drop_vars(timed).equals(slow.drop_vars(timed))


class Machine:
    """A clock that runs slower or faster as `load` says, and a gradient of one second of its own work."""

    def __init__(self):
        self.now, self.load, self.measured = 0.0, 1.0, 0

    def work(self, seconds):
        self.now += seconds * self.load

    def gradient(self):
        self.measured += 1
        self.work(1.0)


def test_the_unit_of_cost_is_measured_beside_each_stage():
    """The same stages cost the same in gradients on a machine that grows three times slower between them."""
    bills = []
    for loads in ([1, 1, 1, 1], [1, 3, 3, 1]):
        machine = Machine()
        ledger = Ledger(show=False, gradient=machine.gradient, clock=lambda machine=machine: machine.now)
        for stage, load in enumerate(loads):
            machine.load = load
            with ledger.stage(f"wait {stage}"):
                machine.work(200)  # by which the change is noticed
            with ledger.stage(f"stage {stage}"):
                machine.work(100)
        bills.append([ledger.gradients[f"stage {stage}"] for stage in range(4)])
        assert machine.measured <= 0.06 * 4 * 300 + 2
    assert bills[0] == pytest.approx([100] * 4)
    assert bills[1] == pytest.approx([100] * 4)


def test_short_stages_pay_for_no_measurement_of_their_own():
    machine = Machine()
    ledger = Ledger(show=False, gradient=machine.gradient, clock=lambda: machine.now)
    for stage in range(30):
        with ledger.stage(str(stage)):
            machine.work(0.5)
    assert machine.measured == 1
    assert sum(ledger.gradients.values()) == pytest.approx(15)

"""What a stage costs, in a unit that is measured beside it."""

import pytest

from deepspectra.jobs.stage_meter import Countdown, Ledger


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


def test_time_to_go_follows_the_work_of_the_layers_that_are_left(monkeypatch):
    machine = Machine()
    monkeypatch.setattr("deepspectra.jobs.stage_meter.time.perf_counter", lambda: machine.now)
    pace, said = Countdown({"a": 1.0, "b": 2.0, "c": 7.0}), []
    for done, (name, work) in enumerate([("a", 10), ("b", 20), ("c", 70)]):
        said.append(pace.left(done, 3, name))
        machine.work(work)
    assert said == ["", "2 min to go", "70 s to go"]
    said = []
    for done, name in enumerate(("a of H", "b of H", "c of H")):  # another round, of which nothing is known
        said.append(pace.left(done, 3, name))
        machine.work(20)
    assert said == ["", "40 s to go", "20 s to go"]
    assert pace.left(2, 3, "b") == ""  # a third, two of whose layers were finished before


def test_nothing_is_said_of_what_has_no_end():
    pace = Countdown({})
    assert [pace.left(done, None, "products") for done in range(3)] == ["", "", ""]

"""A sweep: every cell once, whatever is killed, in one labelled store."""

import collections
import concurrent.futures
import contextlib
import functools
import json
import math
import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
import torch
import xarray as xr

import deepspectra as ds
import sweep_cells
from deepspectra import cli, errors
from deepspectra.jobs.sweep_cell import Record, digest
from deepspectra.jobs.sweep_schedule import Experience, Schedule, Task
from sweep_cells import Large, broken_training, draws, dying, failing, short_training, training

GRID = {"name": ["b", "a"], "size": [1, 3], "seed": range(2)}
TRAININGS = {"model": ["u", "v"], "epochs": [1, 3, 4], "seed": range(6)}  # of sweep_cells.main


class Immediate:
    """Another library's executor: `submit`, and jobs with `done` and `result`, but no future."""

    def __init__(self):
        self.jobs, self.at_once = [], []

    def submit(self, function, /, *args):
        self.jobs.append(Job(pickle.loads(pickle.dumps((function, args)))))
        self.at_once.append(sum(not job.ended for job in self.jobs))
        return self.jobs[-1]


class Job:
    def __init__(self, call):
        self.call, self.asked, self.ended = call, 0, False

    def done(self):
        self.asked += 1
        return self.asked > 2

    def result(self):
        function, args = self.call
        self.ended = True
        return function(*args)


class Counted:
    """A cell that counts its calls."""

    version = "1"

    def __init__(self):
        self.points = []

    def __call__(self, **point):
        self.points.append(point)
        return {"y": sum(value for value in point.values() if isinstance(value, (int, float)))}


def threads(num=1):
    return concurrent.futures.ThreadPoolExecutor(num)


def swept(cell, axes, folder, executor=None, **options):
    return ds.sweep(cell, axes, folder, executor=executor or threads(), progress=False, **options)


@pytest.fixture(scope="module")
def in_processes(tmp_path_factory):
    return swept(draws, GRID, tmp_path_factory.mktemp("sweep"), executor=2)


def same(one, other):
    for name in set(one.variables) - {"seconds", "peak_memory"}:
        assert one[name].dims == other[name].dims
        np.testing.assert_array_equal(one[name].values, other[name].values, err_msg=name)


def test_every_kind_of_measure_is_stored_by_its_point(in_processes):
    found = in_processes
    assert found.number.dims == ("name", "size", "seed")
    assert list(found.name.values) == ["b", "a"]
    assert (found.status == "done").all()
    assert float(found.number.sel(name="a", size=3, seed=1)) == pytest.approx(1.3)
    assert found["count"].sel(size=3).values.tolist() == [[3, 3], [3, 3]]
    assert found.flag.sel(size=3).all()
    assert found.not_a_number.isnull().all()
    assert (found.infinite == -np.inf).all()
    assert found.text.sel(name="a", size=1, seed=0).item() == "a-1"
    assert found.labels.sel(name="a", size=1, seed=0).values.tolist() == ["a", "", ""]
    matrix = found.matrix.sel(seed=1, size=1, name="b").values
    np.testing.assert_array_equal(matrix, [[1, 1], [math.nan] * 2, [math.nan] * 2])
    assert np.isnan(found.drawn.sel(name="a").values).sum(-1).tolist() == [[1, 1], [1, 1]]
    assert (found.peak_memory > 2**25).all()
    assert (found.seconds > 0).all()


def test_global_random_numbers_follow_from_the_point(in_processes, tmp_path):
    assert len(np.unique(in_processes.drawn)) > 8
    other = swept(draws, {"seed": [1, 0], "size": [3, 1], "name": ["a", "b"]}, tmp_path, Immediate())
    same(in_processes, other.sel(in_processes.coords).transpose(*in_processes.dims))


@pytest.mark.parametrize("executor", ["threads", "processes", "fake"])
def test_any_executor_gives_the_same_store(executor, tmp_path, in_processes):
    if executor == "processes":
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
            found = swept(draws, GRID, tmp_path, pool)
    else:
        found = swept(draws, GRID, tmp_path, threads(3) if executor == "threads" else Immediate())
    same(in_processes.drop_vars("drawn"), found.drop_vars("drawn"))  # threads share their random state
    if executor != "threads":
        same(in_processes, found)


def test_the_store_is_a_file_that_xarray_reads(tmp_path):
    found = swept(draws, GRID, tmp_path)
    with xr.open_dataset(tmp_path / "sweep.nc", engine="h5netcdf") as file:
        same(found, file.load().sel(name=["b", "a"]))
        assert file.attrs["verdict"] == "8 cells: 8 done."
    same(found, ds.gather(tmp_path))


@pytest.mark.parametrize("kind", ["bool", "None", "mixed"])
def test_axes_take_values_that_are_no_numbers(kind, tmp_path):
    values = {"bool": [True, False], "None": [None, 13], "mixed": [1, "x"]}[kind]
    found = swept(lambda x: {"said": repr(x)}, {"x": values}, tmp_path)
    assert found.said.values.tolist() == [repr(value) for value in values]
    assert xr.load_dataset(tmp_path / "sweep.nc").x.values.tolist() == [str(value) for value in values]


def test_an_axis_of_numbers_may_become_one_of_texts(tmp_path):
    cell = Counted()
    swept(cell, {"x": [13]}, tmp_path)
    swept(cell, {"x": [None]}, tmp_path)
    assert swept(cell, {"x": [13]}, tmp_path).y.values.tolist() == [13]
    assert len(cell.points) == 2


def test_integers_that_are_no_floats_are_cells_of_their_own(tmp_path):
    """Those above 2^53; others are known by the digests that they always had."""
    seeds = [2**63 - 1, 2**60 + 2, 2**60 + 1, 2**60, 2**53 + 1, 7]
    for _ in range(2):
        found = swept(lambda seed: {"last": seed % 1000}, {"seed": seeds}, tmp_path)
        assert (found.status == "done").all()
        assert found["last"].values.tolist() == [seed % 1000 for seed in seeds]
    assert xr.load_dataset(tmp_path / "sweep.nc").seed.values.tolist() == sorted(seeds)
    assert digest({"seed": 7}) == digest({"seed": 7.0}) == "c6765433302506d14b38fc23"
    assert digest({"seed": 2**60}) == digest({"seed": 2.0**60}) != digest({"seed": 2**60 + 1})
    assert digest({"seed": 10**400}) != digest({"seed": 10**400 + 1})


@pytest.mark.parametrize(
    ("earlier", "values"),
    [
        ([], ["1", 1]),
        ([], [True, "x", "True"]),
        ([], [None, "None"]),
        ([], [2**60, 2**60 + 1, 0.5]),
        (["1"], [1]),
        ([1], [True]),
        ([2**60, 2**60 + 1], [0.5]),
        ([], [2**64, 1]),
    ],
)
def test_values_that_would_have_one_label_are_refused_before_anything_runs(earlier, values, tmp_path):
    cell = Counted()
    if earlier:
        swept(cell, {"x": earlier}, tmp_path)
    with pytest.raises(errors.OptionError, match=r"axis x has .*(one label|64 bits)"):
        swept(cell, {"x": values}, tmp_path)
    assert len(cell.points) == len(earlier)
    assert swept(cell, {"x": [3, *earlier]}, tmp_path).status.values.tolist() == ["done"] * (1 + len(earlier))


def test_only_new_cells_run_when_the_grid_changes(tmp_path):
    cell = Counted()
    first = swept(cell, {"a": [1, 2], "b": [0.1, 0.2]}, tmp_path)
    assert len(cell.points) == 4
    more = swept(cell, {"b": [0.3, 0.2, 0.1], "a": [2, 4, 1.0]}, tmp_path)
    assert cell.points[4:] == [{"b": b, "a": a} for b in (0.3, 0.2, 0.1) for a in (2, 4, 1) if b == 0.3 or a == 4]
    assert more.a.values.tolist() == [2, 4, 1]
    same(first.y.to_dataset(), more.sel(a=[1, 2], b=[0.1, 0.2]).y.transpose("a", "b").to_dataset())
    fewer = swept(cell, {"a": [4], "b": [0.2]}, tmp_path)
    assert len(cell.points) == 9
    assert fewer.y.item() == 4.2
    assert ds.gather(tmp_path).y.shape == (3, 3)


def test_what_was_asked_for_and_not_done_is_missing(tmp_path):
    cell = Counted()
    swept(cell, {"a": [1], "b": [1]}, tmp_path)
    found = swept(cell, {"a": [2], "b": [2]}, tmp_path)
    assert found.status.item() == "done"
    whole = ds.gather(tmp_path)
    assert whole.status.values.tolist() == [["done", "missing"], ["missing", "done"]]
    assert whole.y.isnull().values.tolist() == [[False, True], [True, False]]


def test_looks_at_one_training_are_cells_of_one_task(tmp_path):
    log = tmp_path / "log"
    cell = functools.partial(training, str(log), 0)
    found = swept(cell, {"epochs": [4, 1], "model": ["u"], "seed": [0, 1]}, tmp_path / "s", looks="epochs")
    assert found.weights.dims == ("epochs", "model", "seed", "weights_0")
    assert log.read_text().split()[2::4] == ["1", "4", "1", "4"]
    log.unlink()
    more = swept(cell, {"epochs": [1, 3, 4], "model": ["u"], "seed": [0, 1]}, tmp_path / "s", looks="epochs")
    assert [line.split()[1:3] for line in log.read_text().splitlines()] == [["0", "3"], ["1", "3"]]
    expected = {(e, s): next(iter(training(str(log), 0, "u", (e,), s))) for e in (1, 3, 4) for s in (0, 1)}
    for (epoch, seed), measures in expected.items():
        at = more.sel(epochs=epoch, seed=seed, model="u")
        assert at.weights.values.tolist() == measures["weights"].double().tolist()


def test_a_failing_cell_is_recorded_and_the_rest_goes_on(tmp_path):
    with pytest.warns(errors.SweepWarning, match="5 of 7 cells .* failed; the first: ValueError: x is one"):
        found = swept(failing, {"x": range(7)}, tmp_path)
    assert found.status.values.tolist() == ["done", *["failed"] * 5, "done"]
    assert found.y.sel(x=[0, 6]).values.tolist() == [0, 6]
    for x, error in {
        1: "ValueError: x is one",
        2: "SystemExit: 3",
        3: "'seconds'",
        4: "tree",
        5: "int",
    }.items():
        assert error in found.error.sel(x=x).item().splitlines()[0]
    assert "raise ValueError" in found.error.sel(x=1).item()


def test_failed_cells_are_done_again_only_when_asked(tmp_path):
    cell = Counted()
    mended = []

    def unstable(x):
        cell(x=x)
        if x == 1 and not mended:
            raise RuntimeError("not yet")
        return {"y": x}

    unstable.version = "1"
    for _ in range(2):
        with pytest.warns(errors.SweepWarning, match="not yet"):
            swept(unstable, {"x": [0, 1]}, tmp_path)
    assert len(cell.points) == 2
    mended.append(True)
    found = swept(unstable, {"x": [0, 1]}, tmp_path, retry=True)
    assert cell.points[2:] == [{"x": 1}]
    assert found.status.values.tolist() == ["done", "done"]


def test_a_training_that_fails_keeps_its_earlier_looks(tmp_path):
    with pytest.warns(errors.SweepWarning, match="2 of 4 cells"):
        found = swept(broken_training, {"epochs": [1, 2, 3, 4]}, tmp_path, looks="epochs")
    assert found.status.values.tolist() == ["done", "done", "failed", "failed"]
    assert "diverged" in found.error.values[3]
    with pytest.warns(errors.SweepWarning, match="yielded 1 looks"):
        found = swept(short_training, {"epochs": [1, 2]}, tmp_path / "short", looks="epochs")
    with pytest.warns(errors.SweepWarning, match="yields one for each"):
        swept(lambda epochs: {"y": 1}, {"epochs": [1, 2]}, tmp_path / "mapping", looks="epochs")


def test_a_cell_that_kills_its_process_fails_alone(tmp_path):
    """At the third attempt, while one that is killed once is done."""
    cell = functools.partial(dying, str(tmp_path))
    with pytest.warns(errors.SweepWarning, match="1 of 5 cells"):
        found = swept(cell, {"x": range(5)}, tmp_path / "s", executor=2)
    assert found.status.values.tolist() == ["done", "failed", "done", "done", "done"]
    assert "Its process died in 3 attempts" in found.error.sel(x=1).item()


def test_another_cell_version_or_list_of_axes_is_refused(tmp_path):
    cell = Counted()
    swept(cell, {"x": [1]}, tmp_path)
    cell.version = "2"
    with pytest.raises(errors.FileError, match=r"of version 1 .* now 2.*cell.version = '1'"):
        swept(cell, {"x": [1]}, tmp_path)
    cell.version = "1"
    with pytest.raises(errors.FileError, match=r"list of axes was \['x'\] and is \['x', 'z'\]"):
        swept(cell, {"x": [1], "z": [1]}, tmp_path)
    other = tmp_path / "other"
    swept(cell, {"x": [1], "z": [1]}, other)
    with pytest.raises(errors.FileError, match=r"and is \['x'\]. Name the others too, each with the value"):
        swept(cell, {"x": [1]}, other)
    with pytest.raises(errors.FileError, match="looks was None and is x"):
        swept(cell, {"x": [1]}, tmp_path, looks="x")
    with pytest.raises(errors.FileError, match=r"the cell was .*Counted and is sweep_cells.failing"):
        swept(failing, {"x": [1]}, tmp_path)
    swept(cell, {"x": [2]}, tmp_path)
    assert len(cell.points) == 3


def test_a_function_is_known_by_its_source_and_its_fixed_arguments(tmp_path):
    def power(x, n):
        return {"y": x**n}

    swept(functools.partial(power, n=2), {"x": [1]}, tmp_path)
    swept(functools.partial(power, n=2), {"x": [2]}, tmp_path)
    with pytest.raises(errors.FileError, match="of version"):
        swept(functools.partial(power, n=3), {"x": [1]}, tmp_path)
    first = json.loads((tmp_path / "sweep.json").read_text())

    def power(x, n):
        return {"y": x**n + 1}

    with pytest.raises(errors.FileError, match=first["version"]):
        swept(functools.partial(power, n=2), {"x": [1]}, tmp_path)
    said = functools.partial(power, n=2)
    said.version = first["version"]
    assert swept(said, {"x": [3]}, tmp_path).y.item() == 10


@pytest.mark.parametrize(
    ("axes", "options", "message"),
    [
        ({}, {}, "axes is empty"),
        ({"x": []}, {}, "one value or more"),
        ({"x": [1, 1.0]}, {}, "none of them twice"),
        ({"x": [True, 1]}, {}, "none of them twice"),
        ({"x": "abc"}, {}, "a list of values"),
        ({"x": [math.nan]}, {}, "has the value nan"),
        ({"x": [(1, 2)]}, {}, "has the value"),
        ({"x": [torch.ones(2)]}, {}, "has the value"),
        ({"x": torch.tensor(1)}, {}, "a list of values"),
        ({"seconds": [1]}, {}, "none of status"),
        ({"x y": [1]}, {}, "a Python name"),
        ({"y": [1]}, {}, "the cell takes x; the axes are y"),
        ({"x": [1]}, {"looks": "y"}, "looks='y' is not an axis"),
        ({"x": [1]}, {"executor": -1}, "at least one process"),
        ({"x": [1]}, {"memory": "much"}, "not a size"),
    ],
)
def test_bad_options_are_named(axes, options, message, tmp_path):
    with pytest.raises(errors.OptionError, match=message):
        ds.sweep(failing, axes, tmp_path, progress=False, **options)


@pytest.mark.parametrize("own", [True, False])
def test_a_cell_that_cannot_be_sent_is_refused(own, tmp_path):
    context = multiprocessing.get_context("spawn")
    pool = 1 if own else concurrent.futures.ProcessPoolExecutor(1, mp_context=context)
    with pytest.raises(errors.OptionError, match="top level of a file that can be imported"):
        swept(lambda x: {"y": x}, {"x": [1, 2]}, tmp_path, pool)
    assert not list((tmp_path / "cells").iterdir())


def test_an_executor_that_broke_down_loses_nothing(tmp_path):
    cell = Counted()
    pool = threads()

    class Once:
        def submit(self, function, /, *args):
            future = pool.submit(function, *args)
            future.result()
            pool.shutdown()
            return future

    with pytest.raises(errors.WorkerError, match="What was finished is kept"):
        swept(cell, {"x": [1, 2]}, tmp_path, Once())
    assert swept(cell, {"x": [1, 2]}, tmp_path).y.values.tolist() == [1, 2]
    assert len(cell.points) == 2


def test_a_second_sweep_in_the_folder_is_refused_while_the_first_is_alive(tmp_path):
    def nested(x):
        with pytest.raises(errors.FileError, match=f"at work in process {os.getpid()} of"):
            swept(Counted(), {"x": [1]}, tmp_path)
        assert ds.gather(tmp_path).status.item() == "missing"
        return {"y": x}

    assert swept(nested, {"x": [1]}, tmp_path).status.item() == "done"
    (tmp_path / "lock").write_text("process 1 of elsewhere")  # left by one that died
    assert swept(nested, {"x": [1]}, tmp_path).status.item() == "done"


def test_a_damaged_cell_is_done_again(tmp_path):
    cell = Counted()
    swept(cell, {"x": [1, 2, 3]}, tmp_path)
    _, *others = sorted((tmp_path / "cells").glob("*.npz"))
    others[0].write_bytes(others[0].read_bytes()[:100])
    (tmp_path / "cells" / ".x.part").write_text("left by a killed run")
    with pytest.warns(errors.FallbackWarning, match="damaged"):
        found = swept(cell, {"x": [1, 2, 3]}, tmp_path)
    assert found.y.values.tolist() == [1, 2, 3]
    assert len(cell.points) == 4
    assert not list((tmp_path / "cells").glob(".*"))


def test_a_folder_without_a_sweep_is_named(tmp_path):
    with pytest.raises(errors.FileError, match="holds no sweep"):
        ds.gather(tmp_path)
    (tmp_path / "sweep.json").write_text("{")
    with pytest.raises(errors.FileError, match="cannot be read"):
        ds.gather(tmp_path)


def test_no_more_cells_run_at_once_than_fit_the_memory(tmp_path):
    cell = Large(tmp_path / "marks")
    cell.folder.mkdir()
    with pytest.warns(errors.SweepWarning, match=r"4 of 12 cells .* refused.*needs 9 GiB and there are 5"):
        found = swept(cell, {"gib": [1, 3, 9], "number": range(4)}, tmp_path / "s", threads(8), memory="5GiB")
    assert found.at_once.min() >= 1
    assert found.at_once.max() <= 5
    assert (found.status.sel(gib=9) == "refused").all()
    found = swept(cell, {"gib": [1, 3, 9], "number": range(4)}, tmp_path / "s", threads(8), memory="10GiB")
    assert (found.status == "done").all()


def test_a_memory_function_that_fails_fails_its_cell(tmp_path):
    with pytest.warns(errors.SweepWarning, match="missing"):
        swept(Unsure(), {"x": [1]}, tmp_path / "unsure")


def test_cells_are_expected_to_take_what_those_most_like_them_did():
    experience = Experience(["model", "size"])
    assert math.isnan(experience.seconds([{"model": "a", "size": 1}]))
    for model, size, seconds, peak in (("a", 1, 1, 10), ("a", 2, 3, 20), ("b", 2, 50, 70)):
        experience.add(Record({"model": model, "size": size}, "done", "", seconds, peak))
    assert experience.seconds([{"model": "a", "size": 1}, {"model": "a", "size": 9}]) == 1 + 2
    assert experience.memory([{"model": "a", "size": 9}]) == 20
    assert experience.memory([{"model": "a", "size": 9}, {"model": "b", "size": 9}]) == 70


@pytest.mark.parametrize("kept", [False, True], ids=["freed memory given back", "freed memory kept"])
def test_the_peak_of_memory_is_that_of_the_cell_alone(kept, tmp_path):
    if kept:  # as the command line has it, from here on in this process
        cli._keep_freed_memory()
    found = swept(sweep_cells.block, {"megabytes": [400, 1]}, tmp_path, Immediate())
    large, small = found.peak_memory.values.tolist()
    assert large - small == pytest.approx(400 * 2**20, rel=0.2)


@pytest.mark.parametrize("enough", [True, False])
def test_measured_cells_run_at_once_as_far_as_they_fit(enough, tmp_path):
    """The first alone, then all others, or each alone."""
    executor = Immediate()
    swept(sweep_cells.block, {"megabytes": range(1, 6)}, tmp_path, executor, memory=2**50 if enough else 2**20)
    assert executor.at_once == ([1, 1, 2, 3, 4] if enough else [1] * 5)


def test_names_and_texts_that_files_do_not_hold_do_no_harm(tmp_path):
    def odd(x):
        if x:
            raise ValueError("a\0b\udcff")
        return {"v": [1, 2], "v_0": 3, "x_0": [4], "top-1 %": 5, "text": "c\0d\udcff"}

    with pytest.warns(errors.SweepWarning):
        found = swept(odd, {"x": [0, 1]}, tmp_path)
    again = xr.load_dataset(tmp_path / "sweep.nc")
    same(found, again)
    assert again.v.sel(x=0).values.tolist() == [1, 2]
    assert again.text.sel(x=0).item() == "cd?"
    assert "ValueError: ab?" in again.error.sel(x=1).item()


@pytest.mark.parametrize("name", [".", "..", "a\0", "a/b", ""])
def test_measures_that_no_file_can_name_fail_their_cell_alone(name, tmp_path):
    def odd(x):
        return {name: 1.0, "a": 2.0} if x else {"a": 3.0}

    with pytest.warns(errors.SweepWarning, match="the cell measures"):
        found = swept(odd, {"x": [0, 1]}, tmp_path)
    assert found.status.values.tolist() == ["done", "failed"]
    same(found, xr.load_dataset(tmp_path / "sweep.nc"))


def test_progress_says_how_many_are_done_and_how_long_the_rest_takes(tmp_path, capsys):
    experience = Experience(["x"])
    experience.add(Record({"x": 0}, "done", "", 50.0))
    schedule = Schedule(None, None, math.inf, 0.0, experience, num_failed=2)
    schedule.waiting.extend(Task({"x": x}, None, (), None) for x in range(1, 5))
    schedule.spent, schedule.began = 100.0, time.monotonic() - 50.0  # two at once
    assert schedule._told() == ", 2 failed, about 2 min to go"
    schedule.waiting.clear()
    assert schedule._told() == ", 2 failed"
    ds.sweep(Counted(), {"x": range(6)}, tmp_path, executor=threads())
    assert "6 of 6 cells" in capsys.readouterr().err


class Unsure(Counted):
    def memory(self, **point):
        raise KeyError("missing")


def run_killed(folder, log, rng, kill):
    """Start the sweep of `sweep_cells.main`; kill a worker after some cells, and then the sweep itself, or not."""
    process = subprocess.Popen([sys.executable, sweep_cells.__file__, str(folder), str(log), ".02"])

    def lines():
        return log.read_text().splitlines() if log.exists() else []

    def wait_for(num):
        reached = len(lines()) + num
        while len(lines()) < reached and process.poll() is None:
            time.sleep(0.005)

    wait_for(rng.randrange(1, 3))
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):  # it may just have ended with its work
            os.kill(int(lines()[-1].split()[3]), signal.SIGKILL)
    if kill:
        wait_for(rng.randrange(1, 3))
        process.kill()
    return process.wait()


@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_no_cell_is_lost_or_done_twice_when_processes_are_killed(kills, tmp_path):
    """Neither by `kill -9` of the sweep's own process nor of those that run its cells."""
    log, folder, rng = tmp_path / "log", tmp_path / "s", random.Random(kills)
    deaths = 0
    for _ in range(kills):
        run_killed(folder, log, rng, True)
        deaths += 3  # of a worker, and of two with the sweep
        time.sleep(2)  # on a busy machine workers take a while to see that nobody waits for them
        stopped = log.read_text()
        time.sleep(0.3)
        assert log.read_text() == stopped, "workers outlive the sweep"
        files = list((folder / "cells").glob("*.npz"))
        assert len(files) >= len({line[:-1] for line in _cells(stopped)}) - deaths
    assert run_killed(folder, log, rng, False) == 0
    deaths += 1
    found = ds.gather(folder)
    assert (found.status == "done").all()
    assert found.status.size == 36 == len(list((folder / "cells").iterdir()))
    done = collections.Counter(_cells(log.read_text()))
    assert len(done) == 36
    assert sum(done.values()) <= 36 + deaths  # cells whose process was killed before their file was written
    whole = swept(functools.partial(training, str(tmp_path / "other"), 0), TRAININGS, tmp_path / "w", looks="epochs")
    same(found.sel(whole.coords), whole)


def _cells(log):
    return [tuple(line.split()[:3]) for line in log.splitlines()]


def test_a_caller_without_a_guard_is_told(tmp_path):
    script = tmp_path / "unguarded.py"
    script.write_text(
        "import deepspectra as ds\n"
        "def cell(x):\n    return {'y': x}\n"
        f"ds.sweep(cell, {{'x': [1]}}, {str(tmp_path / 's')!r}, executor=1, progress=False)\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False, timeout=300)
    assert "does not reach another process" in done.stderr
    assert "if __name__ == '__main__':" in done.stderr


@pytest.mark.slow
def test_a_ray_cluster_of_two_nodes_gives_the_same_store(tmp_path, in_processes):
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster  # noqa: PLC0415

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Ray's own
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
        cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address, runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(sys.path)}})
        try:
            assert len(ray.nodes()) == 2
            found = swept(draws, GRID, tmp_path, ds.RayExecutor())
            cell = functools.partial(dying, str(tmp_path))
            with pytest.warns(errors.SweepWarning, match="1 of 5 cells"):
                died = swept(cell, {"x": range(5)}, tmp_path / "dying", ds.RayExecutor())
        finally:
            ray.shutdown()
            cluster.shutdown()
    same(in_processes, found)
    assert died.status.values.tolist() == ["done", "failed", "done", "done", "done"]


def test_ray_is_an_extra():
    if "ray" in sys.modules:
        pytest.skip("Ray is there")
    with pytest.raises(errors.OptionError, match=r"RayExecutor"):
        ds.RayExecutor()

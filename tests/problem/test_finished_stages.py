"""A job that was stopped goes on behind its last finished stage, with the numbers of one that was not."""

import itertools
import os
import sys
from pathlib import Path

import pytest
import torch
import xarray as xr

import deepspectra as ds
import shared_work
from deepspectra import cli, errors
from deepspectra.problem.finished_stages import FinishedStages, forget, stages_of
from processes import run_in
from shared_work import STOPPABLE, StoppedError, numbers, small_problem, stopping

MINE = """
from shared_work import small_problem

def problem():
    return small_problem()

def twin():
    return small_problem(1)
"""


@pytest.fixture(scope="module")
def whole() -> dict[str, dict[str, torch.Tensor]]:
    """What every job finds if nothing disturbs it."""
    return {job: numbers(work(small_problem(), None)) for job, work in STOPPABLE.items()}


@pytest.mark.parametrize("job", STOPPABLE)
def test_a_stopped_job_goes_on_behind_what_is_finished_with_equal_numbers(job, whole, tmp_path):
    stages = []
    while len(stages) < 60:  # stopped again behind each stage
        try:
            with stopping(after=1) as written:
                found = STOPPABLE[job](small_problem(), tmp_path)
        except StoppedError:
            stages += written
            continue
        break
    assert len(stages) == len(set(stages)) >= 4, stages  # none is done twice
    assert_alike(numbers(found), whole[job])
    with stopping(after=0) as written:
        assert_alike(numbers(STOPPABLE[job](small_problem(), tmp_path)), whole[job])
    assert written == []


def test_what_a_stop_leaves_of_what_was_being_removed_is_in_nobodys_way(tmp_path, monkeypatch):
    folder = tmp_path / "stages"
    for kept in range(4):  # of the files, when it stops
        stages = FinishedStages(folder, {"job": "first"})
        for name in ("one", "two", "three"):
            stages.write(name, torch.zeros(2))
        removed = itertools.count()

        def unlink(path, missing_ok=False, removed=removed, kept=kept):
            if next(removed) == kept:
                raise KeyboardInterrupt
            os.remove(path)

        with monkeypatch.context() as patched:
            patched.setattr(Path, "unlink", unlink)
            with pytest.raises(KeyboardInterrupt):
                forget(folder)
        FinishedStages(folder, {"job": "first"})  # what it was, it can be again
        forget(folder)
        assert not folder.exists()


def test_data_in_another_order_go_on_and_do_again_what_goes_by_their_rows(tmp_path):
    """An order that comes back finds products in a basis that was computed again since."""
    expected = ds.regions(small_problem(), "hessian", num_groups=0).whole.values
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))

    def regions(order=None):
        return ds.regions(small_problem(order=order), "hessian", num_groups=0, resume=tmp_path).whole.values

    with pytest.raises(StoppedError), stopping(after=3):
        regions()
    for again in (order, None):
        with stopping(after=1) as written, pytest.raises(StoppedError), pytest.warns(errors.FallbackWarning) as said:
            regions(again)
        assert [str(one.message)[:52] for one in said] == ["the data comes in another order than before the stop"]
        assert written == ["basis of gradients"]
    basis = tmp_path / "basis-of-gradients.pt"
    rows, (turn, root) = torch.load(basis)
    torch.save((rows, (-turn, root)), basis)  # as sound a basis, of which no product was made
    with stopping() as written, pytest.warns(errors.FallbackWarning, match="'products 0'"):
        torch.testing.assert_close(regions(), expected, rtol=1e-8, atol=1e-10)
    assert written == ["products 0", "products 32", "products 64", "products 96", "hessian"]
    with stopping() as written:
        torch.testing.assert_close(regions(order), expected, rtol=1e-8, atol=1e-10)
    assert written == []


def assert_alike(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12, equal_nan=True, msg=name)


def test_processes_share_what_is_finished(tmp_path, whole):
    for found in run_in(2, shared_work.stopped_jobs, tmp_path):
        for job, (stages, values) in found.items():
            assert len(stages) == 2, job
            assert_alike(values, whole[job])


@pytest.mark.parametrize("job", STOPPABLE)
def test_the_folder_of_another_problem_or_of_other_options_is_refused(job, tmp_path):
    with pytest.raises(StoppedError), stopping(after=1):
        STOPPABLE[job](small_problem(), tmp_path)
    with pytest.raises(errors.FileError, match=r"another computation: .*weights was .*remove this one"):
        STOPPABLE[job](small_problem(seed=3), tmp_path)
    with pytest.raises(errors.FileError, match=r"seed was|eigenvalues of H was"):
        STOPPABLE[job](small_problem(), tmp_path, changed=True)
    with pytest.raises(errors.FileError, match="job was"):
        stages_of("another", [small_problem()], tmp_path)


def test_small_options_small_losses_and_what_was_chosen_of_a_loss_tell_computations_apart(tmp_path):
    def stages(number, scale=1.0, weight=None, **options):
        x, y = torch.eye(3, dtype=torch.float64), torch.arange(3)
        network = torch.nn.Linear(3, 3, bias=False).double()
        network.weight.data = 14.0 * torch.eye(3, dtype=torch.float64)
        loss = torch.nn.CrossEntropyLoss(weight=None if weight is None else torch.tensor(weight), **options)
        of = ds.Problem(network, (x, y), loss=loss, forward=lambda model, batch: (scale * model(batch[0]), batch[1]))
        stages_of("a job", [of], tmp_path / "stages", rtol=number)

    stages(9e-6)  # the loss is 2e-6
    stages(9e-6)
    for given in ((1e-9,), (9e-6, 1.1), (9e-6, 1.0, [1.0, 1.0, 20.0])):
        with pytest.raises(errors.FileError, match="another computation: "):
            stages(*given)
    with pytest.raises(errors.FileError, match="ignore_index=7"):
        stages(9e-6, ignore_index=7)


def test_a_layer_that_does_not_fit_is_left_out_and_done_later(tmp_path):
    expected = numbers(ds.layers(small_problem()))
    of, rows = small_problem(), 120
    of.memory = 3 * 8 * rows**2 - 1  # less than the Gram matrix of the first layer takes, more than of the others
    with pytest.warns(errors.FallbackWarning, match=r"layers leaves out 0: .* 0.44 MiB.*raise memory"):
        found = ds.layers(of, resume=tmp_path)
    assert (list(found), list(found.left_out)) == (["2", "4"], ["0"])
    assert "left out: 0: a matrix of 120 rows" in str(found)
    with stopping() as written:
        assert_alike(numbers(ds.layers(small_problem(), resume=tmp_path)), expected)
    assert written == ["layer 0", "H of layer 0"]
    of.memory = 3 * 8 * 30**2
    with pytest.raises(errors.MemoryBudgetError, match=r"(?i)raise memory"):
        ds.layers(of)


def test_the_command_says_how_to_go_on_and_does(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text(MINE)
    mine = f"{tmp_path / 'mine.py'}:problem"

    def command(*words):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["deepspectra", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code, " ".join(capsys.readouterr().err.split())

    for job, words in {
        "layers": (mine,),
        "regions": (mine, "--of", "gradients,features"),
        "compare": (mine, mine.replace("problem", "twin")),
    }.items():
        out = tmp_path / job
        with stopping(after=2, error=errors.MemoryBudgetError("too little")):
            code, said = command(job, *words, "--out", out, "--resume")
        assert code == 2
        assert "kept in" in said
        assert "the same command goes on behind it" in said
        assert len(list((out / "stages" / job).glob("*.pt"))) == 3  # and their identity
        with stopping() as written:
            assert command(job, *words, "--out", out, "--resume")[0] == 0
        assert written
        assert not (out / "stages").exists()
        plain = tmp_path / f"plain {job}"
        with stopping() as nothing:
            assert command(job, *words, "--out", plain)[0] == 0
        assert nothing == []
        with xr.open_dataset(out / f"{job}.nc") as one, xr.open_dataset(plain / f"{job}.nc") as other:
            xr.testing.assert_allclose(one, other, rtol=1e-9)


def test_what_is_kept_runs_no_code(tmp_path):
    class Trap:
        def __reduce__(self):
            return (print, ("code ran",))

    kept = FinishedStages(tmp_path, {"seed": 0})
    torch.save(Trap(), tmp_path / "trap.pt")
    with pytest.raises(errors.FileError):
        kept.read("trap")


def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    file = tmp_path / "file"
    file.write_text("in the way")
    with pytest.raises(errors.FileError, match="cannot be written"):
        FinishedStages(file, {"seed": 0})


def test_what_is_the_users_is_left_alone(tmp_path):
    mine = tmp_path / "stages"
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    (mine / "weights.pt").write_text("mine too")
    forget(mine)
    assert len(list(mine.iterdir())) == 2
    kept = FinishedStages(tmp_path / "own", {"seed": 0})
    kept.write("result", torch.ones(3))
    (tmp_path / "own" / "notes.txt").write_text("mine")
    forget(tmp_path / "own")
    assert [path.name for path in (tmp_path / "own").iterdir()] == ["notes.txt"]

"""`deepspectra sweep`: words of the command line as axes and cells."""

import sys

import pytest
import xarray as xr

from deepspectra import cli, errors
from deepspectra.jobs.sweep_command import _axis, sweep_of

MINE = """
def cell(size, kind):
    if kind == "bad":
        raise ValueError("a bad kind")
    return {"y": 2 * size}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "swept_cells.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def test_words_are_axes():
    assert _axis("seed=0,1") == ("seed", [0, 1])
    assert _axis("rate=.1,1e-2,1") == ("rate", [0.1, 0.01, 1])
    assert _axis("on=true,False,none,text") == ("on", [True, False, None, "text"])


def test_a_grid_of_a_function_of_the_users_is_swept_and_gathered(folder, monkeypatch, capsys):
    words = ["swept_cells.py:cell", "size=1,2", "kind=good,bad", "--processes", "1", "--out", "out"]
    monkeypatch.setattr(sys, "argv", ["deepspectra", "sweep", *words])
    with pytest.warns(errors.SweepWarning, match="a bad kind"), pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0
    told = capsys.readouterr().out
    assert "4 cells: 2 done, 2 failed." in told
    assert "Report: out/sweep.html" in told
    assert xr.load_dataset("out/sweep.nc").y.sel(kind="good").values.tolist() == [2, 4]
    assert "2 done, 2 failed" in sweep_of([], folder / "out")[1]
    (folder / "out" / "sweep.html").unlink()
    monkeypatch.setattr(sys, "argv", ["deepspectra", "report", "out"])
    with pytest.raises(SystemExit):
        cli.main()
    page = (folder / "out" / "sweep.html").read_text()
    assert "What moves with what" in page
    assert '<td>failed</td><td>ValueError: a bad kind</td><td class=n data-value="2">2</td>' in page


def test_a_sweep_without_a_finished_cell_is_a_failure_and_its_page_says_why(folder, monkeypatch):
    words = ["swept_cells.py:cell", "size=1,2", "kind=bad", "--processes", "1", "--out", "bad"]
    monkeypatch.setattr(sys, "argv", ["deepspectra", "sweep", *words])
    with pytest.warns(errors.SweepWarning), pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    page = (folder / "bad" / "sweep.html").read_text()
    assert "ValueError: a bad kind" in page
    assert "size=1, kind=bad" in page


@pytest.mark.parametrize(
    ("words", "options", "message"),
    [
        (["size=1"], {}, "the cell takes .*per_class.*; the axes are size"),
        (["seed=1", "swept_cells.py:cell"], {}, "expected an axis"),
        (["seed=1", "seed=2"], {}, "named twice"),
        (["swept_cells.py:cell", "size=1", "kind=x"], {"training_epochs": 3}, "of networks of the zoo"),
        (["model=mlp,lenet5", "seed=0"], {}, "model='lenet5'; it is one of"),
        (["swept_cells.py:cell"], {}, "has no axis; add values of what it takes"),
    ],
)
def test_what_is_wrong_with_the_words_is_said(folder, words, options, message):
    with pytest.raises(errors.OptionError, match=message):
        sweep_of(words, folder / "out", **options)


def test_a_missing_function_is_named(folder):
    with pytest.raises(errors.TargetError, match="no function 'other'"):
        sweep_of(["swept_cells.py:other", "x=1"], folder)
    with pytest.raises(errors.TargetError, match="a function that takes a point"):
        sweep_of(["swept_cells.py", "x=1"], folder)


def test_a_sweep_that_is_stopped_says_how_it_goes_on(folder, monkeypatch, capsys):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("deepspectra.jobs.sweep_command.sweep", stopped)
    with pytest.raises(KeyboardInterrupt):
        sweep_of(["swept_cells.py:cell", "size=1", "kind=good"], folder / "out")
    assert "the same command goes on behind it" in " ".join(capsys.readouterr().err.split())

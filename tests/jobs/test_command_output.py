"""How a command ends: words for people, or JSON for machines, and files in either case."""

import json

import numpy as np
import pytest
import xarray as xr

from deepspectra.jobs.command_output import finish, in_json, status, wrapped
from deepspectra.jobs.pages import load_pages


def numbers():
    values = xr.Dataset({"y": (("x",), [1.5, np.nan])}, {"x": ["a", "b"]}, {"verdict": "2 outliers. " * 30})
    return values.assign(region_missed=("spectrum", np.ones(1, dtype=np.int8)))


def test_json_has_every_number_and_null_for_none():
    found = json.loads(in_json(numbers()))
    assert found["data_vars"]["y"]["data"] == [1.5, None]
    assert found["data_vars"]["y"]["dims"] == ["x"]
    assert found["coords"]["x"]["data"] == ["a", "b"]
    assert found["attrs"]["verdict"].startswith("2 outliers.")


@pytest.mark.parametrize("as_json", [False, True])
def test_words_go_to_people_and_json_alone_to_machines(tmp_path, capsys, as_json):
    finish(numbers(), tmp_path, "regions", said="A table.", as_json=as_json)
    told = capsys.readouterr()
    words = told.err if as_json else told.out
    assert words.index("A table.") < words.index("2 outliers.") < words.index(f"Results: {tmp_path}")
    assert f"Report: {tmp_path / 'regions.html'}" in words
    if as_json:
        assert json.loads(told.out)["data_vars"]["y"]["data"] == [1.5, None]
    assert load_pages(tmp_path)["regions.html"].y.values[0] == 1.5


def test_what_does_not_fit_keeps_the_page(tmp_path):
    def full(_):
        raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        finish(numbers(), tmp_path, "analysis", save=full)
    assert (tmp_path / "report.html").is_file()


def test_lines_break_between_words(monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    lines = wrapped("attributable to the class means " * 5).splitlines()
    assert max(map(len, lines)) <= 30
    assert all(word in ("attributable", "to", "the", "class", "means") for line in lines for word in line.split())


def test_where_no_line_can_change_it_is_said_now_and_then_how_far_it_is(monkeypatch, capsys):
    monkeypatch.setattr("deepspectra.jobs.command_output.EVERY", -1)
    with status("layers", {"a": 1.0, "b": 1.0}) as show:
        show(0, 2, "a")
        show(1, 2, "b")
        show(0, None, "")
    said = capsys.readouterr().err
    assert "layers: a (0 of 2 done)" in said
    assert "layers: b (1 of 2 done, about 0 s to go)" in said
    assert "layers: the model (0 of some done)" in said


def test_a_verdict_that_is_in_what_is_said_is_said_once(tmp_path, capsys):
    verdict = numbers().attrs["verdict"]
    finish(numbers(), tmp_path, "regions", said=f"{verdict.replace('. ', '.' + chr(10))}\n\nA table.")
    assert capsys.readouterr().out.count("2 outliers.") == 30

"""From the options of a command to the problem that it looks at."""

import sys

import pytest

from deepspectra.errors import FileError, OptionError, TargetError
from deepspectra.jobs.command_targets import WEIGHTS, Choice, chosen_problem, load_function, moments

MINE = """
import torch
import deepspectra as ds

def problem():
    return ds.Problem(torch.nn.Linear(2, 3), (torch.ones(6, 2), torch.arange(6) % 3))

def lost():
    return {}["a"]

def unmet():
    import no_such_module_at_all

number = 3
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    path = tmp_path / "a_target_of_mine.py"
    path.write_text(MINE)
    return path


def test_a_target_is_a_function_in_a_file(mine):
    problem, names, labels, _ = chosen_problem(f"{mine}:problem", Choice(seed=3))
    assert problem.num_parameters == 9
    assert names is None
    assert labels.seed == 3


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("{}", "expected file.py:function"),
        ("{}:", "expected file.py:function"),
        ("{}:number", "has no function 'number'"),
        ("none.py:problem", "there is no file"),
        ("no_such_module_at_all:problem", "cannot be imported"),
    ],
)
def test_what_is_no_target_is_told(mine, target, words):
    with pytest.raises(TargetError, match=words):
        load_function(target.format(mine), "that is wanted")


@pytest.mark.parametrize(("function", "said"), [("lost", "KeyError: 'a'"), ("unmet", "cannot be imported")])
def test_a_function_that_fails_is_told_without_the_frames_of_the_command(mine, function, said):
    with pytest.raises(TargetError) as caught:
        chosen_problem(f"{mine}:{function}", Choice())
    assert said in str(caught.value)
    assert "command_targets" not in str(caught.value)
    assert (f'{mine}", line' in str(caught.value)) == (function == "lost")  # where it failed


def test_a_file_that_is_no_python_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    path = tmp_path / "no_python_of_mine.py"
    path.write_text("def problem(:\n")
    with pytest.raises(TargetError, match=r"(?s)failed by itself:.*no_python_of_mine.py.*SyntaxError"):
        load_function(f"{path}:problem", "that is wanted")


def test_options_of_the_zoo_are_refused_beside_a_target(mine):
    with pytest.raises(OptionError, match="--per-class, --device: of a network of the zoo"):
        chosen_problem(f"{mine}:problem", Choice(per_class=3, device="cpu"))


def test_a_device_that_is_not_there_is_told_before_a_network_is_trained(tmp_path):
    with pytest.raises(OptionError, match="device='hpu:7' cannot be used here"):
        chosen_problem(None, Choice(model="mlp-small", per_class=2, epochs=1, out=tmp_path, device="hpu:7"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("at", ["3,1", "1,1", "-1", "1,x"])
def test_epochs_are_given_in_order(at, tmp_path):
    with pytest.raises(OptionError, match=f"--at {at}: expected epochs in order"):
        moments(None, Choice(at=at, out=tmp_path))


def test_a_training_is_kept_where_it_is_asked_for_and_not_done_again(tmp_path, capsys):
    chosen = Choice(per_class=2, epochs=2, at="0,1", out=tmp_path, seed=1)
    found = moments(None, chosen)
    assert [moment.label for moment in found] == ["epoch 0", "epoch 1", "end"]
    assert [moment.out.name for moment in found] == ["epoch-0", "epoch-1", "end"]
    losses = [moment.subject.problem.loss() for moment in found]
    assert losses[0] > losses[2]
    written = (tmp_path / WEIGHTS).stat().st_mtime_ns
    again = moments(None, chosen._replace(resume=True))
    assert [moment.subject.problem.loss() for moment in again] == losses
    assert (tmp_path / WEIGHTS).stat().st_mtime_ns == written
    with pytest.raises(FileError, match="was trained otherwise"):
        moments(None, chosen._replace(resume=True, seed=2))
    by_checkpoint, names, labels, _ = chosen_problem(None, Choice(per_class=2, checkpoint=tmp_path / WEIGHTS, seed=1))
    assert by_checkpoint.loss() == pytest.approx(losses[2])
    assert names == [str(digit) for digit in range(10)]
    assert labels.data == "digits, 2 images a class"
    with pytest.raises(OptionError, match="--at follows the training"):
        moments(None, Choice(at="0", checkpoint=tmp_path / WEIGHTS))


def test_no_other_network_takes_the_place_of_one_that_results_are_of(tmp_path):
    chosen = Choice(model="mlp-small", per_class=2, epochs=1, out=tmp_path)
    loss = chosen_problem(None, chosen).problem.loss()
    written = (tmp_path / WEIGHTS).read_bytes()
    changed = (tmp_path / WEIGHTS).stat().st_mtime_ns
    assert chosen_problem(None, chosen).problem.loss() == loss
    assert (tmp_path / WEIGHTS).stat().st_mtime_ns == changed
    for other in ({"epochs": 0}, {"epochs": 2, "at": "1"}, {"model": "lenet"}):
        with pytest.raises(FileError, match="add --overwrite, if it may go"):
            moments(None, chosen._replace(**other))
        assert (tmp_path / WEIGHTS).read_bytes() == written
    chosen_problem(None, chosen._replace(epochs=0, overwrite=True))
    assert (tmp_path / WEIGHTS).read_bytes() != written


def test_a_network_trained_on_other_examples_is_another(tmp_path):
    chosen = Choice(model="mlp-small", per_class=2, epochs=1, out=tmp_path, resume=True)
    chosen_problem(None, chosen, draw=0)
    with pytest.raises(FileError, match="was trained otherwise"):
        chosen_problem(None, chosen, draw=1)
    whole = chosen._replace(per_class=None, epochs=0, out=tmp_path / "whole")
    assert chosen_problem(None, whole, draw=0).problem.loss() == chosen_problem(None, whole, draw=1).problem.loss()

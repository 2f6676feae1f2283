"""The job behind `certify`: what it takes from its options, what it keeps and what it saves."""

from pathlib import Path

import pytest
import torch

import deepspectra as ds
from certificates_problems import data, problem
from deepspectra.errors import CertificateError, FileError, OptionError, TargetError
from deepspectra.jobs.certify import certified, named_priors, unseen
from deepspectra.jobs.command_targets import Choice

FORMAT = Path(__file__).parents[2] / "docs" / "file-format.md"
FEW = {
    "epochs": 3,
    "batch_size": 100,
    "passes": 2,
}


def test_unfinished_work_is_taken_up_and_that_of_another_certificate_refused(tmp_path):
    once = certified(problem(300), ["isotropic"], None, FEW, folder=tmp_path)
    again = certified(problem(300), ["isotropic"], None, FEW | {"minutes": 5.0}, folder=tmp_path)
    assert again.value == once.value
    assert len(list(tmp_path.glob("*.pt"))) == 2  # the descent, and whose it is
    with pytest.raises(FileError, match="seed was 0 and is 1"):
        certified(problem(300), ["isotropic"], None, FEW, seed=1, folder=tmp_path)
    with pytest.raises(FileError, match="priors was"):
        certified(problem(300), ["learnt"], None, FEW, folder=tmp_path)


def test_batches_that_can_have_no_certificate_are_refused_before_anything_is_kept(tmp_path):
    x, y = data(6)
    batches = [{"x": x.flatten(1), "labels": y}]
    network = torch.nn.Linear(x[0].numel(), 10)
    of = ds.Problem(network, batches, forward=lambda model, batch: (model(batch["x"]), batch["labels"]))
    with pytest.raises(CertificateError, match="another form"):
        certified(of, ["isotropic"], None, FEW, folder=tmp_path / "stages")
    assert not (tmp_path / "stages").exists()


def test_test_data_are_the_zoos_or_a_function_returns_them(tmp_path, monkeypatch):
    x, y = unseen(None, None, Choice(model="mlp", data="digits"))
    assert len(x) == len(y) == 355
    assert unseen("mine.py:problem", None, Choice()) is None
    (tmp_path / "held.py").write_text(
        "import torch\ndef pair(): return torch.ones(2, 5), torch.zeros(2)\ndef no(): pass\n"
    )
    monkeypatch.chdir(tmp_path)
    assert torch.equal(unseen("mine.py:problem", "held.py:pair", Choice())[0], torch.ones(2, 5))
    with pytest.raises(TargetError, match="NoneType"):
        unseen("mine.py:problem", "held.py:no", Choice())
    with pytest.raises(OptionError, match="'isotropic', 'smooth', 'learnt'"):
        named_priors("uniform")
    with pytest.raises(OptionError, match="as many inputs"):
        certified(problem(50), ["isotropic"], (data(5)[0], torch.zeros(4)), FEW)

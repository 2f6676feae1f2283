"""Commands that several processes share."""

from __future__ import annotations

import os
import random
import re
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

import shared_work
from commands import finished
from processes import run_in

MINE = """
import torch
import deepspectra as ds

def problem():
    torch.manual_seed(0)
    x, y = torch.randn(61, 5).double(), torch.arange(61) % 3
    network = torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3))
    return ds.Problem(network.double(), (x, y), batch_size=20, memory="1GiB")
"""
MEASURED = ("cost_seconds", "cost_gradients")  # by the clock
COUNTED = "subspace_gradients"  # of operations, some of which every process does
RESIDUALS = ("residual_norm", "knockout_residual_norm")  # which are rounding themselves beside their eigenvalues
BOUNDS = "share_error"  # which follow from them


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shared")
    (path / "mine.py").write_text(MINE)
    return path


def analyze(folder: Path, out: str, *more: str) -> list[str]:
    shared = ["--num-probes", "2", "--num-steps", "20"]
    return ["analyze", f"{folder / 'mine.py'}:problem", "--out", str(folder / out), *shared, *more]


@pytest.fixture(scope="module")
def alone(folder: Path) -> xr.Dataset:
    """What one process saves."""
    (ended,) = run_in(1, shared_work.command, analyze(folder, "alone"), joined=False)
    assert ended[0] == 0, ended
    return xr.load_dataset(folder / "alone" / "analysis.nc")


def untimed(found: xr.Dataset) -> str:
    """The verdict without what averaging cost."""
    return re.sub(r"about [0-9.e+]+ gradients", "", found.attrs["verdict"])


def assert_alike(found: xr.Dataset, expected: xr.Dataset) -> None:
    assert untimed(found) == untimed(expected)
    assert set(found.variables) == set(expected.variables)
    scale = float(expected["eigenvalue"].max())
    for name, value in expected.data_vars.items():
        if name in MEASURED:
            continue
        if name == COUNTED:
            np.testing.assert_allclose(found[name], value, rtol=0.5)
            continue
        if name in RESIDUALS or str(name).endswith(BOUNDS):
            np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-8 * scale, err_msg=name)
        elif value.dtype.kind == "f":
            size = float(np.nanmax(np.abs(value), initial=0))
            np.testing.assert_allclose(found[name], value, rtol=1e-8, atol=1e-8 * size, err_msg=name)
        else:
            assert found[name].equals(value), name


def test_two_processes_save_the_numbers_of_one_once(folder: Path, alone: xr.Dataset) -> None:
    first, second = run_in(2, shared_work.command, analyze(folder, "two"), joined=False)
    assert first[0] == second[0] == 0, (first, second)
    assert "Report:" in first[1]
    assert second[1:] == ("", "")
    assert_alike(xr.load_dataset(folder / "two" / "analysis.nc"), alone)
    assert sorted(path.name for path in (folder / "two").iterdir()) == [
        "analysis.nc",
        "report.html",
        "vectors.safetensors",
    ]


def test_a_killed_process_ends_the_job_with_a_word_and_one_process_goes_on(folder: Path, alone: xr.Dataset) -> None:
    words = analyze(folder, "killed", "--resume")
    (told,) = run_in(2, shared_work.command, words, 7, survivors=1, joined=False)
    assert told[0] == 2
    said = " ".join(told[2].split())  # its lines are broken as the words of the system's error have it
    assert "process 0: ProcessError: another process ended" in said
    assert "with --resume" in said
    assert (folder / "killed" / "stages" / "analysis" / "density-of-H.pt").is_file()
    (ended,) = run_in(1, shared_work.command, words, joined=False)
    assert ended[0] == 0, ended
    found = xr.load_dataset(folder / "killed" / "analysis.nc")
    assert_alike(found, alone)
    assert "density of H" in found.attrs["provenance"].split("finished before a stop")[1]
    assert not (folder / "killed" / "stages").exists()


def test_what_several_processes_cannot_share_is_refused_by_each(folder: Path, alone: xr.Dataset) -> None:
    assert alone.sizes["operator"] == 3
    taken = analyze(folder, "alone")
    both = [(shared_work.command, (words,)) for words in (["sweep"], taken)]
    for rank, found in enumerate(run_in(2, shared_work.each_of, both, joined=False)):
        (status, _, said), (again, _, refused) = found
        assert status == again == 2
        assert f"process {rank}: OptionError: sweep works in one process: start it without torchrun." in said
        assert "--overwrite" in refused


@pytest.mark.slow
@pytest.mark.parametrize("num", [1, 2])
def test_kills_at_random_moments_lose_nothing(num: int, folder: Path, alone: xr.Dataset) -> None:
    chance, out = random.Random(num), folder / f"often {num}"
    words = analyze(folder, out.name, "--resume")
    began = time.perf_counter()
    run_in(num, shared_work.command, words, joined=False)
    longest = time.perf_counter() - began
    kills = 0
    while kills < 20:
        if (out / "report.html").is_file() and not (out / "stages").exists():
            assert_alike(xr.load_dataset(out / "analysis.nc"), alone)
            shutil.rmtree(out)
        moment = chance.uniform(0, longest / 2)
        run_in(num, shared_work.killed_after, words, moment, chance.randrange(num), survivors=0, joined=False)
        kills += not (out / "report.html").is_file()
    if not (out / "report.html").is_file():
        run_in(num, shared_work.command, words, joined=False)
    assert_alike(xr.load_dataset(out / "analysis.nc"), alone)
    assert not (out / "stages").exists()


@pytest.mark.slow
def test_torchrun_shares_an_analysis_of_the_zoo(tmp_path: Path) -> None:
    of_zoo = ["--model", "mlp-small", "--data", "digits", "--per-class", "12", "--epochs", "3"]
    words = ["analyze", *of_zoo, "--effort", "quick", "--out"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for command, out in (([sys.executable], "one"), (torchrun, "two")):
        finished(
            [*command, "-m", "deepspectra", *words, out], timeout=1200, check=True, cwd=tmp_path, env=environment
        )
    one, two = (xr.load_dataset(tmp_path / out / "analysis.nc") for out in ("one", "two"))
    np.testing.assert_allclose(two["eigenvalue"], one["eigenvalue"], rtol=1e-4, atol=1e-4)
    assert untimed(two) == untimed(one)

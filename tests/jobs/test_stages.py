"""An analysis that was stopped goes on behind its last finished stage, with the result of one that was not."""

import contextlib
import copy
import json
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import xarray as xr

import deepspectra as ds
from commands import run
from deepspectra import errors, zoo
from deepspectra.algorithms.eigenpairs import explore
from deepspectra.algorithms.krylov_basis import Krylov
from deepspectra.jobs import stages
from deepspectra.jobs.command_targets import Choice, chosen_problem, moments
from deepspectra.jobs.effort import effort_for
from deepspectra.jobs.stage_meter import Ledger
from deepspectra.problem.finished_stages import FinishedStages
from nets import trained_on_digits


def problem(seed=0):
    net, data = trained_on_digits(6, (12,), epochs=20, seed=seed)
    return ds.Problem(net, (data.inputs, data.targets))


def analysed(folder=None, of=None, **options):
    return ds.analyze(of or problem(), num_probes=1, num_steps=8, progress=False, resume=folder, **options)


@contextlib.contextmanager
def stopped_in(monkeypatch, stage):
    """The run is stopped where this stage would begin; yields the stages begun before."""
    begun, original = [], Ledger.stage

    def watched(self, name):
        if name == stage:
            raise KeyboardInterrupt
        begun.append(name)
        return original(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "stage", watched)
        yield begun


STOPS = {
    "exact": ("shares of H", "attribution of H", "density of R"),
    "products": ("class structure", "map of the means", "attribution of H", "shares of G"),
}


@pytest.mark.parametrize("route", STOPS)
def test_a_stopped_run_ends_with_the_numbers_of_an_unbroken_one(route, tmp_path, monkeypatch):
    if route == "products":
        monkeypatch.setattr(stages, "effort_for", lambda *size: effort_for(*size)._replace(exact_rows=0))
    whole = analysed()
    for stop in STOPS[route]:
        with stopped_in(monkeypatch, stop), pytest.raises(KeyboardInterrupt):
            analysed(tmp_path)
    with stopped_in(monkeypatch, None) as second:
        resumed = analysed(tmp_path)
    assert "top eigenpairs of H" not in second
    assert STOPS[route][-1] in second
    assert list(resumed.dataset.stage.values) == list(whole.dataset.stage.values)
    for name, values in whole.dataset.data_vars.items():
        if name in ("cost_seconds", "cost_gradients"):  # by the clock
            assert bool((resumed.dataset[name] >= 0).all()), name
        elif values.dtype.kind in "fi":
            np.testing.assert_allclose(resumed.dataset[name], values, rtol=1e-4, atol=1e-6, err_msg=name)
    for name, tree in whole.vectors.items():
        for parameter, vectors in tree.items():
            assert torch.equal(resumed.vectors[name][parameter], vectors)
    file = tmp_path / "rows-of-the-basis-of-H-0-of-1.pt"
    assert file.stat().st_size < torch.load(file).nbytes + 2**16  # not the room that it had


def small(order=slice(None), memory="1GiB"):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(10, 24), torch.nn.Tanh(), torch.nn.Linear(24, 3)).double()
    x, y = torch.randn(60, 10, dtype=torch.float64), torch.arange(60) % 3
    return ds.Problem(net, (x[order], y[order]), memory=memory)


@pytest.fixture
def no_tails(monkeypatch):
    """They take long."""
    monkeypatch.setattr(stages, "judged_tails", lambda *_: {})


@pytest.mark.usefixtures("no_tails")
def test_an_analysis_goes_on_with_its_data_in_another_order(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "effort_for", lambda *size: effort_for(*size)._replace(exact_rows=0))
    whole = analysed(of=small()).dataset
    with stopped_in(monkeypatch, "density of G"), pytest.raises(KeyboardInterrupt):
        analysed(tmp_path, small())
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    with stopped_in(monkeypatch, None) as ran, pytest.warns(errors.FallbackWarning, match="'shares of G'"):
        resumed = analysed(tmp_path, small(order)).dataset
    assert [name for name in ran if " of G" in name] == ["shares of G", "density of G"]
    for name in ("eigenvalue", "share", "trace", "bulk_edge"):
        np.testing.assert_allclose(resumed[name], whole[name], rtol=1e-6, atol=1e-8, err_msg=name)


@pytest.mark.usefixtures("no_tails")
@pytest.mark.parametrize("memories", [("6MiB", "1GiB"), ("1GiB", "6MiB")])
def test_a_run_that_goes_on_with_other_memory_keeps_its_route(memories, tmp_path, monkeypatch):
    """Which densities are exact is decided once, by the memory at first, and said of each."""

    def run(memory, folder=None):
        return ds.analyze(small(memory=memory), progress=False, resume=folder, effort="quick").dataset

    whole = run(memories[0])
    with stopped_in(monkeypatch, "density of R"), pytest.raises(KeyboardInterrupt):
        run(memories[0], tmp_path)
    resumed = run(memories[1], tmp_path)
    exact = "all eigenvalues", "G: all eigenvalues, H: 4 × 24, R: 4 × 24"
    for found in (whole, resumed):
        said = json.loads(found.attrs["provenance"])["probes × steps of densities"]
        assert said == exact[memories[0] == "6MiB"]
    for name in ("density_node", "density_weight", "trace", "trace_standard_error"):
        np.testing.assert_allclose(resumed[name], whole[name], rtol=1e-6, atol=1e-9, err_msg=name)
    assert bool((resumed.density_probe == whole.density_probe).all())


def test_warnings_of_finished_stages_are_still_in_the_report(tmp_path, monkeypatch):
    monkeypatch.setattr("deepspectra.algorithms.eigenpairs.enough_products", lambda num: 14)
    stop = stopped_in(monkeypatch, "class structure")
    with stop, pytest.raises(KeyboardInterrupt), pytest.warns(errors.ConvergenceWarning):
        analysed(tmp_path)
    resumed = analysed(tmp_path)
    provenance = json.loads(resumed.dataset.attrs["provenance"])
    assert "converged" in provenance["doubts"]
    assert provenance["finished before a stop"] == "top eigenpairs of H"


def test_stages_of_another_computation_are_refused(tmp_path, monkeypatch):
    first = problem()
    with stopped_in(monkeypatch, "top eigenpairs of H"), pytest.raises(KeyboardInterrupt):
        analysed(tmp_path, first)
    with pytest.raises(errors.FileError, match=r"another computation: seed was 0 and is 1\. .*remove this one"):
        analysed(tmp_path, first, seed=1)
    with pytest.raises(errors.FileError, match="num was None and is 4"):
        analysed(tmp_path, first, num=4)
    with pytest.raises(errors.FileError, match=r"weights was .* loss was"):
        analysed(tmp_path, problem(seed=1))
    with pytest.raises(errors.FileError, match="groups was"):
        analysed(tmp_path, first, groups=[0] * 5 + [1] * 5)
    network, data = copy.deepcopy(first.model).requires_grad_(True), zoo.load("digits", per_class=6)
    labels = data.targets.clone()
    labels[0] = (labels[0] + 1) % 10
    with pytest.raises(errors.FileError, match="data was"):
        analysed(tmp_path, ds.Problem(network, (data.inputs, labels)))
    order = torch.randperm(len(data))
    assert FinishedStages(tmp_path, {})  # nothing asked, nothing refused
    shuffled = ds.Problem(network, (data.inputs[order], data.targets[order]))
    with stopped_in(monkeypatch, "top eigenpairs of H"), pytest.raises(KeyboardInterrupt):
        analysed(tmp_path, shuffled)  # the same examples
    smoothed = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
    with pytest.raises(errors.FileError, match="loss was"):
        analysed(tmp_path, ds.Problem(network, (data.inputs, data.targets), loss=smoothed))
    FinishedStages(tmp_path, {}).write("a result", torch.ones(1))
    (tmp_path / "identity.pt").unlink()
    with pytest.raises(errors.FileError, match="does not say of what"):
        analysed(tmp_path, first)


def test_test_data_are_resumed_and_belong_to_the_computation(tmp_path, monkeypatch):
    first = problem()
    network, data = (
        copy.deepcopy(first.model).requires_grad_(True),
        zoo.load("digits", split="test", per_class=4),
    )
    train = zoo.load("digits", per_class=6)
    first = ds.Problem(network, (train.inputs, train.targets))
    test = ds.Problem(network, (data.inputs, data.targets))
    with stopped_in(monkeypatch, "density of R on test data"), pytest.raises(KeyboardInterrupt):
        analysed(tmp_path, first, test=test)
    with pytest.raises(errors.FileError, match="test data was"):
        analysed(tmp_path, first)
    found = analysed(tmp_path, first, test=test)
    said = json.loads(found.dataset.attrs["provenance"])["finished before a stop"]
    assert "top eigenpairs of H on test data" in said
    whole = analysed(tmp_path / "other", first, test=test).dataset
    xr.testing.assert_allclose(found.dataset.test_eigenvalue, whole.test_eigenvalue, rtol=1e-4)
    xr.testing.assert_allclose(found.dataset.bin_mass, whole.bin_mass, atol=1e-3)


def test_a_damaged_stage_is_said_and_can_be_done_again(tmp_path, monkeypatch):
    of = problem()
    with stopped_in(monkeypatch, "class structure"), pytest.raises(KeyboardInterrupt):
        analysed(tmp_path, of)
    file = tmp_path / "top-eigenpairs-of-H.pt"
    whole = file.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"not a result"):
        file.write_bytes(damaged)
        with pytest.raises(errors.FileError, match="remove it to do that stage again"):
            analysed(tmp_path, of)
    file.unlink()
    assert analysed(tmp_path, of).verdict


def test_a_basis_goes_on_from_its_state():
    matrix = torch.diag(torch.linspace(0, 1, 60, dtype=torch.float64) ** 8)
    _, basis = explore(matrix, 3, rtol=1e-6)
    state = {k: v.clone() if hasattr(v, "clone") else v for k, v in basis.state().items()}
    twin = Krylov.of_state(basis.operator, state, basis.part().clone().split([25, 0, 35], 1))  # of three processes
    for krylov in (basis, twin):
        krylov.append_random(torch.Generator().manual_seed(5))
        krylov.expand(1)
    for left, right in zip(basis.ritz(), twin.ritz(), strict=True):
        assert torch.equal(left, right)
    assert torch.equal(
        basis.combine(torch.eye(4, dtype=torch.float64)), twin.combine(torch.eye(4, dtype=torch.float64))
    )


def test_a_basis_of_which_a_part_is_lost_or_too_large_is_none():
    _, basis = explore(torch.diag(torch.linspace(0, 1, 60, dtype=torch.float64)), 3, rtol=1e-2)
    state, (first, second) = basis.state(), basis.part().split([30, 30], 1)
    assert Krylov.of_state(basis.operator, state, [first, second]) is not None
    for parts in ([first], [], [first[:-1], second], [first, second, second]):
        assert Krylov.of_state(basis.operator, state, parts) is None
    basis.operator.memory = 8 * 60 * (basis.num_rows - 1)  # of fewer processes, say
    assert Krylov.of_state(basis.operator, state, [first, second]) is None


def test_an_analysis_goes_on_without_the_rows_of_its_basis(tmp_path, monkeypatch):
    whole = analysed()
    with stopped_in(monkeypatch, "attribution of H"), pytest.raises(KeyboardInterrupt):
        analysed(tmp_path)
    (tmp_path / "rows-of-the-basis-of-H-0-of-1.pt").unlink()
    with stopped_in(monkeypatch, None) as ran:
        resumed = analysed(tmp_path)
    assert "top eigenpairs of H" not in ran
    np.testing.assert_allclose(resumed.dataset["bulk_edge"], whole.dataset["bulk_edge"], rtol=2e-2)
    assert resumed.dataset["num_outliers"].equals(whole.dataset["num_outliers"])


def test_a_killed_command_goes_on_behind_training_and_stages(tmp_path):
    words = ["analyze", "--model", "mlp-small", "--per-class", "6", "--epochs", "4", "--effort", "quick"]
    words += ["--num-probes", "1", "--num-steps", "4", "--resume", "--out", str(tmp_path)]
    found = tmp_path / "stages" / "analysis" / "top-eigenpairs-of-H.pt"
    command = [sys.executable, "-m", "deepspectra.cli", *words]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as first:
        deadline = time.monotonic() + 300
        while not found.exists() and time.monotonic() < deadline:
            time.sleep(0.005)
        first.kill()
    assert found.exists(), "no eigenpairs were kept within 300 s; nothing could be stopped behind them"
    assert not (tmp_path / "analysis.nc").exists()
    trained = (tmp_path / "model.safetensors").read_bytes()
    again = run(*words, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "was trained before" in again.stderr.replace("\n", " ")
    assert (tmp_path / "model.safetensors").read_bytes() == trained
    with xr.open_dataset(tmp_path / "analysis.nc", engine="h5netcdf") as file:
        assert "top eigenpairs of H" in json.loads(file.attrs["provenance"])["finished before a stop"]
    assert not (tmp_path / "stages").exists()
    for more, said in (([], "earlier run"), (["--overwrite"], "was trained otherwise")):
        other = run(*words, *more, "--seed", "1", cwd=tmp_path)
        assert other.returncode == 2
        assert said in " ".join(other.stderr.split())


def test_training_is_skipped_only_if_all_that_it_leaves_is_there(tmp_path):
    chosen = Choice(per_class=3, epochs=2, out=tmp_path, resume=True)
    trained = tmp_path / "model.safetensors"
    chosen_problem(None, chosen)
    first = trained.stat().st_mtime_ns
    chosen_problem(None, chosen)
    assert trained.stat().st_mtime_ns == first
    chosen = chosen._replace(at="0,1")
    moments(None, chosen)  # snapshots were not asked for before
    assert trained.stat().st_mtime_ns > first
    again = trained.stat().st_mtime_ns
    assert [m.label for m in moments(None, chosen)] == ["epoch 0", "epoch 1", "end"]
    assert trained.stat().st_mtime_ns == again
    other = tmp_path / "other"
    moments(None, chosen._replace(seed=1, out=other, at="1"))
    (other / "epoch-1" / "model.safetensors").replace(tmp_path / "epoch-1" / "model.safetensors")
    with pytest.raises(errors.FileError, match=r"epoch-1.* was trained otherwise"):
        moments(None, chosen)

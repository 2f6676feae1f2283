"""The command line, run as a user runs it."""

import functools
import importlib.metadata
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import xarray as xr
from typer.testing import CliRunner

import deepspectra as ds
from commands import finished, run
from deepspectra import cli, errors, zoo
from deepspectra.jobs import command_targets
from deepspectra.jobs.pages import load_pages

MINE = """
import torch
import deepspectra as ds
from neighbour import make

def problem():
    torch.manual_seed(0)
    x, y = torch.randn(60, 5), torch.arange(60) % 3
    return ds.Problem(make(), (x, y))

def twin():
    torch.manual_seed(1)
    x, y = torch.randn(60, 5), torch.arange(60) % 3
    return ds.Problem(make(), (x, y))

def pair():
    network = make()
    cut = [(torch.randn(num, 5), torch.arange(num) % 3) for num in (24, 9)]
    return tuple(ds.Problem(network, data) for data in cut)

def nothing():
    return None

def points(seed=2):
    torch.manual_seed(seed)
    x = torch.randn(400, 5)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 1).long()

def unseen():
    return points(3)

def classifier():
    return ds.Problem(torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)), points())
"""
NEIGHBOUR = """
import torch

def make():
    return torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3))
"""


def process(*arguments, cwd):
    """The command as a user starts it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    command = [str(Path(sys.executable).with_name("deepspectra")), *map(str, arguments)]
    return finished(command, timeout=300, cwd=cwd, env=environment, check=False)


def helped(*arguments):
    """What a command says of itself, here: a process of its own takes longest to start."""
    done = CliRunner().invoke(cli.app, [*arguments, "--help"], env={"COLUMNS": "200"})
    assert done.exit_code == 0
    return done.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("mine")
    (path / "mine.py").write_text(MINE)
    (path / "neighbour.py").write_text(NEIGHBOUR)
    return path


@pytest.fixture(scope="module")
def analysed(folder):
    return run("analyze", "mine.py:problem", "--out", "run", "--num-probes", 2, "--num-steps", 8, cwd=folder)


def test_two_problems_are_compared(folder):
    done = run("compare", "mine.py:problem", "mine.py:twin", "--out", "two", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "The two networks share most in" in done.stdout
    saved = xr.open_dataset(folder / "two" / "compare.nc", engine="h5netcdf")
    assert list(saved["layer"].values) == ["0", "2"]
    assert float(saved["overlap_curve"].max()) <= 1 + 1e-6
    page = (folder / "two" / "compare.html").read_text()
    assert 'id="chart-overlap_curves"' in page
    assert 'id="chart-overlap_whole"' in page
    assert 'id="overlap-table"' in page
    alone = run("compare", "mine.py:problem", cwd=folder)
    assert alone.returncode == 2
    assert "two targets" in alone.stderr


def test_anybodys_classifier_is_certified(folder):
    options = "--descent-epochs", 5, "--resume"
    done = run("certify", "mine.py:classifier", "--test", "mine.py:unseen", "--out", "mlp", *options, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "the stochastic network errs on at most" in done.stdout
    assert "The binomial bound of your network" in done.stdout
    saved = load_pages(folder / "mlp")["certify.html"]
    assert list(saved["layer"].values) == ["0", "2"]
    assert float(saved["bound"].sel(bounded="stochastic network", bound_end="bound")) <= 1
    assert float(saved["charge"].sum()) / 400 == pytest.approx(
        json.loads(saved.attrs["provenance"])["nats_an_example"]
    )
    page = (folder / "mlp" / "certify.html").read_text()
    for name in (
        "chart-bounds",
        "chart-posterior_variances",
        "chart-descent",
        "charge-table",
        "posterior-table",
    ):
        assert f'id="{name}"' in page
    assert not (folder / "mlp" / "stages").exists()  # finished
    done = run("certify", "mine.py:classifier", "--test", "mine.py:points", "--out", "seen", *options, cwd=folder)
    assert done.returncode == 2
    assert "400 of 400 inputs of --test are among the examples" in done.stderr


def test_anybodys_model_and_data(analysed, folder):
    assert analysed.returncode == 0, analysed.stderr
    report = folder / "run" / "report.html"
    assert f"Report: {Path('run') / 'report.html'}" in analysed.stdout
    assert report.stat().st_size > 100_000
    saved = ds.load(folder / "run")
    assert saved.verdict in analysed.stdout.replace("\n", " ") or saved.verdict in analysed.stdout
    assert saved.dataset.attrs["num_parameters"] == 5 * 6 + 6 + 6 * 3 + 3
    assert saved.dataset.attrs["title"] == "Spectrum of mine.py:problem"


def test_a_module_path_is_a_target_too(folder):
    done = process("estimate", "mine:problem", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "top eigenpairs of H" in done.stdout


@pytest.mark.parametrize("split", ["train", "test", "both"])
def test_a_pair_of_problems_is_training_and_test(folder, split):
    options = ("--num-probes", 1, "--num-steps", 4, "--out", f"pair-{split}")
    done = run("analyze", "mine.py:pair", "--split", split, *options, cwd=folder)
    assert done.returncode == 0, done.stderr
    saved = ds.load(folder / f"pair-{split}").dataset
    assert saved.attrs["num_examples"] == (9 if split == "test" else 24)
    assert saved.split.values.tolist() == (["train", "test"] if split == "both" else ["train"])
    assert saved.attrs.get("test_num_examples") == (9 if split == "both" else None)


def test_the_report_is_made_again_from_the_saved_numbers(analysed, folder):
    assert analysed.returncode == 0
    done = run("report", "run", "--out", "again.html", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert (folder / "again.html").read_text() == (folder / "run" / "report.html").read_text()


def test_a_second_run_takes_no_results_away(analysed, folder, monkeypatch, capsys):
    assert analysed.returncode == 0
    monkeypatch.chdir(folder)
    monkeypatch.setattr(cli, "moments", lambda *_: pytest.fail("work was done"))
    monkeypatch.setattr(sys, "argv", ["deepspectra", "analyze", "mine.py:problem", "--out", "run"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert "--overwrite" in " ".join(capsys.readouterr().err.split())
    monkeypatch.setattr(cli, "moments", lambda *_: [])
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--overwrite"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0


def test_every_page_of_a_directory_is_made_again(analysed, folder, tmp_path):
    assert analysed.returncode == 0
    shutil.copytree(folder / "run", tmp_path / "run")
    done = run("layers", folder / "mine.py:problem", "--out", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").glob("*.html")}
    assert set(before) == {"report.html", "layers.html"}
    for name in before:
        (tmp_path / "run" / name).unlink()
    assert run("report", "run", cwd=tmp_path).returncode == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").glob("*.html")} == before


def test_layers_at_several_epochs_are_one_report(folder):
    options = ("--per-class", 3, "--epochs", 2, "--at", "0,1", "--out", "moments")
    done = run("layers", *options, cwd=folder)
    assert done.returncode == 0, done.stderr
    losses = []
    for place in ("epoch-0", "epoch-1", "end"):
        with xr.open_dataset(folder / "moments" / place / "layers.nc", engine="h5netcdf") as saved:
            losses.append(saved.attrs["loss_value"])
    assert losses[0] > losses[1] > losses[2]
    page = (folder / "moments" / "layers.html").read_text()
    assert [f">{label}</label>" in page for label in ("epoch 0", "epoch 1", "end")] == [True] * 3
    places = [f"moments/{place}" for place in ("epoch-0", "end")]
    again = run("report", *places, "--out", "two.html", cwd=folder)
    assert again.returncode == 0, again.stderr
    assert 'id="chart-layer_spectra-m1"' in (folder / "two.html").read_text()


def test_regions_of_anybodys_model(folder):
    done = run("regions", "mine.py:problem", "--num-groups", 3, "--of", "gradients,hessian", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "gradients, all layers" in done.stdout
    assert "Of H " in done.stdout
    with xr.open_dataset(folder / "deepspectra-run" / "regions.nc", engine="h5netcdf") as saved:
        assert list(saved["spectrum"].values) == ["gradients", "hessian"]
        assert list(saved["removed"].values)[-1] == "residual"
        assert bool((saved["region_shift_error"].sel(spectrum="hessian", place="all layers") >= 0).any())
    page = (folder / "deepspectra-run" / "regions.html").read_text()
    for name in ("chart-region_shifts", "region-table"):
        assert f'id="{name}"' in page
    again = run("report", "deepspectra-run", cwd=folder)
    assert again.returncode == 0, again.stderr
    wrong = run("regions", "mine.py:problem", "--overwrite", "--of", "gradients,weights", cwd=folder)
    assert wrong.returncode == 2
    assert "expected some of gradients, hessian" in wrong.stderr.replace("\n", " ")


def test_layers_of_anybodys_model(folder):
    done = run("layers", "mine.py:problem", "--kronecker", "--out", "deep", cwd=folder)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line]
    assert "NC1" in lines[0]
    assert lines[-1] == f"Report: {Path('deep') / 'layers.html'}"
    with xr.open_dataset(folder / "deep" / "layers.nc", engine="h5netcdf") as dataset:
        assert dataset.sizes["layer"] == 2
        shares = dataset.layer_share.sum("layer_part").isel(rank=0)
        assert abs(shares - 1).max() < 1e-6
        assert dataset.attrs["verdict"] in done.stdout.replace("\n", " ") or dataset.attrs["verdict"] in done.stdout
        assert float(dataset["kronecker_fit"].sel(approximation="ekfac", fit="frobenius").max()) < 1
        assert "Nearest to G's block" in dataset.attrs["verdict"]
    page = (folder / "deep" / "layers.html").read_text()
    assert 'id="chart-kronecker_fits"' in page
    assert 'id="chart-kronecker_overlaps"' in page
    for name in ("layer_spectra", "layer_densities", "layer_traces", "layer_products", "layer_collapse"):
        assert f'id="chart-{name}"' in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("analyze", "mine.py"), "file.py:function"),
        (("layers", "mine.py:problem", "--epochs", "3"), "--epochs: of a network of the zoo"),
        (("analyze", "none.py:problem"), "there is no file"),
        (("analyze", "no_such_module:problem"), "cannot be imported"),
        (("analyze", "mine.py:other"), "has no function"),
        (("analyze", "mine.py:nothing"), "NoneType"),
        (("analyze", "mine.py:problem", "--split", "both"), "mine.py:problem returns one problem"),
        (("analyze", "mine.py:problem", "--split", "half"), "split"),
        (("analyze", "mine.py:problem", "--device", "cpu", "--per-class", "3"), "--per-class, --device"),
        (("analyze", "--model", "nonsense"), "nonsense"),
        (("analyze", "--data", "mnist", "--data-root", "nowhere"), "nowhere"),
        (("report", "nowhere"), "none of analysis.nc"),
        (("analyze", "mine.py:problem", "--at", "0,1"), "--at follows the training"),
        (("layers", "--at", "3,1"), "epochs in order"),
        (("layers", "--at", "1,x"), "epochs in order"),
        (("layers", "--per-class", "3", "--epochs", "1", "--at", "5"), "training ends at epoch 1"),
        (("analyze", "--memory", "lots"), "memory='lots'"),
        (("analyze", "--effort", "much"), "--effort='much'"),
        (("analyze", "--rtol", "2"), "--rtol must lie between"),
        (("analyze", "--num", "0"), "--num"),
        (("analyze", "--limit", "0"), "--limit"),
        (("regions", "--method", "magic"), "--method='magic'"),
        (("regions", "--num-groups", "1"), "--num-groups=1"),
        (("certify", "--prior", "magic"), "--prior='magic'"),
        (("certify", "--basis", "magic"), "--basis='magic'"),
        (("certify", "--minutes", "-1"), "minutes must be"),
        (("certify", "--variant", "magic"), "--variant='magic'"),
    ],
)
def test_what_is_wrong_is_said_in_one_message(folder, arguments, message, monkeypatch, capsys):
    def trained(*_, **__):
        raise AssertionError("a network was trained before what is wrong was seen")

    monkeypatch.setattr(zoo, "train", trained)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", ["deepspectra", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.replace("\n", " ")


def test_the_commands_and_their_options_are_these():
    assert {"demo", "analyze", "estimate", "layers", "regions", "report"} <= set(helped().split())
    words = helped("analyze")
    for option in (
        "--model",
        "--data",
        "--data-root",
        "--checkpoint",
        "--per-class",
        "--out",
        "--memory",
        "--resume",
        "--seed",
    ):
        assert option in words


def test_every_command_that_makes_a_problem_spells_the_same_options():
    words = {command: helped(command) for command in COMMANDS if command != "demo"}
    common = ("model", "data", "data-root", "per-class", "epochs", "out", "memory", "device", "seed")
    for command, text in words.items():
        assert [option for option in common if f"--{option} " not in text] == [], command
        assert ("--at " in text, "--checkpoint " in text) == ((command != "compare",) * 2), command
        assert "--resume " in text, command
        assert ("--split " in text) == (command == "analyze")


def test_the_demo_ends_with_its_verdict_and_its_report(tmp_path, monkeypatch):
    def fewer(target, chosen):
        return command_targets.chosen_problem(target, chosen._replace(per_class=5, epochs=2))

    monkeypatch.setattr(cli, "chosen_problem", fewer)
    monkeypatch.setattr(cli, "analyze", functools.partial(cli.analyze, num_probes=1, num_steps=4))
    done = run("demo", "--out", "here", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line]
    assert "outlier" in lines[0]
    assert lines[-1] == f"Report: {Path('here') / 'report.html'}"
    assert (tmp_path / "here" / "model.safetensors").is_file()


def test_a_checkpoint_is_loaded_instead_of_training(tmp_path):
    first = run("analyze", "--model", "mlp-small", "--per-class", 5, "--epochs", 1, "--num-probes", 1,
                "--num-steps", 4, "--out", "a", cwd=tmp_path)  # fmt: skip
    assert first.returncode == 0, first.stderr
    second = run("analyze", "--model", "mlp-small", "--per-class", 5, "--checkpoint",
                 "a/model.safetensors", "--num-probes", 1, "--num-steps", 4, "--out", "b", cwd=tmp_path)  # fmt: skip
    assert second.returncode == 0, second.stderr
    assert (
        ds.load(tmp_path / "a").verdict.split("Averaging")[0] == ds.load(tmp_path / "b").verdict.split("Averaging")[0]
    )


COMMANDS = {
    "demo": (),
    "analyze": ("mine.py:problem",),
    "layers": ("mine.py:problem",),
    "regions": ("mine.py:problem",),
    "compare": ("mine.py:problem", "mine.py:twin"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_that_cannot_be_written_is_found_before_any_work(folder, command, monkeypatch, capsys):
    (folder / "in-the-way").write_text("a file")
    monkeypatch.chdir(folder)
    for name in ("moments", "chosen_problem"):
        monkeypatch.setattr(cli, name, lambda *_, **__: pytest.fail("work was done"))
    arguments = ["deepspectra", command, *COMMANDS[command], "--out", "in-the-way/results"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "FileError" in said
    assert "cannot be written" in said
    assert "Choose another directory" in said


def test_a_report_that_cannot_be_written_is_said(analysed, folder, monkeypatch, capsys):
    assert analysed.returncode == 0
    (folder / "in-the-way").write_text("a file")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["deepspectra", "report", "run", "--out", "in-the-way/page.html"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert "cannot be written" in " ".join(capsys.readouterr().err.split())


def test_a_verdict_is_told_and_the_page_written_where_the_vectors_find_no_room(folder, monkeypatch, capsys):
    def full(_, path):
        raise OSError(28, "No space left on device")

    monkeypatch.chdir(folder)
    monkeypatch.setattr("deepspectra.jobs.analyze.save_file", full)
    arguments = ["analyze", "mine.py:problem", "--num-probes", "1", "--num-steps", "4", "--out", "full"]
    monkeypatch.setattr(sys, "argv", ["deepspectra", *arguments, "--num", "3", "--rtol", "0.1"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    told = capsys.readouterr()
    assert "outlier" in told.out
    assert "No space left" in " ".join(told.err.split())
    assert sorted(path.name for path in (folder / "full").iterdir()) == ["analysis.nc", "report.html"]
    with xr.open_dataset(folder / "full" / "analysis.nc", engine="h5netcdf") as saved:
        assert int(saved["eigenvalue"].sel(operator="hessian").notnull().sum()) == 3


@pytest.mark.parametrize("stem", ["regions", "layers"])
def test_a_damaged_file_of_a_command_is_said(tmp_path, stem):
    (tmp_path / f"{stem}.nc").write_bytes(b"\x89HDF\r\n\x1a\n" + b"\xff" * 500)
    with pytest.raises(errors.FileError, match=r"damaged or foreign .*Run the command again"):
        load_pages(tmp_path)


@pytest.mark.parametrize(("given", "expected"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_of_the_command_sleep_while_they_wait(given, expected, monkeypatch):
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="deepspectra")
    monkeypatch.setenv("OMP_WAIT_POLICY", given or "")
    if given is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    found = []
    monkeypatch.setattr(cli, "main", lambda: found.append(os.environ["OMP_WAIT_POLICY"]))
    script.load()()
    assert found == [expected]


@pytest.mark.parametrize("program", ["deepspectra", "deepspectra.cli"])
def test_the_version_is_said(program, tmp_path):
    outcome = finished([sys.executable, "-m", program, "--version"], timeout=120, cwd=tmp_path, check=True)
    assert outcome.stdout == f"deepspectra {importlib.metadata.version('deepspectra')}\n"
    assert outcome.stdout == f"deepspectra {ds.__version__}\n"

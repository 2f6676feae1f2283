"""The claims' pages: verdicts of fitted networks by stated rules, and one network is measured to the end."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reproductions.__main__
import torch
import xarray as xr
from reproductions import certificates, certificates_page, dissecting
from reproductions.__main__ import CELLS, SMALL, opened, stages, write_pages
from reproductions.claims import explained
from reproductions.measure import KNOCKOUTS, ClaimsCell, measure
from reproductions.pages import SPECTRA, Grid, _same_norm, claims_page, dynamics_page, within
from reproductions.records import at_end, earlier, fits, keep, of_store, restore
from reproductions.verdicts import listed

import deepspectra as ds
from claims_records import measures, record
from deepspectra import errors, zoo

DOCS = Path(__file__).parent.parent / "docs"
GRID = Grid(8, 2)


def cell(progress: tuple[float, ...], seed: int, model: str, data: str, per_class: int) -> Any:
    """Of a sweep: the first seed fits its data in the end, and class means explain its outliers; not so the other."""
    for look in progress:
        yield measures(8 * seed, loss=2 - look, accuracy=0.5 + 0.5 * look * (1 - 0.1 * seed))


@pytest.fixture
def store(tmp_path: Path) -> Path:
    axes = {
        "model": ["mlp"],
        "data": ["fashion"],
        "per_class": [13, 136],
        "progress": [0.1, 1],
        "seed": [0, 1],
    }
    ds.sweep(cell, axes, tmp_path / "store", looks="progress", executor=ThreadPoolExecutor(1), progress=False)
    return tmp_path / "store"


def row(text: str, title: str) -> list[str]:
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {title}"))
    return [entry.strip() for entry in line.strip("|").split(" | ")]


def test_verdicts_are_of_fitted_networks_with_others_apart(store: Path) -> None:
    text = claims_page(ds.gather(store), [record(left=8), record("resnet18")], GRID)
    _, _, fitted, others, large, before = row(text, "The outliers are attributable to the class means")
    assert "By subtraction: Open: in 2 of 2 networks." in fitted
    assert "By subtraction: Open: in 0 of 2 networks." in others
    assert "By projection: Open: in 2 of 2 networks." in others
    assert "By subtraction: Open: in 1 of 1 networks." in large
    assert "By subtraction: Open: in 1 of 2 networks." in before
    assert "(2 of the 2 fitted, 2 of the 2 not fitted, 1 of the 1 large networks and 2 of the 2 before)" in text
    assert "8 of 8 cells of the grid are measured, 4 of 2 trainings" in text
    assert "2 of these 4 are, and 1 of the 1 large" in text


def test_the_way_of_fitted_networks_is_shown(store: Path) -> None:
    text = claims_page(ds.gather(store), [record()], GRID).split("## How the outliers")[1].split("\n## ")[0]
    looks = [line for line in text.splitlines() if line.startswith("| mlp")]
    assert [line.split(" | ")[2:6] for line in looks] == [
        ["13", "1", "200", "1.9000"],
        ["13", "1", "200", "1.0000"],
        ["136", "1", "200", "1.9000"],
        ["136", "1", "200", "1.0000"],
    ]


def test_thresholds_are_varied(store: Path) -> None:
    text = claims_page(ds.gather(store), [record()], GRID)
    assert row(text, "1.1 × edge")[1] == "0 of 2"  # twelve outliers
    assert row(text, "1.25 × edge")[1] == "2 of 2"
    half = record(left=3)
    assert not explained(half, "class")
    assert explained(half, "class", gone=0.5)


def test_pages_are_written_before_a_training_has_ended(store: Path, tmp_path: Path) -> None:
    found = ds.gather(store).sel(progress=[0.1])
    text = claims_page(found, [record("resnet18")], GRID)
    assert "4 of 8 cells of the grid are measured, 0 of 2 trainings to their end. Networks" in text
    assert dynamics_page(found, tmp_path / "dynamics", GRID)
    assert listed([]) == "none"


def test_norms_of_g_are_of_as_many_eigenvalues_at_every_size() -> None:
    many, few = np.ones((1, 100)), np.pad(np.ones((1, 13)), ((0, 0), (0, 87)), constant_values=np.nan)
    values = xr.DataArray(np.stack([many, few, np.full((1, 100), np.nan)]), dims=("per_class", "seed", "value_0"))
    found = xr.Dataset({"value": values, "status": values[:, :, 0] > 0, "norm": values[:, :, 0]})
    assert _same_norm(found).norm.values.ravel().tolist() == pytest.approx([13**0.5, 13**0.5, np.nan], nan_ok=True)
    for some in (many, few):
        (name,) = (name for name in SPECTRA if name.startswith("‖R‖"))
        assert SPECTRA[name]({"norm_residual": 26**0.5, "norm": 10, "value": some[0]}) == pytest.approx(2**0.5)


def test_cells_come_out_of_the_store_as_they_went_in(store: Path) -> None:
    records = at_end(of_store(ds.gather(store)))
    assert [r["seed"] for r in records] == [0, 1, 0, 1]
    for name, value in measures(8, loss=1.0, accuracy=0.95).items():
        np.testing.assert_array_equal(records[1][name], value, err_msg=name)
    assert list(map(fits, records)) == [True, False, True, False]


def test_a_store_is_made_again_from_the_lines_that_were_kept(store: Path, tmp_path: Path) -> None:
    keep(store, tmp_path / "cells.jsonl")
    again = tmp_path / "again"
    (again / "cells").mkdir(parents=True)
    (again / "sweep.json").write_bytes((store / "sweep.json").read_bytes())
    restore(tmp_path / "cells.jsonl", again)
    xr.testing.assert_allclose(ds.gather(again), ds.gather(store), rtol=1e-7)
    before = sorted((again / "cells").iterdir())
    restore(tmp_path / "cells.jsonl", again)
    assert sorted((again / "cells").iterdir()) == before


def test_a_new_store_has_what_was_kept_and_knows_the_grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reproductions.__main__, "CELLS", tmp_path / "cells.jsonl")
    point = {"model": "mlp", "data": "mnist", "per_class": 13, "progress": 1.0, "seed": 0}
    line = {"point": point, "seconds": 1.0, "peak_memory": 2.0, "versions": {}, "measures": {"loss": 0.5}}
    line["cell_version"] = ClaimsCell().version
    (tmp_path / "cells.jsonl").write_text(json.dumps(line) + "\n")
    opened(tmp_path / "store", None)
    found = ds.gather(tmp_path / "store")
    assert found.status.size == 4 * 3 * 4 * 4 * 3
    assert int((found.status == "done").sum()) == 1
    assert found.loss.sel(point) == 0.5


def test_every_cell_that_was_kept_is_of_the_version_of_today(tmp_path: Path) -> None:
    opened(tmp_path / "store", None)
    keep(tmp_path / "store", tmp_path / "cells.jsonl")
    assert (tmp_path / "cells.jsonl").read_text() == CELLS.read_text() != ""


def test_cells_that_were_kept_of_another_version_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raised = ClaimsCell().version.replace("2", "3", 1)
    monkeypatch.setattr(ClaimsCell, "version", raised)
    with pytest.raises(errors.FileError, match=r"cells of version 2 Claims.*the store is of version 3 Claims"):
        opened(tmp_path / "store", None)
    assert not list((tmp_path / "store" / "cells").iterdir())


def test_records_of_before_are_read_by_the_same_names() -> None:
    lines = (DOCS / "claims.jsonl").read_text().splitlines()
    records = earlier(DOCS / "claims.jsonl")
    assert len(records) == len(lines) == 93
    old, new = json.loads(lines[0]), records[0]
    assert new["hessian_left_class_logit_subtraction"] == old["H"]["left"]["class + logit, subtraction"][0]
    assert new["hessian_left_class_subtraction_at_most"] == old["H"]["left"]["class, subtraction"][1] == 9
    assert new["outliers"] == old["G"]["outliers"]
    assert new["shift_within"].tolist() == list(old["shifts"]["within"].values())
    assert new["layer_nc1"] == [layer["nc1"] for layer in old["layers"]]
    assert sum(map(fits, records)) == sum(line["train_accuracy"] >= 0.99 for line in map(json.loads, lines))


def test_pages_are_written_from_whatever_cells_there_are(store: Path, tmp_path: Path) -> None:
    write_pages(store, tmp_path)
    claims, dynamics = ((tmp_path / f"{name}.md").read_text() for name in ("claims", "dynamics"))
    assert "8 of 576 cells of the grid" in claims
    assert "| vgg11-bn | mnist | 136 | 340 |" in claims  # by a sample
    assert "](dynamics/mlp.svg)" in dynamics
    assert "against progress at 136 images a class" in dynamics
    assert (tmp_path / "dynamics" / "mlp.svg").read_text().startswith("<svg")


def test_the_grid_has_every_cell_once() -> None:
    points = [
        (model, data, size, seed)
        for axes in stages()
        for model in axes["model"]
        for data in axes["data"]
        for size in axes["per_class"]
        for seed in axes["seed"]
    ]
    assert len(set(points)) == len(points) == 144
    assert SMALL["progress"][-1] == 1


@pytest.mark.parametrize(("num", "residual"), [(3, 0.4), (9, 0.05)])
def test_outliers_lie_within_a_sample_at_least_as_far_as_the_page_says(num: int, residual: float) -> None:
    values = torch.cat([torch.linspace(9, 4, num), torch.linspace(2, 0.1, 40 - num)]).double()
    noise = torch.randn(40, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    vectors = torch.linalg.qr(torch.eye(40, 9, dtype=torch.float64) + residual / 20 * noise).Q
    image = values[:, None] * vectors
    norm = float((image - vectors @ (vectors.T @ image)).norm())
    truly = float(vectors[:num].square().sum()) / num
    h = {"hessian_value": values.tolist()}
    stated = within(h | {"sample": {"residual": norm, "error": 0}}, num)
    assert 0 < stated <= truly < 1
    assert 1 - stated < 10 * (1 - truly) + 1e-9
    twice = within(h | {"sample": {"residual": norm / 2, "error": norm / 4}}, num)
    assert twice == pytest.approx(stated)  # two standard errors are added
    assert within(h | {"sample": {"residual": 10, "error": 0}}, num) == 0
    assert within(h | {"sample": {"residual": 0, "error": 0}}, 0) == 0


def trained_digits() -> ds.Problem:
    data = zoo.load("digits", per_class=13)
    model = zoo.build("mlp-small", input_shape=(1, 8, 8), num_classes=10, seed=0)
    zoo.train(model, data, epochs=40, learning_rate=0.05, batch_size=16)
    return ds.Problem(model, data)


def test_the_claims_are_judged_alike_with_the_whole_spectrum_and_by_products(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    problem = trained_digits()
    exact = measure(problem)
    monkeypatch.setattr("reproductions.measure.EXACT_ROWS", 0)
    found = measure(problem)
    assert set(exact) >= set(found) - {
        *(f"{kind}_logit_{method}" for kind in ("left", "value_without") for method in ("subtraction", "projection")),
        *(f"left_{name}_{method}_at_most" for name in KNOCKOUTS for method in ("subtraction", "projection")),
        *("converged", "share_residual"),
    }
    assert found["value"][:9] == pytest.approx(exact["value"][:9], rel=1e-3)
    for name in ("trace", "trace_class", "trace_logit", "trace_interaction", "trace_within"):
        assert found[name] == pytest.approx(exact[name], rel=1e-4)
    for name in ("share_class", "share_logit", "overlap_class", "hessian_share_class"):
        assert found[name] == pytest.approx(exact[name], abs=0.01)
    for name in ("outliers", "left_class_subtraction", "left_class_logit_projection"):
        assert abs(found[name] - exact[name]) <= 1
    # two of 71 eigenvalues are rounding in the one and noise of float32 in the other: a rank more or less
    assert found["bump_clearance"] == pytest.approx(exact["bump_clearance"], abs=0.05)
    assert found["norm"] == pytest.approx(exact["norm"], rel=0.1)
    whole = ds.gram_spectrum(problem, effects="two-way")
    assert exact["value"].tolist() == pytest.approx(whole.values[:100].tolist())
    hessian = ds.eigenpairs(ds.Hessian(problem), 9)
    assert exact["hessian_value"][:9] == pytest.approx(hessian.values, rel=1e-3)
    averaged = ds.principal_subspace(problem, num=9)
    assert exact["hessian_overlap_class"] == pytest.approx(ds.overlap(averaged.vectors, hessian.vectors), abs=0.01)
    assert exact["layer"] == ["fc1", "fc2", "fc3"]
    assert "layer" not in measure(problem, ended=False)


def test_networks_are_trained_as_in_the_papers() -> None:
    cell = ClaimsCell()
    assert [cell.recipe("lenet", data, 130).epochs for data in ("mnist", "fashion", "cifar10")] == [
        200,
        200,
        350,
    ]
    recipe = cell.recipe("vgg11-bn", "mnist", 130)
    assert [recipe.rate(epoch) / recipe.rate(0) for epoch in (66, 67, 134)] == pytest.approx([1, 0.1, 0.01])
    assert (recipe.momentum, recipe.weight_decay, len(cell.rates)) == (0.9, 5e-4, 3)


def test_layers_are_dissected_and_set_beside_published_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = partial(zoo.mlp, widths=(8,))
    run = dissecting.Run("784-200-200-10, mnist", "batch-norm", build, "digits", None, 4, 2)
    monkeypatch.setitem(dissecting.RUNS, "tiny", run)
    cell, threads = dissecting.DissectingCell(Path()), ThreadPoolExecutor(1)
    ds.sweep(cell, {"run": ["tiny"]}, tmp_path, executor=threads, progress=False)
    (found,) = of_store(ds.gather(tmp_path))
    record = dissecting.record(run, found)
    assert record == json.loads(json.dumps(record))
    accuracies = np.asarray(found["accuracies"]).tolist()
    assert record["accuracies"] == dict(zip(["plain", "batch norm"], accuracies, strict=True))
    assert list(record["values"]) == ["plain", "batch norm"]
    assert list(record["values"]["plain"]) == ["fc1", "fc2", "all layers"]
    text = dissecting.page([record])
    assert "| all layers |" not in text  # their outliers have a line of their own
    (told,) = (line for line in text.splitlines() if line.startswith("Outliers of G → "))
    plain = record["values"]["plain"]["all layers"]
    counts = [sum(plain[key]) / 2 for key in ("outliers", "left_without_class", "left_without_class_logit")]
    assert "plain " + " → ".join(f"{count:.3g}" for count in counts) in told
    ratio = record["values"]["plain"]["fc2"]["input_ratio"]
    assert f"{sum(ratio) / 2:.3g} (12.3)" in text  # published for this network and layer
    nearest = [line.split(" | ") for line in text.splitlines() if line.startswith("| fully connected")]
    assert [sum(map(int, row[1:3])) + int(row[3].rstrip(" |")) for row in nearest] == [2, 2]
    assert list(dissecting.RUNS)[1] == "lenet-mnist-batch-norm"


def test_the_page_of_layers_is_that_of_its_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = dissecting.PAGE.read_text()
    monkeypatch.setattr(dissecting, "PAGE", tmp_path / "page.md")
    dissecting.write_page(tmp_path / "no store")
    assert (tmp_path / "page.md").read_text() == written
    every = {(run.name, run.study) for run in dissecting.RUNS.values()}
    assert {(record["name"], record["study"]) for record in dissecting._recorded()} == every


def _certified(name: str, value: float) -> dict[str, Any]:
    """A record of the certificates' page."""
    return {
        "name": name,
        "seed": 0,
        "value": value,
        "empirical_error": 0.04,
        "divergence": {"fc1": 1300.0, "fc2": 7.5},
        "test_error": 0.05,
        "mean_test_error": 0.03,
        "binomial": {"your network": [180, 10_000, 0.0209]},
        "unmodified": [0.19, 0.06],
        "loss_increase": [0.02, 0.03],
        "curve": [[0.5, 10.0], [0.05, 1307.5]],
        "cpu_seconds": 61.0,
        "variances": {"fc1": [[1.0, 0.1], [1e-3, 1e-2]]},
        "scales": {"fc1": 0.01},
    }


def test_the_page_of_certificates_has_means_over_seeds_and_says_what_is_missing() -> None:
    records = [_certified("two-600-isotropic", 0.11), _certified("two-600-isotropic", 0.12)]
    records += [_certified("two-600-base", 0.16), _certified("two-600-iter", 0.13)]
    text = certificates.page(records, certificates.CELLS)
    assert "| two-600-isotropic | 2 | .1150 ± .0050 | .1198 (Wu et al. 2020)" in text
    assert "≤ .115: met |" in text
    assert "at most 2 here. The slowest run, two-600-isotropic with seed 0, took 1.0 CPU minutes" in text
    assert "1300 + 7.5 | 61 |" in text
    assert "Base .1600 > Iter .1300" in text
    assert "Not measured yet" in text
    assert "two-600-smooth" in text.rsplit("Not measured yet", maxsplit=1)[1]
    drawn = certificates_page.bounds_chart({"two-600-base": records[2:3]}, certificates.CELLS)
    for chart in (drawn, certificates_page.variances_chart(records[0])):
        assert chart.to_dict()["layer"]


def test_all_seeds_of_the_first_cells_come_before_other_cells() -> None:
    asked = certificates.order(["ten-lenet-learnt", "ten-600-smooth", "two-600-smooth"], [0, 1])
    assert [name for name, _ in asked] == ["two-600-smooth", "ten-600-smooth"] * 2 + ["ten-lenet-learnt"] * 2
    assert [seed for _, seed in asked] == [0, 0, 1, 1, 0, 1]


def test_a_record_of_other_settings_is_measured_again(monkeypatch: Any, tmp_path: Path) -> None:
    cell = certificates.CELLS["two-600-smooth"]
    kept = [_certified(cell.name, 0.08) | {"recipe": recipe} for recipe in (cell.recipe, "of other settings")]
    (tmp_path / "records").write_text("".join(f"{json.dumps(one)}\n" for one in kept))
    monkeypatch.setattr(certificates, "RECORDS", tmp_path / "records")
    assert certificates._records() == kept[:1]


def test_a_cell_of_certificates_is_measured_from_end_to_end(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(certificates, "STORE", tmp_path)
    monkeypatch.setattr(certificates, "TRAINING_EPOCHS", 1)
    cell = certificates.Cell("digits-8", "two", (8,), "smooth", "–", None, {"epochs": 2, "passes": 1})
    record = certificates.measure(cell, 0, tmp_path)
    assert 0 < record["empirical_error"] <= record["value"] <= 1
    assert "priors before, 10 tried" in record["charges"]
    assert not list(tmp_path.glob("digits-8-0/*"))  # finished
    json.dumps(record)
    certificates.page([record | {"name": "two-600-smooth"}], certificates.CELLS)

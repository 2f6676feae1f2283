"""The claims' page: verdicts follow their stated rules, and one network is measured from end to end."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from reproductions import certificates, certificates_page, dissecting
from reproductions.claims import Verdict, _within, judged, misclassification, page, spread, table
from reproductions.measure import Run, measure, outliers_and_averages

import deepspectra as ds
from deepspectra import zoo

DOCS = Path(__file__).parent.parent / "docs"
REMOVED, METHODS = ("class", "class + logit", "interaction"), ("subtraction", "projection")


def record(*, left: int = 0, seed: int = 0, ratio: float = 5.0, test_error: float = 0.1) -> dict[str, Any]:
    layers = [
        {
            "layer": name,
            "features_between": 0.2 * depth,
            "features_top_over_bulk": float(depth),
            "errors_top_over_bulk": 9.0 - depth,
            "errors_class": 0.5,
            "class_cosine": 0.95,
            "cross_cosine": 0.9,
            "nc1": 1.0,
            "simplex": 0.1,
        }
        for depth, name in enumerate(["fc1", "fc2"], 1)
    ]
    operator = {
        "values": [2.0] * 13,
        "edge": 0.2,
        "outliers": 10,
        "shares": {"class": 0.6, "logit": 0.3, "interaction": 0.05, "within": 0.05},
        "left": {f"{what}, {how}": [left, left] for what in REMOVED[:2] for how in METHODS},
        "overlap": {"class": 0.9, "cross_class": 0.97},
        "ratio": ratio,
    }
    shifts = {
        what: {"outliers": 0.5, "bump": 0.1, "bulk": 0.0}
        for what in ("class", "class + logit", "interaction")
    }
    shifts |= {
        "cross": {"outliers": 0.1, "bump": 0.4, "bulk": 0.2},
        "within": {"outliers": 0.0, "bump": 1.0, "bulk": 3.0},
    }
    return {
        "model": "mlp",
        "data": "mnist",
        "per_class": 13,
        "seed": seed,
        "train_accuracy": 1.0,
        "test_error": test_error,
        "H": operator,
        "G": operator,
        "shifts": shifts,
        "layers": layers,
        "clustering": [0.6, 0.2, 0.3, 0.0],
    }


def row(text: str, title: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(f"| {title}"))


def test_verdicts_follow_from_the_records() -> None:
    good, bad = page([record(left=1)]), page([record(left=8)])
    assert "Holds: in 1 of 1 runs." in row(good, "The outliers are attributable to the class means")
    assert "Does not hold: in 0 of 1 runs." in row(bad, "The outliers are attributable to the class means")
    assert "Features: Holds" in row(good, "Outliers of features")
    assert "Errors: Does not hold" in row(good, "Outliers of features")
    assert "Bump: Holds: in 1 of 1 runs. Bulk: Holds" in row(good, "Cross-class means make the bump")
    both = page([record(left=1), record(left=8, seed=1)])
    assert "Holds in part: in 1 of 2 runs." in row(both, "The outliers are attributable to the class means")


def test_error_bars_are_standard_errors_over_seeds() -> None:
    assert spread([1.0, 2.0, 3.0]) == f"2.00 ± {1 / math.sqrt(3):.2f}"
    assert spread([1.0, math.nan]) == "1.00"
    assert spread([]) == "–"
    assert judged([], lambda _: True) == Verdict("Not measured.")
    assert table(["a"], [["b"]]) == "| a |\n| --- |\n| b |"


def test_a_rank_correlation_has_an_interval() -> None:
    fits = [record(seed=j, ratio=float(j), test_error=0.5 - 0.01 * j) for j in range(12)]
    found = misclassification(fits)
    assert found.verdicts[0].text.startswith("Holds: surely negative on 1 of 1")
    assert found.rows[0][2] == "-1.00"
    mixed = [record(seed=j, ratio=float(j), test_error=float((7 * j) % 12)) for j in range(12)]
    assert misclassification(mixed).verdicts[0].text.startswith("Does not hold")


def test_verdicts_say_how_many_runs_of_each_network_they_rest_on() -> None:
    runs = [record(left=1), record(left=8, seed=1), record(left=1) | {"model": "lenet", "layers": []}]
    text = page(runs)
    section = text.split("## The outliers are attributable to the class means")[1].split("##")[0]
    assert "Runs by network: lenet 1 of 1, mlp 1 of 2." in section
    assert "Bump by network: lenet 1 of 1, mlp 2 of 2." in text
    assert "Runs by network: mlp 4 of 4." in text.split("## Mean gradients are products")[1]


@pytest.mark.skipif(not (DOCS / "claims.jsonl").exists(), reason="no records were made yet")
def test_the_page_is_that_of_its_records() -> None:
    records = [json.loads(line) for line in (DOCS / "claims.jsonl").read_text().splitlines()]
    assert (DOCS / "claims.md").read_text() == page(records)


def test_dear_networks_are_measured_by_a_sample(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Half of the images drawn: outliers, edge and shares are nearly those of all, and a certificate says so."""
    problem, num_classes = trained_digits()
    whole = outliers_and_averages(problem, num_classes)
    monkeypatch.setattr("reproductions.measure.LARGE", 0)
    monkeypatch.setattr("reproductions.measure.DEAR", 0)
    monkeypatch.setattr("reproductions.measure.SHARE", 2)
    monkeypatch.setattr("reproductions.measure.FEWEST", 1)
    sampled = outliers_and_averages(problem, num_classes)
    assert sampled["sample"]["examples"] == 150
    assert "sample" not in whole
    for name in ("H", "G"):
        assert abs(sampled[name]["outliers"] - whole[name]["outliers"]) <= 1
        assert sampled[name]["edge"] == pytest.approx(whole[name]["edge"], rel=0.2)
        assert sampled[name]["values"][:3] == pytest.approx(whole[name]["values"][:3], rel=0.1)
        for part, share in whole[name]["shares"].items():
            assert sampled[name]["shares"][part] == pytest.approx(share, abs=0.05)
        assert sampled[name]["overlap"]["class"] == pytest.approx(whole[name]["overlap"]["class"], abs=0.05)


@pytest.mark.parametrize(("num", "residual"), [(3, 0.4), (9, 0.05)])
def test_outliers_lie_within_a_sample_at_least_as_far_as_the_page_says(num: int, residual: float) -> None:
    values = torch.cat([torch.linspace(9, 4, num), torch.linspace(2, 0.1, 40 - num)]).double()
    noise = torch.randn(40, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    vectors = torch.linalg.qr(torch.eye(40, 9, dtype=torch.float64) + residual / 20 * noise).Q
    image = values[:, None] * vectors
    norm = float((image - vectors @ (vectors.T @ image)).norm())
    truly = float(vectors[:num].square().sum()) / num
    h = {"values": values.tolist()}
    stated = _within(record() | {"H": h, "sample": {"residual": norm}}, num)
    assert 0 < stated <= truly < 1
    assert 1 - stated < 10 * (1 - truly) + 1e-9
    assert _within(record() | {"H": h, "sample": {"residual": 10}}, num) == 0
    assert _within(record() | {"H": h, "sample": {"residual": 0}}, 0) == 0


def trained_digits() -> tuple[ds.Problem, int]:
    data = zoo.load("digits", per_class=30)
    model = zoo.build("mlp", input_shape=(1, 8, 8), num_classes=10, seed=0)
    zoo.train(model, data, epochs=20, learning_rate=0.05, batch_size=16)
    return ds.Problem(model, data), 10


@pytest.mark.slow
def test_a_network_is_measured_from_end_to_end(tmp_path: Path) -> None:
    found = measure(Run("mlp", "digits", 13, 0), tmp_path)
    assert found["train_accuracy"] == 1
    assert found["H"]["outliers"] > 5
    assert set(found["shifts"]["within"]) == {"outliers", "bump", "bulk"}
    assert found["shifts"]["within"]["bulk"] == 3
    assert json.loads(json.dumps(found))
    assert "mlp | digits" in page([found])


def test_layers_are_dissected_and_set_beside_published_numbers() -> None:
    build = partial(zoo.mlp, widths=(8,))
    run = dissecting.Run("784-200-200-10, mnist", "batch-norm", build, "digits", None, 4, 2)
    record = dissecting.measure(run, Path())
    assert record == json.loads(json.dumps(record))
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
    assert "| two-600-isotropic | 2 | .1150 ± .0071 | .1198 (Wu et al. 2020)" in text
    assert "1300 + 7.5 | 61 |" in text
    assert "Base .1600 > Iter .1300" in text
    assert "Not measured yet" in text
    assert "two-600-smooth" in text.rsplit("Not measured yet", maxsplit=1)[1]
    drawn = certificates_page.bounds_chart({"two-600-base": records[2:3]}, certificates.CELLS)
    for chart in (drawn, certificates_page.variances_chart(records[0])):
        assert chart.to_dict()["layer"]


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

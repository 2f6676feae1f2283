"""What the efforts resolve: distances from dense truth, and the page that says where marks are missed."""

from __future__ import annotations

import json

import pytest
import torch
from reproductions import resolution
from scipy.stats import wasserstein_distance

import deepspectra as ds
from deepspectra.algorithms.dense_spectrum import exact_density
from deepspectra.jobs.effort import EFFORTS
from deepspectra.operators.base import Matrix


def test_distances_of_a_density_are_those_of_the_textbook() -> None:
    exact = torch.cat([torch.zeros(40), torch.logspace(-5, 0, 60), -torch.logspace(-5, -1, 20)]).double()
    exact = exact.sort().values
    same = resolution.distances(exact_density(Matrix(torch.diag(exact))), exact)
    assert (same.ks, same.decades, same.covered, same.width, same.bins_covered) == pytest.approx((0, 0, 1, 0, 1))
    found = ds.density(torch.diag(exact), 1, 6)
    some = resolution.distances(found, exact)
    shown = [values.abs().clamp_min(1e-6).log10() for values in (found.nodes, exact)]
    assert some.decades == pytest.approx(wasserstein_distance(*shown, found.weights))
    at = torch.cat([exact, found.nodes])
    at = at[at.abs() >= 1e-6]
    truth = torch.searchsorted(exact, at, right=True) / len(exact)
    assert some.ks == pytest.approx(float((found.cdf(at) - truth).abs().max()), abs=1e-6)
    assert min(some.width, some.bins_width) > 0


def test_the_page_of_what_efforts_resolve_says_where_marks_are_missed() -> None:
    facts = {"network": "mlp", "size": 3540, "examples": 1000, "loss": 0.007, "products": 513, "seconds": 1.0}
    band = {"covered": 0.97, "width": 0.1, "bins_covered": 1.0, "bins_width": 0.01}
    rows = [
        facts | band | {"probes": level.num_probes, "steps": level.num_steps, "seed": seed, "ks": ks, "decades": 0.1}
        for effort, ks in (("standard", 0.15), ("paper", 0.08))
        for seed in range(2)
        for level in (EFFORTS[effort],)
    ]
    page = resolution.page(rows)
    assert "≤ 0.2, ≤ 0.35 decades, ≥ 90%: met" in page
    assert "≤ 0.07, ≤ 0.12 decades, ≥ 90%: **missed**" in page
    rows[1]["covered"] = 0.8
    assert "≤ 0.2, ≤ 0.35 decades, ≥ 90%: **missed**" in resolution.page(rows)


def test_the_page_of_what_efforts_resolve_is_that_of_its_records() -> None:
    records = [json.loads(line) for line in resolution.RECORDS.read_text().splitlines()]
    assert resolution.PAGE.read_text() == resolution.page(records)
    assert records
    assert {record["network"] for record in records} <= set(resolution.NETWORKS)

"""Two standard errors cover what they say, and no estimate is biased or NaN; the page of all this by one command."""

from __future__ import annotations

import math

import pytest
import torch
from reproductions import coverage
from reproductions.coverage import (
    BAND_TABLES,
    SAMPLE_TABLES,
    SAMPLES,
    SEEDS,
    TABLES,
    Check,
    Probes,
    Tally,
    measure,
    tally,
)
from reproductions.spectra import BAND_WORDS, WORDS, band_cases, cases

import deepspectra as ds

BIAS = 4.5  # standard errors of the mean: hardly ever by chance, in a few hundred cells


LEAST = 0.9  # of the runs, of which .95 are stated


ESTIMATES = ("Trace", "Frobenius norm", "Diagonal")


DENSITIES = ("Mean eigenvalue of a density", "Second moment of a density", "Counts of a density")


def fair(found: Tally) -> None:
    assert not found.not_finite
    assert found.keeps(LEAST)
    assert math.isnan(found.bias) or abs(found.bias) < BIAS


@pytest.mark.slow
@pytest.mark.parametrize("spectrum", list(WORDS))
@pytest.mark.parametrize(("title", "row"), [(title, row) for title, rows in TABLES.items() for row in rows])
def test_estimates_keep_their_word_over_many_seeds(title: str, row: str, spectrum: str) -> None:
    fair(measure(TABLES[title][row], cases()[spectrum], SEEDS))


@pytest.mark.slow
@pytest.mark.parametrize("spectrum", list(BAND_WORDS))
@pytest.mark.parametrize(("title", "row"), [(title, row) for title, rows in BAND_TABLES.items() for row in rows])
def test_bands_of_the_mass_hold_it_over_many_seeds(title: str, row: str, spectrum: str) -> None:
    assert measure(BAND_TABLES[title][row], band_cases()[spectrum], SEEDS).keeps()


@pytest.mark.parametrize("spectrum", list(BAND_WORDS))
@pytest.mark.parametrize("row", ["4 × 8", "4 × 8, 3 pairs of residual .05 deflated"])
def test_bands_of_the_mass_hold_it(row: str, spectrum: str) -> None:
    for rows in BAND_TABLES.values():
        assert measure(rows[row], band_cases()[spectrum], 20).keeps()


def test_a_band_is_no_wider_than_what_a_wrong_one_would_need() -> None:
    """Probes of other spectra, or one whose nodes are moved by a tenth, lie outside at many points."""
    case = band_cases()["Marchenko-Pastur + 3"]
    x = coverage.points(case.values)
    found, _ = coverage.density(Probes(2, 48), case.name, 0)
    low, high = found.cdf_band(x)
    moved = torch.searchsorted(1.1 * case.values.flip(0), x, right=True).double() / len(case.values)
    other = torch.searchsorted(band_cases()["half zeros"].values.flip(0), x, right=True).double() / 300
    for wrong in (moved, other):
        outside = (wrong < low - 1e-9) | (wrong > high + 1e-9)
        assert float(outside[(x > 0.2) & (x < 5)].double().mean()) > 0.1


@pytest.mark.parametrize("spectrum", ["flat + spiked", "multiple"])
@pytest.mark.parametrize("title", ESTIMATES)
@pytest.mark.parametrize("row", ["4 products", "8 products"])
def test_two_standard_errors_of_few_products_cover(title: str, row: str, spectrum: str) -> None:
    found = measure(TABLES[title][row], cases()[spectrum], 60)
    assert found.inside >= 0.92
    fair(found)


def test_many_products_have_no_needlessly_wide_band() -> None:
    case = cases()["flat"]
    truth = float(case.values.sum())
    runs = [ds.trace(case.matrix, 64, seed=seed) for seed in range(30)]
    errors = torch.tensor([[run.value - truth, run.standard_error] for run in runs]).square().mean(0).sqrt()
    assert 0.5 < float(errors[0] / errors[1]) < 1


def test_a_density_that_deflates_pairs_of_the_same_seed_keeps_its_word() -> None:
    probes = Probes(4, 8, deflated=3, rtol=1e-2)
    for degree in (1, 2):
        run = lambda case, seed, d=degree: coverage.moment(case, seed, probes=probes, degree=d)  # noqa: E731
        fair(measure(run, cases()["flat"], 30))


def test_locking_copies_of_multiple_eigenvalues_biases_no_moment() -> None:
    found = measure(TABLES["Mean eigenvalue of a density"]["4 probes × 8 steps"], cases()["multiple"], 40)
    fair(found)


def test_a_run_that_is_not_finite_covers_nothing() -> None:
    found = tally([Check(1.0, 0.1), Check(math.nan), Check(1.0, -0.1)])
    assert (found.inside, found.not_finite, found.bias) == (pytest.approx(2 / 3), 1, 0)
    assert not found.keeps(0.1)


def test_the_page_has_a_row_for_every_estimate() -> None:
    cell = Tally(runs=200, inside=0.945, bias=-1.25, products=8, not_finite=1)
    found = {title: {row: dict.fromkeys(cases(), cell) for row in rows} for title, rows in TABLES.items()}
    page = coverage.page(found)
    sampled = {t: {row: dict.fromkeys(SAMPLES, cell) for row in rows} for t, rows in SAMPLE_TABLES.items()}
    page_of_samples = coverage.page(sampled)
    assert all(f"| {row} | 94.5% (-1.2) |" in page_of_samples for rows in SAMPLE_TABLES.values() for row in rows)
    for title, rows in TABLES.items():
        assert f"## {title}" in page
        assert all(f"| {row} | 94.5% (-1.2) |" in page for row in rows)
    banded = {t: {row: dict.fromkeys(band_cases(), cell) for row in rows} for t, rows in BAND_TABLES.items()}
    page_of_bands = coverage.page(banded)
    assert all(f"| {row} | 94.5% (-1.2) |" in page_of_bands for rows in BAND_TABLES.values() for row in rows)
    assert (set(WORDS), set(BAND_WORDS)) == (set(cases()), set(band_cases()))


def test_the_page_in_the_documents_is_that_of_the_records() -> None:
    found = {title: rows for title in (*TABLES, *BAND_TABLES, *SAMPLE_TABLES) if (rows := coverage.recorded(title))}
    assert coverage.PAGE.read_text() == coverage.page(found)
    assert {*ESTIMATES, *DENSITIES} <= set(found)


def test_a_cell_says_how_many_runs_claimed_anything_and_what_they_took() -> None:
    found = tally([Check(1.0, products=10, claimed=True), Check(1.0, products=20, claimed=False)])
    assert found.claimed == 0.5
    assert coverage._cell(found) == "100.0%; 50%, 15 products"


@pytest.mark.slow
@pytest.mark.parametrize("sample", [SAMPLES["9 of 300 examples"], SAMPLES["3 of 300 examples"]])
def test_subspaces_of_samples_overlap_as_much_as_certified(sample: coverage.Sample) -> None:
    fair(measure(coverage.overlap, sample, SEEDS))

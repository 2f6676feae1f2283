"""Two standard errors cover what they say, and no estimate is biased or NaN; the page of all this by one command."""

from __future__ import annotations

import math
import warnings

import numpy as np
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
from scipy.stats import norm, t

import deepspectra as ds
from deepspectra.algorithms.probes import stream
from deepspectra.analysis.principal_subspace import overlap_bound
from deepspectra.confidence import standard_error
from deepspectra.errors import ConvergenceWarning, OptionError
from deepspectra.moment_bounds import Jacobi
from deepspectra.operators.base import Matrix
from spectra import Function

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
@pytest.mark.parametrize(
    ("title", "row"), [(title, row) for title, rows in BAND_TABLES.items() for row in rows]
)
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


@pytest.mark.parametrize("basis", ["full", "none"])
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_no_weight_is_nan_however_small_the_problem_and_however_much_is_deflated(
    size: int, basis: str
) -> None:
    line = torch.linspace(-1, 2, size, dtype=torch.float64)
    for values in (line, line.clamp_min(0), torch.zeros(size).double(), torch.ones(size).double(), line**21):
        for deflated in {1, size - 1, size} - {0}:
            for num_probes, seed in ((1, 0), (3, 1)):
                A = Matrix(torch.diag(values))
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", ConvergenceWarning)
                    pairs = ds.eigenpairs(A, deflated, "magnitude", seed=seed)
                found = ds.density(A, num_probes, 4, deflate=pairs, seed=seed, basis=basis)
                assert bool(torch.isfinite(torch.cat([found.nodes, found.weights])).all())
                assert float(found.weights.sum()) == pytest.approx(1, abs=1e-12)
                assert math.isnan(found.mean_standard_error) <= (num_probes == 1)
                for scale in ("linear", "log"):
                    assert bool(torch.isfinite(found.smooth(scale, num_points=8).density).all())


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(torch.float64, s) for s in (1e-290, 1e-200, 1e155, 1e300)]
    + [(torch.float32, s) for s in (1e-37, 1e36)],
)
def test_estimates_are_right_at_any_scale_a_type_holds(dtype: torch.dtype, scale: float) -> None:
    A = torch.diag(torch.linspace(1, 10, 30, dtype=dtype))
    rtol = 1e-9 if dtype == torch.float64 else 1e-4
    large = (A.double() * scale).to(dtype)
    for estimate in (ds.trace, ds.frobenius_norm):
        for num_products in (3, 10, 30):
            unit, found = estimate(A, num_products), estimate(large, num_products)
            assert found.value / scale == pytest.approx(unit.value, rel=rtol)
            assert found.standard_error / scale == pytest.approx(unit.standard_error, rel=0.01)
    for num_products in (3, 10, 30):
        entries = ds.diagonal(large, num_products).values.double() / scale
        torch.testing.assert_close(entries, ds.diagonal(A, num_products).values.double(), rtol=rtol, atol=0)
    for basis in ("full", "none"):
        unit, found = ds.density(A, 3, 6, basis=basis), ds.density(large, 3, 6, basis=basis)
        torch.testing.assert_close(found.nodes / scale, unit.nodes, rtol=10 * rtol, atol=0)
        torch.testing.assert_close(found.weights, unit.weights, rtol=1e-3, atol=1e-9)
        assert found.mean_standard_error / scale == pytest.approx(unit.mean_standard_error, rel=1e-2)


def test_products_are_taken_again_only_where_they_over_or_underflow() -> None:
    seen = []

    def apply(block: torch.Tensor, scale: float) -> torch.Tensor:
        seen.append(block.shape[1])
        return scale * block

    for dtype, scale, again in (
        (torch.float32, 1e30, 0),
        (torch.float32, 1e38, 4),
        (torch.float32, 1e-36, 4),
        (torch.float64, 1e200, 0),
        (torch.float64, 0.0, 0),
    ):
        seen.clear()
        A = Function(lambda block, s=scale: apply(block, s), 100, dtype=dtype)
        found = ds.trace(A, 8)
        assert sum(seen) == found.num_products
        assert found.num_products - again <= 8
        assert found.value == pytest.approx(100 * scale, rel=1e-5)


def test_equal_seeds_of_different_estimates_draw_different_vectors() -> None:
    draws = [torch.randn(100, generator=stream(0, purpose)) for purpose in ("density", "trace", "diagonal")]
    draws += [torch.randn(100, generator=torch.Generator().manual_seed(0))]
    together = torch.corrcoef(torch.stack(draws)) - torch.eye(4)
    assert float(together.abs().max()) < 0.4
    assert torch.equal(torch.randn(9, generator=stream(7, "a")), torch.randn(9, generator=stream(7, "a")))
    with pytest.raises(OptionError, match="seed"):
        stream(2**70, "a")


def test_an_interval_has_students_quantile_where_the_scatter_is_all_that_is_known() -> None:
    samples = torch.tensor([1.0, 4.0, 2.0], dtype=torch.float64)
    error = float(standard_error(samples))
    assert 2 * error == pytest.approx(t.ppf(norm.cdf(2), 2) * float(samples.std()) / math.sqrt(3))
    A = Function(lambda block: block * torch.arange(50.0)[:, None], 50)
    one = ds.trace(A, 3)
    low, high = one.interval(0.9)
    assert (high - low) / 2 == pytest.approx(one.standard_error * 2 * t.ppf(0.95, 2) / t.ppf(norm.cdf(2), 2))
    many = ds.trace(A, 32)
    low, high = many.interval()
    assert (high - low) / 2 == pytest.approx(many.standard_error * norm.ppf(0.975))
    assert (low + high) / 2 == pytest.approx(many.value)
    assert ds.diagonal(A, 8).interval(0.5)[1].shape == (50,)
    with pytest.raises(OptionError, match="confidence"):
        many.interval(1.0)


def test_the_interval_of_a_mean_eigenvalue_has_the_normal_quantile_and_covers_it() -> None:
    case = cases()["decaying"]
    truth, inside = float(case.values.mean()), 0
    for seed in range(60):
        found = ds.density(case.matrix, 4, 8, seed=seed)
        low, high = found.mean_interval(0.8)
        assert (low + high) / 2 == pytest.approx(found.mean)
        assert (high - low) / 2 == pytest.approx(found.mean_standard_error * norm.ppf(0.9))
        inside += low <= truth <= high
    assert inside >= 0.7 * 60  # of which .8 are stated
    exact = ds.density(torch.diag(torch.arange(4.0)), 1, 8)
    assert exact.mean_interval() == pytest.approx((1.5, 1.5))
    with pytest.raises(OptionError, match="confidence"):
        exact.mean_interval(0)


def test_christoffels_function_is_the_least_square_of_a_polynomial_that_is_one_at_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    nodes, weights = torch.linspace(-1, 1, 40).double(), torch.rand(40, generator=generator).double()
    powers = nodes[:, None] ** torch.arange(6)
    gram = powers.T @ (weights[:, None] * powers) / weights.sum()
    expected = 1 / float(torch.linalg.inv(gram)[0, 0])
    jacobi = Jacobi.of(nodes.numpy(), (weights / weights.sum()).numpy(), 6)
    assert float(jacobi.christoffel(np.zeros(1))[0]) == pytest.approx(expected, rel=1e-9)


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
    assert all(
        f"| {row} | 94.5% (-1.2) |" in page_of_samples for rows in SAMPLE_TABLES.values() for row in rows
    )
    for title, rows in TABLES.items():
        assert f"## {title}" in page
        assert all(f"| {row} | 94.5% (-1.2) |" in page for row in rows)
    banded = {t: {row: dict.fromkeys(band_cases(), cell) for row in rows} for t, rows in BAND_TABLES.items()}
    page_of_bands = coverage.page(banded)
    assert all(f"| {row} | 94.5% (-1.2) |" in page_of_bands for rows in BAND_TABLES.values() for row in rows)
    assert (set(WORDS), set(BAND_WORDS)) == (set(cases()), set(band_cases()))


def test_the_page_in_the_documents_is_that_of_the_records() -> None:
    found = {
        title: rows for title in (*TABLES, *BAND_TABLES, *SAMPLE_TABLES) if (rows := coverage.recorded(title))
    }
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


def test_the_least_overlap_allows_for_what_three_checks_do_not_know() -> None:
    H = torch.diag(torch.tensor([3.0, 2.0, *[0.1] * 30], dtype=torch.float64))
    angle = torch.tensor(0.05, dtype=torch.float64)
    u = torch.zeros(32, 1, dtype=torch.float64)
    u[0], u[1] = angle.cos(), angle.sin()
    image = H @ u
    image -= u @ (u.T @ image)
    draws = torch.randn(400, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    squares = (draws * float(image.norm())).square()  # what the checks see of one direction
    norms = squares.mean(1).sqrt()
    errors = standard_error(squares, 1) / (2 * norms)
    kept, plain = (
        sum(
            overlap_bound(float(n + 2 * k * e), 1.0, 1) <= float(angle.cos() ** 2)
            for n, e in zip(norms, errors, strict=True)
        )
        / 400
        for k in (1, 0)
    )
    assert kept > 0.85 > 0.6 > plain

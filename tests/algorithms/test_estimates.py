"""Trace, diagonal and Frobenius norm against those of dense matrices."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch

import deepspectra as ds
from deepspectra.algorithms.estimates import _diagonal_left_out, diagonal, frobenius_norm, sketch, trace
from deepspectra.algorithms.probes import Probes, stream
from deepspectra.confidence import standard_error
from deepspectra.errors import FallbackWarning, NonFiniteError, OptionError, ShapeError
from deepspectra.operators.base import Matrix
from deepspectra.results import Diagonal
from spectra import SIZE, SPECTRA, Function, rotated

TRUTHS = {trace: torch.trace, frobenius_norm: torch.linalg.norm, diagonal: torch.diagonal}


LEAST_COVERED = {trace: 0.8, frobenius_norm: 0.8, diagonal: 0.9}  # a diagonal has many entries a run


RATIOS = {trace: (0.5, 1.15), frobenius_norm: (0.3, 1.1), diagonal: (0.5, 1)}  # errors over standard errors


estimates = pytest.mark.parametrize("estimate", TRUTHS, ids=lambda estimate: estimate.__name__)


def found(result):
    """Values and standard errors."""
    values = result.values if isinstance(result, Diagonal) else result.value
    return tuple(torch.as_tensor(part, dtype=torch.float64) for part in (values, result.standard_error))


def root_mean_square(errors):
    return float(errors.double().square().mean().sqrt())


@estimates
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("num_products", [16, 64])
def test_two_standard_errors_cover_the_truth_and_are_not_needlessly_wide(estimate, spectrum, num_products):
    matrix = rotated(SPECTRA[spectrum])
    num_runs = 20 if estimate is diagonal else 80
    runs = [found(estimate(matrix, num_products, seed=seed)) for seed in range(num_runs)]
    values, claimed = (torch.stack(numbers) for numbers in zip(*runs, strict=True))
    errors = values - TRUTHS[estimate](matrix)
    assert float((errors.abs() <= 2 * claimed).double().mean()) >= LEAST_COVERED[estimate]
    low, high = RATIOS[estimate]
    assert low < root_mean_square(errors) / root_mean_square(claimed) < high


SIGNS = {
    "of size 1": torch.cat([torch.ones(100), -torch.ones(100)]),
    "about 1": torch.cat([torch.linspace(0.8, 1.2, 100), -torch.linspace(0.8, 1.2, 100)]),
    "1 beside one of 10": torch.cat([torch.tensor([10.0]), torch.ones(50), -torch.ones(49)]),
}


@estimates
@pytest.mark.parametrize("spectrum", SIGNS)
@pytest.mark.parametrize("num_products", [16, 64])
def test_two_standard_errors_cover_where_eigenvalues_of_both_signs_are_of_one_size(estimate, spectrum, num_products):
    matrix = rotated(SIGNS[spectrum])
    runs = [found(estimate(matrix, num_products, seed=seed)) for seed in range(20 if estimate is diagonal else 80)]
    values, claimed = (torch.stack(numbers) for numbers in zip(*runs, strict=True))
    errors = values - TRUTHS[estimate](matrix)
    assert float((errors.abs() <= 2 * claimed).double().mean()) >= 0.93
    assert root_mean_square(errors) > 0.25 * root_mean_square(claimed)


@pytest.mark.parametrize(("estimate", "power"), [(trace, 1), (frobenius_norm, 2)])
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("num_products", [16, 64])
def test_the_trace_and_the_square_of_the_norm_are_unbiased(estimate, power, spectrum, num_products):
    matrix = rotated(SPECTRA[spectrum])
    values = torch.stack([found(estimate(matrix, num_products, seed=seed))[0] for seed in range(80)])
    errors = values**power - TRUTHS[estimate](matrix) ** power
    assert abs(float(errors.mean())) < 4 * float(errors.std()) / math.sqrt(len(errors))


def test_every_entry_of_the_diagonal_is_unbiased():
    """The mean over all sign vectors, dependent ones among them, is the diagonal itself."""
    matrix = torch.zeros(5, 5, dtype=torch.float64)
    matrix[:4, :4] = rotated(torch.tensor([4.0, -3, 2, 0]))
    values = []
    for signs in product((1.0, -1.0), repeat=8):
        omega = torch.ones(5, 2, dtype=torch.float64)
        omega[1:] = torch.tensor(signs, dtype=torch.float64).view(4, 2)
        values.append(_diagonal_left_out(sketch(Probes(Matrix(matrix), 4, None), omega)).value)
    torch.testing.assert_close(torch.stack(values).mean(0), matrix.diagonal(), rtol=0, atol=1e-12)


def plain_error(estimate, matrix, num_samples):
    """Standard deviation of the mean of so many independent samples."""
    if estimate is diagonal:
        return math.sqrt(float((matrix.square().sum(1) - matrix.diagonal().square()).mean()) / num_samples)
    if estimate is trace:
        return math.sqrt(2 * float(matrix.square().sum()) / num_samples)
    return math.sqrt(2 * float((matrix @ matrix).square().sum()) / num_samples) / (2 * float(matrix.norm()))


@pytest.mark.parametrize(
    ("estimate", "gain", "num_runs"), [(trace, 5, 20), (frobenius_norm, 100, 20), (diagonal, 15, 5)]
)
def test_a_decaying_spectrum_costs_fewer_products_than_independent_samples(estimate, gain, num_runs):
    matrix = rotated(SPECTRA["trained"])
    values = torch.stack([found(estimate(matrix, 64, seed=seed))[0] for seed in range(num_runs)])
    errors = values - TRUTHS[estimate](matrix)
    assert root_mean_square(errors) < plain_error(estimate, matrix, 64) / gain


def test_the_diagonal_adds_up_to_the_trace():
    matrix = rotated(SPECTRA["trained"])
    assert float(diagonal(matrix, 64).values.sum()) == pytest.approx(float(matrix.trace()), rel=1e-2)


@estimates
@pytest.mark.parametrize("num_products", [37, 1000])
def test_all_is_exact_from_p_products_on_and_takes_p(estimate, num_products):
    matrix = rotated(torch.linspace(-1, 3, 37))
    result = estimate(matrix, num_products)
    value, error = found(result)
    rtol = 0 if estimate is diagonal else 1e-13
    torch.testing.assert_close(value, TRUTHS[estimate](matrix), rtol=rtol, atol=0)
    assert (float(error.max()), result.num_products, result.method) == (0.0, 37, "exact")


@estimates
def test_an_operator_of_small_rank_is_done_exactly(estimate):
    factor = torch.randn(200, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    value, error = found(estimate(Matrix(factor @ factor.T), 16))
    torch.testing.assert_close(value, TRUTHS[estimate](factor @ factor.T), rtol=1e-11, atol=1e-12)
    size = float(factor.square().sum()) if estimate is diagonal else float(value)
    assert float(error.max()) <= 1e-12 * size


@estimates
def test_of_the_zero_operator_all_is_zero(estimate):
    value, error = found(estimate(torch.zeros(50, 50), 16))
    assert float(value.abs().max()) == float(error.max()) == 0


@estimates
@pytest.mark.parametrize("num_products", [1, 2, 3, 4, 7, 33])
def test_never_more_products_than_allowed(estimate, num_products):
    seen = []
    matrix = rotated(SPECTRA["flat"])
    operator = Function(lambda block: (seen.append(block.shape[1]), matrix @ block)[1], SIZE, dtype=torch.float64)
    result = estimate(operator, num_products)
    assert sum(seen) == result.num_products <= num_products
    assert bool(found(result)[1].isnan().all()) == (num_products == 1)


@pytest.mark.parametrize(
    ("estimate", "name"), [(trace, "trace"), (frobenius_norm, "Frobenius norm"), (diagonal, "diagonal")]
)
def test_a_small_memory_falls_back_to_independent_samples_and_says_so(estimate, name):
    operator = Matrix(rotated(SPECTRA["flat"]))
    operator.memory = 8 * SIZE * 20
    with pytest.warns(FallbackWarning, match=rf"{name}: 96 vectors do not fit A\.memory") as caught:
        result = estimate(operator, 64)
    assert caught[0].filename == __file__
    assert (result.method, result.num_products) == ("Hutchinson", 64)
    value, error = found(result)
    deviation = (value - TRUTHS[estimate](operator.matrix)).abs() / error
    if estimate is diagonal:
        assert float((deviation <= 2).double().mean()) > 0.9
        assert float(deviation.square().mean()) == pytest.approx(1, abs=0.25)
    else:
        assert float(deviation) < 4
    if estimate is frobenius_norm:
        assert 4 * float(error) < 0.05 * float(value)


def test_independent_samples_have_the_mean_and_the_standard_error_of_all_of_them():
    """However many blocks they come in."""
    operator = Matrix(rotated(SPECTRA["flat"]))
    operator.memory = 8 * SIZE * 20
    generator = stream(5, "trace")
    omega = torch.cat([torch.randn(n, SIZE, generator=generator, dtype=torch.float64) for n in (16, 16, 6)])
    samples = SIZE * ((omega @ operator.matrix) * omega).sum(1) / omega.square().sum(1)
    with pytest.warns(FallbackWarning):
        result = trace(operator, 38, seed=5)
    assert result.value == pytest.approx(float(samples.mean()), rel=1e-13)
    assert result.standard_error == pytest.approx(float(standard_error(samples)), rel=1e-12)
    assert result.degrees_of_freedom == 37


@estimates
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-7, 1e7])
def test_estimates_scale_with_the_operator(estimate, scale, dtype):
    matrix = rotated(SPECTRA["trained"], dtype=dtype)
    results = estimate(matrix, 32), estimate(scale * matrix, 32)
    (value, error), (scaled, scaled_error) = (found(result) for result in results)
    double = dtype == torch.float64
    if estimate is diagonal:
        assert results[1].values.dtype == dtype
        rtol = 1e-9 if double else 1e-3
        atol = rtol * float(error.max())
        torch.testing.assert_close(scaled / scale, value, rtol=0, atol=10 * atol)
        torch.testing.assert_close(scaled_error / scale, error, rtol=10 * rtol, atol=atol)
        return
    rtol = {trace: 1e-9 if double else 1e-5, frobenius_norm: 1e-6}[estimate]
    error_rtol = 1e-6 if double else {trace: 1e-2, frobenius_norm: 0.05}[estimate]
    torch.testing.assert_close(scaled / scale, value, rtol=rtol, atol=0)
    torch.testing.assert_close(scaled_error / scale, error, rtol=error_rtol, atol=0)


def test_numbers_near_the_largest_that_a_type_holds_have_estimates():
    """The power of two that scales them may be more than the type holds; what is too large is ∞."""
    size = 2.0**1022
    entries = diagonal(torch.diag(size * torch.linspace(1, 2, 40, dtype=torch.float64)), 8).values
    torch.testing.assert_close(entries / size, torch.linspace(1, 2, 40, dtype=torch.float64), rtol=1, atol=0)
    assert trace(torch.diag(size * torch.ones(40, dtype=torch.float64)), 40).value == math.inf


def test_a_diagonal_in_float32_equals_that_in_float64():
    single, double = (
        diagonal(rotated(SPECTRA["trained"], dtype=dtype), 64) for dtype in (torch.float32, torch.float64)
    )
    assert float((single.values - double.values).abs().max()) < 0.05 * float(double.standard_error.max())


@estimates
def test_a_seed_decides_and_the_global_generator_does_not(estimate):
    matrix = rotated(SPECTRA["flat"])
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = found(estimate(matrix, 16, seed=3))[0]
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    assert torch.equal(found(estimate(matrix, 16, seed=3))[0], first)
    assert not torch.equal(found(estimate(matrix, 16, seed=4))[0], first)


@pytest.mark.parametrize(
    ("estimate", "name"), [(trace, "trace"), (frobenius_norm, "Frobenius norm"), (diagonal, "diagonal")]
)
def test_the_table_names_quantity_operator_and_method(estimate, name):
    last = str(estimate(rotated(SPECTRA["flat"]), 16)).splitlines()[-1]
    assert last.startswith(f"{name} of matrix by leave-one-out, 16 products")
    assert f"{name} of matrix by exact" in str(estimate(torch.eye(9), 9))


@estimates
def test_bad_arguments_are_refused(estimate):
    with pytest.raises(OptionError, match="num_products"):
        estimate(torch.eye(3), 0)
    with pytest.raises(ShapeError, match="square"):
        estimate(torch.ones(3, 4))
    with pytest.raises(NonFiniteError, match="NaN"):
        estimate(Function(lambda block: block * math.nan, 100))


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(torch.float64, s) for s in (1e-290, 1e-200, 1e155, 1e300)] + [(torch.float32, s) for s in (1e-37, 1e36)],
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

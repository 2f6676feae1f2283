"""Frobenius norms against those of dense matrices."""

import math

import pytest
import torch

from deepspectra.algorithms.norm import frobenius_norm
from deepspectra.errors import FallbackWarning, NonFiniteError, OptionError, ShapeError
from deepspectra.operators.base import Function, LowRank, Matrix
from spectra import SPECTRA, rotated


def norm(values):
    return float(values.double().norm())


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("num_products", [16, 64])
def test_two_standard_errors_cover_the_norm(spectrum, num_products):
    matrix, truth = rotated(SPECTRA[spectrum]), norm(SPECTRA[spectrum])
    runs = [frobenius_norm(matrix, num_products, seed=seed) for seed in range(80)]
    covered = sum(abs(run.value - truth) <= 2 * run.standard_error for run in runs) / len(runs)
    assert covered >= 0.8
    errors = torch.tensor([run.value - truth for run in runs], dtype=torch.float64)
    claimed = torch.tensor([run.standard_error for run in runs], dtype=torch.float64)
    ratio = float(errors.square().mean().sqrt() / claimed.square().mean().sqrt())
    assert 0.3 < ratio < 1.1  # neither boasting nor useless
    squares = torch.tensor([run.value**2 - truth**2 for run in runs], dtype=torch.float64)
    assert abs(float(squares.mean())) < 4 * float(squares.std()) / math.sqrt(len(runs))  # unbiased


def test_a_decaying_spectrum_costs_fewer_products_than_independent_samples():
    values = SPECTRA["trained"].double()
    variance = 2 * (values**4).sum() / 64  # of Σ λ² by 64 samples
    plain = float(variance.sqrt()) / (2 * norm(values))
    errors = [frobenius_norm(rotated(values), 64, seed=seed).value - norm(values) for seed in range(20)]
    assert math.sqrt(sum(e * e for e in errors) / 20) < plain / 100


@pytest.mark.parametrize("num_products", [37, 1000])
def test_the_norm_is_exact_from_p_products_on_and_takes_p(num_products):
    matrix = rotated(torch.linspace(-1, 3, 37))
    result = frobenius_norm(matrix, num_products)
    assert result.value == pytest.approx(float(matrix.norm()), rel=1e-13)
    assert (result.standard_error, result.num_products, result.method) == (0.0, 37, "exact")


def test_an_operator_of_small_rank_is_done_exactly():
    factor = torch.randn(200, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    result = frobenius_norm(LowRank(factor), 16)
    assert result.value == pytest.approx(float((factor.T @ factor).norm()), rel=1e-12)
    assert result.standard_error <= 1e-12 * result.value


def test_the_zero_operator_has_norm_zero():
    result = frobenius_norm(torch.zeros(50, 50), 16)
    assert (result.value, result.standard_error) == (0.0, 0.0)


@pytest.mark.parametrize("num_products", [1, 2, 3, 4, 7, 33])
def test_never_more_products_than_allowed(num_products):
    seen = []
    matrix = rotated(SPECTRA["flat"])
    operator = Function(
        lambda block: (seen.append(block.shape[1]), matrix @ block)[1], len(matrix), dtype=torch.float64
    )
    result = frobenius_norm(operator, num_products)
    assert sum(seen) == result.num_products <= num_products
    assert math.isnan(result.standard_error) == (num_products == 1)


def test_a_small_memory_falls_back_to_independent_samples_and_says_so():
    operator = Matrix(rotated(SPECTRA["flat"]))
    operator.memory = 8 * operator.shape[0] * 20
    with pytest.warns(FallbackWarning, match=r"frobenius_norm: 96 vectors do not fit A\.memory"):
        result = frobenius_norm(operator, 64)
    assert result.method == "Hutchinson"
    assert abs(result.value - norm(SPECTRA["flat"])) < 4 * result.standard_error < 0.05 * result.value


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-7, 1e7])
def test_norms_scale_with_the_operator(scale, dtype):
    matrix = rotated(SPECTRA["trained"], dtype=dtype)
    reference, scaled = frobenius_norm(matrix, 32), frobenius_norm(scale * matrix, 32)
    assert scaled.value == pytest.approx(scale * reference.value, rel=1e-6)
    rtol = 1e-6 if dtype == torch.float64 else 0.05
    assert scaled.standard_error == pytest.approx(scale * reference.standard_error, rel=rtol)


def test_a_seed_decides_and_the_global_generator_does_not():
    matrix = rotated(SPECTRA["flat"])
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = frobenius_norm(matrix, 16, seed=3)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    assert frobenius_norm(matrix, 16, seed=3).value == first.value != frobenius_norm(matrix, 16, seed=4).value


def test_the_table_names_the_quantity():
    assert (
        str(frobenius_norm(torch.eye(9), 9)).splitlines()[-1].startswith("Frobenius norm of matrix by exact")
    )


def test_bad_arguments_are_refused():
    with pytest.raises(OptionError, match="num_products"):
        frobenius_norm(torch.eye(3), 0)
    with pytest.raises(ShapeError, match="square"):
        frobenius_norm(torch.ones(3, 4))
    with pytest.raises(NonFiniteError, match="NaN"):
        frobenius_norm(Function(lambda block: block * math.nan, 100))

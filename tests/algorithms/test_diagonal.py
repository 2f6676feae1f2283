"""Diagonals against those of dense matrices."""

import math
from itertools import product

import pytest
import torch

from deepspectra.algorithms.diagonal import _left_out, diagonal
from deepspectra.algorithms.probes import Products
from deepspectra.algorithms.sketch import sketch
from deepspectra.errors import FallbackWarning, NonFiniteError, OptionError, ShapeError
from deepspectra.operators.base import Function, LowRank, Matrix
from spectra import SPECTRA, rotated


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("num_products", [16, 64])
def test_two_standard_errors_cover_the_entries(spectrum, num_products):
    matrix = rotated(SPECTRA[spectrum])
    runs = [diagonal(matrix, num_products, seed=seed) for seed in range(20)]
    errors = torch.stack([run.values for run in runs]) - matrix.diagonal()
    claimed = torch.stack([run.standard_error for run in runs])
    assert float((errors.abs() <= 2 * claimed).double().mean()) > 0.9
    ratio = float(errors.square().mean().sqrt() / claimed.square().mean().sqrt())
    assert 0.5 < ratio < 1  # neither boasting nor useless


def test_every_entry_is_unbiased():
    """The mean over all sign vectors, dependent ones among them, is the diagonal itself."""
    matrix = torch.zeros(5, 5, dtype=torch.float64)
    matrix[:4, :4] = rotated(torch.tensor([4.0, -3, 2, 0]))
    found = []
    for signs in product((1.0, -1.0), repeat=8):
        omega = torch.ones(5, 2, dtype=torch.float64)
        omega[1:] = torch.tensor(signs, dtype=torch.float64).view(4, 2)
        found.append(_left_out(sketch(Products(Matrix(matrix), 4, None), omega))[0])
    torch.testing.assert_close(torch.stack(found).mean(0), matrix.diagonal(), rtol=0, atol=1e-12)


def test_a_decaying_spectrum_costs_fewer_products_than_independent_signs():
    matrix = rotated(SPECTRA["trained"])
    plain = math.sqrt(float((matrix.square().sum(1) - matrix.diagonal().square()).mean()) / 64)
    errors = torch.stack([diagonal(matrix, 64, seed=seed).values - matrix.diagonal() for seed in range(5)])
    assert float(errors.square().mean().sqrt()) < plain / 15


def test_the_diagonal_adds_up_to_the_trace():
    matrix = rotated(SPECTRA["trained"])
    result = diagonal(matrix, 64)
    assert float(result.values.sum()) == pytest.approx(float(matrix.trace()), rel=1e-2)


@pytest.mark.parametrize("num_products", [37, 1000])
def test_the_diagonal_is_exact_from_p_products_on_and_takes_p(num_products):
    matrix = rotated(torch.linspace(-1, 3, 37))
    result = diagonal(matrix, num_products)
    torch.testing.assert_close(result.values, matrix.diagonal(), rtol=0, atol=0)
    assert (float(result.standard_error.max()), result.num_products, result.method) == (0.0, 37, "exact")


def test_an_operator_of_small_rank_is_done_exactly():
    factor = torch.randn(200, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    result = diagonal(LowRank(factor), 16)
    torch.testing.assert_close(result.values, factor.square().sum(1), rtol=1e-11, atol=1e-12)
    assert float(result.standard_error.max()) < 1e-12 * float(factor.square().sum())


def test_the_zero_operator_has_a_zero_diagonal():
    result = diagonal(torch.zeros(50, 50), 16)
    assert float(result.values.abs().max()) == float(result.standard_error.max()) == 0


@pytest.mark.parametrize("num_products", [1, 2, 3, 4, 7, 33])
def test_never_more_products_than_allowed(num_products):
    seen = []
    matrix = rotated(SPECTRA["flat"])
    operator = Function(
        lambda block: (seen.append(block.shape[1]), matrix @ block)[1], len(matrix), dtype=torch.float64
    )
    result = diagonal(operator, num_products)
    assert sum(seen) == result.num_products <= num_products
    assert bool(result.standard_error.isnan().all()) == (num_products == 1)


def test_a_small_memory_falls_back_to_independent_signs_and_says_so():
    operator = Matrix(rotated(SPECTRA["flat"]))
    operator.memory = 8 * operator.shape[0] * 20
    with pytest.warns(FallbackWarning, match=r"diagonal: 96 vectors do not fit A\.memory"):
        result = diagonal(operator, 64)
    assert (result.method, result.num_products) == ("Hutchinson", 64)
    deviation = (result.values - operator.matrix.diagonal()).abs() / result.standard_error
    assert float((deviation <= 2).double().mean()) > 0.9
    assert float(deviation.square().mean()) == pytest.approx(1, abs=0.25)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-7, 1e7])
def test_diagonals_scale_with_the_operator(scale, dtype):
    matrix = rotated(SPECTRA["trained"], dtype=dtype)
    reference, scaled = diagonal(matrix, 32), diagonal(scale * matrix, 32)
    rtol = 1e-9 if dtype == torch.float64 else 1e-3
    atol = rtol * float(reference.standard_error.max())
    assert scaled.values.dtype == dtype
    torch.testing.assert_close(scaled.values / scale, reference.values, rtol=0, atol=10 * atol)
    torch.testing.assert_close(
        scaled.standard_error / scale, reference.standard_error, rtol=10 * rtol, atol=atol
    )


def test_float32_equals_float64():
    single, double = (
        diagonal(rotated(SPECTRA["trained"], dtype=d), 64) for d in (torch.float32, torch.float64)
    )
    assert float((single.values - double.values).abs().max()) < 0.05 * float(double.standard_error.max())


def test_a_seed_decides_and_the_global_generator_does_not():
    matrix = rotated(SPECTRA["flat"])
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = diagonal(matrix, 16, seed=3).values
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    assert torch.equal(diagonal(matrix, 16, seed=3).values, first)
    assert not torch.equal(diagonal(matrix, 16, seed=4).values, first)


def test_the_table_names_the_operator_and_the_method():
    last = str(diagonal(rotated(SPECTRA["flat"]), 16)).splitlines()[-1]
    assert last.startswith("diagonal of matrix by leave-one-out, 16 products")


def test_bad_arguments_are_refused():
    with pytest.raises(OptionError, match="num_products"):
        diagonal(torch.eye(3), 0)
    with pytest.raises(ShapeError, match="square"):
        diagonal(torch.ones(3, 4))
    with pytest.raises(NonFiniteError, match="NaN"):
        diagonal(Function(lambda block: block * math.nan, 100))

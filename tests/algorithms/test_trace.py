"""Traces and the overlap of subspaces."""

import math

import pytest
import torch

from deepspectra.algorithms.overlap import overlap
from deepspectra.algorithms.trace import trace
from deepspectra.errors import DataError, FallbackWarning, NonFiniteError, OptionError, ShapeError
from deepspectra.operators.base import Function, LowRank, Matrix
from spectra import SIZE, SPECTRA, rotated


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("num_products", [16, 64])
def test_two_standard_errors_cover_the_trace(spectrum, num_products):
    matrix = rotated(SPECTRA[spectrum])
    truth = float(SPECTRA[spectrum].double().sum())
    runs = [trace(matrix, num_products, seed=seed) for seed in range(80)]
    covered = sum(abs(run.value - truth) <= 2 * run.standard_error for run in runs) / len(runs)
    assert covered >= 0.8
    errors = torch.tensor([run.value - truth for run in runs])
    claimed = torch.tensor([run.standard_error for run in runs])
    ratio = float(errors.square().mean().sqrt() / claimed.square().mean().sqrt())
    assert 0.5 < ratio < 1.15  # neither boasting nor useless
    assert abs(float(errors.mean())) < 4 * float(errors.std()) / math.sqrt(len(runs))  # unbiased


def test_a_decaying_spectrum_costs_fewer_products_than_hutchinson():
    values = SPECTRA["trained"].double()
    matrix = rotated(values)
    hutchinson = math.sqrt(2 * float(values.square().sum()) / 64)
    errors = [trace(matrix, 64, seed=seed).value - float(values.sum()) for seed in range(20)]
    assert math.sqrt(sum(e * e for e in errors) / 20) < hutchinson / 5


def test_the_trace_is_exact_from_p_products_on_and_takes_p():
    matrix = rotated(torch.linspace(-1, 3, 37))
    result = trace(matrix, 1000)
    assert result.value == pytest.approx(float(matrix.trace()), rel=1e-13)
    assert (result.standard_error, result.num_products, result.method) == (0.0, 37, "exact")


def test_an_operator_of_small_rank_is_done_exactly():
    factor = torch.randn(200, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    result = trace(LowRank(factor), 16)
    assert result.value == pytest.approx(float(factor.square().sum()), rel=1e-12)
    assert result.standard_error <= 1e-12 * result.value


def test_the_zero_operator_has_trace_zero():
    result = trace(torch.zeros(50, 50), 16)
    assert (result.value, result.standard_error) == (0.0, 0.0)


@pytest.mark.parametrize("num_products", [1, 2, 3, 4, 7, 33])
def test_never_more_products_than_allowed(num_products):
    seen = []
    matrix = rotated(SPECTRA["flat"])
    operator = Function(
        lambda block: (seen.append(block.shape[1]), matrix @ block)[1], SIZE, dtype=torch.float64
    )
    result = trace(operator, num_products)
    assert sum(seen) == result.num_products <= num_products
    assert math.isnan(result.standard_error) == (num_products == 1)


def test_a_small_memory_falls_back_to_hutchinson_and_says_so():
    operator = Matrix(rotated(SPECTRA["flat"]))
    operator.memory = 8 * SIZE * 20
    with pytest.warns(FallbackWarning, match=r"A\.memory"):
        result = trace(operator, 64)
    assert result.method == "Hutchinson"
    assert abs(result.value - float(SPECTRA["flat"].sum())) < 4 * result.standard_error


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-7, 1e7])
def test_traces_scale_with_the_operator(scale, dtype):
    matrix = rotated(SPECTRA["trained"], dtype=dtype)
    reference, scaled = trace(matrix, 32), trace(scale * matrix, 32)
    exact = dtype == torch.float64
    assert scaled.value == pytest.approx(scale * reference.value, rel=1e-9 if exact else 1e-5)
    assert scaled.standard_error == pytest.approx(
        scale * reference.standard_error, rel=1e-6 if exact else 1e-2
    )


def test_a_seed_decides_and_the_global_generator_does_not():
    matrix = rotated(SPECTRA["flat"])
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = trace(matrix, 16, seed=3)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    assert trace(matrix, 16, seed=3).value == first.value != trace(matrix, 16, seed=4).value


def test_bad_arguments_are_refused():
    with pytest.raises(OptionError, match="num_products"):
        trace(torch.eye(3), 0)
    with pytest.raises(ShapeError, match="square"):
        trace(torch.ones(3, 4))
    with pytest.raises(NonFiniteError, match="NaN"):
        trace(Function(lambda block: block * math.nan, 100))


def test_the_overlap_is_that_of_the_spans():
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    mixed = block @ torch.randn(3, 3, generator=generator, dtype=torch.float64)
    assert overlap(block, mixed) == pytest.approx(1, abs=1e-12)
    assert overlap(1e-9 * block, 1e9 * mixed) == pytest.approx(1, abs=1e-12)
    assert overlap(block, torch.cat([block, block], 1)) == pytest.approx(1, abs=1e-12)  # dependent columns
    outside = torch.linalg.qr(
        torch.cat([block, torch.randn(40, 2, generator=generator, dtype=torch.float64)], 1)
    )[0]
    assert overlap(block, outside[:, 3:]) == pytest.approx(0, abs=1e-12)


def test_the_overlap_is_the_mean_squared_cosine():
    angle = 0.3
    first = torch.tensor([[1.0, 0], [0, 1], [0, 0]], dtype=torch.float64)
    second = torch.tensor([[1.0, 0], [0, math.cos(angle)], [0, math.sin(angle)]], dtype=torch.float64)
    assert overlap(first, second) == pytest.approx((1 + math.cos(angle) ** 2) / 2, abs=1e-14)
    assert overlap(first, second) == pytest.approx(overlap(second, first), abs=1e-15)
    assert overlap(first[:, 1], second[:, 1]) == pytest.approx(math.cos(angle) ** 2, abs=1e-14)


def test_a_contained_subspace_overlaps_fully_and_random_ones_by_the_larger_share():
    eye = torch.eye(60)
    assert overlap(eye[:, :2], eye[:, :7]) == pytest.approx(1, abs=1e-6)
    generator = torch.Generator().manual_seed(1)
    draws = [
        overlap(torch.randn(60, 2, generator=generator), torch.randn(60, 6, generator=generator))
        for _ in range(200)
    ]
    assert sum(draws) / 200 == pytest.approx(6 / 60, rel=0.1)


def test_overlap_refuses_what_spans_nothing():
    good = torch.ones(4, 1)
    with pytest.raises(DataError, match="zero"):
        overlap(torch.zeros(4, 2), good)
    with pytest.raises(ShapeError, match="as many rows"):
        overlap(torch.ones(5), good)
    with pytest.raises(ShapeError, match="U must"):
        overlap(torch.ones(4, 1, 1), good)
    with pytest.raises(DataError, match="NaN"):
        overlap(good, good * math.nan)

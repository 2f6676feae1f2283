"""Columns that ask an operator: drawn apart for each purpose, multiplied again only where products leave the type."""

from __future__ import annotations

import pytest
import torch

import deepspectra as ds
from deepspectra.algorithms.probes import InUnits, Probes, stream
from deepspectra.errors import OptionError
from deepspectra.operators.base import Matrix
from spectra import Function


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


def test_the_columns_of_the_identity_give_the_matrix_and_are_counted() -> None:
    matrix, seen = torch.randn(40, 40), []
    matrix += matrix.T.clone()
    run = Probes(Matrix(matrix), 40, lambda done, expected: seen.append((done, expected)))
    found = torch.zeros(40, 40)
    for rows, columns in run.identity():
        found[:, rows] = columns
    torch.testing.assert_close(found, matrix)
    assert seen[-1] == (40, 40)
    assert run.spent == 40


@pytest.mark.parametrize("size", [1e-36, 1.0, 1e38])
def test_units_leave_products_that_can_be_squared_and_take_results_back(size: float) -> None:
    in_units = InUnits(Function(lambda block: size * block, 9))
    column = torch.linspace(0.5, 1, 9)[:, None]
    for _ in range(2):
        product = in_units @ column
        assert bool(product.square().isfinite().all())
        assert float(product.square().min()) > 0
        torch.testing.assert_close(in_units.back(product) / size, column, rtol=1e-5, atol=0)


def test_signs_are_ones_of_either_sign() -> None:
    signs = Probes(Matrix(torch.eye(500)), 1, None).signs(4, stream(0, "signs"))
    assert set(signs.flatten().tolist()) == {-1, 1}
    assert abs(float(signs.mean())) < 4 / 2000**0.5

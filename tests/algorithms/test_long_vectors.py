"""A few long vectors: bases, norms and inner products to the digits of float64, whatever their own type."""

from __future__ import annotations

import sys

import pytest
import torch

from deepspectra.algorithms import long_vectors
from deepspectra.algorithms.long_vectors import (
    gaussian_rows,
    inner_products,
    norms_of,
    orthonormal_rows,
    unit_of,
)
from vector_peaks import peaks


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize("count", [0, 1, 5])
def test_orthonormal_rows_and_their_coefficients_make_the_block(dtype: torch.dtype, limit: float, count: int) -> None:
    block = gaussian_rows(count, 40, torch.Generator().manual_seed(0)).to(dtype)
    block *= 10.0 ** -torch.arange(count)[:, None]
    rows, coefficients = orthonormal_rows(block.clone())
    assert rows.dtype == dtype
    assert coefficients.dtype == torch.float64
    torch.testing.assert_close(coefficients.T @ rows.double(), block.double(), atol=10 * limit, rtol=0)
    if dtype == torch.float64:
        torch.testing.assert_close(rows @ rows.T, torch.eye(count, dtype=dtype), atol=limit, rtol=0)
    sizes = coefficients.norm(dim=1)
    assert bool((sizes.diff() <= 0).all()), "by falling norm"


def test_inner_products_of_short_types_are_summed_in_float64() -> None:
    """2¹⁷ products of .1², of which a sum in float32 would lose digits."""
    rows = torch.full((2, 2**17 + 3), 0.1)
    exact = (2**17 + 3) * float(rows[0, 0].double()) ** 2
    found = inner_products(rows, rows[:1])
    assert found.shape == (2, 1)
    assert found.flatten().tolist() == pytest.approx([exact] * 2, rel=1e-11)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e25])
@pytest.mark.parametrize("size", [1, 1000, 5000])
def test_norms_neither_overflow_nor_underflow(scale: float, size: int) -> None:
    rows = torch.linspace(1, 2, 3 * size).view(3, size) * scale
    expected = (rows.double() / scale).norm(dim=1)
    torch.testing.assert_close(norms_of(rows) / scale, expected, rtol=1e-6, atol=0)


def test_units_are_powers_of_four_near_what_cannot_be_squared() -> None:
    assert [unit_of(size) for size in (0.0, 1.0, 1e13, float("inf"))] == [1.0] * 4
    for size in (1e-20, 1e30):
        assert unit_of(size) in [4.0**k for k in range(-60, 60)]
        assert 0.5 <= size / unit_of(size) <= 2


@pytest.mark.parametrize("size", [1, 15, 16, 64, 79, 80, 1000, 1031])
@pytest.mark.parametrize("count", [1, 3])
def test_random_rows_drawn_in_stretches_are_those_drawn_at_once(
    count: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(long_vectors, "DRAWN", 64)
    one, other = (torch.Generator().manual_seed(3) for _ in range(2))
    rows = gaussian_rows(count, size, one, torch.empty(0))
    assert torch.equal(rows, torch.randn(count, size, generator=other, dtype=torch.float64).float())
    assert torch.equal(one.get_state(), other.get_state())


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel counts the most memory of a process")
def test_no_more_long_vectors_are_held_than_these() -> None:
    """Of 3 pairs with a basis of 12 vectors, or of 16 in bfloat16, and of probes without a basis and with one."""
    most = {
        "exact": 12 + 3,  # the pairs beside the basis; a search has 2 there
        "rounded": 8 + 4,  # two rows in float32, turned, and what rounding takes
        "rounded and kept": 8 + 3 + 2,  # a product and a residual at a time
        "one probe": 3,
        "four probes": 3 * 4,
        "basis of probes": 24 + 2 * 4,
    }
    found = peaks()
    assert {what: size for what, size in found.items() if size > most[what] + 0.4} == {}

"""The overlap of subspaces."""

from __future__ import annotations

import math

import pytest
import torch

import deepspectra as ds
from deepspectra.algorithms.overlap import overlap
from deepspectra.errors import DataError, ShapeError
from reference import case_and_reference


def test_the_overlap_is_that_of_the_spans():
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    mixed = block @ torch.randn(3, 3, generator=generator, dtype=torch.float64)
    assert overlap(block, mixed) == pytest.approx(1, abs=1e-12)
    assert overlap(1e-9 * block, 1e9 * mixed) == pytest.approx(1, abs=1e-12)
    assert overlap(block, torch.cat([block, block], 1)) == pytest.approx(1, abs=1e-12)  # dependent columns
    outside = torch.linalg.qr(torch.cat([block, torch.randn(40, 2, generator=generator, dtype=torch.float64)], 1))[0]
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
        overlap(torch.randn(60, 2, generator=generator), torch.randn(60, 6, generator=generator)) for _ in range(200)
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


def test_overlap_of_the_averaged_subspace_with_a_random_one_is_small_and_with_itself_is_one() -> None:
    U = ds.principal_subspace(case_and_reference("relu_mlp")[0].problem(), level="class").vectors
    assert ds.overlap(U, U) == pytest.approx(1, abs=1e-10)
    random = torch.linalg.qr(torch.randn_like(U))[0]
    assert ds.overlap(U, random) == pytest.approx(((U.T @ random) ** 2).sum().item() / U.shape[1], rel=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1000, 20_000])
def test_columns_of_a_short_type_are_told_apart_however_long(size, dtype):
    q = torch.linalg.qr(torch.randn(size, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    leaning = torch.stack([q[:, 0], q[:, 0] + 0.3 * q[:, 1]], 1).to(dtype)
    assert overlap(leaning, q[:, 1].to(dtype)) == pytest.approx(1, abs=1e-3)
    copies = leaning[:, [0, 0]]
    assert overlap(copies, q[:, 1].to(dtype)) == pytest.approx(0, abs=1e-3)

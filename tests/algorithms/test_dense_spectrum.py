"""Spectra of operators that are small enough: every eigenvalue, and no estimate."""

from __future__ import annotations

import pytest
import torch

from deepspectra.algorithms.dense_spectrum import DenseMatrix, exact_density, of_all
from deepspectra.errors import NonFiniteError
from deepspectra.operators.base import Matrix
from deepspectra.results import Provenance
from spectra import Function, diagonal, rotated


@pytest.mark.parametrize("scale", [1.0, 1e-200, 1e200])
def test_all_eigenvalues_are_nodes_of_the_same_weight(scale: float) -> None:
    values = torch.linspace(-1, 3, 40, dtype=torch.float64)
    seen: list[int] = []
    found = exact_density(Matrix(scale * rotated(values)), lambda done, _: seen.append(done))
    torch.testing.assert_close(found.nodes / scale, values, atol=1e-12, rtol=0)
    assert found.weights.tolist() == [1 / 40] * 40
    assert seen[-1] == 40
    assert found.mean_standard_error == 0
    assert found.count_above(0.0) == (30, 0)


@pytest.mark.parametrize("scales", [(1.0, 1.0), (1e-200, 1e200), (3e-160, 1e-160), (1e200, 1e200)])
def test_a_sum_of_two_takes_no_products(scales: tuple[float, float]) -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(30, 30, dtype=torch.float64, generator=generator) for _ in range(2))
    first, second = scales[0] * (first + first.T), scales[1] * (second - second.diag().diag())
    second = second + second.T
    one, other, both = Matrix(first), Matrix(second), Matrix(first + second)
    parts = DenseMatrix(one), DenseMatrix(other)
    found = parts[0].add(parts[1], both).density()
    values = exact_density(both).nodes
    torch.testing.assert_close(found.nodes / values.abs().max(), values / values.abs().max(), atol=1e-13, rtol=0)
    assert found.num_products == 0
    assert found.provenance.operator == both.name
    assert found.count_above(0.0) == exact_density(both).count_above(0.0)


def test_zeros_that_are_known_are_one_node() -> None:
    provenance = Provenance.of(diagonal(torch.zeros(10)))
    found = of_all(torch.tensor([2.0, 5.0], dtype=torch.float64), provenance)
    assert found.nodes.tolist() == [2, 5, 0]
    assert found.weights.tolist() == pytest.approx([0.1, 0.1, 0.8])
    assert found.mean * 10 == pytest.approx(7)


def test_products_that_are_no_numbers_are_an_error() -> None:
    with pytest.raises(NonFiniteError):
        exact_density(Function(lambda block: block * float("nan"), 5, dtype=torch.float64))

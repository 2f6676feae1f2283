"""Kronecker-factored operators: closed forms, inverses, and the nearest sum of products."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import deepspectra as ds
from deepspectra.errors import MemoryBudgetError
from nets import CASES, block_of
from reference import case_and_reference, error

RTOL = 1e-10


KINDS = ("kfac", "ekfac", "cfac")


def symmetric_part(size: int) -> Tensor:
    """The projection (size², size²) of matrices on symmetric ones."""
    swap = torch.eye(size**2).view(size, size, size, size).transpose(2, 3).reshape(size**2, size**2)
    return (torch.eye(size**2) + swap).double() / 2


@pytest.mark.parametrize("name", ["relu_mlp", "conv_pool", "token_classes"])
@pytest.mark.parametrize("rank", [1, 3])
def test_the_optimal_sum_is_as_near_as_singular_values_say(name: str, rank: int) -> None:
    case, ref = case_and_reference(name)
    K = ds.kronecker(case.problem(), "optimal", rank=rank)
    for layer, place in K.places.items():
        truth, (_, o, d) = block_of(K, ref.gauss_newton, layer), place.shape
        rearranged = truth.view(o, d, o, d).transpose(1, 2).reshape(o * o, d * d)
        values = torch.linalg.svdvals(symmetric_part(o) @ rearranged @ symmetric_part(d))
        least = truth.square().sum() - values[:rank].square().sum()
        missed = (truth - K.blocks[layer].dense()).square().sum()
        assert float((missed - least) / truth.square().sum()) == pytest.approx(0, abs=1e-6)


def test_the_optimal_product_is_semi_definite_and_has_an_inverse() -> None:
    K = ds.kronecker(CASES["conv_pool"]().problem(), "optimal")
    values = K.eigenvalues()
    assert error(values, torch.linalg.eigvalsh(K.dense()).flip(0)) < RTOL
    inverse = K.inverse(0.1).dense()
    assert error(inverse @ (K.dense() + 0.1 * torch.eye(len(values)).double()), torch.eye(len(values))) < RTOL


@pytest.mark.parametrize("name", ["conv_batchnorm", "token_classes", "unused_parameter", "frozen_parameter"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_operator_is_block_diagonal_with_its_closed_forms(name: str, kind: str) -> None:
    case = CASES[name]()
    if name == "token_classes" and kind == "cfac":
        pytest.skip("several rows an example")
    K = ds.kronecker(case.problem(), kind)
    assert K.shape == ds.GaussNewton(case.problem()).shape
    matrix = torch.zeros(K.shape, dtype=torch.float64)
    for layer, index in K.index.items():
        matrix[index[:, None], index] = K.blocks[layer].dense()
    V = torch.randn(K.shape[0], 3, generator=torch.Generator().manual_seed(0)).double()
    assert error(K @ V, matrix @ V) < RTOL
    assert error(K @ V[:, 0], matrix @ V[:, 0]) < RTOL
    assert error(K.dense(), K.dense().T) < RTOL
    assert K.trace == pytest.approx(float(matrix.trace()), rel=1e-10)
    assert K.norm == pytest.approx(float(matrix.norm()), rel=1e-10)
    values = K.eigenvalues()
    assert len(values) == K.shape[0]
    assert error(values, torch.linalg.eigvalsh(matrix).flip(0)) < RTOL


@pytest.mark.parametrize("kind", ["kfac", "ekfac"])
def test_the_inverse_inverts_with_its_damping(kind: str) -> None:
    K = ds.kronecker(CASES["unused_parameter"]().problem(), kind)
    inverse = K.inverse(0.01)
    eye = torch.eye(K.shape[0]).double()
    assert error(inverse @ (K.dense() + 0.01 * eye), eye) < RTOL
    assert inverse.trace == pytest.approx(float(inverse.dense().trace()), rel=1e-10)
    assert inverse.norm == pytest.approx(float(inverse.dense().norm()), rel=1e-10)


def test_eigenvalues_of_large_sums_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepspectra.kfac.operators.LARGEST_SUM", 10)
    with pytest.raises(MemoryBudgetError, match="densely"):
        ds.kronecker(CASES["relu_mlp"]().problem(), "cfac").eigenvalues()

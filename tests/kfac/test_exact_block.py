"""G's own block of a place by features and errors: products, norms and gradients of the dense block."""

from __future__ import annotations

import pytest
import torch

import deepspectra as ds
from deepspectra.analysis.layer_blocks import Blocks
from nets import CASES, block_of
from reference import case_and_reference, error


@pytest.mark.parametrize("name", ["relu_mlp", "conv_pool", "token_classes", "mse_module"])
def test_products_trace_and_gradients_are_those_of_the_dense_block(name: str) -> None:
    case, ref = case_and_reference(name)
    K = ds.kronecker(case.problem())
    checked = 0
    for _, exact in Blocks(case.problem()):
        truth = block_of(K, ref.gauss_newton, exact.place.name)
        block = torch.randn(len(truth), 3, dtype=torch.float64)
        assert error(exact @ block, truth @ block) < 1e-10
        assert exact.trace == pytest.approx(float(truth.trace()), rel=1e-10)
        rows = torch.cat(list(exact.gradients()))
        assert error(rows.T @ rows, truth) < 1e-10
        checked += 1
    assert checked >= 2


@pytest.mark.parametrize("name", ["relu_mlp", "conv_pool", "token_classes"])
def test_inner_products_with_kronecker_products_need_no_block(name: str) -> None:
    case, ref = case_and_reference(name)
    K = ds.kronecker(case.problem())
    for _, exact in Blocks(case.problem()):
        groups, outputs, inputs = exact.place.shape
        left, right = (torch.randn(groups, size, size, dtype=torch.float64) for size in (outputs, inputs))
        left, right = left @ left.mT, right @ right.mT
        truth = block_of(K, ref.gauss_newton, exact.place.name)
        (product,) = (torch.kron(s, a) for s, a in zip(left, right, strict=True))
        assert exact.inner(left, right) == pytest.approx(float((truth * product).sum()), rel=1e-9)
        assert exact.inner(left, None) == pytest.approx(
            float((truth * torch.kron(left[0], torch.eye(inputs).double())).sum()), rel=1e-9
        )


def test_half_precision_is_widened_before_it_is_summed() -> None:
    problem = CASES["relu_mlp"](torch.float32).problem().to(torch.bfloat16)
    for _, exact in Blocks(problem):
        assert {use.errors.dtype for batch in exact.batches for use in batch} == {torch.float32}

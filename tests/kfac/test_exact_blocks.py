"""Where Kronecker factors belong: a weight with its bias, a slice of one, or nowhere."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import deepspectra as ds
from deepspectra.analysis.layer_blocks import Blocks
from deepspectra.errors import CurvatureError
from nets import CASES, Case, block_of, chunks, labels
from reference import Reference, case_and_reference, error


def test_a_packed_attention_is_one_block_with_its_bias() -> None:
    K = ds.kronecker(CASES["attention_module"]().problem())
    assert K.places["attention"].shape == (1, 12, 5)
    assert len(K.index["attention"]) == 60


def test_separate_inputs_of_attention_give_a_block_each() -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.attention(x, x.flip(1), 2 * x, need_weights=False)[0].mean(1))

    torch.manual_seed(0)
    case = Case(Cross().double(), chunks(torch.randn(6, 3, 4).double(), labels(6, 3), [4, 2]))
    kfac, ekfac = ds.kronecker(case.problem()), ds.kronecker(case.problem(), "ekfac")
    slices = [name for name in kfac.blocks if "in_proj_weight" in name]
    assert slices == [f"attention.in_proj_weight[{16 * j}:{16 * j + 16}]" for j in range(3)]
    covered = torch.cat(list(kfac.index.values()))
    assert len(covered) == len(covered.unique()) == kfac.shape[0]
    assert ekfac.trace == pytest.approx(float(Reference(case).gauss_newton.trace()), rel=1e-10)


@pytest.mark.parametrize("name", ["tied_parameter", "tied_modules"])
def test_a_parameter_used_in_two_ways_is_refused(name: str) -> None:
    with pytest.raises(CurvatureError, match="different ways"):
        ds.kronecker(CASES[name]().problem())


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

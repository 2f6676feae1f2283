"""Where Kronecker factors belong: a weight with its bias, a slice of one, or nowhere."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import deepspectra as ds
from deepspectra.errors import CurvatureError
from nets import CASES, Case, chunks, labels
from reference import Reference


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

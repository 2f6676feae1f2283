"""What stands for an operation gives what that gives, and has the second derivatives that it lacks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deepspectra.problem.plain_operations import PLAIN, grouped_mm, std, std_mean, weight_norm


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_weight_norm_is_that_of_pytorch_and_differentiable_twice(dim: int) -> None:
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(3, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    shape = torch.norm_except_dim(v, 2, dim).shape
    g = torch.randn(shape, dtype=torch.float64, generator=generator, requires_grad=True)
    torch.testing.assert_close(weight_norm(v, g, dim), torch._weight_norm(v, g, dim))
    assert torch.autograd.gradgradcheck(lambda v, g: weight_norm(v, g, dim), (v, g))


@pytest.mark.skipif(not hasattr(torch, "_grouped_mm"), reason="a PyTorch without it")
def test_grouped_products_are_those_of_pytorch_and_run_in_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(7, 8, generator=generator)
    weights = torch.randn(3, 8, 4, generator=generator)
    offs = torch.tensor([2, 2, 6], dtype=torch.int32)
    found = grouped_mm(rows.double(), weights.double(), offs=offs)
    torch.testing.assert_close(found[:6].float(), torch._grouped_mm(rows, weights, offs=offs)[:6])
    assert found.shape == (7, 4)
    assert torch.equal(grouped_mm(rows, weights, offs=offs)[:6], torch._grouped_mm(rows, weights, offs=offs)[:6])
    one, two = rows.double().requires_grad_(), weights.double().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda a, b: grouped_mm(a, b, offs=offs), (one, two))


def test_every_name_is_there() -> None:
    missing = [name for holder, name, _ in PLAIN if not hasattr(holder, name)]
    assert set(missing) <= {"_grouped_mm"}


@pytest.mark.parametrize("call", [{}, {"dim": 0}, {"dim": 1, "unbiased": False, "keepdim": True}, {"correction": 2}])
def test_deviations_are_those_of_pytorch_and_differentiable_twice(call: dict[str, Any]) -> None:
    x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    torch.testing.assert_close(std(x, **call), torch.std(x, **call))
    torch.testing.assert_close(std_mean(x, **call), torch.std_mean(x, **call))
    assert torch.equal(std(x.detach(), 0, out=x.new_empty(3)), torch.std(x, 0))
    assert torch.autograd.gradgradcheck(lambda x: std(x, **call), x)

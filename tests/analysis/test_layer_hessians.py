"""Blocks of H: those of G where outputs are linear in a layer, measured where they are not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import deepspectra as ds
from deepspectra.errors import FallbackWarning, OptionWarning
from deepspectra.operators.curvature import HessianBlock
from nets import labels
from reference import Reference, case_and_reference, descending, error


def own_names(ref: Reference, layer: str) -> list[str]:
    return [name for name in ref.parameters if name.rpartition(".")[0] == layer]


PIECEWISE_LINEAR = ("relu_mlp", "conv_batchnorm", "conv_pool")


CURVED = ("layernorm_gelu", "attention_module", "tied_modules", "reused_module")


@pytest.mark.parametrize("name", PIECEWISE_LINEAR)
def test_blocks_of_h_are_those_of_g_where_outputs_are_linear_in_a_layer(name: str) -> None:
    case, ref = case_and_reference(name)
    for layer in ds.layers(case.problem(), num=3).values():
        block = ref.block(ref.hessian, *own_names(ref, layer.name))
        assert layer.hessian is not None
        assert layer.hessian.is_gauss_newton
        assert layer.hessian.residual < 1e-13
        assert error(layer.hessian.values, descending(block)[:3]) < 1e-9
        assert layer.hessian.trace == pytest.approx(float(block.trace()), rel=1e-9)
        assert layer.hessian.trace_standard_error == 0
        assert layer.hessian.density.size == len(block)


@pytest.mark.parametrize("name", CURVED)
def test_blocks_of_h_are_measured_where_they_are_not_those_of_g(name: str) -> None:
    case, ref = case_and_reference(name)
    apart = 0
    for layer in ds.layers(case.problem(), num=3).values():
        block = ref.block(ref.hessian, *own_names(ref, layer.name))
        residual = block - ref.block(ref.gauss_newton, *own_names(ref, layer.name))
        h = layer.hessian
        assert h is not None
        assert h.is_gauss_newton == (float(residual.norm()) < 1e-12)
        if h.is_gauss_newton:
            continue
        apart += 1
        expected = descending(block)
        size = float(residual.norm()) / float(ref.block(ref.gauss_newton, *own_names(ref, layer.name)).norm())
        assert size / 3 < h.residual < 3 * size
        allowed = h.residual_norms + 1e-9
        assert bool(((h.values - expected[: len(h.values)]).abs() <= allowed).all())
        assert h.smallest == pytest.approx(float(expected[-1]), rel=1e-2)
        assert abs(h.trace - float(block.trace())) <= 4 * h.trace_standard_error + 1e-9
    assert apart


@pytest.mark.parametrize("way", ["double backward", "linearize"])
def test_products_with_blocks_of_h_from_shared_graphs(way: str) -> None:
    case, ref = case_and_reference("layernorm_gelu")
    hessian = ds.Hessian(case.problem(), way=way)
    for layer in dict.fromkeys(name.rpartition(".")[0] for name in ref.parameters):
        names = own_names(ref, layer)
        expected = ref.block(ref.hessian, *names)
        assert error(HessianBlock(hessian, names).dense(), expected) < 1e-10
    blocks = [(own_names(ref, layer), torch.randn(48, 2).double()) for layer in ("0",)]
    (found,) = ds.Residual(case.problem()).diagonal_blocks(blocks)
    residual = ref.block(ref.hessian, *blocks[0][0]) - ref.block(ref.gauss_newton, *blocks[0][0])
    assert error(found, residual @ blocks[0][1]) < 1e-10


class OnceOnly(torch.autograd.Function):
    """A doubling that PyTorch cannot differentiate twice."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return 2 * gradient


class Doubled(nn.Module):
    """A layer of such a function."""

    def forward(self, x: Tensor) -> Tensor:
        return OnceOnly.apply(x)


def test_without_second_derivatives_there_are_no_blocks_of_h() -> None:
    model = nn.Sequential(nn.Linear(4, 5), Doubled(), nn.ReLU(), nn.Linear(5, 3)).double()
    problem = ds.Problem(model, (torch.randn(9, 4).double(), labels(9, 3)))
    with pytest.warns(FallbackWarning, match="hessian=False"):
        found = ds.layers(problem)
    assert all(layer.hessian is None for layer in found.values())
    assert [layer.hessian for layer in ds.layers(problem, hessian=False).values()] == [None, None]
    with pytest.warns(OptionWarning, match="num=3 is not used"):
        ds.layers(problem, hessian=False, num=3)
    assert "‖R‖/‖G‖" in str(found)

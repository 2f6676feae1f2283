"""Every way of differentiating gives the same second derivatives and the same Jacobian."""

from __future__ import annotations

import pytest
import torch

import deepspectra as ds
from deepspectra.derivatives.products import products_of
from nets import OPERATORS, Case
from reference import Reference, case_and_reference, error

RTOL = 1e-9


TRACED = ["tied_parameter"] + [
    pytest.param(name, marks=pytest.mark.slow)
    for name in ("conv_pool", "layernorm_gelu", "attention_function", "every_option")
]


@pytest.mark.parametrize("name", TRACED)
@pytest.mark.parametrize("way", ["double backward", "linearize"])
def test_every_way_of_differentiating_is_right(name: str, way: str) -> None:
    """Which way is taken depends on time, so each is asked for: vectors and blocks, H, R, J and Jᵀ."""
    case, ref = case_and_reference(name)
    V = torch.randn(ref.num_parameters, 3, dtype=torch.float64)
    problem = case.problem()
    for kind, operator in OPERATORS.items():
        truth = getattr(ref, kind) @ V
        assert error(operator(problem, way=way) @ V, truth) < RTOL, kind
        assert error(operator(problem, way=way) @ V[:, 0], truth[:, 0]) < RTOL, kind
    assert products_of(problem).notes["way"] == products_of(problem).notes["jacobian"] == way


def test_linearising_is_right_through_layer_norm() -> None:
    """Forward over a reverse-mode Jacobian is wrong there; forward over a gradient is not."""
    torch.manual_seed(51)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 3)).double()
    case = Case(model, [(torch.randn(6, 3, dtype=torch.float64), torch.arange(6) % 3)])
    assert error(ds.Hessian(case.problem(), way="linearize").dense(), Reference(case).hessian) < RTOL


def test_a_kept_graph_holds_no_gradient() -> None:
    """Of P numbers a batch, which nothing is made of."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(400, 100), torch.nn.Tanh(), torch.nn.Linear(100, 2))
    problem = ds.Problem(model, (torch.randn(3, 400), torch.tensor([0, 1, 1])))
    operators = {"hessian": ds.Hessian(problem), "jacobian": ds.GaussNewton(problem, way="double backward")}
    for kind, operator in operators.items():
        _ = operator @ torch.ones(problem.num_parameters)
        assert products_of(problem).graphs.largest(kind) < 2 * problem.num_parameters  # half of them

"""The first way that is right is taken, and what needs first derivatives only does with them."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

import deepspectra as ds
from deepspectra import errors
from deepspectra.derivatives import way_choice
from deepspectra.derivatives.products import products_of
from given import Net, X, Y
from nets import OPERATORS
from reference import case_and_reference, error
from truth import OnceDifferentiable

RTOL = 1e-9


def test_first_derivatives_alone_are_enough_for_what_the_error_names() -> None:
    class Custom(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.o(OnceDifferentiable.apply(self.a(x)))

    once, plain = ds.Problem(Custom(), (X, Y)), ds.Problem(Net(), (X, Y))
    for operator in (ds.Hessian, ds.GaussNewton):
        with pytest.raises(errors.CurvatureError, match="class_means, gram_spectrum, layers"):
            operator(once)
    assert error(ds.gram_spectrum(once).values, ds.gram_spectrum(plain).values) < 1e-10
    assert error(ds.class_means(once).class_means, ds.class_means(plain).class_means) < 1e-10
    assert len(list(ds.layers(once, hessian=False))) == 2


def test_gauss_newton_needs_no_second_derivative_of_a_hard_sigmoid():
    """Of a hard sigmoid PyTorch knows no second derivative, not even as a way to J v."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), nn.Hardsigmoid(), nn.Linear(7, 3)).double()
    problem = ds.Problem(net, (X, Y))
    with pytest.raises(errors.CurvatureError, match="GaussNewton"):
        ds.Hessian(problem)
    G = ds.GaussNewton(problem).dense()
    names = dict(net.named_parameters())
    J = torch.func.jacrev(lambda p: torch.func.functional_call(net, p, (X,)))(names)
    J = torch.cat([part.reshape(len(X), 3, -1) for part in J.values()], 2)
    p = net(X).softmax(1).detach()
    middle = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    assert error(G, torch.einsum("nkp,nkl,nlq->pq", J, middle, J).detach() / len(X)) < 1e-12
    assert error(ds.gram_spectrum(problem).values[:5], torch.linalg.eigvalsh(G).flip(0)[:5]) < 1e-9


def test_the_way_can_be_changed_and_must_be_known_and_right(monkeypatch: pytest.MonkeyPatch) -> None:
    case, ref = case_and_reference("relu_mlp")
    problem = case.problem()
    v = torch.randn(ref.num_parameters, dtype=torch.float64)
    for way in ("linearize", "double backward", None):
        assert error(ds.Hessian(problem, way=way) @ v, ref.hessian @ v) < RTOL
        assert error(ds.GaussNewton(problem, way=way) @ v, ref.gauss_newton @ v) < RTOL
    assert products_of(problem).notes["way"] == "double backward"
    for operator in OPERATORS.values():
        with pytest.raises(ds.errors.OptionError, match="'double backward', 'linearize'"):
            operator(problem, way="forward")
    monkeypatch.setattr(way_choice, "curvature_error", lambda *_: 0.1)
    with pytest.raises(ds.errors.CurvatureError, match=r"wrong by 1\.0e-01"):
        ds.Hessian(problem, way="linearize")
    monkeypatch.setattr(way_choice, "jacobian_error", lambda *_, linearize: 0.1 if linearize else 0.0)
    with pytest.raises(ds.errors.CurvatureError, match=r"linearize is wrong by 1\.0e-01"):
        ds.GaussNewton(problem, way="linearize")
    assert error(ds.Hessian(problem) @ v, ref.hessian @ v) < RTOL


def test_half_precision_tells_how_coarse_its_products_are() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    half = ds.Problem(net, (X.float(), Y), dtype=torch.bfloat16)
    ds.Hessian(half), ds.GaussNewton(half)
    notes = products_of(half).notes
    for what in ("H v", "J v"):
        told = notes[f"rounding of {what}"]
        assert re.match(rf"in bfloat16 {what} is off by \d+\.\d%, measured against float64", told)
        assert 1e-4 < products_of(half).choice.rounding[what] < 0.05
    single = ds.Problem(net, (X.float(), Y))
    ds.Hessian(single)
    assert not any("rounding" in name for name in products_of(single).notes)

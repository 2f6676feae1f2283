"""Ways that are wrong on a network are found out, and those that are right are not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deepspectra as ds
from deepspectra import errors
from deepspectra.derivatives.derivative_checks import _direction, curvature_rounding, jacobian_rounding
from deepspectra.derivatives.ways import DoubleBackward
from given import X, Y, mlp, use
from nets import CASES, Case
from reference import Reference, error
from truth import OnceDifferentiable


class WrongTwice(torch.autograd.Function):
    """tanh, whose backward is right and whose second derivative is silently zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = torch.tanh(x)
        ctx.slope = (1 - y**2).detach()
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.slope


class Custom(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(x)


@pytest.mark.parametrize("function", [OnceDifferentiable, WrongTwice])
def test_an_op_with_no_or_a_wrong_second_derivative(function: Any) -> None:
    torch.manual_seed(3)
    model = mlp(Custom(function))

    def product() -> Any:
        problem = ds.Problem(model, (X, Y))
        return ds.Hessian(problem) @ torch.randn(problem.num_parameters, dtype=torch.float64)

    with pytest.raises(errors.CurvatureError, match=r"(?i)second|deriv|finite difference") as caught:
        product()
    assert isinstance(caught.value, RuntimeError)


@pytest.mark.parametrize("function", [OnceDifferentiable, WrongTwice])
def test_gauss_newton_needs_first_derivatives_only(function: Any) -> None:
    """Right, whatever the second derivative is; refused where there is no right way to J v either."""
    torch.manual_seed(3)
    model, right = mlp(Custom(function)), mlp()
    right.load_state_dict(model.state_dict())
    problem = ds.Problem(model, (X, Y))
    if function is OnceDifferentiable:
        with pytest.raises(errors.CurvatureError, match=r"no way to J v.*is right"):
            ds.GaussNewton(problem)
        return
    assert error(ds.GaussNewton(problem).dense(), Reference(Case(right, [(X, Y)])).gauss_newton) < 1e-9


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("normed", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm])
def test_weight_norm_is_right_though_its_second_derivative_in_pytorch_is_wrong(normed: Any) -> None:
    """The fused kernel fails `gradgradcheck` (torch 2.13, CPU)."""
    torch.manual_seed(5)
    fused = mlp()
    normed(fused[0])

    class Plain(nn.Module):
        def forward(self, length: Tensor, direction: Tensor) -> Tensor:
            return direction * (length / direction.norm(dim=1, keepdim=True))

        def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
            return weight.norm(dim=1, keepdim=True), weight

    plain = mlp()
    nn.utils.parametrize.register_parametrization(plain[0], "weight", Plain())
    with torch.no_grad():
        for p, q in zip(fused.parameters(), plain.parameters(), strict=True):
            q.copy_(p.mul_(1.5))
    ref, problem = Reference(Case(plain, [(X, Y)])), ds.Problem(fused, (X, Y))
    assert error(ds.Hessian(problem).dense(), ref.hessian) < 1e-9
    assert error(ds.GaussNewton(problem).dense(), ref.gauss_newton) < 1e-9
    assert error(ds.Residual(problem).dense(), ref.residual) < 1e-9


def test_the_padding_of_any_table_is_held_in_the_check() -> None:
    """Its derivative is zero by decree, whatever module looks it up."""

    class Table(nn.Module):
        padding_idx = 0

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 5))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.embedding(x, self.weight, self.padding_idx)

    torch.manual_seed(0)
    problem = ds.Problem(nn.Sequential(Table(), mlp()).double(), (torch.arange(8) % 4, torch.arange(8) % 3))
    G, v = ds.GaussNewton(problem), torch.randn(problem.num_parameters, dtype=torch.float64)
    assert error(G @ v + ds.Residual(problem) @ v, ds.Hessian(problem) @ v) < 1e-9


@pytest.mark.parametrize("name", ["attention_module", "attention_function", "layernorm_gelu"])
def test_transformers_pass_the_curvature_check(name: str) -> None:
    """Fused attention and layer norm are known traps, and no fault of the user's."""
    use(CASES[name]().problem())


def test_a_network_that_computes_in_float32_inside_is_accepted():
    class Norm(nn.Module):
        def forward(self, x):
            wide = x.float()
            return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), Norm(), nn.Linear(8, 3))
    problem = ds.Problem(net, (X.float(), Y))
    v = torch.ones(problem.num_parameters)
    H, G, R = ds.Hessian(problem), ds.GaussNewton(problem), ds.Residual(problem)
    assert error(G @ v + R @ v, H @ v) < 1e-4
    assert float(v @ (H @ v)) != 0


def test_a_network_that_runs_in_float32_alone_is_checked_in_it():
    class Cast(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3))

        def forward(self, x):
            return self.body((x + 1).float())

    torch.manual_seed(0)
    net = Cast()
    problem, plain = ds.Problem(net, (X.float(), Y)), ds.Problem(net.body, (X.float() + 1, Y))
    for operator in (ds.Hessian, ds.GaussNewton):
        assert error(operator(problem).dense(), operator(plain).dense()) < 1e-5


@pytest.mark.parametrize(("dtype", "least"), [(torch.bfloat16, 1e-3), (torch.float16, 1e-4)])
def test_rounding_is_the_distance_from_the_same_weights_in_float32(dtype, least):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
    coarse, fine = (ds.Problem(net, (X[:4].to(dtype), Y[:4]), dtype=kind) for kind in (dtype, torch.float32))
    exact = ds.Problem(net, (X[:4].to(dtype), Y[:4]), dtype=torch.float64)
    v = torch.cat([part.flatten() for part in _direction(fine, torch.Generator().manual_seed(0))])
    expected = error((ds.Hessian(coarse) @ v.to(dtype)).double(), ds.Hessian(exact) @ v.double())
    found = curvature_rounding(coarse, fine, DoubleBackward)
    assert least < found < 100 * least
    assert expected / 2 < found < 2 * expected
    assert least / 10 < jacobian_rounding(coarse, fine, linearize=False) < 100 * least
    assert curvature_rounding(fine, exact, DoubleBackward) < 1e-5


class NoNumberTwice(torch.autograd.Function):
    """The identity, whose second derivative is NaN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return g + (x - x).square().pow(0.25)


def test_derivatives_that_are_no_numbers_are_said_to_be_that() -> None:
    problem = ds.Problem(mlp(Custom(NoNumberTwice)), (X, Y))
    with pytest.raises(errors.CurvatureError, match="double backward gives NaN or infinite derivatives"):
        ds.Hessian(problem)


def test_deviations_of_dead_units_are_constant() -> None:
    """As where speech is pooled: PyTorch's second derivatives of a standard deviation of zeros are NaN."""

    class Pooled(nn.Module):
        def __init__(self, deviation: Any) -> None:
            super().__init__()
            self.a, self.o, self.deviation = nn.Linear(1, 4), nn.Linear(4, 3), deviation
            self.a.bias.data[0] = -100

        def forward(self, x: Tensor) -> Tensor:
            return self.o(self.deviation(torch.relu(self.a(x[..., None]))))

    def alive(h: Tensor) -> Tensor:
        return torch.cat([h[:, 0, :1], h[..., 1:].var(1).sqrt()], 1)

    products = []
    for deviation in (alive, lambda h: h.std(1), lambda h: torch.std_mean(h, 1)[0]):
        torch.manual_seed(0)
        problem = ds.Problem(Pooled(deviation).double(), (X, Y))
        v = torch.randn(problem.num_parameters, 2, dtype=torch.float64)
        products.append(torch.stack([ds.Hessian(problem) @ v, ds.GaussNewton(problem) @ v]))
    right, *found = products
    assert right.isfinite().all()
    assert max(error(one, right) for one in found) < 1e-12

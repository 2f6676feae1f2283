"""Twelve examples and small networks on them, and what is done with a problem of them: used, checked, refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import deepspectra as ds
from deepspectra import errors
from reference import error
from truth import truth

X = torch.randn(12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.arange(12) % 3
UNEVEN = torch.tensor([0, 0, 0, 1, 0, 2, 1, 0, 0, 2, 1, 0])  # labels of classes of 7, 3 and 2
HALVES = [(X[:5], UNEVEN[:5]), (X[5:], UNEVEN[5:])]


def mlp(*middle: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), *(middle or (nn.Tanh(),)), nn.Linear(6, 3)).double()


def seeded_mlp(outputs: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, outputs)).double()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.o = nn.Linear(5, 4).double(), nn.Linear(4, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.tanh(self.a(x)))


class Captured(Net):
    """A function that captured the model, and a bound method of a module."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = (lambda x: torch.tanh(self.a(x))), self.o.forward

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x))


def check(model: nn.Module, data: Any = None, mean: Callable[[], Tensor] | None = None, **options: Any) -> ds.Problem:
    """Gradient, H and H = G + R are right."""
    gradient, hessian = truth(model, mean or (lambda: functional.cross_entropy(model(X), Y)))
    problem = ds.Problem(model, (X, Y) if data is None else data, **options)
    assert error(problem.gradient(), gradient) < 1e-12
    assert error(ds.Hessian(problem).dense(), hessian) < 1e-9
    parts = ds.GaussNewton(problem).dense() + ds.Residual(problem).dense()
    assert error(parts, hessian) < 1e-9
    return problem


def normed(norm: Callable[[nn.Module], nn.Module]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        net = Net()
        net.a = norm(net.a)
        return net

    return make


def use(problem: Any) -> None:
    """What a user does with a problem, for faults that may be found only then."""
    problem.loss()
    problem.gradient()
    v = torch.ones(problem.num_parameters, dtype=torch.float64)
    for operator in (ds.Hessian, ds.GaussNewton):
        operator(problem) @ v


def refused(kinds: type | tuple[type, ...], words: str, build: Callable[[], Any]) -> BaseException:
    """The error that building or using a problem raises: of this tree and kind, naming what was given."""
    with pytest.raises(kinds, match=f"(?is){words}") as caught:
        use(build())
    assert isinstance(caught.value, errors.DeepSpectraError)
    assert any(isinstance(caught.value, kind) for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))
    assert len(str(caught.value)) > 20, "an error says what was given, what was expected and what to do"
    return caught.value

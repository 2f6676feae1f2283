"""Every use of a parameter is seen as the network makes it, in whatever form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import _get_current_function_mode

import deepspectra as ds
from deepspectra.errors import CurvatureError
from deepspectra.rows import batch_capture
from deepspectra.rows.gradients import GradientRows
from deepspectra.rows.held_rows import HeldRows
from example_orders import pair, same_values, truth, xy
from nets import chunks, held, labels
from reference import error, same_spectrum


class Shy(nn.Module):
    """Fails when it is watched."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(_get_current_function_mode(), batch_capture.Watch):
            raise ValueError("not now")
        return self.out(x)


def test_what_a_network_raises_when_watched_is_said() -> None:
    problem = ds.Problem(Shy().double(), [xy(9)])
    with pytest.raises(CurvatureError, match=r"told apart by example \(not now\)"):
        ds.gram_spectrum(problem)


def test_a_parameter_used_under_no_grad_has_no_use_there() -> None:
    class Teacher(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.o = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                known = torch.tanh(self.a(x))
            return self.o(torch.tanh(self.a(x)) + known + functional.linear(x, self.a.weight.detach()))

    net, data = Teacher().double(), [xy(7)]
    problem = ds.Problem(net, data)
    assert not HeldRows(problem).captures.plan.alone
    assert same_values(ds.gram_spectrum(problem).values, truth(net, data, pair).dense)


class Odd(nn.Module):
    """Operations at the edges of what the rules know."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(torch.randn(6, 4))
        self.square = nn.Parameter(torch.randn(6, 6))
        self.bias = nn.Parameter(torch.randn(4))
        self.scale = nn.Parameter(torch.randn(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "addmm":
            return torch.addmm(self.bias, x, self.weight)
        if self.kind == "scaled addmm":
            return torch.addmm(self.bias, x, self.weight, alpha=2.0)
        if self.kind == "matmul":
            return torch.relu(x @ self.square) @ self.weight
        if self.kind == "turned":
            return functional.linear(torch.relu(x @ self.square.t()), self.weight.t(), self.bias)
        if self.kind == "tied turned":
            return torch.relu(functional.linear(x, self.square) @ self.square) @ self.weight
        if self.kind == "halves":
            first, second = self.square.chunk(2)
            return torch.cat([functional.linear(x, first), functional.linear(x, second)], 1) @ self.weight
        if self.kind == "overlapping":
            wide = functional.linear(x, self.square[:4]) + functional.linear(x, self.square[1:5])
            return wide + self.bias
        if self.kind == "in place":
            out = x @ self.weight
            out += self.bias
            out.relu_()
            return out * 1.5
        return self.scale * (x @ self.weight)


UNDERSTOOD = {
    "addmm": (),
    "scaled addmm": ("weight", "bias"),
    "matmul": (),
    "turned": (),
    "tied turned": (),
    "halves": (),
    "overlapping": ("square", "bias"),
    "in place": ("bias",),
    "scalar": ("scale",),
}


@pytest.mark.parametrize("kind", UNDERSTOOD)
def test_odd_uses_of_parameters_are_understood_or_differentiated_alone(kind: str) -> None:
    x, y = torch.randn(11, 6, dtype=torch.float64), labels(11, 4)
    problem = ds.Problem(Odd(kind).double(), chunks(x, y, [4, 7]))
    rows = held(problem)
    assert rows.captures.plan.alone == set(UNDERSTOOD[kind])
    truth = ds.GaussNewton(problem).dense()
    assert same_spectrum(ds.gram_spectrum(problem).values, truth, float(truth.norm()))


def convolutional(kind: str) -> nn.Module:
    flat = [nn.Flatten(), nn.LazyLinear(3)]
    layers: dict[str, list[nn.Module]] = {
        "strided, dilated": [nn.Conv2d(2, 4, 3, stride=2, padding=2, dilation=2), nn.ReLU(inplace=True)],
        "grouped": [nn.Conv2d(2, 6, 3, groups=2), nn.Tanh(), nn.Conv2d(6, 6, 3, groups=6, padding=1)],
        "circular": [nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), nn.Tanh()],
        "by name": [nn.Conv2d(2, 3, 3, padding="same"), nn.Tanh()],
        "wide": [nn.Conv2d(2, 3, (1, 3), padding=(0, 1)), nn.Tanh()],
        "one-dimensional": [nn.Flatten(2), nn.Conv1d(2, 3, 5, stride=2, padding=1), nn.Tanh()],
        "transposed": [nn.ConvTranspose2d(2, 3, 2), nn.Tanh()],
        "group norm": [nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Tanh()],
        "instance norm": [nn.Conv2d(2, 4, 3), nn.InstanceNorm2d(4, affine=True), nn.Tanh()],
        "rms norm": [nn.Conv2d(2, 4, 3), nn.RMSNorm([4, 4, 4]), nn.Tanh()],
    }
    return nn.Sequential(*layers[kind], *flat)


@pytest.mark.parametrize(
    ("kind", "alone"),
    [
        ("strided, dilated", ()),
        ("grouped", ()),
        ("circular", ()),
        ("by name", ()),
        ("wide", ()),
        ("one-dimensional", ()),
        ("transposed", ("0.weight", "0.bias")),
        ("group norm", ()),
        ("instance norm", ()),
        ("rms norm", ()),
    ],
)
def test_convolutions_and_normalisations_in_every_form(kind: str, alone: tuple[str, ...]) -> None:
    x, y = torch.randn(8, 2, 6, 6, dtype=torch.float64), labels(8, 3)
    model = convolutional(kind).double()
    model(x[:1])
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    problem = ds.Problem(model.eval(), chunks(x, y, [5, 3]))
    rows = held(problem)
    assert rows.captures.plan.alone == set(alone)
    truth = ds.GaussNewton(problem).dense()
    assert same_spectrum(ds.gram_spectrum(problem).values, truth, float(truth.norm()))
    block = torch.randn(problem.num_parameters, 2, dtype=torch.float64)
    assert error(rows.apply(block), GradientRows(problem).apply(block)) < 1e-12


def test_an_embedding_that_pads_and_is_used_twice() -> None:
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(9, 5, padding_idx=-9)
            self.out = nn.Linear(5, 3)

        def forward(self, ids: Tensor) -> Tensor:
            return self.out(torch.tanh(self.embed(ids).sum(1)) + self.embed(ids[:, 0]))

    ids = torch.randint(0, 9, (10, 4))
    problem = ds.Problem(Bag().double(), [(ids, labels(10, 3))])
    assert held(problem).captures.plan.alone == set()
    truth = ds.GaussNewton(problem).dense()
    assert same_spectrum(ds.gram_spectrum(problem).values, truth, float(truth.norm()))

from __future__ import annotations

import torch
from torch import Tensor, nn

import deepspectra as ds
from deepspectra.problem.double_precision import DoubleThroughout, names_single


class Norm(nn.Module):
    """A network that computes in float32 inside, as norms of language models do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x).to(torch.float32)
        h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6)
        return self.outer(torch.softmax(h, -1, dtype=torch.float32).to(self.outer.weight.dtype)).float()


class Plain(Norm):
    """The same without casts."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6)
        return self.outer(torch.softmax(h, -1))


def test_what_asks_for_float32_by_name_is_given_float64():
    x = torch.ones(2, dtype=torch.float64)
    with DoubleThroughout():
        found = x.float(), x.to(torch.float32), x.softmax(0, dtype=torch.float32), torch.zeros(1, dtype=torch.float32)
        half = x.to(torch.float16)
    assert {one.dtype for one in found} == {torch.float64}
    assert half.dtype == torch.float16
    assert names_single(Tensor.to, (x, torch.float32), {})
    assert not names_single(Tensor.to, (x, torch.float64), {})


def test_a_float64_problem_computes_in_float64_throughout():
    torch.manual_seed(0)
    net, plain = Norm(), Plain()
    plain.load_state_dict(net.state_dict())
    data = torch.randn(9, 4), torch.arange(9) % 3
    truth = ds.Hessian(ds.Problem(plain, data, dtype=torch.float64)).dense()
    for problem in (ds.Problem(net, data, dtype=torch.float64), ds.Problem(net, data).to(torch.float64)):
        found = ds.Hessian(problem).dense()
        assert float((found - truth).norm()) < 1e-13 * float(truth.norm())


def test_a_float32_problem_is_left_as_it_is():
    torch.manual_seed(0)
    net = Norm()
    problem = ds.Problem(net, (torch.randn(9, 4), torch.arange(9) % 3))
    assert problem.values(next(iter(problem.batches)))[0].dtype == torch.float32

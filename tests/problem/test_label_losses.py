"""The cross-entropy of labels: its derivatives in closed form are those of plain operations, by either mode."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from deepspectra.problem import label_losses as module
from deepspectra.problem.label_losses import label_losses
from deepspectra.problem.memory_budget import measured

OUTPUTS = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TANGENTS = torch.randn(6, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
LABELS = torch.tensor([0, 2, 4, 1, 1, 3])
WEIGHTS = torch.tensor([1.0, 0.5, 2.0, 0.0, 1.0, 3.0], dtype=torch.float64)  # an ignored row among them


pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")  # of PyTorch's tracer


@pytest.fixture(params=[5, 2**20], ids=["row by row", "at once"])
def summed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[Tensor], Tensor]:
    monkeypatch.setattr(module, "NUMBERS_AT_ONCE", request.param)
    return lambda z: (label_losses(z, LABELS) * WEIGHTS).sum()


def truth() -> tuple[Tensor, Tensor]:
    """The slope, and the curvature applied to the tangents."""
    p = OUTPUTS.softmax(1)
    slope = WEIGHTS[:, None] * (p - F.one_hot(LABELS, 5))
    return slope, WEIGHTS[:, None] * (p * TANGENTS - p * (p * TANGENTS).sum(1, keepdim=True))


def test_both_derivatives_by_either_mode(summed: Callable[[Tensor], Tensor]) -> None:
    slope, bent = truth()
    assert torch.allclose(summed(OUTPUTS), (F.cross_entropy(OUTPUTS, LABELS, reduction="none") * WEIGHTS).sum())
    gradient = torch.func.grad(summed)
    assert torch.allclose(gradient(OUTPUTS), slope)
    assert torch.allclose(torch.func.vjp(gradient, OUTPUTS)[1](TANGENTS)[0], bent)
    assert torch.allclose(torch.func.jvp(gradient, (OUTPUTS,), (TANGENTS,))[1], bent)
    assert torch.allclose(torch.func.jvp(summed, (OUTPUTS,), (TANGENTS,))[1], (slope * TANGENTS).sum())


def test_blocks_of_tangents_traced_and_called_again(summed: Callable[[Tensor], Tensor]) -> None:
    _, bent = truth()
    _, linear = torch.func.linearize(torch.func.grad(summed), OUTPUTS)
    for _ in range(2):  # what writes in place would write twice
        assert torch.allclose(linear(TANGENTS), bent)
    block = torch.stack([TANGENTS, -2 * TANGENTS])
    assert torch.allclose(torch.func.vmap(linear)(block)[1], -2 * bent)
    leaf = OUTPUTS.clone().requires_grad_()
    (slope,) = torch.autograd.grad(summed(leaf), leaf, create_graph=True)
    assert torch.allclose(torch.autograd.grad(slope, leaf, block, is_grads_batched=True)[0][1], -2 * bent)


def test_a_fitted_row_keeps_its_digits_in_single_precision() -> None:
    outputs = torch.tensor([[30.0, 0.0, -1.0]], requires_grad=True)
    (slope,) = torch.autograd.grad(label_losses(outputs, torch.tensor([0])).sum(), outputs, create_graph=True)
    (bent,) = torch.autograd.grad(slope, outputs, torch.tensor([[1.0, 0.0, 0.0]]))
    rest = torch.tensor([0.0, -1.0], dtype=torch.float64).exp().sum() * torch.tensor(-30.0, dtype=torch.float64).exp()
    assert float(slope.detach()[0, 0]) == pytest.approx(-float(rest), rel=1e-5)  # 1 − p_y, in float32 no difference
    assert float(bent[0, 0]) == pytest.approx(float(rest), rel=1e-5)


def test_a_graph_keeps_two_arrays() -> None:
    def build() -> tuple[Tensor, Tensor]:
        leaf = torch.zeros(64, 512, requires_grad=True)
        scaled = leaf * 2  # as a network makes its outputs
        labels = torch.zeros(64, dtype=torch.long)
        return leaf, torch.autograd.grad(label_losses(scaled, labels).sum(), scaled, create_graph=True)[0]

    graph, size = measured(build)
    assert len(graph) == 2
    assert size < 3.1 * 64 * 512 * 4  # with the leaf

"""How much of trained weights class means explain, against definitions and a network at rest."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import deepspectra as ds
from deepspectra.errors import LossError
from nets import CASES, labels
from reference import error


def plain(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Class means of the inputs and class sums of (p − y)/N of a linear layer."""
    num = model.weight.shape[0]
    e = (model(x).softmax(1) - torch.eye(num, dtype=x.dtype)[y]) / len(x)
    h = torch.stack([x[y == c].mean(0) for c in range(num)])
    return h, torch.stack([e[y == c].sum(0) for c in range(num)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_spans_in_coarse_types_are_those_of_the_numbers(dtype: torch.dtype) -> None:
    """Three directions of four classes' errors, one of which is hardly fitted: no rounding more, none less."""
    generator, y = torch.Generator().manual_seed(0), torch.arange(200) % 4
    x = 0.3 * torch.randn(200, 8, generator=generator) + 4 * torch.eye(8)[y]
    model = nn.Linear(8, 4, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.eye(4, 8) * torch.tensor([1.6, 1.6, 1.6, 0.2])[:, None])
    expected = ds.weights(ds.Problem(model, (x, y), dtype=torch.float64))[""]
    found = ds.weights(ds.Problem(model, (x, y), dtype=dtype))[""]
    assert found.baseline == expected.baseline == 3 * 4 / 32
    assert found.class_share == pytest.approx(expected.class_share, rel=0.02)


def test_measures_follow_their_definitions() -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 3).double()
    x, y = torch.randn(40, 6, dtype=torch.float64), labels(40, 3)
    found = ds.weights(ds.Problem(model, [(x[:15], y[:15]), (x[15:], y[15:])]))[""]
    h, e = (each.detach() for each in plain(model, x, y))
    W = model.weight.detach()
    (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), model.weight)
    cosine = -(W * gradient).sum() / (W.norm() * gradient.norm())
    assert found.rest_cosine == pytest.approx(float(cosine))
    product = -e.T @ h
    assert found.class_cosine == pytest.approx(float((W * product).sum() / (W.norm() * product.norm())))
    assert found.decay == pytest.approx(float(-(W * gradient).sum() / W.norm() ** 2))
    left, right = (torch.linalg.qr(rows.T)[0] for rows in (e, h))
    left = torch.linalg.svd(e, full_matrices=False)[2][:2].T  # Σ_k e_k = 0: two dimensions
    assert found.class_share == pytest.approx(float((left.T @ W @ right).square().sum() / W.square().sum()))
    assert found.baseline == pytest.approx(2 * 3 / 18)
    assert error(found.singular_values, torch.linalg.svdvals(W)) < 1e-12
    assert error(found.class_singular_values, torch.linalg.svdvals(product / found.decay)) < 1e-9


@pytest.mark.parametrize("sign", [1, -1])
def test_singular_values_are_no_less_than_zero_where_weights_grow(sign: int) -> None:
    torch.manual_seed(0)
    model, y = nn.Linear(4, 3, bias=False).double(), labels(30, 3)
    x = torch.randn(30, 4).double() + 2 * torch.eye(3, 4).double()[y]
    model.weight.data = sign * 0.3 * torch.eye(3, 4).double()
    found = ds.weights(ds.Problem(model, (x, y)))[""]
    assert (found.decay > 0) == (sign > 0)
    h, e = (each.detach() for each in plain(model, x, y))
    assert error(found.class_singular_values, torch.linalg.svdvals(e.T @ h / found.decay)) < 1e-9


def test_features_without_scatter_leave_a_network_at_rest_to_its_class_means() -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 3, bias=False).double()
    y = labels(30, 3)
    x = torch.randn(3, 6, dtype=torch.float64)[y]
    decay = 0.05
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=200, tolerance_grad=1e-12, tolerance_change=0)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y) + decay / 2 * model.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    found = ds.weights(ds.Problem(model, (x, y)))[""]
    assert found.decay == pytest.approx(decay, rel=1e-5)
    assert found.rest_cosine == pytest.approx(1, abs=1e-9)
    assert found.class_cosine == pytest.approx(1, abs=1e-9)
    assert found.class_share == pytest.approx(1, abs=1e-9)
    assert error(found.class_singular_values, found.singular_values) < 1e-5


def test_hidden_layers_and_ignored_rows() -> None:
    problem = CASES["class_weights"]().problem()
    found = ds.weights(problem)
    gradient = problem.unflatten(problem.gradient())
    for layer in found.values():
        W, g = problem.parameters[layer.name], gradient[layer.name]
        assert layer.rest_cosine == pytest.approx(float(-(W * g).sum() / (W.norm() * g.norm())))
    assert "share" in str(found)
    with pytest.raises(LossError, match="cross-entropy"):
        ds.weights(CASES["mse_module"]().problem())


def test_the_sum_over_classes_is_the_gradient_without_scatter() -> None:
    """One example a class: the product of class means is the gradient itself."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    problem = ds.Problem(model, (torch.randn(3, 4, dtype=torch.float64), torch.arange(3)))
    for layer in ds.weights(problem).values():
        assert layer.class_cosine == pytest.approx(layer.rest_cosine, abs=1e-12)

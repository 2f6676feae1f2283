"""Losses as a user may give them: recognised for what they are, or refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import deepspectra as ds
from deepspectra import errors
from given import X, Y, mlp, refused
from nets import chunks
from reference import error


@pytest.mark.parametrize("loss", [nn.L1Loss(), nn.HuberLoss(), nn.MSELoss(), "mse"])
def test_shapes_that_would_broadcast_are_refused(loss):
    net = nn.Linear(5, 1).double()
    with pytest.raises(errors.ShapeError, match="broadcast"):
        ds.Problem(net, (X, X[:, 0]), loss)


def test_class_weights_of_binary_losses_follow_the_dtype():
    loss = nn.BCEWithLogitsLoss(pos_weight=torch.tensor([2.0, 3.0, 4.0]))
    targets = (X[:, :3] > 0).double()
    torch.manual_seed(0)
    net = mlp()
    problem = ds.Problem(net, (X, targets), loss, batch_size=5)
    assert problem.loss() == pytest.approx(float(loss.double()(net(X), targets).detach()))


def test_a_variant_in_another_dtype_leaves_the_weights_of_the_loss_as_they_were():
    weights = torch.tensor([3.3, 7.7, 1.1], dtype=torch.float64)
    problem = ds.Problem(mlp(), (X, (X[:, :3] > 0).double()), nn.BCEWithLogitsLoss(pos_weight=weights))
    before = problem.loss()
    assert problem.to(torch.bfloat16).loss() == pytest.approx(before, rel=0.02)
    assert problem.loss() == before


def test_half_precision_counts_rows_and_elements_exactly():
    net = nn.Linear(5, 300).bfloat16()
    problem = ds.Problem(net, (X.bfloat16(), torch.zeros(12, 300).bfloat16()), "mse")
    assert problem.total_weight == 12 * 300


def test_a_scalar_output_is_not_broadcast_against_its_targets() -> None:
    """(N, 1) against (N,) would be a mean over N² pairs."""
    model = nn.Linear(5, 1).double()
    for loss in ("mse", nn.MSELoss()):
        refused(
            errors.ShapeError,
            r"\(12, 1\).*\(12,\)|\(12,\).*\(12, 1\)",
            lambda loss=loss: ds.Problem(model, (X, X[:, 0]), loss=loss),
        )


def test_integer_targets_of_a_regression() -> None:
    """A class index is no target of a squared error: refused, or an error of shape."""
    refused((errors.DataError, errors.ShapeError), ".", lambda: ds.Problem(mlp(), (X, Y), loss="mse"))


def per_example(z: Tensor, y: Tensor) -> Tensor:
    return functional.cross_entropy(z, y, reduction="none")


def test_a_loss_that_returns_one_number_an_example() -> None:
    refused(errors.LossError, "mean|scalar|12", lambda: ds.Problem(mlp(), (X, Y), loss=per_example))


def test_a_loss_that_returns_no_tensor() -> None:
    refused(errors.LossError, "float", lambda: ds.Problem(mlp(), (X, Y), loss=lambda z, y: 0.5))


def test_outputs_may_be_anything_a_loss_of_one_s_own_understands() -> None:
    """A scalar output for each example, and a loss of one's own."""
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1), nn.Flatten(0)).double()

    def loss(z: Tensor, y: Tensor) -> Tensor:
        return functional.softplus(-z * (2.0 * y - 1.0)).mean()

    y = (Y == 1).double()
    problem = ds.Problem(model, chunks(X, y, [7, 5]), loss=loss)
    parameters = list(model.parameters())
    total = loss(model(X), y)
    gradient = torch.autograd.grad(total, parameters, create_graph=True)
    flat = torch.cat([g.flatten() for g in gradient])
    rows = [torch.autograd.grad(entry, parameters, retain_graph=True, materialize_grads=True) for entry in flat]
    expected = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    assert problem.loss() == pytest.approx(total.item(), rel=1e-12)
    assert error(ds.Hessian(problem).dense(), expected) < 1e-9


def test_binary_targets_may_be_integers() -> None:
    targets, model = (X[:, :3] > 0).long(), mlp()
    ours = ds.Problem(model, (X, targets), nn.BCEWithLogitsLoss())
    theirs = ds.Problem(model, (X, targets.double()), nn.BCEWithLogitsLoss())
    assert ours.loss() == pytest.approx(theirs.loss(), rel=1e-14)


@pytest.mark.parametrize(
    ("targets", "advice"),
    [
        (Y[:, None], r"Pass y.squeeze\(1\) of labels \(B, 1\)"),
        (functional.one_hot(Y, 3), r"y.argmax\(1\) of one-hot labels"),
        (X[:, 0], "for regression say loss='mse'"),
    ],
    ids=["column", "one-hot", "regression"],
)
def test_targets_of_another_shape_are_refused_with_what_to_pass(targets: Tensor, advice: str) -> None:
    refused(errors.ShapeError, advice, lambda: ds.Problem(mlp(), (X, targets)))


def test_a_problem_without_classes_speaks_of_outputs() -> None:
    assert "3 classes, cross_entropy" in repr(ds.Problem(mlp(), (X, Y)))
    assert "3 outputs, mse" in repr(ds.Problem(mlp(), (X, X[:, :3]), loss="mse"))

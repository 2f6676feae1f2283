"""A loss is recognised for what it is by a name, a module or a function."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn import functional

import deepspectra as ds
from deepspectra import errors
from deepspectra.problem.cross_entropy import CrossEntropy
from given import HALVES, UNEVEN, X, Y, mlp, refused, seeded_mlp
from reference import error
from truth import truth

WEIGHT = torch.tensor([0.2, 1.0, 5.0], dtype=torch.float64)


@pytest.mark.parametrize("loss", ["huber", "", 3, None])
def test_an_unknown_loss(loss: Any) -> None:
    words = repr(loss) if isinstance(loss, str) else type(loss).__name__
    refused(errors.LossError, words, lambda: ds.Problem(mlp(), (X, Y), loss=loss))


def test_an_unknown_name_is_answered_with_what_else_can_be_given() -> None:
    refused(errors.LossError, r"such as nn.BCEWithLogitsLoss\(\)", lambda: ds.Problem(mlp(), (X, Y), loss="bce"))


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_loss_module_that_is_not_a_mean(reduction: str) -> None:
    for module, target in (
        (nn.CrossEntropyLoss(reduction=reduction), Y),
        (nn.MSELoss(reduction=reduction), X[:, :3]),
    ):
        refused(
            errors.LossError,
            reduction,
            lambda module=module, target=target: ds.Problem(mlp(), (X, target), loss=module),
        )


def test_the_names_of_losses_are_the_modules() -> None:
    for name, module, target in (
        ("cross_entropy", nn.CrossEntropyLoss(), Y),
        ("mse", nn.MSELoss(), X[:, :3]),
    ):
        model = mlp()
        named, given = (ds.Problem(model, (X, target), loss=loss) for loss in (name, module))
        assert named.loss() == pytest.approx(given.loss(), rel=1e-14)
        assert error(named.gradient(), given.gradient()) < 1e-13


@pytest.mark.parametrize("loss", [F.cross_entropy, nn.CrossEntropyLoss(), "cross_entropy"])
def test_cross_entropy_by_any_name_has_class_structure(loss):
    parts = ds.decompose(ds.Problem(mlp(), (X, Y), loss))
    assert set(parts) == {"class", "cross", "within", "true"}


def test_a_subclass_is_taken_at_its_own_word():
    class Focal(nn.CrossEntropyLoss):
        def forward(self, input, target):
            p = input.softmax(1).gather(1, target[:, None])[:, 0]
            return (-((1 - p) ** 2) * p.log()).mean()

    torch.manual_seed(0)
    net = mlp()
    problem = ds.Problem(net, (X, Y), Focal(), batch_size=5)
    assert problem.loss() == pytest.approx(float(Focal()(net(X), Y).detach()))
    with pytest.raises(errors.LossError):
        ds.decompose(problem)


@pytest.mark.parametrize(
    "loss",
    [
        partial(functional.cross_entropy, weight=WEIGHT),
        partial(functional.cross_entropy, weight=WEIGHT, ignore_index=1, label_smoothing=0.1),
        partial(partial(functional.cross_entropy, ignore_index=1), label_smoothing=0.2),
    ],
)
def test_partials_of_known_losses_are_read_as_their_modules(loss: Any) -> None:
    model = seeded_mlp()
    gradient, hessian = truth(model, lambda: loss(model(X), UNEVEN))
    for data in ((X, UNEVEN), HALVES):
        problem = ds.Problem(model, data, loss=loss)
        assert isinstance(problem.loss_function, CrossEntropy)
        assert error(problem.gradient(), gradient) < 1e-12
        assert error(ds.Hessian(problem).dense(), hessian) < 1e-9


@pytest.mark.parametrize(
    "loss",
    [
        functional.l1_loss,
        functional.mse_loss,
        partial(functional.huber_loss, delta=0.5),
        partial(functional.binary_cross_entropy_with_logits, pos_weight=torch.tensor(2.0)),
    ],
)
def test_functions_refuse_to_broadcast_as_their_modules_do(loss: Any) -> None:
    model, t = seeded_mlp(1), (X[:, 0] > 0).double()
    with pytest.raises(errors.ShapeError, match=r"\(12, 1\)"):
        ds.Problem(model, (X, t), loss=loss)
    _, hessian = truth(model, lambda: loss(model(X), t[:, None]))
    problem = ds.Problem(model, [(X[:5], t[:5, None]), (X[5:], t[5:, None])], loss=loss)
    assert (ds.Hessian(problem).dense() - hessian).abs().max() < 1e-12

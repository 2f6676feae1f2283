"""Softmax cross-entropy has the values, shapes and labels that PyTorch gives it, to the last digit."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import deepspectra as ds
from deepspectra import errors
from deepspectra.problem.cross_entropy import CrossEntropy
from deepspectra.problem.losses import Loss
from deepspectra.problem.named_losses import resolve
from given import X, Y, mlp, refused
from nets import CASES, Case, chunks
from reference import Reference, error


def test_logits_of_another_length_than_the_labels() -> None:
    refused(
        (errors.ShapeError, errors.DataError),
        "4.*3|3.*4",
        lambda: ds.Problem(mlp(), [(X[:4], Y[:3])]),
    )


def test_labels_with_a_column_too_many() -> None:
    refused((errors.ShapeError, errors.DataError), r"\(12, 1\)", lambda: ds.Problem(mlp(), (X, Y[:, None])))


@pytest.mark.parametrize("label", [-1, 3, 1000])
def test_labels_out_of_range(label: int) -> None:
    wrong = Y.clone()
    wrong[7] = label
    refused(errors.DataError, str(label), lambda: ds.Problem(mlp(), (X, wrong)))
    refused(errors.DataError, str(label), lambda: ds.Problem(mlp(), chunks(X, wrong, [6, 6])))


def test_labels_out_of_range_in_tokens() -> None:
    case = CASES["token_classes"]()
    tokens, targets = case.tensors
    targets = targets.clone()
    targets[1, 2] = 5
    refused(errors.DataError, "5", lambda: case.problem((tokens, targets)))


def test_float_labels() -> None:
    refused((errors.DataError, errors.ShapeError), "float", lambda: ds.Problem(mlp(), (X, Y.double())))


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int16])
def test_labels_of_another_integer_type(dtype: torch.dtype) -> None:
    """Understood; not PyTorch's complaint from inside."""
    ref = Reference(Case(mlp(), [(X, Y)]))
    problem = ds.Problem(ref.case.model, (X, Y.to(dtype)))
    assert error(ds.Hessian(problem).dense(), ref.hessian) < 1e-9


def test_log_probabilities_with_nll_have_the_fisher_matrix_of_cross_entropy():
    torch.manual_seed(0)
    plain = mlp()
    logged = nn.Sequential(*copy.deepcopy(list(plain)), nn.LogSoftmax(1))
    ours, theirs = ds.Problem(logged, (X, Y), nn.NLLLoss()), ds.Problem(plain, (X, Y))
    for operator in (ds.Hessian, ds.GaussNewton, ds.EmpiricalFisher):
        assert error(operator(ours).dense(), operator(theirs).dense()) < 1e-9
    with pytest.raises(errors.LossError, match="log-probabilities"):
        ds.Problem(plain, (X, Y), nn.NLLLoss())


def test_soft_targets_must_be_probabilities():
    soft = torch.full((12, 3), 1 / 3, dtype=torch.float64)
    problem = ds.Problem(mlp(), (X, soft))
    G, H, R = (kind(problem).dense() for kind in (ds.GaussNewton, ds.Hessian, ds.Residual))
    assert error(G + R, H) < 1e-9
    with pytest.raises(errors.DataError, match="sum to 1"):
        ds.Problem(mlp(), (X, torch.ones(12, 3).double()))


@pytest.mark.parametrize("scale", [1, 60, 200])
def test_single_precision_keeps_its_digits_however_well_a_network_fits(scale):
    """Every p_y rounds to 1, and curvature is made of 1 − p_y alone."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3))
    x = X.float()
    with torch.no_grad():
        z = net(x)
        first, second = z.topk(2, 1).values.T
        clear = first - second > 0.12
        net[-1].weight *= scale
        net[-1].bias *= scale
    single = ds.Problem(net, (x[clear], z.argmax(1)[clear]))
    double = single.to(torch.float64)
    assert single.loss() == pytest.approx(double.loss(), rel=1e-3)
    for operator in (ds.GaussNewton, ds.Hessian, ds.Residual, ds.EmpiricalFisher):
        found = operator(single).dense().double()
        assert error(found, operator(double).dense()) < 2e-4, operator
        assert error(found, found.T) < 1e-5, operator


def test_the_loss_is_that_of_pytorch_for_every_size_of_logits():
    logits = torch.cat([X[:, :3] * size for size in (0, 1, 30, 1e4)]).requires_grad_()
    labels = torch.cat([Y] * 4)
    for options in ({}, {"weight": torch.tensor([1.0, 0.0, 3.0]).double()}, {"ignore_index": 1}):
        ours = resolve(nn.CrossEntropyLoss(**options)).total(logits, labels)
        theirs = F.cross_entropy(logits, labels, reduction="sum", **options)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
        gradients = [torch.autograd.grad(value, logits, create_graph=True)[0] for value in (ours, theirs)]
        torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)
        v = torch.ones_like(logits) * X[0, 0] + logits.detach().sign()
        seconds = [torch.autograd.grad(gradient, logits, v)[0] for gradient in gradients]
        torch.testing.assert_close(*seconds, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss, nn.NLLLoss])
def test_class_weights_must_be_finite_and_not_negative(weight, loss):
    with pytest.raises(errors.LossError, match="class weights"):
        ds.Problem(mlp(), (X, Y), loss(weight=torch.tensor([1.0, weight, 2.0])))


@pytest.mark.parametrize("num_classes", [3, 60])
def test_the_curvature_of_several_tangents_is_that_of_each(num_classes: int) -> None:
    torch.manual_seed(0)
    outputs, tangents = 5 * torch.randn(7, num_classes), torch.randn(4, 7, num_classes)
    targets = torch.arange(7) % 3
    for loss in (CrossEntropy(), CrossEntropy(torch.rand(num_classes) + 0.5, label_smoothing=0.1)):
        found = loss.curvatures(outputs, targets, tangents)
        for one, product in zip(tangents, found, strict=True):
            assert torch.equal(product, loss.curvature(outputs, targets, one))
            torch.testing.assert_close(product, Loss.curvature(loss, outputs, targets, one), rtol=1e-4, atol=1e-5)

"""Losses as a user may give them: recognised for what they are, or refused."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import deepspectra as ds
from deepspectra import errors

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(12, 4, generator=GENERATOR, dtype=torch.float64)
Y = torch.arange(12) % 3


def network(*last):
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3), *last).double()


def relative(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("loss", [F.cross_entropy, nn.CrossEntropyLoss(), "cross_entropy"])
def test_cross_entropy_by_any_name_has_class_structure(loss):
    parts = ds.decompose(ds.Problem(network(), (X, Y), loss))
    assert set(parts) == {"class", "cross", "within", "true"}


def test_log_probabilities_with_nll_have_the_fisher_matrix_of_cross_entropy():
    torch.manual_seed(0)
    plain = network()
    logged = nn.Sequential(*copy.deepcopy(list(plain)), nn.LogSoftmax(1))
    ours, theirs = ds.Problem(logged, (X, Y), nn.NLLLoss()), ds.Problem(plain, (X, Y))
    for operator in (ds.Hessian, ds.GaussNewton, ds.EmpiricalFisher):
        assert relative(operator(ours).dense(), operator(theirs).dense()) < 1e-9
    with pytest.raises(errors.LossError, match="log-probabilities"):
        ds.Problem(plain, (X, Y), nn.NLLLoss())


def test_a_subclass_is_taken_at_its_own_word():
    class Focal(nn.CrossEntropyLoss):
        def forward(self, input, target):
            p = input.softmax(1).gather(1, target[:, None])[:, 0]
            return (-((1 - p) ** 2) * p.log()).mean()

    torch.manual_seed(0)
    net = network()
    problem = ds.Problem(net, (X, Y), Focal(), batch_size=5)
    assert problem.loss() == pytest.approx(float(Focal()(net(X), Y).detach()))
    with pytest.raises(errors.LossError):
        ds.decompose(problem)


def test_soft_targets_must_be_probabilities():
    soft = torch.full((12, 3), 1 / 3, dtype=torch.float64)
    G, H, R = (
        kind(ds.Problem(network(), (X, soft))).dense() for kind in (ds.GaussNewton, ds.Hessian, ds.Residual)
    )
    assert G.shape == H.shape == R.shape
    with pytest.raises(errors.DataError, match="sum to 1"):
        ds.Problem(network(), (X, torch.ones(12, 3).double()))


@pytest.mark.parametrize("loss", [nn.L1Loss(), nn.HuberLoss(), nn.MSELoss(), "mse"])
def test_shapes_that_would_broadcast_are_refused(loss):
    net = nn.Linear(4, 1).double()
    with pytest.raises(errors.ShapeError, match="broadcast"):
        ds.Problem(net, (X, X[:, 0]), loss)


def test_class_weights_of_binary_losses_follow_the_dtype():
    loss = nn.BCEWithLogitsLoss(pos_weight=torch.tensor([2.0, 3.0, 4.0]))
    targets = (X[:, :3] > 0).double()
    torch.manual_seed(0)
    net = network()
    problem = ds.Problem(net, (X, targets), loss, batch_size=5)
    assert problem.loss() == pytest.approx(float(loss.double()(net(X), targets).detach()))


def test_a_forward_that_ignores_the_model_is_refused():
    net, other = network(), network()
    with pytest.raises(errors.ParameterError, match="forward="):
        ds.Problem(net, [{"x": X, "y": Y}], forward=lambda model, batch: (other(batch["x"]), batch["y"]))


def test_two_tensor_batches_with_a_forward_are_two_batches():
    batches = [torch.cat([X, Y[:, None]], 1), torch.cat([X[:5], Y[:5, None]], 1)]
    problem = ds.Problem(network(), batches, forward=lambda model, b: (model(b[:, :4]), b[:, 4].long()))
    assert problem.num_examples == 17


def test_numpy_arrays_are_named():
    with pytest.raises(errors.DataError, match="NumPy"):
        ds.Problem(network(), (X.numpy(), Y.numpy()))


def test_a_network_that_computes_in_float32_inside_is_accepted():
    class Norm(nn.Module):
        def forward(self, x):
            wide = x.float()
            return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), Norm(), nn.Linear(8, 3))
    problem = ds.Problem(net, (X.float(), Y))
    v = torch.ones(problem.num_parameters)
    H, G, R = ds.Hessian(problem), ds.GaussNewton(problem), ds.Residual(problem)
    assert relative(G @ v + R @ v, H @ v) < 1e-4
    assert float(v @ (H @ v)) != 0


def test_half_precision_counts_rows_and_elements_exactly():
    net = nn.Linear(4, 300).bfloat16()
    problem = ds.Problem(net, (X.bfloat16(), torch.zeros(12, 300).bfloat16()), "mse")
    assert problem.total_weight == 12 * 300


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss, nn.NLLLoss])
def test_class_weights_must_be_finite_and_not_negative(weight, loss):
    with pytest.raises(errors.LossError, match="class weights"):
        ds.Problem(network(), (X, Y), loss(weight=torch.tensor([1.0, weight, 2.0])))

"""Losses as a user may give them: recognised for what they are, or refused."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import deepspectra as ds
from deepspectra import errors
from deepspectra.problem.named_losses import resolve

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


@pytest.mark.parametrize("scale", [1, 60, 200])
def test_single_precision_keeps_its_digits_however_well_a_network_fits(scale):
    """Every p_y rounds to 1, and curvature is made of 1 − p_y alone."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3))
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
        assert relative(found, operator(double).dense()) < 2e-4, operator
        assert relative(found, found.T) < 1e-5, operator


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


def test_a_network_that_runs_in_float32_alone_is_checked_in_it():
    class Cast(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))

        def forward(self, x):
            return self.body((x + 1).float())

    torch.manual_seed(0)
    net = Cast()
    problem, plain = ds.Problem(net, (X.float(), Y)), ds.Problem(net.body, (X.float() + 1, Y))
    for operator in (ds.Hessian, ds.GaussNewton):
        assert relative(operator(problem).dense(), operator(plain).dense()) < 1e-5


def test_gauss_newton_needs_first_derivatives_only():
    """Of a hard sigmoid PyTorch knows no second derivative, not even as a way to J v."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 7), nn.Hardsigmoid(), nn.Linear(7, 3)).double()
    problem = ds.Problem(net, (X, Y))
    with pytest.raises(errors.CurvatureError, match="GaussNewton"):
        ds.Hessian(problem)
    G = ds.GaussNewton(problem).dense()
    names = dict(net.named_parameters())
    J = torch.func.jacrev(lambda p: torch.func.functional_call(net, p, (X,)))(names)
    J = torch.cat([part.reshape(len(X), 3, -1) for part in J.values()], 2)
    p = net(X).softmax(1).detach()
    middle = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    assert relative(G, torch.einsum("nkp,nkl,nlq->pq", J, middle, J).detach() / len(X)) < 1e-12
    assert relative(ds.gram_spectrum(problem).values[:5], torch.linalg.eigvalsh(G).flip(0)[:5]) < 1e-9


def test_half_precision_counts_rows_and_elements_exactly():
    net = nn.Linear(4, 300).bfloat16()
    problem = ds.Problem(net, (X.bfloat16(), torch.zeros(12, 300).bfloat16()), "mse")
    assert problem.total_weight == 12 * 300


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss, nn.NLLLoss])
def test_class_weights_must_be_finite_and_not_negative(weight, loss):
    with pytest.raises(errors.LossError, match="class weights"):
        ds.Problem(network(), (X, Y), loss(weight=torch.tensor([1.0, weight, 2.0])))

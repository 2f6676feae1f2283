"""Convolutions as nodes of their own: the same derivatives as PyTorch's, to second order."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import deepspectra as ds
from deepspectra.derivatives.convolution_derivatives import Convolutions

CASES = {
    "plain": (nn.Conv2d(2, 4, 3), (5, 2, 7, 7)),
    "strided groups": (nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2), (5, 2, 7, 7)),
    "dilated, no bias": (nn.Conv2d(2, 4, 3, dilation=2, bias=False), (5, 2, 7, 7)),
    "uneven": (nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 0)), (5, 2, 7, 6)),
    "padding by name": (nn.Conv2d(2, 4, 3, padding="same"), (5, 2, 7, 7)),
    "more padding at the end": (nn.Conv2d(2, 3, (4, 2), padding="same"), (5, 2, 7, 6)),
    "dilated by name": (nn.Conv1d(2, 3, 4, dilation=3, padding="same"), (5, 2, 9)),
    "no padding by name": (nn.Conv2d(2, 4, 3, stride=2, padding="valid"), (5, 2, 7, 7)),
    "grouped by name": (nn.Conv2d(2, 4, 2, groups=2, padding="same"), (5, 2, 5, 5)),
    "circular": (nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"), (5, 2, 7, 7)),
    "1d": (nn.Conv1d(2, 3, 3, padding=1), (5, 2, 9)),
    "3d": (nn.Conv3d(2, 2, 2), (5, 2, 3, 3, 3)),
}


def second_derivatives(function, leaves, seed=0):
    """Hessian times a vector by double backward."""
    generator = torch.Generator().manual_seed(seed)
    gradient = torch.autograd.grad(function(), leaves, create_graph=True)
    tangents = [torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype) for leaf in leaves]
    return torch.autograd.grad(gradient, leaves, tangents)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", CASES)
def test_second_derivatives_are_those_of_pytorch(name):
    conv, shape = CASES[name]
    conv = conv.double()
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    leaves = [x, *conv.parameters()]
    expected = second_derivatives(lambda: conv(x.tanh()).tanh().square().sum(), leaves)
    with Convolutions():
        found = second_derivatives(lambda: conv(x.tanh()).tanh().square().sum(), leaves)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["plain", "strided groups", "1d"])
def test_blocks_and_restrictions_give_the_same_hessian(name):
    conv, shape = CASES[name]
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        width = conv.double()(x)[0].numel()
        net = nn.Sequential(conv, nn.Tanh(), nn.Flatten(), nn.Linear(width, 3)).double()
    problem = ds.Problem(net, (x, torch.arange(5) % 3))
    H = ds.Hessian(problem)
    dense = H.dense()
    by_vector = torch.stack([H @ v for v in torch.eye(len(dense), dtype=torch.float64)], 1)
    torch.testing.assert_close(dense, by_vector, rtol=1e-12, atol=1e-14)
    size = conv.weight.numel()
    torch.testing.assert_close(
        ds.Hessian(problem.restrict("0.weight")).dense(), dense[:size, :size], rtol=1e-12, atol=1e-14
    )


@pytest.mark.parametrize(("shape", "node"), [((1, 1, 4, 4), "_Convolution"), ((1, 4, 4), "Squeeze")])
def test_what_it_does_not_treat_goes_through(shape, node):
    x, w = torch.ones(shape), torch.ones(1, 1, 3, 3, requires_grad=True)
    with Convolutions():
        y = F.conv2d(x, w, padding="same")
    assert y.grad_fn.name().startswith(node)
    torch.testing.assert_close(y, F.conv2d(x, w, padding=1))
    with Convolutions(), pytest.raises(RuntimeError, match="padding='same' is not supported for strided"):
        F.conv2d(x, w, padding="same", stride=2)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize(
    ("kernel", "dilation", "ends"), [(3, 1, (1, 1)), (2, 1, (0, 1)), (4, 1, (1, 2)), (2, 3, (1, 2))]
)
def test_padding_by_name_is_padding_in_every_exact_way(kernel, dilation, ends):
    torch.manual_seed(0)
    tail = [nn.Tanh(), nn.Flatten(), nn.Linear(3 * 25, 3)]
    named = nn.Conv2d(2, 3, kernel, dilation=dilation, padding="same")
    plain = nn.Conv2d(2, 3, kernel, dilation=dilation)
    plain.load_state_dict(named.state_dict())
    data = torch.randn(7, 2, 5, 5, dtype=torch.float64), torch.arange(7) % 3
    one = ds.Problem(nn.Sequential(nn.Identity(), named, *tail).double(), data)
    two = ds.Problem(nn.Sequential(nn.ZeroPad2d(2 * ends), plain, *tail).double(), data)
    for kind in ("kfac", "ekfac"):
        found, expected = (ds.kronecker(problem, kind) for problem in (one, two))
        assert list(found.blocks) == list(expected.blocks) == ["1", "4"]
        torch.testing.assert_close(found.dense(), expected.dense(), rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(ds.gram_spectrum(one).values, ds.gram_spectrum(two).values, rtol=1e-9, atol=1e-14)
    assert list(ds.collapse(one)) == list(ds.collapse(two))

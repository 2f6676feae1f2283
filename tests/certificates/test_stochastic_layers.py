"""Gaussian layers give each example what a draw of the weights would, in whatever coordinates they are kept."""

import math

import pytest
import torch
from torch import nn

from deepspectra.certificates.stochastic_layers import (
    Draws,
    GaussianConvolution,
    GaussianLinear,
    PooledDraws,
)

DRAWS = 40_000


def _orthogonal(size, seed):
    return torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(seed)))[0]


def _linear(left=True, kept=None):
    """A layer of 4 inputs and a bias, 3 outputs, with a posterior away from its prior."""
    generator = torch.Generator().manual_seed(0)
    layer = GaussianLinear(torch.randn(3, 5, generator=generator), True, 0.3)
    layer.turn(_orthogonal(3, 1) if left else None, _orthogonal(5, 2), kept)
    with torch.no_grad():
        layer.mean.normal_(generator=generator)
        layer.log_ratio.copy_(-torch.rand(layer.mean.shape, generator=generator) * 3)
    return layer


def _covariance(layer):
    """Mean (o d,) and covariance (o d, o d) of the weights, from the definition W₀ + √λ U_S (M + √e^ρ ∘ E) U_Aᵀ."""
    o, d = layer.prior_mean.shape
    kept = layer.mean.shape[1]
    mean, ratio = torch.zeros(o, d).double(), torch.ones(o, d).double()
    mean[:, :kept], ratio[:, :kept] = layer.mean.detach().double(), layer.log_ratio.detach().double().exp()
    turn = torch.kron(layer.whole_left().contiguous(), layer.whole_right().contiguous())
    mean = layer.prior_mean.double().flatten() + math.sqrt(layer.scale) * turn @ mean.flatten()
    return mean, layer.scale * turn @ ratio.flatten().diag() @ turn.T


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("kept", [None, 2])
def test_moments_of_outputs_are_those_of_gaussian_weights(left, kept):
    layer = _linear(left, kept)
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(3))
    mean, covariance = _covariance(layer)
    with torch.no_grad():
        found = layer.moments(x)
    rotation = torch.eye(3) if found.rotation is None else found.rotation
    for row, m, v in zip(x, found.mean, found.variance, strict=True):
        h = torch.kron(torch.eye(3), torch.cat([row, torch.ones(1)])).double()
        assert torch.allclose(m.double(), h @ mean, atol=1e-5)
        assert torch.allclose((rotation @ v.diag() @ rotation.T).double(), h @ covariance @ h.T, rtol=1e-4, atol=1e-5)
    assert torch.allclose(layer.posterior_mean().double().flatten(), mean, atol=1e-6)
    prepared = layer.prepared(x)
    layer.takes_prepared = True
    again = layer.moments(prepared)
    assert torch.allclose(again.mean, found.mean)
    assert torch.allclose(again.variance, found.variance)


def test_divergence_is_that_of_the_two_gaussians():
    layer = _linear(kept=3)
    mean, covariance = _covariance(layer)
    posterior = torch.distributions.MultivariateNormal(mean, covariance)
    prior = torch.distributions.MultivariateNormal(
        layer.prior_mean.double().flatten(), layer.scale * torch.eye(15).double()
    )
    expected = torch.distributions.kl_divergence(posterior, prior)
    assert float(layer.divergence().detach()) == pytest.approx(float(expected), rel=1e-6)


def test_other_coordinates_keep_the_mean_and_the_marginal_variances():
    layer = _linear(kept=3)
    mean, covariance = _covariance(layer)
    left, right = _orthogonal(3, 5), _orthogonal(5, 6)
    layer.turn(left, right)
    moved, new = _covariance(layer)
    assert torch.allclose(moved, mean, atol=1e-6)
    turn = torch.kron(left.contiguous(), right.contiguous()).double()
    assert torch.allclose((turn.T @ new @ turn).diagonal(), (turn.T @ covariance @ turn).diagonal(), rtol=1e-4)
    back = layer.mean.detach().clone(), layer.log_ratio.detach().clone()
    layer.turn(left, right)
    assert torch.allclose(layer.mean, back[0], atol=1e-5)
    assert torch.allclose(layer.log_ratio, back[1], atol=1e-4)


def test_directions_that_are_not_kept_have_the_prior_and_cost_nothing():
    layer = GaussianLinear(torch.randn(3, 5), True, 0.3)
    layer.turn(None, _orthogonal(5, 2), 1)
    mean, covariance = _covariance(layer)
    assert torch.allclose(covariance, 0.3 * torch.eye(15).double(), atol=1e-6)
    assert torch.allclose(mean, layer.prior_mean.double().flatten())
    assert float(layer.divergence().detach()) < 1e-12
    assert float(layer.divergence(torch.float32).detach()) < 1e-6


def test_a_convolution_draws_one_kernel_for_all_positions_of_an_example():
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 2, 2, padding=1, stride=2)
    weights = torch.cat([conv.weight.detach().flatten(1), conv.bias.detach()[:, None]], 1)
    layer = GaussianConvolution(weights, True, 0.2, conv)
    layer.turn(_orthogonal(2, 1), _orthogonal(9, 2))
    with torch.no_grad():
        layer.mean.normal_()
        layer.log_ratio.uniform_(-3, 0)
    mean, covariance = _covariance(layer)
    x = torch.randn(1, 2, 3, 3)
    layer.draws = Draws(0)
    with torch.no_grad():
        drawn = layer(x.expand(DRAWS, -1, -1, -1)).flatten(1).double()

    def outputs(matrix):
        kernel = matrix.view(2, 9).float()
        return nn.functional.conv2d(x, kernel[:, :8].view(2, 2, 2, 2), kernel[:, 8], 2, 1).flatten().double()

    root = torch.stack([outputs(mean + column) - outputs(mean) for column in torch.eye(18).double()], 1)
    expected = root @ covariance @ root.T  # positions are correlated through the kernel they share
    scale = float(expected.diagonal().max())
    assert torch.allclose(drawn.mean(0), outputs(mean), atol=5 * (scale / DRAWS) ** 0.5)
    assert torch.allclose(drawn.T.cov(), expected, atol=7 * scale / DRAWS**0.5)
    assert float(expected[0, 3].abs()) > 0.05 * scale
    layer.is_noisy = False
    assert torch.allclose(layer(x).flatten().double(), outputs(mean), atol=1e-5)


def test_draws_follow_from_the_seed_and_a_pool_serves_other_places_of_itself():
    like = torch.zeros(1)
    assert torch.equal(Draws(3).normal((4, 2), like), Draws(3).normal((4, 2), like))
    assert not torch.equal(Draws(3).normal((4, 2), like), Draws(4).normal((4, 2), like))
    pool = PooledDraws(0)
    first, second = (pool.normal((1000,), like) for _ in range(2))
    assert not torch.equal(first, second)
    assert abs(float(first.mean())) < 0.2
    assert 0.8 < float(first.std()) < 1.2

"""Errors of normal logits, integrated: against closed forms, quadrature of high order and draws."""

import math

import pytest
import torch
from scipy.integrate import quad
from scipy.stats import norm

from deepspectra.certificates.losses import error_probability, log_loss
from deepspectra.certificates.stochastic_layers import Draws, Outputs


def _outputs(num_classes, rotation=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(20, num_classes, generator=generator, dtype=torch.float64) * 1.5
    variance = torch.rand(20, num_classes, generator=generator, dtype=torch.float64) * 2 + 0.2
    labels = torch.randint(num_classes, (20,), generator=generator)
    return Outputs(mean, variance, rotation), labels


def test_of_two_classes_it_is_the_normal_tail_of_the_margin():
    rotation = torch.tensor([[1.0, 1.0], [-1.0, 1.0]], dtype=torch.float64) / math.sqrt(2)
    for turn in (None, rotation):
        outputs, labels = _outputs(2, turn)
        found = error_probability(outputs, labels)
        for k in range(20):
            y = int(labels[k])
            covariance = torch.diag(outputs.variance[k])
            if turn is not None:
                covariance = turn @ covariance @ turn.T
            spread = float(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
            margin = float(outputs.mean[k, y] - outputs.mean[k, 1 - y])
            assert float(found[k]) == pytest.approx(norm.cdf(-margin / math.sqrt(spread)), abs=1e-12)


def test_of_more_classes_sixteen_nodes_do():
    outputs, labels = _outputs(5)
    found = error_probability(outputs, labels)
    for k in range(20):
        y = int(labels[k])
        mean, std = outputs.mean[k], outputs.variance[k].sqrt()

        def right(z, mean=mean, std=std, y=y):
            others = [norm.cdf(z, mean[c], std[c]) for c in range(5) if c != y]
            return norm.pdf(z, mean[y], std[y]) * math.prod(others)

        exact = 1 - quad(right, float(mean[y] - 9 * std[y]), float(mean[y] + 9 * std[y]), epsabs=1e-10)[0]
        assert float(found[k]) == pytest.approx(exact, abs=3e-3)


@pytest.mark.parametrize("num_classes", [2, 6])
def test_it_is_the_share_of_draws_that_err(num_classes):
    outputs, labels = _outputs(num_classes, seed=1)
    draws, num = Draws(0), 20_000
    wide = Outputs(outputs.mean.repeat(num, 1), outputs.variance.repeat(num, 1))
    wrong = (wide.drawn(draws).argmax(1) != labels.repeat(num)).double().view(num, -1).mean(0)
    assert float((wrong - error_probability(outputs, labels)).abs().max()) < 5 * 0.5 / num**0.5


def test_the_log_loss_is_finite_where_the_error_is_certain_and_has_a_slope_elsewhere():
    errors = torch.tensor([0.0, 0.5, 1.0], requires_grad=True)
    loss = log_loss(errors)
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert float(errors.grad[1]) == pytest.approx(2.0)

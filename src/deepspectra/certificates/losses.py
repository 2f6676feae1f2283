"""Errors of Gaussian logits: the probability that the largest is not the label's, integrated and not drawn."""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from torch import Tensor

from deepspectra.certificates.stochastic_layers import Outputs

NUM_NODES = 16  # of the quadrature over the label's own logit
TINY = 1e-30  # variance that is taken for none
FLOOR = 1e-6  # probability of the label below which its logarithm is not taken


def error_probability(outputs: Outputs, labels: Tensor) -> Tensor:
    """P(argmax z ≠ y) (B,) for normal logits z.

    Of two classes Φ(−m/√v), exactly, with the margin's mean m and variance v. Of more, with independent logits,
    1 − ∫ φ(t) Π_{c≠y} Φ((m_y + √v_y t − m_c)/√v_c) dt by Gauss-Hermite quadrature.
    """
    mean, variance = outputs.mean, outputs.variance
    if mean.shape[1] == 2:
        sign = labels.to(mean) * 2 - 1
        margin = (mean[:, 1] - mean[:, 0]) * sign
        if outputs.rotation is not None:
            along = (outputs.rotation[1] - outputs.rotation[0]).square()
            spread = variance @ along
        else:
            spread = variance.sum(1)
        return normal_below(-margin * spread.clamp_min(TINY).rsqrt())
    assert outputs.rotation is None
    nodes, weights = _hermite(mean.dtype)
    nodes, weights = nodes.to(mean.device), weights.to(mean.device)
    rows = torch.arange(len(labels), device=mean.device)
    own = mean[rows, labels, None] + variance[rows, labels, None].clamp_min(TINY).sqrt() * nodes  # (B, T)
    scaled = (own[:, None] - mean[:, :, None]) * variance.clamp_min(TINY).rsqrt()[:, :, None]  # (B, C, T)
    below = torch.special.log_ndtr(scaled)
    below = below.sum(1) - below[rows, labels]
    found: Tensor = 1 - below.exp() @ weights
    return found


def log_loss(errors: Tensor) -> Tensor:
    """−log of the probability of the label."""
    return -(1 - errors).clamp_min(FLOOR).log()


def normal_below(x: Tensor) -> Tensor:
    """Φ(x)."""
    return torch.erfc(x * -math.sqrt(0.5)) / 2


@functools.cache
def _hermite(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Nodes and weights of ∫ φ(t) f(t) dt."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(NUM_NODES)
    return torch.tensor(nodes, dtype=dtype), torch.tensor(weights / weights.sum(), dtype=dtype)

"""Matrices with given eigenvalues, and operators given by their products."""

import math
from collections.abc import Callable

import numpy as np
import torch
from scipy.stats import wasserstein_distance

from deepspectra.operators.base import Operator

SIZE = 300


SPECTRA = {
    "trained": torch.cat([torch.logspace(0, -1, 10), 0.03 * torch.exp(-torch.linspace(0, 14, SIZE - 10))]),
    "flat": torch.linspace(0.5, 1, SIZE),
    "indefinite": torch.cos(torch.linspace(0, math.pi, SIZE)),
    "power law": torch.arange(1, SIZE + 1) ** -1.0,
}


def rotated(values, seed=0, dtype=torch.float64):
    size = len(values)
    normal = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    basis = torch.linalg.qr(normal)[0]
    matrix = (basis * values.double()) @ basis.T
    return ((matrix + matrix.T) / 2).to(dtype)


OUTLIERS = torch.logspace(0, -1, 10, dtype=torch.float64)


def trained(size=300):
    """Eigenvalues like those of a trained network: ten outliers and a bulk that decays to zero."""
    return torch.cat([OUTLIERS, 0.03 * torch.exp(-torch.linspace(0, 14, size - 10, dtype=torch.float64))])


class Function(Operator):
    """An operator given by a function on blocks (P, K)."""

    def __init__(self, apply, size, *, dtype=torch.float32, name="operator"):
        super().__init__(size, dtype=dtype, device="cpu", name=name)
        self.function = apply

    def _apply(self, block):
        return self.function(block)


def diagonal(values, dtype=torch.float64, *, vectors=None):
    """diag(values), with room for so many vectors if that is given."""
    operator = Function(lambda block: values.to(block)[:, None] * block, len(values), dtype=dtype, name="diagonal")
    if vectors is not None:
        operator.memory = vectors * len(values) * torch.finfo(dtype).bits // 8
    return operator


def true_residuals(matrix, pairs):
    vectors = pairs.vectors.double()
    return torch.linalg.vector_norm(matrix.double() @ vectors - vectors * pairs.values, dim=0)


def distance(result, exact):
    """Wasserstein-1, relative to the mean absolute eigenvalue."""
    return wasserstein_distance(result.nodes, exact, result.weights) / float(exact.abs().mean())


def broadened(grid, positions, width):
    """The exact spectrum convolved with the same Gaussian."""
    kernel = (-0.5 * ((grid[:, None] - positions) / width) ** 2).exp()
    return kernel.mean(1) / (width * math.sqrt(2 * math.pi))


def integral(values, grid):
    return float(torch.trapezoid(values, grid))


Draw = Callable[[np.random.Generator], np.ndarray]


def pareto(size: int, exponent: float, share: float = 0.5, body: str = "uniform") -> Draw:
    """A share of Pareto's law from 1 on, above a uniform body, or Clauset's, with a continuous density."""

    def draw(rng: np.random.Generator) -> np.ndarray:
        num = rng.binomial(size, share)
        u = rng.random(size - num)
        below = u if body == "uniform" else 1 - np.log(1 + u * math.expm1(exponent)) / exponent
        return np.concatenate([(1 - rng.random(num)) ** (-1 / (exponent - 1)), below])

    return draw


def log_normal(size: int, sigma: float) -> Draw:
    return lambda rng: np.exp(sigma * rng.normal(size=size))

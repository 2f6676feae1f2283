"""Matrices with given eigenvalues, and operators given by their products."""

import math

import torch

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


class Function(Operator):
    """An operator given by a function on blocks (P, K)."""

    def __init__(self, apply, size, *, dtype=torch.float32, name="operator"):
        super().__init__(size, dtype=dtype, device="cpu", name=name)
        self.function = apply

    def _apply(self, block):
        return self.function(block)

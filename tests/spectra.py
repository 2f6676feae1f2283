"""Matrices with given eigenvalues."""

import math

import torch

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

"""Matrices with given eigenvalues."""

import torch


def rotated(values, seed=0, dtype=torch.float64):
    size = len(values)
    normal = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    basis = torch.linalg.qr(normal)[0]
    matrix = (basis * values.double()) @ basis.T
    return ((matrix + matrix.T) / 2).to(dtype)

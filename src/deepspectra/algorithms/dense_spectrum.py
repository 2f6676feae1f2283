"""The spectrum of an operator that is small enough to be a dense matrix: every eigenvalue, and no estimate."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from deepspectra.algorithms.probes import Probes
from deepspectra.argument_checks import Progress
from deepspectra.operators.base import Operator
from deepspectra.quadrature import Density
from deepspectra.results import Provenance

DRAWN_STEPS = 64  # resolution at which an exact spectrum is drawn


def exact_density(operator: Operator, progress: Progress | None = None) -> Density:
    """The density of all P eigenvalues, each a node of weight 1/P.

    Rounding of products in float32 leaves eigenvalues below about 1e-7 of the largest unknown: they are what the
    matrix says, and no more.

    Raises:
        NonFiniteError: a product is NaN or infinite.

    Cost: P products, P² numbers of float64 twice, and 4/3 P³ operations at about a sixth of a product's speed.
    """
    began = time.perf_counter()
    run = Probes(operator, operator.shape[0], progress)
    matrix = torch.empty(run.size, run.size, dtype=torch.float64)
    for rows, columns in run.identity():
        matrix[rows] = columns.T.double().cpu()
    scale = 2.0**run.operator.exponent  # of units in which products do not overflow
    values = torch.linalg.eigvalsh(matrix.add_(matrix.T.clone()).div_(2)).mul_(scale)
    return of_all(values, Provenance.of(operator), time.perf_counter() - began, run.spent)


def of_all(values: Tensor, provenance: Provenance, seconds: float = 0.0, num_products: int = 0) -> Density:
    """The density whose nodes are all eigenvalues but zeros (R,), and one node for all the zeros."""
    zeros = provenance.size - len(values)
    nodes, weights = values, torch.full_like(values, 1 / provenance.size)
    if zeros:
        nodes = torch.cat([nodes, nodes.new_zeros(1)])
        weights = torch.cat([weights, weights.new_tensor([zeros / provenance.size])])
    return Density(
        nodes=nodes,
        weights=weights,
        probes=torch.full((len(nodes),), -1),
        num_probes=0,
        num_steps=DRAWN_STEPS,
        num_products=num_products,
        seconds=seconds,
        provenance=provenance,
    )

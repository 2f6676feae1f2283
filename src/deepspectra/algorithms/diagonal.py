"""Diagonal by the same left-out vectors as the trace, with a standard error per entry."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from deepspectra.algorithms.lanczos import as_operator, check_count
from deepspectra.algorithms.sketch import Products, Progress, Sketch, method_for, sketch, standard_error
from deepspectra.operators.base import Operator
from deepspectra.results import Diagonal, Provenance

ROWS_PER_CHUNK = 2**14  # of the (P, n) estimates, in float64


def diagonal(
    A: Operator | Tensor, num_products: int = 64, seed: int = 0, progress: Progress | None = None
) -> Diagonal:
    """The diagonal of a symmetric operator, with a standard error per entry."""
    began = time.perf_counter()
    operator = as_operator(A)
    check_count("num_products", num_products)
    run = Products(operator, num_products, progress)
    method = method_for(run, "diagonal")
    generator = torch.Generator().manual_seed(seed)
    if method == "exact":
        values = torch.cat([columns[rows].diagonal() for rows, columns in run.identity()])
        errors = torch.zeros_like(values)
    elif method == "leave-one-out":
        values, errors = _left_out(sketch(run, run.signs(num_products // 2, generator)))
    else:
        values, errors = _sampled(run, generator)
    return Diagonal(
        values=values,
        standard_error=errors,
        num_products=run.done,
        seconds=time.perf_counter() - began,
        method=method,
        provenance=Provenance.of(operator, seed),
    )


def _sampled(run: Products, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The mean of ω ∘ A ω over independent signs, and its standard error."""
    mean = squares = torch.zeros(run.size, dtype=torch.float64, device=run.like.device)
    count = 0
    for omega, image in run.samples(run.signs, generator):
        size = omega.shape[1]
        forms = (omega * image).double()
        step = forms.mean(1) - mean
        squares = squares + (forms - forms.mean(1, keepdim=True)).square().sum(1)
        squares += step.square() * (count * size / (count + size))
        mean = mean + step * (size / (count + size))
        count += size
    return mean.to(run.like), (squares / (count * (count - 1) or math.nan)).sqrt().to(run.like)


def _left_out(parts: Sketch) -> tuple[Tensor, Tensor]:
    """Mean and standard error of diag(A − B_i) + ω_i ∘ B_i ω_i, a stretch of rows at a time."""
    H, S, X, g = (small.to(parts.Q.device) for small in (parts.H, parts.S, parts.X, parts.g))
    h = (S * (H @ S)).sum(0)
    values, errors = torch.empty_like(parts.Q[:, 0]), torch.empty_like(parts.Q[:, 0])
    for rows in torch.split(torch.arange(len(values)), ROWS_PER_CHUNK):
        omega, Q, Z = (
            columns[rows[0] : rows[-1] + 1].double() for columns in (parts.omega, parts.Q, parts.Z)
        )
        known = (Q * (Q @ H + 2 * Z)).sum(1)
        QS = Q @ S
        estimates = omega * (g * QS - Z @ X) - QS * (h * QS + 2 * Z @ S)
        values[rows] = (known + estimates.mean(1)).to(values)
        errors[rows] = standard_error(estimates, "leave-one-out").to(errors)
    return values, errors

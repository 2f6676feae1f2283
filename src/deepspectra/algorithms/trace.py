"""Trace by exchangeable low-rank deflation (XTrace), with its standard error."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from deepspectra.algorithms.krylov import as_operator, check_count, inner_products
from deepspectra.algorithms.probes import Products, Progress, stream
from deepspectra.algorithms.sketch import Sketch, form_variances, method_for, sketch
from deepspectra.operators.base import Operator
from deepspectra.results import Estimate, Provenance, standard_error

CORRELATION = (
    3  # the estimates share all vectors but one: the mean of n scatters like that of n/3 at the worst
)


def trace(
    A: Operator | Tensor, num_products: int = 64, seed: int = 0, progress: Progress | None = None
) -> Estimate:
    """The trace of a symmetric operator, with a standard error.

    XTrace: with n = num_products // 2 Gaussian vectors Ω and the orthonormal basis Q of A Ω, each ω_i is left
    out in turn: tr(Q_iᵀ A Q_i) is exact and ω_i estimates the rest, outside Q_i. The mean of the n estimates
    is unbiased. A fast decaying spectrum leaves little to estimate; an operator of rank below n is done
    exactly.

    Args:
        A: an operator, or a symmetric matrix (P, P).
        num_products: products to spend, at most. From P on the trace is exact, by P products.
        seed: of the random vectors.
        progress: called with (products so far, products expected).

    Returns:
        Estimate. The variance of each ω_iᵀ B_i ω_i is that of a Gaussian form, of whose ‖B_i‖² the sketch knows most
        (`algorithms/sketch.py`). The estimates are exchangeable but not independent: their mean scattered up to 1.8
        times as much as if they were, so that the standard error has a factor of √3. Two of them covered the trace
        in 94 to 100 % of 200 runs at 4 to 64 products on each of nine spectra (docs/coverage.md). Independent
        vectors (1 to 3 products, or little memory) have Student's quantile in theirs.

    Raises:
        OptionError, ShapeError, DataError: an argument out of range or of a wrong shape.
        NonFiniteError: a product is NaN or infinite.

    Cost: num_products products; 3 num_products/2 vectors of length P. If these do not fit `A.memory`, plain
    Hutchinson in blocks of 16, with a FallbackWarning.

    Source: Epperly, Tropp and Webber, SIAM J. Matrix Anal. Appl. 45 (2024), XTrace with their normalisation
    of Gaussian vectors; Hutchinson, Commun. Stat. 19 (1990).
    """
    began = time.perf_counter()
    operator = as_operator(A)
    check_count("num_products", num_products)
    run = Products(operator, min(num_products, operator.shape[0]), progress)
    method = method_for(run, num_products, "trace")
    generator, freedom = stream(seed, "trace"), math.inf
    if method == "exact":
        value = float(sum(columns[rows].double().trace() for rows, columns in run.identity()))
        error = 0.0
    elif method == "leave-one-out":
        value, error = _left_out(sketch(run, run.gaussian(num_products // 2, generator)))
    else:
        forms = torch.cat([_forms(z, image) for z, image in run.samples(run.gaussian, generator)])
        value, error, freedom = float(forms.mean()), float(standard_error(forms)), len(forms) - 1
    return Estimate(
        quantity="trace",
        value=run.operator.back(value),
        standard_error=run.operator.back(error),
        num_products=run.spent,
        seconds=time.perf_counter() - began,
        method=method,
        provenance=Provenance.of(operator, seed),
        degrees_of_freedom=freedom,
    )


def _forms(z: Tensor, image: Tensor) -> Tensor:
    """P zᵀAz/‖z‖² (k,)."""
    forms = (z * image).sum(0, dtype=torch.float64) / z.square().sum(0, dtype=torch.float64)
    return len(z) * forms.cpu()


def _left_out(parts: Sketch) -> tuple[float, float]:
    """The mean of tr(P_i A) + ω_iᵀ B_i ω_i over i, and its standard error."""
    H, W, S, X = parts.H, parts.W, parts.S, parts.X
    outside = parts.sphere * (parts.g * (S * W).sum(0) - (X * (parts.R - H @ W)).sum(0))
    _, squares = parts.remainders(inner_products(parts.Z.T, parts.Z.T))
    traces = parts.h + (outside - parts.h).mean()  # of B_i: that of C is the same for all i
    variance = form_variances(squares, traces, parts.dimensions).mean()
    value = H.trace() + (outside - parts.h).mean()
    return float(value), float((CORRELATION * variance / len(outside)).sqrt())

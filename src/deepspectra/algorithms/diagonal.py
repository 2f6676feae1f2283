"""Diagonal by the same left-out vectors as the trace, with a standard error per entry."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from deepspectra.algorithms.krylov import as_operator, check_count
from deepspectra.algorithms.probes import Products, Progress, stream
from deepspectra.algorithms.sketch import Sketch, method_for, sketch
from deepspectra.operators.base import Operator
from deepspectra.results import Diagonal, Provenance, standard_error, student_scale

CORRELATION = (
    2  # the estimates share all vectors but one: the mean of n scatters like that of n/2 at the worst
)
ROWS_PER_CHUNK = 2**14  # of the (P, n) estimates, in float64


def diagonal(
    A: Operator | Tensor, num_products: int = 64, seed: int = 0, progress: Progress | None = None
) -> Diagonal:
    """The diagonal of a symmetric operator, with a standard error per entry.

    As `trace` does it, with n = num_products // 2 vectors of signs ±1: each ω_i is left out in turn of a sketch
    of A. The diagonal of what the sketch holds is exact, and ω_i ∘ B_i ω_i estimates that of the remainder
    B_i. The mean of the n estimates is unbiased. An operator of rank below n is done exactly. The variance
    of an entry is the squared length of its row of B_i without the diagonal, over n: a spectrum that
    decays leaves little of it, one that is nearly flat more than A itself has.

    Args:
        A: an operator, or a symmetric matrix (P, P).
        num_products: products to spend, at most. From P on the diagonal is exact, by P products.
        seed: of the random vectors.
        progress: called with (products so far, products expected).

    Returns:
        Diagonal. The standard errors are the scatter of the n estimates, with Student's quantile for their number
        and a factor of √2 for what they share. Two of them covered 97 to 99 % of the entries over 200 runs at 4 to 64
        products on each of nine spectra (docs/coverage.md). A row of few entries makes few different samples,
        which may be equal by chance; its own standard error then says little.

    Raises:
        OptionError, ShapeError, DataError: an argument out of range or of a wrong shape.
        NonFiniteError: a product is NaN or infinite.

    Cost: num_products products; 3 num_products/2 vectors of length P. If these do not fit `A.memory`, the mean
    of ω ∘ A ω over independent signs, with a FallbackWarning.

    Source: Bekas, Kokiopoulou and Saad, Appl. Numer. Math. 57 (2007), for signs; XDiag of Epperly, Tropp and
    Webber, SIAM J. Matrix Anal. Appl. 45 (2024). Departure: the projection from both sides, with A Q at hand
    already, which takes a quarter to a half off the error of a decaying spectrum. Diag++ (Baston and
    Nakatsukasa, arXiv 2201.10684) spends its vectors either on the sketch or on samples.
    """
    began = time.perf_counter()
    operator = as_operator(A)
    check_count("num_products", num_products)
    run = Products(operator, min(num_products, operator.shape[0]), progress)
    method = method_for(run, num_products, "diagonal")
    generator, freedom = stream(seed, "diagonal"), math.inf
    if method == "exact":
        values = torch.cat([columns[rows].diagonal() for rows, columns in run.identity()])
        errors = torch.zeros_like(values)
    elif method == "leave-one-out":
        values, errors = _left_out(sketch(run, run.signs(num_products // 2, generator)))
        freedom = num_products // 2 - 1
    else:
        values, errors = _sampled(run, generator)
        freedom = run.done - 1
    unit = 2.0**run.operator.exponent
    return Diagonal(
        values=values * unit,
        standard_error=errors * unit,
        num_products=run.spent,
        seconds=time.perf_counter() - began,
        method=method,
        provenance=Provenance.of(operator, seed),
        degrees_of_freedom=freedom,
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
    return mean.to(run.like), (student_scale(count) * (squares / (count * max(count - 1, 1))).sqrt()).to(
        run.like
    )


def _left_out(parts: Sketch) -> tuple[Tensor, Tensor]:
    """Mean and standard error of diag(A − B_i) + ω_i ∘ B_i ω_i, a stretch of rows at a time."""
    H, S, X, g, h = (small.to(parts.Q.device) for small in (parts.H, parts.S, parts.X, parts.g, parts.h))
    values, errors = torch.empty_like(parts.omega[:, 0]), torch.empty_like(parts.omega[:, 0])
    for rows in torch.split(torch.arange(len(values)), ROWS_PER_CHUNK):
        omega, Q, Z = (
            columns[rows[0] : rows[-1] + 1].double() for columns in (parts.omega, parts.Q, parts.Z)
        )
        known = (Q * (Q @ H + 2 * Z)).sum(1)
        QS = Q @ S
        estimates = omega * (g * QS - Z @ X) - QS * (h * QS + 2 * Z @ S)
        values[rows] = (known + estimates.mean(1)).to(values)
        errors[rows] = (math.sqrt(CORRELATION) * standard_error(estimates, -1)).to(errors)
    return values, errors

"""Frobenius norm by the same left-out vectors as the trace, with its standard error."""

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
    4  # the estimates share all vectors but one: the mean of n scatters like that of n/4 at the worst
)


def frobenius_norm(
    A: Operator | Tensor, num_products: int = 64, seed: int = 0, progress: Progress | None = None
) -> Estimate:
    """‖A‖_F = (Σ_i λ_i²)^½ of a symmetric operator, with a standard error.

    Of n = num_products // 2 Gaussian vectors each is left out in turn: what the others' images span gives
    ‖A‖² − ‖B_i‖² exactly, and ‖B_i ω_i‖² estimates the remainder without bias. A fast decaying spectrum leaves
    little to estimate; an operator of rank below n is done exactly.

    Args:
        A: an operator, or a symmetric matrix (P, P).
        num_products: products to spend, at most. From P on the norm is exact, by P products.
        seed: of the random vectors.
        progress: called with (products so far, products expected).

    Returns:
        Estimate, in the units of A. The estimate of ‖A‖² is unbiased; its root is given. The standard error is made
        as that of `trace`, with a factor of 2 for what the estimates share: two of them covered the norm in 93 to
        100 % of 200 runs at 4 to 64 products on each of nine spectra (docs/coverage.md).

    Raises:
        OptionError, ShapeError, DataError: an argument out of range or of a wrong shape.
        NonFiniteError: a product is NaN or infinite.

    Cost: num_products products; 3 num_products/2 vectors of length P. If these do not fit `A.memory`, independent
    vectors in blocks of 16, with a FallbackWarning.

    Source: Epperly, Tropp and Webber, SIAM J. Matrix Anal. Appl. 45 (2024), for leaving out in turn.
    """
    began = time.perf_counter()
    operator = as_operator(A)
    check_count("num_products", num_products)
    run = Products(operator, min(num_products, operator.shape[0]), progress)
    method = method_for(run, num_products, "frobenius_norm")
    generator, freedom = stream(seed, "Frobenius norm"), math.inf
    if method == "exact":
        norm, error = math.hypot(*(_length(columns) for _, columns in run.identity())), 0.0
    else:
        if method == "leave-one-out":
            square, error = _left_out(sketch(run, run.gaussian(num_products // 2, generator)))
        else:
            blocks = run.samples(run.gaussian, generator)
            squares = torch.cat([run.size * _squares(image) / _squares(z) for z, image in blocks])
            square, error, freedom = float(squares.mean()), float(standard_error(squares)), len(squares) - 1
        norm = math.sqrt(square)
        error = error / (2 * norm) if norm else error
    return Estimate(
        quantity="Frobenius norm",
        value=run.operator.back(norm),
        standard_error=run.operator.back(error),
        num_products=run.spent,
        seconds=time.perf_counter() - began,
        method=method,
        provenance=Provenance.of(operator, seed),
        degrees_of_freedom=freedom,
    )


def _length(columns: Tensor) -> float:
    """‖·‖_F, also where squares overflow: the first of these blocks sets the scale, and may be a small one."""
    largest = float(columns.abs().max())
    return largest * float((columns.double() / largest).norm()) if largest else 0.0


def _squares(columns: Tensor) -> Tensor:
    """Squared lengths (k,)."""
    lengths: Tensor = torch.linalg.vector_norm(columns, dim=0, dtype=torch.float64)
    return lengths.square().cpu()


def _left_out(parts: Sketch) -> tuple[float, float]:
    """The mean of ‖A‖² − ‖B_i‖² + ‖B_i ω_i‖² over i, and its standard error.

    That of ‖B_i ω_i‖² takes tr B_i⁴, which is ‖B_i‖² times the mean of ‖B_i q‖² over q along B_i ω: q_i is one.
    """
    gram = inner_products(parts.Z.T, parts.Z.T)
    samples, (along, squares) = parts.squares(gram), parts.remainders(gram)
    beside = (parts.S * (gram @ parts.S)).sum(0)
    value = parts.H.square().sum() + 2 * gram.trace() + (samples - along - beside).mean()
    variance = form_variances(along * squares, squares, parts.dimensions).mean()
    return float(value.clamp_min(0)), float((CORRELATION * variance / len(samples)).sqrt())

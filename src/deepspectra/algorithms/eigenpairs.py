"""Extreme eigenpairs until converged: residuals measured, completeness challenged."""

from __future__ import annotations

import math
import time
import warnings
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from deepspectra.algorithms.eigenpair_search import SPARE_VECTORS, Search, Wanted
from deepspectra.algorithms.krylov_basis import Krylov, Ritz
from deepspectra.algorithms.long_vectors import (
    inner_products,
    norms_of,
    rows_that_fit,
    stored_type,
)
from deepspectra.argument_checks import Progress, check_choice, check_columns, check_count, check_rtol, seeded
from deepspectra.errors import ConvergenceWarning, OptionError
from deepspectra.operators.base import Identity, Operator, Sum, as_operator
from deepspectra.results import Eigenpairs, Separation, origin

ENDS = ("largest", "smallest", "magnitude", "both")
REACH = 3  # residuals of a Ritz value within which its eigenvalue is taken to lie
STEADY = 1 / 6  # variation of a sample that a search starts from, relative to the residual asked for
TOGETHER = 8  # vectors whose products are taken to measure residuals, at most: each holds
MEASURED = 4  # vectors while it is measured: its product, what an operator makes that of, and the residual
ROUGH = 2e-2  # residual relative to the value, of pairs that others go on from


def eigenpairs(
    A: Operator | Tensor,
    num: int = 10,
    which: str = "largest",
    rtol: float = 1e-3,
    start: Tensor | str | None = None,
    max_products: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Eigenpairs:
    """Extreme eigenpairs of a symmetric operator, until converged.

    A pair has converged when its measured residual ‖A v − λ v‖ is at most rtol·|λ|. (Of eigenvalues below
    ε^(2/3)·‖A‖, which are zero to working precision ε, only max(rtol·ε^(2/3), 8 ε)·‖A‖ is asked.) Of values that
    differ by less than that, converged ones are preferred. All wanted pairs must then survive a challenge: a fresh
    random vector is followed until a pair that the search missed, such as a further copy of a multiple eigenvalue,
    would show along it. Whatever the spectrum and the start, a pair beyond the last but one wanted is missing from
    at most 1 of 5,000 results called converged, and from at most 1 of 100 one that differs from the last by more
    than its tolerance. The status is then "statistical"; it is "certified" if the basis has grown to span R^P.
    Without a gap after the wanted values this takes about as long as the search: unless `max_products` is given,
    the challenge gives up after 20 products, or .6 times those before it, and the result has not converged.
    How far down the challenge excludes unseen eigenvalues bounds the errors of values, vectors and span:
    `error_bounds`, `angle_bounds`, `subspace_angle_bound`.

    The basis is held exactly, on an accelerator beyond `A.memory` in the host's memory; with `A.basis =
    torch.bfloat16` in half of float32's bytes. What that rounds is counted in residuals while the search goes on, and
    in the end they are measured afresh. The result says how the basis was held, and what that cost.

    Args:
        A: an operator, or a symmetric matrix (P, P).
        num: how many pairs, K.
        which: "largest" | "smallest" | "magnitude" | "both" (⌈K/2⌉ largest and ⌊K/2⌋ smallest).
        rtol: residual relative to |λ|.
        start: "random" for a random vector, (P,) or (P, k) to start from a subspace (Rayleigh-Ritz on it costs k
            products), or the name of a start that the operator knows. H and G of cross-entropy know "sampled": the
            eigenvectors of the same operator on a sample drawn by importance, as small as rtol allows, of a
            quarter of the examples at most. None takes that where so many are enough, else a random vector.
        max_products: when to give up. Unless given, after max(20 K, 300), or when a challenge takes long.
        seed: of the random vectors.
        progress: called with (products so far, max_products) after every product.

    Returns:
        Eigenpairs, values descending. With `converged=False` and a ConvergenceWarning when something is
        missing, or may be.

    Raises:
        OptionError, ShapeError, DataError: an argument out of range, or of a wrong shape, or not finite; an rtol that
            a basis in bfloat16 does not reach.
        NonFiniteError: a product is NaN or infinite.
        MemoryBudgetError: fewer than K + 8 vectors fit `A.memory`.

    Cost: products as counted in the result, about 5 K of them with the sample if there is one, and K more with a
    basis in bfloat16; a basis of at most `A.memory` bytes, and half of what is free on the host of an accelerator,
    restarted when it is full, beside which are up to four vectors, and in the end the K pairs, for which kept graphs
    make way; 4 P m flops a product for reorthogonalising twice against m vectors.

    Source: thick-restart Lanczos (Wu and Simon, SIAM J. Matrix Anal. Appl. 22, 2000). Departures: (1) the
    projected matrix is recorded in full, so that residuals are measured; (2) several residual directions may
    be pending, as in Ruhe's band Lanczos (Math. Comp. 33, 1979), and the one with the largest unconverged
    residual is multiplied next; (3) the challenge, which turns Kuczyński and Woźniakowski's bounds for Lanczos
    from a random vector (SIAM J. Matrix Anal. Appl. 13, 1992) into one for the spectrum that it meets.
    """
    return explore(A, num, which, rtol, start, max_products, seed, progress, keep=False)[0]


def explore(
    A: Operator | Tensor,
    num: int = 10,
    which: str = "largest",
    rtol: float = 1e-3,
    start: Tensor | str | None = None,
    max_products: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    *,
    keep: bool = True,
) -> tuple[Eigenpairs, Krylov]:
    """The `eigenpairs`, and the basis built for them, for whoever has more to ask of the same operator.

    Unless the basis is kept, its rows are given back once the pairs are made of it.
    """
    began = time.perf_counter()
    operator, wanted = as_operator(A), Wanted(num, which, rtol)
    check_count("num", num, largest=operator.shape[0])
    check_choice("which", which, ENDS)
    check_rtol(rtol)
    _check_basis(operator, rtol)
    if max_products is not None:
        check_count("max_products", max_products, smallest=num)
    budget, patient = max_products or enough_products(num), max_products is not None
    generator = seeded(seed)
    first, num_sample_products = _start_rows(operator, start, wanted, budget, generator)
    num_start = 1 if first is None else len(first)
    search = Search(operator, wanted, budget, generator, num_start=num_start, progress=progress, patient=patient)
    if first is not None:
        search.begin(first)
    del first  # as many vectors as there are pairs, unless they are the caller's
    outcome = search.run()
    ritz, chosen = search.extract()
    coordinates, told = ritz.coefficients[:, chosen], search.krylov.rows.told
    if search.krylov.rows.is_rounded:
        lost = search.lost(ritz, chosen) / ritz.values[chosen].abs()
        ritz, chosen, coordinates = _afresh(search.krylov, ritz, chosen)
        told = f"{told}, whose rounding leaves residuals/|λ| of up to {float(lost.max()):.1e}"
        met = bool((ritz.residual_norms[chosen] <= search.tolerances(ritz.values)[chosen]).all())
        outcome = "rounding" if outcome == "stagnation" or (outcome == "converged" and not met) else outcome
    vectors = _combined(search.krylov, coordinates)
    if not keep:
        search.krylov.rows.release()
    result = Eigenpairs(
        values=ritz.values[chosen],
        vectors=vectors,
        residual_norms=ritz.residual_norms[chosen],
        converged=outcome == "converged",
        num_products=search.krylov.num_products,
        which=which,
        rtol=rtol,
        separation=_separation(ritz, chosen, search.krylov.num_basis == operator.shape[0], search.limits),
        num_sample_products=num_sample_products,
        **origin(began, operator, seed=seed, basis=told),
    )
    if not result.converged:
        warnings.warn(_complaint(outcome, result, search.missed), ConvergenceWarning, stacklevel=3)
    return result, search.krylov


def unchallenged(operator: Operator, num: int, generator: torch.Generator) -> Krylov:
    """A basis of 2 K + 4 to 4 K + 20 products that has the K largest pairs to a residual of 2 %, for all it can tell.

    For whoever looks for missing pairs in another way.
    """
    search = Search(operator, Wanted(num, "largest", ROUGH), min(4 * num + 20, operator.shape[0]), generator)
    search.settle(2 * num + 4)
    return search.krylov


def _check_basis(operator: Operator, rtol: float) -> None:
    """Raise OptionError if the basis cannot be held as asked for, or not so exactly."""
    least = torch.finfo(stored_type(operator)).eps
    if operator.basis is not None and rtol < least:
        raise OptionError(
            f"rtol={rtol:g} is below {least:.1e}, which a basis in {str(operator.basis).removeprefix('torch.')} "
            "reaches. Raise rtol, or hold the basis exactly: basis = None on the operator, or on the problem before "
            "it is made."
        )


def _combined(krylov: Krylov, coordinates: Tensor) -> Tensor:
    """The vectors (P, k) with these coordinates in the basis, beside which they have to fit."""
    with krylov.operator.lends(max(0, -_room(krylov, coordinates.shape[1]))):
        return krylov.combine(coordinates)


def _room(krylov: Krylov, num: int) -> int:
    """Bytes of `A.memory` that the basis, as far as it is held, and so many vectors leave; negative beyond it."""
    operator = krylov.operator
    vectors = num * operator.shape[0] * krylov.rows.like.itemsize
    return operator.memory - krylov.rows.num_bytes(krylov.num_rows) - vectors


def _afresh(krylov: Krylov, ritz: Ritz, chosen: Tensor) -> tuple[Ritz, Tensor, Tensor]:
    """The pairs of a rounded basis, by descending value, from a product with each vector, made orthonormal before.

    With the coordinates of the vectors, of which as many are made and multiplied at once as there is room for, and
    otherwise one: that takes no more than a step of the search, beside the same graphs.
    """
    operator, coordinates = krylov.operator, _orthonormal(krylov, ritz.coefficients[:, chosen])
    values, residual_norms = ritz.values.clone(), ritz.residual_norms.clone()
    each = MEASURED * operator.shape[0] * krylov.rows.like.itemsize
    width = min(TOGETHER, max(1, _room(krylov, 0) // each))
    for which, some in zip(torch.split(chosen, width), torch.split(coordinates, width, dim=1), strict=True):
        vectors = krylov.combine(some)
        products = (operator @ vectors).detach().to(vectors).T
        values[which] = inner_products(products, vectors.T).diagonal()
        parallel = values[which, None].to(vectors) * vectors.T
        residual_norms[which] = norms_of(torch.sub(products, parallel, out=parallel)).cpu()
        del vectors, products, parallel
    krylov.num_products += len(chosen)
    order = values[chosen].argsort(descending=True)
    return Ritz(values, ritz.coefficients, residual_norms), chosen[order], coordinates[:, order]


def _orthonormal(krylov: Krylov, coordinates: Tensor) -> Tensor:
    """Coordinates (n, k) of orthonormal vectors near those with these: rows that are held rounded are not quite.

    Symmetrically, so that each changes least.
    """
    first, last = krylov.num_fixed, krylov.num_fixed + len(coordinates)
    gram = krylov.spread.sum(krylov.rows.gram(first, last))
    squares, turn = torch.linalg.eigh(coordinates.T @ gram @ coordinates)
    symmetric: Tensor = turn / squares.sqrt() @ turn.T
    return coordinates @ symmetric


def _separation(ritz: Ritz, chosen: Tensor, complete: bool, limits: dict[float, float]) -> Separation:
    """Distances of the chosen values from where other eigenvalues may lie: near their Ritz values, or unseen."""
    offsets = (ritz.values[chosen, None] - ritz.values).abs()  # (K, m)
    distances = (offsets - REACH * ritz.residual_norms).clamp_min(0)
    distances[torch.arange(len(chosen)), chosen] = torch.inf
    if limits and not complete:
        values = ritz.values[chosen]
        unseen = torch.maximum(values - limits.get(1.0, math.inf), limits.get(-1.0, -math.inf) - values)
        distances = torch.cat([distances, unseen.clamp_min(0)[:, None]], 1)
    gaps = distances.min(1).values
    distances[:, chosen] = torch.inf
    return Separation(gaps, float(distances.min()), float(ritz.values.abs().max()), complete)


def _complaint(outcome: str, result: Eigenpairs, missed: float) -> str:
    worst = f"worst residual |Av − λv|/|λ| = {result.worst:.1e}, rtol = {result.rtol:.1e}"
    if outcome == "challenge":
        return (
            f"eigenpairs: residuals are small ({worst}), but {result.num_products} products do not show that no pair "
            f"is missing, such as a copy of a multiple eigenvalue: the probability is up to {missed:.1g}. "
            f"Pass max_products above {result.num_products}, the more the smaller the gap after the wanted values."
        )
    if outcome == "rounding":
        return f"eigenpairs: {worst}: the rounding of its basis allows no less. Raise rtol, or set basis = None."
    if outcome == "stagnation":
        return f"eigenpairs: {worst}: the rounding of this dtype allows no less. Raise rtol or use float64."
    return (
        f"eigenpairs: not converged after max_products={result.num_products}: {worst}. "
        "Raise max_products, ask for fewer pairs, or raise rtol."
    )


# -- what a search starts from ----------------------------------------------------------------------------------


@runtime_checkable
class Named(Protocol):
    """An operator that knows good starting vectors, by name."""

    def start_block(self, kind: str) -> Tensor:
        """Those of this name (P, K)."""


@runtime_checkable
class Sampled(Protocol):
    """An operator made of examples, a few of which make one with nearly its eigenvectors."""

    def sample_size(self, error: float) -> int:
        """Examples for eigenvectors to about this error; 0: not known, or too many to pay."""

    def sampled(self, generator: torch.Generator, num_samples: int | None = None) -> Operator:
        """The same operator on a few examples."""


def _start_rows(
    operator: Operator, start: Tensor | str | None, wanted: Wanted, budget: int, generator: torch.Generator
) -> tuple[Tensor | None, int]:
    """The start as rows (k, P), None for a random vector, and the products with a sample that it took.

    Raises:
        OptionError, ShapeError, DataError: no start, or one that the operator does not know.
    """
    num_products = num_samples = 0
    largest = _most_rows(operator, wanted.num, budget)
    if start == "sampled" or (start is None and wanted.which == "largest" and wanted.num <= largest):
        num_samples = sample_size(operator, STEADY * wanted.rtol)
    if start == "sampled" or num_samples:
        few = sample_of(operator, generator, num_samples or None)
        search = Search(few, wanted, enough_products(wanted.num), generator)
        search.run()
        ritz, chosen = search.extract()
        start, num_products = _combined(search.krylov, ritz.coefficients[:, chosen]), search.krylov.num_products
    elif isinstance(start, str):
        start = None if start == "random" else named_start(operator, start)
    if start is None:
        return None, num_products
    rows = check_columns("start, unless it is None or a name,", start, operator.shape[0]).T
    if len(rows) > largest:
        raise OptionError(
            f"start has {len(rows)} vectors; at most {max(largest, 0)} fit P, max_products and A.memory."
        )
    return rows, num_products


def named_start(operator: Operator, name: str) -> Tensor:
    """Starting vectors (P, K) of this name; of a sum, those of its first term that is not an identity.

    Raises:
        OptionError: the operator knows none.
    """
    if isinstance(operator, Sum):
        operator = next((term for _, term in operator.terms if not isinstance(term, Identity)), operator)
    if not isinstance(operator, Named):
        raise OptionError(
            f"start={name!r}: {operator.name} has no class structure to start from. "
            "Pass start=None or a (P, K) tensor, or use an operator made from a Problem."
        )
    return operator.start_block(name)


def sample_size(operator: Operator, error: float) -> int:
    """Examples that a sample needs for eigenvectors to about this error; 0: not known, or too many to pay."""
    return operator.sample_size(error) if isinstance(operator, Sampled) else 0


def sample_of(operator: Operator, generator: torch.Generator, num_samples: int | None = None) -> Operator:
    """The operator on a few examples; of a sum, each term on its own.

    Raises:
        OptionError: it is not made of examples.
    """
    if isinstance(operator, Sum):
        return Sum([(scale, sample_of(term, generator, num_samples)) for scale, term in operator.terms])
    if isinstance(operator, Identity):
        return operator
    if not isinstance(operator, Sampled):
        raise OptionError(f"start='sampled': {operator.name} is not made of examples. Pass start=None.")
    return operator.sampled(generator, num_samples)


def enough_products(num: int) -> int:
    """After which a search gives up unless told otherwise."""
    return max(20 * num, 300)


def _most_rows(operator: Operator, num: int, budget: int) -> int:
    """Rows for which there is room, for their products, and for what a restart keeps."""
    size, room = operator.shape[0], rows_that_fit(operator) - SPARE_VECTORS
    return min(budget, size, size if room >= size else min(room // 2, room - num))

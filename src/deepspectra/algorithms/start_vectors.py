"""What a search starts from: a random vector, given ones, those that an operator knows, or the pairs of a sample."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from deepspectra.algorithms.eigenpair_search import SPARE_VECTORS, Search, Wanted
from deepspectra.algorithms.krylov_basis import basis_capacity
from deepspectra.argument_checks import check_columns
from deepspectra.errors import OptionError
from deepspectra.operators.base import Identity, Operator, Sum

STEADY = 1 / 6  # variation of a sample that a search starts from, relative to the residual asked for


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


def start_rows(
    operator: Operator, start: Tensor | str | None, wanted: Wanted, budget: int, generator: torch.Generator
) -> tuple[Tensor | None, int]:
    """The start as rows (k, P), None for a random vector, and the products with a sample that it took.

    Raises:
        OptionError, ShapeError, DataError: no start, or one that the operator does not know.
    """
    num_products = 0
    fits = wanted.which == "largest" and wanted.num <= _most_rows(operator, wanted.num, budget)
    num_samples = 0
    if start == "sampled" or (start is None and fits):
        num_samples = sample_size(operator, STEADY * wanted.rtol)
    if start == "sampled" or num_samples:
        few = sample_of(operator, generator, num_samples or None)
        search = Search(few, wanted, enough_products(wanted.num), generator)
        search.run(None)
        ritz, chosen = search.extract()
        start, num_products = search.krylov.combine(ritz.coefficients[:, chosen]), search.krylov.num_products
    elif isinstance(start, str):
        start = None if start == "random" else named_start(operator, start)
    return None if start is None else _checked(operator, start, wanted.num, budget), num_products


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


def _checked(operator: Operator, block: Tensor, num: int, budget: int) -> Tensor:
    """The start as rows (k, P)."""
    rows = check_columns("start, unless it is None or a name,", block, operator.shape[0]).T
    largest = _most_rows(operator, num, budget)
    if len(rows) > largest:
        raise OptionError(
            f"start has {len(rows)} vectors; at most {max(largest, 0)} fit P, max_products and A.memory."
        )
    return rows


def enough_products(num: int) -> int:
    """After which a search gives up unless told otherwise."""
    return max(20 * num, 300)


def _most_rows(operator: Operator, num: int, budget: int) -> int:
    """Rows for which there is room, for their products, and for what a restart keeps."""
    size, room = operator.shape[0], basis_capacity(operator) - SPARE_VECTORS
    return min(budget, size, size if room >= size else min(room // 2, room - num))

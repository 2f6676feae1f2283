"""G's blocks, one a layer, beside the Kronecker factors of their second moments."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from deepspectra.algorithms.eigenpairs import eigenpairs
from deepspectra.kfac.exact import ExactBlock
from deepspectra.kfac.kronecker import Kronecker, all_from
from deepspectra.problem.problem import Problem
from deepspectra.rows.captures import captures_of
from deepspectra.rows.held import gram_of

SMALL = 3000  # rows of the largest Gram matrix that gives eigenvectors at once
RTOL = 1e-2  # of eigenpairs found by products
REMEMBERED = 256  # leading eigenvectors of small matrices that stay with the problem


class Blocks:
    """Blocks of all layers that multiply features, and their Kronecker-factored approximations.

    Attributes:
        captures: features and errors, held if they fit.
        approximations: kind → all layers' approximations.
        factors: the first of them; by default KFAC's S and A.
        names: of the layers, from input to output.
    """

    def __init__(self, problem: Problem, kinds: Sequence[str] = ("kfac",), sharing: str = "expand") -> None:
        self.captures = captures_of(problem)
        self.captures.hold()
        self.approximations = all_from(self.captures, kinds, sharing)
        self.factors: Kronecker = self.approximations[kinds[0]]
        self.names = [name for name, place in self.factors.places.items() if place.is_matrix]
        self._spectra = problem.kept.setdefault("spectra of blocks", {})

    def __iter__(self) -> Iterator[tuple[str, ExactBlock]]:
        for _, batches in self.captures.by_layer():
            used = {use.slice for batch in batches for use in batch}
            for name in self.names:
                place = self.factors.places[name]
                if place.weight in used:
                    block = ExactBlock(place, batches, self.factors.dtype)
                    block.memory = self.captures.problem.memory // 4
                    block.kept = self._spectra.setdefault(name, {})
                    yield name, block

    def beside(self, other: Blocks) -> Iterator[tuple[str, ExactBlock, ExactBlock]]:
        """Layers that both have, and their blocks in both; the data of each are gone through once."""
        theirs: dict[str, ExactBlock] = {}
        rest = iter(other)
        for name, block in self:
            while name not in theirs and (following := next(rest, None)):
                theirs[following[0]] = following[1]
            if name in theirs:
                yield name, block, theirs.pop(name)


def dense_spectrum(exact: ExactBlock, num: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """All non-zero eigenvalues of a block, its K ≤ num largest and their eigenvectors (n, K); None if it is large.

    From the smaller side of its rows, of at most 3,000; that side's eigenvectors are remembered.
    """
    size, num_rows = exact.shape[0], exact.num_rows
    if min(size, num_rows) > SMALL:
        return None
    narrow = size <= num_rows
    if "values" not in exact.kept or exact.kept["vectors"].shape[1] < min(num, size, num_rows):
        values, vectors = torch.linalg.eigh(_moment(exact) if narrow else gram_of([exact.batches]))
        leading = vectors.flip(1)[:, : max(num, REMEMBERED)].clone()
        exact.kept |= {"values": values.flip(0), "vectors": leading}
    values, vectors = exact.kept["values"], exact.kept["vectors"]
    live = values > torch.finfo(exact.dtype).eps * len(values) * values[0]
    num = min(num, int(live.sum()))
    vectors = vectors[:, :num].to(exact.dtype)
    if not narrow:
        vectors = _combined(exact, vectors / values[:num].sqrt().to(exact.dtype))
    return values.clamp_min(0), values[:num], vectors


def _moment(exact: ExactBlock) -> Tensor:
    """(n, n) float64."""
    total = torch.zeros(exact.shape, dtype=torch.float64, device=exact.device)
    for rows in exact.gradients():
        total += rows.T @ rows
    return total


def _combined(exact: ExactBlock, mixing: Tensor) -> Tensor:
    """Aᵀ times mixing (R, K)."""
    space, start = torch.zeros(exact.shape[0], mixing.shape[1], dtype=exact.dtype, device=exact.device), 0
    for rows in exact.gradients():
        space += rows.T @ mixing[start : start + len(rows)]
        start += len(rows)
    return space


def top_pairs(exact: ExactBlock, num: int, seed: int) -> tuple[Tensor, Tensor]:
    """The largest eigenvalues (K,) of a block and their eigenvectors (n, K), K = num or its rank if that is less.

    Of at most 3,000 rows or parameters from the smaller side, of more by Lanczos.
    """
    found = dense_spectrum(exact, num)
    if found is not None:
        return found[1], found[2]
    pairs = eigenpairs(exact, min(num, exact.shape[0], exact.num_rows), rtol=RTOL, seed=seed)
    return pairs.values, pairs.vectors

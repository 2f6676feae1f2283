"""G's blocks, one a layer, beside the Kronecker factors of their second moments."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from deepspectra.algorithms.eigenpairs import eigenpairs
from deepspectra.kfac.exact_blocks import ExactBlock
from deepspectra.kfac.kronecker import all_from
from deepspectra.kfac.operators import Block, Kronecker, KroneckerSum, Rotated
from deepspectra.problem.memory_budget import refuse_beyond, share
from deepspectra.problem.problem import Problem, per_problem
from deepspectra.rows.captures import captures_of
from deepspectra.rows.held_rows import gram_of
from deepspectra.rows.parameter_uses import Matrix
from deepspectra.rows.spectrum import symmetric_pairs

SMALL = 3000  # rows of the largest Gram matrix that gives eigenvectors at once
RTOL = 1e-2  # of eigenpairs found by products
PAIRED_ROWS = 1024  # whose inner products with as many others are computed together
REMEMBERED = 256  # leading eigenvectors of small matrices that stay with the problem


class Blocks:
    """Blocks of all layers that multiply features, and their Kronecker-factored approximations; none that is zero.

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
        self._spectra = _spectra_of(problem)

    def __iter__(self) -> Iterator[tuple[str, ExactBlock]]:
        for _, batches in self.captures.by_layer():
            used = {use.slice for batch in batches for use in batch}
            for name in self.names:
                place = self.factors.places[name]
                if place.weight in used:
                    block = ExactBlock(place, batches, self.factors.dtype)
                    block.memory = share(self.captures.problem.memory, "basis")
                    block.remembered = self._spectra.setdefault(name, {})
                    if block.trace:
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


@per_problem
def _spectra_of(problem: Problem) -> dict[str, dict[str, Tensor]]:
    """Layer → what `dense_spectrum` remembers of its block."""
    return {}


def dense_spectrum(exact: ExactBlock, num: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """All non-zero eigenvalues of a block, its K ≤ num largest and their eigenvectors (n, K); None if it is large."""
    known = _small_spectrum(exact, num)
    if known is None:
        return None
    values, vectors = known
    live = values > torch.finfo(exact.dtype).eps * len(values) * values[0]
    num = min(num, int(live.sum()))
    vectors = vectors[:, :num].to(exact.dtype)
    if not _is_narrow(exact):
        mixing, start = vectors / values[:num].sqrt().to(exact.dtype), 0
        vectors = mixing.new_zeros(exact.shape[0], num)
        for rows in exact.gradients():
            vectors += rows.T @ mixing[start : start + len(rows)]
            start += len(rows)
    return values.clamp_min(0), values[:num], vectors


def _small_spectrum(exact: ExactBlock, num: int) -> tuple[Tensor, Tensor] | None:
    """Eigenvalues, descending, of the smaller side of a block's rows, and leading eigenvectors; None beyond 3,000.

    They are remembered.
    """
    size, num_rows = exact.shape[0], exact.num_rows
    if min(size, num_rows) > SMALL:
        return None
    if "values" not in exact.remembered or exact.remembered["vectors"].shape[1] < min(num, size, num_rows):
        matrix = _moment(exact) if _is_narrow(exact) else gram_of([exact.batches])
        values, vectors = symmetric_pairs(matrix)
        exact.remembered |= {"values": values, "vectors": vectors[:, : max(num, REMEMBERED)].clone()}
    return exact.remembered["values"], exact.remembered["vectors"]


def _is_narrow(exact: ExactBlock) -> bool:
    """Whether there are no more parameters than rows."""
    return exact.shape[0] <= exact.num_rows


def _moment(exact: ExactBlock) -> Tensor:
    """(n, n) float64."""
    return functools.reduce(torch.add, ((rows.T @ rows).double() for rows in exact.gradients()))


def top_pairs(exact: ExactBlock, num: int, seed: int) -> tuple[Tensor, Tensor]:
    """The largest eigenvalues (K,) of a block and their eigenvectors (n, K), K = num or its rank if that is less.

    Of at most 3,000 rows or parameters from the smaller side, of more by Lanczos.
    """
    found = dense_spectrum(exact, num)
    if found is not None:
        return found[1], found[2]
    pairs = eigenpairs(exact, min(num, exact.shape[0], exact.num_rows), rtol=RTOL, seed=seed)
    return pairs.values, pairs.vectors


def relative_error(exact: ExactBlock, norm: float, block: Block) -> float:
    """‖G − K‖_F / ‖G‖_F of one approximation of a block with this Frobenius norm."""
    return float(squared_distance(norm, block, inner_product(exact, block)) ** 0.5 / norm)


def squared_distance(norm: float, block: Block, product: float) -> float:
    """‖G − K‖²_F from ‖G‖_F, K and ⟨G, K⟩."""
    return max(0.0, norm**2 - 2 * product + block.norm**2)


def norm_of(exact: ExactBlock, memory: int) -> float:
    """‖G‖_F: of at most 3,000 rows or parameters from eigenvalues, of more from inner products of rows."""
    known = _small_spectrum(exact, 1)
    if known is not None:
        return float(known[0].clamp_min(0).norm())
    rows = exact.num_rows
    if exact.num_positions == exact.place.groups == 1 and issubclass(exact.place.kind, Matrix):
        return _paired_norm(exact)
    shared = f"{exact.shape[0]:,} parameters of shared weights in {exact.place.name}"
    what = f"inner products of {rows:,} rows, of {shared},"
    refuse_beyond(16 * rows**2, memory, f"{what} take", "Take fewer examples, or raise memory.")
    return float(gram_of([exact.batches]).norm())


def _paired_norm(exact: ExactBlock) -> float:
    """‖Σ M ⊗ hhᵀ‖_F from (Σ over scalars (eᵀe')²) (hᵀh')² of pairs of examples; a matrix used at one position."""
    some = []
    for found in exact.positions():
        scalars = found.errors.shape[1]
        for chosen in torch.split(torch.arange(len(found.errors)), max(1, PAIRED_ROWS // scalars)):
            features = exact.place.with_ones(found.features[chosen])
            some.append((features[:, 0, 0], found.errors[chosen, :, :, 0].flatten(0, 1)))
    total = 0.0
    for index, (features, errors) in enumerate(some):
        for other, (others, their_errors) in enumerate(some[: index + 1]):
            products = (errors @ their_errors.T).square_().view(len(features), -1, len(others), scalars)
            pairs = products.sum((1, 3)) * (features @ others.T).square_()
            total += (1 if other == index else 2) * float(pairs.double().sum())
    return float(total**0.5)


def inner_product(exact: ExactBlock, block: Block) -> float:
    """⟨G, K⟩."""
    if isinstance(block, Rotated):  # the projection of G on the diagonals in its basis
        return block.norm**2
    if block.right.ndim == 3:
        return _inner_of_rows(exact, block)
    return sum(exact.inner(left, right) for left, right in zip(block.left, block.right, strict=True))


def _inner_of_rows(exact: ExactBlock, block: KroneckerSum) -> float:
    """For rows of a table, of which A is diagonal."""
    total = 0.0
    for found in exact.positions(exact.num_positions**2):
        index, errors = found.features, found.errors
        same = index[:, :, None] == index[:, None]
        for left, right in zip(block.left[:, 0], block.right[:, 0], strict=True):
            alike = ((left @ errors).mT @ errors).sum(1)
            total += float((alike * same * right[index][:, None]).double().sum())
    return total

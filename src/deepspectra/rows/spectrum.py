"""The spectrum of a symmetric matrix and of its parts, in coordinates in which averages are small matrices.

A part of AᵀA is Φ Φᵀ in any orthonormal coordinates U, Φ = UᵀAᵀB. Three matrices are looked at in this way: Λ in G's
own eigenvectors (features and errors alike), the Hessian in the space of gradients, and either of them in a Krylov
basis that it leads beyond, which asks `left` alone. With A Aᵀ = V Λ Vᵀ, Φ = Λ^½ Vᵀ B: the matrix of the smaller side
will do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from deepspectra.errors import NonFiniteError, first_line
from deepspectra.rows.averages import Averages, taken

RANK_RTOL = 1e-6  # of the largest: a smaller singular value or eigenvalue is rounding


class Spectrum:
    """A symmetric matrix and the averages in it.

    Args:
        matrix: (R, R), or its eigenvalues (R,), descending, if the coordinates are those of its eigenvectors.
        averages: Φ (R, r) by name, each part being Φ Φᵀ; "within" is what they leave of the moment.
        moment: (R, R) what the parts sum to, if the matrix has a "residual" beyond.
        precision: relative rounding of the rows.
        vectors: V (N, R) of the Gram matrix of rows, if that was looked at.

    Attributes:
        values: eigenvalues, descending.
        tiny: what is zero of them up to rounding.
    """

    def __init__(
        self,
        matrix: Tensor,
        averages: Averages,
        *,
        moment: Tensor | None = None,
        precision: float = 0.0,
        vectors: Tensor | None = None,
    ) -> None:
        self.values = matrix if matrix.ndim == 1 else symmetric_values(matrix)
        self.averages = averages
        self.tiny = precision * len(self.values) * float(self.values[0])
        self.vectors = vectors
        self._matrix, self._moment = matrix, moment

    @classmethod
    def of_gram(cls, gram: Tensor, averages: Averages, most: int, precision: float) -> Spectrum:
        """From A Aᵀ (N, N) and averages of the rows, of which at most so many eigenvalues differ from zero."""
        values, vectors = symmetric_pairs(gram)
        num = min(len(values), most)
        values, vectors = values[:num].clamp_min(0), vectors[:, :num]
        root = values.sqrt()[:, None]
        seen = averages.map(lambda basis: root * (vectors.T @ basis.to(root)))
        return cls(values, seen, precision=precision, vectors=vectors)

    @classmethod
    def of_moment(cls, moment: Tensor, factors: Averages, precision: float) -> Spectrum:
        """From AᵀA (D, D) and AᵀB (D, r)."""
        values, vectors = symmetric_pairs(moment)
        seen = factors.map(lambda factor: vectors.T @ factor)
        return cls(values.clamp_min(0), seen, precision=precision)

    @classmethod
    def of_rows(cls, rows: Tensor, averages: Averages, precision: float) -> Spectrum:
        """From the rows A (N, D) themselves, by their smaller side."""
        if rows.shape[1] >= len(rows):
            return cls.of_gram((rows @ rows.T).double(), averages, rows.shape[1], precision)
        factors = averages.map(lambda basis: (rows.T @ basis.to(rows)).double())
        return cls.of_moment((rows.T @ rows).double(), factors, precision)

    def part(self, name: str) -> tuple[Tensor, Tensor]:
        """The non-zero eigenvalues of a part, descending, and its quadratic form with each eigenvector (R,).

        In coordinates of eigenvectors.
        """
        if name == "within":
            found, forms = self.without(("means",)), self.values - self.averages.every.square().sum(1)
        else:
            phi = self.averages[name]
            gram = phi.T @ phi if phi.shape[1] <= len(phi) else phi @ phi.T
            found, forms = symmetric_values(gram), phi.square().sum(1)
        return found[found > self.tiny], forms

    def without(self, removed: Sequence[str], method: str = "subtraction") -> Tensor:
        """All eigenvalues, descending, after parts are taken away.

        Args:
            removed: names of averages, "within", "residual", or a sum of parts; what goes with what, `taken` says.
            method: "subtraction", A − B, or "projection", (I − QQᵀ) A (I − QQᵀ) with Q a basis of B.
        """
        averages = self.averages
        parts = averages.parts if self._moment is None else (*averages.parts, "residual")
        gone = taken(removed, parts, first=averages.first, method=method)
        found = symmetric_values(left(self._beyond(gone), averages.together(gone), method)[1])
        return found if self._moment is not None else found.clamp_min(0)

    def _beyond(self, gone: Sequence[str]) -> Tensor:
        """The matrix without its residual, or without what averages leave of the moment."""
        matrix = torch.diag(self.values) if self._matrix.ndim == 1 else self._matrix
        moment = matrix if self._moment is None else self._moment
        rest = moment if "residual" in gone else matrix
        if "within" not in gone:
            return rest
        every = self.averages.every
        return torch.addmm(rest - moment, every, every.T)


def symmetric_pairs(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (R,) of a symmetric matrix, descending, and eigenvectors (R, R).

    Rows of zeros, such as those of tokens that are not counted, are eigenvectors as they are, and cost nothing.
    """
    live, dead = _rows_by_zero(matrix)
    with _named(live):
        found, inner = torch.linalg.eigh(matrix[live][:, live] if len(dead) else matrix)
    if not len(dead):
        return found.flip(0), inner.flip(1)
    values, order = torch.cat([found, found.new_zeros(len(dead))]).sort(descending=True, stable=True)
    place = order.argsort()  # of each eigenvector
    vectors = torch.zeros_like(matrix)
    vectors[live[:, None], place[: len(live)]] = inner
    vectors[dead, place[len(live) :]] = 1
    return values, vectors


def symmetric_values(matrix: Tensor) -> Tensor:
    """The eigenvalues alone."""
    live, dead = _rows_by_zero(matrix)
    with _named(live):
        found = torch.linalg.eigvalsh(matrix[live][:, live] if len(dead) else matrix)
    return torch.cat([found, found.new_zeros(len(dead))]).sort(descending=True).values


def _rows_by_zero(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Which rows of a symmetric matrix are not zero, and which are."""
    found = matrix.any(1)
    (live,), (dead,) = found.nonzero(as_tuple=True), (~found).nonzero(as_tuple=True)
    return live, dead


@contextlib.contextmanager
def _named(live: Tensor) -> Iterator[None]:
    """An eigenproblem that fails says of what."""
    try:
        yield
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise NonFiniteError(
            f"the eigenvalues of a matrix of {len(live):,} rows cannot be found ({first_line(error)}): gradients "
            "are NaN, infinite or too large or small to be squared. Check the weights, or take dtype=torch.float64."
        ) from error


def left(image: Tensor, phi: Tensor, method: str) -> tuple[Tensor | None, Tensor]:
    """What is left of a matrix without a part, on the first l of m orthonormal coordinates.

    Args:
        image: (m, l) what the matrix makes of those l.
        phi: (m, r), the part being Φ Φᵀ.
        method: "subtraction" or "projection".

    Returns:
        S (l, k), orthonormal, the directions that stay, None for all of the l; and (m, k) what the matrix without the
        part makes of them.
    """
    rows, columns = image.shape
    if method == "subtraction":
        return None, torch.addmm(image, phi, phi[:columns].T, alpha=-1)  # no product beside it: they are large
    q, stays = range_of(phi), None
    if rows == columns:
        # all of the space: no need for a basis of what is orthogonal to Q
        image = torch.addmm(image, image @ q, q.T, alpha=-1)
    else:
        # Q reaches beyond the l coordinates; what of them is orthogonal to it is where (I − QQᵀ) changes nothing
        stays = _null_space(q[:columns].T)
        image = image @ stays
    return stays, torch.addmm(image, q, q.T @ image, alpha=-1)


def range_of(columns: Tensor, rounding: float = RANK_RTOL) -> Tensor:
    """Orthonormal columns that span the given ones, up to rounding, relative to the largest singular value."""
    inner, singular, _ = torch.linalg.svd(columns, full_matrices=False)
    basis: Tensor = inner[:, significant(singular, rounding)]
    return basis


def _null_space(rows: Tensor) -> Tensor:
    """Orthonormal columns that these rows (r, m) map to zero."""
    _, singular, right = torch.linalg.svd(rows, full_matrices=True)
    basis: Tensor = right[int(significant(singular).sum()) :].T
    return basis


def significant(values: Tensor, rounding: float = RANK_RTOL) -> Tensor:
    """Which of some singular values, or eigenvalues, are more than rounding of the largest; none of none."""
    return values > rounding * values.max() if len(values) else values > 0

"""A Krylov basis with everything recorded: the one recurrence behind `eigenpairs` and `density`.

The basis keeps, for an orthonormal block Q of multiplied vectors and a block W of pending ones (orthonormal,
orthogonal to Q, not multiplied yet),

    A Q = [Q, W] H        with the whole of H, not its three diagonals.

H records every coefficient of the full reorthogonalisation, so the residual of a Ritz pair is measured, with
the rounding and any asymmetry of A in it, at no further product. Single-vector Lanczos is W of one column,
block Lanczos multiplies all of W at once, a breakdown is an empty W, a fresh start is one more column in it,
and a thick restart rotates Q. Vectors are stored as rows (`stored_rows.py`). Processes that share the work on A share
out the basis, too: each has its part of every row, and reorthogonalises that.

Rows may be held rounded, q + δ for q, and what is multiplied is what is held. The relation then lacks δ bᵀ, with b
the row of H that belongs to q, and ‖δ‖² b bᵀ joins the Gram matrix of what is lost: roundings of different rows are
of random directions. H itself is of the rows as they are, orthonormal to about ε/√P, which changes Ritz values in
second order. After a restart the relation lacks A δ, too, which only products tell: those that end `eigenpairs`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepspectra.algorithms.long_vectors import (
    Spread,
    gaussian_rows,
    rows_that_fit,
    small,
    unit_of,
)
from deepspectra.algorithms.stored_rows import ROWS_TOGETHER, StoredRows
from deepspectra.errors import NonFiniteError
from deepspectra.operators.base import Operator
from deepspectra.results import Eigenpairs

ROUNDING = 100  # in units of ε‖A‖: a remainder below this is taken for rounding


class Ritz(NamedTuple):
    """Rayleigh-Ritz on the basis: values (m,) ascending, coefficients (m, m), residual norms (m,)."""

    values: Tensor
    coefficients: Tensor
    residual_norms: Tensor


class Krylov:
    """The basis and its projected operator.

    Attributes:
        rows: (capacity, P), or this process's part of them.
        num_fixed: leading rows that are only orthogonalised against: A acts projected on their complement.
        num_basis: multiplied vectors, the columns of Q.
        num_pending: vectors waiting to be multiplied, the columns of W.
        num_products: products spent so far.
        projected: H (num_basis + num_pending, num_basis), float64 on the CPU.
        tracked: (num_basis + num_pending, k) coordinates of the vectors given to `track`, in the rows in use; emptied
            by a restart, which cannot represent them any more.
    """

    def __init__(self, operator: Operator, capacity: int) -> None:
        self.operator, self.spread = operator, Spread(operator)
        self.rows = StoredRows(operator, capacity)
        self.num_fixed = self.num_basis = self.num_pending = self.num_products = 0
        self.projected = torch.zeros(0, 0, dtype=torch.float64)
        self.tracked = torch.zeros(0, 0, dtype=torch.float64)
        self._lost = torch.zeros(0, 0, dtype=torch.float64)  # Gram matrix of what was dropped of A Q
        self._scale = 0.0  # largest ‖A q‖ seen: the yardstick of a breakdown
        self._unit = 1.0  # of `_lost`, whose squares could under- or overflow

    @property
    def num_rows(self) -> int:
        """Rows in use."""
        return self.num_fixed + self.num_basis + self.num_pending

    @property
    def num_free(self) -> int:
        """Rows not in use."""
        return len(self.rows) - self.num_rows

    @classmethod
    def of_pairs(cls, operator: Operator, pairs: Eigenpairs, capacity: int) -> Krylov:
        """The basis of known eigenvectors, with their residuals as what is not represented."""
        krylov = cls(operator, capacity)
        krylov.num_basis = len(pairs.values)
        krylov.projected = torch.diag(pairs.values.cpu().double())
        krylov.tracked = torch.zeros(krylov.num_basis, 0, dtype=torch.float64)
        krylov._unit = unit_of(float(pairs.values.abs().max()))
        krylov._lost = torch.diag((pairs.residual_norms.cpu().double() / krylov._unit).square())
        krylov._lose(krylov._put(0, krylov.spread.part(pairs.vectors.T)), krylov.projected)
        return krylov

    def state(self) -> dict[str, Tensor | int | float]:
        """All of it but the operator and the rows, to go on with elsewhere: the same on every process."""
        rest = {name: value for name, value in vars(self).items() if name not in ("operator", "rows", "spread")}
        return {"capacity": len(self.rows), "num_parts": self.spread.group.size, **rest}

    def part(self) -> Tensor:
        """This process's part of the rows in use, as they are held; shared, not copied, where one memory has all."""
        return self.rows.stored(self.num_rows)

    @classmethod
    def of_state(cls, operator: Operator, state: Mapping[str, Any], parts: Iterable[Tensor]) -> Krylov | None:
        """The basis that had this state, of whose processes each had one of these parts, in their order.

        Rows of another type are converted; what that rounds is counted.
        None if parts are missing or of another basis, or do not fit the memory of as few processes as there are now.
        """
        known = {name: value for name, value in state.items() if name not in ("capacity", "num_parts")}
        num_rows, room = sum(known[f"num_{kind}"] for kind in ("fixed", "basis", "pending")), rows_that_fit(operator)
        if operator.group.sums(num_rows > room)[0]:
            return None
        krylov = cls(operator, min(state["capacity"], room))
        for name, value in known.items():
            setattr(krylov, name, value)
        mine, start, whole = krylov.spread.mine, 0, True
        squares = torch.zeros(num_rows, dtype=torch.float64)
        for part in parts:
            shared = slice(max(mine.start, start), min(mine.stop, start + part.shape[1]))
            whole = whole and len(part) == num_rows
            if whole and shared.start < shared.stop:
                columns = slice(shared.start - mine.start, shared.stop - mine.start)
                for first in range(0, num_rows, ROWS_TOGETHER):
                    rows = part[first : first + ROWS_TOGETHER, shared.start - start : shared.stop - start]
                    rows = rows.to(krylov.rows.like)
                    squares[first : first + ROWS_TOGETHER] += krylov.rows.put(first, rows, columns)
            start += part.shape[1]
        whole = whole and start == operator.shape[0]
        if operator.group.sums(not whole)[0]:
            return None
        krylov._lose(krylov.spread.sum(squares)[krylov.num_fixed :], krylov.projected)
        return krylov

    def append(self, vectors: Tensor) -> Tensor:
        """Add what rows (k, P) have beyond the basis as r ≤ k pending vectors.

        Returns their coordinates (num_basis + num_pending, k) in the rows in use.
        """
        return self._append(self.spread.part(vectors).to(self.rows.like, copy=True))

    def append_random(self, generator: torch.Generator, count: int = 1) -> Tensor:
        """Add random pending vectors; their coordinates, as `append` gives them."""
        rows = gaussian_rows(count, self.operator.shape[0], generator, self.rows.like)
        return self._append(rows if self.spread.group.size == 1 else self.spread.part(rows).clone())

    def _append(self, block: Tensor) -> Tensor:
        """The same of this process's part of rows, which are overwritten."""
        # In units of the largest norm, whose square might overflow: ‖·‖_F of the block is the yardstick of rounding.
        norms = self.spread.norms(block)
        largest = max(norms.tolist(), default=0.0) or 1.0
        within, beyond, *_ = self._absorb(block, largest * float((norms / largest).norm()))
        self.projected, self.tracked = (_taller(part, len(beyond)) for part in (self.projected, self.tracked))
        return torch.cat([within[self.num_fixed :], beyond])

    def track(self, coordinates: Tensor) -> slice:
        """Keep coordinates (num_basis + num_pending, k) as the basis grows; their columns of `tracked`."""
        before = self.tracked.shape[1]
        self.tracked = torch.cat([self.tracked, coordinates], 1)
        return slice(before, self.tracked.shape[1])

    def turn(self, coefficients: Tensor) -> None:
        """Reflect the pending vectors so that the first is ± their combination with `coefficients` (w,)."""
        mirror = coefficients / coefficients.norm()
        mirror = mirror * (-1.0 if mirror[0] > 0 else 1.0)  # far from the first unit vector: no cancellation
        mirror[0] -= 1
        mirror /= mirror.norm()  # I − 2 m mᵀ exchanges the first unit vector and ±coefficients
        pending = self.rows[self.num_fixed + self.num_basis : self.num_rows]
        small = mirror.to(pending)
        pending.addr_(small, small @ pending, alpha=-2)
        for recorded in (self.projected, self.tracked):
            recorded[self.num_basis :] -= 2 * torch.outer(mirror, mirror @ recorded[self.num_basis :])
        if not self.rows.are_shared:
            squares = self._put(self.num_fixed + self.num_basis, pending)
            self._lose(squares, self.projected[self.num_basis :])

    def expand(self, count: int) -> None:
        """Multiply the first `count` pending vectors and keep what their products add as pending vectors."""
        first = self.num_fixed + self.num_basis
        block = self.spread.whole(self.rows[first : first + count]).T.contiguous()
        made = self.operator @ block
        del block  # which may be a copy of what is held
        products = self.spread.part(made.detach().T).to(self.rows.like, copy=True)
        del made
        self.num_products += count
        largest = float(self.spread.norms(products).max())
        if not largest < float("inf"):
            raise NonFiniteError(
                f"product {self.num_products} with {self.operator.name} is NaN or infinite. "
                "Check the weights and the data, or use a wider dtype."
            )
        if not self._scale:
            self._unit = unit_of(largest)
        self._scale = max(self._scale, largest)
        within, beyond, dropped, squares = self._absorb(products, self._scale)
        left, self.tracked = (_taller(part, len(beyond)) for part in (self.projected, self.tracked))
        self.projected = torch.cat([left, torch.cat([within[self.num_fixed :], beyond])], dim=1)
        self.num_basis += count
        self.num_pending -= count
        # Only the Gram matrix of what is dropped is kept: products with what was dropped before are not known.
        gram = (dropped / self._unit).T @ (dropped / self._unit)
        self._lost = torch.nn.functional.pad(self._lost, (0, count, 0, count))
        self._lost[-count:, -count:] = gram
        self._lose(squares, self.projected[len(self.projected) - len(squares) :])

    def _absorb(self, block: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Split rows (k, P) as withinᵀ·(rows in use) + beyondᵀ·(new pending rows) + droppedᵀ·(rounding).

        They are overwritten. The last of what is returned are squared norms of the rounding with which the new rows
        are held.
        """
        unit = unit_of(scale)
        if unit != 1:
            block *= unit**-0.5  # in two steps, for the whole of it may be more than float32 has
            block *= unit**-0.5
            scale /= unit
        within = self.spread.sum(self.rows.inner(self.num_rows, block))
        self.rows.subtract(within, block)
        new, beyond = self.spread.orthonormal(block)
        # Directions at the level of rounding are none: an invariant subspace ends here. No more than fit R^P.
        keep = beyond.norm(dim=1) > ROUNDING * torch.finfo(block.dtype).eps * scale
        keep[self.operator.shape[0] - self.num_rows :] = False
        new, beyond, dropped = new if bool(keep.all()) else new[keep.to(new.device)], beyond[keep], beyond[~keep]
        # Twice is enough, and the second pass acts on unit rows, so that small remainders are orthogonal too.
        again = self.spread.sum(self.rows.inner(self.num_rows, new))
        self.rows.subtract(again, new)
        new, turn = self.spread.orthonormal(new)
        squares = self._put(self.num_rows, new)
        self.num_pending += len(new)
        return unit * (small(within) + small(again) @ beyond), unit * (turn @ beyond), unit * dropped, squares

    def _put(self, first: int, rows: Tensor) -> Tensor:
        """Keep this process's part of rows (k, P); squared norms (k,) of the rounding of all of each."""
        squares = self.rows.put(first, rows)
        return self.spread.sum(squares) if self.rows.is_rounded else squares

    def _lose(self, squares: Tensor, coefficients: Tensor) -> None:
        """Count the rounding of rows, by squared norms (k,), as lost from products that have these (k, m) of them."""
        if self.rows.is_rounded:
            coefficients = coefficients / self._unit
            self._lost += coefficients.T @ (squares[:, None] * coefficients)

    def ritz(self) -> Ritz:
        """Ritz values, coefficients and residuals: ‖A y − θ y‖² = ‖(H_top − θ)s‖² + ‖H_bottom s‖²."""
        projected = self.projected / self._unit
        top, bottom = projected[: self.num_basis], projected[self.num_basis :]
        values, s = torch.linalg.eigh((top + top.T) / 2)
        lost = (s * (self._lost @ s)).sum(0)
        squares = (top @ s - s * values).square().sum(0) + (bottom @ s).square().sum(0) + lost
        return Ritz(values * self._unit, s, squares.clamp_min(0).sqrt() * self._unit)

    def lost_squares(self, coefficients: Tensor) -> Tensor:
        """Squared norms (k,) of what A Q s has that the rows in use do not represent, for s (m, k)."""
        return (coefficients * (self._lost @ coefficients)).sum(0) * self._unit**2

    def combine(self, coordinates: Tensor) -> Tensor:
        """The vectors (P, k) with these coordinates (n, k) in the first n of the rows after the fixed ones."""
        return self.spread.whole(self.rows.combine(self.num_fixed, coordinates)).T

    def whole_rows(self, first: int, last: int) -> Iterator[Tensor]:
        """The basis vectors of these numbers as rows (k, P), a few at a time where they are spread."""
        first, last = self.num_fixed + first, self.num_fixed + last
        step = last - first if self.spread.group.size == 1 and self.rows.are_shared else ROWS_TOGETHER
        for start in range(first, last, max(1, step)):
            yield self.spread.whole(self.rows[start : min(start + step, last)])

    def contract(self, coefficients: Tensor, pending: Tensor | None = None) -> None:
        """Thick restart: replace Q by Q s for orthonormal columns s (m, k).

        Pending vectors stay, or become W t for orthonormal columns t (w, l); what that drops counts in residuals.
        """
        s, m, k = coefficients, self.num_basis, coefficients.shape[1]
        top, bottom = self.projected[:m], self.projected[m:]
        t = torch.eye(len(bottom), dtype=torch.float64) if pending is None else pending
        squares = self.rows.rotate(self.num_fixed, self.num_rows, s.T, None if pending is None else t.T)
        image = s.T @ top @ s
        beyond = t.T @ bottom @ s
        # The first is zero for a symmetric A in exact arithmetic.
        dropped = torch.cat([top @ s - s @ image, bottom @ s - t @ beyond]) / self._unit
        self._lost = s.T @ self._lost @ s + dropped.T @ dropped
        self.projected = torch.cat([image, beyond])
        self._lose(self.spread.sum(squares) if self.rows.is_rounded else squares, self.projected)
        self.num_basis, self.num_pending = k, t.shape[1]
        self.tracked = torch.zeros(k + self.num_pending, 0, dtype=torch.float64)

    def enlarge(self, capacity: int) -> None:
        """Room for so many rows; the old ones are in memory, too, while those in use are copied."""
        rows = StoredRows(self.operator, capacity)
        rows.copy(self.rows, self.num_rows)
        self.rows = rows

    def fix(self) -> None:
        """Make every row in use a fixed one."""
        self.num_fixed = self.num_rows
        self.num_basis = self.num_pending = 0
        self.projected = self._lost = self.tracked = torch.zeros(0, 0, dtype=torch.float64)


def _taller(coordinates: Tensor, count: int) -> Tensor:
    """Coordinates with zeros for new rows."""
    return torch.nn.functional.pad(coordinates, (0, 0, 0, count))

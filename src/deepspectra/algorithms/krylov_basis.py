"""A Krylov basis with everything recorded: the one recurrence behind `eigenpairs` and `density`.

The basis keeps, for an orthonormal block Q of multiplied vectors and a block W of pending ones (orthonormal,
orthogonal to Q, not multiplied yet),

    A Q = [Q, W] H        with the whole of H, not its three diagonals.

H records every coefficient of the full reorthogonalisation, so the residual of a Ritz pair is measured, with
the rounding and any asymmetry of A in it, at no further product. Single-vector Lanczos is W of one column,
block Lanczos multiplies all of W at once, a breakdown is an empty W, a fresh start is one more column in it,
and a thick restart rotates Q. Vectors are stored as rows: each is contiguous, and memory not reached is not
touched. Processes that share the work on A share out the basis, too: each has its part of every row, and
reorthogonalises that.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepspectra.algorithms.long_vectors import (
    COLUMNS_PER_CHUNK,
    Spread,
    gaussian_rows,
    rows_that_fit,
    small,
    unit_of,
    vector_dtype,
)
from deepspectra.errors import NonFiniteError
from deepspectra.operators.base import Operator
from deepspectra.results import Eigenpairs

ROWS_TOGETHER = 8  # of a spread basis that are whole on every process at once
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
        width = self.spread.mine.stop - self.spread.mine.start
        self.rows = torch.empty(capacity, width, dtype=vector_dtype(operator), device=operator.device)
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
        krylov.rows[: krylov.num_basis] = krylov.spread.part(pairs.vectors.T)
        krylov.projected = torch.diag(pairs.values.cpu().double())
        krylov.tracked = torch.zeros(krylov.num_basis, 0, dtype=torch.float64)
        krylov._unit = unit_of(float(pairs.values.abs().max()))
        krylov._lost = torch.diag((pairs.residual_norms.cpu().double() / krylov._unit).square())
        return krylov

    def state(self) -> dict[str, Tensor | int | float]:
        """All of it but the operator and the rows, to go on with elsewhere: the same on every process."""
        rest = {name: value for name, value in vars(self).items() if name not in ("operator", "rows", "spread")}
        return {"capacity": len(self.rows), "num_parts": self.spread.group.size, **rest}

    def part(self) -> Tensor:
        """This process's part of the rows in use; shared, not copied."""
        return self.rows[: self.num_rows]

    @classmethod
    def of_state(cls, operator: Operator, state: Mapping[str, Any], parts: Iterable[Tensor]) -> Krylov | None:
        """The basis that had this state, of whose processes each had one of these parts, in their order.

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
        for part in parts:
            shared = slice(max(mine.start, start), min(mine.stop, start + part.shape[1]))
            whole = whole and len(part) == num_rows
            if whole and shared.start < shared.stop:
                krylov.rows[:num_rows, shared.start - mine.start : shared.stop - mine.start] = part[
                    :, shared.start - start : shared.stop - start
                ]
            start += part.shape[1]
        whole = whole and start == operator.shape[0]
        return None if operator.group.sums(not whole)[0] else krylov

    def append(self, vectors: Tensor) -> Tensor:
        """Add what rows (k, P) have beyond the basis as r ≤ k pending vectors.

        Returns their coordinates (num_basis + num_pending, k) in the rows in use.
        """
        block = self.spread.part(vectors).to(self.rows, copy=True)
        # In units of the largest norm, whose square might overflow: ‖·‖_F of the block is the yardstick of rounding.
        norms = self.spread.norms(block)
        largest = max(norms.tolist(), default=0.0) or 1.0
        within, beyond, _ = self._absorb(block, largest * float((norms / largest).norm()))
        self.projected, self.tracked = (_taller(part, len(beyond)) for part in (self.projected, self.tracked))
        return torch.cat([within[self.num_fixed :], beyond])

    def track(self, coordinates: Tensor) -> slice:
        """Keep coordinates (num_basis + num_pending, k) as the basis grows; their columns of `tracked`."""
        before = self.tracked.shape[1]
        self.tracked = torch.cat([self.tracked, coordinates], 1)
        return slice(before, self.tracked.shape[1])

    def append_random(self, generator: torch.Generator) -> Tensor:
        """Add one random pending vector; its coordinates, as `append` gives them."""
        return self.append(gaussian_rows(1, self.operator.shape[0], generator))

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

    def expand(self, count: int) -> None:
        """Multiply the first `count` pending vectors and keep what their products add as pending vectors."""
        first = self.num_fixed + self.num_basis
        block = self.spread.whole(self.rows[first : first + count]).T.contiguous()
        products = self.spread.part((self.operator @ block).detach().T).to(self.rows, copy=True)
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
        within, beyond, dropped = self._absorb(products, self._scale)
        left, self.tracked = (_taller(part, len(beyond)) for part in (self.projected, self.tracked))
        self.projected = torch.cat([left, torch.cat([within[self.num_fixed :], beyond])], dim=1)
        self.num_basis += count
        self.num_pending -= count
        # Only the Gram matrix of what is dropped is kept: products with what was dropped before are not known.
        gram = (dropped / self._unit).T @ (dropped / self._unit)
        self._lost = torch.nn.functional.pad(self._lost, (0, count, 0, count))
        self._lost[-count:, -count:] = gram

    def _absorb(self, block: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        """Split rows (k, P) as withinᵀ·(rows in use) + beyondᵀ·(new pending rows) + droppedᵀ·(rounding)."""
        unit = unit_of(scale)
        if unit != 1:
            block *= unit**-0.5  # in two steps, for the whole of it may be more than float32 has
            block *= unit**-0.5
            scale /= unit
        used = self.rows[: self.num_rows]
        within = self.spread.sum(used @ block.T)
        block.addmm_(within.T, used, alpha=-1)
        new, beyond = self.spread.orthonormal(block)
        # Directions at the level of rounding are none: an invariant subspace ends here. No more than fit R^P.
        keep = beyond.norm(dim=1) > ROUNDING * torch.finfo(block.dtype).eps * scale
        keep[self.operator.shape[0] - self.num_rows :] = False
        new, beyond, dropped = new[keep.to(new.device)], beyond[keep], beyond[~keep]
        # Twice is enough, and the second pass acts on unit rows, so that small remainders are orthogonal too.
        again = self.spread.sum(used @ new.T)
        new.addmm_(again.T, used, alpha=-1)
        new, turn = self.spread.orthonormal(new)
        self.rows[self.num_rows : self.num_rows + len(new)] = new
        self.num_pending += len(new)
        return unit * (small(within) + small(again) @ beyond), unit * (turn @ beyond), unit * dropped

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
        rows = self.rows[self.num_fixed : self.num_fixed + len(coordinates)]
        return self.spread.whole((rows.T @ coordinates.to(rows)).T).T

    def whole_rows(self, first: int, last: int) -> Iterator[Tensor]:
        """The basis vectors of these numbers as rows (k, P), a few at a time where they are spread."""
        rows = self.rows[self.num_fixed + first : self.num_fixed + last]
        step = len(rows) if self.spread.group.size == 1 else ROWS_TOGETHER
        for part in torch.split(rows, max(1, step)):
            yield self.spread.whole(part)

    def contract(self, coefficients: Tensor, pending: Tensor | None = None) -> None:
        """Thick restart: replace Q by Q s for orthonormal columns s (m, k).

        Pending vectors stay, or become W t for orthonormal columns t (w, l); what that drops counts in residuals.
        """
        s, m, k = coefficients, self.num_basis, coefficients.shape[1]
        top, bottom = self.projected[:m], self.projected[m:]
        t = torch.eye(len(bottom), dtype=torch.float64) if pending is None else pending
        kept = self.rows[self.num_fixed : self.num_rows]
        small, small_pending = s.T.to(self.rows), t.T.to(self.rows)
        for columns in torch.split(kept, COLUMNS_PER_CHUNK, dim=1):  # in place: no second basis fits the memory
            turned = columns[m:].clone() if pending is None else small_pending @ columns[m:]
            columns[:k] = small @ columns[:m]
            columns[k : k + len(turned)] = turned
        image = s.T @ top @ s
        beyond = t.T @ bottom @ s
        # The first is zero for a symmetric A in exact arithmetic.
        dropped = torch.cat([top @ s - s @ image, bottom @ s - t @ beyond]) / self._unit
        self._lost = s.T @ self._lost @ s + dropped.T @ dropped
        self.projected = torch.cat([image, beyond])
        self.num_basis, self.num_pending = k, t.shape[1]
        self.tracked = torch.zeros(k + self.num_pending, 0, dtype=torch.float64)

    def enlarge(self, capacity: int) -> None:
        """Room for so many rows; the old ones are in memory, too, while those in use are copied."""
        rows = self.rows.new_empty(capacity, self.rows.shape[1])
        rows[: self.num_rows] = self.rows[: self.num_rows]
        self.rows = rows

    def fix(self) -> None:
        """Make every row in use a fixed one."""
        self.num_fixed = self.num_rows
        self.num_basis = self.num_pending = 0
        self.projected = self._lost = self.tracked = torch.zeros(0, 0, dtype=torch.float64)


def _taller(coordinates: Tensor, count: int) -> Tensor:
    """Coordinates with zeros for new rows."""
    return torch.nn.functional.pad(coordinates, (0, 0, 0, count))

"""Knock-outs of means from the top of a spectrum, in one subspace that grows until they are settled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from deepspectra.algorithms.krylov_basis import Krylov
from deepspectra.operators.parts import Decomposition, Means
from deepspectra.results import Eigenpairs
from deepspectra.rows.averages import METHODS, taken
from deepspectra.rows.projections import TWO_WAY, collinear
from deepspectra.rows.spectrum import left

EDGE_RTOL = 1e-2  # at 5e-2 1 run in 226 settled on the second eigenvalue; half a product more
NEWEST = 3  # directions of residuals, or vectors beside the pairs, that a restart keeps
STILL = 2  # products over which the edge must not move
KNOCKOUT_RTOL = 0.05  # residual, relative to the value, at which a knock-out's eigenvalue is settled


@dataclass(frozen=True)
class Knockout:
    """The top of the spectrum after parts are taken away.

    Attributes:
        removed: what is taken away, by name; () for nothing, ("means",) for every mean.
        method: "subtraction", A − B, or "projection", (I − QQᵀ) A (I − QQᵀ) with Q a basis of B.
        values: eigenvalues of what is left, descending; lower bounds, by Rayleigh-Ritz.
        residual_norms: an eigenvalue lies within so much of each value.
        threshold: eigenvalues above it count as outliers.
        parts: all that is gone then: with class also true, whose means are collinear with the class means.
    """

    removed: tuple[str, ...]
    method: str
    values: Tensor
    residual_norms: Tensor
    threshold: float
    parts: tuple[str, ...] = ()

    @property
    def num_outliers(self) -> int:
        """How many values are above the threshold."""
        return int((self.values > self.threshold).sum())

    @property
    def num_outliers_at_most(self) -> int:
        """How many values reach it when their residual norm is added."""
        return int((self.values + self.residual_norms > self.threshold).sum())

    @property
    def name(self) -> str:
        """For tables: "class + logit"."""
        return " + ".join(self.removed) or "nothing"


class KnockoutSpace:
    """A growing subspace Q of R^P with A Q, in which the operator is asked what it is without some means.

    Everything asked is answered by small matrices: with rows E = [Q, W] of the Krylov basis, A Q = E T, and the
    factors of class, logit and true means, appended to W, are E Φ. Rayleigh-Ritz values are lower bounds and
    residual norms are measured; Q grows along the residuals of what is not settled yet.

    Args:
        krylov: the basis to begin with.
        num: Ritz vectors that a restart keeps at least.
        report: called with the basis' number of products after each.
    """

    def __init__(self, krylov: Krylov, num: int, report: Callable[[int], object]) -> None:
        self.krylov, self.num, self.report = krylov, num, report
        self.columns: dict[str, slice] = {}

    def make_room(self, rows: int, wanted: Tensor | None = None) -> Tensor | None:
        """Restart if so many rows are not free, with the largest Ritz vectors and the wanted (m, k).

        Returns the new basis in the old (m, l), if there is one.
        """
        krylov = self.krylov
        if krylov.num_free >= min(rows, krylov.operator.shape[0] - krylov.num_rows):
            return None
        newest = min(NEWEST, krylov.num_pending)
        ritz = krylov.ritz().coefficients.flip(1)
        wanted = ritz[:, :0] if wanted is None else wanted
        keep = max(self.num, len(krylov.rows) - krylov.num_fixed - rows - newest)
        kept: Tensor = torch.linalg.qr(torch.cat([wanted, ritz[:, : keep - wanted.shape[1]]], 1))[0]
        residuals = torch.linalg.svd(krylov.projected[krylov.num_basis :] @ kept)[0]
        krylov.contract(kept, residuals[:, :newest])
        return kept

    def include(self, factors: dict[str, Tensor]) -> None:
        """Append the ranges of the factors, named for `left`."""
        for name, factor in factors.items():  # one by one: each takes as much again while it is added
            self.columns[name] = self.krylov.track(self.krylov.append(factor.T))

    def include_true(self, parts: Decomposition) -> None:
        """The true means, collinear with the class means if class took what it shares with logit."""
        projections = parts.projections
        if projections.first == "logit":
            self.include({"true": parts.factor("true")})
            return
        present = projections.class_weights > 0
        scale = collinear(projections.cell_weights)[1] * projections.class_weights.sqrt()
        classes = self.krylov.tracked[:, self.columns["class"]]
        self.columns["true"] = self.krylov.track(classes * scale[present].cpu())

    def left(self, gone: tuple[str, ...], method: str, num: int) -> tuple[Tensor, Tensor, Tensor]:
        """Without these parts: the largest Ritz values, their residual norms and directions in W."""
        size = self.krylov.num_basis
        factor = torch.cat([self.krylov.tracked[:, self.columns[name]] for name in gone], 1)
        stays, image = left(self.krylov.projected, factor, method)  # of Q under A, in coordinates of E
        projected = image[:size] if stays is None else stays.T @ image[:size]
        values, s = torch.linalg.eigh((projected + projected.T) / 2)
        values, s = values.flip(0)[:num], s.flip(1)[:, :num]
        vectors = s if stays is None else stays @ s  # in Q
        residuals = image @ s
        residuals[:size] -= vectors * values
        squares = residuals.square().sum(0) + self.krylov.lost_squares(vectors)
        return values, squares.clamp_min(0).sqrt(), residuals[size:]

    def grow(self, directions: Tensor) -> None:
        """One product, along the leading one of directions in W (columns)."""
        self.krylov.turn(torch.linalg.svd(directions)[0][:, 0])
        self.krylov.expand(1)
        self.report(self.krylov.num_products)

    def bulk_edge(self, means: Means, most: int) -> tuple[Tensor, Tensor]:
        """The largest eigenvalue of A − M Mᵀ, for all the means M (P, C²), and its residual norm."""
        krylov = self.krylov
        overlaps = torch.zeros(0, means.num, dtype=torch.float64)
        before: list[float] = []
        while True:
            fresh = krylov.whole_rows(len(overlaps), krylov.num_basis)
            overlaps = torch.cat([overlaps, *(means.coordinates(rows.T).T.cpu().double() for rows in fresh)])
            top = krylov.projected[: krylov.num_basis] - overlaps @ overlaps.T
            values, largest = torch.linalg.eigh((top + top.T) / 2)
            value, s = values[-1], largest[:, -1:]
            coordinates = krylov.projected @ s
            coordinates[: krylov.num_basis] -= s * value
            vector = krylov.combine(coordinates) - means.combine(overlaps.T @ s)
            residual = (vector.norm().cpu().double() ** 2 + krylov.lost_squares(s)).sqrt()
            before.append(float(value))
            still = EDGE_RTOL**2 * abs(before[-1])
            settled = len(before) > STILL and before[-1] - before[-1 - STILL] <= still
            if (settled and residual <= EDGE_RTOL * value.abs()) or len(before) > most:
                return value[None], residual
            if krylov.num_free < 2:
                kept = self.make_room(len(krylov.rows) // 4, largest[:, -NEWEST:])
                overlaps = overlaps if kept is None else kept.T @ overlaps
            direction = krylov.append(vector.T)[krylov.num_basis :]
            if not bool(direction.any()):  # nothing is left but rounding, or the basis spans R^P
                return value[None], residual
            self.grow(direction)


def knockouts(
    space: KnockoutSpace, parts: Decomposition, pairs: Eigenpairs, threshold: float, most: int
) -> list[Knockout]:
    """Every knock-out of class, logit and both, in one subspace that grows until all are settled.

    A Ritz value is settled when its residual is small, or keeps it below the threshold; the largest always matters.
    """
    space.include({name: parts.factor(name) for name in ("class", "logit")})
    space.include_true(parts)
    first = parts.projections.first
    cases = [
        (removed, method, taken(removed, TWO_WAY, first=first, method=method))
        for removed in (("class",), ("logit",), ("class", "logit"))
        for method in METHODS
    ]
    for step in range(most + 1):
        found = [space.left(gone, method, len(pairs.values)) for _, method, gone in cases]
        unsettled = []
        for values, norms, directions in found:
            matters = (values + 2 * norms > threshold) | (torch.arange(len(values)) == 0)
            unsettled.append(directions[:, matters & (norms > KNOCKOUT_RTOL * values.abs())])
        if step == most or not sum(directions.numel() for directions in unsettled):
            break
        space.grow(torch.cat(unsettled, 1))
    return [
        Knockout(removed, method, values, norms, threshold, gone)
        for (removed, method, gone), (values, norms, _) in zip(cases, found, strict=True)
    ]

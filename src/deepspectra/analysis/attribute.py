"""Which part of the curvature makes which eigenvalue: shares, knock-outs and verdicts."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from deepspectra.algorithms.eigenpairs import explore
from deepspectra.algorithms.krylov import Krylov, basis_capacity
from deepspectra.analysis.gram_spectrum import MARGIN
from deepspectra.arguments import seeded
from deepspectra.errors import MemoryBudgetError, OptionError, ShapeError
from deepspectra.operators.base import Operator
from deepspectra.operators.parts import Decomposition, Means, Part
from deepspectra.results import Eigenpairs, Provenance
from deepspectra.rows.projections import METHODS, TWO_WAY, positive, taken
from deepspectra.rows.spectrum import range_of, significant

EDGE_RTOL = 5e-2  # its eigenvalue is then right to about its square
EDGE_PRODUCTS = 30  # at most, from a basis that knows the operator
NEWEST = 3  # directions of residuals, or vectors beside the pairs, that a restart keeps
STILL = 2  # products over which the edge must not move
KNOCKOUT_RTOL = 0.05  # residual, relative to the value, at which a knock-out's eigenvalue is settled
MOSTLY = 0.75  # a knock-out that removes this share of the outliers explains most of them
ROWS_BYTES = 2**28  # of N × C × K float64 that are projected at a time
Progress = Callable[[int, int | None], object]


@dataclass(frozen=True)
class Knockout:
    """The top of the spectrum after parts are taken away.

    Attributes:
        removed: what is taken away, by name; () for nothing, ("means",) for every mean.
        method: "subtraction", A − B, or "projection", (I − QQᵀ) A (I − QQᵀ) with Q a basis of B.
        values: eigenvalues of what is left, descending; lower bounds, by Rayleigh-Ritz.
        residual_norms: an eigenvalue lies within so much of each value.
        num_outliers: values above the threshold.
        num_outliers_at_most: values that reach it when their residual norm is added.
        parts: all that is gone then: with class also true, whose means are collinear with the class means.
    """

    removed: tuple[str, ...]
    method: str
    values: Tensor
    residual_norms: Tensor
    num_outliers: int
    num_outliers_at_most: int
    parts: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """For tables: "class + logit"."""
        return " + ".join(self.removed) or "nothing"


@dataclass(frozen=True)
class Attribution:
    """Shares of the outliers over the parts, and what knocking parts out leaves.

    Attributes:
        values: (K,) top eigenvalues, descending.
        residual_norms: (K,) ‖A u − λ u‖ of them.
        part_names: the parts and, last, "residual".
        pair_shares: (K, parts) u_jᵀ B u_j / λ_j; each row sums to 1.
        bulk_edge: the largest eigenvalue of A without any mean: within-class scatter and residual alone.
        threshold: eigenvalues above it count as outliers: `margin` times the bulk's edge.
        num_outliers: how many of `values` do.
        complete: the last of `values` is below the threshold, so none is missed.
        knockouts: what is left after parts are taken away.
        num_products: products spent here, beyond the given pairs.
        seconds: wall-clock time spent.
        provenance: where it came from.

    Source: shares and counts are this library's; the two knock-outs are Papyan's (JMLR 21:252, definitions
    3.1–3.3), who judges by eye.
    """

    values: Tensor
    residual_norms: Tensor
    part_names: tuple[str, ...]
    pair_shares: Tensor
    bulk_edge: float
    threshold: float
    margin: float
    num_outliers: int
    complete: bool
    knockouts: tuple[Knockout, ...]
    num_products: int
    seconds: float
    provenance: Provenance

    @property
    def shares(self) -> Tensor:
        """(outliers, parts): the rows of `pair_shares` that belong to outliers."""
        return self.pair_shares[: self.num_outliers]

    @property
    def mean_shares(self) -> dict[str, float]:
        """The average share of each part over the outliers; NaN without outliers."""
        means = self.shares.mean(0) if self.num_outliers else torch.full((len(self.part_names),), torch.nan)
        return dict(zip(self.part_names, means.tolist(), strict=True))

    def knockout(self, *removed: str, method: str = "subtraction") -> Knockout:
        """The knock-out of these parts by this method; "class" and "class", "true" name the same one.

        Raises:
            OptionError: it was not made.
        """
        for knockout in self.knockouts:
            if set(removed) in (set(knockout.removed), set(knockout.parts)) and knockout.method == method:
                return knockout
        known = sorted({knockout.name for knockout in self.knockouts})
        raise OptionError(f"no knock-out of {removed} by {method}; there are {', '.join(known)}.")

    @property
    def verdicts(self) -> tuple[str, ...]:
        """One sentence a finding, thresholds stated."""
        return _verdicts(self)

    def __str__(self) -> str:
        head = f"{'':>3} {'λ':>11} " + " ".join(f"{name:>11}" for name in self.part_names)
        rows = [head]
        for j in range(self.num_outliers):
            shares = " ".join(f"{share:>11.1%}" for share in self.pair_shares[j].tolist())
            rows.append(f"{j + 1:>3} {float(self.values[j]):>11.4g} {shares}")
        return "\n".join([*rows, *self.verdicts])


def attribute(
    operator: Operator,
    parts: Mapping[str, Part],
    *,
    pairs: Eigenpairs | None = None,
    basis: Krylov | None = None,
    shares: Tensor | None = None,
    margin: float = MARGIN,
    rtol: float = 1e-2,
    max_products: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Attribution:
    """Attribute the outliers of the Hessian or of G to the parts of G.

    The share of part B in eigenpair (λ_j, u_j) is u_jᵀ B u_j / λ_j; over all parts and the residual the shares
    of a pair sum to 1. The bulk's edge is the largest eigenvalue of the operator without any class or
    cross-class mean, what scatter within classes and residual can make by themselves; an eigenvalue is an
    outlier when it exceeds `margin` times that.

    Edge and knock-outs are evaluated together in one subspace, the Krylov basis that found the pairs. It grows
    along the residuals of whatever is not settled yet, which lie in the span of the class and logit means, so
    that 2C−1 products at most give the eigenvalues of every A − B and of every projection, with measured
    residuals. Class takes true with it, whose means are collinear with the class means (with first="logit" when
    logit goes too); `gram_spectrum` and `regions` mean the same.

    Args:
        operator: the Hessian or Gauss-Newton matrix of a problem.
        parts: of `decompose(problem)`, with either kind of effects.
        pairs: its top eigenpairs; by default the largest C + 3 are computed.
        basis: the Krylov basis that `explore` found them with; it goes on growing here, beyond its capacity if the
            knock-outs need that. Without it the subspace starts from the pairs and a random vector.
        shares: of `pair_shares(parts, pairs)`, if they are known.
        margin: see above.
        rtol: of the eigenpairs computed here.
        max_products: to spend on knock-outs; 2C−1 unless given.
        seed: of random starts.
        progress: called with (products so far, None).

    Raises:
        ShapeError: operator and parts belong to problems of different sizes.
        OptionError: parts not made by `decompose` or of another problem, or a margin below 1.
        MemoryBudgetError: memory has no room for the pairs, the class and logit means and one product.

    Cost: the edge, about 5 products, and the knock-outs, 2C−1 at most, but no more of them than memory has room for;
    shares, one forward product a pair; the C² means, about 2C/3 gradients, if they fit in memory, else as much for
    the logit means and a forward product for each vector of the basis.
    """
    began = time.perf_counter()
    if not isinstance(parts, Decomposition):
        raise OptionError("parts must come from decompose(problem).")
    if operator.shape[0] != parts.problem.num_parameters:
        raise ShapeError(
            f"the operator has {operator.shape[0]:,} rows and the parts {parts.problem.num_parameters:,}; both "
            "must come from one problem."
        )
    parts.check_operator(operator)
    if margin < 1:
        raise OptionError(f"margin={margin}: it is at least 1.")
    products = _Counter(progress)
    size = operator.shape[0]
    most = 2 * parts.projections.num_classes - 1 if max_products is None else max_products
    if pairs is None:
        num = min(parts.projections.num_classes + 3, size)
        pairs, basis = explore(
            operator, num, rtol=rtol, start="random", seed=seed, progress=products.within()
        )
    had_means = parts.has_means
    factors = (2 if parts.projections.first == "class" else 3) * parts.projections.num_classes
    num = len(pairs.values)
    least = num + NEWEST + factors
    capacity = _capacity(operator, parts, least, most)
    most = min(most, capacity - least) if capacity < size else most
    borrowed = parts.num_bytes(max(0, capacity - basis_capacity(operator)))
    with parts.rows.products.allowance.lent(borrowed):
        try:
            if basis is None:
                basis = Krylov.of_pairs(operator, pairs, capacity)
                basis.append_random(seeded(seed))
                basis.expand(1)
                products.add(1)
            elif len(basis.rows) < capacity:
                basis.enlarge(capacity)
            space = _Space(basis, num, products)
            edge_values, edge_norms = space.bulk_edge(Means(parts), EDGE_PRODUCTS)
            edge = float(edge_values[0])
            threshold = margin * edge
            space.make_room(factors + most)
            knockouts = [
                _knockout((), "subtraction", pairs.values, pairs.residual_norms, threshold, ()),
                *_knockouts(space, parts, pairs, threshold, most),
                _knockout(
                    ("means",),
                    "subtraction",
                    edge_values,
                    edge_norms,
                    threshold,
                    taken(("means",), tuple(parts)),
                ),
            ]
        finally:
            if not had_means:
                parts.forget_means()
    shares = pair_shares(parts, pairs) if shares is None else shares
    return Attribution(
        values=pairs.values,
        residual_norms=pairs.residual_norms,
        part_names=(*parts, "residual"),
        pair_shares=shares,
        bulk_edge=edge,
        threshold=threshold,
        margin=margin,
        num_outliers=int((pairs.values > threshold).sum()),
        complete=bool(pairs.values[-1] <= threshold),
        knockouts=tuple(knockouts),
        num_products=products.total,
        seconds=time.perf_counter() - began,
        provenance=Provenance.of(operator, seed),
    )


def _capacity(operator: Operator, parts: Decomposition, least: int, most: int) -> int:
    """Rows of the basis: the least and up to so many products beyond, as memory has room; graphs lend theirs.

    Raises:
        MemoryBudgetError: there is no room for one product.
    """
    size, own, lender = operator.shape[0], basis_capacity(operator), parts.rows.products.allowance
    wanted = min(size, least + most)
    room = own + (lender.size - lender.reserved) // parts.num_bytes(1)
    if room < min(size, least + min(most, 1)):
        raise MemoryBudgetError(
            f"the knock-outs take at least {least + 1:,} vectors of {size:,} parameters, "
            f"{parts.num_bytes(least + 1) / 2**30:.1f} GiB, and there is room for {room:,}. Raise memory, put "
            "classes into groups, or restrict the parameters."
        )
    return min(wanted, room)


class _Counter:
    """Adds up the products of several computations for one progress report."""

    def __init__(self, progress: Progress | None) -> None:
        self.total = 0
        self._progress = progress

    def within(self) -> Progress:
        before = self.total

        def report(done: int, _expected: int | None) -> None:
            self.total = before + done
            if self._progress is not None:
                self._progress(self.total, None)

        return report

    def add(self, num_products: int) -> None:
        """Products made outside an algorithm that reports its own."""
        self.within()(num_products, None)


def pair_shares(parts: Decomposition, pairs: Eigenpairs) -> Tensor:
    """u_jᵀ B u_j / λ_j for each pair, over the parts and the residual: (K, parts + 1), rows sum to 1."""
    norms = squared_norms(parts, pairs.vectors)
    values = pairs.values.to(norms)
    shares = (norms / values).T
    return torch.cat([shares, 1 - shares.sum(1, keepdim=True)], 1).cpu()


def squared_norms(parts: Decomposition, block: Tensor) -> Tensor:
    """|Π_part A v|² for each part and column of a block (P, K), a few columns at a time: (parts, K)."""
    width = max(1, ROWS_BYTES // (8 * parts.rows.weights.numel()))
    return torch.cat(
        [
            parts.projections.squared_norms(parts.rows.apply(columns), tuple(parts))
            for columns in torch.split(block, width, 1)
        ],
        1,
    )


class _Space:
    """A growing subspace Q of R^P with A Q, in which the operator is asked what it is without some means.

    Everything asked is answered by small matrices: with rows E = [Q, W] of the Krylov basis, A Q = E T, and the
    factors of class, logit and true means, appended to W, are E Φ. Rayleigh-Ritz values are lower bounds and
    residual norms are measured; Q grows along the residuals of what is not settled yet.
    """

    def __init__(self, krylov: Krylov, num: int, products: _Counter) -> None:
        self.krylov, self.num, self.products = krylov, num, products
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
            before = self.krylov.tracked.shape[1]
            self.krylov.append(factor.T, track=True)
            self.columns[name] = slice(before, before + factor.shape[1])

    def include_true(self, parts: Decomposition) -> None:
        """The true means, collinear with the class means if class took what it shares with logit."""
        projections = parts.projections
        if projections.first == "logit":
            self.include({"true": parts.factor("true")})
            return
        present = projections.class_weights > 0
        ratio = (projections.class_weights / positive(projections.cell_weights.diagonal()))[present]
        tracked = self.krylov.tracked
        before = tracked.shape[1]
        added = tracked[:, self.columns["class"]] * ratio.sqrt().cpu()
        self.krylov.tracked = torch.cat([tracked, added], 1)
        self.columns["true"] = slice(before, before + added.shape[1])

    def left(self, gone: tuple[str, ...], method: str, num: int) -> tuple[Tensor, Tensor, Tensor]:
        """Without these parts: the largest Ritz values, their residual norms and directions in W."""
        size = self.krylov.num_basis
        image = self.krylov.projected  # of Q under A, in coordinates of E
        start = torch.eye(len(image), size, dtype=image.dtype)
        factor = torch.cat([self.krylov.tracked[:, self.columns[name]] for name in gone], 1)
        if method == "subtraction":
            image = image - factor @ factor[:size].T
        else:
            removed = range_of(factor)
            start = start @ _null_space(removed[:size].T)
            image = image @ start[:size]
            image = image - removed @ (removed.T @ image)
        projected = start.T @ image
        values, s = torch.linalg.eigh((projected + projected.T) / 2)
        values, s = values.flip(0)[:num], s.flip(1)[:, :num]
        residuals = image @ s - start @ (s * values)
        squares = residuals.square().sum(0) + self.krylov.lost_squares((start @ s)[:size])
        return values, squares.clamp_min(0).sqrt(), residuals[size:]

    def grow(self, directions: Tensor) -> None:
        """One product, along the leading one of directions in W (columns)."""
        self.krylov.turn(torch.linalg.svd(directions)[0][:, 0])
        self.krylov.expand(1)
        self.products.add(1)

    def bulk_edge(self, means: Means, most: int) -> tuple[Tensor, Tensor]:
        """The largest eigenvalue of A − M Mᵀ, for all the means M (P, C²), and its residual norm."""
        krylov = self.krylov
        overlaps = torch.zeros(0, means.num, dtype=torch.float64)
        before: list[float] = []
        while True:
            fresh = krylov.rows[krylov.num_fixed + len(overlaps) : krylov.num_fixed + krylov.num_basis]
            overlaps = torch.cat([overlaps, means.coordinates(fresh.T).T.cpu().double()])
            top = krylov.projected[: krylov.num_basis] - overlaps @ overlaps.T
            values, largest = torch.linalg.eigh((top + top.T) / 2)
            value, s = values[-1], largest[:, -1:]
            coordinates = krylov.projected @ s
            coordinates[: krylov.num_basis] -= s * value
            vector = krylov.combine(coordinates) - means.combine(overlaps.T @ s)
            residual = (vector.norm().cpu().double() ** 2 + krylov.lost_squares(s)).sqrt()
            before.append(float(value))
            settled = len(before) > STILL and before[-1] - before[-1 - STILL] <= EDGE_RTOL**2 * abs(
                before[-1]
            )
            if (settled and residual <= EDGE_RTOL * value.abs()) or len(before) > most:
                return value[None], residual
            if krylov.num_free < 2:
                kept = self.make_room(len(krylov.rows) // 4, largest[:, -NEWEST:])
                overlaps = overlaps if kept is None else kept.T @ overlaps
            direction = krylov.append(vector.T)[krylov.num_basis :]
            if not bool(direction.any()):  # nothing is left but rounding, or the basis spans R^P
                return value[None], residual
            self.grow(direction)


def _matters(values: Tensor, norms: Tensor, threshold: float) -> Tensor:
    """Which of the descending values may be outliers, and the first."""
    return (values + 2 * norms > threshold) | (torch.arange(len(values)) == 0)


def _null_space(rows: Tensor) -> Tensor:
    """Orthonormal columns that these rows (r, m) map to zero."""
    _, singular, right = torch.linalg.svd(rows, full_matrices=True)
    kept: Tensor = right[int(significant(singular).sum()) :].T
    return kept


def _knockouts(
    space: _Space, parts: Decomposition, pairs: Eigenpairs, threshold: float, most: int
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
        unsettled = [
            directions[:, (norms > KNOCKOUT_RTOL * values.abs()) & _matters(values, norms, threshold)]
            for values, norms, directions in found
        ]
        if step == most or not sum(directions.numel() for directions in unsettled):
            break
        space.grow(torch.cat(unsettled, 1))
    return [
        _knockout(removed, method, values, norms, threshold, gone)
        for (removed, method, gone), (values, norms, _) in zip(cases, found, strict=True)
    ]


def _knockout(
    removed: tuple[str, ...],
    method: str,
    values: Tensor,
    residuals: Tensor,
    threshold: float,
    gone: tuple[str, ...],
) -> Knockout:
    values, residuals = values.cpu(), residuals.cpu().double()
    return Knockout(
        removed=removed,
        method=method,
        values=values,
        residual_norms=residuals,
        num_outliers=int((values > threshold).sum()),
        num_outliers_at_most=int((values + residuals > threshold).sum()),
        parts=gone,
    )


def _verdicts(result: Attribution) -> tuple[str, ...]:
    count = result.num_outliers
    rule = f"above {result.threshold:.3g}, {result.margin:g} times the bulk's edge {result.bulk_edge:.3g}"
    if not count:
        return (f"No outlier: no eigenvalue lies {rule}.",)
    means = result.mean_shares
    shares = ", ".join(f"{_percent(share)} {name}" for name, share in means.items())
    return (
        f"{'' if result.complete else 'At least '}{count} outlier{'s' if count > 1 else ''} ({rule}): on average "
        f"{shares}.",
        f"Knocking out the class means {_leaves(result, 'class')}, class and logit means "
        f"{_leaves(result, 'class', 'logit')}.",
        _judgement(result),
    )


def _percent(share: float) -> str:
    return f"{round(100 * share) + 0:d}%"


def _judgement(result: Attribution) -> str:
    """Which means explain the outliers: the fewest whose removal leaves none, or few; and what is of no means."""
    count = result.num_outliers
    residual, within = (_percent(result.mean_shares[name]) for name in ("residual", "within"))
    for most, adverb in ((0.0, ""), (1 - MOSTLY, " for the most part")):
        for removed in (("class",), ("class", "logit")):
            left = result.knockout(*removed)
            if left.num_outliers <= most * count:
                gone, sure = count - left.num_outliers, max(0, count - left.num_outliers_at_most)
                number = f"{gone} of {count}" + (f", or {sure} within the error" if sure < gone else "")
                means = " and ".join(removed)
                return (
                    f"So by knock-out the outliers are attributable{adverb} to the {means} means (then below the "
                    f"threshold: {number}); by share {residual} of them is residual and {within} within, which no "
                    "means make."
                )
    return f"So neither explains the outliers: more than {1 - MOSTLY:.0%} of them stay."


def _leaves(result: Attribution, *removed: str) -> str:
    found = result.knockout(*removed)
    projected = result.knockout(*removed, method="projection").num_outliers
    number = str(found.num_outliers or "none")
    if found.num_outliers_at_most > found.num_outliers:
        number += f" (at most {found.num_outliers_at_most} within the error)"
    return f"leaves {number} (largest {float(found.values[0]):.3g}; by projection {projected or 'none'})"

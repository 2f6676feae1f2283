"""Which part of the curvature makes which eigenvalue: shares, knock-outs and verdicts."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from deepspectra.algorithms.eigenpairs import eigenpairs
from deepspectra.errors import OptionError, ShapeError
from deepspectra.operators.base import Operator
from deepspectra.operators.parts import Decomposition, Means, Part
from deepspectra.results import Eigenpairs, Provenance

MARGIN = 1.25  # an outlier is at least so many times the bulk's edge
EDGE_RTOL = 5e-2  # its eigenvalue is then right to about its square
MOSTLY = 0.75  # a knock-out that removes this share of the outliers explains most of them
ROWS_BYTES = 2**28  # of N × C × K float64 that are projected at a time
Progress = Callable[[int, int | None], object]


@dataclass(frozen=True)
class Knockout:
    """The top of the spectrum after parts are taken away.

    Attributes:
        removed: names of the parts; () for nothing, ("means",) for every mean.
        method: "subtraction", A − B, or "projection", (I − QQᵀ) A (I − QQᵀ) with Q a basis of B.
        values: eigenvalues of what is left, descending; lower bounds, by Rayleigh-Ritz.
        residual_norms: an eigenvalue lies within so much of each value.
        num_outliers: values above the threshold.
        num_outliers_at_most: values that reach it when their residual norm is added.
    """

    removed: tuple[str, ...]
    method: str
    values: Tensor
    residual_norms: Tensor
    num_outliers: int
    num_outliers_at_most: int

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
        """The knock-out of these parts by this method."""
        for knockout in self.knockouts:
            if set(knockout.removed) == set(removed) and knockout.method == method:
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
    margin: float = MARGIN,
    rtol: float = 1e-2,
    seed: int = 0,
    progress: Progress | None = None,
) -> Attribution:
    """Attribute the outliers of the Hessian or of G to the parts of G.

    The share of part B in eigenpair (λ_j, u_j) is u_jᵀ B u_j / λ_j; over all parts and the residual the shares
    of a pair sum to 1. The bulk's edge is the largest eigenvalue of the operator without any class or
    cross-class mean, what scatter within classes and residual can make by themselves; an eigenvalue is an
    outlier when it exceeds `margin` times that.

    Knock-outs are evaluated together in one subspace, spanned by the pairs and by the class and logit
    factors: products with the 2C−1 factors give the eigenvalues of every A − B and of every projection there,
    with measured residuals. Class goes with true, whose means are collinear with the class means.

    Args:
        operator: the Hessian or Gauss-Newton matrix of a problem.
        parts: of `decompose(problem)`, with either kind of effects.
        pairs: its top eigenpairs; by default the largest C + 3 are computed.
        margin: see above.
        rtol: of the eigenpairs computed here.
        seed: of random starts.
        progress: called with (products so far, None).

    Raises:
        ShapeError: operator and parts belong to different problems.
        OptionError: parts not made by `decompose`, or a margin below 1.

    Cost: the edge, about 15 products; knock-outs, 2C−1 products and about 2C/3 gradients; shares, one forward
    product a pair; the C² means if they fit in memory, else a G-like product with each product of the edge.
    """
    began = time.perf_counter()
    if not isinstance(parts, Decomposition):
        raise OptionError("parts must come from decompose(problem).")
    if operator.shape[0] != parts.problem.num_parameters:
        raise ShapeError(
            f"the operator has {operator.shape[0]:,} rows and the parts {parts.problem.num_parameters:,}; both "
            "must come from one problem."
        )
    if margin < 1:
        raise OptionError(f"margin={margin}: it is at least 1.")
    products = _Counter(progress)
    if pairs is None:
        num = min(parts.projections.num_classes + 3, operator.shape[0])
        pairs = eigenpairs(operator, num=num, rtol=rtol, seed=seed, progress=products.within())
    try:
        edge_pairs = eigenpairs(
            operator - Means(parts), num=1, rtol=EDGE_RTOL, seed=seed + 1, progress=products.within()
        )
    finally:
        parts.forget_means()
    edge = float(edge_pairs.values[0])
    threshold = margin * edge
    shares = pair_shares(parts, pairs)
    knockouts = [
        _knockout((), "subtraction", pairs.values, pairs.residual_norms, threshold),
        *_knockouts(operator, parts, pairs, threshold, products),
        _knockout(("means",), "subtraction", edge_pairs.values, edge_pairs.residual_norms, threshold),
    ]
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


def _knockouts(
    operator: Operator, parts: Decomposition, pairs: Eigenpairs, threshold: float, products: _Counter
) -> list[Knockout]:
    """Every knock-out of class, logit and both, by Rayleigh-Ritz in span(U, F_class, F_logit).

    The subspace holds the eigenvectors of A, which A maps to themselves up to their residuals, and the range
    of every B; only the factors need products. What is left out is A's bulk, below the last pair.
    """
    means = _logit_factors(parts)
    directions = _beyond(pairs.vectors, torch.cat([means["class"], means["logit"]], 1))
    basis, triangle = torch.linalg.qr(torch.cat([pairs.vectors, directions], 1))
    images = torch.cat([pairs.vectors * pairs.values.to(basis), operator @ directions], 1)
    products.add(directions.shape[1])
    images = torch.linalg.solve_triangular(triangle, images, upper=True, left=False)
    uncertain = torch.zeros(basis.shape[1], dtype=torch.float64)
    uncertain[: len(pairs.values)] = pairs.residual_norms.cpu()
    space = _Space(basis, images, uncertain)
    found = []
    for removed in (("class",), ("logit",), ("class", "logit")):
        taken = torch.cat([means[name] for name in removed], 1)
        whole = torch.cat([taken, means["true"]], 1) if "class" in removed else taken
        for method, pair in (("subtraction", space.without(whole)), ("projection", space.beside(taken))):
            values, residuals = (part[: len(pairs.values)] for part in pair)
            found.append(_knockout(removed, method, values, residuals, threshold))
    return found


def _beyond(vectors: Tensor, factor: Tensor) -> Tensor:
    """Orthonormal directions that the columns of a factor add to orthonormal vectors."""
    basis, triangle = torch.linalg.qr(factor - vectors @ (vectors.T @ factor))
    inner, singular, _ = torch.linalg.svd(triangle)
    kept = singular > 100 * torch.finfo(factor.dtype).eps * float(factor.norm(dim=0).max())
    directions: Tensor = basis @ inner[:, kept]
    return directions


def _logit_factors(parts: Decomposition) -> dict[str, Tensor]:
    """Factors of class, logit and true, whichever way the parts were split."""
    rows, projections = parts.rows, parts.projections
    held = {name: parts.factor(name) for name in ("class", "true")}
    held["logit"] = (
        parts.factor("logit") if "logit" in parts else rows.factor(projections, projections.basis("logit"))
    )
    return held


class _Space:
    """An orthonormal basis S (P, m) with A S, for eigenvalues of changes of A."""

    def __init__(self, basis: Tensor, images: Tensor, uncertain: Tensor) -> None:
        self.basis, self.images, self.uncertain = basis, images, uncertain

    def without(self, factor: Tensor) -> tuple[Tensor, Tensor]:
        """Ritz values and residual norms of A − F Fᵀ."""
        images = self.images - factor @ (factor.T @ self.basis)
        return self._ritz(self.basis, images, torch.eye(self.basis.shape[1], dtype=torch.float64))

    def beside(self, factor: Tensor) -> tuple[Tensor, Tensor]:
        """Ritz values and residual norms of (I − QQᵀ) A (I − QQᵀ), Q spanning F."""
        inner, singular, _ = torch.linalg.svd((self.basis.T @ factor).double(), full_matrices=True)
        rank = int((singular > 1e-6 * singular.max()).sum()) if len(singular) else 0
        kept = inner[:, rank:]  # the part of the subspace orthogonal to F
        removed = self.basis @ inner[:, :rank].to(self.basis)
        images = self.images @ kept.to(self.basis)
        images = images - removed @ (removed.T @ images)
        return self._ritz(self.basis @ kept.to(self.basis), images, kept.cpu())

    def _ritz(self, basis: Tensor, images: Tensor, coordinates: Tensor) -> tuple[Tensor, Tensor]:
        projected = (basis.T @ images).double()
        values, vectors = torch.linalg.eigh((projected + projected.T) / 2)
        values, vectors = values.flip(0), vectors.flip(1)
        left = images @ vectors.to(images) - basis @ (vectors * values).to(basis)
        slack = (coordinates @ vectors.cpu()).abs().T @ self.uncertain  # of the products not made
        return values, left.double().norm(dim=0) + slack.to(values)


def _knockout(
    removed: tuple[str, ...], method: str, values: Tensor, residuals: Tensor, threshold: float
) -> Knockout:
    values, residuals = values.cpu(), residuals.cpu().double()
    return Knockout(
        removed=removed,
        method=method,
        values=values,
        residual_norms=residuals,
        num_outliers=int((values > threshold).sum()),
        num_outliers_at_most=int((values + residuals > threshold).sum()),
    )


def _verdicts(result: Attribution) -> tuple[str, ...]:
    count = result.num_outliers
    rule = f"above {result.threshold:.3g}, {result.margin:g} times the bulk's edge {result.bulk_edge:.3g}"
    if not count:
        return (f"No outlier: no eigenvalue lies {rule}.",)
    means = result.mean_shares
    shares = ", ".join(f"{_percent(share)} {name}" for name, share in means.items())
    left = {name: result.knockout(*name.split(" + ")) for name in ("class", "class + logit")}
    return (
        f"{'' if result.complete else 'At least '}{count} outlier{'s' if count > 1 else ''} ({rule}): on average "
        f"{shares}.",
        f"Knocking out the class means {_leaves(result, 'class')}, class and logit means "
        f"{_leaves(result, 'class', 'logit')}.",
        _judgement(left, count),
    )


def _percent(share: float) -> str:
    return f"{round(100 * share) + 0:d}%"


def _judgement(left: dict[str, Knockout], count: int) -> str:
    """Which means explain the outliers: the fewest whose removal leaves none, or few."""
    for most, adverb in ((0.0, ""), (1 - MOSTLY, " for the most part")):
        for name, knockout in left.items():
            if knockout.num_outliers <= most * count:
                means = name.replace(" + ", " and ")
                rule = f" (at least {MOSTLY:.0%} of them gone)" if adverb else " (all of them gone)"
                return f"So the outliers are attributable{adverb} to the {means} means{rule}."
    return f"So neither explains the outliers: more than {1 - MOSTLY:.0%} of them stay."


def _leaves(result: Attribution, *removed: str) -> str:
    found = result.knockout(*removed)
    projected = result.knockout(*removed, method="projection").num_outliers
    number = str(found.num_outliers or "none")
    if found.num_outliers_at_most > found.num_outliers:
        number += f" (at most {found.num_outliers_at_most} within the error)"
    return f"leaves {number} (largest {float(found.values[0]):.3g}; by projection {projected or 'none'})"

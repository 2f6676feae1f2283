"""Which part of the curvature makes which eigenvalue: shares, knock-outs and verdicts."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deepspectra.algorithms.density import refuse_others
from deepspectra.algorithms.eigenpairs import explore
from deepspectra.algorithms.krylov_basis import Krylov
from deepspectra.algorithms.long_vectors import rows_that_fit
from deepspectra.algorithms.probes import InUnits, stream
from deepspectra.analysis.gram_spectrum import MARGIN
from deepspectra.analysis.knockouts import NEWEST, Knockout, KnockoutSpace, knockouts
from deepspectra.argument_checks import Progress, check_margin
from deepspectra.dataframes import text_table
from deepspectra.errors import MemoryBudgetError, OptionError, ShapeError
from deepspectra.operators.base import Operator
from deepspectra.operators.parts import Decomposition, Means
from deepspectra.problem.memory_budget import in_units
from deepspectra.results import Eigenpairs, Result, origin
from deepspectra.rows.averages import taken

EDGE_PRODUCTS = 30  # at most, from a basis that knows the operator
MOSTLY = 0.75  # a knock-out that removes this share of the outliers explains most of them
MINOR = 0.5  # the share of what no means make, beyond which the outliers are not called attributable to means


@dataclass(frozen=True, repr=False)
class Attribution(Result):
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
        count = self.num_outliers
        rule = f"above {self.threshold:.3g}, {self.margin:g} times the bulk's edge {self.bulk_edge:.3g}"
        if not count:
            seen = "eigenvalue lies" if self.complete else "pair that was found, not all that there are, lies"
            return (f"No outlier{'' if self.complete else ' is known'}: no {seen} {rule}.",)
        shares = ", ".join(f"{_percent(share)} {name}" for name, share in self.mean_shares.items())
        return (
            f"{'' if self.complete else 'At least '}{count} outlier{'s' if count > 1 else ''} ({rule}): on average "
            f"{shares}.",
            f"Knocking out the class means {_leaves(self, 'class')}, class and logit means "
            f"{_leaves(self, 'class', 'logit')}.",
            _judgement(self),
        )

    def __str__(self) -> str:
        outliers = enumerate(zip(self.values.tolist(), self.shares.tolist(), strict=False), 1)
        rows = [(str(j), f"{value:.4g}", *(f"{s:.1%}" for s in shares)) for j, (value, shares) in outliers]
        return text_table(("", "λ", *self.part_names), rows, *self.verdicts)


def attribute(
    operator: Operator,
    parts: Decomposition,
    *,
    pairs: Eigenpairs | None = None,
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
        pairs: its top eigenpairs; by default the largest C + 3 are computed. Of pairs that have not converged
            outliers are counted, too, but none is known to be missing.
        margin: see above.
        rtol: of the eigenpairs computed here.
        max_products: to spend on knock-outs; 2C−1 unless given.
        seed: of random starts.
        progress: called with (products so far, None).

    Raises:
        ShapeError: operator, parts or pairs belong to problems of different sizes.
        DataError: the pairs are those of another operator.
        OptionError: parts not made by `decompose` or of another problem, pairs of another end, or a margin below 1.
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
    check_margin(margin)
    spent, basis = 0, None

    def report(done: int, _: int | None) -> None:
        if progress is not None:
            progress(spent + done, None)

    if pairs is None:
        num = min(parts.projections.num_classes + 3, operator.shape[0])
        pairs, basis = explore(operator, num, rtol=rtol, start="random", seed=seed, progress=report)
        spent = pairs.num_products
    else:
        _check_pairs(operator, pairs, seed)
        spent = 1
    found = attribute_known(
        operator,
        parts,
        pairs,
        basis,
        margin=margin,
        max_products=max_products,
        seed=seed,
        progress=report,
    )
    return replace(found, num_products=spent + found.num_products, seconds=time.perf_counter() - began)


def _check_pairs(operator: Operator, pairs: Eigenpairs, seed: int) -> None:
    """Raise OptionError, ShapeError or DataError unless these are its largest, as far as one product tells."""
    if pairs.which != "largest":
        raise OptionError(f"pairs are those of the {pairs.which} end; outliers are among the largest.")
    if pairs.vectors.shape[0] != operator.shape[0]:
        raise ShapeError(f"pairs have vectors of length {pairs.vectors.shape[0]:,}, not {operator.shape[0]:,}.")
    refuse_others(InUnits(operator), pairs, seed, "pairs")


def attribute_known(
    operator: Operator,
    parts: Decomposition,
    pairs: Eigenpairs,
    basis: Krylov | None = None,
    *,
    shares: Tensor | None = None,
    margin: float = MARGIN,
    max_products: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Attribution:
    """`attribute` of arguments that are right, from what is known already.

    The basis that `explore` found the pairs with goes on growing, beyond its capacity if the knock-outs need that;
    without it the subspace starts from the pairs and a random vector. `shares` are those of `pair_shares`.
    """
    began = time.perf_counter()
    before = 0 if basis is None else basis.num_products
    size, num_classes, had_means = operator.shape[0], parts.projections.num_classes, parts.has_means
    most = 2 * num_classes - 1 if max_products is None else max_products
    factors = (2 if parts.projections.first == "class" else 3) * num_classes
    num = len(pairs.values)
    least = num + NEWEST + factors
    capacity = _capacity(operator, parts, least, most)
    most = min(most, capacity - least) if capacity < size else most
    borrowed = parts.num_bytes(-(-max(0, capacity - rows_that_fit(operator)) // operator.group.size))
    with parts.rows.products.allowance.lent(borrowed):
        try:
            if basis is None:
                basis = Krylov.of_pairs(operator, pairs, capacity)
                basis.append_random(stream(seed, "attribution"))  # another one than pairs are sought from
                if basis.num_pending:
                    basis.expand(1)
            elif len(basis.rows) < capacity:
                basis.enlarge(capacity)
            space = KnockoutSpace(basis, num, lambda done: progress and progress(done - before, None))
            edges, edge_norms = space.bulk_edge(Means(parts), EDGE_PRODUCTS)
            threshold = margin * float(edges[0])
            space.make_room(factors + most)
            every = taken(("means",), tuple(parts))
            found = (
                Knockout((), "subtraction", pairs.values.cpu(), pairs.residual_norms.cpu().double(), threshold),
                *knockouts(space, parts, pairs, threshold, most),
                Knockout(("means",), "subtraction", edges, edge_norms, threshold, every),
            )
        finally:
            if not had_means:
                parts.forget_means()
    return Attribution(
        values=pairs.values,
        residual_norms=pairs.residual_norms,
        part_names=(*parts, "residual"),
        pair_shares=pair_shares(parts, pairs) if shares is None else shares,
        bulk_edge=float(edges[0]),
        threshold=threshold,
        margin=margin,
        num_outliers=found[0].num_outliers,
        complete=pairs.converged and bool(pairs.values[-1] <= threshold),
        knockouts=found,
        num_products=basis.num_products - before,
        **origin(began, operator, seed=seed),
    )


def _capacity(operator: Operator, parts: Decomposition, least: int, most: int) -> int:
    """Rows of the basis: the least and up to so many products beyond, as memory has room; graphs lend theirs.

    Raises:
        MemoryBudgetError: there is no room for one product.
    """
    size, own, lender = operator.shape[0], rows_that_fit(operator), parts.rows.products.allowance
    wanted = min(size, least + most)
    room = own + operator.group.size * (lender.size - lender.reserved) // parts.num_bytes(1)
    if room < min(size, least + min(most, 1)):
        raise MemoryBudgetError(
            f"the knock-outs take at least {least + 1:,} vectors of {size:,} parameters, "
            f"{in_units(parts.num_bytes(least + 1))}, and there is room for {room:,}. Raise memory, put "
            "classes into groups, or restrict the parameters."
        )
    return min(wanted, room)


def pair_shares(parts: Decomposition, pairs: Eigenpairs) -> Tensor:
    """u_jᵀ B u_j / λ_j for each pair, over the parts and the residual: (K, parts + 1), rows sum to 1."""
    norms = squared_norms(parts, pairs.vectors)
    values = pairs.values.to(norms)
    shares = (norms / values).T
    return torch.cat([shares, 1 - shares.sum(1, keepdim=True)], 1).cpu()


def squared_norms(parts: Decomposition, block: Tensor) -> Tensor:
    """|Π_part A v|² for each part and column of a block (P, K): (parts, K)."""
    return parts.rows.squared_norms(parts.projections, block, tuple(parts))


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
                rest = f"by share {residual} of them is residual and {within} within, which no means make."
                if result.mean_shares["residual"] + result.mean_shares["within"] > MINOR:
                    return (
                        f"Without the {means} means {number} outliers fall below the threshold, but means do not "
                        f"make most of them: {rest}"
                    )
                return (
                    f"So by knock-out the outliers are attributable{adverb} to the {means} means (then below the "
                    f"threshold: {number}); {rest}"
                )
    return f"So neither explains the outliers: more than {1 - MOSTLY:.0%} of them stay."


def _leaves(result: Attribution, *removed: str) -> str:
    found = result.knockout(*removed)
    projected = result.knockout(*removed, method="projection").num_outliers
    number = str(found.num_outliers or "none")
    if found.num_outliers_at_most > found.num_outliers:
        number += f" (at most {found.num_outliers_at_most} within the error)"
    return f"leaves {number} (largest {float(found.values[0]):.3g}; by projection {projected or 'none'})"

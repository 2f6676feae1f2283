"""The claims of the papers: each with its table, and whether it holds by a stated rule."""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.stats import spearmanr

from deepspectra.analysis.knockouts import KNOCKOUT_RTOL
from deepspectra.analysis.regions import LEAST, REGIONS, SURE, Shifts
from reproductions.records import Record
from reproductions.verdicts import HEAD, LEVEL, Claim, Verdict, by_group, groups, judged, named, rank, spread, worded

NUM_CLASSES = 10
MARGIN = 1.25  # an outlier is at least so many times the bulk's edge
GONE = 0.25  # of the outliers; a knock-out that leaves no more explains them
RISES = 0.9  # rank correlation with depth from which something rises with it
FOUND = 0.95  # overlap from which a subspace counts as found
SHIFT_ERROR = 0.02  # decades, of a shift whose error was not recorded: by so much seeds differ
RESAMPLES = 2000
FEWEST = 5  # settings of a data set over which something is correlated


def outliers_at(record: Record, margin: float = MARGIN) -> int:
    """Of H, if one is so many times the edge."""
    return int((record["hessian_value"] > margin * record["hessian_bulk_edge"]).sum())


def left(record: Record, name: str, method: str = "subtraction", margin: float = MARGIN) -> float:
    """So many outliers of H at least are left without some means; NaN if it was not measured."""
    values = record.get(f"hessian_value_without_{name}_{method}")
    if values is None:
        known = margin == MARGIN
        return float(record.get(f"hessian_left_{name}_{method}", math.nan)) if known else math.nan
    return float((values > margin * record["hessian_bulk_edge"]).sum())


def recorded_at_most(record: Record, name: str, method: str) -> float:
    """How many are left at most, by the knock-out's residuals; NaN if it was not recorded."""
    return float(record.get(f"hessian_left_{name}_{method}_at_most", math.nan))


def left_at_most(record: Record, name: str, method: str = "subtraction", margin: float = MARGIN) -> float:
    """How many outliers of H are left at most; NaN if it was not measured.

    Where it was not recorded, eigenvalues count that reach the threshold with the residual at which the search for
    them stops.
    """
    known = recorded_at_most(record, name, method)
    if margin == MARGIN and not math.isnan(known):
        return known
    values = record.get(f"hessian_value_without_{name}_{method}")
    if values is None:
        return math.nan
    return float(((1 + KNOCKOUT_RTOL) * values > margin * record["hessian_bulk_edge"]).sum())


def as_many_as_classes(record: Record, margin: float = MARGIN) -> bool:
    """Whether there are about as many outliers as classes."""
    return abs(outliers_at(record, margin) - NUM_CLASSES) <= 1


def explained(
    record: Record, name: str, method: str = "subtraction", margin: float = MARGIN, gone: float = GONE
) -> bool | None:
    """Whether the outliers go with these means; None if the number that is left is not known well enough."""
    allowed = gone * outliers_at(record, margin)
    if left(record, name, method, margin) > allowed:
        return False
    return True if left_at_most(record, name, method, margin) <= allowed else None


def _explained(records: list[Record], name: str) -> list[Verdict]:
    some = [record for record in records if outliers_at(record)]
    return [
        judged(some, lambda r, method=method: explained(r, name, method), f"By {method}")
        for method in ("subtraction", "projection")
    ]


def number_of_outliers(records: list[Record]) -> Claim:
    """Outliers ≈ classes."""
    return Claim(
        "There are about as many outliers as classes",
        "Papyan 2018, 2020",
        f"the Hessian has {NUM_CLASSES - 1} to {NUM_CLASSES + 1} of them.",
        [judged(records, as_many_as_classes)],
        [*HEAD, "outliers of H", "outliers of G", "λ₁ over the edge", "mean of the first 9 over the edge"],
        by_group(
            records,
            outliers_at,
            lambda r: r["outliers"],
            lambda r: r["hessian_value"][0] / r["hessian_bulk_edge"],
            lambda r: ratio(r, "hessian_"),
            digits=1,
        ),
    )


def class_means_make_outliers(records: list[Record]) -> Claim:
    """Outliers ← class."""
    return Claim(
        "The outliers are attributable to the class means",
        "Papyan 2019, 2020",
        f"class and true-class means, knocked out, leave at most {GONE:.0%} of the outliers of H.",
        _explained(records, "class"),
        [*HEAD, "outliers", "share of class", "left by subtraction", "left by projection"],
        by_group(
            records,
            outliers_at,
            lambda r: r.get("hessian_share_class", math.nan),
            lambda r: left(r, "class"),
            lambda r: left(r, "class", "projection"),
        ),
    )


def additive(records: list[Record]) -> Claim:
    """Outliers ← class + logit."""
    return Claim(
        "The outliers lie in the additive space of class and logit means",
        "this library",
        f"class, true-class and logit means, knocked out, leave at most {GONE:.0%} of the outliers of H.",
        _explained(records, "class_logit"),
        [*HEAD, "class", "logit", "interaction", "within", "left by subtraction", "by projection"],
        by_group(
            records,
            *(
                lambda r, part=part: r.get(f"hessian_share_{part}", math.nan)
                for part in ("class", "logit", "interaction", "within")
            ),
            lambda r: left(r, "class_logit"),
            lambda r: left(r, "class_logit", "projection"),
        ),
    )


def bump_and_bulk(records: list[Record]) -> Claim:
    """Bump ← cross, bulk ← within."""
    exact = [r for r in records if "shift_cross" in r]

    removed = ("class", "class_logit", "interaction", "cross", "within")
    rows = [
        [*named(group, some), name.replace("_", " + ")]
        + [spread(r[f"shift_{name}"][j] for r in some) for j in range(len(REGIONS))]
        for group, some in groups(exact).items()
        for name in removed
    ]
    return Claim(
        "Cross-class means make the bump, scatter within classes the bulk",
        "Papyan 2020",
        f"the knock-out moves that region of the exact spectrum of G most, in decades of λ, and by {LEAST} at least. "
        "Outliers are the first C − 1 eigenvalues, the bump those up to the C²-th, the bulk the larger half of the "
        "rest; three decades stand for gone. Errors of single networks were not recorded; each shift is taken to be "
        f"uncertain by {SHIFT_ERROR}, by which seeds differ, so that a lead of less than "
        f"{SURE * math.sqrt(2) * SHIFT_ERROR:.2f}, two standard errors, is open.",
        [
            judged(exact, lambda r: makes(r, "cross", "bump"), "Bump"),
            judged(exact, lambda r: makes(r, "within", "bulk"), "Bulk"),
        ],
        [*HEAD, "removed", *REGIONS],
        rows,
    )


def makes(record: Record, removed: str, region: str) -> bool | None:
    """Whether a part makes a region; None if that is open."""
    values = torch.as_tensor(record[f"shift_{removed}"])[None]
    return Shifts((removed,), REGIONS, values, torch.full_like(values, SHIFT_ERROR)).makes(removed, region)


def averaging(records: list[Record]) -> Claim:
    """Averages span the principal subspace."""
    return Claim(
        "Averaging finds the principal subspace without eigenanalysis",
        "Papyan 2019",
        f"the cross-class means' first C − 1 directions overlap the top C − 1 eigenspace of H by {FOUND:.0%}.",
        [judged(records, lambda r: r["hessian_overlap_cross_class"] >= FOUND)],
        [*HEAD, "class means, H", "class means, G", "cross-class means, H", "cross-class means, G"],
        by_group(
            records,
            *(
                lambda r, level=level, prefix=prefix: r[f"{prefix}overlap_{level}"]
                for level in ("class", "cross_class")
                for prefix in ("hessian_", "")
            ),
            digits=3,
        ),
    )


def _deep(records: list[Record], least: int = 2) -> list[Record]:
    """Those of which so many layers were looked at."""
    return [record for record in records if len(record.get("layer", [])) >= least]


def _layer_rows(records: list[Record], *names: str) -> list[list[str]]:
    rows = []
    for group, some in groups(_deep(records, 1)).items():
        for depth, layer in enumerate(some[0]["layer"]):
            cells = [spread(r[f"layer_{name}"][depth] for r in some) for name in names]
            rows.append([*named(group, some), layer, *cells])
    return rows


def _rises(record: Record, name: str) -> bool:
    """With depth; of up to five layers none may fall behind the one before, of twenty a few."""
    values = record[f"layer_{name}"]
    return float(spearmanr(range(len(values)), values).statistic) >= RISES


def emergence(records: list[Record]) -> Claim:
    """Outliers of features with depth, of errors towards the output."""
    deep = _deep(records)
    return Claim(
        "Outliers of features emerge with depth; those of errors fade towards the input",
        "Papyan 2020",
        "the largest eigenvalue of the class part (features) or of all (errors), over the largest of the scatter "
        f"within classes, has a rank correlation with depth of at least {RISES}.",
        [
            judged(deep, lambda r: _rises(r, "features_top_over_bulk"), "Features"),
            judged(deep, lambda r: _rises(r, "errors_top_over_bulk"), "Errors"),
        ],
        [
            *HEAD,
            "layer",
            "features: class over within",
            "errors: top over within",
            "errors: class share of trace",
        ],
        _layer_rows(deep, "features_top_over_bulk", "errors_top_over_bulk", "errors_class"),
    )


def separation(records: list[Record]) -> Claim:
    """Depth separates classes and orthogonalises."""
    deep = _deep(records)
    return Claim(
        "Depth separates class information from variability and orthogonalises it",
        "Papyan 2020",
        f"the between-class share of the features' variance has a rank correlation with depth of at least {RISES}; "
        "the angles of class means are nearer to a simplex at the last layer than at the first.",
        [
            judged(deep, lambda r: _rises(r, "features_between"), "Separation"),
            judged(deep, lambda r: r["layer_simplex"][-1] < r["layer_simplex"][0], "Angles"),
        ],
        [*HEAD, "layer", "between-class share", "NC1", "distance of angles from a simplex"],
        _layer_rows(deep, "features_between", "nc1", "simplex"),
    )


def products_of_means(records: list[Record]) -> Claim:
    """h_c ⊗ e_c for g_c."""
    layers = [
        {name: r[name] for name in ("model", "data", "per_class")} | {"cosine": cosine}
        for r in _deep(records, 1)
        for cosine in r["layer_class_cosine"]
        if math.isfinite(cosine)
    ]
    return Claim(
        "Mean gradients are products of mean features and mean errors",
        "Papyan 2020",
        "the mean cosine between g_c and h_c ⊗ e_c is at least 0.9, layer by layer.",
        [judged(layers, lambda layer: layer["cosine"] >= 0.9, unit="layers of all networks")],
        [*HEAD, "layer", "cos g_c, h_c ⊗ e_c", "cos g_ck, h_c ⊗ e_ck"],
        _layer_rows(records, "class_cosine", "cross_cosine"),
    )


def ratio(record: Record, prefix: str = "") -> float:
    """Of the mean of the first C − 1 eigenvalues to the edge of the bulk; of G, or of the Hessian."""
    return float(np.mean(record[f"{prefix}value"][: NUM_CLASSES - 1])) / record[f"{prefix}bulk_edge"]


def misclassification(records: list[Record]) -> Claim:
    """The ratio of outliers to bulk against test error."""
    rows, truths = [], []
    for data in sorted({r["data"] for r in records}):
        some = groups([r for r in records if r["data"] == data]).values()
        pairs = [np.array([[ratio(r), 1 - r["test_accuracy"]] for r in seeds]) for seeds in some]
        every = np.concatenate(pairs)
        if len(pairs) < FEWEST or len(np.unique(every[:, 0])) < 3 or not np.ptp(every[:, 1]):  # nothing to correlate
            continue
        low, high = _resampled(pairs)
        truths.append(True if high < 0 else False if low > 0 else None)
        cells = [
            str(len(pairs)),
            str(len(every)),
            f"{spearmanr(every[:, 0], every[:, 1]).statistic:.2f}",
            f"{low:.2f} to {high:.2f}",
        ]
        rows.append([data, *cells, {True: "yes", False: "no", None: "open"}[truths[-1]]])
    verdict = Verdict("Not measured.")
    if truths:
        num, sure, maybe = len(truths), truths.count(True), truths.count(None)
        # all data sets for a claim that holds, one for one that holds in part
        least, most = (rank(count / num, 1 / num, 1) for count in (sure, sure + maybe))
        counts = f"surely negative on {sure} of {num} data sets" + f" ({maybe} open)" * bool(maybe)
        by_count = worded((least, least))
        verdict = Verdict(f"{worded((least, most))}: {counts}.", possible=(least, most), by_count=by_count)
    return Claim(
        "The ratio of outliers to bulk predicts misclassification",
        "Papyan 2020, Theorem 8.1 for logistic regression",
        "over networks, sizes and seeds, the mean of the first C − 1 eigenvalues of G over the bulk's edge and the "
        f"test error have a negative rank correlation. It is judged on data sets of {FEWEST} settings or more, by "
        f"a {LEVEL:.0%} bootstrap interval in which settings are drawn with all their seeds: one that reaches "
        "across zero is open. The claim holds if all are negative, in part if one is.",
        [verdict],
        ["data", "settings", "networks", "rank correlation", f"{LEVEL:.0%} interval", "negative"],
        rows,
    )


def rank_correlations(pairs: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Spearman's, of pairs (n, 2) that occur so many times (m, n) in each of m samples; NaN of equal values."""
    below = (pairs[:, None] < pairs) + (pairs[:, None] == pairs) / 2
    ranks = np.einsum("mj,jik->kmi", weights, below)  # in the middle of ties
    ranks -= (weights * ranks).sum(2, keepdims=True) / weights.sum(1)[:, None]
    first, second, both = ((weights * ranks[j] * ranks[k]).sum(1) for j, k in ((0, 0), (1, 1), (0, 1)))
    product = first * second
    return np.divide(both, np.sqrt(product), out=np.full(len(both), math.nan), where=product > 0)


def _resampled(pairs: list[np.ndarray]) -> tuple[float, float]:
    """Bootstrap interval of a rank correlation over settings, each with the pairs of its seeds."""
    num = len(pairs)
    drawn = np.random.default_rng(0).multinomial(num, np.full(num, 1 / num), size=RESAMPLES)
    drawn = drawn[(drawn > 0).sum(1) > 2]  # of two settings it is 1 or -1
    found = rank_correlations(np.concatenate(pairs), drawn.repeat([len(seeds) for seeds in pairs], axis=1))
    tail = (1 - LEVEL) / 2
    low, high = np.nanquantile(found, [tail, 1 - tail])
    return float(low), float(high)


def clustering(records: list[Record]) -> Claim:
    """Gradients cluster by class late in training."""
    return Claim(
        "Late in training gradients cluster by class more than by logit",
        "Fort and Ganguli 2019; Papyan 2019",
        "the mean cosine of g_{i,k} and g_{j,l} is larger for the same class alone than for the same logit alone.",
        [judged(records, lambda r: r["clustering"][2] > r["clustering"][1])],
        [*HEAD, "same class and logit", "same logit", "same class", "neither"],
        by_group(records, *(lambda r, j=j: r["clustering"][j] for j in range(4))),
    )


CLAIMS = (
    number_of_outliers,
    class_means_make_outliers,
    additive,
    bump_and_bulk,
    averaging,
    emergence,
    separation,
    products_of_means,
    misclassification,
    clustering,
)

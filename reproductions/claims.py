"""The claims of the papers: each with its table, and whether it holds by a stated rule."""

from __future__ import annotations

import math

import numpy as np
from scipy.stats import spearmanr

from reproductions.records import Record
from reproductions.verdicts import HEAD, Claim, Verdict, by_group, groups, judged, named, spread

NUM_CLASSES = 10
MARGIN = 1.25  # an outlier is at least so many times the bulk's edge
GONE = 0.25  # of the outliers; a knock-out that leaves no more explains them
RISES = 0.9  # rank correlation with depth from which something rises with it
FOUND = 0.95  # overlap from which a subspace counts as found
RESAMPLES = 2000
REGIONS = ("outliers", "bump", "bulk")


def outliers_at(record: Record, margin: float = MARGIN) -> int:
    """Of H, if one is so many times the edge."""
    return int((record["hessian_value"] > margin * record["hessian_bulk_edge"]).sum())


def left(record: Record, name: str, method: str = "subtraction", margin: float = MARGIN) -> float:
    """Outliers of H that are left without some means; NaN if it was not measured."""
    values = record.get(f"hessian_value_without_{name}_{method}")
    if values is None:
        known = margin == MARGIN
        return float(record.get(f"hessian_left_{name}_{method}", math.nan)) if known else math.nan
    return float((values > margin * record["hessian_bulk_edge"]).sum())


def as_many_as_classes(record: Record, margin: float = MARGIN) -> bool:
    """Whether there are about as many outliers as classes."""
    return abs(outliers_at(record, margin) - NUM_CLASSES) <= 1


def explained(
    record: Record, name: str, method: str = "subtraction", margin: float = MARGIN, gone: float = GONE
) -> bool:
    """Whether the outliers go with these means."""
    return left(record, name, method, margin) <= gone * outliers_at(record, margin)


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

    def largest(record: Record, removed: str) -> str:
        return REGIONS[int(np.argmax(record[f"shift_{removed}"]))]

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
        "the knock-out moves that region of the exact spectrum of G most, in decades of λ. Outliers are the first "
        "C − 1 eigenvalues, the bump those up to the C²-th, the bulk the larger half of the rest; three decades "
        "stand for gone.",
        [
            judged(exact, lambda r: largest(r, "cross") == "bump", "Bump"),
            judged(exact, lambda r: largest(r, "within") == "bulk", "Bulk"),
        ],
        [*HEAD, "removed", *REGIONS],
        rows,
    )


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
        {"model": r["model"], "cosine": cosine}
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
    rng = np.random.default_rng(0)
    rows, certain = [], []
    for data in sorted({r["data"] for r in records}):
        some = [r for r in records if r["data"] == data]
        pairs = np.array([[ratio(r), 1 - r["test_accuracy"]] for r in some])
        if len(pairs) < 5 or not np.ptp(pairs, axis=0).all():  # nothing to correlate
            continue
        value = spearmanr(pairs[:, 0], pairs[:, 1]).statistic
        draws = [pairs[rng.integers(len(pairs), size=len(pairs))] for _ in range(RESAMPLES)]
        resampled = [spearmanr(d[:, 0], d[:, 1]).statistic for d in draws if len(np.unique(d[:, 0])) > 2]
        low, high = np.nanquantile(resampled, [0.025, 0.975])
        certain.append(bool(high < 0))
        rows.append([data, str(len(pairs)), f"{value:.2f}", f"{low:.2f} to {high:.2f}"])
    verdict = "Not measured."
    if certain:
        word = "Holds" if all(certain) else "Holds in part" if any(certain) else "Does not hold"
        verdict = f"{word}: surely negative on {sum(certain)} of {len(certain)} data sets."
    return Claim(
        "The ratio of outliers to bulk predicts misclassification",
        "Papyan 2020, Theorem 8.1 for logistic regression",
        "over networks, sizes and seeds, the mean of the first C − 1 eigenvalues of G over the bulk's edge and the "
        "test error have a negative rank correlation, with its 95 % bootstrap interval below zero.",
        [Verdict(verdict)],
        ["data", "networks", "rank correlation", "95 % interval"],
        rows,
    )


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

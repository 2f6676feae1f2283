"""From records to a page: each claim with its table, and whether it holds by a stated rule."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import spearmanr

from deepspectra.analysis.principal_subspace import overlap_bound

Record = dict[str, Any]
Group = tuple[str, str, int]
NUM_CLASSES = 10
GONE = 0.25  # of the outliers; a knock-out that leaves no more explains them
MOST = 0.75  # of the runs; a claim that is true in as many holds, in a quarter of them in part
RISES = 0.9  # rank correlation with depth from which something rises with it
FOUND = 0.95  # overlap from which a subspace counts as found
RESAMPLES = 2000


class Verdict(NamedTuple):
    """Whether something holds, and in how many runs of each network."""

    text: str
    networks: str = ""
    subject: str = ""  # if a claim has several

    def __str__(self) -> str:
        return f"{self.subject}: {self.text}" if self.subject else self.text


class Claim(NamedTuple):
    """A claim of the papers, the rule by which it is judged, and what was measured."""

    title: str
    source: str
    rule: str
    verdicts: list[Verdict]
    head: list[str]
    rows: list[list[str]]

    @property
    def verdict(self) -> str:
        """All verdicts in one line."""
        return " ".join(map(str, self.verdicts))


def page(records: list[Record]) -> str:
    """The page as Markdown."""
    records = sorted(records, key=lambda r: (r["model"], r["data"], r["per_class"], r["seed"]))
    claims = [claim(records) for claim in CLAIMS]
    summary = [[claim.title, claim.source, claim.verdict] for claim in claims]
    fitted = [r["train_accuracy"] for r in records]
    parts = [
        "# The papers' claims on real data",
        "",
        f"{len(records)} networks, trained with `zoo.recipe` and analysed at the end of training: "
        f"{_list(sorted({r['model'] for r in records}))}; {_list(sorted({r['data'] for r in records}))}; "
        f"{_list([str(n) for n in sorted({r['per_class'] for r in records})])} images a class. Training accuracy "
        f"{min(fitted):.1%} to {max(fitted):.1%}. Numbers are means ± standard errors over seeds, where there are "
        "several. An outlier is an eigenvalue above 1.25 times the bulk's edge, the largest eigenvalue without any "
        "class or cross-class mean. `make reproduce` measures what is missing in [claims.jsonl](claims.jsonl) and "
        "writes this page from it.",
        *_samples(records),
        "",
        table(["claim", "source", "verdict"], summary),
    ]
    for claim in claims:
        parts += ["", f"## {claim.title}", "", f"**{claim.verdict}** Rule: {claim.rule}"]
        for verdict in claim.verdicts:
            if verdict.networks:
                parts += ["", f"{verdict.subject or 'Runs'} by network: {verdict.networks}."]
        parts += ["", table(claim.head, claim.rows)]
    return "\n".join(parts) + "\n"


def _samples(records: list[Record]) -> list[str]:
    """Which networks were measured by a sample, and how good it is."""
    top = NUM_CLASSES - 1
    rows = []
    for r in records:
        if "sample" not in r:
            continue
        sample, outliers = r["sample"], min(r["H"]["outliers"], top)
        rows.append(
            [
                r["model"],
                r["data"],
                str(r["per_class"]),
                f"{sample['examples']:,}",
                f"{sample['residual']:.2g} ± {sample['error']:.1g}",
                f"{r['H']['values'][top - 1]:.2g}",
                _at_least(_within(r, top)),
                str(outliers),
                _at_least(_within(r, outliers)),
            ]
        )
    text = (
        "Of the networks below, eigenpairs, shares and knock-outs are those of a sample drawn by importance, means "
        f"of all images. U are the sample's first {top} eigenvectors, H is the Hessian on all images; the overlap of "
        "U with H's own is at least what this residual and the gap allow. Where fewer than these are outliers, there "
        "is no gap after the last of U, but one after the outliers: at least so much of their eigenspace lies in U."
    )
    head = [
        *RUN[:3],
        "images drawn",
        "‖(I − UUᵀ)HU‖",
        f"λ of the {top}th",
        "overlap at least",
        "outliers among them",
        "outliers in U at least",
    ]
    return ["", text, "", table(head, rows)] if rows else []


def _at_least(bound: float) -> str:
    """Rounded down."""
    return f"{math.floor(1000 * bound) / 1000:.3f}"


def _within(record: Record, num: int) -> float:
    """Of the span X of H's first m eigenvectors so much, ‖UᵀX‖² / m, is in U at least."""
    if not num:
        return 0.0
    values = record["H"]["values"]
    return overlap_bound(record["sample"]["residual"], values[num - 1] - values[NUM_CLASSES - 1], num)


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def groups(records: list[Record]) -> dict[Group, list[Record]]:
    """Runs that differ in their seed alone."""
    found: dict[Group, list[Record]] = {}
    for record in records:
        found.setdefault((record["model"], record["data"], record["per_class"]), []).append(record)
    return found


def by_group(records: list[Record], *values: Callable[[Record], float], digits: int = 2) -> list[list[str]]:
    """One row a group: its name, runs, and mean ± s.e. of each value."""
    return [
        [
            model,
            data,
            str(size),
            str(len(some)),
            *(spread([value(r) for r in some], digits) for value in values),
        ]
        for (model, data, size), some in groups(records).items()
    ]


def spread(values: list[float], digits: int = 2) -> str:
    """Mean ± standard error."""
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return "–"
    mean = f"{statistics.mean(known):.{digits}f}"
    if len(known) < 2:
        return mean
    return f"{mean} ± {statistics.stdev(known) / math.sqrt(len(known)):.{digits}f}"


def judged(
    records: list[Record], rule: Callable[[Record], bool], subject: str = "", unit: str = "runs"
) -> Verdict:
    """A verdict from single runs."""
    truths: dict[str, list[bool]] = {}
    for record in records:
        truths.setdefault(record["model"], []).append(rule(record))
    found = [truth for some in truths.values() for truth in some]
    if not found:
        return Verdict("Not measured.", "", subject)
    share = sum(found) / len(found)
    word = "Holds" if share >= MOST else "Holds in part" if share >= 1 - MOST else "Does not hold"
    networks = ", ".join(f"{name} {sum(some)} of {len(some)}" for name, some in truths.items())
    return Verdict(f"{word}: in {sum(found)} of {len(found)} {unit}.", networks, subject)


RUN = ["network", "data", "a class", "runs"]


def _left(record: Record, name: str, method: str = "subtraction") -> float:
    return float(record["H"]["left"].get(f"{name}, {method}", [math.nan])[0])


def _explained(records: list[Record], name: str) -> Verdict:
    """Whether the outliers go with these means."""
    some = [record for record in records if record["H"]["outliers"]]
    return judged(some, lambda r: _left(r, name) <= GONE * r["H"]["outliers"])


def number_of_outliers(records: list[Record]) -> Claim:
    """Outliers ≈ classes."""
    return Claim(
        "There are about as many outliers as classes",
        "Papyan 2018, 2020",
        f"the Hessian has {NUM_CLASSES - 1} to {NUM_CLASSES + 1} of them.",
        [judged(records, lambda r: abs(r["H"]["outliers"] - NUM_CLASSES) <= 1)],
        [*RUN, "outliers of H", "outliers of G", "λ₁ over the edge", "mean of the first 9 over the edge"],
        by_group(
            records,
            lambda r: r["H"]["outliers"],
            lambda r: r["G"]["outliers"],
            lambda r: r["H"]["values"][0] / r["H"]["edge"],
            lambda r: r["H"]["ratio"],
            digits=1,
        ),
    )


def class_means_make_outliers(records: list[Record]) -> Claim:
    """Outliers ← class."""
    return Claim(
        "The outliers are attributable to the class means",
        "Papyan 2019, 2020",
        f"class and true-class means knocked out by subtraction leave at most {GONE:.0%} of the outliers of H.",
        [_explained(records, "class")],
        [*RUN, "outliers", "share of class", "left by subtraction", "left by projection"],
        by_group(
            records,
            lambda r: r["H"]["outliers"],
            lambda r: r["H"]["shares"]["class"],
            lambda r: _left(r, "class"),
            lambda r: _left(r, "class", "projection"),
        ),
    )


def additive(records: list[Record]) -> Claim:
    """Outliers ← class + logit."""
    return Claim(
        "The outliers lie in the additive space of class and logit means",
        "this library",
        f"class, true-class and logit means knocked out by subtraction leave at most {GONE:.0%} of the outliers.",
        [_explained(records, "class + logit")],
        [*RUN, "class", "logit", "interaction", "within", "left by subtraction", "by projection"],
        by_group(
            records,
            *(
                lambda r, part=part: r["H"]["shares"][part]
                for part in ("class", "logit", "interaction", "within")
            ),
            lambda r: _left(r, "class + logit"),
            lambda r: _left(r, "class + logit", "projection"),
        ),
    )


def bump_and_bulk(records: list[Record]) -> Claim:
    """Bump ← cross, bulk ← within."""
    exact = [r for r in records if "shifts" in r]

    def largest(record: Record, removed: str) -> str:
        shifts = record["shifts"][removed]
        return max(shifts, key=lambda region: shifts[region])

    removed = ("class", "class + logit", "interaction", "cross", "within")
    regions = ("outliers", "bump", "bulk")
    rows = [
        [model, data, str(size), str(len(some)), name]
        + [spread([r["shifts"][name][region] for r in some]) for region in regions]
        for (model, data, size), some in groups(exact).items()
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
        [*RUN, "removed", *regions],
        rows,
    )


def averaging(records: list[Record]) -> Claim:
    """Averages span the principal subspace."""
    return Claim(
        "Averaging finds the principal subspace without eigenanalysis",
        "Papyan 2019",
        f"the cross-class means' first C − 1 directions overlap the top C − 1 eigenspace of H by {FOUND:.0%}.",
        [judged(records, lambda r: r["H"]["overlap"]["cross_class"] >= FOUND)],
        [*RUN, "class means, H", "class means, G", "cross-class means, H", "cross-class means, G"],
        by_group(
            records,
            *(
                lambda r, level=level, name=name: r[name]["overlap"][level]
                for level in ("class", "cross_class")
                for name in ("H", "G")
            ),
            digits=3,
        ),
    )


def _layer_rows(records: list[Record], *names: str) -> list[list[str]]:
    rows = []
    for (model, data, size), some in groups([r for r in records if r.get("layers")]).items():
        for depth, layer in enumerate(some[0]["layers"]):
            values = [[r["layers"][depth][name] for r in some] for name in names]
            cells = [spread([math.nan if v is None else v for v in each]) for each in values]
            rows.append([model, data, str(size), str(len(some)), layer["layer"], *cells])
    return rows


def _rises(record: Record, name: str) -> bool:
    """With depth; of up to five layers none may fall behind the one before, of twenty a few."""
    values = [layer[name] for layer in record["layers"]]
    return float(spearmanr(range(len(values)), values).statistic) >= RISES


def emergence(records: list[Record]) -> Claim:
    """Outliers of features with depth, of errors towards the output."""
    deep = [r for r in records if len(r.get("layers", [])) > 1]
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
            *RUN,
            "layer",
            "features: class over within",
            "errors: top over within",
            "errors: class share of trace",
        ],
        _layer_rows(deep, "features_top_over_bulk", "errors_top_over_bulk", "errors_class"),
    )


def separation(records: list[Record]) -> Claim:
    """Depth separates classes and orthogonalises."""
    deep = [r for r in records if len(r.get("layers", [])) > 1]
    return Claim(
        "Depth separates class information from variability and orthogonalises it",
        "Papyan 2020",
        f"the between-class share of the features' variance has a rank correlation with depth of at least {RISES}; "
        "the angles of class means are nearer to a simplex at the last layer than at the first.",
        [
            judged(deep, lambda r: _rises(r, "features_between"), "Separation"),
            judged(deep, lambda r: r["layers"][-1]["simplex"] < r["layers"][0]["simplex"], "Angles"),
        ],
        [*RUN, "layer", "between-class share", "NC1", "distance of angles from a simplex"],
        _layer_rows(deep, "features_between", "nc1", "simplex"),
    )


def products_of_means(records: list[Record]) -> Claim:
    """h_c ⊗ e_c for g_c."""
    layers = [
        layer | {"model": r["model"]}
        for r in records
        for layer in r.get("layers", [])
        if layer["class_cosine"] is not None
    ]
    return Claim(
        "Mean gradients are products of mean features and mean errors",
        "Papyan 2020",
        "the mean cosine between g_c and h_c ⊗ e_c is at least 0.9, layer by layer.",
        [judged(layers, lambda layer: layer["class_cosine"] >= 0.9, unit="layers of all runs")],
        [*RUN, "layer", "cos g_c, h_c ⊗ e_c", "cos g_ck, h_c ⊗ e_ck"],
        _layer_rows(records, "class_cosine", "cross_cosine"),
    )


def misclassification(records: list[Record]) -> Claim:
    """The ratio of outliers to bulk against test error."""
    rng = np.random.default_rng(0)
    rows, certain = [], []
    for data in sorted({r["data"] for r in records}):
        some = [r for r in records if r["data"] == data]
        pairs = np.array([[r["G"]["ratio"], r["test_error"]] for r in some])
        if len(pairs) < 5:
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
        [*RUN, "same class and logit", "same logit", "same class", "neither"],
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


def _list(items: list[str]) -> str:
    *most, last = items
    return f"{', '.join(most)} and {last}" if most else last

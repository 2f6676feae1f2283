"""Captions that quote the analysis: how to read a figure, and what its numbers are."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from deepspectra.report import drawing as d
from deepspectra.report import text as t
from deepspectra.report.class_charts import class_names, cosines
from deepspectra.report.saved_outliers import knockout_summary, mean_shares, outliers, outliers_left


def spectrum(dataset: xr.Dataset) -> str:
    """Of the densities: what they do not show, and how many outliers stand above the thresholds."""
    read = (
        "How the eigenvalues of the Hessian H, of its Gauss-Newton part G and of the residual R = H − G are spread: "
        "the fraction of all eigenvalues per unit of λ, or per decade of |λ|. Bins are as wide as it takes to know "
        "what is in them; boxes show the least and the most that each can hold (95 %), none where all eigenvalues "
        "are known. "
        "Where a bin has a box and no line, no more is known. Bars about zero span what is in one bin of "
        "logarithmic axes, too small to be told apart. Dotted lines are the power laws nearest to the tails, faint "
        "where another law is nearer."
    )
    dots = (
        " Dots are outliers: point at one for its eigenvalue, residual norm and shares." if outliers(dataset) else ""
    )
    return read + dots + _zero_sentences(dataset) + _outlier_sentences(dataset)


def _zero_sentences(dataset: xr.Dataset) -> str:
    """Which share of the eigenvalues are zeros, left out."""
    text = ""
    for row in d.rows(dataset, "zero_share"):
        of = t.symbol(row["operator"]) + (" on the test data" if row["split"] == "test" else "")
        text += f" Left out: {t.share_html(row['zero_share'])} of the eigenvalues of {of}, zero up to rounding."
    return text


def _outlier_sentences(dataset: xr.Dataset) -> str:
    found = outliers(dataset)
    edges = d.by_operator(dataset, "bulk_edge")
    thresholds = d.by_operator(dataset, "outlier_threshold")
    text = ""
    for operator, threshold in thresholds.items():
        top = [row["eigenvalue"] for row in found if row["operator"] == operator]
        name = t.symbol(operator)
        text += f" {name} has {t.quantity(len(top), 'outlier')} above {t.number_html(threshold)}"
        if top and edges.get(operator):
            ratio, edge = d.number(max(top) / edges[operator], 2), t.number_html(edges[operator])
            text += f"; the largest, {t.number_html(max(top))}, is {ratio} times its bulk edge {edge}"
        text += "."
    return text


def shares(dataset: xr.Dataset) -> str:
    """With each operator's mean shares."""
    text = (
        "What each outlier is made of. A bar is one outlier eigenvalue of the chosen operator; its segments"
        " are the shares of the class means, the logit means, their interaction, the scatter within "
        "classes, the true-label means and the residual R. The shares of one outlier sum to 100 %; a "
        "negative share would be drawn to the left of zero. The tables have errors of the shares, and say which "
        "classes, which pairs of a true and a potential class, and which layers make each outlier: shares of classes "
        "are those of the mean gradients, and sum to what within and R leave."
    )
    for operator, means in mean_shares(dataset).items():
        ranked = sorted(means.items(), key=lambda item: -item[1])
        listed = t.joined(
            f"{t.escaped(part)} {t.share_html(share)}" for part, share in ranked if abs(share) >= 0.0005
        )
        text += f" Mean over the outliers of {t.symbol(operator)}: {listed}."
    return text


def knockouts(dataset: xr.Dataset) -> str:
    """With the outliers that each knock-out leaves of the first operator."""
    text = (
        "Which eigenvalues stay when parts are removed. A dot is an eigenvalue left, dark when it is above "
        "the outlier threshold (dashed). A part is the cause of the outliers when they go with it. To the "
        "right: the number left above the threshold; “at least” means that only a lower bound of it is "
        "known."
    )
    summary = knockout_summary(dataset)
    first = summary[0]["operator"]
    left = [f"{_removal(row)}, {t.escaped(outliers_left(row))}" for row in summary if row["operator"] == first]
    return f"{text} For {t.symbol(first)}: {'; '.join(left)}."


def _removal(row: d.Row) -> str:
    if row["knockout"] == "nothing":
        return "nothing removed"
    return f"without {t.escaped(row['knockout'])} by {t.escaped(row['method'])}"


def averaging(dataset: xr.Dataset) -> str:
    """With the overlaps and the price of each level of averages."""
    text = (
        "How much of the top of the spectrum averaging finds, without any eigenvalue iteration. Filled dots"
        " are the true eigenvalues, by rank; open symbols are the eigenvalues found by averaging gradients "
        "by class and by pair of classes. Symbols on the dots mean that the averages carry the whole "
        "eigenvalue."
    )
    table = d.rows(dataset, "subspace_overlap", "subspace_dimension", "subspace_gradients")
    for level in dict.fromkeys(row["level"] for row in table):
        text += _overlap_sentence([row for row in table if row["level"] == level])
    return text


def _overlap_sentence(table: list[d.Row]) -> str:
    level = table[0]["level"]
    listed = t.joined(
        f"{t.share_html(row['subspace_overlap'])} of the top {_dimension(row)}{t.symbol(row['operator'])}"
        for row in table
    )
    gradients = table[0].get("subspace_gradients")
    known = gradients is not None and t.finite(gradients)
    price = f", for the cost of about {_gradients(gradients)}" if known else ""
    return f" The {d.LEVEL_NAMES.get(level, t.escaped(level))} span {listed}{price}."


def _gradients(cost: Any) -> str:
    """To the two digits that mean something, for a clock gave them."""
    return f"{t.number_html(cost, 2)} {'gradient' if d.number(cost, 2) == '1' else 'gradients'}"


def _dimension(row: d.Row) -> str:
    size = row.get("subspace_dimension")
    return f"{size:.0f} eigenvectors of " if t.finite(size) else "eigenvectors of "


def classes(dataset: xr.Dataset) -> str:
    """With the closest and the most confused pair of classes."""
    text = ""
    if d.holds(dataset, "mean_gram"):
        text += (
            "Cosines between the mean gradients of two classes: purple when they pull the parameters the "
            "same way, orange when they pull against each other. "
        )
        text += _cosine_sentence(dataset)
    if d.holds(dataset, "cross_class_weight"):
        text += (
            " Weights: how much the loss counts the examples of the class in a row under the label in a "
            "column, which is large where the network confuses them. The diagonal (true labels) is left "
            "out. "
        )
        text += _confusion_sentence(dataset)
    return text


def _cosine_sentence(dataset: xr.Dataset) -> str:
    names, cosine = class_names(dataset), cosines(dataset)
    i, j = np.triu_indices(len(names), k=1)
    values = cosine[i, j]
    if not np.isfinite(values).any():
        return ""
    best = int(np.nanargmax(values))
    pair = f"{t.escaped(names[i[best]])} and {t.escaped(names[j[best]])}"
    return (
        f"The mean cosine of two classes is {t.number_html(np.nanmean(values), 2)}; the closest are {pair} "
        f"({t.number_html(values[best], 2)})."
    )


def _confusion_sentence(dataset: xr.Dataset) -> str:
    names = class_names(dataset)
    weights = np.array(dataset["cross_class_weight"].values, dtype=np.float64)
    np.fill_diagonal(weights, np.nan)
    if not np.isfinite(weights).any():
        return ""
    true, label = np.unravel_index(int(np.nanargmax(weights)), weights.shape)
    pair = f"{t.escaped(names[true])} under the label {t.escaped(names[label])}"
    return f"The largest is {pair} ({t.number_html(weights[true, label])})."


def regions(dataset: xr.Dataset) -> str:
    """With the method of the knock-outs."""
    gone = "projected out" if t.attribute(dataset, "method") == "projection" else "subtracted"
    return (
        f"How far the eigenvalues of each region move when a part is {gone}: the mean of |log₁₀ λ/λ′| over its "
        "ranks, one that is gone counting as three decades. Outliers are the first C − 1 eigenvalues (C of "
        "features), the bump those up to the C²-th (none of features), the bulk the larger half of the rest. "
        "Lines: standard errors by leaving groups of examples out. A part is said to make a "
        "region if that moves most when it goes, by two standard errors, and by a tenth of a decade or more."
    )


def cost(dataset: xr.Dataset) -> str:
    """With the total and the dearest stage."""
    table = d.rows(dataset, "cost_gradients", "cost_seconds")
    total = sum(row["cost_gradients"] for row in table)
    most = max(table, key=lambda row: row["cost_gradients"])
    largest = t.share_html(most["cost_gradients"] / total if total else 0)
    text = (
        "What each stage cost, in the time of one gradient of the loss over all examples, which is measured beside "
        f"it. Together about {_gradients(total)}, {largest} of them for {t.escaped(most['stage'])}."
    )
    seconds = t.attribute(dataset, "gradient_seconds")
    return text + (f" One gradient took {t.number_html(seconds)} s." if seconds is not None else "")

"""The two pages: what the claims come to in fitted networks, and what moves with training and sample size."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xarray as xr

from deepspectra.analysis.knockouts import KNOCKOUT_RTOL
from deepspectra.analysis.principal_subspace import overlap_bound
from deepspectra.report.drawing import save_chart
from deepspectra.report.dynamics_charts import drawn
from reproductions import claims
from reproductions.measure import SPARE_PAIRS
from reproductions.records import FITTED, Record, at_end, fits, of_store
from reproductions.verdicts import HEAD, LEVEL, MOST, SOME, Claim, Verdict, groups, listed, named, spread, table

MARGINS, GONES = (1.1, 1.25, 1.5, 2.0), (0.0, 0.25, 0.5)
METHODS = ("subtraction", "projection")
FIRST = claims.NUM_CLASSES + SPARE_PAIRS  # eigenvalues of G that are known at every sample size
NORM = f"‖G{FIRST}‖".translate(str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉"))
LARGE = ("resnet18", "vgg11-bn")
SHOWN = (  # families of charts on the page of the dynamics
    "Training loss",
    "Outliers, and how many are left without means",
    "What the outliers of H are made of",
    "Gauss-Newton G against residual R",
    "Cross-class bump above the bulk within classes, in decades of λ",
)
DRAWN = "fashion"  # the data set of the still charts
MOVING: dict[str, Callable[[Record], float]] = {
    "training loss": lambda r: r["loss"],
    "training error": lambda r: 1 - r["accuracy"],
    "outliers": claims.outliers_at,
    "class": lambda r: r.get("hessian_share_class", math.nan),
    "logit": lambda r: r.get("hessian_share_logit", math.nan),
    "within": lambda r: r.get("hessian_share_within", math.nan),
    "left by subtraction": lambda r: claims.left(r, "class"),
    "by projection": lambda r: claims.left(r, "class", "projection"),
}
SPECTRA: dict[str, Callable[[Record], float]] = {
    "training loss": lambda r: r["loss"],
    "edge of H": lambda r: r["hessian_bulk_edge"],
    "λ₁ over the edge": lambda r: r["hessian_value"][0] / r["hessian_bulk_edge"],
    f"‖R‖/{NORM}": lambda r: r["norm_residual"] / float(np.linalg.norm(r["value"][:FIRST])),
    "outliers": claims.outliers_at,
    "class": lambda r: r.get("hessian_share_class", math.nan),
    "logit": lambda r: r.get("hessian_share_logit", math.nan),
    "bump over bulk": lambda r: r.get("bump_distance", math.nan),
    "bump over edge": lambda r: r.get("bump_clearance", math.nan),
}
CLAIMS = (
    claims.number_of_outliers,
    claims.class_means_make_outliers,
    claims.additive,
    claims.bump_and_bulk,
    claims.averaging,
    claims.emergence,
    claims.separation,
    claims.products_of_means,
    claims.misclassification,
    claims.clustering,
)


class Grid(NamedTuple):
    """How many cells, and trainings, there are to be."""

    cells: int
    trainings: int


def claims_page(found: xr.Dataset, before: list[Record], grid: Grid) -> str:
    """Each claim with its verdicts, as Markdown, from the sweep's store and the records of before."""
    cells = of_store(found)
    trained, large = at_end(cells), [r for r in at_end(before) if r["model"] in LARGE]
    kinds = {
        "fitted": [r for r in trained if fits(r)],
        "not fitted": [r for r in trained if not fits(r)],
        "large networks": large,
        "before": before,
    }
    judged_of = {kind: [claim(records) for claim in CLAIMS] for kind, records in kinds.items()}
    every = [claim([*trained, *large]) for claim in CLAIMS]
    rows = [
        [one[0].title, one[0].source, *(each.verdict for each in one)]
        for one in zip(*judged_of.values(), strict=True)
    ]
    parts = [
        "# The papers' claims on real data",
        "",
        *_about(found, trained, large, before, grid),
        "",
        *_rule(kinds),
        "",
        table(["claim", "source", *kinds], rows),
        "",
        "## What changed",
        "",
        *_changes(kinds["fitted"], before),
        "",
        *_opened(judged_of["fitted"]),
        "",
        "## What depends on the thresholds",
        "",
        f"Of {_networks(kinds['fitted'])}, how many agree with a claim when an outlier is at least so many times the "
        "bulk's edge, and a knock-out that leaves at most this share of the outliers explains them. The verdicts use "
        f"{claims.MARGIN} and {claims.GONE:.0%}. “3 to 5” are three that agree and two that are open.",
        "",
        table(*_thresholds(kinds["fitted"])),
        "",
        "## How the outliers become what they are",
        "",
        "Networks that fit their data in the end, on the way there: shares are of the outliers of H, and outliers "
        "are left without class means, so many at least. More of what moves is in [dynamics.md](dynamics.md).",
        "",
        table(*_trajectory(cells, kinds["fitted"], MOVING)),
    ]
    parts += _samples(large)
    for j, claim in enumerate(every):
        parts += ["", *_section(claim, {kind: judged_of[kind][j] for kind in list(kinds)[:3]})]
    return "\n".join(parts) + "\n"


def _samples(records: list[Record]) -> list[str]:
    """Which networks were measured by a sample, and how good it is."""
    top, rows = claims.NUM_CLASSES - 1, []
    for r in records:
        if "sample" in r:
            sample, outliers = r["sample"], min(claims.outliers_at(r), top)
            measured = [
                f"{sample['examples']:,}",
                f"{sample['residual']:.2g} ± {sample['error']:.1g}",
                f"{r['hessian_value'][top - 1]:.2g}",
                _at_least(within(r, top)),
                str(outliers),
                _at_least(within(r, outliers)),
            ]
            rows.append([r["model"], r["data"], str(r["per_class"]), *measured])
    text = (
        "Of these large networks eigenpairs, shares and knock-outs are those of a sample drawn by importance, means "
        f"of all images. U are the sample's first {top} eigenvectors, H is the Hessian on all images; the overlap of "
        "U with H's own is at least what this residual, two standard errors added, and the gap allow: the gap "
        f"between the sample's eigenvalues, the {top}th and the next, for those of H are not known. Where fewer than "
        "these are outliers, there is no gap after the last of U, but one after the outliers: at least so much of "
        "their eigenspace lies in U."
    )
    head = [
        *HEAD[:3],
        "images drawn",
        "‖(I − UUᵀ)HU‖",
        f"λ of the {top}th",
        "overlap at least",
        "outliers among them",
        "outliers in U at least",
    ]
    return ["", "## Large networks, by a sample", "", text, "", table(head, rows)] if rows else []


def _at_least(bound: float) -> str:
    """Rounded down."""
    return f"{math.floor(1000 * bound) / 1000:.3f}"


def within(record: Record, num: int) -> float:
    """Of the span X of H's first m eigenvectors so much, ‖UᵀX‖² / m, is in a sample's U at least.

    If the sample's gap is that of H, and its residual no more than two standard errors larger than it was measured.
    """
    if not num:
        return 0.0
    values = record["hessian_value"]
    gap = values[num - 1] - values[claims.NUM_CLASSES - 1]
    sample = record["sample"]
    return overlap_bound(sample["residual"] + 2 * sample["error"], gap, num)


def _networks(records: list[Record]) -> str:
    return f"{len(records)} network{'s' * (len(records) != 1)}"


def _cells(found: xr.Dataset, grid: Grid) -> str:
    done = found.status == "done"
    ends = done.sel(progress=1) if 1 in found.progress else done[{"progress": []}]
    return (
        f"{int(done.sum())} of {grid.cells} cells of the grid are measured, {int(ends.sum())} of {grid.trainings} "
        "trainings to their end"
    )


def _about(
    found: xr.Dataset, trained: list[Record], large: list[Record], before: list[Record], grid: Grid
) -> list[str]:
    names = (listed(sorted({r[name] for r in trained})) for name in ("model", "data", "per_class"))
    models, data, sizes = names
    kinds = f": {models}; {data}; {sizes} images a class" if trained else ""
    return [
        f"{_cells(found, grid)}{kinds}. Networks are trained as in the "
        "papers, 200 epochs (350 on CIFAR-10) of SGD with momentum .9 and weight decay 5e-4, the learning rate "
        "divided by ten after each third; of three, a factor of two apart, it is the "
        "one with the lowest test error in the end (the papers try a hundred).",
        "",
        f"A network is fitted if it misclassifies at most {FITTED:.0%} of its training images: "
        f"{sum(map(fits, trained))} of these {len(trained)} are, and {sum(map(fits, large))} of the {len(large)} "
        f"large networks of before. “Before” are all {len(before)} networks that were measured first, at the end of "
        f"the shorter `zoo.recipe`, {sum(map(fits, before))} of them fitted; records are "
        "in [claims.jsonl](claims.jsonl).",
        "",
        f"An outlier is an eigenvalue above {claims.MARGIN} times the bulk's edge, the largest eigenvalue without "
        "any class or cross-class mean. Numbers are means ± standard errors over seeds, where there are several. "
        "`make reproduce` goes on with the grid and writes this page from what there is.",
    ]


def _rule(kinds: Mapping[str, list[Record]]) -> list[str]:
    """By what rule verdicts are given, and of how many networks a knock-out's error is not known."""
    below = {
        kind: sum(math.isnan(claims.recorded_at_most(r, "class", "subtraction")) for r in some)
        for kind, some in kinds.items()
    }
    lines = [
        f"A claim that is true of {MOST:.0%} of such networks holds, of {SOME:.0%} in part, of fewer not. What "
        f"decides is the {LEVEL:.0%} interval of that share (Clopper and Pearson): where it reaches across one of "
        "these two borders the verdict is open, at least or at most in part if that much is known. Seeds of one "
        "setting (network, data and size) are not independent; settings count as draws, not networks, and as if "
        "they were independent, so that it takes 13 that agree for “holds”. A network whose own number is not known "
        "well enough is open too: false for the lower end of the interval, true for the upper.",
        "",
        "Eigenvalues that a knock-out leaves are lower bounds. A network agrees if few enough are outliers even with "
        "their residuals added, and is open between the two counts.",
    ]
    if any(below.values()):
        known = listed(f"{num} of the {len(kinds[kind])} {kind}" for kind, num in below.items() if num)
        lines[-1] += (
            f" Of some networks ({known}) the residuals were not recorded, and these counts are known from below "
            f"alone; there eigenvalues count as perhaps above the threshold that are less than {KNOCKOUT_RTOL:.0%} "
            "below it, the relative residual at which the search for them stops if memory has room for its basis."
        )
    return lines


def _changes(fitted: list[Record], before: list[Record]) -> list[str]:
    """A line for each verdict that is another one in fitted networks than it was in such networks before."""
    same = [record for group, some in groups(before).items() if group in groups(fitted) for record in some]
    both = [record for group, some in groups(fitted).items() if group in groups(same) for record in some]
    lines = []
    for claim in CLAIMS:
        old, new = claim(same), claim(both)
        was = {verdict.subject: verdict for verdict in old.verdicts}
        for verdict in new.verdicts:
            earlier = was[verdict.subject]
            if verdict.excludes(earlier):
                lines.append(f"- {_titled(new, verdict)}. Before: {earlier.text} Fitted: {verdict.text}")
    said = (
        f"{_networks(both)} that fit their data beside the {len(same)} of the same kinds, data and sizes of before, "
        f"{sum(map(fits, same))} of which did. Verdicts differ where they cannot both be the same word, whatever is "
        "open."
    )
    return [said, "", *(lines or ["- No verdict is surely another one."])]


def _opened(fitted: list[Claim]) -> list[str]:
    """Verdicts that bare counts would give, as this page once did, and that intervals leave open."""
    lines = [
        f"- {_titled(claim, verdict)}. By the count: {verdict.by_count}. Now: {verdict.text}"
        for claim in fitted
        for verdict in claim.verdicts
        if verdict.by_count and verdict.word != verdict.by_count
    ]
    said = (
        "This page once judged by counts alone, by the larger of two shifts however near, and by lower bounds of "
        "what knock-outs leave; and it rested on 64 cells of 16 trainings, which were not kept. Now its numbers are "
        "those of the cells in [claims-cells.jsonl](claims-cells.jsonl), from which `make reproduce` goes on, and "
        "these verdicts on fitted networks, which the count alone would settle, are open until there are more:"
    )
    return [said, "", *(lines or ["- None."])]


def _titled(claim: Claim, verdict: Verdict) -> str:
    return f"{claim.title} ({verdict.subject.lower()})" if verdict.subject else claim.title


def _thresholds(records: list[Record]) -> tuple[list[str], list[list[str]]]:
    """How many networks agree, by thresholds and method of knock-out."""
    head = ["outlier at", "9 to 11 outliers"]
    cases = list(itertools.product((("class", "class"), ("class_logit", "class + logit")), METHODS, GONES))
    head += [f"{label}, {method}, ≤ {gone:.0%} left" for (_, label), method, gone in cases]
    rows = []
    for margin in MARGINS:
        some = [r for r in records if claims.outliers_at(r, margin)]
        row = [f"{margin} × edge", _count(claims.as_many_as_classes(r, margin) for r in records)]
        row += [
            _count(claims.explained(r, name, method, margin, gone) for r in some) for (name, _), method, gone in cases
        ]
        rows.append(row)
    return head, rows


def _count(truths: Iterable[bool | None]) -> str:
    found = list(truths)
    sure, maybe = found.count(True), found.count(None)
    return f"{sure} to {sure + maybe} of {len(found)}" if maybe else f"{sure} of {len(found)}"


def _trajectory(
    cells: list[Record], of: list[Record], measures: Mapping[str, Callable[[Record], float]]
) -> tuple[list[str], list[list[str]]]:
    """Means over seeds at each look at some trainings."""
    ends = {_place(record) for record in of}
    rows = []
    for group, some in sorted(groups([r for r in cells if _place(r) in ends]).items()):
        for progress in sorted({r["progress"] for r in some}):
            looks = [r for r in some if r["progress"] == progress]
            values = [_entry(name, value, looks) for name, value in measures.items()]
            rows.append([*group[:2], str(group[2]), str(len(looks)), f"{looks[0]['epoch']:.0f}", *values])
    return ["network", "data", "a class", "seeds", "epoch", *measures], rows


def _entry(name: str, value: Callable[[Record], float], some: list[Record]) -> str:
    return spread((value(r) for r in some), 4 if "loss" in name or "edge of" in name else 2)


def _place(record: Record) -> tuple[str, str, int, int]:
    return record["model"], record["data"], int(record["per_class"]), record["seed"]


def _section(every: Claim, by_kind: dict[str, Claim]) -> list[str]:
    """A claim with the verdicts of each kind of network, and its numbers."""
    parts = [f"## {every.title}", "", f"Rule: {every.rule}"]
    for kind, claim in by_kind.items():
        parts += ["", f"{kind[0].upper()}{kind[1:]}: {claim.verdict}"]
        parts += [
            f"{verdict.subject or 'By network'}: {verdict.networks}."
            for verdict in claim.verdicts
            if verdict.networks
        ]
    return [*parts, "", table(every.head, every.rows)]


def dynamics_page(found: xr.Dataset, folder: Path, grid: Grid) -> str:
    """What moves in training and with sample size, as Markdown, with still charts in a folder beside it."""
    found = _same_norm(found)
    cells = of_store(found)
    trained = at_end(cells)
    folder.mkdir(parents=True, exist_ok=True)
    parts = [
        "# What moves with training and sample size",
        "",
        f"{_cells(found, grid)}, the same networks as in [claims.md](claims.md), which says how they are trained. "
        "Charts are those of the page that `deepspectra sweep` writes beside its store, with menus there for all "
        "networks: lines are means over seeds, bands run from the lowest seed to the highest. Progress is the share "
        "of the epochs that are over; the learning rate falls after .33 and .67 of them. The bulk's edge is the "
        "largest eigenvalue without any class or cross-class mean; the bump are the eigenvalues of the interaction, "
        "what cross-class means make beyond class and logit means, the bulk those of the scatter within classes, and "
        "their distance is that of medians (of the whole bulk where its spectrum is computed, up to 33 images a "
        f"class, and of its edge). The Frobenius norm of G, {NORM}, is at every size that of its first {FIRST} "
        "eigenvalues, which are known everywhere; that of R is of all of R, so that their ratio is a little too "
        "large.",
    ]
    for model in dict.fromkeys(r["model"] for r in trained if r["data"] == DRAWN):
        sizes = {int(r["per_class"]) for r in trained if (r["model"], r["data"]) == (model, DRAWN)}
        at = {"model": model, "data": DRAWN, "per_class": max(sizes), "progress": 1}
        save_chart(drawn(found, at, SHOWN), folder / f"{model}.svg")
        against = f"against sample size at the end of training and against progress at {max(sizes)} images a class"
        parts += ["", f"## {model} on {DRAWN}", "", f"![{model}, {against}]({folder.name}/{model}.svg)"]
        parts += [
            "",
            f"{against[0].upper()}{against[1:]}." if len(sizes) > 1 else f"At {max(sizes)} images a class.",
        ]
    rows = [
        [*named(group, some), *(_entry(name, value, some) for name, value in SPECTRA.items())]
        for group, some in groups(trained).items()
    ]
    parts += ["", "## Against sample size, at the end of training", "", table([*HEAD, *SPECTRA], rows)]
    parts += ["", "## Against training", "", table(*_trajectory(cells, trained, SPECTRA))]
    return "\n".join(parts) + "\n"


def _same_norm(found: xr.Dataset) -> xr.Dataset:
    """With the norm of G from as many eigenvalues at every sample size; cells have that of all where they know it."""
    if "value" not in found:
        return found
    (ranks,) = set(found["value"].dims) - set(found.status.dims)
    first = found["value"].isel({ranks: slice(FIRST)})
    return found.assign(norm=(first**2).sum(ranks, min_count=1) ** 0.5)

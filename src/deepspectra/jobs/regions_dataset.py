"""Which part makes which region of a spectrum, as a job: a labelled dataset and a verdict on the claims."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from deepspectra.analysis.regions import REGIONS, WHOLE, Regions, Shifts
from deepspectra.jobs.pages import UNLABELLED, Dataset, Labels, Variables, page_dataset
from deepspectra.problem.problem import Problem

CLAIMS = {  # knock-out → the region that it is said to make
    "class": "outliers",
    "mean + class": "outliers",
    "class + logit": "outliers",
    "cross": "bump",
    "interaction": "bump",
    "within": "bulk",
}
TOLD = ("gradients", "hessian")  # of which the verdict gives numbers
NAMES = {"gradients": "G", "hessian": "H", "features": "features", "errors": "backpropagated errors"}


def regions_dataset(found: Sequence[Regions], problem: Problem, labels: Labels = UNLABELLED) -> Dataset:
    """Every number of `regions`, for one kind of rows or several, by one method."""
    places = [WHOLE, *dict.fromkeys(name for one in found for name in one if len(one) > 1)]
    knockouts = list(dict.fromkeys(name for one in found for name in one.whole.knockouts))
    moved = np.full((len(found), len(places), len(knockouts)), -1, dtype=np.int8)
    values, errors = {}, {}
    for s, one in enumerate(found):
        for place, shifts in _places(one):
            for row, name in enumerate(shifts.knockouts):
                at = (one.of, place, name)
                values[at], errors[at] = shifts.values[row], shifts.standard_errors[row]
                if (most := shifts.moved(name)) is not None:
                    moved[s, places.index(place), knockouts.index(name)] = REGIONS.index(most)
    variables: Variables = {
        "region_missed": (("spectrum",), {one.of: one.missed for one in found}),
        "region_shift": (("spectrum", "place", "removed", "region"), values),
        "region_shift_error": (("spectrum", "place", "removed", "region"), errors),
        "region_moved": (("spectrum", "place", "removed"), moved),
    }
    coords = {
        "spectrum": [one.of for one in found],
        "place": places,
        "removed": knockouts,
        "region": list(REGIONS),
    }
    seconds = sum(one.seconds for one in found)
    dataset = page_dataset(variables, coords, problem, labels, "Regions of the spectra of", sentences(found), seconds)
    dataset.attrs["method"] = found[0].method
    return dataset


def _places(found: Regions) -> Iterator[tuple[str, Shifts]]:
    """All layers together, and each by itself if there are several."""
    yield WHOLE, found.whole
    if len(found) > 1:
        yield from found.items()


def sentences(found: Sequence[Regions]) -> list[str]:
    """The verdict: which claims hold in each kind of spectrum, by how much, and in how many layers."""
    lines = []
    for one in found:
        verdicts: dict[str, list[str]] = {"holds": [], "does not": [], "is open": []}
        for name, region in judged_of(one):
            made = one.whole.makes(name, region)
            verdict = "is open" if made is None else "holds" if made else "does not"
            verdicts[verdict].append(f"{region} ← {name}")
        said = [f"{verdict}: {', '.join(claims)}" for verdict, claims in verdicts.items() if claims]
        lines.append(f"Of {NAMES[one.of]} {'; '.join(said)}.")
    if all(bool(one.whole.standard_errors.isnan().all()) for one in found):
        lines.append("No examples were left out, so nothing says how sure this is.")
    for one in found:
        if one.of in TOLD:
            removed = [name for name in ("class", "class + logit", "within") if name in one.whole.knockouts]
            measured = "; ".join(_moves(one.whole, name) for name in removed)
            lines.append(f"Outliers, bump and bulk of {NAMES[one.of]} move, in decades of λ, without {measured}.")
        if len(one) > 1 and one.of != "features":
            counts = ", ".join(
                f"{region} ← {name} in {sum(bool(some.makes(name, region)) for some in there)} of {len(there)}"
                for name, region, there in (
                    (name, region, [some for some in one.values() if not math.isnan(some.of(name, region))])
                    for name, region in judged_of(one)
                )
            )
            lines.append(f"In layers' {one.of} {counts}.")
        if one.missed:
            lines.append(f"Each outlier of H is known to {one.missed:.1%}.")
    return lines


def judged_of(found: Regions) -> list[tuple[str, str]]:
    """The claims on these spectra: what is knocked out, and the region it is said to make."""
    return [(name, region) for name, region in CLAIMS.items() if name in found.whole.knockouts]


def _moves(shifts: Shifts, name: str) -> str:
    values = [shifts.of(name, region) for region in REGIONS]
    moved = ", ".join("–" if math.isnan(value) else f"{value:.2f}" for value in values)
    return f"{name} by {moved}"

"""What is saved of regions is what was found."""

from __future__ import annotations

import math
import re

import pytest

import deepspectra as ds
from deepspectra.jobs.pages import Labels
from deepspectra.jobs.regions_dataset import CLAIMS, regions_dataset, sentences
from reference import case_and_reference


def test_the_dataset_and_the_verdict_are_the_shifts() -> None:
    case, _ = case_and_reference("relu_mlp")
    problem = case.problem()
    found = [ds.regions(problem, of, num_groups=3) for of in ("gradients", "hessian", "features")]
    dataset = regions_dataset(found, problem, Labels("small", "noise", seed=1))
    layers = list(found[0])
    assert list(dataset["place"].values) == ["all layers", *layers]
    gradients, hessian, features = found
    for one, place, shifts in (
        (gradients, "all layers", gradients.whole),
        (gradients, layers[1], gradients[layers[1]]),
        (hessian, "all layers", hessian.whole),
        (features, layers[0], features[layers[0]]),
    ):
        for name in shifts.knockouts:
            saved = dataset.sel(spectrum=one.of, place=place, removed=name)
            row = shifts.knockouts.index(name)
            assert saved["region_shift"].values == pytest.approx(shifts.values[row].numpy(), nan_ok=True)
            errors = shifts.standard_errors[row].numpy()
            assert saved["region_shift_error"].values == pytest.approx(errors, nan_ok=True)
            most = shifts.moved(name)
            assert int(saved["region_moved"]) == (-1 if most is None else shifts.regions.index(most))
    assert bool(dataset["region_shift"].sel(spectrum="hessian", place=layers[0]).isnull().all())
    said = sentences(found)
    for one, sentence in zip(found, said, strict=False):
        judged = {name: region for name, region in CLAIMS.items() if name in one.whole.knockouts}
        for name, region in judged.items():
            verdict = {None: "is open", True: "holds", False: "does not"}[one.whole.makes(name, region)]
            claims = next(part for part in sentence.split("; ") if f"{verdict}: " in part)
            assert f"{region} ← {name}" in re.split(": |, ", claims.rstrip("."))
    assert dataset.attrs["verdict"] == " ".join(said)
    assert sum("move, in decades of λ" in sentence for sentence in said) == 2
    (counted,) = (sentence for sentence in said if sentence.startswith("In layers' gradients"))
    there = [shifts for shifts in gradients.values() if not math.isnan(shifts.of("within", "bulk"))]
    held = sum(shifts.makes("within", "bulk") is True for shifts in there)
    assert f"bulk ← within in {held} of {len(there)}" in counted
    assert dataset["region_missed"].values.tolist() == [0, pytest.approx(hessian.missed), 0]
    alone = [ds.regions(problem, num_groups=0)]
    assert "nothing says how sure" in regions_dataset(alone, problem).attrs["verdict"]

"""The comparison of two networks as a job: a labelled dataset of its curves, its verdict and its report."""

from __future__ import annotations

import numpy as np
import xarray as xr

from deepspectra.analysis.compare import Comparison
from deepspectra.jobs.pages import page_attributes
from deepspectra.problem.problem import Problem

CURVES = ("measured", "kronecker", "predicted", "baseline")


def comparison_dataset(
    found: Comparison, problem: Problem, *, model: str = "", data: str = "", seed: int = 0
) -> xr.Dataset:
    """Every number of `compare` with its dimensions named; `docs/file-format.md` describes it.

    Args:
        found: of `compare`.
        problem: the first of the two.
        model: its name, for the report.
        data: its name, for the report.
        seed: of random vectors, for the report.
    """
    most = max(len(layer.ks) for layer in found.values())
    curves = np.full((len(found), len(CURVES), most), np.nan)
    for j, layer in enumerate(found.values()):
        for i, name in enumerate(CURVES):
            curves[j, i, : len(layer.ks)] = getattr(layer, name)
    variables = {
        "overlap_curve": (("layer", "curve", "dimension"), curves),
        "overlap_whole": (("whole_dimension",), found.whole.numpy()),
        "layer_outputs": (("layer",), np.array([layer.outputs for layer in found.values()])),
        "layer_alignment": (("layer",), np.array([layer.alignment for layer in found.values()])),
    }
    coords = {
        "layer": [layer.name or "(model)" for layer in found.values()],
        "curve": list(CURVES),
        "dimension": np.arange(1, most + 1),
        "whole_dimension": np.arange(1, len(found.whole) + 1),
    }
    attributes = page_attributes(
        problem,
        verdict=" ".join(sentences(found)),
        subject="Two trainings of",
        model=model,
        data=data,
        seed=seed,
        seconds=found.seconds,
    )
    return xr.Dataset(variables, coords=coords, attrs=attributes)


def sentences(found: Comparison) -> list[str]:
    """The verdict: the highest overlap, against chance and against the prediction."""
    best = max(found.values(), key=lambda layer: layer.peak[1])
    place, height = best.peak
    chance = height / float(best.baseline[place - 1])
    foreseen, foreseen_height = best.predicted_peak
    off = [abs(layer.peak[1] - layer.predicted_peak[1]) for layer in found.values()]
    lines = [
        f"The two networks share most in {best.name or 'the model'}: their top {place} eigenvectors overlap by "
        f"{height:.2f}, {chance:.0f} times what random subspaces do.",
        f"Predicted from the spectra of the factors: {foreseen_height:.2f} at {foreseen}; over {len(found)} layers "
        f"the predicted heights are off by {sum(off) / len(off):.2f} on average.",
    ]
    if len(found.whole):
        lines.append(
            f"Over all parameters the top {len(found.whole)} overlap by {float(found.whole[-1]):.3f}."
        )
    return lines

"""The comparison of two networks as a job: a labelled dataset of its curves, and its verdict."""

from __future__ import annotations

import numpy as np

from deepspectra.analysis.compare import Comparison
from deepspectra.jobs.pages import UNLABELLED, Dataset, Labels, page_dataset
from deepspectra.problem.problem import Problem

CURVES = ("measured", "kronecker", "predicted", "baseline")


def comparison_dataset(found: Comparison, problem: Problem, labels: Labels = UNLABELLED) -> Dataset:
    """Every number of `compare`; `problem` is the first of the two."""
    curves = {(name, curve): getattr(layer, curve) for name, layer in found.items() for curve in CURVES}
    variables = {
        "overlap_curve": (("layer", "curve", "dimension"), curves),
        "overlap_whole": (("whole_dimension",), found.whole.numpy()),
        "layer_outputs": (("layer",), np.array([layer.outputs for layer in found.values()])),
        "layer_alignment": (("layer",), {name: layer.alignment for name, layer in found.items()}),
    }
    coords = {
        "layer": list(found),
        "curve": list(CURVES),
        "dimension": range(1, max(map(len, curves.values())) + 1),
        "whole_dimension": range(1, len(found.whole) + 1),
    }
    return page_dataset(variables, coords, problem, labels, "Two trainings of", sentences(found), found.seconds)


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
        lines.append(f"Over all parameters the top {len(found.whole)} overlap by {float(found.whole[-1]):.3f}.")
    return lines

"""What an analysis keeps of tails: verdicts, and a line that is the density of the power law."""

import itertools
import types

import numpy as np
import pytest
import torch

from deepspectra.algorithms.dense_spectrum import of_all
from deepspectra.jobs.tails import judged_tails
from deepspectra.results import Provenance


def findings(values):
    density = of_all(values, Provenance("Hessian", len(values), "float64", "cpu", None))
    problem = types.SimpleNamespace(num_parameters=len(values))
    return types.SimpleNamespace(
        densities={"hessian": density}, spectrum=lambda _: (density, 0.0), problem=problem, seed=0
    )


def test_the_line_of_a_power_law_lies_on_the_density_per_decade():
    generator = torch.Generator().manual_seed(0)
    alpha, num = 2.5, 2000
    sizes = 1e-3 * torch.rand(num, generator=generator, dtype=torch.float64) ** (-1 / (alpha - 1))
    signs = torch.where(torch.rand(num, generator=generator) < 0.5, 1.0, -1.0)
    judged = judged_tails(findings(sizes * signs), {"hessian": 0.2})
    assert {side for _, side in judged} == {"magnitude", "positive", "negative"}
    whole = judged["hessian", "magnitude"]
    assert whole["verdict"] == "power law"
    assert whole["exponent_low"] < alpha < whole["exponent_high"]
    assert whole["end"] == pytest.approx(float(sizes[sizes <= 0.2].max()))
    at = np.geomspace(whole["start"], 10 * whole["start"], 6)
    slope = np.log(whole["density_at_end"] / whole["density_at_start"]) / np.log(whole["end"] / whole["start"])
    for low, high in itertools.pairwise(at):
        drawn = whole["density_at_start"] * (np.sqrt(low * high) / whole["start"]) ** slope
        inside = ((sizes > low) & (sizes <= high)).double().mean() / np.log10(high / low)
        assert float(inside) == pytest.approx(drawn, rel=0.25)


def test_a_side_without_eigenvalues_is_left_out():
    values = torch.linspace(0.1, 1, 300, dtype=torch.float64)
    judged = judged_tails(findings(values), {})
    assert set(judged) == {("hessian", "magnitude"), ("hessian", "positive")}

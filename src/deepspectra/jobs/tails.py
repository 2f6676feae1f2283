"""The laws of the spectra's tails, as an analysis keeps and tells them."""

from __future__ import annotations

import math
from collections.abc import Mapping

from deepspectra.analysis.tail import Side, Tail, tail
from deepspectra.errors import DataError
from deepspectra.jobs.findings import Findings, TestedTail


def judged_tails(found: Findings, above: Mapping[str, float]) -> dict[tuple[str, str], TestedTail]:
    """Of H and R by size and on each side of zero, and of G, which has one; eigenvalues `above` are outliers."""
    judged: dict[tuple[str, str], TestedTail] = {}
    sides: tuple[Side, ...] = ("magnitude", "positive", "negative")
    for name in found.densities:
        if (spectrum := found.spectrum(name)) is None:
            continue
        for side in sides[:1] if name == "gauss_newton" else sides:
            limit = math.inf if side == "negative" else above.get(name, math.inf)
            try:
                one = tail(spectrum[0], side=side, above=limit, seed=found.seed)
            except DataError:  # none on that side
                continue
            nodes = spectrum[0].nodes * {"negative": -1, "positive": 1}.get(side, 1)
            sizes = nodes.abs() if side == "magnitude" else nodes
            judged[name, side] = _kept(one, float(sizes[sizes <= limit].max()), found.problem.num_parameters)
    return judged


def _kept(one: Tail, end: float, size: int) -> TestedTail:
    """Its verdict, and the power law as a line in double logarithms: densities per decade at its ends."""
    law = one.power_law
    share = law.num_tail / size
    start = math.log(10) * (law.exponent - 1) * share  # per decade of x, at x_min
    return {
        "verdict": one.verdict,
        "why": one.why,
        "exponent": law.exponent,
        "exponent_low": law.low,
        "exponent_high": law.high,
        "p_value": law.p_value,
        "start": law.x_min,
        "end": end,
        "density_at_start": start,
        "density_at_end": start * (end / law.x_min) ** (1 - law.exponent),
    }

"""Histograms of a spectrum: bins as narrow as what is known of it allows, with the least and most they can hold."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from deepspectra.quadrature import Density

Array = NDArray[np.float64]

VIEWS = ("linear", "signed", "magnitude")
ACROSS = 200  # bins of a linear axis, about
PER_DECADE = 8  # of a logarithmic one
SMALLEST = 1e-6  # of an operator's largest |λ|: what is drawn on logarithmic axes
MEANT = 1.0  # width of a band, in units of the mass it is of, up to which a bin is known
ENOUGH = 6  # eigenvalues in a bin of more than one cell of the lattice,
SPARSE = 1 / 3  # and for each of its cells
NARROW = 1e-4  # of each cell of a bin that is known: of two such bins the narrower is taken
DEAR = 1e-3  # of a bin that is neither known nor empty, in units of one that is: the fewer the better
SLACK = 1e-9  # of a cell, for rounding
LESS_THAN_ONE = 0.5  # eigenvalue at most: a bin holds none


class Bins(NamedTuple):
    """Bins (n,) of a spectrum side by side, and the share of all eigenvalues in each.

    Attributes:
        start, end: in λ, or in |λ|.
        mass: the estimate.
        low, high: between which the share lies.
    """

    start: Array
    end: Array
    mass: Array
    low: Array
    high: Array


def binned(density: Density, view: str, zeros: float = 0.0, reach: float | None = None) -> Bins:
    """The bins of a density, as many as are known of a lattice's; where none is, as few as can be.

    Args:
        density: without values that are zero up to rounding, but for a node at 0.
        view: "linear" (λ), "signed" (λ, bins even in log |λ| on either side of those about zero) or "magnitude" (|λ|,
            likewise).
        zeros: share of eigenvalues that are known to be zero, which no bin has.
        reach: of the linear axis, if others share it; by default from the smallest to the largest node.

    The band is that of the distribution function at both ends of a bin: what one probe and few moments leave open.
    """
    edges = _lattice(density, view, reach)
    mass, low, high = _cumulative(density, edges, view)
    size = density.size
    # [i, j] of the bin from edge i to edge j.
    masses, least, most = (
        upper[None, :] - lower[:, None] for upper, lower in ((mass, mass), (low, high), (high, low))
    )
    about_zero = np.outer(edges <= 0, edges > 0) * zeros
    masses, least, most = (np.clip(one - about_zero, 0, None) for one in (masses, least, most))
    cells = np.subtract.outer(np.arange(len(edges)), np.arange(len(edges))).T
    known, counts = most - least <= MEANT * masses, size * masses
    score = np.where(known & (counts >= ENOUGH) & (counts >= SPARSE * cells), 1.0, -DEAR)
    score = np.where(known & (cells == 1) | (size * most < LESS_THAN_ONE), np.maximum(score, 0.0), score)
    score = np.where(score > 0, score - NARROW * cells, score)
    best, before = np.zeros(len(edges)), np.zeros(len(edges), dtype=int)
    for j in range(1, len(edges)):
        scores = best[:j] + score[:j, j]
        before[j] = int(scores.argmax())
        best[j] = scores[before[j]]
    chosen = [len(edges) - 1]
    while chosen[-1]:
        chosen.append(int(before[chosen[-1]]))
    starts, ends = np.array(chosen[:0:-1]), np.array(chosen[-2::-1])
    empty = size * most[starts, ends] < LESS_THAN_ONE
    masses, least, most = (np.where(empty, 0.0, one[starts, ends]) for one in (masses, least, most))
    return Bins(edges[starts], edges[ends], masses, least, most)


def _lattice(density: Density, view: str, reach: float | None) -> Array:
    """The finest edges: those of a linear axis with zero amid a bin, else powers of ten and steps between them."""
    low, high = (float(value) for value in density.nodes.aminmax())
    largest = max(-low, high)
    if view == "linear":
        step = _round((reach or high - low) / ACROSS or largest)
        first, last = math.ceil(low / step - 0.5 - SLACK), math.ceil(high / step - 0.5 + SLACK)
        edges: Array = step * (np.arange(first, last + 2, dtype=np.float64) - 0.5)
        return edges if low < 0 else np.append(0.0, edges[edges > 0])
    first = math.floor(PER_DECADE * math.log10(SMALLEST * largest))
    sides = {}
    for name, end in (("negative", -low), ("positive", high)):
        last = 1 + math.floor(PER_DECADE * math.log10(end) + SLACK) if end > 0 else first
        sides[name] = 10.0 ** (np.arange(first, max(last, first) + 1) / PER_DECADE)
    found: Array = np.append(-sides["negative"][::-1], sides["positive"])
    return found if view == "signed" else np.append(0.0, max(sides.values(), key=len))


def _round(value: float) -> float:
    """The next of 1, 2, 5, 10, … from below."""
    power = 10.0 ** math.floor(math.log10(value))
    return max(factor for factor in (1, 2, 5) if factor * power <= value * (1 + 1e-9)) * power


def _cumulative(density: Density, edges: Array, view: str) -> tuple[Array, Array, Array]:
    """The mass up to each edge, below it at zero, and its band."""
    at = torch.from_numpy(np.where(edges == 0, -np.finfo(np.float64).tiny, edges))
    mass, (low, high) = density.cdf(at), density.cdf_band(at)
    if view == "magnitude":
        below = -at.abs().nextafter(2 * at.abs())  # −|λ| itself counts
        under, (least, most) = density.cdf(below), density.cdf_band(below)
        mass, low, high = mass - under, (low - most).clamp_min(0), high - least
        mass[0] = low[0] = high[0] = 0
    return mass.numpy(), low.numpy(), high.numpy()

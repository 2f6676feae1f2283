"""The laws of a bulk are the textbook densities, and p is that of eigenvalues that repel."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.linalg import eigvalsh_tridiagonal

from deepspectra.analysis.bulk_laws import Sample, fit_bulk_law


def test_the_bulk_laws_are_the_textbook_densities() -> None:
    """Quantiles of the densities are nowhere further off than their spacing."""
    share = (np.arange(400) + 0.5) / 400
    for ratio in (0.1, 0.5, 1.0):
        low, high = 3 * (1 - math.sqrt(ratio)) ** 2, 3 * (1 + math.sqrt(ratio)) ** 2

        def angle(t: float, low: float = low, high: float = high, ratio: float = ratio) -> float:
            x = (low + high) / 2 - (high - low) / 2 * math.cos(t)
            density = math.sqrt((high - x) * (x - low)) / (2 * math.pi * 3 * ratio * x)
            return density * (high - low) / 2 * math.sin(t)

        angles = np.linspace(1e-9, math.pi - 1e-9, 401)
        mass = np.concatenate([[0], np.cumsum([quad(angle, a, b)[0] for a, b in pairwise(angles)])])
        assert mass[-1] == pytest.approx(1, abs=1e-6)
        values = (low + high) / 2 - (high - low) / 2 * np.cos(np.interp(share, mass, angles))
        law = fit_bulk_law("Marchenko-Pastur", Sample(values, np.ones(400)))
        assert law.distance < 1 / 400
        assert law.ratio == pytest.approx(ratio, abs=0.005)
        assert law.centre == pytest.approx(3, rel=0.01)
        assert (law.low, law.high) == pytest.approx((low, high), abs=0.05)
    angles = np.linspace(0, math.pi, 5001)
    mass = (angles - np.sin(angles) * np.cos(angles)) / math.pi
    law = fit_bulk_law("semicircle", Sample(5 - 2 * np.cos(np.interp(share, mass, angles)), np.ones(400)))
    assert law.distance < 1 / 400
    assert (law.low, law.high) == pytest.approx((3, 7), abs=0.01)


def test_p_of_a_bulk_law_is_that_of_eigenvalues_that_repel() -> None:
    """Of tridiagonal models (Dumitriu and Edelman 2002): as many below a level as it says."""
    rng, found = np.random.default_rng(0), []
    for size in (80, 400):
        for k in range(150):
            below = rng.chisquare(np.arange(size - 1, 0, -1))
            if k % 2:
                values = eigvalsh_tridiagonal(rng.normal(0, math.sqrt(2), size), np.sqrt(below))
                law = fit_bulk_law("semicircle", Sample(values, np.ones(size)))
            else:
                squares = rng.chisquare(2 * size - np.arange(size))
                diagonal = squares + np.concatenate([[0], below])
                values = eigvalsh_tridiagonal(diagonal, np.sqrt(squares[:-1] * below))
                law = fit_bulk_law("Marchenko-Pastur", Sample(values, np.ones(size)))
            found.append(law.p_value)
    shares = [float(np.mean(np.array(found) < level)) for level in (0.05, 0.2, 0.5, 0.8)]
    assert shares == pytest.approx([0.05, 0.2, 0.5, 0.8], abs=0.09)

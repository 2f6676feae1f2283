"""Chebyshev, Markov and Stieltjes' inequalities, on discrete measures that are known."""

import numpy as np
import pytest

from deepspectra.moment_bounds import Jacobi


def measures(num=60):
    """Atoms of both signs, some over many decades, with random weights; how many polynomials; where to ask."""
    rng = np.random.default_rng(0)
    for j in range(num):
        size = int(rng.integers(5, 150))
        atoms = np.sort(rng.standard_normal(size) * np.exp(3 * rng.standard_normal(size) * (j % 2)))
        weights = rng.standard_exponential(size)
        beside = rng.choice(atoms, 50) * (1 + 0.1 * rng.standard_normal(50))
        between = (atoms[1:] + atoms[:-1]) / 2
        yield atoms, weights / weights.sum(), int(rng.integers(1, min(size, 40))), np.append(beside, between)


def test_no_measure_of_the_same_moments_leaves_the_bounds():
    """Nor do its Gauss quadrature and the measure itself differ by more than Christoffel's function."""
    for atoms, weights, count, x in measures():
        jacobi = Jacobi.of(atoms, weights, count)
        low, high = jacobi.mass_below(x)
        truth = (weights * (atoms <= x[:, None])).sum(1)
        assert bool((low <= truth + 1e-9).all() and (truth <= high + 1e-9).all())
        assert bool((high - low <= 2 * jacobi.christoffel(x) + 1e-9).all())


def test_the_bounds_are_nearly_the_closest_there_are():
    """They cannot be closer than Christoffel's function, the mass that a node at x may have."""
    closest, found = 0.0, 0.0
    for atoms, weights, count, x in measures():
        jacobi = Jacobi.of(atoms, weights, count)
        low, high = jacobi.mass_below(x)
        closest += float(jacobi.christoffel(x).mean())
        found += float((high - low).mean())
    assert closest < found < 1.25 * closest


def test_the_recurrence_gives_back_the_moments():
    rng = np.random.default_rng(1)
    atoms, weights = rng.standard_normal(40), rng.standard_exponential(40)
    jacobi = Jacobi.of(atoms, weights, 6)
    nodes, vectors = np.linalg.eigh(np.diag(jacobi.diagonal) + np.diag(jacobi.beside, 1) + np.diag(jacobi.beside, -1))
    for degree in range(12):
        moment = float(jacobi.mass * vectors[0] ** 2 @ nodes**degree)
        assert moment == pytest.approx(float(weights @ atoms**degree), rel=1e-10, abs=1e-10)


def test_bounds_rise_and_hold_far_from_the_spectrum():
    jacobi = Jacobi.of(np.linspace(-1, 1, 30), np.full(30, 1 / 30), 10)
    x = np.concatenate([[-1e300, -50], np.linspace(-1.2, 1.2, 400), [50, 1e300]])
    low, high = jacobi.mass_below(x)
    assert bool((np.diff(low) >= 0).all() and (np.diff(high) >= 0).all())
    assert (low[1], high[1]) == pytest.approx((0, 0), abs=1e-12)
    assert (low[-2], high[-2]) == pytest.approx((1, 1), abs=1e-12)


def test_christoffels_function_is_the_least_square_of_a_polynomial_that_is_one_there():
    rng = np.random.default_rng(2)
    nodes, weights = np.linspace(-1, 1, 40), rng.random(40)
    powers = nodes[:, None] ** np.arange(6)
    gram = powers.T @ (weights[:, None] * powers)
    expected = 1 / np.linalg.inv(gram)[0, 0]
    assert Jacobi.of(nodes, weights, 6).christoffel(np.zeros(1))[0] == pytest.approx(expected, rel=1e-9)

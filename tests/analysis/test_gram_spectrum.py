"""Gradients held as features and errors, and the exact spectra of G and its parts that follow."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import deepspectra as ds
from deepspectra.analysis.gram_spectrum import gradient_pairs, gradient_spectrum
from deepspectra.errors import LossError, OptionError
from deepspectra.operators.parts import decompose
from nets import CASES, CLASSIFICATION, chunks, labels
from reference import case_and_reference, descending, error, same_spectrum

FOUR = ("class", "cross", "within", "true")


FIVE = ("class", "logit", "interaction", "within", "true")


def test_one_dead_unit_and_one_example_a_batch() -> None:
    """Zero errors say nothing about the order of examples, and one example has only one."""
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    with torch.no_grad():
        model[0].bias[0] = -100.0
    x, y = torch.randn(7, 4, dtype=torch.float64), labels(7, 3)
    problem = ds.Problem(model, chunks(x, y, [1] * 7))
    assert same_spectrum(
        ds.gram_spectrum(problem).values,
        ds.GaussNewton(problem).dense(),
        float(ds.GaussNewton(problem).dense().norm()),
    )


# ------------------------------------------------------------------------------------------------- spectra


@pytest.mark.parametrize("name", CLASSIFICATION)
@pytest.mark.parametrize(("effects", "names"), [("four-way", FOUR), ("two-way", FIVE)])
def test_the_exact_spectrum_is_that_of_the_dense_matrices(
    name: str, effects: str, names: tuple[str, ...]
) -> None:
    case, ref = case_and_reference(name)
    found = ds.gram_spectrum(case.problem(), effects=effects)
    scale = float(descending(ref.gauss_newton)[0])
    assert found.part_names == names
    assert same_spectrum(found.values, ref.gauss_newton, scale)
    for part in names:
        assert same_spectrum(found.parts[part], ref.parts[part], scale)
    assert float(found.traces.sum()) == pytest.approx(float(ref.gauss_newton.trace()), rel=1e-10)


@pytest.mark.parametrize("name", ["ragged", "conv_batchnorm"])
def test_shares_are_quadratic_forms_of_eigenvectors(name: str) -> None:
    case, ref = case_and_reference(name)
    found = ds.gram_spectrum(case.problem(), effects="two-way")
    values, vectors = torch.linalg.eigh(ref.gauss_newton)
    for j in range(3):
        u = vectors[:, -1 - j]
        expected = torch.stack([u @ ref.parts[part] @ u for part in FIVE]) / values[-1 - j]
        assert error(found.shares[j], expected) < 1e-8
    real = found.shares.isfinite().all(1)
    assert (found.shares[real].sum(1) - 1).abs().max() < 1e-6


@pytest.mark.parametrize("name", ["relu_mlp", "conv_pool"])
def test_pairs_are_eigenpairs_with_true_residual_bounds(name: str) -> None:
    case, ref = case_and_reference(name)
    parts = decompose(case.problem(), effects="two-way", hold=True)
    pairs = gradient_pairs(gradient_spectrum(parts), parts, 4, 0.0)
    missed = ref.gauss_newton @ pairs.vectors - pairs.vectors * pairs.values
    assert error(pairs.values, descending(ref.gauss_newton)[:4]) < 1e-12
    assert missed.norm(dim=0).max() < 1e-10
    assert (pairs.vectors.T @ pairs.vectors - torch.eye(4)).abs().max() < 1e-10
    assert bool(pairs.converged)


def test_a_wrong_gram_matrix_is_seen_in_the_residuals(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = decompose(CASES["relu_mlp"]().problem(), hold=True)
    true = parts.rows.gram()  # type: ignore[union-attr]
    monkeypatch.setattr(
        parts.rows, "gram", lambda: true + torch.diag(torch.linspace(0, 0.1, len(true))).to(true)
    )
    pairs = gradient_pairs(gradient_spectrum(parts), parts, 3, 0.0)
    assert float(pairs.residual_norms.min()) > 1e-3


def test_more_rows_than_parameters_leaves_all_eigenvalues() -> None:
    x, y = torch.randn(60, 2, dtype=torch.float64), labels(60, 3)
    problem = ds.Problem(nn.Linear(2, 3).double(), (x, y))
    found = ds.gram_spectrum(problem)
    assert len(found.values) == problem.num_parameters == 9
    assert same_spectrum(found.values, ds.GaussNewton(problem).dense(), float(found.values[0]))
    assert found.density.weights.sum().item() == pytest.approx(1)


def test_float32_problems_are_computed_in_float64() -> None:
    problem = CASES["relu_mlp"](torch.float32).problem()
    double = ds.gram_spectrum(problem)
    assert double.provenance.dtype == "float64"
    assert same_spectrum(
        double.values, ds.GaussNewton(problem.to(torch.float64)).dense(), float(double.values[0])
    )
    single = ds.gram_spectrum(problem, dtype=torch.float32)
    assert error(single.values[:5], double.values[:5]) < 1e-5
    assert problem.to(torch.float32) is problem
    assert problem.to(torch.float64).gradient().dtype == torch.float64


def test_the_density_is_exact() -> None:
    case, ref = case_and_reference("relu_mlp")
    found = ds.gram_spectrum(case.problem())
    density, values = found.density, descending(ref.gauss_newton)
    assert density.mean * density.size == pytest.approx(float(values.sum()), rel=1e-10)
    assert density.mean_standard_error == 0
    middle = float(values[3] + values[4]) / 2
    assert density.count_above(middle) == (pytest.approx(4), 0)
    assert density.cdf(middle) == pytest.approx(1 - 4 / len(values))
    assert density.weights.sum().item() == pytest.approx(1)
    for scale in ("linear", "log"):
        curve = density.smooth(scale, sign=1)
        assert curve.density.isfinite().all()
        assert float(curve.standard_error.max()) == 0
        where = curve.grid.log10() if scale == "log" else curve.grid
        assert float(torch.trapezoid(curve.density, where)) == pytest.approx(curve.mass, rel=1e-2)
    assert "exact" in str(density)


def test_the_density_agrees_with_random_probes() -> None:
    problem = CASES["conv_pool"]().problem()
    exact = ds.gram_spectrum(problem).density
    probed = ds.density(ds.GaussNewton(problem), num_probes=40, num_steps=20)
    assert abs(probed.mean - exact.mean) < 4 * probed.mean_standard_error + 1e-12 * exact.mean


def test_text_and_errors() -> None:
    case, _ = case_and_reference("relu_mlp")
    found = ds.gram_spectrum(case.problem())
    assert "within" in str(found)
    assert f"{len(found.values)} of" in str(found)
    with pytest.raises(OptionError, match="method='both'"):
        found.knockout("class", method="both")
    for wrong in ((), ("logit",)):
        with pytest.raises(OptionError, match="name some of class, cross, true, means, within"):
            found.knockout(*wrong)
    with pytest.raises(OptionError, match="name some of class, cross, true, means"):
        found.knockout("within", method="projection")
    with pytest.raises(LossError, match="class structure needs"):
        ds.gram_spectrum(CASES["mse_module"]().problem())
    assert math.isclose(float(found.shares[0].sum()), 1)

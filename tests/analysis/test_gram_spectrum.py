"""Gradients held as features and errors, and the exact spectra of G and its parts that follow."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import deepspectra as ds
from deepspectra.analysis.gram_spectrum import (
    RowGram,
    gradient_pairs,
    gradient_spectrum,
    gradient_trace,
    nonzero_density,
)
from deepspectra.errors import LossError, OptionError
from deepspectra.operators.parts import decompose
from deepspectra.rows.gradients import GradientRows
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


@pytest.mark.parametrize("name", CLASSIFICATION)
@pytest.mark.parametrize(("effects", "names"), [("four-way", FOUR), ("two-way", FIVE)])
def test_the_exact_spectrum_is_that_of_the_dense_matrices(name: str, effects: str, names: tuple[str, ...]) -> None:
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
    monkeypatch.setattr(parts.rows, "gram", lambda: true + torch.diag(torch.linspace(0, 0.1, len(true))).to(true))
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
    assert same_spectrum(double.values, ds.GaussNewton(problem.to(torch.float64)).dense(), float(double.values[0]))
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


@pytest.mark.parametrize("name", CLASSIFICATION)
def test_the_sum_of_all_squared_gradients_is_the_trace_of_g(name):
    case, ref = case_and_reference(name)
    trace, error = gradient_trace(case.problem())
    assert error == 0
    assert trace == pytest.approx(float(ref.gauss_newton.trace()), rel=1e-9)


@pytest.mark.parametrize("name", ["relu_mlp", "absent_class", "every_option", "conv_pool"])
def test_the_gram_matrix_has_the_non_zero_spectrum(name):
    case, ref = case_and_reference(name)
    gram = RowGram(GradientRows(case.problem()))
    dense = gram.dense()
    torch.testing.assert_close(dense, dense.T)
    num = min(len(dense), len(ref.gauss_newton))
    found, expected = (torch.linalg.eigvalsh(one).flip(0)[:num] for one in (dense, ref.gauss_newton))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12 * float(expected[0]))


def test_of_many_classes_random_sums_tell_the_trace_with_its_error():
    """A convolution, a table of embeddings and a matrix used twice; over seeds the error is that which is said."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.twice, self.out = nn.Conv1d(3, 4, 3, padding=1), nn.Linear(4, 4), nn.Linear(4, 30)

        def forward(self, x):
            hidden = torch.tanh(self.conv(x)).mean(2)
            return self.out(torch.tanh(self.twice(torch.tanh(self.twice(hidden)))))

    torch.manual_seed(0)
    problem = ds.Problem(Net().double(), (torch.randn(50, 3, 6).double(), torch.arange(50) % 30))
    exact = float(ds.GaussNewton(problem).dense().trace())
    found = torch.tensor([gradient_trace(problem, seed) for seed in range(12)], dtype=torch.float64)
    assert (found[:, 1] > 0).all()
    assert abs(found[:, 0] - exact).max() < 0.1 * exact
    off = (found[:, 0] - exact) / found[:, 1]  # Student's t of 15 degrees of freedom
    assert 0.6 < float(off.std()) < 1.6
    assert abs(float(off.mean())) < 4 / math.sqrt(12)


def test_inner_products_and_formed_gradients_square_the_same(monkeypatch):
    case, _ = case_and_reference("conv_pool")
    found = []
    for inner in (True, False):
        monkeypatch.setattr("deepspectra.analysis.gram_spectrum._prefers_inner", lambda _, inner=inner: inner)
        found.append(gradient_trace(case.problem())[0])
    assert found[0] == pytest.approx(found[1], rel=1e-12)


@pytest.mark.parametrize("num", [1, 3, 12])
def test_its_density_is_that_of_g_with_the_zeros_that_are_known(num):
    """Whatever pairs are taken out first, and if some of them are of eigenvalue zero."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3)).double()
    problem = ds.Problem(net, (torch.randn(5, 6).double(), torch.arange(5) % 3))  # 10 rows, 93 parameters
    matrix = ds.GaussNewton(problem).dense()
    values, vectors = torch.linalg.eigh(matrix)
    pairs = ds.eigenpairs(matrix, num)
    top, u = values.flip(0)[:num].clamp_min(0), vectors.flip(1)[:, :num]
    pairs = type(pairs)(
        **{
            **vars(pairs),
            "values": top,
            "vectors": u,
            "residual_norms": torch.zeros_like(top),
        }
    )
    gram = RowGram(GradientRows(problem))
    rows = gram.reduced(gram.rows.apply(u))
    rows = rows / rows.norm(dim=0).clamp_min(1e-300)
    found = nonzero_density(gram, pairs, rows, 3, 10, seed=1)
    assert found.size == 93
    assert float(found.weights.sum()) == pytest.approx(1, abs=1e-12)
    assert float(found.weights[found.nodes == 0].sum()) == pytest.approx(83 / 93, abs=1e-12)
    assert found.mean * 93 == pytest.approx(float(matrix.trace()), rel=1e-9)
    for x in torch.logspace(-4, 0, 9, dtype=torch.float64) * values[-1]:
        assert found.cdf(float(x)) == pytest.approx(float((values <= x).double().mean()), abs=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_bands_of_its_density_count_every_zero(seed):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 3)).double()
    problem = ds.Problem(net, (torch.randn(100, 20).double(), torch.arange(100) % 3))  # 200 rows, 723 parameters
    values = torch.linalg.eigvalsh(ds.GaussNewton(problem).dense())
    pairs = ds.eigenpairs(ds.GaussNewton(problem), 5)
    gram = RowGram(GradientRows(problem))
    rows = gram.reduced(gram.rows.apply(pairs.vectors))
    found = nonzero_density(gram, pairs, rows / rows.norm(dim=0), 4, 24, seed=seed)
    x = torch.tensor([-1.0, 0.0, *torch.logspace(-9, 1, 21).tolist()], dtype=torch.float64) * values[-1]
    low, high = found.cdf_band(x)
    truth = (values[:, None] <= x.clamp_min(1e-12) - (x < 0).double()).double().mean(0)
    assert bool((low <= truth + 1e-9).all())
    assert bool((truth <= high + 1e-9).all())
    low, high = found.mass_band(x)
    masses = found.cdf(x).diff()
    assert bool((low <= masses + 1e-9).all())
    assert bool((masses <= high + 1e-9).all())

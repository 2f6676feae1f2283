"""Spectral densities against exact spectra."""

from __future__ import annotations

import math
import warnings
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import deepspectra as ds
from deepspectra.algorithms.density import density
from deepspectra.algorithms.eigenpairs import eigenpairs
from deepspectra.algorithms.probes import stream
from deepspectra.errors import (
    ConvergenceWarning,
    DataError,
    FallbackWarning,
    MemoryBudgetError,
    NonFiniteError,
    OptionError,
    ShapeError,
)
from deepspectra.operators.base import Matrix, Operator
from spectra import Function, broadened, diagonal, distance, integral, rotated, trained

# --- the golden spectra: Papyan, JMLR 2020, figure 15 ------------------------------------------------------


@pytest.fixture(scope="module")
def spiked():
    """diag(5, 4, 3, 0, …) + ZZᵀ/2000: a Marchenko-Pastur bulk and three outliers."""
    Z = torch.randn(2000, 2000, generator=torch.Generator().manual_seed(0))
    matrix = Z @ Z.T / 2000
    matrix.diagonal()[:3] += torch.tensor([5.0, 4.0, 3.0])
    return matrix, torch.linalg.eigvalsh(matrix).double()


@pytest.fixture(scope="module")
def heavy():
    """ZZᵀ/1000 with Pareto(1) entries: a spectrum over ten decades."""
    uniform = torch.rand(500, 1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    Z = 1 / (1 - uniform)
    return Z @ Z.T / 1000, torch.linalg.eigvalsh(Z @ Z.T / 1000)


def test_the_density_of_a_spiked_bulk_is_that_of_its_eigenvalues(spiked):
    matrix, exact = spiked
    result = density(matrix, num_probes=10, num_steps=128)
    assert distance(result, exact) < 0.02
    torch.testing.assert_close(result.exact[-3:], exact[-3:], rtol=1e-5, atol=0)
    curve = result.smooth()
    assert float(curve.grid.max()) < 4.2  # the outliers set neither the grid nor the width
    assert curve.mass == pytest.approx(1 - 3 / 2000, abs=1e-12)
    assert integral(curve.density, curve.grid) == pytest.approx(curve.mass, abs=1e-3)
    assert integral((curve.density - broadened(curve.grid, exact, curve.width)).abs(), curve.grid) < 0.08


def test_the_log_density_of_a_heavy_tail_is_exact_when_the_basis_spans_everything(heavy):
    matrix, exact = heavy
    result = density(matrix, num_probes=10, num_steps=256)
    assert result.num_products == 500
    torch.testing.assert_close(result.exact, exact, rtol=1e-6, atol=1e-12 * float(exact.max()))
    curve = result.smooth("log", width=0.1)
    positions = (exact.abs() + 1e-5 * exact.abs().max()).log10()
    torch.testing.assert_close(curve.density, broadened(curve.grid.log10(), positions, 0.1), rtol=1e-6, atol=1e-9)


def test_the_log_density_of_a_heavy_tail_needs_no_full_basis(heavy):
    matrix, exact = heavy
    result = density(matrix, num_probes=3, num_steps=64)
    assert distance(result, exact) < 0.005
    curve = result.smooth("log", width=0.2)
    positions = (exact.abs() + 1e-5 * exact.abs().max()).log10()
    assert integral(curve.density, curve.grid.log10()) == pytest.approx(1, abs=1e-3)
    difference = (curve.density - broadened(curve.grid.log10(), positions, 0.2)).abs()
    assert integral(difference, curve.grid.log10()) < 0.1


# --- the quadrature ----------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(1, 40),
    st.integers(1, 5),
    st.integers(1, 50),
    st.sampled_from([torch.float64, torch.float32]),
    st.integers(0, 3),
)
def test_weights_are_a_distribution_and_nodes_lie_in_the_spectrum(
    seed, size, num_probes, num_steps, dtype, num_deflated
):
    normal = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    matrix = normal + normal.T
    deflate = None
    if num_deflated:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            deflate = eigenpairs(matrix, min(num_deflated, size), "both")
    result = density(matrix, num_probes, num_steps, deflate=deflate, seed=seed)
    assert float(result.weights.sum()) == pytest.approx(1, abs=1e-12)
    assert float(result.weights.min()) >= 0
    exact = torch.linalg.eigvalsh(matrix.double())
    slack = 100 * torch.finfo(dtype).eps * float(exact.abs().max())
    assert exact[0] - slack <= result.nodes.min()
    assert result.nodes.max() <= exact[-1] + slack
    assert result.nodes.dtype == result.weights.dtype == torch.float64
    assert result.nodes.shape == result.weights.shape == result.probes.shape
    torch.testing.assert_close(
        result.weights[result.probes < 0], torch.full_like(result.exact, 1 / size), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("num_probes", [1, 4])
def test_the_quadrature_reproduces_the_probes_moments(num_probes):
    values = torch.linspace(-1, 2, 120, dtype=torch.float64)
    steps = 5
    result = density(rotated(values), num_probes, steps, seed=3)
    z = torch.randn(num_probes, 120, generator=stream(3, "density"), dtype=torch.float64).T
    matrix, power = rotated(values), z
    for degree in range(2 * steps):  # exact up to degree 2·steps − 1
        moments = (z * power).sum(0) / (z * z).sum(0)
        for probe in range(num_probes):
            mine = result.probes == probe
            moment = float(result.weights[mine] @ result.nodes[mine] ** degree) * num_probes
            assert moment == pytest.approx(float(moments[probe]), rel=1e-10, abs=1e-12)
        power = matrix @ power


@pytest.mark.parametrize("num_probes", [1, 2, 5])
def test_few_distinct_eigenvalues_are_resolved_exactly(num_probes):
    values = torch.cat([torch.full((50,), 3.0), torch.full((30,), -1.0), torch.full((20,), 0.5)])
    result = density(rotated(values), num_probes, 64)
    assert result.num_products <= 3 * num_probes
    for value in (3.0, -1.0, 0.5):
        assert float((result.nodes - value).abs().min()) < 1e-12
    assert float(torch.stack([(result.nodes - v).abs() for v in (3.0, -1.0, 0.5)]).min(0).values.max()) < 1e-12


def test_multiple_outliers_are_counted_with_enough_probes():
    values = torch.cat([torch.tensor([5.0, 5, 5, 2]), torch.linspace(0, 0.5, 96)]).double()
    result = density(rotated(values), 6, 10)
    torch.testing.assert_close(result.exact[-4:], torch.tensor([2.0, 5, 5, 5], dtype=torch.float64))


def test_a_value_of_more_copies_than_probes_keeps_its_mass():
    values = torch.cat([torch.full((6,), 5.0), torch.linspace(0, 0.5, 94)]).double()
    counts = [density(rotated(values), 3, 10, seed=s).count_above(4.0) for s in range(40)]
    mean, error = (sum(column) / 40 for column in zip(*counts, strict=True))
    assert mean == pytest.approx(6, abs=3 * error / math.sqrt(40))
    assert sum(abs(count - 6) <= 2 * own for count, own in counts) >= 36  # 95 % are stated: 38, up to chance


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize(("num_probes", "num_steps", "rows"), [(6, 16, 60), (4, 8, 0)])
def test_rounding_leaks_no_probe_into_what_it_is_freed_of(num_probes, num_steps, rows, dtype, rtol):
    """Where few values have many copies, the others' space is invariant before the steps are over."""
    values = torch.cat([torch.linspace(50, 5, 10, dtype=torch.float64), torch.ones(190, dtype=torch.float64)])
    matrix = Matrix(rotated(values, dtype=dtype))
    if rows:
        matrix.memory = dtype.itemsize * len(values) * rows
    for seed in range(20):
        found = density(matrix, num_probes, num_steps, seed=seed)
        assert float(found.weights.sum()) == pytest.approx(1, abs=1e-12)
        assert found.mean == pytest.approx(float(values.mean()), rel=rtol)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_identity_and_zero_and_a_single_row(dtype):
    for matrix, value in ((torch.eye(40, dtype=dtype), 1), (torch.zeros(40, 40, dtype=dtype), 0)):
        result = density(matrix, 3, 10)
        torch.testing.assert_close(result.nodes, torch.full_like(result.nodes, value), atol=1e-6, rtol=0)
        for curve in (result.smooth(), result.smooth("log")):
            assert bool(torch.isfinite(curve.density).all())
    single = density(torch.tensor([[2.0]], dtype=dtype))
    assert (single.nodes.tolist(), single.weights.tolist()) == ([2.0], [1.0])


def test_a_low_rank_operator_keeps_its_null_space():
    factor = torch.randn(3000, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    result = density(Function(lambda block: factor @ (factor.T @ block), 3000, dtype=torch.float64), 8, 64)
    torch.testing.assert_close(result.exact, torch.linalg.eigvalsh(factor.T @ factor), rtol=1e-10, atol=0)
    assert result.cdf(1.0) == pytest.approx(1 - 4 / 3000, abs=1e-12)


# --- accuracy ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_probes", "target"), [(2, 0.05), (4, 0.025), (8, 0.016)])
def test_a_trained_nets_density_meets_its_target(num_probes, target):
    values = trained(2000)
    operator = Function(lambda block: values.to(block)[:, None] * block, 2000, dtype=torch.float64)
    mean = sum(distance(density(operator, num_probes, seed=seed), values) for seed in range(3)) / 3
    assert mean < target


def test_locking_never_hurts_an_indefinite_bulk():
    values = torch.cos(torch.linspace(0, math.pi, 800, dtype=torch.float64))
    operator = Function(lambda block: values.to(block)[:, None] * block, 800, dtype=torch.float64)
    full, none = (
        sum(distance(density(operator, 2, 64, seed=seed, basis=basis), values) for seed in range(3))
        for basis in ("full", "none")  # the same probes; without a basis nothing is locked
    )
    assert full < 1.1 * none + 0.01


def test_float32_equals_float64():
    values = trained(600)
    double, single = (density(rotated(values, dtype=dtype), 4, 50) for dtype in (torch.float64, torch.float32))
    grid = torch.logspace(-5, 0, 50)
    assert float((double.cdf(grid) - single.cdf(grid)).abs().max()) < 0.005
    assert int((single.nodes > 0.05).sum()) == 10  # no ghosts


def test_two_standard_errors_cover_counts():
    values = trained(300)
    matrix = rotated(values)
    for level, widest in ((1e-3, 20), (0.01, 10)):
        truth = int((values > level).sum())
        counts = [density(matrix, 5, 12, seed=seed).count_above(level) for seed in range(40)]
        covered = sum(abs(count - truth) <= 2 * error for count, error in counts) / len(counts)
        assert covered >= 0.85
        assert sum(error for _, error in counts) / len(counts) < widest


def test_a_count_between_exact_eigenvalues_is_exact():
    values = trained(300)
    count, error = density(rotated(values), 5, 40).count_above(0.01)
    assert (round(count, 9), round(error, 9)) == (int((values > 0.01).sum()), 0)


@pytest.mark.parametrize("num_probes", [2, 3])
def test_one_step_does_not_know_the_variance_that_errors_are_made_of(num_probes):
    found = density(torch.diag(trained(100)), num_probes, 1)
    assert math.isnan(found.mean_standard_error)
    assert bool(found.smooth().standard_error.isnan().all())
    assert math.isnan(found.count_above(0.01)[1])
    low, high = found.cdf_band(torch.tensor([0.01]))
    assert float(low) <= float((trained(100) <= 0.01).double().mean()) <= float(high)
    assert density(torch.eye(2), num_probes, 1).mean_standard_error == 0  # all of it is known
    assert "no error band" in str(found)


@pytest.mark.parametrize("scale", [2.0**-23, 2.0**23])  # about 1e∓7, without rounding
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_densities_scale_with_the_operator(scale, dtype):
    matrix = rotated(trained(300), dtype=dtype)
    reference, scaled = density(matrix, 3, 30), density(scale * matrix, 3, 30)
    torch.testing.assert_close(scaled.nodes / scale, reference.nodes, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(scaled.weights, reference.weights, rtol=1e-4, atol=1e-9)
    assert scaled.smooth().width == pytest.approx(scale * reference.smooth().width, rel=1e-6)
    assert scaled.smooth("log").width == pytest.approx(reference.smooth("log").width, rel=1e-6)


# --- deflation and memory ----------------------------------------------------------------------------------


@pytest.mark.parametrize("num_probes", [1, 4])
def test_a_deflated_negative_eigenvalue_keeps_its_sign(num_probes):
    values = torch.cat([torch.tensor([-9.0, 4.0]), torch.linspace(-0.1, 0.2, 398)]).double()
    matrix = rotated(values)
    top = eigenpairs(matrix, 2, "magnitude", rtol=1e-6)
    result = density(matrix, num_probes, 40, deflate=top)
    assert int((result.nodes < -1).sum()) == int((result.nodes > 1).sum()) == 1
    outliers = (result.nodes.abs() > 1) & (result.probes == -1)
    assert result.nodes[outliers].sort().values.tolist() == pytest.approx([-9, 4], rel=1e-9)
    assert result.weights[outliers].tolist() == pytest.approx([1 / 400] * 2, rel=1e-12)
    assert distance(result, values) < 0.1
    assert "deflated pairs to" in str(result)


def test_deflating_pairs_that_have_not_converged_only_blurs():
    values = trained(500)
    matrix = rotated(values)
    with pytest.warns(ConvergenceWarning):
        rough = eigenpairs(matrix, 10, max_products=12)
    result = density(matrix, 6, 60, deflate=rough)
    assert result.deflation_residual == rough.worst > 1e-3
    blur = float(rough.residual_norms.sum()) / 500 / float(values.mean())
    assert distance(result, values) < 0.05 + blur


def test_the_vectors_of_the_run_that_found_the_pairs_are_no_probes():
    values = torch.linspace(-1, 1, 80, dtype=torch.float64)
    A, means = Matrix(rotated(values)), []
    for seed in range(60):
        with warnings.catch_warnings():  # deflated whether or not a copy may be missing
            warnings.simplefilter("ignore", ConvergenceWarning)
            top = eigenpairs(A, 3, rtol=1e-2, seed=seed)
        found = density(A, 4, 8, deflate=top, seed=seed)
        assert found.num_products == 4 * 8 + 1  # and the check of the pairs
        means.append((found.mean, found.mean_standard_error))
        for probe in range(4):
            mine = found.probes == probe
            means_of = found.nodes[mine] @ found.weights[mine]
            assert all(
                abs(float(means_of - found.nodes[found.probes == other] @ found.weights[found.probes == other]))
                > 1e-9
                for other in range(probe)
            )
    off, errors = torch.tensor(means, dtype=torch.float64).T
    assert float(off.mean().abs()) < 3 * float(off.std()) / math.sqrt(60)
    assert float((off.abs() <= 2 * errors).double().mean()) >= 0.9


def test_everything_deflated_needs_one_product_to_see_that_it_is_so():
    matrix = rotated(torch.linspace(-1, 1, 12))
    everything = eigenpairs(matrix, 12)
    result = density(matrix, deflate=everything)
    assert result.num_products == 1
    assert (result.mean_standard_error, result.count_above(0.3)) == (0.0, (4.0, 0.0))
    torch.testing.assert_close(result.exact, everything.values.flip(0))


def test_a_small_memory_runs_the_probes_in_groups():
    values = trained(600)
    operator = Matrix(rotated(values))
    operator.memory = 8 * 600 * 150
    seen = []
    result = density(operator, 6, 40, progress=lambda done, expected: seen.append((done, expected)))
    assert max(b[0] - a[0] for a, b in pairwise(seen)) <= 3
    assert seen[-1] == (240, 240)
    assert sorted(set(result.probes.tolist())) == [-1, 0, 1, 2, 3, 4, 5]
    assert float(result.weights.sum()) == pytest.approx(1, abs=1e-12)
    torch.testing.assert_close(result.exact[-10:], values[:10].flip(0), rtol=1e-6, atol=0)
    assert int((result.nodes > 0.05).sum()) == 10
    assert distance(result, values) < 0.05


def test_a_memory_too_small_for_the_basis_asked_for_is_an_error():
    operator = Matrix(rotated(trained(300)))
    operator.memory = 8 * 300 * 40
    with pytest.raises(MemoryBudgetError, match=r"Lower num_steps to 39, raise A\.memory, or use basis='none'"):
        density(operator, basis="full")


def test_a_seed_decides_and_the_global_generator_does_not():
    matrix = rotated(trained(100))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = density(matrix, 2, 10, seed=5)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    assert torch.equal(density(matrix, 2, 10, seed=5).weights, first.weights)
    assert not torch.equal(density(matrix, 2, 10, seed=6).nodes, first.nodes)


@pytest.mark.parametrize(
    "options",
    [
        {"num_probes": 0},
        {"num_steps": 0},
        {"num_steps": 2.0},
        {"deflate": torch.ones(30, 2)},
        {"basis": "half"},
    ],
)
def test_bad_options_are_refused(options):
    with pytest.raises(OptionError):
        density(torch.eye(30), **options)


def test_a_side_without_eigenvalues_is_refused():
    with pytest.raises(OptionError, match="no eigenvalues of that sign"):
        density(torch.eye(30)).smooth("log", sign=-1)


def test_pairs_of_another_size_are_refused():
    with pytest.raises(ShapeError, match="length 20"):
        density(torch.eye(30), deflate=eigenpairs(torch.eye(20), 2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_pairs_of_another_matrix_are_refused_and_those_of_an_equal_one_are_not(dtype):
    matrix = rotated(trained(200), dtype=dtype)
    top = eigenpairs(matrix, 5, rtol=1e-2)
    assert density(matrix.clone(), 2, 8, deflate=top).num_products == 17
    for other in (1.1 * matrix, -matrix, matrix + 0.05 * torch.eye(200), rotated(trained(200), 1, dtype)):
        with pytest.raises(DataError, match="not of this matrix: a product differs"):
            density(other.to(dtype), 2, 8, deflate=top)


def test_pairs_of_an_operator_of_another_name_are_refused_by_both_names():
    matrix = rotated(trained(200))
    top = eigenpairs(Matrix(matrix, "Hessian"), 5)
    with pytest.raises(DataError, match="pairs of Hessian, but A is Gauss-Newton"):
        density(Matrix(matrix, "Gauss-Newton"), 2, 8, deflate=top)
    assert density(matrix, 2, 8, deflate=top).num_probes == 2  # a matrix has no name of its own


def test_rough_pairs_are_still_those_of_their_operator():
    matrix = rotated(trained(200))
    with pytest.warns(ConvergenceWarning):
        rough = eigenpairs(matrix, 10, max_products=11)
    assert density(matrix, 2, 8, deflate=rough).deflation_residual == rough.worst > 0.1


def test_products_that_are_not_finite_are_an_error():
    with pytest.raises(NonFiniteError):
        density(Function(lambda block: block * math.inf, 20))


@pytest.mark.parametrize("basis", ["full", "none"])
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_no_weight_is_nan_however_small_the_problem_and_however_much_is_deflated(size: int, basis: str) -> None:
    line = torch.linspace(-1, 2, size, dtype=torch.float64)
    for values in (line, line.clamp_min(0), torch.zeros(size).double(), torch.ones(size).double(), line**21):
        for deflated in {1, size - 1, size} - {0}:
            for num_probes, seed in ((1, 0), (3, 1)):
                A = Matrix(torch.diag(values))
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", ConvergenceWarning)
                    pairs = ds.eigenpairs(A, deflated, "magnitude", seed=seed)
                found = ds.density(A, num_probes, 4, deflate=pairs, seed=seed, basis=basis)
                assert bool(torch.isfinite(torch.cat([found.nodes, found.weights])).all())
                assert float(found.weights.sum()) == pytest.approx(1, abs=1e-12)
                assert math.isnan(found.mean_standard_error) <= (num_probes == 1)
                for scale in ("linear", "log"):
                    assert bool(torch.isfinite(found.smooth(scale, num_points=8).density).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_few_values_of_many_copies_are_no_exact_spectrum_in_any_precision(dtype):
    """What rounding adds to a space that is invariant is the other probes', and locks nothing."""
    values = torch.cat([torch.ones(30), torch.full((20,), 2.0)])
    missed = 0
    for seed in range(10):
        found = density(rotated(values, seed, dtype), 8, 64, seed=seed)
        low, high = found.cdf_band(torch.tensor([1.5]))
        missed += not bool((low <= 0.6 + 1e-9) & (high >= 0.6 - 1e-9))
        assert float(high - low) > 0
    assert missed <= 2


def test_its_basis_is_exact_where_eigenpairs_have_a_rounded_one_and_that_is_said():
    A, rounded = diagonal(trained(500), torch.float32), diagonal(trained(500), torch.float32)
    rounded.basis = torch.bfloat16
    with pytest.warns(
        FallbackWarning, match="held exactly, not in bfloat16, whose rounding would let it lock nothing"
    ):
        found = density(rounded, num_probes=2, num_steps=20)
    assert torch.equal(found.nodes, density(A, num_probes=2, num_steps=20).nodes)
    assert torch.equal(
        density(rounded, num_probes=1, num_steps=9, basis="none").nodes,
        density(A, num_probes=1, num_steps=9, basis="none").nodes,
    )


def test_its_basis_lies_on_the_host_only_where_one_probe_does_not_fit(monkeypatch):
    monkeypatch.setattr(Operator, "host_memory", lambda _: 10**9)
    for room, told in ((30, ""), (15, "lay in host memory")):
        found = density(diagonal(trained(500), torch.float64, vectors=room), num_probes=2, num_steps=20, basis="full")
        assert found.provenance.basis.endswith(told)
        assert bool(found.provenance.basis) == bool(told)

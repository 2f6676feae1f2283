"""Eigenpairs: the Lanczos relation, measured residuals, completeness, honesty."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.linalg import eigsh

from deepspectra.algorithms.eigenpair_search import select
from deepspectra.algorithms.eigenpairs import ENDS, eigenpairs
from deepspectra.algorithms.krylov_basis import Krylov
from deepspectra.algorithms.long_vectors import gaussian_rows
from deepspectra.errors import (
    ConvergenceWarning,
    DataError,
    MemoryBudgetError,
    NonFiniteError,
    OptionError,
    ShapeError,
)
from deepspectra.operators.base import Matrix
from deepspectra.operators.curvature import Hessian
from deepspectra.problem.problem import Problem
from spectra import Function, rotated

OUTLIERS = torch.logspace(0, -1, 10, dtype=torch.float64)


def trained(size=300):
    return torch.cat([OUTLIERS, 0.03 * torch.exp(-torch.linspace(0, 14, size - 10, dtype=torch.float64))])


def diagonal(values, dtype=torch.float64):
    return Function(
        lambda block: values.to(block)[:, None] * block, len(values), dtype=dtype, name="diagonal"
    )


def true_residuals(matrix, pairs):
    vectors = pairs.vectors.double()
    return torch.linalg.vector_norm(matrix.double() @ vectors - vectors * pairs.values, dim=0)


# --- the basis ---------------------------------------------------------------------------------------------


def basis_of(matrix, num_products, width=1, capacity=60):
    krylov = Krylov(Matrix(matrix), capacity)
    krylov.append(gaussian_rows(width, len(matrix), torch.Generator().manual_seed(0)))
    while krylov.num_products < num_products:
        krylov.expand(krylov.num_pending)
    return krylov


def check_relation(krylov, matrix):
    rows = krylov.rows[: krylov.num_rows].double()
    image = rows[: krylov.num_basis] @ matrix.double()
    eps = torch.finfo(krylov.rows.dtype).eps
    assert float((image - krylov.projected.T @ rows).abs().max()) < 20 * eps * float(
        torch.linalg.matrix_norm(matrix.double(), 2)
    )
    assert float((rows @ rows.T - torch.eye(len(rows))).abs().max()) < 20 * eps


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_lanczos_relation_holds_and_the_projection_is_tridiagonal(dtype):
    matrix = rotated(trained(), dtype=dtype)
    krylov = basis_of(matrix, 30)
    check_relation(krylov, matrix)  # A Q = Q T + r eᵀ
    beyond = torch.triu(krylov.projected[:30], 2).abs().max(), krylov.projected[30, :29].abs().max()
    assert float(max(beyond)) < 20 * torch.finfo(dtype).eps


@pytest.mark.parametrize("width", [3, 7])
def test_the_block_relation_holds(width):
    matrix = rotated(trained())
    check_relation(basis_of(matrix, 6 * width, width), matrix)


def test_a_restart_and_a_turn_keep_the_relation():
    matrix = rotated(trained())
    krylov = basis_of(matrix, 12, 3)
    krylov.contract(krylov.ritz().coefficients[:, 4:])
    check_relation(krylov, matrix)
    krylov.turn(torch.tensor([0.3, -2.0, 0.1], dtype=torch.float64))
    krylov.expand(1)
    krylov.append_random(torch.Generator().manual_seed(1))
    krylov.expand(2)
    check_relation(krylov, matrix)


def test_an_invariant_subspace_leaves_nothing_pending():
    krylov = basis_of(torch.diag(torch.tensor([2.0, 2.0, 1.0, 1.0, 1.0], dtype=torch.float64)), 2)
    assert (krylov.num_basis, krylov.num_pending) == (2, 0)


# --- the pairs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_pairs_are_those_of_the_dense_matrix(which, dtype):
    values = torch.cat([trained(200), -0.7 * OUTLIERS[:7]])
    matrix = rotated(values, dtype=dtype)
    pairs = eigenpairs(matrix, 6, which, rtol=1e-4)
    exact = torch.linalg.eigvalsh(matrix.double())
    expected = exact[select(exact, which, 6)]
    assert pairs.converged
    assert pairs.values.dtype == torch.float64
    assert pairs.vectors.dtype == dtype
    assert torch.equal(pairs.values, pairs.values.sort(descending=True).values)
    torch.testing.assert_close(pairs.values, expected, rtol=1e-5, atol=0)
    gram = pairs.vectors.double().T @ pairs.vectors.double()
    assert float((gram - torch.eye(6)).abs().max()) < 50 * torch.finfo(dtype).eps


def test_both_ends_are_split_as_scipy_does():
    values = torch.linspace(-1, 1, 9)
    assert select(values, "both", 5).tolist() == [8, 7, 6, 1, 0]
    assert select(values, "both", 1).tolist() == [8]
    assert select(values, "magnitude", 3).tolist()[0] == 8
    assert select(values, "smallest", 2).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("scipy_which", "which"), [("LA", "largest"), ("SA", "smallest"), ("LM", "magnitude"), ("BE", "both")]
)
def test_pairs_agree_with_arpack(scipy_which, which):
    values = torch.cat([trained(150), -0.7 * OUTLIERS[:7]])
    matrix = rotated(values)
    expected = np.sort(eigsh(matrix.numpy(), 5, which=scipy_which, v0=np.ones(len(values)))[0])[::-1]
    assert np.allclose(eigenpairs(matrix, 5, which, rtol=1e-6).values.numpy(), expected, rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("max_products", [12, 16, 40])
@pytest.mark.filterwarnings("ignore::deepspectra.errors.ConvergenceWarning")
def test_reported_residuals_are_the_dense_ones(dtype, max_products):
    matrix = rotated(trained(), dtype=dtype)
    pairs = eigenpairs(matrix, 10, max_products=max_products)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(pairs.residual_norms, true_residuals(matrix, pairs), rtol=1e-3, atol=30 * eps)


@pytest.mark.parametrize(("memory_in_vectors", "rtol"), [(1000, 0.02), (19, 0.1)])  # 19: with restarts
@pytest.mark.filterwarnings("ignore::deepspectra.errors.ConvergenceWarning")
def test_residuals_include_the_asymmetry_of_the_operator(memory_in_vectors, rtol):
    size = 200
    noise = torch.randn(size, size, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    matrix = rotated(trained(size)) + 1e-4 * noise
    operator = Function(lambda block: matrix @ block, size, dtype=torch.float64)
    operator.memory = 8 * size * memory_in_vectors
    pairs = eigenpairs(operator, 5, max_products=60)
    truth = true_residuals(matrix, pairs)
    assert float(truth.min()) > 1e-4
    torch.testing.assert_close(pairs.residual_norms, truth, rtol=rtol, atol=0)


@pytest.mark.parametrize("memory_in_vectors", [18, 24])
@pytest.mark.parametrize("which", ENDS)
def test_a_restarted_run_equals_an_unrestricted_one(memory_in_vectors, which):
    matrix = rotated(torch.cat([trained(200), -0.7 * OUTLIERS]))
    free, tight = Matrix(matrix), Matrix(matrix)
    tight.memory = 8 * len(matrix) * memory_in_vectors
    reference, restarted = (eigenpairs(A, 8, which, rtol=1e-6, max_products=600) for A in (free, tight))
    assert restarted.converged
    torch.testing.assert_close(restarted.values, reference.values, rtol=1e-10, atol=0)
    assert float((restarted.vectors * reference.vectors).sum(0).abs().min()) > 1 - 1e-9
    torch.testing.assert_close(
        restarted.residual_norms, true_residuals(matrix, restarted), rtol=1e-6, atol=1e-14
    )


def test_a_trained_nets_spectrum_takes_under_30_products():
    for seed in range(5):
        pairs = eigenpairs(diagonal(trained(5000)), 10, rtol=1e-3, seed=seed)
        assert pairs.converged
        assert pairs.num_products <= 30
        torch.testing.assert_close(pairs.values, OUTLIERS, rtol=1e-6, atol=0)


# --- honesty -----------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(3, 60), st.sampled_from(ENDS), st.integers(0, 3))
def test_a_pair_flagged_converged_is_never_a_wrong_one(seed, max_products, which, kind):
    size = 80
    draw = torch.Generator().manual_seed(seed)
    values = {
        0: trained(size),
        1: torch.randn(size, generator=draw, dtype=torch.float64),
        2: torch.linspace(-1, 1, size, dtype=torch.float64),
        3: torch.cat([torch.tensor([3.0, 3.0, 2.0]), torch.rand(size - 3, generator=draw)]).double(),
    }[kind]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pairs = eigenpairs(rotated(values, seed), 3, which, rtol=1e-2, max_products=max_products, seed=seed)
    assert pairs.converged == (not caught)
    if pairs.converged:
        exact = values.sort().values
        expected = exact[select(exact, which, 3)]
        assert float((pairs.values - expected).abs().max()) <= 0.02 * float(values.abs().max())


def sines(matrix, pairs):
    """Sine of the angle between each vector and the exact eigenvector of its rank, and between the spans."""
    exact, u = torch.linalg.eigh(matrix.double())
    u = u[:, select(exact, pairs.which, len(pairs.values))]
    v = pairs.vectors.double()
    beyond = [torch.linalg.vector_norm(v - u * (u * v).sum(0), dim=0), v - u @ (u.T @ v)]
    return beyond[0], float(torch.linalg.matrix_norm(beyond[1], 2))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from([1e-2, 1e-4]),
    st.sampled_from(ENDS),
    st.integers(0, 3),
    st.sampled_from([torch.float64, torch.float32]),
)
def test_bounds_hold(seed, rtol, which, kind, dtype):
    size = 100
    draw = torch.Generator().manual_seed(seed)
    values = {
        0: torch.cat([trained(size - 5), -0.75 * OUTLIERS[:5]]),
        1: torch.randn(size, generator=draw, dtype=torch.float64),
        2: torch.linspace(-1, 1.1, size, dtype=torch.float64),
        3: torch.cat([torch.tensor([3.0, 2.9, 2.0, -1]), torch.rand(size - 4, generator=draw)]).double(),
    }[kind]
    matrix = rotated(values, seed, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        pairs = eigenpairs(matrix, 3, which, rtol=rtol, max_products=60, seed=seed)
    exact = torch.linalg.eigvalsh(matrix.double())
    nearest = (exact[:, None] - pairs.values).abs().min(0).values
    assert bool((nearest <= pairs.error_bounds).all())
    if pairs.converged:
        vectors, span = sines(matrix, pairs)
        assert bool((vectors <= pairs.angle_bounds).all())
        assert span <= pairs.subspace_angle_bound
    else:
        assert bool(pairs.angle_bounds.isinf().all())
        assert math.isinf(pairs.subspace_angle_bound)


def test_bounds_of_separated_pairs_are_quadratic_and_tight():
    matrix = rotated(trained())
    pairs = eigenpairs(matrix, 5, rtol=3e-2)
    errors = (OUTLIERS[:5] - pairs.values).abs()
    vectors, span = sines(matrix, pairs)
    worst = pairs.residual_norms.argmax()
    assert pairs.error_bounds[worst] < 0.1 * pairs.residual_norms[worst]
    assert errors[worst] <= pairs.error_bounds[worst] < 10 * errors[worst]
    assert vectors[worst] <= pairs.angle_bounds[worst] < 10 * vectors[worst]
    assert span <= pairs.subspace_angle_bound < 10 * span


@pytest.mark.parametrize(("which", "most"), [("magnitude", 0), ("both", 3)])
def test_a_rival_that_would_be_wanted_is_followed(which, most):
    """Two eigenvalues that one start cannot tell apart, at a loose tolerance, are nearly always both found."""
    missed = products = 0
    for seed in range(16):
        draw = torch.Generator().manual_seed(seed)
        values = torch.cat([torch.tensor([3.0, 3 - 1e-4, 2.0, -1]), torch.rand(116, generator=draw)]).double()
        pairs = eigenpairs(rotated(values, seed), 3, which, rtol=1e-2, seed=seed)
        exact = values.sort().values
        missed += float((pairs.values - exact[select(exact, which, 3)]).abs().max()) > 0.03
        products += pairs.num_products
    assert missed <= most
    assert products <= 16 * 22


def test_a_cluster_has_a_span_but_no_vectors():
    values = torch.cat([torch.tensor([5.0, 5, 5]), torch.linspace(0, 0.5, 200)]).double()
    pairs = eigenpairs(rotated(values), 3, rtol=1e-3)
    assert bool((pairs.angle_bounds > 1).all())  # any rotation of them will do
    assert pairs.subspace_angle_bound < 2e-3
    assert sines(rotated(values), pairs)[1] <= pairs.subspace_angle_bound


def test_the_status_is_certified_only_when_the_basis_spans_everything():
    matrix = rotated(trained())
    assert eigenpairs(matrix, 5).status == "statistical"
    everything = eigenpairs(matrix[:40, :40], 40)
    assert everything.status == "certified"
    assert "converged (certified)" in str(everything)
    assert float(everything.error_bounds.max()) < 1e-12
    with pytest.warns(ConvergenceWarning):
        assert eigenpairs(matrix, 10, max_products=12).status == "not converged"


def test_small_residuals_while_an_outlier_is_missing_are_not_called_converged():
    """What a fixed number of products passes off as the nine largest: every residual is small, one is missing."""
    start = torch.randn(300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start[8] = 1e-15  # the ninth outlier hardly shows
    with pytest.warns(ConvergenceWarning):
        pairs = eigenpairs(diagonal(trained()), 9, rtol=1.4e-2, start=start, max_products=13)
    assert pairs.worst < 1e-2
    torch.testing.assert_close(pairs.values[8], OUTLIERS[9], rtol=1e-3, atol=0)  # the tenth instead
    assert not pairs.converged
    assert pairs.status == "not converged"
    enough = eigenpairs(diagonal(trained()), 9, rtol=1.4e-2, start=start)
    assert enough.converged
    torch.testing.assert_close(enough.values, OUTLIERS[:9], rtol=1e-3, atol=0)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(5, 60), st.sampled_from([1e-1, 1e-2, 1e-3]))
def test_few_products_never_pass_a_wrong_largest_pair_off_as_converged(seed, max_products, rtol):
    values = trained(500)
    values[5:10] = values[5:10].mean() + 1e-3 * torch.arange(5)  # a cluster that takes long to resolve
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        pairs = eigenpairs(diagonal(values), 5, rtol=rtol, max_products=max_products, seed=seed)
    if pairs.converged:
        expected = values.sort(descending=True).values[:5]
        assert bool(((pairs.values - expected).abs() <= pairs.error_bounds).all())


def test_too_few_products_warn_and_return_what_there_is():
    matrix = rotated(trained())
    with pytest.warns(ConvergenceWarning, match=r"max_products=12: worst residual .* Raise max_products"):
        pairs = eigenpairs(matrix, 10, max_products=12)
    assert not pairs.converged
    assert pairs.num_products == 12
    assert pairs.values.shape == (10,)
    assert "NOT converged" in str(pairs)
    torch.testing.assert_close(pairs.residual_norms, true_residuals(matrix, pairs), rtol=1e-6, atol=1e-14)


def test_small_residuals_without_the_completeness_check_are_not_called_converged():
    needed = eigenpairs(rotated(trained()), 10).num_products
    with pytest.warns(ConvergenceWarning, match="no pair is missing"):
        pairs = eigenpairs(rotated(trained()), 10, max_products=needed - 1)
    assert not pairs.converged


def test_a_tolerance_below_rounding_stops_and_says_so():
    matrix = rotated(trained(), dtype=torch.float32)
    with pytest.warns(ConvergenceWarning, match="rounding"):
        pairs = eigenpairs(matrix, 5, rtol=1e-9, max_products=250)
    assert not pairs.converged
    assert pairs.num_products < 60
    torch.testing.assert_close(pairs.values, OUTLIERS[:5], rtol=1e-5, atol=0)


def test_copies_of_a_multiple_outlier_are_all_found():
    values = torch.cat([torch.tensor([5.0, 5, 5, 3, 3, 2]), 0.5 * torch.rand(200)]).double()
    for seed in range(5):
        pairs = eigenpairs(rotated(values, seed), 6, seed=seed)
        assert pairs.converged
        torch.testing.assert_close(pairs.values, values[:6], rtol=1e-6, atol=0)


def test_the_identity_has_as_many_pairs_as_asked_for():
    pairs = eigenpairs(torch.eye(50, dtype=torch.float64), 7)
    assert pairs.converged
    torch.testing.assert_close(pairs.values, torch.ones(7, dtype=torch.float64))
    assert float((pairs.vectors.T @ pairs.vectors - torch.eye(7)).abs().max()) < 1e-14


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_null_space_of_a_low_rank_operator_fills_up(dtype):
    factor = torch.randn(5000, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    pairs = eigenpairs(Function(lambda block: factor @ (factor.T @ block), 5000, dtype=dtype), 6)
    assert pairs.converged
    expected = torch.linalg.eigvalsh((factor.T @ factor).double()).flip(0)
    torch.testing.assert_close(pairs.values[:3], expected, rtol=1e-5, atol=0)
    assert float(pairs.values[3:].abs().max()) < 1e-5 * float(expected[0])


def test_all_pairs_of_a_small_matrix_are_exact():
    values = torch.tensor([4.0, 4, 4, 1, 1, 0, 0, -2], dtype=torch.float64)
    pairs = eigenpairs(rotated(values), 8)
    assert pairs.converged
    assert pairs.num_products == 8
    torch.testing.assert_close(pairs.values, values, rtol=1e-13, atol=1e-13)


def test_the_zero_operator_and_a_single_row():
    pairs = eigenpairs(torch.zeros(30, 30), 3)
    assert pairs.converged
    assert pairs.values.tolist() == pairs.residual_norms.tolist() == [0, 0, 0]
    assert pairs.worst == 0
    assert eigenpairs(torch.tensor([[-3.0]]), 1).values.tolist() == [-3]


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(torch.float64, scale) for scale in (1e-290, 1e-170, 1e-30, 1e-7, 1e7, 1e155, 1e290)]
    + [(torch.float32, scale) for scale in (1e-37, 1e-30, 1e-7, 1e7, 1e30, 1e37)],
)
@pytest.mark.parametrize("width", [None, 3])
def test_pairs_and_bounds_scale_with_the_operator(dtype, scale, width):
    matrix = rotated(trained(), dtype=dtype)
    start = None if width is None else scale * torch.ones(300, width, dtype=dtype).triu_()
    reference, scaled = (eigenpairs(factor * matrix, 5, start=start) for factor in (1, scale))
    assert scaled.converged
    assert abs(scaled.num_products - reference.num_products) <= (dtype == torch.float32)
    torch.testing.assert_close(scaled.values / scale, reference.values, rtol=1e-5, atol=0)
    torch.testing.assert_close(scaled.error_bounds / scale, reference.error_bounds, rtol=0.2, atol=0)
    assert scaled.subspace_angle_bound == pytest.approx(reference.subspace_angle_bound, rel=0.2)


def test_a_restarted_basis_at_a_tiny_scale_measures_its_residuals():
    matrix = rotated(trained())
    pairs = []
    for scale in (1.0, 1e-200):
        operator = Matrix(scale * matrix)
        operator.memory = 8 * len(matrix) * 14
        pairs.append(eigenpairs(operator, 5, rtol=1e-4))
    assert pairs[1].converged
    torch.testing.assert_close(
        pairs[1].residual_norms / 1e-200, pairs[0].residual_norms, rtol=1e-3, atol=1e-12
    )


def test_no_ghosts_after_200_steps_in_float32():
    krylov = Krylov(diagonal(trained(2000), torch.float32), 201)
    krylov.append(gaussian_rows(1, 2000, torch.Generator().manual_seed(0)))
    for _ in range(200):
        krylov.expand(1)
    values = krylov.ritz().values
    assert int((values > 0.05).sum()) == 10
    torch.testing.assert_close(values[-10:].flip(0), OUTLIERS, rtol=1e-5, atol=0)


# --- multiple eigenvalues ----------------------------------------------------------------------------------

MULTIPLE = {
    "each four times": ((10 * 0.8 ** torch.arange(20.0)).repeat_interleave(4), 4),
    "cut within a multiple one": ((10 * 0.7 ** torch.arange(20.0)).repeat_interleave(3), 5),
    "a double one, the next near": (torch.cat([torch.tensor([3.0, 3]), torch.linspace(2.8, -1, 98)]), 2),
    "a Kronecker product": (
        torch.outer(torch.tensor([4.0, 4, 1] + [0.1] * 7), torch.tensor([3.0, 1, 1] + [0.2] * 7)).flatten(),
        6,
    ),
}


@pytest.mark.parametrize("name", MULTIPLE)
def test_no_copy_of_a_multiple_eigenvalue_is_missed(name):
    values, num = MULTIPLE[name]
    values = values.double()
    expected = values.sort(descending=True).values[:num]
    for seed in range(12):
        pairs = eigenpairs(diagonal(values), num, seed=seed)
        assert pairs.converged
        assert bool(((pairs.values - expected).abs() <= pairs.error_bounds).all()), seed


@pytest.mark.parametrize("which", ENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_copies_are_found_at_either_end(which, dtype):
    values = torch.cat([torch.tensor([3.0, 3, 2, 2, -4, -4, -2, -2]), torch.linspace(-1, 1, 92)]).double()
    exact = values.sort().values
    expected = exact[select(exact, which, 4)]
    for seed in range(5):
        pairs = eigenpairs(diagonal(values, dtype), 4, which, rtol=1e-2, seed=seed)
        assert pairs.converged
        assert bool(((pairs.values - expected).abs() <= pairs.error_bounds).all()), seed


@pytest.mark.parametrize("memory_in_vectors", [12, 20])
def test_copies_are_found_with_a_basis_that_is_restarted(memory_in_vectors):
    values, num = MULTIPLE["each four times"]
    operator = diagonal(values.double())
    operator.memory = 8 * len(values) * memory_in_vectors
    for seed in range(5):
        pairs = eigenpairs(operator, num, seed=seed, max_products=600)
        assert pairs.converged
        torch.testing.assert_close(pairs.values, values[:num].double(), rtol=1e-5, atol=0)


def test_copies_that_the_start_lacks_are_found():
    values, num = MULTIPLE["a Kronecker product"]
    expected = values.double().sort(descending=True).values[:num]
    start = torch.eye(len(values), dtype=torch.float64)[:, [0, 3]]  # two eigenvectors, and nothing else
    for seed in range(10):
        pairs = eigenpairs(diagonal(values.double()), num, start=start, seed=seed)
        assert pairs.converged
        torch.testing.assert_close(pairs.values, expected, rtol=1e-5, atol=0)


def test_a_linear_regression_has_each_eigenvalue_as_often_as_outputs():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 20, generator=generator, dtype=torch.float64) * 0.8 ** torch.arange(20.0)
    y = torch.randn(60, 3, generator=generator, dtype=torch.float64)
    problem = Problem(torch.nn.Linear(20, 3, bias=False, dtype=torch.float64), (x, y), loss="mse")
    moment = torch.linalg.eigvalsh(2 / (60 * 3) * x.T @ x).flip(0)
    for seed in range(4):
        pairs = eigenpairs(Hessian(problem), 5, seed=seed)
        assert pairs.converged
        torch.testing.assert_close(pairs.values, moment.repeat_interleave(3)[:5], rtol=1e-5, atol=0)


def test_what_a_challenge_excludes_is_not_there():
    """The place up to which nothing is unseen, from which the gaps are measured, lies above the next eigenvalue."""
    values = torch.cat([torch.tensor([3.0, 2.5, 2.4]), torch.linspace(1.8, 0, 150)]).double()
    for seed in range(10):
        pairs = eigenpairs(diagonal(values), 3, rtol=1e-2, seed=seed)
        assert pairs.converged
        assert bool((pairs.separation.gaps <= torch.tensor([0.5, 0.1, 0.1])).all())
        assert 0 < pairs.separation.gap <= 2.4 - 1.8


def test_without_a_gap_the_search_for_copies_gives_up_and_says_so():
    operator = diagonal(torch.linspace(0.5, 1, 1000, dtype=torch.float64))
    with pytest.warns(ConvergenceWarning, match="no pair is missing.*the probability is up to") as said:
        pairs = eigenpairs(operator, 2, rtol=1e-2)
    assert not pairs.converged
    assert pairs.worst <= 1e-2
    needed = int(str(said[0].message).split("max_products above ")[1].split(",")[0])
    assert needed == pairs.num_products
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        assert eigenpairs(operator, 2, rtol=1e-2, max_products=needed + 20).num_products > needed


# --- starts, seeds and arguments ---------------------------------------------------------------------------


def test_a_start_that_knows_the_answer_saves_products():
    matrix = rotated(trained())
    cold = eigenpairs(matrix, 10, rtol=1e-6)
    warm = eigenpairs(matrix, 10, rtol=1e-4, start=cold.vectors)
    assert warm.num_products <= 20
    torch.testing.assert_close(warm.values, OUTLIERS, rtol=1e-8, atol=0)


@pytest.mark.parametrize("width", [None, 1, 4])
def test_any_start_leads_to_the_same_pairs(width):
    matrix = rotated(trained())
    shape = (300,) if width is None else (300, width)
    start = torch.randn(shape, generator=torch.Generator().manual_seed(9))
    copy = start.clone()
    torch.testing.assert_close(eigenpairs(matrix, 10, start=start).values, OUTLIERS, rtol=1e-5, atol=0)
    assert torch.equal(start, copy)


def test_a_start_orthogonal_to_a_wanted_vector_does_not_hide_it():
    values = trained()
    start = torch.ones(300)
    start[3] = 0  # the diagonal operator never leaves this hyperplane
    torch.testing.assert_close(
        eigenpairs(diagonal(values), 10, start=start).values, OUTLIERS, rtol=1e-5, atol=0
    )


def test_a_named_start_comes_from_the_operator():
    class Named(Matrix):
        def start_block(self, kind):
            assert kind == "mine"
            return self.matrix[:, :2]

    operator = Named(rotated(trained()))
    assert eigenpairs(operator, 3, start="mine").converged
    with pytest.raises(OptionError, match="yours"):
        eigenpairs(Matrix(operator.matrix), 3, start="yours")


def test_a_seed_decides_and_the_global_generator_does_not():
    matrix = rotated(trained())
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = eigenpairs(matrix, 3, seed=5)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    assert torch.equal(eigenpairs(matrix, 3, seed=5).vectors, first.vectors)


def test_progress_counts_every_product():
    seen = []
    pairs = eigenpairs(rotated(trained()), 3, progress=lambda done, expected: seen.append((done, expected)))
    assert [done for done, _ in seen] == list(range(1, pairs.num_products + 1))
    assert {expected for _, expected in seen} == {300}


def test_half_precision_products_get_a_float32_basis():
    pairs = eigenpairs(torch.diag(torch.arange(1, 9).to(torch.bfloat16)), 2, rtol=0.05)
    assert pairs.vectors.dtype == torch.float32
    assert pairs.values.tolist() == pytest.approx([8, 7], rel=0.02)


def test_a_product_that_is_not_finite_is_an_error_at_once():
    def apply(block):
        calls.append(1)
        return block * (math.nan if len(calls) == 4 else 1) + torch.linspace(0, 1, 50)[:, None] * block

    calls = []
    with pytest.raises(NonFiniteError, match="product 4"):
        eigenpairs(Function(apply, 50), 3)
    assert len(calls) == 4


def test_a_memory_too_small_for_the_pairs_is_an_error():
    operator = Matrix(rotated(trained()))
    operator.memory = 8 * 300 * 12
    with pytest.raises(MemoryBudgetError, match=r"holds 12\. Ask for fewer pairs or raise A\.memory"):
        eigenpairs(operator, 10)


@pytest.mark.parametrize(
    ("error", "options"),
    [
        (OptionError, {"num": 0}),
        (OptionError, {"num": 31}),
        (OptionError, {"num": 2.5}),
        (OptionError, {"seed": "a"}),
        (OptionError, {"seed": 2**64}),
        (OptionError, {"which": "LA"}),
        (OptionError, {"rtol": 0}),
        (OptionError, {"rtol": math.nan}),
        (OptionError, {"max_products": 2}),
        (ShapeError, {"start": torch.ones(29)}),
        (ShapeError, {"start": torch.ones(30, 0)}),
        (ShapeError, {"start": 3}),
        (OptionError, {"start": torch.ones(30, 31)}),
        (DataError, {"start": torch.zeros(30)}),
        (DataError, {"start": torch.full((30,), math.nan)}),
    ],
)
def test_bad_arguments_are_refused(error, options):
    with pytest.raises(error):
        eigenpairs(torch.eye(30), **{"num": 5, **options})


@pytest.mark.parametrize(
    ("error", "matrix"),
    [
        (ShapeError, torch.ones(3)),
        (ShapeError, torch.ones(3, 4)),
        (ShapeError, torch.ones(0, 0)),
        (ShapeError, [[1.0]]),
        (DataError, torch.tensor([[1.0, 2], [0, 1]])),
        (DataError, torch.ones(2, 2) * 1j),
        (NonFiniteError, torch.tensor([[math.inf]])),
    ],
)
def test_bad_matrices_are_refused(error, matrix):
    with pytest.raises(error):
        eigenpairs(matrix, 1)


def test_an_integer_matrix_is_taken_as_float64():
    assert eigenpairs(torch.tensor([[2, 1], [1, 2]]), 2).values.tolist() == pytest.approx([3, 1], rel=1e-14)


def test_the_printed_table_has_a_row_a_pair_and_a_verdict():
    lines = str(eigenpairs(rotated(trained()), 4)).splitlines()
    assert len(lines) == 6
    assert lines[-1].startswith("largest 4 of matrix: converged (statistical), worst residual")


def test_tracked_vectors_keep_their_coordinates():
    """Through products, reflections of the pending vectors and further starts, E ζ stays the vector."""
    krylov = Krylov(diagonal(trained(300), torch.float64), 40)
    generator = torch.Generator().manual_seed(0)
    vectors = gaussian_rows(3, 300, generator)
    krylov.track(krylov.append(vectors[:1]))
    for _ in range(4):
        krylov.expand(1)
    krylov.track(krylov.append(vectors[1:]))
    for step in range(8):
        krylov.turn(torch.randn(krylov.num_pending, generator=generator, dtype=torch.float64))
        krylov.expand(1 + step % 2)
    rows = krylov.rows[: krylov.num_rows]
    torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows), dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(krylov.tracked.T @ rows, vectors, atol=1e-10, rtol=0)
    images = krylov.rows[: krylov.num_basis] * trained(300)
    torch.testing.assert_close(krylov.projected.T @ rows, images, atol=1e-10, rtol=0)
    krylov.contract(torch.eye(krylov.num_basis, dtype=torch.float64)[:, :5])
    assert krylov.tracked.shape == (5 + krylov.num_pending, 0)


def test_turning_puts_a_direction_first():
    krylov = Krylov(diagonal(trained(100), torch.float64), 20)
    krylov.append(gaussian_rows(4, 100, torch.Generator().manual_seed(0)))
    for direction in (
        torch.tensor([0.0, 0, 0, 2]),
        torch.tensor([-1.0, 0, 0, 0]),
        torch.tensor([3.0, 4, 0, 0]),
    ):
        wanted = direction.double() / direction.norm() @ krylov.rows[:4]
        krylov.turn(direction.double())
        assert abs(float(wanted @ krylov.rows[0])) == pytest.approx(1)


def test_a_basis_of_known_pairs_answers_as_they_do():
    A = diagonal(trained(200), torch.float64)
    pairs = eigenpairs(A, num=5, rtol=1e-2)
    ritz = Krylov.of_pairs(A, pairs, 12).ritz()
    torch.testing.assert_close(ritz.values.flip(0), pairs.values)
    torch.testing.assert_close(ritz.residual_norms.flip(0), pairs.residual_norms)

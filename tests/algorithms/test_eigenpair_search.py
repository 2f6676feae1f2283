"""The search: which pairs are wanted, that none is missing, and what is said where that cannot be known."""

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepspectra.algorithms.eigenpair_search import select
from deepspectra.algorithms.eigenpairs import ENDS, eigenpairs
from deepspectra.errors import ConvergenceWarning, MemoryBudgetError, NonFiniteError
from deepspectra.operators.base import Matrix
from deepspectra.operators.curvature import Hessian
from deepspectra.problem.problem import Problem
from spectra import OUTLIERS, Function, diagonal, rotated, trained, true_residuals


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
    torch.testing.assert_close(restarted.residual_norms, true_residuals(matrix, restarted), rtol=1e-6, atol=1e-14)


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


def test_progress_counts_every_product():
    seen = []
    pairs = eigenpairs(rotated(trained()), 3, progress=lambda done, expected: seen.append((done, expected)))
    assert [done for done, _ in seen] == list(range(1, pairs.num_products + 1))
    assert {expected for _, expected in seen} == {300}


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

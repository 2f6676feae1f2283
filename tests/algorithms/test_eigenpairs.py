"""Eigenpairs: the Lanczos relation, measured residuals, completeness, honesty."""

from __future__ import annotations

import copy
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.linalg import eigsh
from torch import nn

import deepspectra as ds
from deepspectra.algorithms.eigenpair_search import select
from deepspectra.algorithms.eigenpairs import ENDS, eigenpairs, sample_size
from deepspectra.errors import (
    ConvergenceWarning,
    DataError,
    MemoryBudgetError,
    NonFiniteError,
    OptionError,
    ShapeError,
)
from deepspectra.operators.base import Matrix, Operator
from nets import digits_problem
from spectra import OUTLIERS, Function, diagonal, rotated, trained, true_residuals

# --- how the basis is held ---------------------------------------------------------------------------------


def rounded(values):
    A = diagonal(values, torch.float32)
    A.basis = torch.bfloat16
    return A


def test_of_a_basis_in_bfloat16_residuals_are_measured_and_its_cost_is_told():
    values = torch.cat([trained(3000), -0.5 * OUTLIERS[:7]])
    for which in ENDS:
        pairs = eigenpairs(rounded(values), 6, which, rtol=1e-2, start="random")
        assert pairs.converged
        assert pairs.status == "statistical"
        order = values.sort().values
        expected = order[select(order, which, 6)]
        assert bool(((pairs.values - expected).abs() <= pairs.error_bounds).all())
        true = (values[:, None] * pairs.vectors.double() - pairs.vectors.double() * pairs.values).norm(dim=0)
        torch.testing.assert_close(pairs.residual_norms, true, rtol=1e-3, atol=1e-6)
        gram = pairs.vectors.double().T @ pairs.vectors.double()
        torch.testing.assert_close(gram, torch.eye(6).double(), rtol=0, atol=1e-6)
        assert "the basis was held in bfloat16, whose rounding leaves residuals/|λ| of up to " in str(pairs)


def test_products_that_measure_a_rounded_basis_are_counted():
    counts = []

    def count(block):
        counts.append(block.shape[1])
        return trained(2000).to(block)[:, None] * block

    A = Function(count, 2000)
    A.basis = torch.bfloat16
    pairs = eigenpairs(A, 10, rtol=1e-2)
    assert pairs.num_products == sum(counts)
    assert counts[-2:] == [8, 2]


def test_what_rounding_does_not_allow_is_refused_or_told_and_not_tried_for_long():
    with pytest.raises(OptionError, match=r"rtol=0.001 is below 7.8e-03, .* bfloat16 reaches. Raise rtol"):
        eigenpairs(rounded(trained(1000)), 5, rtol=1e-3)
    small = torch.cat([torch.tensor([0.01, 0.012, 0.014]), torch.linspace(0.4, 1, 1500)]).double()
    with pytest.warns(ConvergenceWarning, match="rounding of its basis allows no less. Raise rtol, or set basis"):
        pairs = eigenpairs(rounded(small), 3, "smallest", rtol=1e-2)
    assert pairs.num_products < 150
    A = diagonal(trained(1000), torch.float32)
    A.basis = torch.float16
    with pytest.raises(OptionError, match=r"basis=torch.float16; it is one of None, torch.bfloat16"):
        eigenpairs(A, 3, rtol=1e-2)


def test_a_basis_that_can_span_the_space_is_exact():
    pairs = eigenpairs(rounded(torch.linspace(0, 1, 40).double()), 5, rtol=1e-2)
    assert pairs.converged
    assert pairs.provenance.basis == ""
    tight = rounded(torch.linspace(0, 1, 40).double())
    tight.memory = 2 * 40 * 45  # for all rows, if they are rounded
    pairs = eigenpairs(tight, 5, rtol=1e-2)
    assert pairs.status == "statistical"
    assert "bfloat16" in pairs.provenance.basis


def test_a_choice_of_basis_is_inherited():
    problem = digits_problem()
    problem.basis = torch.bfloat16
    H, G = ds.Hessian(problem), ds.GaussNewton(problem)
    assert (H.basis, (H - G).basis, H.shifted(1).basis) == (torch.bfloat16,) * 3
    assert ds.Hessian(digits_problem()).basis is None


def test_rows_beyond_the_device_lie_on_the_host_and_pairs_are_the_same(monkeypatch):
    """Where the device is the CPU, too: only the decision is another's."""
    values = trained(2000)
    expected = eigenpairs(diagonal(values, torch.float32), 10, rtol=1e-3)
    A = diagonal(values, torch.float32, vectors=14)
    monkeypatch.setattr(Operator, "host_memory", lambda _: 10**9)
    pairs = eigenpairs(A, 10, rtol=1e-3)
    assert pairs.num_products == expected.num_products  # no restart
    torch.testing.assert_close(pairs.values, expected.values, rtol=1e-6, atol=0)
    assert "vectors of the basis lay in host memory" in str(pairs)
    monkeypatch.setattr(Operator, "host_memory", lambda _: 0)
    with pytest.raises(MemoryBudgetError, match="holds 14"):
        eigenpairs(A, 10, rtol=1e-3)


def test_only_an_accelerator_takes_memory_of_the_host():
    A = diagonal(trained(100))
    assert A.host_memory() == 0
    A.device = torch.device("cuda")
    assert 2**20 < A.host_memory() < 2**50


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


def test_the_identity_has_as_many_pairs_as_asked_for():
    pairs = eigenpairs(torch.eye(50, dtype=torch.float64), 7)
    assert pairs.converged
    torch.testing.assert_close(pairs.values, torch.ones(7, dtype=torch.float64))
    assert float((pairs.vectors.T @ pairs.vectors - torch.eye(7)).abs().max()) < 1e-14


@pytest.mark.parametrize("size", [3, 40])
def test_rounding_at_the_edge_of_a_multiple_eigenvalue_costs_at_most_a_product_more(size):
    for seed in range(60):  # in about one of six the random vector's Ritz value is above the edge, by rounding
        pairs = eigenpairs(torch.eye(size, dtype=torch.float64), 2, seed=seed)
        assert pairs.converged
        assert pairs.num_products <= 4


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
    torch.testing.assert_close(eigenpairs(diagonal(values), 10, start=start).values, OUTLIERS, rtol=1e-5, atol=0)


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


@pytest.fixture(scope="module")
def problem():
    return digits_problem()


@pytest.mark.parametrize("operator", [ds.Hessian, ds.GaussNewton])
def test_a_sampled_start_saves_products_and_changes_nothing(problem, operator):
    whole = operator(problem)
    cold = ds.eigenpairs(whole, num=9, rtol=1e-3)
    warm = ds.eigenpairs(whole, num=9, rtol=1e-3, start="sampled")
    assert warm.converged
    assert warm.num_products < cold.num_products
    torch.testing.assert_close(warm.values, cold.values, rtol=1e-5, atol=0)
    assert ds.overlap(warm.vectors, cold.vectors) > 1 - 1e-5


def test_a_sample_of_a_sum_is_the_sum_of_samples(problem):
    both = ds.Hessian(problem) + 2 * ds.GaussNewton(problem)
    pairs = ds.eigenpairs(both, num=5, rtol=1e-2, start="sampled")
    torch.testing.assert_close(pairs.values, ds.eigenpairs(both, num=5).values, rtol=1e-3, atol=0)


def test_examples_are_sampled_first_where_few_make_the_curvature(problem):
    H = ds.Hessian(problem)
    assert 0 < H.sample_size(3e-2) < H.sample_size(1e-2) < problem.num_examples / 4
    assert H.sample_size(1e-2) == ds.GaussNewton(problem).sample_size(1e-2)
    assert H.sample_size(1e-9) == 0  # takes too many
    for other in (ds.Residual(problem), ds.EmpiricalFisher(problem), H - ds.GaussNewton(problem)):
        assert sample_size(other, 1e-2) == 0  # importance is that of G
    sampled = ds.eigenpairs(H, num=9, rtol=4e-2)
    asked = ds.eigenpairs(H, num=9, rtol=4e-2, start="sampled")
    random = ds.eigenpairs(H, num=9, rtol=4e-2, start="random")
    assert torch.equal(sampled.values, asked.values)
    assert sampled.num_products < random.num_products
    assert sampled.num_sample_products > 0 == random.num_sample_products
    assert f"after {sampled.num_sample_products} with a sample" in str(sampled)
    with warnings.catch_warnings():  # whether there is a gap at that end, processors train differently
        warnings.simplefilter("ignore", ConvergenceWarning)
        assert ds.eigenpairs(H, num=3, rtol=4e-2, which="smallest").num_sample_products == 0
    x, y = next(iter(problem.batches))
    net = copy.deepcopy(problem.model).requires_grad_()
    few = ds.Problem(net, (x, y))
    assert ds.Hessian(few).sample_size(3e-2) == 0  # nothing to gain
    undrawn = ds.Problem(net, (problem.batches.held[0][0], torch.ones(len(x), 10, dtype=x.dtype)), loss="mse")
    assert ds.Hessian(undrawn).sample_size(3e-2) == 0


def test_examples_that_matter_alike_are_not_sampled():
    torch.manual_seed(0)
    net = nn.Linear(20, 10)
    untrained = ds.Problem(net, (0.01 * torch.randn(1500, 20), torch.arange(1500) % 10))
    assert ds.Hessian(untrained).sample_size(1e-2) == 0


class Doubled(Operator):
    """A diagonal with eigenvalues that come twice; its sample is a little another matrix, where they do not."""

    def __init__(self, values: torch.Tensor, mixing: torch.Tensor | None = None) -> None:
        super().__init__(len(values), dtype=values.dtype, device="cpu", name="doubled")
        self.values, self.mixing = values, mixing

    def _apply(self, block):
        product = self.values[:, None] * block
        return product if self.mixing is None else product + self.mixing @ (self.mixing.T @ block)

    def sample_size(self, error):
        return 0

    def sampled(self, generator, num_samples=None):
        mixing = torch.randn(len(self.values), 30, generator=generator, dtype=torch.float64)
        return Doubled(self.values, mixing * (1e-3 / len(self.values)) ** 0.5)


@pytest.mark.parametrize("seed", range(8))
def test_copies_are_found_from_a_sample_too(seed):
    generator = torch.Generator().manual_seed(seed)
    top = torch.tensor([3, 2.9, 2.2, 2.2, 1.9, 1.85, 1.8, 1.6, 1.4, 1.4, 1.25, 1.2], dtype=torch.float64)
    bulk = torch.rand(988, generator=generator, dtype=torch.float64) ** 6
    operator = Doubled(torch.cat([top, bulk]))
    pairs = ds.eigenpairs(operator, 10, rtol=1e-2, start="sampled", seed=seed)
    torch.testing.assert_close(pairs.values, top[:10], rtol=1e-3, atol=0)
    assert pairs.num_products < 30


@pytest.mark.parametrize(("copies", "num"), [(3, 2), (5, 3), (8, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_more_copies_than_are_asked_for_do_not_keep_it_from_converging(copies, num, dtype):
    values = torch.cat([5 * torch.ones(copies), torch.linspace(-0.3, 0.3, 200)])
    for seed in range(4):
        pairs = eigenpairs(rotated(values, seed, dtype), num, seed=seed)
        assert pairs.converged
        torch.testing.assert_close(pairs.values, torch.full_like(pairs.values, 5), rtol=1e-5, atol=0)

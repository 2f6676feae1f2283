"""The algebra of operators is that of their dense matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import eigsh

import deepspectra as ds
from deepspectra.algorithms.eigenpairs import named_start
from deepspectra.errors import DataError, DeepSpectraError, MemoryBudgetError, OptionError, ShapeError
from deepspectra.operators.base import Matrix
from reference import case_and_reference, error
from spectra import Function

RTOL = 1e-9


def symmetric(size, seed=0, dtype=torch.float64):
    matrix = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return (matrix + matrix.T) / 2


A, B = Matrix(symmetric(7, 1), "A"), Matrix(symmetric(7, 2), "B")


CASES = {
    "matrix": (A, A.matrix),
    "sum": (A + B, A.matrix + B.matrix),
    "difference": (A - B, A.matrix - B.matrix),
    "negative": (-A, -A.matrix),
    "multiple": (2 * A, 2 * A.matrix),
    "multiple from the right": (A * 0.5, 0.5 * A.matrix),
    "quotient": (A / 4, A.matrix / 4),
    "multiple by a tensor of one number": (torch.tensor(1.5) * A, 1.5 * A.matrix),
    "multiple by a NumPy number": (np.float32(1.5) * A, 1.5 * A.matrix),
    "sum()": (sum([A, B, A]), 2 * A.matrix + B.matrix),
    "weighted sum()": (sum(c * X for c, X in ((0.25, A), (0.75, B))), 0.25 * A.matrix + 0.75 * B.matrix),
    "less than nothing": (0 - A, -A.matrix),
    "transpose": (A.T, A.matrix),
    "transpose of a sum": ((A - B).mT, A.matrix - B.matrix),
    "shifted": (A.shifted(0.3), A.matrix + 0.3 * torch.eye(7).double()),
    "shifted from the left": (np.float64(-2) * ds.Identity(7) + A, A.matrix - 2 * torch.eye(7)),
    "shifted twice": ((A.shifted(1) / 2).shifted(-1), A.matrix / 2 - 0.5 * torch.eye(7)),
    "identity": (ds.Identity(7, dtype=torch.float64), torch.eye(7, dtype=torch.float64)),
    "nested": (A - 2 * (B - A) + 0.5 * (A + B), 3.5 * A.matrix - 1.5 * B.matrix),
    "function": (Function(lambda block: A.matrix @ block, 7, dtype=torch.float64), A.matrix),
}


@pytest.mark.parametrize("case", CASES)
def test_products_with_vectors_and_blocks_are_those_of_the_dense_matrix(case):
    operator, dense = CASES[case]
    block = torch.randn(7, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    torch.testing.assert_close(operator.dense(), dense, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(operator @ block, dense @ block, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(operator @ block[:, 0], dense @ block[:, 0], rtol=1e-13, atol=1e-13)
    assert (operator @ block[:, :0]).shape == (7, 0)
    torch.testing.assert_close(block.T @ operator, block.T @ dense, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(block[:, 0] @ operator, block[:, 0] @ dense, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(block.T @ operator @ block, block.T @ dense @ block, rtol=1e-13, atol=1e-13)


def test_sums_are_flat_and_name_their_terms():
    total = A - 2 * (B - A)
    assert len(total.terms) == 3
    assert total.name == "A − 2·B + 2·A"
    assert (-A).name == "−A"


def test_a_sum_keeps_the_smallest_memory_budget():
    small = Matrix(symmetric(7))
    small.memory = 1000
    assert (A + small).memory == 1000


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_scipy_sees_the_same_products(dtype):
    matrix = symmetric(6, 5).to(dtype)
    matrix = (matrix + matrix.T) / 2
    adaptor = Matrix(matrix).to_scipy()
    block = np.random.default_rng(0).standard_normal((6, 3)).astype(adaptor.dtype)
    expected = matrix @ torch.from_numpy(block).to(dtype)
    assert np.allclose(adaptor.matmat(block), expected.double().numpy(), rtol=1e-6)
    assert np.allclose(adaptor.matvec(block[:, 0]), expected[:, 0].double().numpy(), rtol=1e-2, atol=1e-2)
    assert adaptor.matvec(block[:, 0]).dtype == adaptor.dtype


def test_products_are_computed_in_the_operators_type():
    operator = Matrix(symmetric(5, dtype=torch.float32))
    assert (operator @ torch.ones(5, dtype=torch.float64)).dtype == torch.float32


@pytest.mark.parametrize("shape", [(7,), (7, 3), (7, 0)])
def test_complex_products_keep_both_parts(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(6), dtype=torch.complex128)
    wanted = A.matrix.to(x) @ x
    torch.testing.assert_close(A @ x, wanted, rtol=1e-13, atol=1e-13)
    rows, wanted_rows = (x.T, wanted.T) if x.ndim == 2 else (x, wanted)
    torch.testing.assert_close(rows @ A, wanted_rows, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(A @ x.conj(), wanted.conj(), rtol=1e-13, atol=1e-13)
    if x.numel():
        assert np.allclose(A.to_scipy() @ x.numpy(), wanted.numpy(), rtol=1e-13)
    assert (Matrix(A.matrix.bfloat16()) @ x).dtype == torch.complex64


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.longdouble, np.int32, np.complex64, np.clongdouble])
def test_scipy_takes_arrays_of_any_type(dtype):
    x = (np.arange(14).reshape(7, 2) * (1 + 1j if np.issubdtype(dtype, np.complexfloating) else 1)).astype(dtype)
    assert np.allclose(A.to_scipy() @ x, A.matrix.numpy() @ x, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16])
def test_products_with_vectors_of_short_types_are_exact(dtype):
    x = torch.tensor([1, 0, 1, 1, 0, 0, 1]).to(dtype)
    torch.testing.assert_close(A @ x, A.matrix @ x.double(), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(x @ A, A.matrix @ x.double(), rtol=1e-14, atol=1e-14)


def test_products_with_sparse_vectors_are_dense():
    x = torch.eye(7, dtype=torch.float64)[:, 2:4].to_sparse()
    torch.testing.assert_close(A @ x, A.matrix[:, 2:4], rtol=1e-14, atol=0)
    torch.testing.assert_close(x.T @ A, A.matrix[2:4], rtol=1e-14, atol=0)


def test_products_can_be_backpropagated_to_the_vector():
    problem = ds.Problem(torch.nn.Linear(3, 2).double(), (torch.randn(5, 3).double(), torch.randint(0, 2, (5,))))
    H = ds.Hessian(problem)
    for operator in (A - 2 * B, A.shifted(3), H.shifted(0.1)):
        w = torch.linspace(-1, 1, operator.shape[0], dtype=torch.float64).requires_grad_()
        dense = operator.dense()
        (gradient,) = torch.autograd.grad((w @ operator @ w).cos(), w, create_graph=True)
        (expected,) = torch.autograd.grad((w @ dense @ w).cos(), w, create_graph=True)
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(
            torch.autograd.grad(gradient.sum(), w)[0],
            torch.autograd.grad(expected.sum(), w)[0],
            rtol=1e-10,
            atol=1e-12,
        )
    with torch.no_grad():
        assert not (H @ w).requires_grad


def test_a_sum_has_the_widest_type_of_its_terms_and_identities_take_it():
    short = Matrix(symmetric(7, 8, torch.float32))
    for total in (short + A, A + short, ds.Identity(7) + short - A):
        assert total.dtype == torch.float64
        shift = torch.eye(7) if "I" in total.name else 0
        wanted = A.matrix * (-1 if "I" in total.name else 1) + short.matrix.double() + shift
        torch.testing.assert_close(total.dense(), wanted, rtol=1e-6, atol=1e-6)
    assert ds.Identity(7, dtype=torch.float64).dtype == torch.float64
    assert short.shifted(1).dtype == (2 * ds.Identity(7) + short).dtype == torch.float32
    x = torch.ones(7, dtype=torch.float64) / 3
    assert torch.equal((A.shifted(1) - A) @ x, (A @ x + x) - A @ x)  # the identity rounds nothing to float32


def test_a_shift_moves_eigenvalues_and_leaves_starts_as_they_are():
    problem = ds.Problem(torch.nn.Linear(3, 2).double(), (torch.randn(5, 3).double(), torch.randint(0, 2, (5,))))
    H = ds.Hessian(problem)
    plain, moved = (ds.eigenpairs(operator, 3, rtol=1e-10).values for operator in (H, H.shifted(-0.25)))
    torch.testing.assert_close(moved, plain - 0.25, rtol=1e-9, atol=1e-12)
    start = named_start(ds.Identity(H.shape[0]) + H, "class_means")
    assert torch.equal(start, H.start_block("class_means"))


@pytest.mark.parametrize(
    "wrong",
    {
        "H + c": lambda: A + 0.1,
        "c + H": lambda: 0.1 + A,
        "H - c": lambda: A - np.float64(1),
        "c - H": lambda: 1 - A,
        "H + tensor": lambda: A + torch.eye(7),
        "tensor - H": lambda: torch.eye(7) - A,
        "array + H": lambda: np.eye(7) + A,
        "H + text": lambda: A + "1",
        "H * H": lambda: A * B,
        "H / H": lambda: A / B,
        "H @ H": lambda: A @ B,
        "H * tensor": lambda: A * torch.ones(7),
        "array * H": lambda: np.ones(7) * A,
        "H * text": lambda: A * "2",
        "H * complex": lambda: A * 1j,
        "H * complex tensor": lambda: A * torch.tensor(1j),
        "H * None": lambda: A * None,
        "H * nan": lambda: A * float("nan"),
        "learned * H": lambda: torch.tensor(2.0, requires_grad=True) * A,
        "H / 0": lambda: A / 0,
        "H / tensor": lambda: A / torch.ones(7),
        "H @ array": lambda: A @ np.ones(7),
        "array @ H": lambda: np.ones(7) @ A,
        "list @ H": lambda: [1.0] * 7 @ A,
        "tensor of other size @ H": lambda: torch.ones(6) @ A,
        "columns @ H": lambda: torch.ones(7, 2) @ A,
        "batched @ H": lambda: torch.ones(2, 7, 7) @ A,
        "shifted by infinity": lambda: A.shifted(float("inf")),
        "shifted by a vector": lambda: A.shifted(torch.ones(7)),
        "identity of no size": lambda: ds.Identity(0),
        "complex start": lambda: ds.eigenpairs(A, 2, start=torch.ones(7, dtype=torch.complex64)),
        "sparse start": lambda: ds.eigenpairs(A, 2, start=torch.eye(7).to_sparse()),
        "complex span": lambda: ds.overlap(torch.ones(7, 1), torch.ones(7, 1, dtype=torch.complex64)),
    }.items(),
    ids=lambda item: item[0],
)
def test_what_is_no_symmetric_operator_is_refused_in_our_words(wrong):
    with pytest.raises(DeepSpectraError, match=r"\w{3,} .*\.$") as caught:
        wrong[1]()
    assert isinstance(caught.value, (ShapeError, OptionError, DataError))


def test_refusals_say_what_to_write_instead():
    for call, advice in (
        (lambda: A + 0.1, r"A\.shifted\(c\)"),
        (lambda: A @ B, r"A @ \(B @ x\)"),
        (lambda: A * B, r"A @ \(B @ x\)"),
        (lambda: A @ np.ones(7), "from_numpy.*to_scipy"),
        (lambda: torch.tensor(2.0, requires_grad=True) * A, r"c \* \(A @ x\)"),
    ):
        with pytest.raises(DeepSpectraError, match=advice):
            call()


@pytest.mark.parametrize(
    "other", [torch.ones(6), torch.ones(6, 7), torch.ones(7, 1, 1), torch.tensor(1.0), [1.0] * 7]
)
def test_a_factor_of_the_wrong_shape_is_refused(other):
    with pytest.raises(ShapeError, match="must"):
        A @ other


def test_operators_of_different_sizes_cannot_be_added():
    with pytest.raises(ShapeError, match="sizes differ"):
        A + Matrix(symmetric(6))


def test_an_operator_is_added_to_an_operator_only():
    with pytest.raises(ShapeError, match="not to float"):
        A + 1.0


def test_a_matrix_must_be_square():
    with pytest.raises(ShapeError, match="square"):
        Matrix(torch.ones(3, 4))


def test_dense_refuses_what_does_not_fit():
    huge = Function(lambda block: block, 20_001)
    with pytest.raises(MemoryBudgetError, match="20,001"):
        huge.dense()


def test_a_named_start_needs_class_structure():
    with pytest.raises(OptionError, match="class_means"):
        named_start(A, "class_means")
    with pytest.raises(OptionError, match="class_means"):
        named_start(A + B, "class_means")


def test_an_operator_introduces_itself():
    assert repr(A) == "<A, 7 × 7, torch.float64, cpu>"


def test_scipy_sees_the_same_matrix() -> None:
    case, ref = case_and_reference("softmax_regression")
    adaptor = ds.Hessian(case.problem()).to_scipy()
    P = ref.num_parameters
    assert adaptor.shape == (P, P)
    assert adaptor.dtype == np.float64
    assert error(torch.from_numpy(adaptor @ np.eye(P)), ref.hessian) < RTOL
    v = np.arange(P, dtype=float)
    assert error(torch.from_numpy(adaptor @ v), ref.hessian @ torch.from_numpy(v)) < RTOL

    top = eigsh(adaptor, k=3, which="LA", v0=np.arange(1.0, P + 1))[0]
    assert np.allclose(np.sort(top), torch.linalg.eigvalsh(ref.hessian)[-3:], rtol=1e-9)


@pytest.mark.parametrize("shape", [(3,), (3, 2), (0,), (38, 1, 1)])
def test_a_product_with_the_wrong_shape_says_both_shapes(shape: tuple[int, ...]) -> None:
    case, ref = case_and_reference("softmax_regression")
    with pytest.raises(ShapeError, match=rf"\({ref.num_parameters}.*{shape[0]}"):
        ds.Hessian(case.problem()) @ torch.zeros(shape, dtype=torch.float64)


def test_a_block_without_columns_stays_empty() -> None:
    case, ref = case_and_reference("softmax_regression")
    empty = torch.zeros(ref.num_parameters, 0, dtype=torch.float64)
    assert (ds.GaussNewton(case.problem()) @ empty).shape == empty.shape


def test_operators_of_different_sizes_do_not_add() -> None:
    case, _ = case_and_reference("relu_mlp")
    problem = case.problem()
    with pytest.raises(ShapeError, match="sizes differ"):
        ds.Hessian(problem) + ds.Hessian(problem.restrict("0.*"))

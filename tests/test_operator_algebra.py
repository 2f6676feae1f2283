"""The algebra of operators is that of their dense matrices."""

import numpy as np
import pytest
import torch

from deepspectra.errors import MemoryBudgetError, OptionError, ShapeError
from deepspectra.operators.base import Function, LowRank, Matrix, Projected, Sum


def symmetric(size, seed=0, dtype=torch.float64):
    matrix = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return (matrix + matrix.T) / 2


A, B = Matrix(symmetric(7, 1), "A"), Matrix(symmetric(7, 2), "B")
F = torch.randn(7, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
D = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)
Q = torch.linalg.qr(F)[0]

CASES = {
    "matrix": (A, A.matrix),
    "sum": (A + B, A.matrix + B.matrix),
    "difference": (A - B, A.matrix - B.matrix),
    "negative": (-A, -A.matrix),
    "multiple": (2 * A, 2 * A.matrix),
    "multiple from the right": (A * 0.5, 0.5 * A.matrix),
    "nested": (A - 2 * (B - A) + 0.5 * (A + B), 3.5 * A.matrix - 1.5 * B.matrix),
    "low rank": (LowRank(F), F @ F.T),
    "low rank with diagonal": (LowRank(F, D), F @ torch.diag(D) @ F.T),
    "projected": (
        Projected(A, Q),
        (torch.eye(7) - Q @ Q.T) @ A.matrix @ (torch.eye(7) - Q @ Q.T),
    ),
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


def test_sums_are_flat_and_name_their_terms():
    total = A - 2 * (B - A)
    assert len(total.terms) == 3
    assert total.name == "A − 2·B + 2·A"
    assert (-A).name == "−A"


def test_a_sum_keeps_the_smallest_memory_budget():
    small = Matrix(symmetric(7))
    small.memory = 1000
    assert (A + small).memory == 1000


def test_a_projected_operator_annihilates_the_basis():
    assert float((Projected(A, Q) @ Q).abs().max()) < 1e-14


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
        A.start_block("class_means")
    with pytest.raises(OptionError, match="class_means"):
        Sum([(1.0, A), (1.0, B)]).start_block("class_means")


def test_an_operator_introduces_itself():
    assert repr(A) == "<A, 7 × 7, torch.float64, cpu>"

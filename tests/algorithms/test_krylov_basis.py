"""The Krylov basis: the Lanczos relation holds, whatever is appended, turned, dropped or tracked."""

import pytest
import torch

from deepspectra.algorithms.eigenpairs import eigenpairs
from deepspectra.algorithms.krylov_basis import Krylov
from deepspectra.algorithms.long_vectors import gaussian_rows
from deepspectra.operators.base import Matrix
from spectra import OUTLIERS, diagonal, rotated, trained


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


@pytest.mark.parametrize("restarts", [False, True])
def test_of_a_rounded_basis_it_is_counted_what_the_relation_lacks(restarts):
    """A Q − [Q, W] H is what roundings leave: its Gram matrix is known but for A δ after a restart, small here."""
    matrix = rotated(trained(1000), dtype=torch.float32)
    A = Matrix(matrix)
    A.basis = torch.bfloat16
    krylov = Krylov(A, 40)
    krylov.append(gaussian_rows(2, 1000, torch.Generator().manual_seed(0)))
    krylov.expand(2)
    while krylov.num_basis < 16:
        krylov.turn(torch.ones(krylov.num_pending, dtype=torch.float64))
        krylov.expand(1)
    if restarts:
        krylov.contract(krylov.ritz().coefficients[:, 4:])
    rows = krylov.rows[: krylov.num_rows].double()
    lacking = rows[: krylov.num_basis] @ matrix.double() - krylov.projected.T @ rows
    coefficients = krylov.ritz().coefficients
    true = (coefficients.T @ lacking).norm(dim=1)
    counted = krylov.lost_squares(coefficients).sqrt()
    assert float(true.min()) > 1e-5
    assert float((counted / true - 1).abs().max()) < 0.2
    assert float((rows @ rows.T - torch.eye(len(rows)).double()).abs().max()) < 10 * 2**-9 / 1000**0.5


def test_a_rounded_basis_at_a_tiny_scale_counts_the_same():
    counted = []
    for scale in (1.0, 2.0**-80):
        A = diagonal(scale * trained(500), torch.float32)
        A.basis = torch.bfloat16
        krylov = Krylov(A, 20)
        krylov.append(gaussian_rows(1, 500, torch.Generator().manual_seed(0)))
        for _ in range(8):
            krylov.expand(1)
        counted.append(krylov.ritz().residual_norms / scale)
    torch.testing.assert_close(*counted, rtol=1e-3, atol=0)


@pytest.mark.parametrize("shorter", [False, True])
def test_a_basis_is_taken_up_in_another_type(shorter):
    """Longer ones hold the same; what shorter ones round is counted."""
    values = trained(600)
    one, other = diagonal(values, torch.float32), diagonal(values, torch.float32)
    (other if shorter else one).basis = torch.bfloat16
    krylov = Krylov(one, 30)
    krylov.append(gaussian_rows(1, 600, torch.Generator().manual_seed(0)))
    for _ in range(12):
        krylov.expand(1)
    state = {name: value.clone() if torch.is_tensor(value) else value for name, value in krylov.state().items()}
    assert krylov.part().dtype == (torch.float32 if shorter else torch.bfloat16)
    twin = Krylov.of_state(other, state, krylov.part().clone().split([350, 0, 250], 1))
    assert twin.rows.is_rounded == shorter
    kept, taken = (basis.rows[: krylov.num_rows] for basis in (krylov, twin))
    assert torch.equal(taken, kept.bfloat16().float())
    before, after = krylov.ritz(), twin.ritz()
    assert torch.equal(after.residual_norms, before.residual_norms) != shorter
    if shorter:
        lost = (after.residual_norms.square() - before.residual_norms.square()).sqrt() / before.values.abs()
        assert 5e-4 < float(lost[-1]) < 3e-3


def test_an_invariant_subspace_leaves_nothing_pending():
    krylov = basis_of(torch.diag(torch.tensor([2.0, 2.0, 1.0, 1.0, 1.0], dtype=torch.float64)), 2)
    assert (krylov.num_basis, krylov.num_pending) == (2, 0)


def test_a_restarted_basis_at_a_tiny_scale_measures_its_residuals():
    matrix = rotated(trained())
    pairs = []
    for scale in (1.0, 1e-200):
        operator = Matrix(scale * matrix)
        operator.memory = 8 * len(matrix) * 14
        pairs.append(eigenpairs(operator, 5, rtol=1e-4))
    assert pairs[1].converged
    torch.testing.assert_close(pairs[1].residual_norms / 1e-200, pairs[0].residual_norms, rtol=1e-3, atol=1e-12)


def test_no_ghosts_after_200_steps_in_float32():
    krylov = Krylov(diagonal(trained(2000), torch.float32), 201)
    krylov.append(gaussian_rows(1, 2000, torch.Generator().manual_seed(0)))
    for _ in range(200):
        krylov.expand(1)
    values = krylov.ritz().values
    assert int((values > 0.05).sum()) == 10
    torch.testing.assert_close(values[-10:].flip(0), OUTLIERS, rtol=1e-5, atol=0)


def test_half_precision_products_get_a_float32_basis():
    pairs = eigenpairs(torch.diag(torch.arange(1, 9).to(torch.bfloat16)), 2, rtol=0.05)
    assert pairs.vectors.dtype == torch.float32
    assert pairs.values.tolist() == pytest.approx([8, 7], rel=0.02)


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
        assert abs(float(wanted @ krylov.rows[:1][0])) == pytest.approx(1)


def test_a_basis_of_known_pairs_answers_as_they_do():
    A = diagonal(trained(200), torch.float64)
    pairs = eigenpairs(A, num=5, rtol=1e-2)
    ritz = Krylov.of_pairs(A, pairs, 12).ritz()
    torch.testing.assert_close(ritz.values.flip(0), pairs.values)
    torch.testing.assert_close(ritz.residual_norms.flip(0), pairs.residual_norms)

"""The references against one another and against closed forms: what the other tests call the truth."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from nets import CASES, CLASSIFICATION, UNLABELLED, Case, labels
from reference import Reference, case_and_reference, error, onto, projections, rank

SMOOTH = [
    "mse_module",
    "callable_loss",
    "layernorm_gelu",
    "attention_module",
    "attention_function",
    "recurrent",
]


@pytest.mark.parametrize("name", CASES)
def test_hessian_is_gauss_newton_plus_residual(name: str) -> None:
    _, ref = case_and_reference(name)
    assert error(ref.gauss_newton + ref.residual, ref.hessian) < 1e-10
    assert error(ref.hessian.T, ref.hessian) < 1e-12


@pytest.mark.parametrize("name", [*SMOOTH, "conv_batchnorm", "tied_parameter", "every_option"])
def test_hessian_is_the_derivative_of_the_gradient(name: str) -> None:
    """(∇L(θ+εu) − ∇L(θ−εu)) / 2ε in a random direction, by a network moved for real."""
    case, ref = CASES[name](), case_and_reference(name)[1]
    parameters = [p for p in case.model.parameters() if p.requires_grad]
    u = torch.randn(ref.num_parameters, dtype=torch.float64)
    pieces = u.split([p.numel() for p in parameters])

    def moved(step: float) -> Tensor:
        with torch.no_grad():
            for p, piece in zip(parameters, pieces, strict=True):
                p.add_(step * piece.view_as(p))
        gradient = Reference(case).gradient
        with torch.no_grad():
            for p, piece in zip(parameters, pieces, strict=True):
                p.sub_(step * piece.view_as(p))
        return gradient

    step = 1e-5
    assert error((moved(step) - moved(-step)) / (2 * step), ref.hessian @ u) < 1e-6


@pytest.mark.parametrize("name", ["relu_mlp", "tied_modules", "attention_function"])
def test_gradient_is_the_derivative_of_the_loss(name: str) -> None:
    case, ref = CASES[name](), case_and_reference(name)[1]
    direction = {n: torch.randn_like(p) for n, p in case.model.named_parameters()}
    flat = torch.cat([direction[n].flatten() for n in ref.parameters])
    losses = []
    for step in (1e-6, -1e-6):
        with torch.no_grad():
            for n, p in case.model.named_parameters():
                p.add_(step * direction[n])
        losses.append(Reference(case).loss)
        with torch.no_grad():
            for n, p in case.model.named_parameters():
                p.sub_(step * direction[n])
    assert (losses[0] - losses[1]) / 2e-6 == pytest.approx((ref.gradient @ flat).item(), rel=1e-6)


def test_linear_regression_has_a_closed_form() -> None:
    """H = G = (2/D) E[I ⊗ (x xᵀ)] on the weight, R = 0."""
    case, ref = case_and_reference("linear_regression")
    x = case.tensors[0]
    expected = 2 / 3 * torch.kron(torch.eye(3, dtype=torch.float64), x.T @ x / len(x))
    assert error(ref.block(ref.hessian, "weight"), expected) < 1e-13
    assert ref.residual.abs().max() == 0


def test_softmax_regression_has_a_closed_form() -> None:
    """H = G = E[(diag p − ppᵀ) ⊗ xxᵀ] on the weight, and it is torch's own."""
    case, ref = case_and_reference("softmax_regression")
    x, y = case.tensors
    p = case.model(x).softmax(1).detach()
    expected = sum(
        torch.kron(torch.diag(q) - torch.outer(q, q), torch.outer(a, a)) for q, a in zip(p, x, strict=True)
    )
    assert error(ref.block(ref.hessian, "weight"), expected / len(x)) < 1e-13
    assert error(ref.block(ref.gauss_newton, "weight"), expected / len(x)) < 1e-13

    def loss(weight: Tensor) -> Tensor:
        return nn.functional.cross_entropy(x @ weight.T + case.model.bias.detach(), y)

    weight = case.model.weight.detach()
    assert error(torch.autograd.functional.hessian(loss, weight).reshape(15, 15), expected / len(x)) < 1e-13


@pytest.mark.parametrize("name", CLASSIFICATION)
def test_output_hessian_of_cross_entropy_is_a_scaled_softmax_covariance(name: str) -> None:
    """∂²L/∂z_i² = s_i (diag p_i − p_i p_iᵀ) with class weights, smoothing and ignored labels."""
    _, ref = case_and_reference(name)
    p = ref.probabilities
    covariance = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    assert error(ref.scales[:, None, None] * covariance, ref.output_hessian) < 1e-12


@pytest.mark.parametrize("name", CLASSIFICATION)
def test_rows_square_to_gauss_newton(name: str) -> None:
    _, ref = case_and_reference(name)
    assert error(ref.rows.T @ ref.rows, ref.gauss_newton) < 1e-12


@pytest.mark.parametrize("name", ["softmax_regression", "ragged", "unbalanced", "absent_class", "every_option"])
def test_projections_agree_with_means(name: str) -> None:
    """AᵀΠA is the sum over means of the published formulas."""
    _, ref = case_and_reference(name)
    for part, expected in ref.parts_by_means.items():
        assert error(ref.parts[part], expected) < 1e-11, part


@pytest.mark.parametrize("name", ["softmax_regression", "unbalanced", "absent_class", "every_option"])
def test_projections_are_orthogonal_and_complete(name: str) -> None:
    _, ref = case_and_reference(name)
    five = [ref.projections[part] for part in ("class", "logit", "interaction", "within", "true")]
    assert error(sum(five), torch.eye(len(ref.rows), dtype=torch.float64)) < 1e-12
    for a, first in enumerate(five):
        for b, second in enumerate(five):
            assert (first @ second - (first if a == b else 0 * first)).abs().max() < 1e-11


def test_projections_have_the_ranks_of_an_analysis_of_variance() -> None:
    """C, C−1, C²−3C+1, C and the rest."""
    C, n = 5, 40
    weights = torch.rand(n, C, dtype=torch.float64)
    found = {part: round(p.trace().item()) for part, p in projections(weights, torch.arange(n) % C).items()}
    assert found["class"] == found["true"] == C
    assert found["logit"] == C - 1
    assert found["interaction"] == C**2 - 3 * C + 1
    assert found["cross"] == C * (C - 2)
    assert found["within"] == n * C - C**2
    assert found["logit_first"] == C
    assert found["class_second"] == C - 1


def test_kernel_attention_equals_attention_by_hand() -> None:
    """The reference's attention backend computes softmax(QKᵀ/√d)V."""
    q, k, v = torch.randn(3, 2, 2, 4, 3, dtype=torch.float64)
    with sdpa_kernel(SDPBackend.MATH):
        given = nn.functional.scaled_dot_product_attention(q, k, v)
    assert error(given, (q @ k.mT / 3**0.5).softmax(-1) @ v) < 1e-14


def test_onto_and_rank_see_dependent_columns() -> None:
    columns = torch.randn(9, 3, dtype=torch.float64)
    columns = torch.cat([columns, columns @ torch.randn(3, 2, dtype=torch.float64)], 1)
    assert rank(columns) == 3
    assert error(onto(columns) @ columns, columns) < 1e-13
    assert onto(columns).trace().item() == pytest.approx(3)


def test_error_is_relative_to_what_is_expected() -> None:
    expected = torch.tensor([1e6, 1.0])
    assert error(expected + 1, expected) == pytest.approx(1e-6)
    with pytest.raises(AssertionError, match="shape"):
        error(torch.ones(2, 1), torch.ones(2))


def test_every_case_is_tiny() -> None:
    for name in CASES:
        case, ref = case_and_reference(name)
        assert isinstance(case, Case)
        assert ref.num_parameters <= 1500
        assert len(ref.outputs[0]) <= 40
        assert name in UNLABELLED or 3 <= ref.num_classes <= 5


def test_labels_helper_covers_every_class() -> None:
    assert set(labels(9, 4).tolist()) == {0, 1, 2, 3}

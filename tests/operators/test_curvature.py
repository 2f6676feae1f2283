"""One conformance suite: every operator on every network is its dense definition, however it is fed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import deepspectra as ds
from deepspectra.algorithms.krylov_basis import Krylov
from nets import CASES, OPERATORS, Case, digits_problem
from reference import Reference, case_and_reference, error

RTOL = 1e-9


PAIRS = ["relu_mlp", "conv_batchnorm", "layernorm_gelu", "token_classes", "every_option", "mse_module"]


@pytest.mark.parametrize("kind", OPERATORS)
@pytest.mark.parametrize("name", CASES)
def test_products_equal_the_dense_definition(name: str, kind: str) -> None:
    case, ref = case_and_reference(name)
    operator, truth = OPERATORS[kind](case.problem()), getattr(ref, kind)
    P = ref.num_parameters
    block = torch.randn(P, 5, dtype=torch.float64)
    assert operator.shape == (P, P)
    assert operator.dtype == torch.float64
    assert error(operator @ block, truth @ block) < RTOL
    assert error(operator @ block[:, 0], truth @ block[:, 0]) < RTOL
    assert error(operator @ block[:, :1], truth @ block[:, :1]) < RTOL
    assert error(operator @ (1e-6 * block), 1e-6 * (truth @ block)) < RTOL


@pytest.mark.parametrize("kind", OPERATORS)
def test_dense_is_the_definition_and_symmetric(kind: str) -> None:
    case, ref = case_and_reference("layernorm_gelu")
    dense = OPERATORS[kind](case.problem()).dense()
    assert error(dense, getattr(ref, kind)) < RTOL
    assert error(dense.T, dense) < RTOL


@pytest.mark.parametrize("name", ["relu_mlp", "attention_module", "every_option"])
def test_an_operator_is_linear_and_leaves_its_input_alone(name: str) -> None:
    case, ref = case_and_reference(name)
    H = ds.Hessian(case.problem())
    u, v = torch.randn(2, ref.num_parameters, dtype=torch.float64)
    kept = u.clone()
    combined = H @ (2.0 * u - 3.0 * v)
    assert error(combined, 2.0 * (H @ u) - 3.0 * (H @ v)) < RTOL
    assert torch.equal(u, kept)
    assert not (H @ u).requires_grad


@pytest.mark.parametrize("name", ["relu_mlp", "layernorm_gelu", "token_classes", "mse_module"])
def test_hessian_is_gauss_newton_plus_residual(name: str) -> None:
    case, ref = case_and_reference(name)
    problem = case.problem()
    H, G, R = ds.Hessian(problem), ds.GaussNewton(problem), ds.Residual(problem)
    V = torch.randn(ref.num_parameters, 3, dtype=torch.float64)
    assert error((H - G) @ V, ref.residual @ V) < RTOL
    assert error((G + R) @ V, ref.hessian @ V) < RTOL
    assert error((H - G - R) @ V + H @ V, H @ V) < RTOL
    assert error((2.0 * G - R * 0.5) @ V, (2.0 * ref.gauss_newton - 0.5 * ref.residual) @ V) < RTOL
    assert error((-H).dense(), -ref.hessian) < RTOL


def test_gauss_newton_is_positive_semidefinite_and_the_residual_is_not() -> None:
    case, _ = case_and_reference("ragged")
    problem = case.problem()
    g, r = (torch.linalg.eigvalsh(operator(problem).dense()) for operator in (ds.GaussNewton, ds.Residual))
    assert g[0] > -1e-12 * g[-1]
    assert r[0] < -1e-3 * r[-1]


def test_linear_regression_has_no_residual_and_a_constant_hessian() -> None:
    """H = (2/D) I ⊗ E[xxᵀ] wherever the weights are."""
    case = CASES["linear_regression"]()
    x = case.tensors[0]
    expected = 2 / 3 * torch.kron(torch.eye(3, dtype=torch.float64), x.T @ x / len(x))
    for _ in range(2):
        problem = case.problem(parameters="weight")
        assert error(ds.Hessian(problem).dense(), expected) < 1e-12
        assert ds.Residual(problem).dense().abs().max() < 1e-12
        with torch.no_grad():
            case.model.weight.add_(1.0)


def test_empirical_fisher_is_not_gauss_newton() -> None:
    case, ref = case_and_reference("relu_mlp")
    assert error(ds.EmpiricalFisher(case.problem()).dense(), ref.gauss_newton) > 0.1


# ------------------------------------------------------------------------------------------ feeding the data


def _feeds(case: Case) -> dict[str, Any]:
    x, y = case.tensors
    return {
        "tensors": ((x, y), {}),
        "dataset": (TensorDataset(x, y), {}),
        "loader": (DataLoader(TensorDataset(x, y), batch_size=3), {}),
        "shuffled loader": (DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True), {}),
        "list": ([(x, y)], {}),
        "reversed": ((x.flip(0), y.flip(0)), {"batch_size": 5}),
        **{f"batch_size={b}": ((x, y), {"batch_size": b}) for b in (1, 3, 7, len(x))},
    }


@pytest.mark.parametrize("name", PAIRS)
def test_batching_and_order_do_not_matter(name: str) -> None:
    case, ref = case_and_reference(name)
    v = torch.randn(ref.num_parameters, dtype=torch.float64)
    for feed, (data, options) in _feeds(case).items():
        problem = case.problem(data, **options)
        assert problem.loss() == pytest.approx(ref.loss, rel=1e-12), feed
        assert error(problem.gradient(), ref.gradient) < RTOL, feed
        for kind, operator in OPERATORS.items():
            assert error(operator(problem) @ v, getattr(ref, kind) @ v) < RTOL, (feed, kind)


# ---------------------------------------------------------------------------------------- types and adaptors


@pytest.mark.parametrize("kind", OPERATORS)
@pytest.mark.parametrize("name", ["relu_mlp", "conv_batchnorm", "attention_function", "every_option", "mse_module"])
def test_float32_products_are_near_float64(name: str, kind: str) -> None:
    ref = case_and_reference(name)[1]
    case = CASES[name](torch.float32)
    with torch.no_grad():
        for p32, p64 in zip(case.model.parameters(), case_and_reference(name)[0].model.parameters(), strict=True):
            p32.copy_(p64)
    case.model.load_state_dict(case_and_reference(name)[0].model.state_dict())
    case.batches = [tuple(t.float() if t.is_floating_point() else t for t in b) for b in ref.case.batches]
    operator = OPERATORS[kind](case.problem())
    V = torch.randn(ref.num_parameters, 3, dtype=torch.float64)
    given = operator @ V.float()
    assert given.dtype == torch.float32
    assert error(given.double(), getattr(ref, kind) @ V) < 5e-5


def test_dtype_computes_a_float32_model_in_float64() -> None:
    case = CASES["relu_mlp"](torch.float32)
    problem = case.problem(dtype=torch.float64)
    H = ds.Hessian(problem)
    assert H.dtype == torch.float64
    assert case.model[0].weight.dtype == torch.float32
    double = CASES["relu_mlp"](torch.float32)
    double.model.double()
    double.batches = [(x.double(), y) for x, y in double.batches]
    assert error(H.dense(), Reference(double).hessian) < RTOL


@pytest.mark.parametrize("wrap", [lambda H: H, lambda H: H.shifted(1.0)])
def test_graphs_make_way_for_pairs_beside_a_full_basis_only_where_both_do_not_fit(
    wrap: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five vectors in float64 beyond the basis's memory, and graphs that leave room for one more or one less."""
    kept: list[int] = []
    rows: list[int] = []
    combine = Krylov.combine

    def recorded(krylov: Krylov, coordinates: Tensor) -> Tensor:
        kept.append(graphs.num_bytes())
        rows.append(krylov.num_rows)
        return combine(krylov, coordinates)

    monkeypatch.setattr(Krylov, "combine", recorded)
    problem = digits_problem()
    H, vector = ds.Hessian(problem), 8 * problem.num_parameters
    graphs, allowance = H.products.graphs, H.products.allowance
    H.memory = 13 * vector

    def made(room: int | None = None) -> ds.Eigenpairs:
        allowance.size = 10**9
        H @ torch.ones(problem.num_parameters, dtype=torch.float64)
        allowance.size = 10**9 if room is None else graphs.num_bytes() + room * vector
        return ds.eigenpairs(wrap(H), 5, rtol=1e-2, start="random")

    made()
    beyond = rows[-1] + 5 - 13  # how many rows are in use at the end is up to the last restart
    assert beyond > 1
    for room, makes_way in ((beyond + 1, False), (beyond - 1, True)):
        pairs = made(room)
        assert pairs.num_products > 13
        assert (kept[-1] == 0) == makes_way
        assert allowance.reserved == 0
    H.memory = 100 * vector
    made()
    assert kept[-1] > 0, "pairs and basis fit its own memory"

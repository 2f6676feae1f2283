"""Sums over batches: whatever is in a batch, and whatever state PyTorch is in, products are those of all the data."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import deepspectra as ds
from nets import CASES, OPERATORS
from reference import case_and_reference, error

RTOL = 1e-9


@pytest.mark.parametrize("kind", OPERATORS)
def test_products_are_right_where_gradients_are_switched_off(kind: str) -> None:
    case, ref = case_and_reference("relu_mlp")
    v = torch.randn(ref.num_parameters, dtype=torch.float64)
    product, gradient = getattr(ref, kind) @ v, ref.gradient
    with torch.no_grad():
        problem = case.problem()
        assert error(OPERATORS[kind](problem) @ v, product) < RTOL
        assert error(problem.gradient(), gradient) < RTOL


def test_batches_without_a_row_that_counts_add_nothing() -> None:
    """Every label of the first batch is ignored."""
    case, ref = CASES["ragged"](), case_and_reference("ragged")[1]
    x = torch.randn(4, 5, dtype=torch.float64)
    problem = case.problem([(x, torch.full((4,), -100)), *case.batches, (x, torch.full((4,), -100))])
    assert problem.loss() == pytest.approx(ref.loss, rel=1e-12)
    v = torch.randn(ref.num_parameters, dtype=torch.float64)
    for kind, operator in OPERATORS.items():
        assert error(operator(problem) @ v, getattr(ref, kind) @ v) < RTOL, kind


def test_a_shuffling_loader_gives_the_same_product_twice() -> None:
    case, ref = case_and_reference("relu_mlp")
    x, y = case.tensors
    H = ds.Hessian(case.problem(DataLoader(TensorDataset(x, y), batch_size=3, shuffle=True)))
    v = torch.randn(ref.num_parameters, dtype=torch.float64)
    assert error(H @ v, H @ v) < 1e-12


def test_a_wide_block_equals_its_columns() -> None:
    case, ref = case_and_reference("conv_pool")
    block: Tensor = torch.randn(ref.num_parameters, 70, dtype=torch.float64)
    for kind, operator in OPERATORS.items():
        assert error(operator(case.problem()) @ block, getattr(ref, kind) @ block) < RTOL, kind


def test_training_on_does_not_move_an_operator() -> None:
    """The problem is a snapshot: weights changed afterwards change neither its loss nor its products."""
    case, ref = CASES["relu_mlp"](), case_and_reference("relu_mlp")[1]
    problem = case.problem()
    H = ds.Hessian(problem)
    with torch.no_grad():
        case.model[0].weight.mul_(3.0)
    v = torch.randn(ref.num_parameters, dtype=torch.float64)
    assert problem.loss() == pytest.approx(ref.loss, rel=1e-12)
    assert error(H @ v, ref.hessian @ v) < RTOL


def test_gradients_the_user_holds_are_left_alone() -> None:
    case = CASES["relu_mlp"]()
    x, y = case.tensors
    torch.nn.functional.cross_entropy(case.model(x), y).backward()
    before = [p.grad.clone() for p in case.model.parameters()]
    problem = case.problem()
    problem.gradient()
    ds.Hessian(problem) @ torch.ones(problem.num_parameters, dtype=torch.float64)
    assert all(torch.equal(p.grad, kept) for p, kept in zip(case.model.parameters(), before, strict=True))

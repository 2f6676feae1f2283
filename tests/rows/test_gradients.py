"""Gradients as rows: what is multiplied with them is what they are, held or not."""

from __future__ import annotations

import pytest
import torch

import deepspectra as ds
from deepspectra.derivatives import products
from deepspectra.rows import gradients
from nets import CASES, CENTRAL
from reference import close


@pytest.mark.parametrize("hold", [False, True])
@pytest.mark.parametrize("by_group", [False, True])
@pytest.mark.parametrize("name", CENTRAL)
def test_products_with_all_means_at_once_are_those_of_single_vectors(
    name: str, by_group: bool, hold: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many columns take the means of one class at a time, where classes can be told apart; few go through J."""
    problem = CASES[name]().problem()
    groups = [c % 2 for c in range(problem.num_classes)] if by_group else None
    parts = ds.decompose(problem, effects="two-way", hold=hold, groups=groups)
    num = parts.projections.num_classes
    block = torch.randn(problem.num_parameters, num + 1, dtype=torch.float64)
    expected = parts.rows.cells(parts.projections).T @ block
    reserved = parts.rows.products.allowance.reserved
    alone = [parts.rows.coordinates(parts.projections, column[:, None]) for column in block.T]
    assert close(torch.cat(alone, 1), expected, expected)
    assert close(parts.rows.coordinates(parts.projections, block), expected, expected)
    assert parts.rows.products.allowance.reserved == reserved
    if not hold and problem.splits_by_class:
        monkeypatch.delattr(type(parts.rows), "apply")
        assert close(parts.rows.coordinates(parts.projections, block), expected, expected)


@pytest.mark.parametrize("by_group", [False, True])
@pytest.mark.parametrize("first", ["class", "logit"])
@pytest.mark.parametrize("name", CENTRAL)
def test_batch_by_batch_is_the_same_as_with_arrays_of_all_rows(
    name: str, first: str, by_group: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = CASES[name]().problem()
    groups = [c % 2 for c in range(problem.num_classes)] if by_group else None
    block = torch.randn(problem.num_parameters, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def everything() -> list[torch.Tensor]:
        parts = ds.decompose(problem, effects="two-way", groups=groups, first=first)
        rows, projections = parts.rows, parts.projections
        cells = torch.randn(*projections.cell_weights.shape, 2, dtype=torch.float64, generator=torch.Generator())
        return [
            projections.cell_weights,
            rows.coordinates(projections, block),
            rows.combine(projections, cells),
            rows.squared_norms(projections, block, tuple(parts)),
            *(parts[part] @ block for part in parts),
        ]

    expected = everything()
    monkeypatch.setattr(gradients, "HELD_BYTES", 0)
    monkeypatch.setattr(products, "COLUMN_BYTES", 1)  # columns one at a time
    monkeypatch.delattr(gradients.GradientRows, "apply")
    for found, right in zip(everything(), expected, strict=True):
        assert close(found, right, right)

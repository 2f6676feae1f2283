"""Gradients as rows: what is multiplied with them is what they are, held or not."""

from __future__ import annotations

import pytest
import torch

import deepspectra as ds
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

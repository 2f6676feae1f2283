"""The one idea: averages over indices are orthogonal projections, against the same as dense matrices."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from deepspectra.errors import MemoryBudgetError, OptionError
from deepspectra.rows.projections import FOUR_WAY, TWO_WAY, Projections, collinear, grouped, num_groups, numbered
from reference import error, projections, projections_of

LABELS = torch.tensor([0, 0, 1, 1, 1, 3, 3])  # nothing of class 2


def weights() -> Tensor:
    p = torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).softmax(1)
    return p / 7


def dense(made: Projections, part: str) -> Tensor:
    """The projection of a part as a matrix (N C, N C)."""
    identity = torch.eye(28, dtype=torch.float64)
    return made.project(part, identity.view(7, 4, 28)).view(28, 28)


@pytest.mark.parametrize("groups", [None, torch.tensor([0, 1, 0, 2])])
@pytest.mark.parametrize("first", ["class", "logit"])
def test_projections_are_those_of_averages_as_dense_matrices(first: str, groups: Tensor | None) -> None:
    expected = projections_of(SimpleNamespace(weights=weights(), labels=LABELS), groups, first)
    made = Projections(weights(), LABELS, first=first, groups=groups)
    for part, matrix in expected.items():
        assert error(dense(made, part), matrix) < 1e-10, part
    assert error(dense(made, "cross"), expected["logit"] + expected["interaction"]) < 1e-10


@pytest.mark.parametrize("parts", [FOUR_WAY, TWO_WAY])
def test_the_parts_are_orthogonal_and_sum_to_the_identity(parts: tuple[str, ...]) -> None:
    made = Projections(weights(), LABELS)
    matrices = torch.stack([dense(made, part) for part in parts])
    products = torch.einsum("aij,bjk->abik", matrices, matrices)
    expected = torch.zeros_like(products)
    for j, matrix in enumerate(matrices):
        expected[j, j] = matrix
    assert float((products - expected).abs().max()) < 1e-12
    assert error(matrices.sum(0), torch.eye(28, dtype=torch.float64)) < 1e-12


def test_squared_norms_are_the_analysis_of_variance() -> None:
    made = Projections(weights(), LABELS)
    rows = torch.randn(7, 4, 3, dtype=torch.float64)
    found = made.squared_norms(rows, TWO_WAY)
    for part, norms in zip(TWO_WAY, found, strict=True):
        assert error(norms, (dense(made, part) @ rows.view(28, 3)).square().sum(0)) < 1e-12, part
    assert error(found.sum(0), rows.square().sum((0, 1))) < 1e-12


def test_bases_make_the_projections_and_have_their_ranks() -> None:
    made = Projections(weights(), LABELS)
    on = projections(weights(), LABELS)
    for part in ("class", "logit", "true", "means"):
        basis = made.expand(made.basis(part)).flatten(0, 1)
        matrix = basis @ basis.T
        expected = torch.eye(28, dtype=torch.float64) - on["within"] if part == "means" else on[part]
        assert error(matrix, expected) < 1e-10, part
    assert made.basis("class").shape == (4, 4, 3)  # an absent class has no mean
    with pytest.raises(OptionError, match="no basis"):
        made.basis("within")


def test_the_class_and_the_true_mean_have_their_lengths_from_one_sum() -> None:
    cells = Projections(weights(), LABELS).cell_weights
    by_class, by_true = collinear(cells)
    off = cells.sum(1) - cells.diagonal()
    assert error(by_class[[0, 1, 3]], off[[0, 1, 3]].rsqrt()) < 1e-12
    assert error(by_true[[0, 1, 3]], cells.diagonal()[[0, 1, 3]].rsqrt()) < 1e-12
    assert by_class[2] == by_true[2] == 0


@pytest.mark.parametrize("part", ["means", "cross", "interaction"])
def test_pairs_of_too_many_classes_are_refused_with_what_to_do(part: str) -> None:
    many = Projections.of_cells(torch.ones(1000, 1000, dtype=torch.float64))
    with pytest.raises(MemoryBudgetError, match=r"1,000 classes as columns take 7450\.58 GiB.*groups="):
        many.basis(part)


@pytest.mark.parametrize("groups", [[0, 1], [0.0, 1, 1, 0], [0, 2, 2, 0], [0, -1, 1, 0], "ab"])
def test_groups_are_numbered_without_gaps_one_a_class(groups: object) -> None:
    assert grouped(None, 4, torch.device("cpu")) is None
    by_name = grouped(lambda c: "odd" if c % 2 else "even", 4, torch.device("cpu"))
    assert by_name is not None
    assert by_name.tolist() == [0, 1, 0, 1]
    assert numbered(lambda c: 7 - c // 2, 4) == ([1, 1, 0, 0], ["6", "7"])
    right = grouped([0, 1, 1, 0], 4, torch.device("cpu"))
    assert num_groups(right, 4) == 2
    assert num_groups(None, 4) == 4
    with pytest.raises(OptionError, match="groups must be"):
        grouped(groups, 4, torch.device("cpu"))  # type: ignore[arg-type]


def test_an_unknown_part_or_order_is_refused() -> None:
    made = Projections(weights(), LABELS)
    with pytest.raises(OptionError, match="unknown part 'mean'"):
        made.project("mean", torch.zeros(7, 4, 1, dtype=torch.float64))
    with pytest.raises(OptionError, match="'class' or 'logit'"):
        Projections(weights(), LABELS, first="true")

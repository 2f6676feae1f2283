"""Averages of rows by name: the means that they are, what they leave, and what goes with what."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import deepspectra as ds
from deepspectra.errors import OptionError
from deepspectra.rows.averages import METHODS, Averages, means_of, positive, taken
from deepspectra.rows.projections import FOUR_WAY, TWO_WAY
from reference import case_and_reference, error, projections_of, without

GROUPS = torch.tensor([0, 1, 0, 2])


@pytest.mark.parametrize("first", ["class", "logit"])
@pytest.mark.parametrize("groups", [None, GROUPS])
def test_what_goes_along_is_what_lies_in_the_span_of_what_is_named(first: str, groups: Tensor | None) -> None:
    """By projection the parts in the span vanish and no others; subtraction takes the same."""
    _, ref = case_and_reference("relu_mlp")
    on = projections_of(ref, groups, first)
    for removed in (("class",), ("logit",), ("class", "logit"), ("interaction",), ("class", "interaction")):
        named = torch.stack([on[part] for part in removed]).sum(0)
        vanish = {
            part
            for part, projection in on.items()
            if float(without(ref.rows.T @ projection @ ref.rows, ref.rows, named, "projection").trace())
            < 1e-9 * float((ref.rows.T @ projection @ ref.rows).trace())
        }
        assert set(taken(removed, TWO_WAY, first=first)) == vanish, removed


def test_a_part_named_twice_or_within_a_sum_goes_once() -> None:
    case, _ = case_and_reference("relu_mlp")
    found = ds.gram_spectrum(case.problem(), effects="two-way")
    for once, again in (
        (("class",), ("class", "class")),
        (("class",), ("class", "true")),
        (("means",), ("means", "class", "logit")),
        (("cross",), ("interaction", "cross")),
        (("means",), ("class", "cross")),
    ):
        for method in METHODS:
            torch.testing.assert_close(
                found.knockout(*once, method=method),
                found.knockout(*again, method=method),
                atol=1e-12,
                rtol=0,
            )
    assert not found.knockout("means", "within").any()
    assert taken(("cross", "class"), FOUR_WAY) == ("class", "cross", "true")
    assert taken(("means",), ("mean", "class", "within")) == ("mean", "class")
    assert taken(("class",), ("mean", "class", "within")) == ("class",)


@pytest.mark.parametrize(
    ("removed", "parts", "method", "known"),
    [
        ((), TWO_WAY, "subtraction", "class, logit, interaction, true, means, cross, within"),
        (("mean",), TWO_WAY, "subtraction", "class, logit"),
        (("logit",), FOUR_WAY, "subtraction", "class, cross, true, means, within"),
        (("within",), FOUR_WAY, "projection", "class, cross, true, means"),
        (("cross",), ("mean", "class", "within"), "subtraction", "mean, class, means, within"),
    ],
)
def test_names_that_are_not_there_are_refused(
    removed: tuple[str, ...], parts: tuple[str, ...], method: str, known: str
) -> None:
    with pytest.raises(OptionError, match=f"name some of {known}"):
        taken(removed, parts, method=method)


def test_averages_over_members_are_the_mean_and_the_class_means_about_it() -> None:
    rows = torch.randn(8, 5, dtype=torch.float64)
    member = torch.nn.functional.one_hot(torch.tensor([0, 0, 1, 1, 1, 3, 3, 0]), 4).double()
    member[7] = 0  # does not count
    made = Averages.of_members(member)
    assert list(made) == ["mean", "class"]
    assert made.parts == ("mean", "class", "within")
    counted, centre = rows[:7], rows[:7].mean(0)
    means = torch.stack([rows[member[:, c] > 0].mean(0) for c in (0, 1, 3)])
    mean = made.project("mean", rows)
    assert error(mean[:7], centre.expand(7, 5)) < 1e-12
    expected = (means - centre)[torch.tensor([0, 0, 1, 1, 1, 2, 2])]
    assert error(made.project("class", rows)[:7], expected) < 1e-12
    assert error(made.project("within", rows)[:7], counted - centre - expected) < 1e-12
    both = sum(basis @ basis.T for basis in (made.together(("mean",)), made.together(("class",))))
    assert error(both, made.every @ made.every.T) < 1e-12


def test_means_are_what_factors_have_weighted_and_nothing_where_there_is_no_weight() -> None:
    means, weights = torch.randn(5, 3, dtype=torch.float64), torch.tensor([4.0, 0.25, 0.0]).double()
    factor = means * weights.sqrt()
    factor[:, 2] = 1e-12  # rounding
    found = means_of(factor, weights)
    assert error(found[:, :2], means[:, :2]) < 1e-12
    assert found[:, 2].tolist() == [0] * 5
    assert positive(weights).tolist() == [4, 0.25, 1]

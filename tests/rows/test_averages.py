"""Averages of rows by name: the means that they are, what they leave, and what goes with what."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import deepspectra as ds
from deepspectra.errors import OptionError
from deepspectra.rows.averages import METHODS, taken
from deepspectra.rows.projections import FOUR_WAY, TWO_WAY
from reference import case_and_reference, projections_of, without

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

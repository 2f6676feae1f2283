"""Arguments that many functions take are refused by their name, with what was expected."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from deepspectra.argument_checks import check_choice, check_columns, check_count, check_rtol, seeded
from deepspectra.errors import DataError, OptionError, ShapeError


@pytest.mark.parametrize("value", [0, 11, 2.0, "3", True, None])
def test_a_count_is_an_integer_within_its_limits(value: Any) -> None:
    for right in (1, 10):
        check_count("num", right, 1, 10)
    with pytest.raises(OptionError, match=rf"num must be an integer, at least 1 and at most 10; got {value!r}"):
        check_count("num", value, 1, 10)


def test_a_choice_is_one_of_those_that_there_are() -> None:
    check_choice("which", "largest", ("largest", "smallest"))
    with pytest.raises(OptionError, match="which='top'; it is one of 'largest', 'smallest'"):
        check_choice("which", "top", ("largest", "smallest"))


@pytest.mark.parametrize("rtol", [0, 1, -0.1, math.nan])
def test_a_relative_tolerance_lies_between_0_and_1(rtol: float) -> None:
    check_rtol(0.5)
    with pytest.raises(OptionError, match="rtol"):
        check_rtol(rtol)


def test_a_vector_is_one_column() -> None:
    vector = torch.arange(3.0, requires_grad=True)
    assert check_columns("v", vector).tolist() == [[0.0], [1.0], [2.0]]
    assert not check_columns("v", vector).requires_grad
    assert check_columns("v", torch.ones(3, 2), 3).shape == (3, 2)


@pytest.mark.parametrize(
    ("error", "value"),
    [
        (ShapeError, torch.ones(4)),
        (ShapeError, torch.ones(3, 0)),
        (ShapeError, torch.ones(3, 1, 1)),
        (ShapeError, [1.0, 2.0, 3.0]),
        (DataError, torch.ones(3, dtype=torch.complex64)),
        (DataError, torch.ones(3).to_sparse()),
        (DataError, torch.tensor([1.0, math.inf, 0.0])),
    ],
)
def test_columns_are_dense_real_and_finite(error: type[Exception], value: Any) -> None:
    with pytest.raises(error, match="start"):
        check_columns("start", value, 3)


@pytest.mark.parametrize("seed", [2**63, -(2**63) - 1, 0.5])
def test_a_seed_has_64_bits_and_decides_what_is_drawn(seed: Any) -> None:
    first, again, other = (torch.rand(4, generator=seeded(one)) for one in (3, 3, -3))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    with pytest.raises(OptionError, match="seed"):
        seeded(seed)

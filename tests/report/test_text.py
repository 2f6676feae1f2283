"""Pieces of text and numbers as the page shows them, escaped."""

import math

import numpy as np
import pytest
import xarray as xr

from deepspectra.report.text import (
    attribute,
    escaped,
    finite,
    joined,
    json_attribute,
    number_html,
    operator_name,
    symbol,
)


def test_text_is_safe_in_html():
    assert escaped('<b a="1">&') == "&lt;b a=&quot;1&quot;&gt;&amp;"
    assert symbol("<i>") == "&lt;i&gt;"
    assert (symbol("hessian"), operator_name("hessian"), operator_name("mine")) == ("H", "Hessian H", "mine")


def test_attributes_are_plain_values_and_nan_is_none():
    dataset = xr.Dataset(
        attrs={
            "size": np.int64(3),
            "loss": math.nan,
            "list": np.array([2.5]),
            "notes": '{"a": 1}',
            "odd": "{",
        }
    )
    size = attribute(dataset, "size")
    assert (size, type(size)) == (3, int)
    assert attribute(dataset, "loss", "unknown") == "unknown"
    assert attribute(dataset, "missing", 7) == 7
    assert attribute(dataset, "list") == 2.5
    assert json_attribute(dataset, "notes") == {"a": 1}
    assert json_attribute(dataset, "odd") == {"odd": "{"}
    assert json_attribute(dataset, "missing") == {}


@pytest.mark.parametrize(("items", "text"), [(["A"], "A"), (["A", "B"], "A and B"), (["A", "B", "C"], "A, B and C")])
def test_items_are_listed_as_people_do(items, text):
    assert joined(items) == text


def test_numbers_in_sentences_can_be_told_by_the_page():
    assert number_html("-0.00012345") == '<span class="number">−0.000123</span>'
    assert [finite(value) for value in (None, math.nan, math.inf, 0.0)] == [False, False, False, True]

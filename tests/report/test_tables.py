"""Tables of the page: each cell shows a number and keeps its full value."""

import math
import re

import xarray as xr

from deepspectra.report import tables
from deepspectra.report.tables import about, table_html


def test_cells_show_few_digits_and_keep_all():
    text = table_html(
        "mine",
        "A <table>",
        ["name", "n"],
        [["<a>", 1 / 3], ["b", 1234567], ["c", math.nan], ["d", ("50%", 0.5)]],
    )
    assert "A &lt;table&gt;" in text
    assert "<td>&lt;a&gt;</td>" in text
    assert re.findall(r'data-value="([^"]*)">([^<]*)<', text) == [
        ("0.3333333333333333", "0.3333"),
        ("1234567", "1,234,567"),
        ("", "–"),
        ("0.5", "50%"),
    ]
    assert text.count("<th class=n>") == 1


def test_rows_that_stand_out_are_marked():
    text = table_html("mine", "", ["n"], [[1], [2], [3]], strong=[1])
    assert re.findall(r"<tr( class=outlier)?><td", text) == ["", " class=outlier", ""]


def test_numbers_of_a_clock_have_two_digits():
    assert about(1.23456) == ("1.2", 1.23456)
    assert about(None) is about(math.nan) is None


def test_a_table_without_shares_is_not_said_to_have_them():
    values = {"eigenvalue": (("operator", "pair"), [[2.0, 1.0]])}
    dataset = xr.Dataset(values, {"operator": ["hessian"]})
    assert "<h3>Eigenvalues <" in tables.eigenvalue(dataset)
    assert "shares" not in tables.eigenvalue(dataset)


def test_an_analysis_without_the_numbers_has_no_table():
    assert tables.eigenvalue(xr.Dataset()) == ""
    assert tables.trace(xr.Dataset()) == ""


def test_traces_stand_beside_those_of_the_parts_with_errors_or_exact():
    dataset = xr.Dataset(
        {
            "trace": ("operator", [4.0]),
            "trace_standard_error": ("operator", [0.25]),
            "part_trace": ("part", [3.0, 1.0]),
            "part_trace_standard_error": ("part", [0.0, math.nan]),
        },
        {"operator": ["gauss_newton"], "part": ["class", "within"]},
    )
    found = re.findall(r"<tr><td>([^<]*)</td><td[^>]*>([^<]*)</td><td[^>]*>([^<]*)</td>", tables.trace(dataset))
    assert found == [
        ("Gauss-Newton G", "4", "0.25"),
        ("part of G: class", "3", "exact"),
        ("part of G: within", "1", "–"),
    ]

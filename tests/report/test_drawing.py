"""What the charts share: ticks, records of a dataset, and charts that say what they lack."""

import math

import numpy as np
import pytest
import xarray as xr

from deepspectra.errors import DataError, OptionError
from deepspectra.report.drawing import (
    blank,
    both_sides,
    decades,
    finished,
    holds,
    needs,
    number,
    pivot,
    plain,
    rows,
    save_chart,
    tick,
)


@pytest.fixture
def dataset():
    return xr.Dataset(
        {
            "value": (("operator", "pair"), [[1.0, np.nan], [3.0, 4.0]]),
            "error": (("operator", "pair"), [[0.1, 0.2], [np.nan, 0.4]]),
            "empty": ("pair", [np.nan, np.nan]),
        },
        {"operator": ["hessian", "residual"]},
    )


@pytest.mark.parametrize(
    ("low", "high", "most", "expected"),
    [
        (1, 10, 6, [1, 2, 5, 10]),
        (0.1, 100, 6, [0.1, 1, 10, 100]),
        (1, 100, 6, [1, 3, 10, 30, 100]),
        (1e-6, 1e6, 6, [1e-6, 1e-3, 1, 1e3, 1e6]),
        (3, 4, 6, []),
    ],
)
def test_ticks_of_a_logarithmic_axis_are_round_and_few(low, high, most, expected):
    assert decades(low, high, most) == pytest.approx(expected)


def test_ticks_on_both_sides_of_zero_are_the_same():
    found = both_sides(-30, 200, 1)
    assert 0.0 in found
    assert min(found) >= -30
    assert {-value for value in found if value < 0} <= set(found)
    assert found == sorted(found)


def test_labels_of_ticks_have_characters_that_every_font_has():
    assert [tick(value) for value in (0, 0.01, -10, 1e-5, 2e7)] == ["0", "0.01", "−10", "1e−5", "2e7"]
    assert number(math.nan) == "–"


def test_records_leave_out_cells_without_the_needed_number(dataset):
    assert rows(dataset, "value", "error") == [
        {"operator": "hessian", "pair": 0, "value": 1.0, "error": 0.1},
        {"operator": "residual", "pair": 0, "value": 3.0, "error": None},
        {"operator": "residual", "pair": 1, "value": 4.0, "error": 0.4},
    ]
    assert len(rows(dataset, "value", "error", need=["value", "error"])) == 2
    assert rows(dataset, "missing") == []
    assert pivot(dataset, "value", "pair", "operator") == {
        ("hessian",): {0: 1.0},
        ("residual",): {0: 3.0, 1: 4.0},
    }
    assert plain(np.float64(1 / 3)) == 0.333333333


def test_a_chart_says_what_it_lacks_before_it_is_drawn(dataset):
    @needs("value", "empty")
    def chart(_):
        raise AssertionError("must not be drawn")

    assert holds(dataset, "value", "error")
    assert not holds(dataset, "empty")
    assert "no values of empty" in chart.lacks(dataset)
    with pytest.raises(DataError, match="no values of empty"):
        chart(dataset)
    few = needs("value", some=lambda _: [], reason="there are no outliers")(lambda _: None)
    assert few.lacks(dataset) == "there are no outliers"
    assert needs("value")(lambda _: None).lacks(dataset) == ""


def test_a_chart_is_saved_by_the_suffix_of_its_file(tmp_path):
    chart = finished(blank([{"x": 1}]).mark_point().encode(x="x:Q"))
    save_chart(chart, tmp_path / "chart.svg")
    assert "<svg" in (tmp_path / "chart.svg").read_text()
    with pytest.raises(OptionError, match=r"chart\.gif.*\.svg"):
        save_chart(chart, tmp_path / "chart.gif")

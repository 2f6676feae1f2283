"""Results as data frames."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import deepspectra as ds
from deepspectra import errors
from deepspectra.dataframes import text_table

MATRIX = torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.5, 0.0, -1.0]).double())


@pytest.mark.parametrize(
    ("result", "columns"),
    [
        (ds.eigenpairs(MATRIX, 2), ("values", "residual_norms", "error_bounds", "angle_bounds")),
        (ds.density(MATRIX, 2, 3), ("nodes", "weights", "probes")),
        (ds.density(MATRIX, 2, 3).smooth(num_points=8), ("grid", "density", "standard_error")),
        (ds.diagonal(MATRIX, 4), ("values", "standard_error")),
        (ds.diagonal(MATRIX.bfloat16(), 4), ("values", "standard_error")),
    ],
    ids=["eigenpairs", "density", "curve", "diagonal", "diagonal of bfloat16"],
)
def test_a_frame_has_the_arrays_of_a_result_as_columns(result, columns):
    frame = result.to_dataframe()
    assert tuple(frame.columns) == columns
    for name in columns:
        assert np.array_equal(frame[name].to_numpy(), getattr(result, name).double().numpy(), equal_nan=True)


def test_the_frame_of_a_number_is_one_row():
    frame = ds.trace(MATRIX, 2).to_dataframe()
    assert frame.shape == (1, 3)
    assert frame.quantity[0] == "trace"
    assert math.isfinite(frame.value[0])


def test_a_table_of_text_has_words_left_numbers_right_and_three_digits():
    table = text_table(("layer", "λ"), [("a", 1234.5678), ("long name", math.nan), ("", "as is")], "a note")
    assert table.splitlines() == [
        "layer             λ",
        "a          1.23e+03",
        "long name         –",
        "              as is",
        "a note",
    ]


def test_a_table_for_latex_has_significant_digits_and_powers_of_ten():
    lines = ds.eigenpairs(torch.diag(torch.tensor([12345.0, 2e-9]).double()), 2).to_latex(2).splitlines()
    assert lines[2].startswith(r"values & residual\_norms & ")
    assert lines[4].startswith(r"$1.2 \cdot 10^{4}$ & ")
    assert lines[5].startswith(r"$2 \cdot 10^{-9}$ & ")


@pytest.mark.parametrize("digits", [0, 1.5])
def test_digits_are_a_number_of_them(digits):
    with pytest.raises(errors.OptionError, match="digits"):
        ds.trace(MATRIX, 2).to_latex(digits)


def test_a_table_of_commas_keeps_all_digits(tmp_path):
    pairs = ds.eigenpairs(MATRIX, 3)
    pairs.to_csv(tmp_path / "pairs.csv")
    first = (tmp_path / "pairs.csv").read_text().splitlines()[1].split(",")
    assert float(first[0]) == float(pairs.values[0])

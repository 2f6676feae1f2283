"""What a saved analysis says, for charts, captions and tables alike."""

import math

import numpy as np
import pytest
import xarray as xr

from deepspectra.report.saved_outliers import knockout_summary, mean_shares, outliers, outliers_left


@pytest.mark.parametrize(
    ("count", "upper", "words"),
    [
        (math.nan, math.nan, "not counted"),
        (None, None, "not counted"),
        (3, math.nan, "at least 3"),
        (0, math.nan, "none found"),
        (2, 5, "2 to 5 left"),
        (2, 2, "2 left"),
        (0, 0, "none left"),
    ],
)
def test_words_of_what_is_left_fit_what_is_known(count, upper, words):
    row = {"knockout": "class", "knockout_outliers": count, "knockout_upper": upper}
    assert outliers_left(row) == words
    if count == 2:
        assert outliers_left(row | {"knockout": "nothing"}) == "2 outliers"


@pytest.fixture
def dataset():
    operators, parts = ["gauss_newton", "hessian"], ["class", "within"]
    shares = np.array([[[0.7, 0.3], [0.6, 0.4]], [[0.9, 0.1], [0.5, 0.5]]])
    return xr.Dataset(
        {
            "eigenvalue": (("operator", "pair"), [[2.0, 5.0], [7.0, 3.0]]),
            "is_outlier": (("operator", "pair"), [[1, 1], [1, 0]]),
            "residual_norm": (("operator", "pair"), [[0.1, 0.2], [0.3, 0.4]]),
            "share": (("operator", "pair", "part"), shares),
            "mean_share": (("operator", "part"), shares.mean(1)),
            "knockout_value": (
                ("operator", "knockout", "method", "pair"),
                [[[[5.0, 2.0]] * 2, [[1.0, 1.5], [0.5, np.nan]]], [[[7.0, 3.0]] * 2, [[2.0, 1.0]] * 2]],
            ),
            "knockout_outliers": (("operator", "knockout", "method"), np.ones((2, 2, 2))),
        },
        {
            "operator": operators,
            "part": parts,
            "knockout": ["nothing", "class"],
            "method": ["subtraction", "projection"],
        },
    )


def test_outliers_are_ranked_by_operator_with_their_shares(dataset):
    found = [(row["operator"], row["rank"], row["eigenvalue"], row["share class"]) for row in outliers(dataset)]
    assert found == [("hessian", 1, 7, 0.9), ("gauss_newton", 1, 5, 0.6), ("gauss_newton", 2, 2, 0.7)]
    assert mean_shares(dataset)["hessian"] == {"class": pytest.approx(0.7), "within": pytest.approx(0.3)}


def test_each_knock_out_has_the_largest_eigenvalue_that_it_leaves_and_nothing_once(dataset):
    found = {
        (row["operator"], row["knockout"], row["method"]): row["knockout_value"] for row in knockout_summary(dataset)
    }
    assert found == {
        ("gauss_newton", "nothing", "subtraction"): 5,
        ("gauss_newton", "class", "subtraction"): 1.5,
        ("gauss_newton", "class", "projection"): 0.5,
        ("hessian", "nothing", "subtraction"): 7,
        ("hessian", "class", "subtraction"): 2,
        ("hessian", "class", "projection"): 2,
    }

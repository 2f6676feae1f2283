"""Verdicts on claims: what intervals and bounds settle, and what they leave open."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from reproductions.claims import explained, makes, misclassification, rank_correlations
from reproductions.measure import operator_measures
from reproductions.pages import _changes
from reproductions.verdicts import Verdict, interval, judged, spread, table
from scipy.stats import binomtest, spearmanr

from claims_records import OUTLIERS, record, settings
from deepspectra.analysis.knockouts import Knockout


def test_error_bars_are_standard_errors_over_seeds() -> None:
    assert spread([1.0, 2.0, 3.0]) == f"2.00 ± {1 / math.sqrt(3):.2f}"
    assert spread([1.0, math.nan]) == "1.00"
    assert spread([]) == "–"
    assert judged([], lambda _: True) == Verdict("Not measured.")
    assert table(["a"], [["b"]]) == "| a |\n| --- |\n| b |"


def test_a_rank_correlation_has_an_interval() -> None:
    fit = [one | {"value": OUTLIERS * (j + 1), "test_accuracy": 0.5 + j / 100} for j, one in enumerate(settings(12))]
    found = misclassification(fit)
    assert found.verdicts[0].text.startswith("Holds: surely negative on 1 of 1")
    assert found.rows[0][3] == "-1.00"
    mixed = [one | {"test_accuracy": float((7 * j) % 12)} for j, one in enumerate(fit)]
    assert misclassification(mixed).verdicts[0].text == "Open: surely negative on 0 of 1 data sets (1 open)."
    falls = [one | {"test_accuracy": -one["test_accuracy"]} for one in fit]
    assert misclassification(falls).verdicts[0].text == "Does not hold: surely negative on 0 of 1 data sets."
    both = [one | {"data": "mnist"} for one in mixed]
    assert misclassification([*fit, *both]).verdicts[0].word == "Open, at least in part"
    seeds = [one | {"per_class": 10} for one in fit]  # nothing is known of other settings
    assert misclassification(seeds).verdicts[0].text == "Not measured."


@pytest.mark.parametrize(
    ("yes", "num", "text"),
    [
        (13, 13, "Holds: in 13 of 13 networks."),
        (12, 12, "Open, at least in part: in 12 of 12 networks."),
        (0, 13, "Does not hold: in 0 of 13 networks."),
        (4, 16, "Open, at most in part: in 4 of 16 networks."),
        (15, 30, "Holds in part: in 15 of 30 networks."),
        (1, 2, "Open: in 1 of 2 networks."),
    ],
)
def test_what_the_interval_of_a_share_does_not_settle_is_open(yes: int, num: int, text: str) -> None:
    truths = iter(np.arange(num) < yes)
    assert judged(settings(num), lambda _: next(truths)).text == text


def test_seeds_of_a_setting_count_once_and_open_networks_for_both_ends() -> None:
    seeds = [record(seed=j) for j in range(13)]
    assert judged(seeds, lambda _: True).text == "Open: in 13 of 13 networks."
    test = binomtest(12, 20)
    exact = test.proportion_ci(0.95, method="exact")
    assert interval(0.6, 0.6, 20) == pytest.approx((exact.low, exact.high))
    assert interval(0, 1, 20) == (0, 1)
    truths = iter([None] * 3 + [False] * 12)
    found = judged(settings(15), lambda _: next(truths))
    assert found.text == "Open, at most in part: in 0 of 15 networks (3 open)."
    assert found.networks == f"mlp 0 of 15 (3 open); 95% interval of the share 0.00 to {interval(0, 0.2, 15)[1]:.2f}"


def test_a_lead_within_the_error_of_shifts_is_open() -> None:
    shifts = {"shift_cross": np.array([0.104, 0.1212, 0.1219])}
    assert makes(shifts, "cross", "bump") is None
    assert makes(shifts | {"shift_cross": np.array([0.1, 0.2, 0.3])}, "cross", "bump") is False
    assert makes(shifts | {"shift_cross": np.array([0.1, 0.3, 0.2])}, "cross", "bump") is True
    assert makes(shifts | {"shift_cross": np.array([0.01, 0.09, 0.01])}, "cross", "bump") is False  # it hardly moves


def test_a_knock_out_is_judged_on_both_bounds() -> None:
    at_most = "hessian_left_class_subtraction_at_most"
    one = record(left=2)  # of ten
    assert explained(one, "class") is True  # nothing else is near the threshold
    assert explained(one | {at_most: 3}, "class") is None
    assert explained(one | {at_most: math.nan}, "class") is True  # of a store with cells that have it
    near = np.array([2.0, 2.0, 0.24, *[0.1] * 10])  # at .25, and the search stops at 5 %
    unknown = one | {"hessian_value_without_class_subtraction": near}
    assert explained(unknown, "class") is None
    assert explained(unknown | {at_most: 2}, "class") is True
    assert explained(record(left=3) | {at_most: 3}, "class") is False


def test_both_bounds_are_recorded() -> None:
    values, norms = torch.tensor([2.0, 0.9]), torch.tensor([0.1, 0.2])
    knockout = Knockout((), "subtraction", values, norms, 1.0)
    found = SimpleNamespace(
        values=values, num_outliers=2, bulk_edge=0.8, mean_shares={}, knockout=lambda *_, **__: knockout
    )
    measured = operator_measures(found)
    assert measured["left_class_projection"] == 1
    assert measured["left_class_projection_at_most"] == 2


def test_what_changed_is_what_cannot_be_the_same() -> None:
    fitted, before = settings(13), settings(13, left=8)
    lines = _changes(fitted, before)
    assert lines[0].startswith("13 networks that fit their data beside the 13 of the same kinds")
    assert lines[2:] == [
        "- The outliers are attributable to the class means (by subtraction). Before: Does not hold: in 0 of 13 "
        "networks. Fitted: Holds: in 13 of 13 networks."
    ]
    assert _changes(fitted[:4], [*before[:4], record("lenet")])[2:] == ["- No verdict is surely another one."]


def test_ranks_of_a_sample_with_repeats_are_those_of_its_list() -> None:
    rng = np.random.default_rng(0)
    pairs = rng.integers(5, size=(9, 2)).astype(float)  # with ties
    weights = rng.multinomial(9, np.full(9, 1 / 9), size=20)
    expected = [spearmanr(*np.repeat(pairs, some, axis=0).T).statistic for some in weights]
    np.testing.assert_allclose(rank_correlations(pairs, weights), expected, atol=1e-12)
    assert np.isnan(rank_correlations(np.ones((3, 2)), np.ones((1, 3)))).all()

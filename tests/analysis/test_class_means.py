"""Class means are weighted means of gradients, whatever the weights."""

from __future__ import annotations

import pytest
import torch

import deepspectra as ds
from nets import CASES, CLASSIFICATION
from reference import Reference, case_and_reference, error

RTOL = 1e-8


@pytest.mark.parametrize("name", CLASSIFICATION)
def test_class_means_are_weighted_means_of_the_extended_gradients(name: str) -> None:
    """g_{c,k} = Σ_{i∈c} w_{i,k} g_{i,k} / w_{c,k} and g_c = Σ_{k≠c} w_{c,k} g_{c,k} / w_c."""
    case, ref = case_and_reference(name)
    means = ds.class_means(case.problem())
    w_c, g_c, w_ck, g_ck = ref.means
    assert error(means.class_weights, w_c) < RTOL
    assert error(means.cross_class_weights, w_ck) < RTOL
    assert error(means.class_means, g_c) < RTOL
    off = ~torch.eye(ref.num_classes, dtype=torch.bool)
    assert error(means.cross_class_means[off], g_ck[off]) < RTOL
    assert error(means.cross_class_means, g_ck) < RTOL


def test_the_weights_of_all_pairs_sum_to_one() -> None:
    case, _ = case_and_reference("unbalanced")
    means = ds.class_means(case.problem())
    assert means.cross_class_weights.sum().item() == pytest.approx(1, rel=1e-12)
    assert means.cross_class_weights.sum(1) == pytest.approx(torch.tensor([14, 5, 2, 1]).double() / 22, rel=1e-12)


def test_an_absent_class_has_weight_zero_and_finite_means() -> None:
    case, ref = case_and_reference("absent_class")
    means = ds.class_means(case.problem())
    assert means.class_weights[2] == 0
    assert means.cross_class_weights[2].abs().sum() == 0
    assert means.cross_class_weights[:, 2].min() == 0
    assert means.cross_class_weights[[0, 1, 3], 2].min() > 0
    assert means.class_means.isfinite().all()
    assert means.cross_class_means.isfinite().all()
    assert means.class_means.shape == (4, ref.num_parameters)


def test_one_dominant_example_does_not_swamp_a_small_class() -> None:
    """Weights of 1e-6 against 1: each part keeps its relative accuracy."""
    case = CASES["unbalanced"]()
    with torch.no_grad():
        case.model[2].weight.mul_(8.0)
    ref = Reference(case)
    means = ds.class_means(case.problem())
    for c in range(4):
        assert error(means.class_means[c], ref.means[1][c]) < 1e-7

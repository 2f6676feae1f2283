"""Neural collapse by its definitions, and where it is complete."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import deepspectra as ds
from nets import CASES, labels
from reference import error


def simplex(num_classes: int) -> Tensor:
    return torch.eye(num_classes, dtype=torch.float64) - 1 / num_classes


def test_collapsed_features_are_seen_as_such() -> None:
    """Features at the corners of a simplex, and a classifier that is their means."""
    model = nn.Linear(4, 4, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(3 * simplex(4))
    y = torch.arange(4).repeat(3)
    found = ds.layers(ds.Problem(model, (5.0 + simplex(4)[y], y)))[""].collapse
    assert found is not None
    for value in (found.nc1, found.nc2_norms, found.nc2_angles, found.nc2_simplex, found.nc3, found.nc4):
        assert abs(value) < 1e-10
    assert error(found.cosines.fill_diagonal_(1), (4 * simplex(4) / 3).fill_diagonal_(1)) < 1e-10


def test_neural_collapse_by_its_definitions() -> None:
    torch.manual_seed(5)
    model = nn.Linear(6, 3).double()
    x, y = torch.randn(20, 6, dtype=torch.float64), labels(20, 3)
    found = ds.layers(ds.Problem(model, (x, y)))[""].collapse
    assert found is not None
    means = torch.stack([x[y == c].mean(0) for c in range(3)])
    shares = torch.bincount(y).double() / 20
    centred = means - x.mean(0)
    between = centred.T @ (shares[:, None] * centred)
    within = (x - means[y]).T @ (x - means[y]) / 20
    assert found.nc1 == pytest.approx(float((within @ torch.linalg.pinv(between, rtol=1e-8)).trace()) / 3, rel=1e-8)
    norms = centred.norm(dim=1)
    assert found.nc2_norms == pytest.approx(float(norms.std() / norms.mean()))
    duality = model.weight.detach() / model.weight.detach().norm() - centred / centred.norm()
    assert found.nc3 == pytest.approx(float(duality.square().sum()))
    nearest = torch.cdist(x, means).argmin(1)
    assert found.nc4 == pytest.approx(float((nearest != model(x).argmax(1)).double().mean()))


def test_an_absent_class_has_no_angles() -> None:
    (found, *_) = ds.layers(CASES["absent_class"]().problem()).values()
    assert found.collapse is not None
    assert found.collapse.cosines[2].isnan().all()
    assert math.isfinite(found.collapse.nc1)
    assert math.isnan(found.collapse.nc3)
    assert found.khatri_rao is not None
    assert found.khatri_rao.class_cosine.isnan().tolist() == [False, False, True, False]


def test_outputs_for_classes_without_examples_change_no_measure_of_the_others() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(30, 4).double(), torch.arange(30) % 3
    found = [ds.collapse(ds.Problem(nn.Linear(4, num).double(), (x, y)))[""] for num in (3, 50)]
    assert found[1].nc1 == pytest.approx(found[0].nc1)
    assert found[1].nc2_simplex == pytest.approx(found[0].nc2_simplex)


def test_collapse_is_that_of_layers() -> None:
    problem = CASES["conv_pool"]().problem()
    alone, found = ds.collapse(problem), ds.layers(problem)
    assert list(alone) == [name for name, layer in found.items() if layer.collapse]
    for name, measures in alone.items():
        other = found[name].collapse
        assert other is not None
        assert measures.nc1 == pytest.approx(other.nc1)
        assert measures.nc4 == other.nc4
    assert "NC1" in str(alone)
    assert len(str(alone).splitlines()) == len(alone) + 2


def test_the_nearest_mean_is_found_far_from_zero() -> None:
    torch.manual_seed(0)
    y = torch.arange(60) % 3
    scattered = 2 * simplex(3).float()[y] + torch.randn(60, 3) / 10
    model = nn.Linear(3, 3)
    with torch.no_grad():
        model.weight.copy_(torch.eye(3))
        model.bias.fill_(-1e4)
    found = ds.layers(ds.Problem(model, (1e4 + scattered, y)))[""].collapse
    assert found is not None
    assert found.nc4 == 0

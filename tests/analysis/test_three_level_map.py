"""The map of class means and cross-class means."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import deepspectra as ds
from deepspectra.errors import OptionError
from nets import CASES

SIZE = 6


def made_of(centres: torch.Tensor, spread: float) -> ds.analysis.means.ClassMeans:
    """Means with δ_{c,k} = centre_c plus noise; the class means are recomputed by the map itself."""
    generator = torch.Generator().manual_seed(0)
    template = ds.class_means(CASES["relu_mlp"]().problem())
    noise = torch.randn(SIZE, SIZE, centres.shape[1], generator=generator, dtype=torch.float64)
    cells = torch.full((SIZE, SIZE), 1 / SIZE**2, dtype=torch.float64)
    return replace(
        template,
        class_means=centres,
        cross_class_means=centres[:, None] + spread * noise,
        class_weights=cells.sum(1),
        cross_class_weights=cells,
    )


def nearest(found: ds.analysis.hierarchy.ThreeLevelMap) -> torch.Tensor:
    return torch.cdist(found.cross_classes.flatten(0, 1), found.classes).argmin(1).view(SIZE, SIZE)


def test_cells_that_differ_by_class_gather_around_their_class() -> None:
    found = ds.three_level_map(made_of(torch.eye(SIZE, 8, dtype=torch.float64), 0.05))
    assert torch.equal(nearest(found), torch.arange(SIZE)[:, None].expand(SIZE, SIZE))


def test_cells_that_differ_by_logit_gather_by_logit() -> None:
    means = made_of(torch.eye(SIZE, 8, dtype=torch.float64), 0.05)
    crossed = means.cross_class_means
    assert crossed is not None
    found = ds.three_level_map(replace(means, cross_class_means=crossed.transpose(0, 1)))
    places = found.cross_classes
    within = (places - places.mean(0)).square().sum()
    assert within < 0.05 * (places - places.mean((0, 1))).square().sum()


def test_the_map_is_that_of_its_seed_and_of_no_scale() -> None:
    means = made_of(torch.eye(SIZE, 8, dtype=torch.float64), 0.3)
    first = ds.three_level_map(means, seed=3).cross_classes
    assert torch.equal(first, ds.three_level_map(means, seed=3).cross_classes)
    assert means.cross_class_means is not None
    tiny = replace(means, cross_class_means=means.cross_class_means * 2.0**-60)
    assert torch.equal(first, ds.three_level_map(tiny, seed=3).cross_classes)


def test_an_absent_class_has_no_place() -> None:
    for of in ("gradients", "errors"):
        found = ds.three_level_map(ds.class_means(CASES["absent_class"]().problem(), of=of))
        assert found.classes.isnan().any(1).tolist() == [False, False, True, False]
        assert found.cross_classes[2].isnan().all()
        assert found.cross_classes[0].isfinite().all()
        assert "4 class means and 12 cross-class means" in str(found)


def test_errors() -> None:
    problem = CASES["relu_mlp"]().problem()
    for means in (ds.class_means(problem, of="features"), ds.class_means(problem, level="class")):
        with pytest.raises(OptionError, match="cross-class means"):
            ds.three_level_map(means)
    with pytest.raises(OptionError, match=r"means is Problem; expected those of class_means"):
        ds.three_level_map(problem)

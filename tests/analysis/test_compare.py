"""Overlap of eigenspaces of two networks: measured against dense blocks, predicted against double sums."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

import deepspectra as ds
from deepspectra.errors import ShapeError
from nets import CASES, labels
from reference import Reference, error


def pair(name: str) -> tuple[ds.Problem, ds.Problem, Reference, Reference]:
    """A case, and the same network with other weights."""
    first, second = CASES[name](), CASES[name]()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for value in second.model.parameters():
            value.copy_(value[torch.randperm(len(value), generator=generator)] * 1.1)
    return first.problem(), second.problem(), Reference(first), Reference(second)


def top(matrix: Tensor, num: int) -> Tensor:
    return torch.linalg.eigh((matrix + matrix.T) / 2)[1].flip(1)[:, :num]


def overlaps(one: Tensor, other: Tensor) -> Tensor:
    return torch.stack([(one[:, :k].T @ other[:, :k]).square().sum() / k for k in range(1, one.shape[1] + 1)])


@pytest.mark.parametrize("name", ["relu_mlp", "conv_pool"])
def test_measured_curves_are_those_of_dense_eigenvectors(name: str) -> None:
    first, second, ref, other = pair(name)
    found = ds.compare(first, second, num=6, num_whole=4)
    for layer in found.values():
        own = [p for p in ref.parameters if p.rpartition(".")[0] == layer.name]
        blocks = [side.block(side.gauss_newton, *own) for side in (ref, other)]
        num = len(layer.ks)
        assert num >= 3
        expected = overlaps(*(top(block, num) for block in blocks))
        assert error(layer.measured, expected) < 1e-7, layer.name
        assert layer.baseline[0] == 1 / len(blocks[0])
    whole = overlaps(top(ref.gauss_newton, 4), top(other.gauss_newton, 4))
    assert (found.whole - whole).abs().max() < 1e-2


@pytest.mark.parametrize("name", ["relu_mlp", "conv_pool"])
def test_predictions_are_sums_over_products_of_factors(name: str) -> None:
    first, second, _, _ = pair(name)
    found = ds.compare(first, second, num=6)
    sides = [ds.kronecker(problem, "kfac") for problem in (first, second)]
    for layer in found.values():
        factors = []
        for side in sides:
            block = side.blocks[layer.name]
            s, u = torch.linalg.eigh(block.left[0, 0])
            a, t = torch.linalg.eigh(block.right[0, 0])
            order = torch.outer(s, a).flatten().argsort(descending=True)[: len(layer.ks)]
            factors.append((u, t, [(int(o) // len(a), int(o) % len(a)) for o in order]))
        (u, t, mine), (v, r, theirs) = factors
        m, last = len(u), layer.name == list(found)[-1]
        for k in range(1, len(layer.ks) + 1):
            exact = approximate = 0.0
            for (i, j), (x, y) in itertools.product(mine[:k], theirs[:k]):
                aligned = float(t[:, j] @ r[:, y]) ** 2
                exact += float(u[:, i] @ v[:, x]) ** 2 * aligned
                approximate += aligned / m
            assert float(layer.kronecker[k - 1]) == pytest.approx(exact / k, abs=1e-9)
            expected = exact if last else approximate
            assert float(layer.predicted[k - 1]) == pytest.approx(expected / k, abs=1e-9)
        assert layer.alignment == pytest.approx(float(t[:, -1] @ r[:, -1]) ** 2)


def two_layers(seed: int, mean: float) -> ds.Problem:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 4, bias=False)).double()
    x = torch.randn(60, 6, dtype=torch.float64) + mean
    return ds.Problem(model, (x, labels(60, 4)))


def test_a_dominant_mean_feature_puts_the_peak_at_the_number_of_outputs() -> None:
    found = ds.compare(two_layers(0, 8.0), two_layers(1, 8.0), num=14)
    first = found["0"]
    assert first.alignment > 0.99
    live = int((first.measured > 0.9 * first.peak[1]).nonzero()[0]) + 1
    assert first.predicted_peak[0] <= first.outputs
    assert live <= first.outputs
    assert first.peak[1] > 3 * float(first.baseline[first.peak[0] - 1])
    spread = ds.compare(two_layers(0, 0.0), two_layers(1, 0.0), num=14)["0"]
    assert spread.alignment < first.alignment


def test_a_network_shares_every_eigenspace_with_itself() -> None:
    problem = CASES["relu_mlp"]().problem()
    found = ds.compare(problem, problem)
    for layer in found.values():
        assert (layer.measured - 1).abs().max() < 1e-8
        assert (layer.kronecker - 1).abs().max() < 1e-8
        assert layer.alignment == pytest.approx(1)
    assert (found.whole - 1).abs().max() < 1e-8


def test_text_and_errors() -> None:
    first, second, _, _ = pair("relu_mlp")
    seen: list[tuple[int, int | None, str]] = []
    found = ds.compare(first, second, num=3, progress=lambda *now: seen.append(now))
    assert seen == [(j, len(found), name) for j, name in enumerate(found)]
    assert len(str(found).splitlines()) == len(found) + 2
    assert {layer.case for layer in found.values()} <= {"at m", "early", "delayed"}
    with pytest.raises(KeyError, match="no layer 'nothing'"):
        found["nothing"]
    with pytest.raises(ShapeError, match="the same parameters; these differ"):
        ds.compare(first, CASES["conv_pool"]().problem())

"""G's blocks, layer by layer: how often the data are gone through for them, and that two networks' go together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import nn

import deepspectra as ds
from deepspectra.analysis.layer_measures import layer_measures
from deepspectra.rows import batch_capture
from nets import labels
from reference import error

DEPTH = 7


def problem(seed: int, memory: int | None = None) -> ds.Problem:
    torch.manual_seed(seed)
    layers = [part for _ in range(DEPTH - 1) for part in (nn.Linear(8, 8), nn.Tanh())]
    torch.manual_seed(9)
    made = ds.Problem(nn.Sequential(*layers, nn.Linear(8, 3)).double(), (torch.randn(60, 8).double(), labels(60, 3)))
    made.memory = memory or made.memory
    return made


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[int, str]]:
    """(problem, parameter) → how often its features and errors are captured from all the data."""
    counts: Counter[tuple[int, str]] = Counter()
    capture = batch_capture.capture

    def counting(graph: batch_capture.Graph, plan: object, scalars: object, names: frozenset[str] | None):
        given = graph.problem
        if given.num_examples == 60:  # and not of a few, to learn how they lie
            counts.update((id(given), name) for name in names or given.parameters)
        return capture(graph, plan, scalars, names)

    monkeypatch.setattr(batch_capture, "capture", counting)
    return counts


CALLS: dict[str, Callable[[list[ds.Problem]], object]] = {
    "compare": lambda two: ds.compare(*two, num_whole=0),
    "dissect": lambda two: [ds.dissect(one, num_whole=0) for one in two],
    "kronecker_quality": lambda two: [ds.kronecker_quality(one, ks=(1,)) for one in two],
    "layers": lambda two: [ds.layers(one, hessian=False, kronecker=("kfac", "cfac")) for one in two],
    "layer_measures": lambda two: [layer_measures(one) for one in two],
}


@pytest.mark.parametrize("name", CALLS)
def test_what_fits_memory_is_captured_once_a_network(name: str, captured: Counter) -> None:
    CALLS[name]([problem(0), problem(1)])
    assert len(captured) == 2 * 2 * DEPTH
    assert set(captured.values()) == {1}


@pytest.mark.parametrize(("name", "most"), [("compare", 3), ("dissect", 3), ("kronecker_quality", 4)])
def test_else_the_data_are_gone_through_a_fixed_number_of_times(name: str, most: int, captured: Counter) -> None:
    """To see how large they are, for second moments, for "ekfac" its diagonal, and layer by layer."""
    small = [problem(seed, memory=64_000) for seed in (0, 1)]
    CALLS[name](small)
    assert set(captured.values()) == {most}


class Net(nn.Module):
    """Layers that are registered in any order."""

    def __init__(self, order: str) -> None:
        super().__init__()
        for name in order:
            torch.manual_seed(ord(name))
            setattr(self, name, nn.Linear(8, 3 if name == "c" else 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


def test_layers_of_two_networks_are_paired_by_name() -> None:
    data = (torch.randn(60, 8).double(), labels(60, 3))
    one, two = (ds.Problem(Net(order).double(), data) for order in ("abc", "cba"))
    found = ds.compare(one, two, num_whole=0)
    assert list(found) == list(one.layers) == list(reversed(two.layers))
    for layer in found.values():
        assert error(layer.measured, torch.ones_like(layer.measured)) < 1e-8

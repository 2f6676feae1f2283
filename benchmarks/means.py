"""Class means and cross-class means of the gradients, which no peer has."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import deepspectra as ds
from benchmarks import reference
from benchmarks.cases import Case, build
from benchmarks.measure import OURS, Row, compare
from deepspectra.analysis.class_means import ClassMeans

RIGHT = 1e-3  # relative error of float32 sums against float64
LIMITS = {"class means": 1.5, "cross-class means": 9.0}  # gradients
READING = "Problem(…): reading and checking"


def run(_: list[Any], quick: bool) -> Iterator[Row]:
    """Rows of two networks."""
    if quick:
        yield from both(build("toy", "digits", 500, epochs=10), aimed=False)
        return
    yield from both(build("mlp", "mnist", 5000), aimed=True)
    yield from both(build("lenet", "mnist", 1000, epochs=3), aimed=True)


def both(case: Case, *, aimed: bool) -> Iterator[Row]:
    """Means of both levels from a problem that is read already, and what reading it costs."""
    problem, cells = case.problem(), exact_cells(case)
    calls = {
        "class means": lambda _: ds.class_means(problem, level="class"),
        "cross-class means": lambda _: ds.class_means(problem),
        READING: lambda _: case.problem(),
    }
    costs = compare(
        calls,
        case.gradient,
        warm=True,
        keep=lambda _, found: error(found, cells) if isinstance(found, ClassMeans) else 0.0,
    )
    for what, cost in costs.items():
        limit = LIMITS.get(what, math.inf) if aimed else math.inf
        worst = max(cost.results, default=math.inf)
        yield Row(
            "means",
            case.name,
            what,
            OURS,
            quality=worst if what in LIMITS else None,
            measure="error" if what in LIMITS else "",
            target=f"≤ {limit:g} g" if limit < math.inf else "",
            met=worst <= RIGHT and cost.median <= limit if limit < math.inf else None,
            **cost.fields | {"right": worst <= RIGHT},
        )


def error(found: ClassMeans, cells: Tensor) -> float:
    """Relative error of the weighted means."""
    if found.cross_class_means is None:
        own = cells[torch.arange(len(cells)), torch.arange(len(cells))]
        return reference.error(found.class_weights[:, None] * found.class_means, cells.sum(1) - own)
    return reference.error(found.cross_class_weights[..., None] * found.cross_class_means, cells)


def exact_cells(case: Case) -> Tensor:
    """w_{c,k} g_{c,k} (C, C, P) in float64: for each class and each logit one backward pass."""
    model = copy.deepcopy(case.model).double()
    parameters = list(model.parameters())
    cells = torch.zeros(10, 10, case.num_parameters, dtype=torch.float64)
    for c in range(10):
        z = model(case.x[case.y == c].double())
        p = z.detach().softmax(1)
        for k in range(10):
            slope = p[:, k, None] * (p - nn.functional.one_hot(torch.tensor(k), 10))
            cells[c, k] = reference.flat(torch.autograd.grad(z, parameters, slope, retain_graph=True))
    return cells / len(case.y)

"""Learning on a few examples how features and errors are to be captured.

How examples lie in an operation is measured: each example's scalars are multiplied by a number of its own, its code,
and whatever error that multiplies belongs to that example. Then what features and errors give is compared with
backpropagation; a parameter of which it differs, or which is used in ways that no rule understands, is alone.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from deepspectra.derivatives.ways import OutputGraph
from deepspectra.problem.problem import Problem
from deepspectra.rows.batch_capture import (
    CODED,
    CODED_HALF,
    Call,
    Graph,
    IrregularError,
    Plan,
    Scalars,
    capture,
)
from deepspectra.rows.example_axis import find_examples
from deepspectra.rows.parameter_uses import BLOCKS, LAYOUTS, Layout, Slice

TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-3}  # relative, of products by features and errors
TOLERANCE_HALF = 0.1  # against those by backpropagation
PLANNED_ROWS = 3  # on which uses are checked where a whole batch is one example
ROUNDING = 500  # times eps, of the largest gradient of a parameter, for parameters without effect

Fitting = list[list[Layout | None]]  # of each use, that agree with its errors; None for scattered examples


def learned(sample: Problem) -> Plan:
    """How to capture a problem's gradients, learned on a few of its examples, in float64 where that can be had."""
    (batch,) = list(sample.batches)[:1]
    graph = Graph(sample, batch)
    outputs = graph.values
    alone = graph.reached(graph.leaves) | _overlapping(graph)
    examples = find_examples(sample, batch, outputs)
    fitting = _fitting(graph, None if examples is None else examples.rows(batch, len(outputs)))
    understood = [fits for use, fits in zip(graph.uses, fitting, strict=True) if use.slice.name not in alone]
    if examples and not examples.apart and any(fits in ([], [None]) for fits in understood):
        # rows that could be examples by their number alone reach each other, as in graphs
        examples, fitting = None, [[BLOCKS] for _ in graph.uses]
    calls = [
        Call(use.slice, type(use), fits[0] if fits else None) for use, fits in zip(graph.uses, fitting, strict=True)
    ]
    astray = {call.slice.name for call, fits in zip(calls, fitting, strict=True) if not fits}
    checked = any(len(fits) > 1 for fits in fitting)  # these few cannot tell where examples lie
    plan = Plan(examples, tuple(calls), frozenset(), checked, graph.by_value).without(alone | astray)
    while True:
        try:
            return plan.without(_wrong(sample, batch, plan, outputs))
        except IrregularError as some:  # examples alone go other ways than in their batch
            plan = plan.without(some.names)


def _overlapping(graph: Graph) -> set[str]:
    """Parameters of which different stretches that are used share numbers."""
    ends: dict[str, set[tuple[int, int, tuple[int, ...]]]] = {}
    for found in (use.slice for use in graph.uses):
        ends.setdefault(found.name, set()).add((found.start, found.start + found.numel, found.shape))
    return {
        name
        for name, mine in ends.items()
        if any(second[0] < first[1] for first, second in itertools.pairwise(sorted(mine)))
    }


def _fitting(graph: Graph, rows: Tensor | None) -> Fitting:
    """By codes, for examples with rows (B, R)."""
    if rows is None or not graph.uses:
        return [[BLOCKS] for _ in graph.uses]
    if len(rows) == 1:  # one example alone fits every layout
        return [list(LAYOUTS) for _ in graph.uses]
    pairs, codes = graph.coded(graph.ends, rows)
    limit = CODED.get(graph.outputs.dtype, CODED_HALF)
    result: Fitting = []
    for end, pair in zip(graph.ends, pairs, strict=True):
        fits: list[Layout | None] = [
            lay for lay in LAYOUTS if lay.differs(end, len(rows)) and lay.fits(*pair, codes, limit)
        ]
        result.append(fits or ([None] if _is_scattered(*pair, codes, limit) else []))
    return result


def _is_scattered(errors: Tensor, coded: Tensor, codes: Tensor, limit: float) -> bool:
    """Whether every error belongs to one example, in whatever order: it was multiplied by that example's code."""
    ratios = (coded / errors.where(errors != 0, torch.inf)).contiguous()
    known = codes.sort().values
    above = torch.searchsorted(known, ratios).clamp(1, len(known) - 1)
    nearest = torch.minimum((ratios - known[above]).abs(), (ratios - known[above - 1]).abs())
    tiny = errors.abs() <= limit * errors.abs().max()
    return bool((tiny | (nearest <= 3 * limit)).all())


def _wrong(sample: Problem, batch: Any, plan: Plan, outputs: Tensor) -> set[str]:
    """Parameters whose gradient of a random scalar is not what features and errors make of it."""
    generator = torch.Generator().manual_seed(1)
    mixed = torch.randn(outputs.shape, generator=generator, dtype=torch.float64).to(outputs)
    if plan.examples is None:
        mixed[PLANNED_ROWS:] = 0
    truth = OutputGraph(sample, batch).pull(mixed)
    totals = _captured_gradients(sample, batch, plan, mixed.reshape(len(mixed), -1)[:, :, None])
    limit = TOLERANCE.get(outputs.dtype, TOLERANCE_HALF)
    largest = torch.stack([gradient.norm() for gradient in truth]).max()
    rounding = ROUNDING * torch.finfo(outputs.dtype).eps * largest
    return {
        name
        for name, gradient in zip(sample.parameters, truth, strict=True)
        if name in totals and not (totals[name] - gradient.flatten()).norm() <= limit * gradient.norm() + rounding
    }


def _captured_gradients(sample: Problem, batch: Any, plan: Plan, weights: Tensor) -> dict[str, Tensor]:
    """Parameter → the gradient of a sum of scalars with weights (n, C, 1), by features and errors."""
    names = frozenset(sample.parameters) - plan.alone
    totals = {name: torch.zeros_like(sample.parameters[name]).flatten() for name in names}
    for piece in capture(Graph(sample, batch, plan.alone), plan, Scalars(weights), names):
        for use in piece.uses:
            ones = use.errors.new_ones(*use.errors.shape[:2], 1)
            stretch: Slice = use.slice
            mine = totals[stretch.name][stretch.start : stretch.start + stretch.numel]
            mine += use.pull(ones, slice(None)).flatten()
    return totals

"""The stages of jobs that look at features and errors layer by layer, foreseen: what they take and what must fit."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence

from deepspectra.analysis.layer_blocks import SMALL
from deepspectra.analysis.layers import PROBES, STEPS, TRACE_PRODUCTS
from deepspectra.analysis.regions import BLOCK, WHOLE, knockouts_of
from deepspectra.errors import CurvatureError
from deepspectra.jobs.pace import Pace, Stage
from deepspectra.jobs.plan_of_analysis import Counted, pairs_stage, ranged
from deepspectra.problem.memory_budget import share
from deepspectra.problem.problem import Problem
from deepspectra.rows.held_rows import gram_bytes

VALUES = 0.6  # eigenvalues alone, in the same unit
DOUBLE = 2  # times as long take products in float64, as those of the Hessian's regions are
CHECKS = 2  # products by which that is seen
COMPARED = 64  # eigenvectors of a large layer


def captured(pace: Pace, times: int = 1) -> Stage:
    """Features and errors of all layers together if they fit, else of as many as do; of one they must."""
    held, limit = pace.rows.num_bytes, share(pace.problem.memory, "factors")
    fullest = max((layer.num_bytes for layer in pace.rows.layers.values()), default=0.0)
    few = pace.problem.num_examples * limit / fullest if fullest else math.inf
    seconds = times * max(1.0, held / limit) * pace.rows.seconds
    return Stage("features and errors", 0, seconds, max(fullest, min(held, limit)), limit, few)


def _averages_of_rows(problem: Problem) -> Stage:
    """Averages over all C² cells of classes, in the coordinates of every row."""
    each, cells = 8 * 2 * problem.num_classes**3, 8 * problem.num_classes**4
    few = (problem.memory - cells) / each
    return Stage("averages of rows", 0, 0, cells + each * problem.num_examples, problem.memory, few)


def of_layers(pace: Pace) -> Iterator[Stage]:
    """Of spectra layer by layer."""
    problem = pace.problem
    num = problem.num_examples
    num_rows = num * (problem.num_classes - 1)
    rows, averages = captured(pace), _averages_of_rows(problem)
    yield rows
    yield averages
    few = (problem.memory / gram_bytes(1)) ** 0.5 / max(1, problem.num_classes - 1)
    for name, layer in pace.rows.layers.items():
        side = min(num_rows, layer.size)
        centred = side if side <= SMALL else 0
        cubes = (1 + VALUES) * side**3 + min(num, layer.size) ** 3 + centred**3
        seconds = layer.pair * num_rows * side + pace.cube * cubes
        yield Stage(
            f"spectra of {name or 'the model'}",
            0,
            seconds,
            gram_bytes(side),
            problem.memory,
            few,
            name,
            grows=2 if side == num_rows else 1,
            beside=rows.num_bytes + averages.num_bytes,
        )
    try:
        bent, checked = pace.bent, pace.building("residual") + CHECKS * pace.product("residual")
    except CurvatureError:  # without second derivatives layers have no blocks of H
        return
    yield Stage("blocks of R", CHECKS, checked, pace.graphs("residual"))
    yield from ranged(functools.partial(_blocks, pace, bent))


def _blocks(pace: Pace, bent: Mapping[str, float], counted: Counted) -> Iterator[Stage]:
    """Pairs, density and trace of layers' blocks of H, where they are not those of G."""
    for name, seconds in bent.items():
        size = pace.rows.layers[name].size
        products = counted(pace.problem.num_classes, size) + min(PROBES * STEPS, size) + min(TRACE_PRODUCTS, size)
        yield Stage(f"block of H of {name or 'the model'}", products, products * seconds, pace.graphs("hessian"))


def of_regions(pace: Pace, of: Sequence[str], num_groups: int) -> Iterator[Stage]:
    """Of spectra of kinds of rows, with knock-outs, and with groups of examples left out in turn."""
    problem = pace.problem
    num, num_rows = problem.num_examples, problem.num_examples * (problem.num_classes - 1)
    turns = 1 + num_groups * (1 - 1 / max(num_groups, 1)) ** 3  # with all examples, and without each group
    for kind in of:
        rows = num if kind == "features" else num_rows
        matrices = 10 + 2 * num_groups if kind == "hessian" else 4
        size, limit = matrices * 8 * rows**2, problem.memory
        few = num * (limit / size) ** 0.5
        yield _rows_of(pace, kind)
        if kind != "features":
            yield _averages_of_rows(problem)
        if kind == "hessian":  # and of every row A v and Aᵀ u
            seconds = num_rows * DOUBLE * (pace.product("hessian", BLOCK) + pace.gradient)
            yield Stage("products of hessian", num_rows, seconds, size, limit, few, "products", kind, 2)
        layers = {name: layer.size for name, layer in pace.rows.layers.items() if layer.has(kind)}
        for name, parameters in (layers if len(layers) == 1 else layers | {WHOLE: rows}).items():
            rank = min(rows, parameters) if kind == "gradients" else rows
            cubes = rows**3 + VALUES * len(knockouts_of(kind, "subtraction")) * rank**3
            seconds = turns * pace.cube * cubes
            yield Stage(f"{kind} of {name or 'the model'}", 0, seconds, size, limit, few, name, kind, 3)


def of_comparison(pace: Pace) -> Iterator[Stage]:
    """Of two networks alike."""
    return ranged(functools.partial(_comparison, pace))


def _comparison(pace: Pace, counted: Counted) -> Iterator[Stage]:
    problem = pace.problem
    num_rows = problem.num_examples * pace.scalars
    yield captured(pace, 4)
    yield Stage("Kronecker factors", 0, 0, pace.factors, problem.memory)
    for name, layer in pace.rows.layers.items():
        side = min(num_rows, layer.size)
        if side <= SMALL:
            seconds = 2 * (layer.pair * num_rows * side + pace.cube * side**3)
        else:
            seconds = 2 * counted(COMPARED, side) * pace.product("gauss_newton")
        yield Stage(f"eigenspaces of {name or 'the model'}", 0, seconds, gram_bytes(min(side, SMALL)), step=name)
    one = pairs_stage(pace, "gauss_newton", 2 * problem.num_classes, counted)
    yield one._replace(name="top eigenpairs of both", products=2 * one.products, seconds=2 * one.seconds)


def _rows_of(pace: Pace, kind: str) -> Stage:
    """Of one layer after the other, or of all together."""
    num, limit, layers = pace.problem.num_examples, share(pace.problem.memory, "factors"), pace.rows.layers.values()
    if kind in ("features", "errors"):
        size = sum(layer.features if kind == "features" else layer.errors for layer in layers)
    else:
        size = captured(pace).num_bytes * (8 / pace.problem.dtype.itemsize if kind == "hessian" else 1)
    rows = num * (1 if kind == "features" else pace.scalars)
    seconds = pace.rows.seconds + pace.rows.pair * rows**2
    return Stage(f"rows of {kind}", 0, seconds, size, limit, num * limit / size if size else math.inf, grows=2)

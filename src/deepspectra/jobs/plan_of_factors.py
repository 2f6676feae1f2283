"""The stages in which Kronecker-factored approximations are judged, foreseen block by block from a few examples."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterator, Sequence

import torch

from deepspectra.analysis.kronecker_quality import DEFAULT, NUM_PROBES, NUM_STEPS
from deepspectra.analysis.layer_blocks import SMALL, Blocks, inner_product
from deepspectra.errors import CurvatureError
from deepspectra.jobs.pace import Pace, Stage
from deepspectra.jobs.plan_of_rows import captured
from deepspectra.kfac.exact_blocks import ExactBlock
from deepspectra.kfac.kronecker import all_from
from deepspectra.kfac.operators import Block, KroneckerSum
from deepspectra.problem.memory_budget import share
from deepspectra.rows.captures import captures_of, layer_of
from deepspectra.rows.held_rows import gram_bytes

PAIRS = 60  # products by which the compared eigenspaces are found where no matrix gives them, and
FURTHEST = 25  # by which the largest eigenvalue of a difference is


def of_factors(pace: Pace, kinds: Sequence[str]) -> Iterator[Stage]:
    """Of the approximations of all blocks, and of each block beside G's own."""
    try:
        one = pace.factors
    except CurvatureError:  # the job says why there are none
        return
    # moments by class, where an approximation asks for them, and as many factors; the others have one each
    moments = one * (pace.problem.num_classes if "cfac" in kinds else 1)
    if moments > pace.problem.memory:
        yield Stage("Kronecker factors", 0, 0, moments, pace.problem.memory)
        return
    held = moments * ("cfac" in kinds) + one * len(set(kinds) - {"cfac"})
    scale = pace.problem.num_examples / max(1, pace.few.num_examples)
    rows = captured(pace)
    seconds = rows.seconds + scale * pace.timed(lambda: all_from(captures_of(pace.few), kinds))
    yield Stage("Kronecker factors", 0, seconds, moments, pace.problem.memory, beside=rows.num_bytes)
    blocks = Blocks(pace.few, kinds)
    for name, exact in blocks:
        layer = pace.rows.layers[layer_of(exact.place.weight.name)]
        num_rows = round(scale * exact.num_rows)
        seconds = _of_exact(pace, exact, num_rows, scale, layer.pair)
        for approximation in blocks.approximations.values():
            seconds += _of_fit(pace, exact, approximation.blocks[name], scale)
        side, grows = min(num_rows, exact.shape[0]), 2 if num_rows <= exact.shape[0] else 1
        # the compared vectors of both, and the basis of the largest of their difference
        vectors = (2 * max(DEFAULT.ks) + PAIRS) * exact.shape[0] * exact.dtype.itemsize
        own = min(vectors, share(pace.problem.memory, "basis")) + (gram_bytes(side) if side <= SMALL else 0)
        stage = Stage(f"Kronecker factors of {name}", 0, seconds, own, grows=grows)
        yield stage._replace(beside=held + rows.num_bytes)


def _of_exact(pace: Pace, exact: ExactBlock, rows: int, scale: float, pair: float) -> float:
    """Seconds of the norm of G's block, its spectrum and its largest pairs."""
    size = exact.shape[0]
    side = min(size, rows)
    if side > SMALL:
        return pair * rows**2 + (PAIRS + NUM_PROBES * NUM_STEPS) * scale * _product(pace, exact)
    seconds = pace.cube * side**3
    if size <= rows:
        return seconds + scale * pace.timed(lambda: deque((part.T @ part for part in exact.gradients()), 0))
    return seconds + pair * rows**2 + scale * pace.timed(lambda: deque(exact.gradients(), 0))


def _of_fit(pace: Pace, exact: ExactBlock, block: Block, scale: float) -> float:
    """Seconds in which one approximation of it is compared."""
    size, own = exact.shape[0], _product(pace, block)
    seconds = scale * pace.timed(functools.partial(inner_product, exact, block))
    seconds += min(FURTHEST, size) * (scale * _product(pace, exact) + own)
    if not isinstance(block, KroneckerSum) or len(block.left) == 1:  # spectrum and vectors are those of its factors
        _, outputs, inputs = exact.place.shape
        return seconds + pace.cube * exact.place.groups * (outputs**3 + inputs**3)
    spectrum = pace.cube * size**3 / 2 if size <= SMALL else NUM_PROBES * NUM_STEPS * own
    return seconds + spectrum + min(size, PAIRS + max(DEFAULT.ks)) * own


def _product(pace: Pace, operator: ExactBlock | Block) -> float:
    """Seconds of a product with one vector."""
    v = torch.ones(operator.shape[0], 1, dtype=operator.dtype, device=operator.device)
    return pace.timed(lambda: operator @ v)

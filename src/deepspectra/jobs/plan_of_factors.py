"""The stages in which Kronecker-factored approximations are judged, foreseen block by block from a few examples."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from deepspectra.algorithms.eigenpairs import enough_products
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


class Counts(NamedTuple):
    """Products by which eigenspaces are found where no matrix gives them, and the largest value of a difference."""

    pairs: int
    furthest: int


class Seconds(NamedTuple):
    """Of a block: of what is done once, and of a product of each kind."""

    once: float
    pair: float = 0.0
    furthest: float = 0.0

    def of(self, counts: Counts, size: int) -> float:
        """Of so many products, of which there are no more than the block has parameters."""
        return self.once + min(size, counts.pairs) * self.pair + min(size, counts.furthest) * self.furthest


TYPICAL = Counts(60, 25)
SLOW = Counts(enough_products(max(DEFAULT.ks)), enough_products(1))  # of spectra without gaps


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
    blocks, basis = Blocks(pace.few, kinds), share(pace.problem.memory, "basis")
    for name, exact in blocks:
        layer = pace.rows.layers[layer_of(exact.place.weight.name)]
        num_rows = round(scale * exact.num_rows)
        costs = [_of_exact(pace, exact, num_rows, scale, layer.pair)]
        for approximation in blocks.approximations.values():
            costs.append(_of_fit(pace, exact, approximation.blocks[name], scale))
        # the compared vectors of both, and the basis of the largest of their difference
        side, vector = min(num_rows, exact.shape[0]), exact.shape[0] * exact.dtype.itemsize
        dense = gram_bytes(side) if side <= SMALL else 0
        typical, slow = (
            Stage(
                name=f"Kronecker factors of {name}",
                products=0,
                seconds=sum(cost.of(counts, exact.shape[0]) for cost in costs),
                num_bytes=min((2 * max(DEFAULT.ks) + counts.pairs) * vector, basis) + dense,
                grows=2 if num_rows <= exact.shape[0] else 1,
                beside=held + rows.num_bytes,
            )
            for counts in (TYPICAL, SLOW)
        )
        yield typical.slower(slow)


def _of_exact(pace: Pace, exact: ExactBlock, rows: int, scale: float, pair: float) -> Seconds:
    """Of the norm of G's block, its spectrum and its largest pairs."""
    size = exact.shape[0]
    side = min(size, rows)
    if side > SMALL:
        product = scale * _product(pace, exact)
        return Seconds(pair * rows**2 + NUM_PROBES * NUM_STEPS * product, product)
    seconds = pace.cube * side**3
    if size <= rows:
        return Seconds(seconds + scale * pace.timed(lambda: deque((part.T @ part for part in exact.gradients()), 0)))
    return Seconds(seconds + pair * rows**2 + scale * pace.timed(lambda: deque(exact.gradients(), 0)))


def _of_fit(pace: Pace, exact: ExactBlock, block: Block, scale: float) -> Seconds:
    """Of one approximation's comparison."""
    size, own = exact.shape[0], _product(pace, block)
    seconds = scale * pace.timed(functools.partial(inner_product, exact, block))
    furthest = scale * _product(pace, exact) + own
    if not isinstance(block, KroneckerSum) or len(block.left) == 1:  # spectrum and vectors are those of its factors
        _, outputs, inputs = exact.place.shape
        seconds += pace.cube * exact.place.groups * (outputs**3 + inputs**3)
        return Seconds(seconds, furthest=furthest)
    seconds += pace.cube * size**3 / 2 if size <= SMALL else NUM_PROBES * NUM_STEPS * own
    return Seconds(seconds + max(DEFAULT.ks) * own, own, furthest)


def _product(pace: Pace, operator: ExactBlock | Block) -> float:
    """Seconds of a product with one vector."""
    v = torch.ones(operator.shape[0], 1, dtype=operator.dtype, device=operator.device)
    return pace.timed(lambda: operator @ v)

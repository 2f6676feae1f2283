"""Which way of differentiating is taken on a network: the first that is right, and of J v the faster."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from typing import Any

import torch

from deepspectra.derivatives.derivative_checks import (
    block_error,
    curvature_error,
    curvature_rounding,
    jacobian_block_error,
    jacobian_error,
    jacobian_rounding,
)
from deepspectra.derivatives.kept_graphs import Graphs
from deepspectra.derivatives.ways import DoubleBackward, Jacobian, Linearized, Way
from deepspectra.errors import CurvatureError, MemoryBudgetError, OptionError, first_line
from deepspectra.problem.double_precision import HALF
from deepspectra.problem.evaluated_model import refuse_modes
from deepspectra.problem.example_subsets import small_problem, some_rows
from deepspectra.problem.memory_budget import measured
from deepspectra.problem.problem import Problem

EXPECTED_PRODUCTS = 40  # over which the cost of building a kept graph is spread when ways are compared
WORTH_TRACING = 10.0  # seconds that the expected products must take before linearising is tried
TIMED_ROWS = 16  # on which two ways are timed, if these are enough to be bound by arithmetic:
COMPUTE_BOUND = 0.1  # seconds of a product with them; else whole batches are timed
WAYS = {way.name: way for way in (DoubleBackward, Linearized)}  # in the order in which they are tried
FAILURES = (RuntimeError, TypeError, ValueError)  # what a way raises on a network it cannot do
CHECK_ROWS = 4  # rows on which a way is checked, in float64
KEPT_SAMPLE = 64  # the network in float64 is kept for later checks if as many such fit the memory
FIRST_ONLY = "use what gradients give alone: class_means, gram_spectrum, layers"
RIGHT = "symmetric, and agrees with finite differences"
CHECK_TOLERANCE = 1e-5  # relative; right ways reach 1e-9, wrong ones were seen from 2e-4 to .2


class Choice:
    """The ways that are taken on a problem's network, each chosen when it is first asked for."""

    def __init__(self, problem: Problem, graphs: Graphs) -> None:
        self.notes: dict[str, str] = {}  # what was chosen and why, in words
        self.rounding: dict[str, float] = {}  # "H v", "J v" → its relative error, where arithmetic is coarse
        self._problem, self._graphs = problem, graphs
        self._way: type[Way] | None = None
        self._linearize: bool | None = None
        self._right_blocks: dict[bool, bool] = {}  # of second and of first derivatives
        self._samples: dict[torch.dtype, Problem] = {}  # a few rows, on which derivatives are checked,
        # found at once where several processes look for them, which later may not all come to ask
        self._few = some_rows(problem, CHECK_ROWS) if problem.batches.group.size > 1 else None

    def way(self, asked: str | None = None) -> type[Way]:
        """The first way to second derivatives that is right for this network, or the one asked for by name.

        On a CPU linearising brought nothing in products with H: LeNet 1.27 gradients against 1.28, for graphs that
        take three times the memory and five times as long to build.
        """
        refuse_modes()
        if asked is not None and self._way is not WAYS[_known(asked)]:
            self._adopt(asked, self._fault(WAYS[asked]), "hessian", "residual")
            self._way = WAYS[asked]
        if self._way is None:
            faults = list(itertools.takewhile(bool, map(self._fault, WAYS.values())))
            if len(faults) == len(WAYS):
                firsts = not self._jacobian_fault(False) or not self._jacobian_fault(True)
                raise CurvatureError(
                    "no way of differentiating this network twice is right: " + "; ".join(faults) + ". "
                    "Replace operations without a second derivative (custom autograd functions, fused kernels) or "
                    "with a stopped one (detach, no_grad, straight-through), or "
                    + ("use GaussNewton, which needs none." if firsts else f"{FIRST_ONLY}.")
                )
            self._way = list(WAYS.values())[len(faults)]
            self.notes["check"] = "; ".join(faults) or RIGHT
        self.notes["way"] = self._way.name
        self.notes.setdefault("check", RIGHT)
        way = self._way
        self._tell_rounding("H v", lambda coarse, fine: curvature_rounding(coarse, fine, way))
        return way

    def linearize(self, asked: str | None = None) -> bool:
        """Whether J v goes by a linearised forward pass, or by reverse mode alone: the faster that is right."""
        refuse_modes()
        if asked is not None and self._linearize is not (_known(asked) == Linearized.name):
            self._adopt(asked, self._jacobian_fault(asked == Linearized.name), "jacobian")
            self._linearize = asked == Linearized.name
        if self._linearize is None:
            self._linearize = self._faster()
        self.notes["jacobian"] = Linearized.name if self._linearize else DoubleBackward.name
        linearize = self._linearize
        self._tell_rounding("J v", lambda coarse, fine: jacobian_rounding(coarse, fine, linearize=linearize))
        return linearize

    def blocks_are_right(self, kind: str) -> bool:
        """Whether columns may go through a graph together: some operations of PyTorch mix them up."""
        second = kind in ("hessian", "residual")
        if second not in self._right_blocks:
            way, linearize = self.way() if second else DoubleBackward, bool(self._linearize)
            fault = self._fault_of(
                "a block",
                lambda s: block_error(s, way) if second else jacobian_block_error(s, linearize=linearize),
                "vectors one by one",
            )
            self._right_blocks[second] = not fault
            if fault:
                self.notes["blocks"] = "vector by vector: blocks are wrong on this network"
        return self._right_blocks[second]

    def _tell_rounding(self, what: str, error: Callable[[Problem, Problem], float]) -> None:
        """Measure and note, once, how coarse products are where the arithmetic is coarser than float32."""
        coarse, name = coarse_types(self._problem), f"rounding of {what}"
        if not coarse or name in self.notes:
            return
        found = self._rounding(error)
        if isinstance(found, str):
            self.notes[name] = f"not measured: {found}"
            return
        self.rounding[what] = found
        self.notes[name] = (
            f"in {coarse} {what} is off by {found:.1%}, measured against float64 on a few examples; sums over the "
            "data are in float32 and scalars in float64"
        )

    def _rounding(self, error: Callable[[Problem, Problem], float]) -> float | str:
        """The error, relative to float64, or to float32 of a network that runs in no other; or why there is none."""
        why = ""
        for dtype in (torch.float64, torch.float32)[: 2 if self._problem.dtype in HALF else 1]:
            try:
                return error(self._sample(self._problem.dtype), self._sample(dtype))
            except FAILURES as failure:
                why = why or first_line(failure)
        return why

    def inherit(self, other: Choice) -> None:
        """Take what was found right for the same network on other data."""
        self._way, self._linearize, self._right_blocks = other._way, other._linearize, other._right_blocks
        self.rounding |= other.rounding
        self.notes |= {name: other.notes[name] for name in ("way", "jacobian") if name in other.notes}
        self.notes |= {name: note for name, note in other.notes.items() if name.startswith("rounding of")}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_samples": {}}

    def _adopt(self, asked: str, fault: str, *kinds: str) -> None:
        """Take the way asked for, if nothing is wrong with it; graphs of these kinds went another."""
        if fault:
            raise CurvatureError(f"way={asked!r} cannot be used on this network: {fault}.")
        self._right_blocks = {}
        self._graphs.forget(*kinds)

    # -- whether a way is right

    def _fault(self, way: type[Way]) -> str:
        """What is wrong with a way to second derivatives on this network; "" if nothing."""
        return self._fault_of(way.name, lambda sample: curvature_error(sample, way), "symmetry or finite difference")

    def _jacobian_fault(self, linearize: bool) -> str:
        """The same of J v by a linearised forward pass, or else by reverse mode."""
        name = Linearized.name if linearize else DoubleBackward.name
        return self._fault_of(name, lambda s: jacobian_error(s, linearize=linearize), "finite difference")

    def _fault_of(self, name: str, error: Callable[[Problem], float], by: str) -> str:
        try:
            found = self._checked(error)
        except FAILURES as failure:
            return f"{name} failed ({first_line(failure)})"
        if found == math.inf:
            return f"{name} gives NaN or infinite derivatives"
        return "" if found <= CHECK_TOLERANCE else f"{name} is wrong by {found:.1e}, relatively ({by})"

    def _checked(self, error: Callable[[Problem], float]) -> float:
        """An error on a few examples, in float64, or in the problem's own type where the network runs in no other."""
        try:
            return error(self._sample(torch.float64))
        except torch.OutOfMemoryError as failure:
            raise MemoryBudgetError(f"checking the derivatives ran out of memory: {failure}") from failure
        except FAILURES:
            if self._problem.dtype == torch.float64:
                raise
            return error(self._sample(self._problem.dtype))

    def _sample(self, dtype: torch.dtype) -> Problem:
        if dtype in self._samples:
            return self._samples[dtype]
        sample = small_problem(self._problem, CHECK_ROWS, dtype, self._few)
        if sample.num_parameters * dtype.itemsize <= self._problem.memory // KEPT_SAMPLE:
            self._samples[dtype] = sample
        return sample

    # -- which way is faster

    def _faster(self) -> bool:
        """Whether J v is to be linearised: it must, or it is right and faster where there is much to do.

        On a CPU a linearised J v with kept graphs took 0.66 to 0.84 of the time by reverse mode on convolutional
        networks and as long on an MLP; tracing took as long as 4 to 60 of these products.
        """
        if reverse := self._jacobian_fault(False):
            linearised = self._jacobian_fault(True)
            if not linearised:
                return True
            raise CurvatureError(
                "no way to J v, the derivative of the outputs along a vector, is right on this network: "
                f"{reverse}; {linearised}. It takes a backward pass that can be differentiated, or forward-mode "
                "derivatives, of every operation, and derivatives that agree with its values: a custom backward pass "
                "may be wrong, or a gradient stopped (detach, no_grad, straight-through; leave what lies before it "
                f"out by parameters=). Replace the operation, or {FIRST_ONLY}."
            )
        problem, num_batches = self._problem, self._problem.batches.num_batches
        scale = max(1.0, problem.num_examples / num_batches / TIMED_ROWS)
        batch = some_rows(problem, TIMED_ROWS)
        seconds = self._time_jacobian(batch, scale, linearize=False)
        if seconds < scale * COMPUTE_BOUND:  # overhead counts: time a whole batch
            batch, scale = next(iter(problem.batches)), 1.0
            seconds = self._time_jacobian(batch, scale, linearize=False)
        return (
            seconds * num_batches * EXPECTED_PRODUCTS > WORTH_TRACING
            and not self._jacobian_fault(True)
            and self._time_jacobian(batch, scale, linearize=True) < seconds
        )

    def _time_jacobian(self, batch: Any, scale: float, *, linearize: bool) -> float:
        """Seconds of J v and Jᵀ u with one batch, and their share of the building.

        For a batch cut to 1/scale of its rows; the building, mostly tracing, does not grow with them.
        """
        tangent = list(self._problem.parameters.values())
        start = self._now()
        jacobian, size = measured(lambda: Jacobian(self._problem, batch, linearize=linearize))
        built = self._now()
        jacobian.pull(jacobian.push(tangent))  # warm up
        warm = self._now()
        jacobian.pull(jacobian.push(tangent))
        product = scale * (self._now() - warm)
        fits = scale * size * self._problem.batches.num_batches <= self._graphs.allowance.size
        seconds = product + (built - start) / (EXPECTED_PRODUCTS if fits else 1)
        (seconds, *_) = self._problem.batches.group.every(seconds)  # so that all choose alike
        way = "linearised" if linearize else "by reverse mode"
        self.notes[f"seconds a batch, Jacobian {way}"] = f"{seconds:.4f}"
        return seconds

    def _now(self) -> float:
        """Seconds, when everything queued on the device is done."""
        if self._problem.device.type == "cuda":
            torch.cuda.synchronize(self._problem.device)
        return time.perf_counter()


def coarse_types(problem: Problem) -> str:
    """What a problem is computed in that is coarser than float32, such as "bfloat16"; "" if nothing is."""
    kinds = HALF & {problem.dtype} | (problem.casts if problem.dtype != torch.float64 else frozenset())
    found = [str(dtype).removeprefix("torch.") for dtype in sorted(kinds, key=str)]
    if problem.device.type == "cuda" and problem.dtype == torch.float32 and _takes_tf32():
        found.append("TF32")
    return " and ".join(found)


def _takes_tf32() -> bool:
    """Whether products or convolutions of float32 are rounded to TF32 on a GPU, as convolutions are by default."""
    return bool(torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32)


def _known(way: str) -> str:
    if way not in WAYS:
        raise OptionError(f"way={way!r}; it is one of {', '.join(map(repr, WAYS))}.")
    return way

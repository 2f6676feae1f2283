"""How much an analysis does: what was asked for and the size of the problem decide, not the machine's load."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from deepspectra.analysis.regions import WHOLE
from deepspectra.problem.problem import Problem

BACKWARD = 3  # a gradient's operations, in units of a forward pass's
PRODUCT = 2  # a product's with H or R, in gradients, or somewhat less or more
ACCELERATED = 50  # times as many operations take an accelerator the time that they take a CPU
DENSE = 3  # P³ operations, as fast as those of products, that all eigenvalues of a dense matrix take
LARGE = 1e11  # operations of a gradient, about three seconds of one core, from which on pairs are fewer and rougher
FEWEST_STEPS = 5
SECONDS_OF_PAIRS = 4e-10  # of eigenvalues and vectors of a dense matrix, times the cube of its rows, on a CPU
SECONDS_OF_VALUES = 2.3e-10  # of eigenvalues alone
DOUBLED = 2  # a product's time in float64, in units of float32's
MINUTE, FEW_SECONDS = 60, 10
WORTH_STEPS = 16  # of each probe, before there are more than two


class Level(NamedTuple):
    """What an effort is willing to do.

    Attributes:
        num_probes: of each density, if it is not exact,
        num_steps: of each probe, at most.
        operations: floating-point operations of a density, at most.
        dense: operations up to which all eigenvalues of H, or of R, are computed.
        exact_rows: gradients up to which all eigenvalues of G are computed.
        large: whether pairs are found as well where a gradient is large as where it is not.
    """

    num_probes: int
    num_steps: int
    operations: float
    dense: float
    exact_rows: int
    large: bool = False


# a core makes some 2e10 operations a second: half a minute, five minutes, or as long as it takes; a few seconds of
# dense matrices, a minute, a quarter of an hour
EFFORTS = {
    "quick": Level(4, 24, 6e11, 1e11, 3000),
    "standard": Level(4, 256, 1e13, 1.2e12, 4500),
    "paper": Level(4, 512, float("inf"), 2e13, 20_000, large=True),
}


class Effort(NamedTuple):
    """What an analysis does.

    Attributes:
        name: what was asked for.
        spare_pairs: eigenpairs beyond the number of classes.
        rtol: of eigenpairs.
        knockout_products: at most; None for what attribution takes.
        num_probes, num_steps: of densities that are not exact.
        dense: whether all eigenvalues of H and R are computed.
        exact_rows: gradients up to which all of G's are.
    """

    name: str
    spare_pairs: int
    rtol: float
    knockout_products: int | None
    num_probes: int
    num_steps: int
    dense: bool
    exact_rows: int


def effort_for(problem: Problem, operations: float, effort: str = "standard") -> Effort:
    """What to do for a problem whose gradient takes so many operations; its device counts, its speed does not."""
    level = EFFORTS[effort]
    speed = 1 if problem.device.type == "cpu" else ACCELERATED
    small = level.large or operations <= speed * LARGE
    size = problem.num_parameters
    products = speed * level.operations / (PRODUCT * operations)
    num_probes = level.num_probes if products >= level.num_probes * WORTH_STEPS else 2
    fitting = 3 * 8 * size**2 <= problem.memory // 3  # a matrix, and what its eigenvalues take beside
    return Effort(
        name=effort,
        spare_pairs=3 if small else 0,
        rtol=1e-2 if small else 3e-2,
        knockout_products=None if small else 8,
        num_probes=num_probes,
        num_steps=int(max(FEWEST_STEPS, min(level.num_steps, products / num_probes))),
        dense=fitting and PRODUCT * size * operations + DENSE * size**3 <= speed * level.dense,
        exact_rows=level.exact_rows,
    )


def plan(problem: Problem, effort: Effort, num: int, gradient_seconds: float, *, classed: bool = True) -> str:
    """What is about to be done, what it takes, and what its figures will resolve; `num` pairs of H and of G."""
    rows = problem.num_examples * (problem.num_classes - 1)
    exact, each = classed and rows <= effort.exact_rows, effort.num_probes * effort.num_steps
    drawn = f"{effort.num_probes} × {effort.num_steps} products"
    resolved = "Figures have bins as wide as what these products leave open."
    if effort.dense:
        each, drawn, resolved = problem.num_parameters, "all eigenvalues", "Spectra are exact."
    of_g = f"all eigenvalues of {rows:,} gradients" if exact else drawn
    products = (2 if exact else 3) * each
    minutes = products * PRODUCT * gradient_seconds / 60
    took = "under a minute" if minutes < 1 else f"about {minutes:.0f} minutes"
    first = f"{effort.name}: {num} top eigenpairs of H and of G; " + (
        "means of classes, knock-outs; " if classed else ""
    )
    return (
        f"{first}density of H and of R by {drawn}, of G by {of_g}. Of the densities {products:,} products, {took} at "
        f"the pace of the first gradient of all the data, the unit of cost: {gradient_seconds:.2g} s. {resolved}"
    )


def seconds_of_layers(problem: Problem) -> dict[str, float]:
    """Layer → how long the dense spectra of its gradients and their parts take, on one core."""
    num_rows = problem.num_examples * (problem.num_classes - 1)
    return {name: SECONDS_OF_PAIRS * min(num_rows, size) ** 3 for name, size in _sizes(problem).items()}


def seconds_of_regions(problem: Problem, of: str, num_knockouts: int, num_groups: int) -> dict[str, float]:
    """Layer, or "all layers" → how long its spectra take with their knock-outs, without each group, on one core."""
    num_rows, sizes = problem.num_examples * (problem.num_classes - 1), _sizes(problem)
    turns = 1 + num_groups * (1 - 1 / max(num_groups, 1)) ** 3

    def seconds(rows: int, rank: int) -> float:
        each = num_knockouts * SECONDS_OF_VALUES * min(rows, rank) ** 3
        return turns * (SECONDS_OF_PAIRS * rows**3 + each)

    if of == "hessian":
        began = time.perf_counter()
        problem.gradient()
        products = DOUBLED * PRODUCT * num_rows * (time.perf_counter() - began)
        return {"products": products, WHOLE: seconds(num_rows, num_rows)}
    rows = problem.num_examples if of == "features" else num_rows
    if of != "gradients":
        sizes = dict.fromkeys(sizes, rows)
    found = {name: seconds(rows, size) for name, size in sizes.items()}
    return found if len(found) == 1 else found | {WHOLE: seconds(rows, rows)}


def _sizes(problem: Problem) -> dict[str, int]:
    """Layer → its parameters."""
    sizes = dict.fromkeys(problem.layers, 0)
    for name, value in problem.parameters.items():
        sizes[name.rpartition(".")[0]] += value.numel()
    return sizes


def told_if_long(problem: Problem, seconds: Iterable[float]) -> str:
    """How long dense spectra will take, and with which --limit seconds; "" if not minutes."""
    total, num_rows = sum(seconds), problem.num_examples * (problem.num_classes - 1)
    if total < MINUTE:
        return ""
    minutes = "about a minute" if total < 1.5 * MINUTE else f"about {total / MINUTE:.0f} minutes"
    few = max(2, int(problem.num_examples * (FEW_SECONDS / total) ** (1 / 3)))
    return (
        f"{num_rows:,} rows (examples × (classes − 1)), {len(problem.layers)} layers: {minutes} "
        f"on one core, {FEW_SECONDS} seconds with --limit {few}."
    )


class OperationCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up, in `total`, the floating-point operations of matrix products, convolutions and attention."""

    total = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        given = kwargs or {}
        found = func(*args, **given)
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            self.total += count(*args, **given, out_val=found)
        return found


def count_operations(problem: Problem, forward: Callable[[], float]) -> tuple[float, float]:
    """What a pass `forward` over all the data returns, and the operations of a gradient, three times its own.

    They are two a parameter and example in the forward pass at least: of recurrent cells PyTorch counts none.
    """
    with OperationCounter() as counter:  # type: ignore[no-untyped-call]
        value = forward()
    least = 2.0 * problem.num_parameters * problem.num_examples
    (total,) = problem.batches.group.sums(counter.total)
    return value, BACKWARD * max(total, least)

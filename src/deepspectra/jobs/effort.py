"""How much an analysis does: what was asked for and the size of the problem decide, not the machine's load."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from deepspectra.problem.memory_budget import share
from deepspectra.problem.problem import Problem

BACKWARD = 3  # a gradient's operations, in units of a forward pass's
PRODUCT = 2  # a product's with H or R, in gradients, or somewhat less or more
ACCELERATED = 50  # times as many operations take an accelerator the time that they take a CPU
DENSE = 3  # P³ operations, as fast as those of products, that all eigenvalues of a dense matrix take
LARGE = 1e11  # operations of a gradient, about three seconds of one core, from which on pairs are fewer and rougher
FEWEST_STEPS = 5
WORTH_STEPS = 16  # of each probe, before there are more than two
MOST_CLASSES, NUM_GROUPS = 100, 10  # more are put into groups, of which so many are found


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
    fitting = 3 * 8 * size**2 <= share(problem.memory, "matrix")  # a matrix, and what its eigenvalues take beside
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


def described(problem: Problem, effort: Effort, num: int, *, exact: bool, averaged: bool) -> str:
    """What an analysis with `num` pairs of H and of G does, and what its figures will resolve.

    All of G may be known exactly, and means may be averaged and knocked out.
    """
    rows = problem.num_examples * (problem.num_classes - 1)
    drawn = f"{effort.num_probes} × {effort.num_steps} products"
    resolved = "Figures have bins as wide as what these products leave open."
    if effort.dense:
        drawn, resolved = "all eigenvalues", "Spectra are exact."
    of_g = f"all eigenvalues of {rows:,} gradients" if exact else drawn
    means = "means of classes, knock-outs; " if averaged else ""
    return (
        f"{effort.name}: {num} top eigenpairs of H and of G; {means}density of H and of R by {drawn}, of G by "
        f"{of_g}. {resolved}"
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

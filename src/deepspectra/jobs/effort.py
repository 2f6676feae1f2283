"""How much an analysis does unless told otherwise: by the size of the problem, so not by the machine's load."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from deepspectra.problem.problem import Problem

BACKWARD = 3  # a gradient's operations, in units of a forward pass's
ACCELERATED = 50  # times as many operations take an accelerator the time that they take a CPU


class Effort(NamedTuple):
    """What an analysis does where a gradient takes up to so many floating-point operations."""

    most_operations: float
    spare_pairs: int  # eigenpairs beyond the number of classes
    num_probes: int
    num_steps: int
    rtol: float = 1e-2  # of eigenpairs
    knockout_products: int | None = None  # at most; by default what attribution takes


# a quarter of a second, and about three, of one core
EFFORTS = (Effort(5e9, 3, 4, 24), Effort(1e11, 3, 2, 16), Effort(float("inf"), 0, 2, 5, 3e-2, 8))


def effort_for(problem: Problem, operations: float) -> Effort:
    """The effort for a problem whose gradient takes so many operations; its device counts, its speed does not."""
    speed = 1 if problem.device.type == "cpu" else ACCELERATED
    return next(effort for effort in EFFORTS if operations <= speed * effort.most_operations)


class _FlopCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the floating-point operations of matrix products, convolutions and attention."""

    total = 0.0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        found = func(*args, **given)
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            self.total += count(*args, **given, out_val=found)
        return found


def count_operations(problem: Problem, forward: Callable[[], float]) -> tuple[float, float]:
    """What a pass `forward` over all the data returns, and the operations of a gradient, three times its own.

    They are two a parameter and example in the forward pass at least: of recurrent cells PyTorch counts none.
    """
    with _FlopCounter() as counter:  # type: ignore[no-untyped-call]
        value = forward()
    least = 2.0 * problem.num_parameters * problem.num_examples
    return value, BACKWARD * max(counter.total, least)

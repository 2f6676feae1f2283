"""Costs in gradients, and the rows of the table.

The unit g is the CPU time of one gradient over all of a case's data, by plain PyTorch, in the same process and
one thread. It is measured again in every round, between the calls that are compared, so that what else the
machine does falls on all of them alike.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROUNDS = 5
OURS = "deepspectra"


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        section: the group it belongs to.
        case: network and data.
        what: what was computed; rows that share section, case and what are compared.
        tool: who computed it.
        cost: median, in gradients; None if it failed.
        low, high: the smallest and the largest of the runs.
        runs: how many.
        quality: what was checked, in its own unit (see `measure`).
        measure: what `quality` is: "error" and "W1" are better small, "overlap" better large.
        right: whether the result is as accurate as asked; a result that is not is never a fast one.
        num_products: matrix products, where they count.
        bound: least cost that the arithmetic allows, in gradients.
        target: what was aimed at, in words.
        met: whether it is met.
        note: anything else.
    """

    section: str
    case: str
    what: str
    tool: str
    cost: float | None = None
    low: float | None = None
    high: float | None = None
    runs: int = 0
    quality: float | None = None
    measure: str = ""
    right: bool = True
    num_products: float | None = None
    bound: float | None = None
    target: str = ""
    met: bool | None = None
    note: str = ""


@dataclass(frozen=True)
class Cost:
    """Runs of one call in gradients, and what it returned each time."""

    runs: list[float]
    results: list[Any]
    failure: str = ""

    @property
    def median(self) -> float:
        """Of the runs."""
        return statistics.median(self.runs)

    @property
    def fields(self) -> dict[str, Any]:
        """What a row says of the cost."""
        if not self.runs:
            return {"right": False, "note": self.failure}
        return {
            "cost": self.median,
            "low": min(self.runs),
            "high": max(self.runs),
            "runs": len(self.runs),
            "note": self.failure,
        }


def cpu_seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    """CPU time of a call, and its result."""
    start = time.process_time()
    result = call()
    return time.process_time() - start, result


def compare(
    calls: Mapping[str, Callable[[int], Any]],
    unit: Callable[[], Any],
    *,
    rounds: int = ROUNDS,
    warm: bool = False,
    patience: float = 60.0,
    keep: Callable[[str, Any], Any] = lambda _, result: result,
) -> dict[str, Cost]:
    """Cost of each call, which gets the round's number, in gradients: round-robin, the unit beside each call.

    Args:
        calls: what to time, by name.
        unit: one gradient.
        rounds: how often each is called.
        warm: one round more before, which is not counted.
        patience: CPU seconds after which a call is not repeated.
        keep: what to remember of a call's result, given its name.
    """
    runs: dict[str, list[float]] = {name: [] for name in calls}
    results: dict[str, list[Any]] = {name: [] for name in calls}
    failures: dict[str, str] = {}
    unit()
    units = []
    for number in range(-warm, rounds):
        for name, call in calls.items():
            if name in failures or sum(runs[name]) > patience:
                continue
            units.append(cpu_seconds(unit)[0])
            try:
                seconds, result = cpu_seconds(lambda call=call, number=number: call(max(number, 0)))
            except Exception as error:  # a tool that fails on a case is a result too
                failures[name] = f"failed: {type(error).__name__}: {str(error)[:90]}".splitlines()[0]
                continue
            if number >= 0:
                runs[name].append(seconds)
                results[name].append(keep(name, result))
            del result
    gradient = statistics.median(units)
    return {name: Cost([s / gradient for s in runs[name]], results[name], failures.get(name, "")) for name in calls}


def machine() -> dict[str, str]:
    """What this ran on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor() or platform.machine()
    return {
        "cpu": cpu,
        "cores": str(os.cpu_count()),
        "threads used": str(torch.get_num_threads()),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }

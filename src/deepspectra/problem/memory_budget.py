"""How many bytes there are, and how many a computation keeps."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from deepspectra.errors import MemoryBudgetError, OptionError
from deepspectra.problem.batch_trees import tensors
from deepspectra.problem.parallel import neighbours

Result = TypeVar("Result")
BATCH_BYTES = (2**29, 2**25)  # that backpropagation keeps of a batch, unless sizes are given: GPU, CPU
WEIGHT_BYTES = 2  # or so many times the bytes of the weights, if that is more: each batch reads them all
GRAPHS, HEAVY_GRAPHS = 32, 8  # such batches fit the memory; the second where weights alone are more than the first
SHARES = {  # of a problem's memory, by what is in it: so many such shares make the whole
    "data": 4,
    "basis": 4,  # vectors of length P that an algorithm holds
    "graphs": 2,  # of batches, kept between products; class means take their place
    "factors": 3,  # features and errors of every layer, for which graphs make room
    "matrix": 3,  # a dense one, and what its eigenvalues take beside; of inner products of gradients the whole
}
CONTAINER = Path("/sys/fs/cgroup")  # whose memory is limited and counted here, by Linux' cgroups 2
UNITS = {"": 1, "B": 1} | {  # a letter alone is binary, as schedulers and containers read it
    f"{prefix}{rest}": base**power
    for power, prefix in enumerate("KMGT", 1)
    for rest, base in (("", 2**10), ("IB", 2**10), ("B", 10**3))
}


def parse_bytes(memory: int | str) -> int:
    """Bytes of a number or of a text such as "8GiB", "8G", which is the same, or "500 MB"."""
    text = str(memory).strip()
    number = text.rstrip("BKMGTIbkmgti ").strip()
    unit = text[len(number) :].strip().upper()
    try:
        size = int(float(number) * UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        raise OptionError(f"memory={memory!r} is not a size; write bytes, or text such as '8GiB'.") from None
    if size <= 0:
        raise OptionError(f"memory={memory!r} must be positive.")
    return size


def return_freed() -> None:
    """Have the C library give back to the system what tensors on the CPU have freed, where it can: it keeps pieces.

    Cost: as if the pages were new when they are used again.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def share(memory: int, of: str) -> int:
    """Bytes of a problem's memory that are for what is named."""
    return memory // SHARES[of]


def refuse_beyond(size: float, limit: int, what: str, instead: str) -> None:
    """Raise MemoryBudgetError if what would take so many bytes is beyond the limit, the memory or a part of it."""
    if size > limit:
        raise MemoryBudgetError(f"{what} {in_units(size)}; the memory for it is {in_units(limit)}. {instead}")


def in_units(size: float) -> str:
    """Bytes as text, in the largest unit of which they are a tenth."""
    unit = next((unit for unit in ("GiB", "MiB") if size >= 0.1 * UNITS[unit.upper()]), "KiB")
    return f"{size / UNITS[unit.upper()]:.2f} {unit}"


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device; of a CPU's, the share of one process.

    And of a container's limit, what is not in use: files that are cached and not read again make room.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo") as lines:
            available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    with contextlib.suppress(OSError, ValueError, StopIteration):  # no such container, or one without a limit
        limit, used = (int((CONTAINER / name).read_text()) for name in ("memory.max", "memory.current"))
        counts = (CONTAINER / "memory.stat").read_text().splitlines()
        cached = next(int(line.split()[1]) for line in counts if line.startswith("inactive_file "))
        available = min(available, max(0, limit - (used - cached)))
    return available // neighbours()


def suitable_batch_size(example_bytes: float, model: nn.Module, memory: int, device: torch.device) -> int | None:
    """Examples a batch, of which backpropagation keeps so many bytes each; None if that is not known."""
    if not example_bytes:
        return None
    wanted = max(BATCH_BYTES[device.type == "cpu"], _read_by_a_batch(model))
    return min(largest_batch_size(example_bytes, model, memory), max(1, int(wanted / max(1.0, example_bytes))))


def largest_batch_size(example_bytes: float, model: nn.Module, memory: int) -> int:
    """Examples of which so many such batches fit the memory."""
    most = max(memory / GRAPHS, min(memory / HEAVY_GRAPHS, _read_by_a_batch(model)))
    return max(1, int(most / max(1.0, example_bytes)))


def _read_by_a_batch(model: nn.Module) -> int:
    """Bytes for which it pays to read all weights."""
    return WEIGHT_BYTES * sum(p.numel() * p.element_size() for p in model.parameters())


class Saved(NamedTuple):
    """What autograd keeps of a computation beside the model's own: bytes and types; no types if it is unknown."""

    num_bytes: int
    dtypes: frozenset[torch.dtype]


def saved_by(model: nn.Module, call: Callable[[], Result]) -> tuple[Result, Saved]:
    """What a call returns, and what autograd keeps in it."""
    values = [v for v in (*model.parameters(), *model.buffers()) if v.layout == torch.strided]
    own = {value.untyped_storage().data_ptr() for value in values}
    kept: dict[int, int] = {}
    dtypes: set[torch.dtype] = set()

    def pack(value: Tensor) -> Tensor:
        if value.layout == torch.strided and value.untyped_storage().data_ptr() not in own:
            size = min(value.numel() * value.element_size(), value.untyped_storage().nbytes())
            kept[value.data_ptr()] = max(kept.get(value.data_ptr(), 0), size)
            dtypes.add(value.dtype)
        return value

    try:
        with saved_tensors_hooks(pack, lambda value: value):
            result = call()
    except RuntimeError as error:
        if "saved tensor hooks" not in str(error):
            raise
        return call(), Saved(0, frozenset())  # torch.func inside the call allows no hooks
    return result, Saved(sum(kept.values()), frozenset(dtypes))


class _Storages(TorchDispatchMode):
    """Remembers the storages that operations create, without keeping them alive."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage()._cdata for leaf in tensors(args) if leaf.layout == torch.strided}
        for leaf in tensors(result):
            if leaf.layout != torch.strided:
                continue
            storage = leaf.untyped_storage()
            if type(leaf) is Tensor and storage._cdata not in given:  # a view adds nothing
                self.seen[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())  # type: ignore[no-untyped-call]
        return result

    def alive(self) -> int:
        """Bytes of those that are still referred to."""
        sizes = [size for reference, size in self.seen.values() if not reference.expired()]  # type: ignore[no-untyped-call]
        return sum(sizes)


def measured(build: Callable[..., Any], *arguments: Any) -> tuple[Any, int]:
    """A graph and the bytes it keeps alive."""
    with _Storages() as storages:
        graph = build(*arguments)
    return graph, storages.alive()

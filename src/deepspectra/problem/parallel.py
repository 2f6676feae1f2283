"""Several processes that share the work on one problem; a single one is a group of one.

All of them run the same program. Each goes through its share of the batches, and what that gives is summed, or sent
to all, before anything depends on it: so all hold the same numbers, and decide alike. Nothing else knows of
torch.distributed.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from deepspectra.errors import ProcessError, first_line

Result = TypeVar("Result")
Outcome = tuple[Any, Exception | None]  # what was made, or what was raised
PATIENCE = datetime.timedelta(hours=1)  # after which a process that does not answer is given up
BACKENDS = ("gloo", "cpu:gloo,cuda:nccl")  # on CPUs, and on accelerators


@dataclass(frozen=True)
class Group:
    """The processes that work together, and this one's place among them.

    Every method that says "of all" must be called by all of them, in the same order.

    Attributes:
        rank: this process, from 0.
        size: how many there are.
        device: where what others send is put, if it comes from an accelerator.
    """

    rank: int = 0
    size: int = 1
    device: torch.device | None = None

    def owns(self, index: int) -> bool:
        """Whether a batch is of this process's share: they are dealt in turn."""
        return index % self.size == self.rank

    def width(self, size: int) -> int:
        """How many of so many numbers the first has, and others at most, where each has successive ones."""
        return -(-size // self.size)

    def share(self, size: int) -> slice:
        """This process's part of so many numbers."""
        width = self.width(size)
        return slice(min(self.rank * width, size), min((self.rank + 1) * width, size))

    def whole(self, part: Tensor, size: int) -> Tensor:
        """Rows (k, size) of which each has its share (k, ·)."""
        if self.size == 1:
            return part
        padded = torch.nn.functional.pad(part, (0, self.width(size) - part.shape[1])).contiguous()
        every = [torch.empty_like(padded) for _ in range(self.size)]
        _answered(dist.all_gather, every, padded)
        return torch.cat(every, 1)[:, :size]

    def sum(self, *totals: Tensor) -> None:
        """Add up tensors of all, in place; all then hold the same bits."""
        if self.size > 1:
            for total in totals:
                _answered(dist.all_reduce, total)

    def sums(self, *numbers: float) -> list[float]:
        """Numbers of all, added up in float64."""
        total = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        self.sum(total)
        found: list[float] = total.tolist()
        return found

    def every(self, mine: Result) -> list[Result]:
        """What each of all has, in order."""
        return [value for value, _ in self._all((mine, None), range(self.size))]

    def dealt(self, mine: list[Result]) -> list[Result]:
        """What all have made of their shares of the batches, in the order of the batches."""
        every = self.every(mine)
        return [every[j % self.size][j // self.size] for j in range(sum(map(len, every)))]

    def of_first(self, make: Callable[[], Result]) -> Result:
        """What the first of all makes, which the others do not."""
        if self.size == 1:
            return make()
        mine = _tried(make) if self.rank == 0 else None
        packed = [b"" if mine is None else _packed(mine)]
        _answered(dist.broadcast_object_list, packed, src=0)
        found: Result = _settled(mine or self._unpacked(packed[0]))
        return found

    def in_turn(self, make: Callable[[int], Result], num: int, start: int = 0) -> Iterator[Result]:
        """make(0), ..., make(num − 1), each made by the process that owns the index and sent to all, round by round.

        What one of them raises is raised by all.
        """
        for first in range(start, num, self.size):
            mine = [index for index in range(first, min(first + self.size, num)) if self.owns(index)]
            for outcome in self._all(
                _tried(make, *mine) if mine else None, range(first, min(first + self.size, num))
            ):
                yield _settled(outcome)

    @contextlib.contextmanager
    def summing(self, *totals: Tensor) -> Iterator[None]:
        """A pass of all over their shares, whose totals are then those of all.

        What one of them raises is raised by all.
        """
        error: Exception | None = None
        try:
            yield
        except ProcessError:
            raise
        except Exception as raised:
            if self.size == 1:
                raise
            error = raised
        if self.size > 1:
            if self.sums(error is not None)[0]:
                for outcome in self._all((None, error), range(self.size)):
                    _settled(outcome)
            self.sum(*totals)

    def _all(self, mine: Outcome | None, indices: range) -> Iterator[Outcome]:
        """What the owners of so many successive indices have, each to be sent to all."""
        if self.size == 1:
            assert mine is not None
            yield mine
            return
        packed = [b""] * self.size
        _answered(dist.all_gather_object, packed, b"" if mine is None else _packed(mine))
        for owner in (index % self.size for index in indices):
            yield mine if owner == self.rank and mine is not None else self._unpacked(packed[owner])

    def _unpacked(self, packed: bytes) -> Outcome:
        def here(storage: Any, place: str) -> Any:
            mine = "cpu" if place == "cpu" else str(self.device)
            return torch.serialization.default_restore_location(storage, mine)  # type: ignore[no-untyped-call]

        found: Outcome = torch.load(io.BytesIO(packed), map_location=here, weights_only=False)
        return found


ALONE = Group()


def current(device: torch.device) -> Group:
    """The processes of torch.distributed's group, if there is one, for a problem on a device."""
    if not dist.is_available() or not dist.is_initialized():
        return ALONE
    return Group(dist.get_rank(), dist.get_world_size(), device)


@contextlib.contextmanager
def joined() -> Iterator[Group]:
    """Join the processes that torchrun started beside this one, if it was started so, for as long as the block lasts.

    Each takes the accelerator of its own number, where there are any.

    Raises:
        ProcessError: another ended before, or did not come.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
        yield ALONE
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    _answered(dist.init_process_group, BACKENDS[torch.cuda.is_available()], timeout=PATIENCE)
    try:
        yield current(torch.device("cpu"))
    finally:
        dist.destroy_process_group()


def is_spread(tensor: Tensor) -> bool:
    """Whether the numbers of a tensor lie on several processes."""
    spread = sys.modules.get("torch.distributed.tensor")  # not imported, there is none
    return spread is not None and isinstance(tensor, spread.DTensor)


def neighbours() -> int:
    """How many processes torchrun started on this machine, which share its memory; 1 without it."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _answered(call: Callable[..., Any], *arguments: Any, **options: Any) -> None:
    """Do something of all."""
    try:
        call(*arguments, **options)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise ProcessError(
            f"another process ended, or has not answered for {PATIENCE.seconds // 60} minutes: {first_line(error)}. "
            "What it says itself tells why. Start all of them again; with --resume, or resume=, the same goes on "
            "behind the last stage that was finished."
        ) from error


def _tried(make: Callable[..., Any], *arguments: Any) -> Outcome:
    try:
        return make(*arguments), None
    except ProcessError:
        raise
    except Exception as error:
        return None, error


def _settled(outcome: Outcome) -> Any:
    value, error = outcome
    if error is not None:
        raise error
    return value


def _packed(outcome: Outcome) -> bytes:
    """To be sent; an error that cannot be is told by its words."""
    value, error = outcome
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = ProcessError(f"a process failed: {type(error).__name__}: {error}")
    stream = io.BytesIO()
    torch.save((value, error), stream)
    return stream.getvalue()

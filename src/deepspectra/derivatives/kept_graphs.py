"""Graphs of batches, kept while they fit the memory that all computations with a problem share."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from deepspectra.problem.memory_budget import measured, refuse_beyond, return_freed, share
from deepspectra.problem.problem import Problem


@dataclass(eq=False)
class Allowance:
    """Bytes for what a problem and its samples keep, together: graphs, and what is reserved for other things."""

    size: int
    reserved: int = 0
    holders: weakref.WeakSet[Graphs] = field(default_factory=weakref.WeakSet)
    spare: Any = None  # what stays for later until its room is needed,
    spare_bytes: int = 0

    def room(self) -> int:
        """Bytes that are neither reserved nor kept."""
        return self.size - self.reserved - sum(holder.num_bytes() for holder in self.holders)

    def reserve(self, size: int) -> bool:
        """Set bytes aside, in place of graphs if need be; False if they are not there."""
        if self.reserved + size > self.size:
            return False
        self.reserved += size
        if self.room() < 0:
            for holder in self.holders:
                holder.release()
            return_freed()  # small pieces, where no long vector has room
        self.make_room()
        return True

    def leave(self, spare: Any, size: int) -> None:
        """Have something stay for later, until graphs or what is reserved need its room."""
        self.spare, self.spare_bytes = spare, size
        self.make_room()

    def make_room(self) -> None:
        """Let go of what stays for later if its room was taken."""
        if self.room() < self.spare_bytes:
            self.spare, self.spare_bytes = None, 0

    def give_back(self, size: int) -> None:
        """Return reserved bytes to the graphs."""
        self.reserved -= size

    @contextmanager
    def lent(self, size: int) -> Iterator[bool]:
        """Bytes set aside for a while, and whether they were there."""
        granted = self.reserve(size)
        try:
            yield granted
        finally:
            if granted:
                self.give_back(size)


@dataclass
class Store:
    """Graphs of one kind: those of some batches, their bytes, and the bytes of the largest seen."""

    graphs: dict[int, Any] = field(default_factory=dict)
    num_bytes: int = 0
    largest: int | None = None


class Graphs:
    """The graphs of a problem's batches, of several kinds."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.allowance = Allowance(share(problem.memory, "graphs"))
        self.allowance.holders.add(self)
        self._stores: dict[str, Store] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles begin without graphs."""
        return Graphs, (self.problem,)

    def each(self, kind: str, build: Callable[[Any], Any]) -> Iterator[tuple[int, Any]]:
        """The graph of each batch of this process's share: kept, or built now and kept if it fits."""
        store = self._stores.setdefault(kind, Store())
        for index, batch in self.problem.fixed_batches().mine():
            if index in store.graphs:
                yield index, store.graphs[index]
                continue
            room = self.allowance.room()
            if store.largest is not None and room < store.largest // 2:
                yield index, build(batch)
                continue
            graph, size = measured(build, batch)
            instead = "Lower batch_size, or raise memory."
            refuse_beyond(size, self.problem.memory, "the graph of one batch takes", instead)
            store.largest = max(size, store.largest or 0)
            if size <= room:
                store.graphs[index] = graph
                store.num_bytes += size
                self.allowance.make_room()
            yield index, graph

    def once(self, kind: str, build: Callable[[Any], Any], batch: Any) -> Any:
        """A graph of a batch that is not kept."""
        store = self._stores.setdefault(kind, Store())
        graph, size = measured(build, batch)
        store.largest = max(size, store.largest or 0)
        return graph

    def largest(self, kind: str) -> int:
        """Bytes of the largest graph of a kind seen so far."""
        return self._stores[kind].largest or 1

    def num_bytes(self) -> int:
        """Bytes of all kept graphs."""
        return sum(store.num_bytes for store in self._stores.values())

    def release(self) -> None:
        """Drop every kept graph, to make room for another kind."""
        for store in self._stores.values():
            store.graphs.clear()
            store.num_bytes = 0

    def forget(self, *kinds: str) -> None:
        """Drop graphs of these kinds, and what is known of them."""
        for kind in kinds:
            self._stores.pop(kind, None)

    def share(self, other: Graphs) -> None:
        """Take part in the memory of another problem."""
        self.allowance.holders.discard(self)
        self.allowance = other.allowance
        self.allowance.holders.add(self)

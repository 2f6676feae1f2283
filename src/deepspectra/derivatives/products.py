"""How curvature acts on vectors: the fastest right way of differentiating, its graphs kept while they fit.

Each batch contributes through a *graph* built once at the problem's parameters. Kept graphs cost memory and
save the primal passes; batches whose graphs do not fit are rebuilt once for a whole block of vectors. Each way
of differentiating is checked against symmetry and a finite difference before it is used; for the Jacobian the
faster of two is chosen by measuring on one batch.
"""

from __future__ import annotations

import functools
import time
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from deepspectra.derivatives.differentiation import (
    DoubleBackward,
    Forward,
    Jacobian,
    Linearized,
    Scalar,
    Way,
    block_error,
    curvature_error,
    jacobian_block_error,
    jacobian_error,
)
from deepspectra.errors import CurvatureError, MemoryBudgetError, NonFiniteError, OptionError, first_line
from deepspectra.problem.evaluation import refuse_modes
from deepspectra.problem.memory import measured
from deepspectra.problem.problem import Problem

EXPECTED_PRODUCTS = 40  # over which the cost of building a kept graph is spread when ways are compared
BLOCK_BYTES = (2**30, 2**21)  # graph bytes times columns that go through a graph together: GPU, CPU
WORTH_TRACING = 10.0  # seconds that the expected products must take before linearising is tried
TIMED_ROWS = 16  # on which two ways are timed, if these are enough to be bound by arithmetic:
COMPUTE_BOUND = 0.1  # seconds of a product with them; else whole batches are timed
WAYS = {way.name: way for way in (DoubleBackward, Linearized)}  # in the order in which they are tried
FAILURES = (RuntimeError, TypeError, ValueError)  # what a way raises on a network it cannot do
CHECK_ROWS = 4  # rows on which a way is checked, in float64
FIRST_ONLY = "use what gradients give alone: class_means, gram_spectrum, layers"
CHECK_TOLERANCE = 1e-5  # relative; right ways reach 1e-9, wrong ones were seen from 2e-4 to .2


@dataclass
class Store:
    """Graphs of one kind: which batches' are kept, their bytes, and the bytes of the largest seen."""

    kept: dict[int, Any]
    bytes_kept: int = 0
    bytes_each: int | None = None


@dataclass(eq=False)
class Allowance:
    """Bytes for what a problem and its samples keep, together: graphs, and what is reserved for other things."""

    size: int
    reserved: int = 0
    holders: weakref.WeakSet[Products] = field(default_factory=weakref.WeakSet)
    spare: Any = None  # what stays for later until its room is needed,
    spare_bytes: int = 0

    def room(self) -> int:
        """Bytes that are neither reserved nor kept."""
        return self.size - self.reserved - sum(holder.kept_bytes() for holder in self.holders)

    def reserve(self, size: int) -> bool:
        """Set bytes aside, in place of graphs if need be; False if they are not there."""
        if self.reserved + size > self.size:
            return False
        self.reserved += size
        if self.room() < 0:
            for holder in self.holders:
                holder.release()
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


class Products:
    """Sums over batches of H v, R v, J v and Jᵀ u, for one problem.

    None of them is divided by the total weight: callers divide once. Blocks are (P, K).
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem.bare()  # no cycle: graphs are freed as soon as nobody needs the problem
        self.allowance = Allowance(problem.memory // 2)
        self.allowance.holders.add(self)
        self.stores: dict[str, Store] = {}
        self.sizes = [value.numel() for value in problem.parameters.values()]
        self.shapes = [value.shape for value in problem.parameters.values()]
        self._way: type[Way] | None = None
        self._linearize: bool | None = None
        self._right_blocks: dict[bool, bool] = {}  # of second and of first derivatives
        self._samples: dict[torch.dtype, Problem] = {}  # a few rows, on which derivatives are checked
        self.notes: dict[str, str] = {}
        self.faults: list[str] = []  # of ways to second derivatives,
        self.jacobian_faults: list[str] = []  # and to J v

    # blocks and vectors

    def _split(self, rows: Tensor, among: Sequence[int] | None = None) -> list[Tensor]:
        """Views of rows (K, P) or a vector (P,), one a parameter, of all or among some."""
        lead = rows.shape[:-1]
        chosen = range(len(self.sizes)) if among is None else among
        parts = torch.split(rows, [self.sizes[j] for j in chosen], -1)
        return [part.view((*lead, *self.shapes[j])) for j, part in zip(chosen, parts, strict=True)]

    def _rows(self, block: Tensor) -> Tensor:
        return block.T.to(self.problem.dtype).contiguous()

    def _chunks(self, num_columns: int, kind: str) -> Iterator[slice]:
        """Columns that go through a graph together: many through a small graph, one through a large one.

        Together they cost little more than one as long as overhead dominates, and only then: on a CPU large
        blocks lose more to memory traffic than they save. One at a time, too, where a block is wrong.
        """
        graph_bytes = self.stores[kind].bytes_each or 1
        width = max(1, min(64, num_columns, BLOCK_BYTES[self.problem.device.type == "cpu"] // graph_bytes))
        if width > 1 and not self._blocks_are_right(kind in ("hessian", "residual")):
            width = 1
        for start in range(0, num_columns, width):
            yield slice(start, min(start + width, num_columns))

    def _through(
        self,
        total: Tensor,
        rows: Tensor,
        kind: str,
        apply: Callable[..., list[Tensor]],
        *,
        split: bool = False,
        among: Sequence[int] | None = None,
    ) -> None:
        """Add apply(rows), or of rows split into parameters, to total (K, P), in chunks of columns."""
        for chunk in self._chunks(len(rows), kind):
            single = chunk.stop - chunk.start == 1
            at = chunk.start if single else chunk
            given = self._split(rows[at], among) if split else rows[at]
            _add(self._split(total[at], among), apply(given, batched=not single))

    def zeros(self, num_columns: int, size: int | None = None) -> Tensor:
        """(K, P) zeros to sum into, in at least float32."""
        dtype = torch.promote_types(self.problem.dtype, torch.float32)
        size = sum(self.sizes) if size is None else size
        return torch.zeros(num_columns, size, dtype=dtype, device=self.problem.device)

    # the graphs

    def _graphs(self, kind: str, build: Callable[[Any], Any]) -> Iterator[tuple[int, Any]]:
        """Each batch's graph: kept, or built now and kept if it fits."""
        store = self.stores.setdefault(kind, Store({}))
        for index, batch in enumerate(self.problem.fixed_batches()):
            if index in store.kept:
                yield index, store.kept[index]
                continue
            room = self.allowance.room()
            if store.bytes_each is not None and room < store.bytes_each // 2:
                yield index, build(batch)
                continue
            graph, size = measured(build, batch)
            self._refuse_beyond_memory(size)
            store.bytes_each = max(size, store.bytes_each or 0)
            if size <= room:
                store.kept[index] = graph
                store.bytes_kept += size
                self.allowance.make_room()
            yield index, graph

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles begin without graphs, with the ways that were found right."""
        return _restored, (self.problem, self._way and self._way.name, self._linearize)

    def kept_bytes(self) -> int:
        """Bytes of all kept graphs."""
        return sum(store.bytes_kept for store in self.stores.values())

    def release(self) -> None:
        """Drop every kept graph, to make room for another kind."""
        for store in self.stores.values():
            store.kept.clear()
            store.bytes_kept = 0

    def _refuse_beyond_memory(self, size: int) -> None:
        if size > self.problem.memory:
            raise MemoryBudgetError(
                f"the graph of one batch takes {size / 2**30:.2f} GiB and memory is "
                f"{self.problem.memory / 2**30:.2f} GiB. Lower batch_size, or raise memory."
            )

    # second derivatives of scalars

    def hessian(self, block: Tensor, among: Sequence[int] | None = None) -> Tensor:
        """Σ_i ω_i ∂²ℓ_i/∂θ² applied to a block of vectors; its diagonal block `among` some of the parameters."""
        return self._second("hessian", self._loss_of, [(block, among)])[0]

    def residual(self, block: Tensor) -> Tensor:
        """Σ_i Σ_k ω_i (∂ℓ_i/∂z_k) ∂²z_{ik}/∂θ² applied to a block of vectors."""
        return self._second("residual", self._residual_of, [(block, None)])[0]

    def residuals(self, blocks: Sequence[tuple[Tensor, Sequence[int]]]) -> list[Tensor]:
        """The diagonal blocks of the same, each applied to its own vectors, in one pass over the data."""
        return self._second("residual", self._residual_of, blocks)

    def _second(
        self,
        kind: str,
        scalar: Callable[[Any], Scalar],
        blocks: Sequence[tuple[Tensor, Sequence[int] | None]],
    ) -> list[Tensor]:
        way = self.way()
        given = [self._rows(block) for block, _ in blocks]
        totals = [self.zeros(*rows.shape) for rows in given]
        for _, graph in self._graphs(kind, lambda batch: way(scalar(batch), self.problem.parameters)):
            for total, rows, (_, among) in zip(totals, given, blocks, strict=True):
                apply = functools.partial(graph, among=among)
                self._through(total, rows, kind, apply, split=True, among=among)
        return [_finite(total).T for total in totals]

    def _loss_of(self, batch: Any) -> Scalar:
        return lambda parameters: self.problem.loss_function.total(*self.problem.evaluate(parameters, batch))

    def _residual_of(self, batch: Any) -> Scalar:
        outputs, targets = self.problem.values(batch)
        slope = self.problem.loss_function.gradient(outputs, targets).detach()
        return lambda parameters: (slope * self.problem.evaluate(parameters, batch)[0]).sum()

    # first derivatives of the outputs

    def jacobians(self) -> Iterator[tuple[int, Jacobian]]:
        """Each batch's Jacobian."""
        linearize = self.linearize()
        return self._graphs("jacobian", lambda b: Jacobian(self.problem, b, linearize=linearize))

    def push(self, block: Tensor) -> list[Tensor]:
        """J V: for each batch (n, C, K)."""
        rows = self._rows(block)
        return [self._push(jacobian, rows).movedim(0, -1) for _, jacobian in self.jacobians()]

    def _push(self, jacobian: Jacobian, rows: Tensor) -> Tensor:
        """(K, n, C)."""
        parts = []
        for chunk in self._chunks(len(rows), "jacobian"):
            if chunk.stop - chunk.start == 1:
                parts.append(jacobian.push(self._split(rows[chunk.start]))[None])
            else:
                parts.append(jacobian.push(self._split(rows[chunk]), batched=True))
        return torch.cat(parts)

    def pull(self, cotangents: list[Tensor]) -> Tensor:
        """Jᵀ U for U given as one (n, C, K) a batch: (P, K)."""
        total = self.zeros(cotangents[0].shape[-1])
        for index, jacobian in self.jacobians():
            self._pull(total, jacobian, cotangents[index].movedim(-1, 0))
        return total.T

    def _pull(self, total: Tensor, jacobian: Jacobian, cotangents: Tensor) -> None:
        rows = cotangents.to(jacobian.outputs.dtype)
        self._through(total, rows, "jacobian", jacobian.pull)

    def sandwich(self, middle: Callable[[Tensor, Tensor, Tensor], Tensor], block: Tensor) -> Tensor:
        """Jᵀ B J V with B given by middle(outputs, targets, tangents), in one pass over the data."""
        total = self.zeros(block.shape[1])
        rows = self._rows(block)
        for _, jacobian in self.jacobians():
            pushed = self._push(jacobian, rows)
            bent = [middle(jacobian.outputs, jacobian.targets, tangent) for tangent in pushed]
            self._pull(total, jacobian, torch.stack(bent))
        return _finite(total).T

    def pull_each(
        self,
        cotangent: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        num_columns: int,
        groups: Tensor | None = None,
        among: Collection[int] | None = None,
    ) -> Tensor:
        """Jᵀ U with each batch of one class, or of one group of classes, of all or `among` some: (P, K).

        `cotangent` takes outputs and targets of a batch to the columns of U that are not zero there (n, C, k) and
        to which they are (k,). For one pass: no graph is kept.
        """
        total = self.zeros(num_columns)
        store = self.stores.setdefault("forward", Store({}))
        for batch in self.problem.class_batches(groups, among):
            graph, size = measured(Forward, self.problem, batch)
            store.bytes_each = max(size, store.bytes_each or 0)
            columns, live = cotangent(graph.outputs, graph.targets)
            given = columns.movedim(-1, 0).to(graph.outputs.dtype)
            for chunk in self._chunks(len(live), "forward"):
                part = graph.pull(given[chunk], batched=True) if chunk.stop - chunk.start > 1 else None
                for j, column in enumerate(live[chunk].tolist()):
                    alone = graph.pull(given[chunk.start]) if part is None else [piece[j] for piece in part]
                    _add(self._split(total[column]), alone)
        return total.T

    # the choice

    def way(self, asked: str | None = None) -> type[Way]:
        """The first way that is right for this network, or the one asked for by name.

        On a CPU linearising brought nothing in products with H: LeNet 1.27 gradients against 1.28, for graphs that
        take three times the memory and five times as long to build.

        Raises:
            OptionError: there is no way of the name asked for.
            CurvatureError: none is right, or not the one asked for.
        """
        refuse_modes()
        if asked is not None and self._way is not WAYS[_known(asked)]:
            if not self._is_right(WAYS[asked]):
                raise CurvatureError(f"way={asked!r} cannot be used on this network: {self.faults[-1]}.")
            self._way = WAYS[asked]
            self._forget("hessian", "residual")
        if self._way is None:
            self.faults.clear()
            self._way = next((way for way in WAYS.values() if self._is_right(way)), None)
            if self._way is None:
                less = (
                    "use GaussNewton, which needs none"
                    if self._linearizes(False) or self._linearizes(True)
                    else FIRST_ONLY
                )
                raise CurvatureError(
                    "no way of differentiating this network twice is right: " + "; ".join(self.faults) + ". "
                    "Replace operations without a second derivative (custom autograd functions, fused "
                    f"kernels) or with a stopped one (detach, no_grad, straight-through), or {less}."
                )
        self.notes["way"] = self._way.name
        self.notes["check"] = "; ".join(self.faults) or "symmetric, and agrees with finite differences"
        return self._way

    def inherit(self, other: Products) -> None:
        """Take what was found right for the same network on other data, and share its memory."""
        self._way, self._linearize, self._right_blocks = other._way, other._linearize, other._right_blocks
        self.allowance.holders.discard(self)
        self.allowance = other.allowance
        self.allowance.holders.add(self)
        self.notes |= {name: other.notes[name] for name in ("way", "jacobian") if name in other.notes}

    def _forget(self, *kinds: str) -> None:
        """Drop graphs of these kinds, and what is known of them."""
        self._right_blocks = {}
        for kind in kinds:
            self.stores.pop(kind, None)

    def _is_right(self, way: type[Way]) -> bool:
        """Whether a way works here and passes its check; if not, `faults` says why."""
        try:
            error = self._checked(lambda sample: curvature_error(sample, way))
        except FAILURES as failure:
            self.faults.append(f"{way.name} failed ({first_line(failure)})")
            return False
        if error > CHECK_TOLERANCE:
            self.faults.append(
                f"{way.name} is wrong by {error:.1e}, relatively (symmetry or finite difference)"
            )
        return error <= CHECK_TOLERANCE

    def _linearizes(self, linearize: bool) -> bool:
        """Whether J v by a linearised forward pass, or else by reverse mode, works here and is right."""
        name = Linearized.name if linearize else DoubleBackward.name
        try:
            error = self._checked(lambda s: jacobian_error(s, linearize=linearize))
        except FAILURES as failure:
            self.jacobian_faults.append(f"{name} failed ({first_line(failure)})")
            return False
        if error > CHECK_TOLERANCE:
            self.jacobian_faults.append(f"{name} is wrong by {error:.1e}, relatively (finite difference)")
        return error <= CHECK_TOLERANCE

    def _blocks_are_right(self, second: bool) -> bool:
        """Whether columns may go through a graph together: some operations of PyTorch mix them up."""
        if second not in self._right_blocks:
            way, linearize = self.way() if second else DoubleBackward, bool(self._linearize)
            try:
                error = self._checked(
                    lambda s: block_error(s, way) if second else jacobian_block_error(s, linearize=linearize)
                )
            except FAILURES:
                error = float("inf")
            self._right_blocks[second] = error <= CHECK_TOLERANCE
            if error > CHECK_TOLERANCE:
                self.notes["blocks"] = "vector by vector: blocks are wrong on this network"
        return self._right_blocks[second]

    def _checked(self, error: Callable[[Problem], float]) -> float:
        """An error on a few examples, in float64, or in the problem's own type where the network runs in no other."""
        try:
            return error(self._sample(torch.float64))
        except torch.OutOfMemoryError as failure:
            raise MemoryBudgetError(f"checking the derivatives ran out of memory: {failure}") from failure
        except FAILURES:
            if self.problem.dtype == torch.float64:
                raise
            return error(self._sample(self.problem.dtype))

    def _sample(self, dtype: torch.dtype) -> Problem:
        if dtype not in self._samples:
            self._samples[dtype] = self.problem.sample(CHECK_ROWS, dtype)
        return self._samples[dtype]

    def _now(self) -> float:
        """Seconds, when everything queued on the device is done."""
        if self.problem.device.type == "cuda":
            torch.cuda.synchronize(self.problem.device)
        return time.perf_counter()

    def linearize(self, asked: str | None = None) -> bool:
        """Whether J v goes by a linearised forward pass, or by reverse mode alone: the faster that is right.

        Raises:
            OptionError: there is no way of the name asked for.
            CurvatureError: first derivatives are wrong, or by the way asked for.
        """
        refuse_modes()
        if asked is not None and self._linearize is not (_known(asked) == Linearized.name):
            self._linearize = asked == Linearized.name
            self._forget("jacobian")
            if not self._linearizes(self._linearize):
                self._linearize = None
                raise CurvatureError(
                    f"way={asked!r} cannot be used on this network: {self.jacobian_faults[-1]}."
                )
        if self._linearize is None:
            self.jacobian_faults.clear()
            self._linearize = self._faster()
        self.notes["jacobian"] = Linearized.name if self._linearize else DoubleBackward.name
        return self._linearize

    def _faster(self) -> bool:
        """Whether J v is to be linearised: it must, or it is right and faster where there is much to do."""
        if not self._linearizes(False):
            if self._linearizes(True):
                return True
            raise CurvatureError(
                "no way to J v, the derivative of the outputs along a vector, is right on this network: "
                + "; ".join(self.jacobian_faults)
                + ". It takes a backward pass that can be differentiated, or forward-mode derivatives, of every "
                "operation, and derivatives that agree with its values: a custom backward pass may be wrong, or a "
                "gradient stopped (detach, no_grad, straight-through; leave what lies before it out by parameters=). "
                f"Replace the operation, or {FIRST_ONLY}."
            )
        batch, scale = self.problem.some_rows(TIMED_ROWS), self._rows_a_batch() / TIMED_ROWS
        seconds = self._time_jacobian(batch, scale, linearize=False)
        if seconds < scale * COMPUTE_BOUND:  # overhead counts: time a whole batch
            batch, scale = next(iter(self.problem.batches)), 1.0
            seconds = self._time_jacobian(batch, scale, linearize=False)
        worth = seconds * self.problem.batches.num_batches * EXPECTED_PRODUCTS > WORTH_TRACING
        return (
            worth and self._linearizes(True) and self._time_jacobian(batch, scale, linearize=True) < seconds
        )

    def _rows_a_batch(self) -> float:
        return max(TIMED_ROWS, self.problem.num_examples / self.problem.batches.num_batches)

    def _time_jacobian(self, batch: Any, scale: float, *, linearize: bool) -> float:
        """Seconds of J v and Jᵀ u with one batch, and their share of the building.

        For a batch cut to 1/scale of its rows; the building, mostly tracing, does not grow with them.
        """
        tangent = list(self.problem.parameters.values())
        start = self._now()
        jacobian, size = measured(lambda: Jacobian(self.problem, batch, linearize=linearize))
        built = self._now()
        jacobian.pull(jacobian.push(tangent))  # warm up
        warm = self._now()
        jacobian.pull(jacobian.push(tangent))
        product = scale * (self._now() - warm)
        fits = scale * size * self.problem.batches.num_batches <= self.allowance.size
        seconds = product + (built - start) / (EXPECTED_PRODUCTS if fits else 1)
        self.notes[f"seconds a batch, Jacobian {'linearised' if linearize else 'by reverse mode'}"] = (
            f"{seconds:.4f}"
        )
        return seconds


def _restored(problem: Problem, way: str | None, linearize: bool | None) -> Products:
    products = Products(problem)
    products._way, products._linearize = WAYS[way] if way else None, linearize
    return products


def _known(way: str) -> str:
    if way not in WAYS:
        raise OptionError(f"way={way!r}; it is one of {', '.join(map(repr, WAYS))}.")
    return way


def products_of(problem: Problem) -> Products:
    """The products of a problem, one object shared by all its operators and freed with it."""
    if "products" not in problem.kept:
        problem.kept["products"] = Products(problem)
    found: Products = problem.kept["products"]
    return found


def _finite(total: Tensor) -> Tensor:
    """A sum of products, all of it numbers."""
    if not bool(total.isfinite().all()):
        raise NonFiniteError(
            "a product is NaN or infinite: the vector is, or a derivative of the network is "
            "singular at its parameters "
            "(a norm or a root of zero, 0/0 in a backward pass), or numbers outgrow the dtype. "
            "Keep such operations away "
            "from zero (an epsilon inside the root), or pass dtype=torch.float64."
        )
    return total


def _add(total: list[Tensor], parts: list[Tensor]) -> None:
    for into, part in zip(total, parts, strict=True):
        into.add_(part)

"""How curvature acts on vectors, batch by batch.

Each batch contributes through a *graph* built once at the problem's parameters. Kept graphs cost memory and
save the primal passes; batches whose graphs do not fit are rebuilt once for a whole block of vectors.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from deepspectra.derivatives.kept_graphs import Allowance, Graphs
from deepspectra.derivatives.way_choice import Choice
from deepspectra.derivatives.ways import Jacobian, OutputGraph, Scalar
from deepspectra.errors import NonFiniteError
from deepspectra.problem.example_subsets import class_batches
from deepspectra.problem.parallel import Group
from deepspectra.problem.problem import Problem, per_problem

COLUMN_BYTES = 2**27  # of float64 for each output and column, of which a few stand at a time
BLOCK_BYTES = (2**30, 2**21)  # graph bytes times columns that go through a graph together: GPU, CPU


class Products:
    """Sums over batches of H v, R v, J v and Jᵀ u, for one problem.

    None of them is divided by the total weight: callers divide once. Blocks are (P, K).
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem.variant()  # no cycle: graphs are freed as soon as nobody needs the problem
        self.graphs = Graphs(self.problem)
        self.choice = Choice(self.problem, self.graphs)
        self.notes = self.choice.notes
        self.sizes = [value.numel() for value in problem.parameters.values()]
        self.shapes = [value.shape for value in problem.parameters.values()]

    @property
    def allowance(self) -> Allowance:
        """The memory that graphs share with what is reserved for other things."""
        return self.graphs.allowance

    @property
    def group(self) -> Group:
        """The processes that share the batches."""
        return self.problem.batches.group

    def inherit(self, other: Products) -> None:
        """Take what was found right for the same network on other data, and share its memory."""
        self.choice.inherit(other.choice)
        self.graphs.share(other.graphs)

    def release(self) -> None:
        """Drop every kept graph."""
        self.graphs.release()

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
        room = BLOCK_BYTES[self.problem.device.type == "cpu"] // self.graphs.largest(kind)
        width = max(1, min(64, num_columns, room))
        if width > 1 and not self.choice.blocks_are_right(kind):
            width = 1
        for start in range(0, num_columns, width):
            yield slice(start, min(start + width, num_columns))

    def _through(
        self,
        rows: Tensor,
        kind: str,
        apply: Callable[..., Any],
        *,
        split: bool = False,
        among: Sequence[int] | None = None,
    ) -> Iterator[tuple[slice, list[Tensor]]]:
        """What apply makes of rows (K, ·), or of rows split into parameters, chunk by chunk: tensors (k, ...)."""
        for chunk in self._chunks(len(rows), kind):
            single = chunk.stop - chunk.start == 1
            some = rows[chunk.start if single else chunk]
            parts = apply(self._split(some, among) if split else some, batched=not single)
            parts = [parts] if isinstance(parts, Tensor) else parts
            yield chunk, [part[None] for part in parts] if single else parts

    def zeros(self, num_columns: int, size: int | None = None) -> Tensor:
        """(K, P) zeros to sum into, in at least float32."""
        dtype = torch.promote_types(self.problem.dtype, torch.float32)
        size = sum(self.sizes) if size is None else size
        return torch.zeros(num_columns, size, dtype=dtype, device=self.problem.device)

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
        way = self.choice.way()
        given = [self._rows(block) for block, _ in blocks]
        totals = [self.zeros(*rows.shape) for rows in given]
        with self.group.summing(*totals):
            for _, graph in self.graphs.each(kind, lambda batch: way(scalar(batch), self.problem.parameters)):
                for total, rows, (_, among) in zip(totals, given, blocks, strict=True):
                    apply = functools.partial(graph, among=among)
                    for chunk, parts in self._through(rows, kind, apply, split=True, among=among):
                        _add(self._split(total[chunk], among), parts)
        return [_finite(total).T for total in totals]

    def _loss_of(self, batch: Any) -> Scalar:
        return lambda parameters: self.problem.loss_function.total(*self.problem.evaluate(parameters, batch))

    def _residual_of(self, batch: Any) -> Scalar:
        outputs, targets = self.problem.values(batch)
        slope = self.problem.loss_function.gradient(outputs, targets).detach()
        return lambda parameters: (slope * self.problem.evaluate(parameters, batch)[0]).sum()

    # first derivatives of the outputs

    def _jacobians(self) -> Iterator[tuple[int, Jacobian]]:
        """The Jacobian of each batch of this process's share."""
        linearize = self.choice.linearize()
        return self.graphs.each("jacobian", lambda b: Jacobian(self.problem, b, linearize=linearize))

    def push(self, block: Tensor) -> list[Tensor]:
        """J V: for each batch (n, C, K)."""
        rows, mine = self._rows(block), list[Tensor]()
        with self.group.summing():
            mine += (self._push(jacobian, rows).movedim(0, -1) for _, jacobian in self._jacobians())
        return self.group.dealt(mine)

    def pushed(self, block: Tensor) -> Iterator[tuple[Jacobian, slice, Tensor]]:
        """J V, of this process's batches one by one and a few columns at a time: (n, C, k), and which columns."""
        rows = self._rows(block)
        for _, jacobian in self._jacobians():
            for columns in few_columns(len(rows), jacobian.outputs):
                yield jacobian, columns, self._push(jacobian, rows[columns]).movedim(0, -1)

    def _push(self, jacobian: Jacobian, rows: Tensor) -> Tensor:
        """(K, n, C)."""
        return torch.cat([part for _, (part,) in self._through(rows, "jacobian", jacobian.push, split=True)])

    def pull(self, cotangents: list[Tensor]) -> Tensor:
        """Jᵀ U for U given as one (n, C, K) a batch: (P, K)."""
        total = self.zeros(cotangents[0].shape[-1])
        with self.group.summing(total):
            for index, jacobian in self._jacobians():
                self._pull(total, jacobian, cotangents[index].movedim(-1, 0))
        return total.T

    def pull_made(self, make: Callable[[Jacobian, slice], Tensor], num_columns: int) -> Tensor:
        """Jᵀ U for a U that is made batch by batch, a few columns (n, C, k) at a time: (P, K)."""
        total = self.zeros(num_columns)
        with self.group.summing(total):
            for _, jacobian in self._jacobians():
                for columns in few_columns(num_columns, jacobian.outputs):
                    self._pull(total[columns], jacobian, make(jacobian, columns).movedim(-1, 0))
        return total.T

    def _pull(self, total: Tensor, jacobian: Jacobian, cotangents: Tensor) -> None:
        for chunk, parts in self._through(cotangents.to(jacobian.outputs.dtype), "jacobian", jacobian.pull):
            _add(self._split(total[chunk]), parts)

    def sandwich(self, middle: Callable[[Tensor, Tensor, Tensor], Tensor], block: Tensor) -> Tensor:
        """Jᵀ B J V with B given by middle(outputs, targets, tangents (K, ·)), in one pass over the data."""
        total = self.zeros(block.shape[1])
        rows = self._rows(block)
        with self.group.summing(total):
            for _, jacobian in self._jacobians():
                for columns in few_columns(len(rows), jacobian.outputs):
                    pushed = self._push(jacobian, rows[columns])
                    self._pull(total[columns], jacobian, middle(jacobian.outputs, jacobian.targets, pushed))
        return _finite(total).T

    def pull_each(
        self,
        cotangent: Callable[[Tensor, Tensor], tuple[Tensor, Callable[[slice], Tensor]]],
        num_columns: int,
        groups: Tensor | None = None,
        among: Collection[int] | None = None,
    ) -> Tensor:
        """Jᵀ U with each batch of one class, or of one group of classes, of all or `among` some: (P, K).

        `cotangent` takes outputs and targets of a batch to which columns of U are not zero there, (k,), and to what
        makes some of these (n, C, ·). For one pass: no graph is kept.
        """
        total = self.zeros(num_columns)
        build = functools.partial(OutputGraph, self.problem)
        with self.group.summing(total):
            for batch in class_batches(self.problem, groups, among):
                graph: OutputGraph = self.graphs.once("forward", build, batch)
                live, make = cotangent(graph.outputs, graph.targets)
                for columns in few_columns(len(live), graph.outputs):
                    given = make(columns).movedim(-1, 0).to(graph.outputs.dtype)
                    for chunk, parts in self._through(given, "forward", graph.pull):
                        for column, *alone in zip(live[columns][chunk].tolist(), *parts, strict=True):
                            _add(self._split(total[column]), alone)
        return total.T


def few_columns(num: int, outputs: Tensor) -> Iterator[slice]:
    """Stretches of so many columns, of which arrays like the outputs (n, C) are made at a time."""
    width = max(1, COLUMN_BYTES // (8 * max(1, outputs.numel())))
    return (slice(start, min(start + width, num)) for start in range(0, num, width))


@per_problem
def products_of(problem: Problem) -> Products:
    """The products of a problem, one object shared by all its operators and freed with it."""
    return Products(problem)


def _finite(total: Tensor) -> Tensor:
    """A sum of products, all of it numbers: one pass, in which NaN and ∞ are seen at the ends."""
    if total.numel() and not all(map(math.isfinite, torch.stack(total.aminmax()).tolist())):
        raise NonFiniteError(
            "a product is NaN or infinite: the vector is, or a derivative of the network is singular at its "
            "parameters (a norm or a root of zero, 0/0 in a backward pass), or numbers outgrow the dtype. Keep such "
            "operations away from zero (an epsilon inside the root), or pass dtype=torch.float64."
        )
    return total


def _add(total: list[Tensor], parts: list[Tensor]) -> None:
    for into, part in zip(total, parts, strict=True):
        into.add_(part)

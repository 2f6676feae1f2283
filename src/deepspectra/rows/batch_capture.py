"""Capturing features and errors: every use of a parameter as the network makes it.

Operations are seen as the network calls them, so that fused, tied and reused parameters are found wherever they
are used. How examples lie in a batch, and in every operation, is measured on a few of them, and on every batch
where values could change it; a batch in which they lie otherwise is taken example by example, or as one example
if none can pass the network alone. A parameter whose uses are not understood is differentiated row by row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deepspectra.errors import CurvatureError
from deepspectra.problem.batches import is_pair
from deepspectra.problem.evaluated_model import differentiable, leaves_of
from deepspectra.problem.memory_budget import refuse_beyond
from deepspectra.problem.problem import Problem
from deepspectra.rows.example_axis import Examples, agree
from deepspectra.rows.parameter_operations import Watch
from deepspectra.rows.parameter_uses import BLOCKS, Alone, Layout, Slice, Use, joined

CODED = {torch.float64: 1e-5, torch.float32: 1e-3}  # relative, of errors of examples that are weighted
CODED_HALF = 0.1
CHEAP = 40  # backward passes beside which the two of a check are few
MOST_PASSES = 50_000  # over whole batches taken as one example


class IrregularError(CurvatureError):
    """Parameters that are used otherwise on one batch than on another."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = frozenset(names)
        listed = ", ".join(map(repr, sorted(self.names)))
        super().__init__(
            f"the network uses {listed} otherwise on one batch than on another (is an example's way through it "
            "chosen by its values?), and features and errors of all batches do not fit memory together, so that "
            "those already taken cannot be taken again. Raise memory=, take fewer examples, or leave these "
            "parameters out by parameters=."
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return IrregularError, (self.names,)


@dataclass(frozen=True)
class Call:
    """An operation that uses a parameter: which stretch, how, and where examples lie; None if scattered."""

    slice: Slice
    kind: type[Use]
    layout: Layout | None


@dataclass(frozen=True)
class Plan:
    """What was learned on a few examples."""

    examples: Examples | None  # how examples lie in a batch; None if a whole batch is one example
    calls: tuple[Call, ...]  # the uses of parameters, in the order of the network's calls
    alone: frozenset[str]  # parameters to be differentiated row by row
    checked: bool  # on every batch it is seen anew that examples lie as here
    by_value: bool  # values may choose the operations, and where examples lie in them

    def without(self, names: Iterable[str]) -> Plan:
        """The same, with further parameters alone."""
        alone = self.alone | frozenset(names)
        calls = tuple(call for call in self.calls if call.slice.name not in alone)
        return dataclasses.replace(self, calls=calls, alone=alone)

    def rows(self, batch: Any, num_rows: int) -> Tensor | None:
        """Which rows of a batch are whose, (B, R); None if that is not known."""
        return None if self.examples is None else self.examples.rows(batch, num_rows)

    def order(self, batch: Any, num_rows: int) -> Tensor:
        """The rows (n,) of a batch, example by example."""
        rows = self.rows(batch, num_rows)
        return torch.arange(num_rows) if rows is None else rows.flatten()

    def layouts(self, uses: list[Use]) -> list[Layout] | None:
        """Of a batch's uses, one by one, or, if they are others, the layout that all have; None if there is none."""
        found = [call.layout for call in self.calls if call.layout is not None]
        if len(found) < len(self.calls):
            return None
        if [(use.slice, type(use)) for use in uses] == [(call.slice, call.kind) for call in self.calls]:
            return found
        return found[:1] * len(uses) if len(set(found)) == 1 else None

    def irregular(self, uses: Iterable[Use], wanted: set[str]) -> set[str]:
        """The parameters of which other stretches are used, or in another way."""
        known = {(call.slice, call.kind) for call in self.calls}
        seen = {(use.slice, type(use)) for use in uses}
        return {found.name for found, _ in known ^ seen} & wanted


@dataclass(frozen=True)
class Piece:
    """Uses of parameters by some of a batch's examples, and the rows (n,) of these examples."""

    uses: list[Use]
    rows: Tensor


@dataclass(frozen=True)
class Scalars:
    """What is backpropagated: scalars Σ_c W_{n,c,a} z_{n,c} of outputs z, with weights W (n, C, m).

    Each example has J = m scalars for each of its rows, row by row; or J = m that are sums over its rows.
    """

    weights: Tensor
    joint: bool = False

    def spread(self, rows: Tensor) -> Tensor:
        """The rows (B, S, r) that share scalars, S times m of them an example, of examples with rows (B, R)."""
        return rows[:, None] if self.joint else rows[:, :, None]

    def num(self, num_rows: int) -> int:
        """J of an example with so many rows."""
        return self.weights.shape[2] * (1 if self.joint else num_rows)

    def of(self, rows: Tensor) -> Scalars:
        """Those of one example alone."""
        return Scalars(self.weights[rows.to(self.weights.device)], self.joint)


class Graph:
    """A forward pass of which the uses of parameters were seen; `alone` ones are left as they are."""

    def __init__(self, problem: Problem, batch: Any, alone: frozenset[str] = frozenset()) -> None:
        self.problem, self.batch = problem, batch
        self.leaves = leaves_of(problem.parameters)
        watched = {name: leaf for name, leaf in self.leaves.items() if name not in alone}
        with torch.enable_grad(), differentiable(), Watch(watched) as watch:
            self.outputs, self.targets = problem.evaluate(self.leaves, batch)
        self.values = self.outputs.detach()
        self.uses = [use for use, _ in watch.uses]
        self.ends = [output for _, output in watch.uses]
        # values of other batches, such as the links of a graph, may bring examples together
        scripted = any(isinstance(module, torch.jit.ScriptModule) for module in problem.model.modules())
        self.by_value = watch.by_value or scripted or not is_pair(batch)

    def reached(self, names: Iterable[str]) -> frozenset[str]:
        """Of the named parameters those that the outputs use in a way that no rule understands."""
        asked = list(names)
        if not asked or not self.outputs.requires_grad:
            return frozenset()
        with differentiable():
            found = torch.autograd.grad(
                self.outputs,
                [self.leaves[name] for name in asked],
                torch.zeros_like(self.outputs),
                retain_graph=True,
                allow_unused=True,
            )
        return frozenset(name for name, part in zip(asked, found, strict=True) if part is not None)

    def errors(self, ends: list[Tensor], cotangent: Tensor) -> tuple[Tensor, ...]:
        """What backpropagation brings to tensors of the graph."""
        if not self.outputs.requires_grad:
            return tuple(map(torch.zeros_like, ends))
        with differentiable():
            return torch.autograd.grad(self.outputs, ends, cotangent, retain_graph=True, materialize_grads=True)

    def coded(self, ends: list[Tensor], rows: Tensor) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """Errors of a random scalar a row, beside those of the same times a number an example; these numbers (B,)."""
        generator = torch.Generator().manual_seed(0)
        cotangent = torch.randn(self.outputs.shape, generator=generator, dtype=torch.float64)
        codes = torch.linspace(1, 3, len(rows), dtype=torch.float64)
        codes = codes[torch.randperm(len(rows), generator=generator)]
        weighted = cotangent.clone()
        weighted[rows] *= codes.view(-1, *[1] * cotangent.ndim)
        both = (self.errors(ends, some.to(self.outputs)) for some in (cotangent, weighted))
        return list(zip(*both, strict=True)), codes.to(self.outputs)


def capture(graph: Graph, plan: Plan, scalars: Scalars, names: frozenset[str] | None = None) -> list[Piece]:
    """Features and errors of a batch for some scalars of its outputs, J of each example.

    Parameters that `names` leaves out are skipped; IrregularError names those that are used in a way that they were
    not on the plan's few, and must be alone. The pieces one after the other are the batch's rows in the plan's order.

    Cost: beside the graph J backward passes that stop at the outputs of layers, about a third of a gradient
    each, and two more where values could choose where examples lie; for parameters that the plan sets alone,
    J backward passes of every example by itself. A batch whose examples lie otherwise than in the plan is taken
    example by example, or, if these cannot pass alone, by a backward pass over the batch for each of its scalars.
    """
    wanted = set(graph.leaves if names is None else names)
    irregular = graph.reached(wanted - plan.alone) if scalars.weights.shape[2] else None
    if irregular:
        raise IrregularError(irregular)
    num_rows = len(graph.outputs)
    rows, order = plan.rows(graph.batch, num_rows), plan.order(graph.batch, num_rows)
    if plan.examples is not None and rows is not None and len(rows) > 1:
        apart = _Apart(graph, plan, plan.examples, rows, scalars) if plan.examples.apart else None
        uses = _together(graph, plan, rows, scalars, wanted)
        if uses is not None:
            alone = wanted & plan.alone
            return [Piece(uses + (_row_by_row(graph, apart, rows, scalars, alone) if alone else []), order)]
        pieces = apart.pieces(wanted) if apart else None
        if pieces is not None:
            return pieces
    is_whole = rows is None or len(rows) > 1
    return [Piece(_as_one(graph, plan, order, scalars, wanted, is_whole=is_whole), order)]


def _together(graph: Graph, plan: Plan, rows: Tensor, scalars: Scalars, wanted: set[str]) -> list[Use] | None:
    """Uses of all examples of a batch at once; None if they do not lie in it as in the plan."""
    layouts = plan.layouts(graph.uses)
    if layouts is None or plan.irregular(graph.uses, wanted):
        return None
    chosen = [
        (use, end, layout)
        for use, end, layout in zip(graph.uses, graph.ends, layouts, strict=True)
        if use.slice.name in wanted
    ]
    if not all(layout.divides(tensor, len(rows)) for use, end, layout in chosen for tensor in (end, use.given)):
        return None
    num_scalars = scalars.num(rows.shape[1])
    doubtful = plan.checked or graph.by_value or len(graph.uses) != len(plan.calls) or num_scalars >= CHEAP
    if doubtful and chosen:
        pairs, codes = graph.coded([end for _, end, _ in chosen], rows)
        limit = CODED.get(graph.outputs.dtype, CODED_HALF)
        if not all(lay.fits(*pair, codes, limit) for pair, (_, _, lay) in zip(pairs, chosen, strict=True)):
            return None
    _fill(graph, chosen, scalars.spread(rows), scalars.weights)
    return [use for use, _, _ in chosen]


def _as_one(
    graph: Graph, plan: Plan, order: Tensor, scalars: Scalars, wanted: set[str], *, is_whole: bool
) -> list[Use]:
    """Uses of a batch that is one example; or of a whole batch, whose examples cannot be told apart, as of one."""
    irregular = plan.irregular(graph.uses, wanted - plan.alone)
    if irregular:
        raise IrregularError(irregular)
    chosen: list[Receiver] = [
        (use, end, BLOCKS) for use, end in zip(graph.uses, graph.ends, strict=True) if use.slice.name in wanted
    ]
    chosen += _alone_receivers(graph, wanted & plan.alone)
    if is_whole:
        _refuse_too_many(graph.problem, plan, scalars, [end for _, end, _ in chosen])
    _fill(graph, chosen, scalars.spread(order[None]), scalars.weights)
    for use, _, _ in chosen:
        use.is_whole = is_whole and len(order) > 1
    return [use for use, _, _ in chosen]


def _refuse_too_many(problem: Problem, plan: Plan, scalars: Scalars, ends: list[Tensor]) -> None:
    """Refuse to backpropagate every scalar of a batch by itself where that takes too long or too much."""
    weights = scalars.weights
    here = scalars.num(int(weights.flatten(1).any(1).sum()))
    every = problem.batches.num_batches if scalars.joint else problem.num_examples
    passes = every * weights.shape[2] if plan.examples is None else here
    why = (
        "the rows of this network's outputs do not belong to single examples along the first or second dimension of "
        "the batch's tensors (graphs, batches in another order, rows dropped by forward=?), so that each of its "
        f"{len(weights):,} rows a batch has to be backpropagated by itself, "
    )
    instead = (
        "Pass forward= that gives the rows of all of the first example first, then of the second, from a batch of "
        "tensors whose first dimension is that of examples; or take fewer rows"
    )
    if passes > MOST_PASSES:
        raise CurvatureError(f"{why}{passes:,} backward passes over whole batches. {instead}.")
    size = here * sum(end.numel() * end.element_size() for end in ends)
    instead += ", or fewer parameters, or raise memory."
    refuse_beyond(size, problem.memory, f"{why}and their errors take", instead)


@dataclass(frozen=True)
class _Apart:
    """Examples of a batch that pass the network alone."""

    whole: Graph
    plan: Plan
    examples: Examples
    rows: Tensor
    scalars: Scalars

    def pieces(self, wanted: set[str]) -> list[Piece] | None:
        """Uses example by example, in one piece if they are alike; None if examples alone are not what they were."""
        pieces = []
        for graph, rows in self._graphs(self.plan.alone):
            if graph is None:
                return None
            irregular = graph.reached(wanted - self.plan.alone)
            if irregular:
                raise IrregularError(irregular)
            order, mine = torch.arange(len(rows)), self.scalars.of(rows)
            uses = _as_one(graph, self.plan, order, mine, wanted, is_whole=False)
            pieces.append(Piece(uses, rows))
        together = joined([piece.uses for piece in pieces])
        return pieces if together is None else [Piece(together, self.rows.flatten())]

    def row_by_row(self, names: set[str]) -> list[Use] | None:
        """Gradients of parameters, as `pieces`."""
        found = []
        for graph, rows in self._graphs(frozenset(self.whole.leaves)):
            if graph is None:
                return None
            chosen = _alone_receivers(graph, names)
            mine = self.scalars.of(rows)
            _fill(graph, chosen, mine.spread(torch.arange(len(rows))[None]), mine.weights)
            found.append([use for use, _, _ in chosen])
        return joined(found)

    def _graphs(self, alone: frozenset[str]) -> Iterator[tuple[Graph | None, Tensor]]:
        for index, rows in enumerate(self.rows):
            graph = Graph(self.whole.problem, self.examples.one(self.whole.batch, index), alone)
            same = agree({index: graph.values}, self.whole.values, self.rows)
            yield graph if same else None, rows


def _row_by_row(graph: Graph, apart: _Apart | None, rows: Tensor, scalars: Scalars, names: set[str]) -> list[Use]:
    """Gradients (B, J, ...) of parameters: by examples that pass alone, or by rows of the whole batch."""
    found = apart.row_by_row(names) if apart else None
    if found is not None:
        return found
    chosen = _alone_receivers(graph, names)
    _fill(graph, chosen, scalars.spread(rows).flatten(0, 1)[None], scalars.weights)
    for use, _, _ in chosen:
        use.errors = use.errors.view(len(rows), -1, use.errors.shape[-1])
        use.num_examples = len(rows)
    return [use for use, _, _ in chosen]


Receiver = tuple[Use, Tensor, Layout]


def _alone_receivers(graph: Graph, names: set[str]) -> list[Receiver]:
    """Parameters whose gradients are held themselves."""
    return [
        (Alone(Slice(name, 0, tuple(leaf.shape)), None, ()), leaf, BLOCKS)
        for name, leaf in graph.leaves.items()
        if name in names
    ]


def _fill(graph: Graph, receivers: list[Receiver], rows: Tensor, weights: Tensor) -> None:
    """Backpropagate every scalar to the outputs of the uses, and have them take the errors.

    Rows (B, S, r) share scalars, as `Scalars.spread` gives them.
    """
    num_examples, num_scalars = rows.shape[0], rows.shape[1] * weights.shape[2]
    for use, _, layout in receivers:
        use.arrange(layout, num_examples)
        use.num_rows = rows.numel()
    ends = {id(end): end for _, end, _ in receivers}  # a fused operation has several uses and one output
    cotangents = _cotangents(rows.to(weights.device), weights) if receivers else ()
    for index, cotangent in enumerate(cotangents):
        if cotangent is None:
            found = tuple(map(torch.zeros_like, ends.values()))
        else:
            found = graph.errors(list(ends.values()), cotangent.reshape(graph.outputs.shape))
        errors = dict(zip(ends, found, strict=True))
        for use, end, layout in receivers:
            use.put(index, num_scalars, layout.examples_first(errors[id(end)], num_examples))


def _cotangents(rows: Tensor, weights: Tensor) -> Iterator[Tensor | None]:
    """Of each scalar (n, C), one row of all examples after the other; None of a scalar that is zero for every one."""
    active = weights.any(1)[rows].any(2).any(0)  # (S, m)
    for here, scalars in zip(rows.unbind(1), active.tolist(), strict=True):
        for scalar, is_active in enumerate(scalars):
            if not is_active:
                yield None
            elif rows.shape[1] == 1:  # shared by all rows there are
                yield weights[:, :, scalar]
            else:
                cotangent = torch.zeros_like(weights[:, :, scalar])
                cotangent[here] = weights[here, :, scalar]
                yield cotangent

"""Gradients as rows held layer by layer, as features and errors: products, averages and inner products."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from deepspectra.problem.memory_budget import refuse_beyond
from deepspectra.problem.parallel import ALONE, Group
from deepspectra.problem.problem import Problem
from deepspectra.rows.averages import Averages
from deepspectra.rows.captures import Captured, Complement, captures_of
from deepspectra.rows.gradients import GradientRows, by_single_class
from deepspectra.rows.parameter_uses import Lookup, Matrix, Slice, Use, as_slice, by_stretch
from deepspectra.rows.projections import Projections

BLOCK_BYTES = 2**28  # of gradients that are formed at a time
EXAMPLES = 16  # whose inner products with as many others are computed together
BLOCK_ROWS = 256  # of a Gram matrix, of which the lower half is computed block by block
FORMED_OVERHEAD = 1.15  # of multiplying formed gradients, for forming them


class HeldRows(GradientRows):
    """The rows A of `GradientRows`, example by example, with their features and errors.

    C − 1 scalars an example stand for its C rows. Memory: about C − 1 times the activations of a forward pass
    over all the data. While the captures hold them products are theirs, and else go through the network.

    Cost: a forward and C − 1 backward passes without weight gradients; then a third of a gradient a column.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.holds = True
        self.captures = captures_of(problem)
        self._put_in_order()
        self.complement = Complement(self.probabilities)  # the C − 1 coordinates of each example
        ends = itertools.accumulate(self.products.sizes, initial=0)
        self.starts = dict(zip(problem.parameters, ends, strict=False))  # of each parameter in the vector

    def _put_in_order(self) -> None:
        """Rows example by example, as they are captured."""
        plan = self.captures.plan
        if plan.examples is None or not plan.examples.interleaved:
            return
        every = torch.split(torch.arange(len(self.labels)), self.sizes)
        pieces = zip(self.problem.fixed_batches(), every, strict=True)
        order = [piece[plan.order(batch, len(piece))] for batch, piece in pieces]
        self.order = torch.cat(order).to(self.weights.device)
        for name in ("probabilities", "labels", "curvature", "weights"):
            setattr(self, name, getattr(self, name)[self.order])

    @property
    def group(self) -> Group:
        """The processes that share the work; what is held they all hold."""
        return self.problem.batches.group

    @functools.cached_property
    def counted(self) -> Tensor:
        """The examples that count (N',): of others, such as ignored tokens, all rows are zero."""
        (found,) = (self.curvature > 0).nonzero(as_tuple=True)
        return found

    @functools.cached_property
    def live(self) -> Tensor:
        """The reduced rows of these among those of all: (R,), R = N' (C − 1)."""
        each = self.weights.shape[1] - 1
        return (self.counted[:, None] * each + torch.arange(each, device=self.counted.device)).flatten()

    @property
    def num_reduced(self) -> int:
        """R = N' (C − 1)."""
        return len(self.live)

    def apply(self, block: Tensor) -> Tensor:
        """A V: (N, C, K). Cost: a third of a gradient a column."""
        held = self.captures.held
        if not held:
            return super().apply(block)
        pushed = self.group.in_turn(lambda index: self._push(held[index].uses, block), len(held))
        return self.complement.expand(torch.cat(list(pushed)))

    @property
    def splits_by_class(self) -> bool:
        """Whether the means of one class cost less than those of all: not where all rows are at hand."""
        return not self.captures.held and super().splits_by_class

    def apply_reduced(self, block: Tensor) -> Tensor:
        """A V over the R reduced rows: (R, K)."""
        return self.complement.reduce(self.apply(block)).flatten(0, 1)[self.live]

    def transpose_reduced(self, rows: Tensor) -> Tensor:
        """Aᵀ α for α (R, K) over the reduced rows: (P, K)."""
        every = rows.new_zeros(len(self.labels), self.weights.shape[1] - 1, rows.shape[1])
        every[self.counted] = rows.view(len(self.counted), -1, rows.shape[1])
        return self.transpose(self.complement.expand(every))

    def _push(self, uses: list[Use], block: Tensor) -> Tensor:
        """(n, C − 1, K) for one batch."""

        def tangents(found: Slice) -> Tensor:
            start = self.starts[found.name] + found.start
            return block[start : start + found.numel].T.reshape(-1, *found.shape)

        total = functools.reduce(torch.add, (use.push(tangents(use.slice)) for use in uses))
        return total.reshape(-1, self.weights.shape[1] - 1, block.shape[1])

    def transpose(self, rows: Tensor) -> Tensor:
        """Aᵀ α for α (N, C, K): (P, K). Cost: a third of a gradient a column, of the examples where α is not 0."""
        if not self.captures.held:
            return super().transpose(rows)
        total = self.products.zeros(rows.shape[-1])
        self._pull_all(total, rows, torch.arange(len(total), device=total.device))
        return total.T

    def _pull_all(self, total: Tensor, rows: Tensor, places: Tensor) -> None:
        """Add Aᵀ α to these places of (·, P), a process its share of the batches."""
        held, reduced = self.captures.held, self.complement.reduce(rows)
        every = list(zip(held, torch.split(reduced, [batch.num_rows for batch in held]), strict=True))
        with self.group.summing(total):
            self._pull_share(total, every[self.group.rank :: self.group.size], places)

    def _pull_share(self, total: Tensor, share: list[tuple[Captured, Tensor]], places: Tensor) -> None:
        for batch, part in share:
            mixed = part.reshape(batch.uses[0].num_examples, -1, part.shape[-1])
            patterns, which = torch.unique(mixed.any(1), dim=1, return_inverse=True)
            for index, live in enumerate(patterns.T):
                (columns,), (chosen,) = (which == index).nonzero(as_tuple=True), live.nonzero(as_tuple=True)
                if len(chosen):
                    self._pull(total, batch.uses, mixed[chosen][:, :, columns], chosen, places[columns])

    def _pull(self, total: Tensor, uses: list[Use], mixed: Tensor, chosen: Tensor, columns: Tensor) -> None:
        some = as_slice(chosen)
        for use in uses:
            start = self.starts[use.slice.name] + use.slice.start
            piece = use.pull(mixed.to(use.errors), some).reshape(len(columns), -1)
            total[columns, start : start + use.slice.numel] += piece.to(total)

    def _means(
        self,
        projections: Projections,
        columns: Callable[[Tensor], tuple[Tensor, Tensor]],
        num: int,
        among: Collection[int] | None = None,
    ) -> Tensor:
        """Σ_i Σ_k w_{i,k} s_{c(i),k} g_{i,k} for columns s of cells: (P, num)."""
        if not self.captures.held:
            return super()._means(projections, columns, num, among)
        mixed, live = by_single_class(columns, self.labels, projections.groups)
        total = self.products.zeros(num)
        self._pull_all(total, self.weights.sqrt()[:, :, None] * mixed, live)
        return total.T

    # inner products of rows

    def gram(self) -> Tensor:
        """(R, R) float64, inner products of the R = N' (C − 1) reduced rows that count, example by example.

        Each stretch of a parameter by the cheaper of two ways: gradients formed and multiplied, or inner
        products of features and of errors. What is not held is captured group by group of parameters.
        """
        refuse_beyond_memory(self.num_reduced, self.problem)
        return gram_of((uses for _, uses in self.captures.by_layer()), self.group, self.live)


def gram_bytes(num_rows: int) -> int:
    """Bytes of a Gram matrix, its eigenvectors, and twice as much in which LAPACK finds them."""
    return 4 * 8 * num_rows**2


def refuse_beyond_memory(num_rows: int, problem: Problem) -> None:
    """Raise MemoryBudgetError if the Gram matrix of so many rows does not fit memory."""
    what = f"the Gram matrix of {num_rows:,} rows and its eigenvectors take"
    refuse_beyond(gram_bytes(num_rows), problem.memory, what, "Take fewer examples, or raise memory.")


def gram_of(layers: Iterable[list[list[Use]]], group: Group = ALONE, live: Tensor | None = None) -> Tensor:
    """Inner products (R, R) of gradients to the parameters of some layers, each of one list of uses a batch.

    Of all gradients, or of those that are `live`, in ascending order. Where several processes hold the same, each
    computes a part.
    """
    total = torch.zeros(0)
    for batches in layers:
        sizes = _num_rows(batches)
        if not len(total):
            device = batches[0][0].errors.device
            live = torch.arange(sum(sizes), device=device) if live is None else live.to(device)
            total = torch.zeros(len(live), len(live), dtype=torch.float64, device=device)
        assert live is not None
        _add_lower(total, batches, live, sizes, group)
    group.sum(total)
    return total.tril_() + total.tril(-1).T


def _num_rows(batches: list[list[Use]]) -> list[int]:
    """Gradients of each batch, J of every example."""
    return [uses[0].num_examples * uses[0].errors.shape[1] for uses in batches]


def moment_of(batches: list[list[Use]], averages: Averages) -> tuple[Tensor, Averages]:
    """AᵀA (P, P) and the factors AᵀB of averages, float64, of the gradients A (R, P) to one layer's parameters.

    The other side of `gram_of`, for layers of fewer parameters than there are rows; the order of the parameters is
    that of the uses.

    Cost: R P² multiplications; a batch's gradients are formed at a time.
    """
    return moment_of_rows(_formed(batches), averages)


def _formed(batches: list[list[Use]]) -> Iterator[Tensor]:
    """Gradients to one layer's parameters, batch by batch."""
    stretches = list(by_stretch(batches[0]))  # in whose order columns stand
    for uses in batches:
        mine = by_stretch(uses)
        formed = ([use.formed(slice(None)) for use in mine[stretch]] for stretch in stretches)
        yield torch.cat([functools.reduce(torch.add, each).flatten(0, 1) for each in formed], 1)


def moment_of_rows(batches: Iterable[Tensor], averages: Averages) -> tuple[Tensor, Averages]:
    """AᵀA (D, D) and the factors AᵀB of averages, float64, of rows A (R, D) that are formed batch by batch."""
    moment = factors = torch.zeros(())
    bases, first = torch.cat([*averages.values(), averages.every], 1), 0
    for rows in batches:
        some = bases[first : first + len(rows)]
        moment = moment + (rows.T @ rows).double()
        factors = factors + (rows.T @ some.to(rows)).double()
        first += len(rows)
    each = iter(torch.split(factors, [basis.shape[1] for basis in (*averages.values(), averages.every)], 1))
    return moment, averages.map(lambda _: next(each))


def _add_lower(total: Tensor, batches: list[list[Use]], live: Tensor, sizes: list[int], group: Group) -> None:
    """Each stretch of a parameter, to the lower half at least."""
    grouped = [by_stretch(uses) for uses in batches]
    for stretch in grouped[0]:
        mine = [group[stretch] for group in grouped]
        factored = [[use for use in batch if isinstance(use, (Matrix, Lookup))] for batch in mine]
        if [len(batch) for batch in factored] == [len(batch) for batch in mine] and _prefers_inner(factored):
            _add_inner(total, factored, live, sizes, group)
        else:
            _add_formed(total, mine, live, group)


def _prefers_inner(mine: list[list[Matrix | Lookup]]) -> bool:
    uses = [use for batch in mine for use in batch]
    if len({(type(use), use.slice.transposed) for use in uses}) > 1:  # tied parameters: of different kinds
        return False
    each = len(mine[0])
    return each**2 * max(use.inner_cost() for use in uses) < FORMED_OVERHEAD * uses[0].slice.numel


class _Piece(NamedTuple):
    """Gradients of some examples: where they stand among those that are live, and features and errors of each use."""

    place: slice
    live: Tensor  # which of them are
    num: int
    factors: list[tuple[Tensor, Tensor]]


def _add_inner(
    total: Tensor, mine: list[list[Matrix | Lookup]], live: Tensor, sizes: list[int], group: Group
) -> None:
    """The lower half, some examples by some: small blocks that stay in the cache."""
    inner = mine[0][0].inner
    pieces: list[_Piece] = []
    for uses, end in zip(mine, itertools.accumulate(sizes), strict=True):
        num, scalars, *rest = uses[0].errors.shape
        step = max(EXAMPLES, BLOCK_ROWS // max(1, scalars * math.prod(rest[1:])))
        factors = [use.factors() for use in uses]
        for start in range(0, num, step):
            some = slice(start, min(start + step, num))
            first = end - num * scalars
            rows = first + some.start * scalars, first + some.stop * scalars
            place = slice(*torch.searchsorted(live, live.new_tensor(rows)).tolist())
            if place.start == place.stop:
                continue
            counts = torch.zeros(rows[1] - rows[0], dtype=torch.bool, device=live.device)
            counts[live[place] - rows[0]] = True
            counts = counts.view(-1, scalars)
            kept = as_slice(counts.any(0).nonzero()[:, 0])  # scalars of padding count for no example
            (mine_live,) = counts[:, kept].flatten().nonzero(as_tuple=True)
            each = [(features[some], errors[some][:, kept]) for features, errors in factors]
            pieces.append(_Piece(place, mine_live, counts[:, kept].numel(), each))
    for index, one in enumerate(pieces):
        for column, other in enumerate(pieces[: index + 1]):
            if not group.owns(index + column):
                continue
            for pair in itertools.product(one.factors, other.factors):
                block = inner(*pair)
                if len(one.live) < one.num or len(other.live) < other.num:
                    block = block[one.live[:, None], other.live]
                total[one.place, other.place] += block


def _add_formed(total: Tensor, mine: list[list[Use]], live: Tensor, group: Group) -> None:
    some, num = mine[0][0], sum(_num_rows(mine))
    rows = some.slice.shape[0] if some.slice.shape else 1
    width = max(1, BLOCK_BYTES // (num * max(1, some.slice.numel // rows) * some.errors.element_size()))
    for start in range(0, rows, width):
        chunk = slice(start, min(start + width, rows))
        pieces = [functools.reduce(torch.add, (use.formed(chunk) for use in uses)) for uses in mine]
        formed = torch.cat([piece.flatten(0, 1) for piece in pieces])
        formed = formed[live] if len(live) < num else formed
        for number, top in enumerate(range(0, len(total), BLOCK_ROWS)):
            if not group.owns(number):
                continue
            some_rows = formed[top : top + BLOCK_ROWS]
            total[top : top + BLOCK_ROWS, : top + BLOCK_ROWS] += some_rows @ formed[: top + BLOCK_ROWS].T

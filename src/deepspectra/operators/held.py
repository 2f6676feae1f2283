"""Gradients as rows held layer by layer, as features and errors: products, averages and inner products."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from deepspectra import capture
from deepspectra.errors import CurvatureError, DeepSpectraError, MemoryBudgetError
from deepspectra.losses import CrossEntropy
from deepspectra.operators.projections import Projections
from deepspectra.operators.rows import GradientRows
from deepspectra.problem import Problem
from deepspectra.products import FAILURES
from deepspectra.uses import Lookup, Matrix, Slice, Use

SAMPLE_ROWS = 3  # examples on which the uses of parameters are understood
BLOCK_BYTES = 2**28  # of gradients that are formed at a time
EXAMPLES = 16  # whose inner products with as many others are computed together
BLOCK_ROWS = 256  # of a Gram matrix, of which the lower half is computed block by block
FORMED_OVERHEAD = 1.15  # of multiplying formed gradients, for forming them


class Complement:
    """Orthonormal coordinates of R^C without √p_i, one example each: C − 1 scalars carry all of A's rows of i.

    Σ_k √w_{i,k} a_{i,k} = 0, so nothing is lost and products, inner products and spectra stay what they are. By
    a Householder reflection that takes √p_i to the first axis.
    """

    def __init__(self, probabilities: Tensor) -> None:
        self.root = probabilities.sqrt()
        self.normal = self.root.clone()
        self.normal[:, 0] += 1
        self.scale = 1 / self.normal[:, 0]

    def reduce(self, rows: Tensor) -> Tensor:
        """(N, C, K) → (N, C − 1, K)."""
        return self._reflect(rows)[:, 1:]

    def expand(self, reduced: Tensor) -> Tensor:
        """(N, C − 1, K) → (N, C, K)."""
        return self._reflect(torch.cat([torch.zeros_like(reduced[:, :1]), reduced], 1))

    def basis(self) -> Tensor:
        """(N, C, C − 1)."""
        size = self.root.shape[1]
        eye = torch.eye(size, dtype=self.root.dtype, device=self.root.device)
        return self._reflect(eye.expand(len(self.root), size, size))[:, :, 1:]

    def _reflect(self, rows: Tensor) -> Tensor:
        normal, scale = self.normal.to(rows), self.scale.to(rows)
        along = torch.einsum("nc,nck->nk", normal, rows) * scale[:, None]
        return rows - normal[:, :, None] * along[:, None]


class HeldRows(GradientRows):
    """The rows A of `GradientRows`, held as the features and errors of every use of a parameter.

    C − 1 scalars an example stand for its C rows. Memory: about C − 1 times the activations of a forward pass
    over all the data; if a third of the problem's memory does not hold them, products go through the network.

    Raises:
        LossError: not the cross-entropy of class labels.
        CurvatureError: rows not spread evenly over examples, or operations that differ between batches.

    Cost: a forward and C − 1 backward passes without weight gradients; then a third of a gradient a column.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.complement = Complement(self.probabilities)
        with _refusing():
            self.plan = capture.plan(problem.sample(SAMPLE_ROWS, torch.float64), self.weigh)
        self.held: list[list[Use]] = []
        self.limit = problem.memory // 3
        ends = itertools.accumulate(self.products.sizes, initial=0)
        self.starts = dict(zip(problem.parameters, ends, strict=False))  # of each parameter in the vector
        self.bytes_by_layer: dict[str, int] = {}  # of features and errors of all the data, estimated

    @property
    def num_reduced(self) -> int:
        """R = N (C − 1)."""
        return self.weights.shape[0] * (self.weights.shape[1] - 1)

    @property
    def gram_bytes(self) -> int:
        """Bytes of the Gram matrix, its eigenvectors and one more like it."""
        return 3 * 8 * self.num_reduced**2

    def hold(self) -> bool:
        """Bring features and errors into memory; False if they do not fit."""
        if not self.held:
            captured = self.captured()
            first = next(captured)
            self._estimate(first)
            if sum(self.bytes_by_layer.values()) <= self.limit:
                self.held = [first, *captured]
        return bool(self.held)

    def release(self) -> None:
        """Drop them; products go through the network again."""
        self.held = []

    def _estimate(self, uses: list[Use]) -> None:
        scale = len(self.labels) / self.sizes[0]
        self.bytes_by_layer = dict.fromkeys(self.problem.layers, 0)
        for use in uses:
            self.bytes_by_layer[layer_of(use.slice.name)] += int(scale * use.num_bytes)

    def captured(self, names: frozenset[str] | None = None) -> Iterator[list[Use]]:
        """Uses of the named parameters with features and errors, batch by batch. Cost: that of `hold`."""
        for batch in self.problem.batches:
            with _refusing():
                uses = capture.capture(self.problem, batch, self.plan, self.weigh, names)
            yield uses

    def features(self) -> Iterator[list[Use]]:
        """Uses of all parameters with features alone, batch by batch. Cost: a forward pass."""
        names = frozenset(self.problem.parameters) - frozenset(self.plan.alone)
        for batch in self.problem.batches:
            with _refusing():
                uses = capture.capture(self.problem, batch, self.plan, _no_scalars, names)
            yield uses

    def weigh(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cotangents (n, C, C − 1) of the scalars: Σ_k U_{k,a} √w_{i,k} (p_i − y_k) = −√w_i ∘ U_a."""
        loss = self.problem.loss_function
        assert isinstance(loss, CrossEntropy)
        p = outputs.double().softmax(-1)
        curvature = loss.curvature_weights(outputs, targets).double() / self.problem.total_weight
        scaled = -(curvature[:, None] * p).sqrt()[:, :, None] * Complement(p).basis()
        return scaled.to(outputs)

    def apply(self, block: Tensor) -> Tensor:
        """A V: (N, C, K). Cost: a third of a gradient a column."""
        if not self.held:
            return super().apply(block)
        return self.complement.expand(torch.cat([self._push(uses, block) for uses in self.held]))

    def _push(self, uses: list[Use], block: Tensor) -> Tensor:
        """(n, C − 1, K) for one batch."""
        total = functools.reduce(torch.add, (use.push(self._tangents(use.slice, block)) for use in uses))
        return total.reshape(-1, self.weights.shape[1] - 1, block.shape[1])

    def _tangents(self, found: Slice, block: Tensor) -> Tensor:
        start = self.starts[found.name] + found.start
        return block[start : start + found.numel].T.reshape(-1, *found.shape)

    def transpose(self, rows: Tensor) -> Tensor:
        """Aᵀ α for α (N, C, K): (P, K). Cost: a third of a gradient a column, of the examples where α is not 0."""
        if not self.held:
            return super().transpose(rows)
        total = self.products.zeros(rows.shape[-1])
        reduced = self.complement.reduce(rows)
        for uses, part in zip(self.held, torch.split(reduced, self.sizes), strict=True):
            num_examples = uses[0].num_examples
            mixed = part.reshape(num_examples, -1, part.shape[-1])
            patterns, which = torch.unique(mixed.any(1), dim=1, return_inverse=True)
            for index, live in enumerate(patterns.T):
                (columns,) = (which == index).nonzero(as_tuple=True)
                if not bool(live.any()):
                    continue
                (chosen,) = live.nonzero(as_tuple=True)
                self._pull(total, uses, mixed[chosen][:, :, columns], chosen, columns)
        return total.T

    def _pull(self, total: Tensor, uses: list[Use], mixed: Tensor, chosen: Tensor, columns: Tensor) -> None:
        first, last = int(chosen[0]), int(chosen[-1]) + 1
        some = slice(first, last) if last - first == len(chosen) else chosen  # a slice is not copied
        for use in uses:
            start = self.starts[use.slice.name] + use.slice.start
            piece = use.pull(mixed.to(use.errors), some).reshape(len(columns), -1)
            total[columns, start : start + use.slice.numel] += piece.to(total)

    def factor(self, projections: Projections, basis: Tensor) -> Tensor:
        """Aᵀ B for a basis B given in cell coordinates (C, C, r): (P, r)."""
        if not self.held:
            return super().factor(projections, basis)
        return self.transpose(projections.expand(basis))

    # inner products of rows

    def gram(self) -> Tensor:
        """(R, R) float64, inner products of the R = N (C − 1) reduced rows, example by example.

        Each stretch of a parameter by the cheaper of two ways: gradients formed and multiplied, or inner
        products of features and of errors. What is not held is captured group by group of parameters.

        Raises:
            MemoryBudgetError: one parameter's features and errors, or the matrix, do not fit memory.
        """
        if self.gram_bytes > self.problem.memory:
            raise MemoryBudgetError(
                f"the Gram matrix of {self.num_reduced:,} rows and its eigenvectors take "
                f"{self.gram_bytes / 2**30:.1f} GiB; "
                f"memory is {self.problem.memory / 2**30:.1f} GiB. Take fewer examples, or raise memory."
            )
        return gram_of(uses for _, uses in self.by_layer())

    def by_layer(self) -> Iterator[tuple[str, list[list[Use]]]]:
        """Each layer's uses, one list a batch: held, or captured for as many layers at a time as fit memory.

        Raises:
            MemoryBudgetError: one layer's features and errors do not fit.
        """
        self.hold()
        for layers in self._groups():
            names = [name for name in self.problem.parameter_names if layer_of(name) in layers]
            batches = self.held or list(self.captured(frozenset(names)))
            for layer in layers:
                mine = [[use for use in uses if layer_of(use.slice.name) == layer] for uses in batches]
                if mine[0]:
                    yield layer, mine

    def _groups(self) -> list[list[str]]:
        """Layers whose features and errors fit memory together, in order."""
        if self.held:
            return [list(self.problem.layers)]
        groups: list[list[str]] = []
        used = self.limit + 1
        for layer, size in self.bytes_by_layer.items():
            if size > self.limit:
                raise MemoryBudgetError(
                    f"features and errors of layer {layer!r} take about {size / 2**30:.2f} GiB and a third of "
                    f"memory is {self.limit / 2**30:.2f} GiB. Raise memory, or take fewer examples."
                )
            if used + size > self.limit:
                groups.append([])
                used = 0
            groups[-1].append(layer)
            used += size
        return groups


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    """A network that fails when it is watched, or when its examples pass alone, cannot be taken apart this way."""
    try:
        yield
    except DeepSpectraError:
        raise
    except FAILURES as failure:
        reason = (str(failure).splitlines() or [type(failure).__name__])[0]
        raise CurvatureError(
            f"features and errors of this network cannot be told apart by example ({reason})."
        ) from failure


def _no_scalars(outputs: Tensor, _: Tensor) -> Tensor:
    return outputs.new_empty(*outputs.shape, 0)


def layer_of(name: str) -> str:
    """The module that owns a parameter."""
    return name.rpartition(".")[0]


def gram_of(layers: Iterable[list[list[Use]]]) -> Tensor:
    """Inner products (R, R) of gradients to the parameters of some layers, each of one list of uses a batch."""
    total = torch.zeros(0)
    for held in layers:
        sizes = [uses[0].num_examples * uses[0].errors.shape[1] for uses in held]
        if not len(total):
            total = torch.zeros(sum(sizes), sum(sizes), dtype=torch.float64, device=held[0][0].errors.device)
        _add_lower(total, held, sizes)
    return total.tril_() + total.tril(-1).T


def _add_lower(total: Tensor, held: list[list[Use]], sizes: list[int]) -> None:
    """Each stretch of a parameter, to the lower half at least."""
    stretches = dict.fromkeys(
        (use.slice.name, use.slice.start, use.slice.shape) for uses in held for use in uses
    )
    for stretch in stretches:
        mine = [
            [use for use in uses if (use.slice.name, use.slice.start, use.slice.shape) == stretch]
            for uses in held
        ]
        factored = [[use for use in batch if isinstance(use, (Matrix, Lookup))] for batch in mine]
        if [len(batch) for batch in factored] == [len(batch) for batch in mine] and _prefers_inner(factored):
            _add_inner(total, factored, sizes)
        else:
            _add_formed(total, mine)


def _prefers_inner(mine: list[list[Matrix | Lookup]]) -> bool:
    uses = [use for batch in mine for use in batch]
    if len({(type(use), use.slice.transposed) for use in uses}) > 1:  # tied parameters: of different kinds
        return False
    each = len(mine[0])
    return each**2 * max(use.inner_cost() for use in uses) < FORMED_OVERHEAD * uses[0].slice.numel


def _add_inner(total: Tensor, mine: list[list[Matrix | Lookup]], sizes: list[int]) -> None:
    """The lower half, some examples by some: small blocks that stay in the cache."""
    inner = mine[0][0].inner
    pieces: list[tuple[slice, list[tuple[Tensor, Tensor]]]] = []
    for uses, end in zip(mine, itertools.accumulate(sizes), strict=True):
        num, scalars, *rest = uses[0].errors.shape
        step = max(EXAMPLES, BLOCK_ROWS // (scalars * math.prod(rest[1:])))
        factors = [use.factors() for use in uses]
        for start in range(0, num, step):
            some = slice(start, min(start + step, num))
            first = end - num * scalars
            rows = slice(first + some.start * scalars, first + some.stop * scalars)
            pieces.append((rows, [(features[some], errors[some]) for features, errors in factors]))
    for index, (rows, some_factors) in enumerate(pieces):
        for columns, others in pieces[: index + 1]:
            for pair in itertools.product(some_factors, others):
                total[rows, columns] += inner(*pair)


def _add_formed(total: Tensor, mine: list[list[Use]]) -> None:
    some = mine[0][0]
    rows = some.slice.shape[0] if some.slice.shape else 1
    width = max(
        1, BLOCK_BYTES // (len(total) * max(1, some.slice.numel // rows) * some.errors.element_size())
    )
    for start in range(0, rows, width):
        chunk = slice(start, min(start + width, rows))
        pieces = [functools.reduce(torch.add, (use.formed(chunk) for use in uses)) for uses in mine]
        formed = torch.cat([piece.flatten(0, 1) for piece in pieces])
        for top in range(0, len(total), BLOCK_ROWS):
            some_rows = formed[top : top + BLOCK_ROWS]
            total[top : top + BLOCK_ROWS, : top + BLOCK_ROWS] += some_rows @ formed[: top + BLOCK_ROWS].T

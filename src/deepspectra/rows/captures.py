"""Features and errors of every use of a parameter: batch by batch, or held for all the data."""

from __future__ import annotations

import contextlib
import functools
import itertools
import weakref
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deepspectra.derivatives.products import products_of
from deepspectra.derivatives.way_choice import FAILURES
from deepspectra.errors import CurvatureError, DeepSpectraError, LossError, MemoryBudgetError, first_line
from deepspectra.problem.cross_entropy import CrossEntropy
from deepspectra.problem.evaluated_model import differentiable
from deepspectra.problem.example_subsets import small_problem
from deepspectra.problem.losses import Loss
from deepspectra.problem.memory_budget import refuse_beyond, share
from deepspectra.problem.problem import Problem, per_problem
from deepspectra.rows import batch_capture, capture_plan
from deepspectra.rows.batch_capture import IrregularError
from deepspectra.rows.gradients import refuse_one_output
from deepspectra.rows.parameter_uses import Use

SAMPLE_ROWS = 3  # examples on which the uses of parameters are understood
ROUNDING = 1e-10  # of the largest curvature of a row, below zero

Weigh = Callable[[Tensor, Tensor], Tensor]  # of outputs and targets, cotangents (n, C, m)


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


def curvature_root(loss: Loss, outputs: Tensor, targets: Tensor, total_weight: float) -> Tensor:
    """F (n, C, m) float64 with F_i F_iᵀ = ∂²(Σ ω ℓ / Σ ω)/∂z_i²; m = C − 1 for cross-entropy, else C."""
    if isinstance(loss, CrossEntropy):
        p = outputs.double().softmax(-1)
        curvature = loss.curvature_weights(outputs, targets).double() / total_weight
        root: Tensor = -(curvature[:, None] * p).sqrt()[:, :, None] * Complement(p).basis()
        return root
    columns = []
    for tangent in torch.eye(outputs[:1].numel(), dtype=outputs.dtype, device=outputs.device):
        along = tangent.view(outputs[:1].shape).expand_as(outputs)
        columns.append(loss.curvature(outputs, targets, along).reshape(len(outputs), -1).double())
    values, vectors = torch.linalg.eigh(torch.stack(columns, 2) / total_weight)
    if bool((values < -ROUNDING * values.abs().max()).any()):
        raise LossError(
            f"the loss {loss.name!r} is not convex in the outputs, so the Gauss-Newton matrix is no sum of squares "
            "of errors. Use a convex loss, such as 'cross_entropy' or 'mse'."
        )
    root = vectors * values.clamp_min(0).sqrt()[:, None]
    return root


@dataclass(frozen=True)
class Captured:
    """One batch, or one example of a batch whose examples had to be taken one by one."""

    uses: list[Use]  # of its parameters, with features and errors
    weights: Tensor  # (n,) what each row counts: ω_i, or with label smoothing the curvature of its loss
    targets: Tensor  # of its rows

    @property
    def num_rows(self) -> int:
        """Of outputs."""
        return len(self.weights)

    @property
    def by_example(self) -> Tensor:
        """What rows count, (B, R), float64."""
        return self.weights.view(self.uses[0].num_examples, -1).double()


class Held(list[Captured]):
    """All batches of a problem in memory, the plan by which they were captured, and about how many bytes they are."""

    def __init__(self, batches: Iterable[Captured], plan: batch_capture.Plan, num_bytes: int) -> None:
        super().__init__(batches)
        self.plan = plan
        self.num_bytes = num_bytes


class Captures:
    """Features and errors of every use of a parameter in a problem, batch by batch, for scalars of its outputs.

    Examples may lie in the first or second dimension of a batch. Where values may choose how they lie (indices,
    batches that are not pairs (x, y)) this is checked on every batch; a batch in which they lie otherwise is taken
    example by example. Where rows belong to no single examples, as the nodes of a graph, a batch is one example.

    Args:
        problem: whose parameters and data.
        weigh: of outputs and targets, the scalars of each row as cotangents (n, C, m).
        joint: scalars belong to examples, and not to each of their rows.
        shared: what is held is that of `captures_of`.

    Cost: a forward and m backward passes without weight gradients each time that the data are gone through, and
    two more where that is checked; a row that belongs to no example takes m passes over its batch by itself.
    """

    samples = 0  # scalars of each example that are drawn

    def __init__(self, problem: Problem, weigh: Weigh, *, joint: bool = False, shared: bool = False) -> None:
        refuse_one_output(problem)
        self.problem = problem
        self.weigh = weigh
        self.joint = joint
        self.shared = shared
        self.plan = plan_of(problem)  # how uses and examples lie
        self.held: list[Captured] = []  # all batches, if they were brought into memory
        self.limit = share(problem.memory, "factors")  # bytes that may be held
        self.bytes_by_layer: dict[str, int] = {}  # of all the data, estimated when they are to be held

    def hold(self) -> bool:
        """Bring features and errors into memory, or take those that are there; False if they do not fit."""
        if not self.held:
            self.held = self._found() or self._brought()
        return bool(self.held)

    def release(self) -> None:
        """Hold them no longer; those that are shared stay for as long as another holds them or there is room."""
        self.held = []

    def _found(self) -> list[Captured]:
        """What is there of the same problem; nothing if it is more than may be held."""
        self.problem.fixed_batches()  # of which nothing was edited since
        found = next((known() for known in _held_of(self.problem) if self.shared), None)
        # what one process still holds another may have let go of
        if self.problem.batches.group.sums(found is None or found.num_bytes > self.limit)[0] or found is None:
            return []
        self.plan = found.plan
        return found

    def _brought(self) -> list[Captured]:
        """Captured and shared; nothing if they do not fit."""
        captured, first = self.captured(), []
        if not self.bytes_by_layer:
            first = [next(captured)]
            self._estimate(*first)
        num_bytes = sum(self.bytes_by_layer.values())
        if num_bytes > self.limit:
            return []
        try:
            batches = [*first, *captured]
        except IrregularError:
            batches = _again(self.captured)
        held = Held(batches, self.plan, num_bytes)
        if self.shared:
            _held_of(self.problem)[:] = [weakref.ref(held)]
            products_of(self.problem).allowance.leave(held, num_bytes)
        return held

    def batches(self) -> Iterator[Captured]:
        """Each batch: held, or captured one at a time."""
        if self.plan.by_value:
            self.hold()  # what was taken can be taken again
        yield from self.held or self._found() or self.captured()

    def shares(self) -> Iterator[Captured]:
        """Batches of this process's share, of which sums are made that are then added up; of one process, all.

        What is held is dealt out; else each process captures its own, and none is sent to the others.
        """
        group = self.problem.batches.group
        if group.size == 1 or self.plan.by_value:
            yield from self._dealt(list(self.batches()) if group.size > 1 else self.batches())
            return
        if found := self.held or self._found():
            yield from self._dealt(found)
            return
        mine, first, pieces = self.problem.fixed_batches().mine(), list[Any](), list[Captured]()
        first += (batch for _, batch in itertools.islice(mine, 1))
        irregular = True
        while irregular:  # all go by one plan
            names: frozenset[str] = frozenset()
            with group.summing():
                try:
                    pieces = [piece for batch in first for piece in self._captured(batch)]
                except IrregularError as error:
                    names = error.names
            irregular = bool(every := frozenset().union(*group.every(names)))
            self.plan = self.plan.without(every)
        yield from pieces
        for _, batch in mine:
            yield from self._captured(batch)

    def _dealt(self, every: Iterable[Captured]) -> Iterator[Captured]:
        """This process's share of what all have."""
        group = self.problem.batches.group
        return itertools.islice(every, group.rank, None, group.size)

    def by_layer(self, without: Container[str] = ()) -> Iterator[tuple[str, list[list[Use]]]]:
        """Each layer's uses, one list a batch: held, or captured for as many layers at a time as fit memory.

        Some layers may be left out; if all are nothing is captured.
        """
        if all(layer in without for layer in self.problem.layers):
            return
        self.hold()
        for group in self._groups():
            layers = [layer for layer in group if layer not in without]
            if not layers:
                continue
            names = frozenset(name for name in self.problem.parameter_names if layer_of(name) in layers)
            batches = [batch.uses for batch in self.held or _again(functools.partial(self.captured, names))]
            for layer in layers:
                mine = [[use for use in uses if layer_of(use.slice.name) == layer] for uses in batches]
                if mine[0]:
                    yield layer, mine

    def _estimate(self, first: Captured) -> None:
        scale = self.problem.num_examples / max(1, int((first.weights > 0).sum()))
        self.bytes_by_layer = dict.fromkeys(self.problem.layers, 0)
        for use in first.uses:
            self.bytes_by_layer[layer_of(use.slice.name)] += int(scale * use.num_bytes)

    def features(self) -> Iterable[Captured]:
        """Batches of which features count, and may be all there is. Cost: a forward pass unless they are there."""
        found = self.held or self._found()
        if found:
            return found

        def every() -> Iterator[Captured]:
            names = frozenset(self.problem.parameters) - self.plan.alone
            return self.captured(names, lambda z, _: z.new_empty(len(z), z[:1].numel(), 0))

        return _again(every) if self.plan.by_value else every()

    def captured(self, names: frozenset[str] | None = None, weigh: Weigh | None = None) -> Iterator[Captured]:
        """Batches with uses of the named parameters, one at a time, for other scalars if so told.

        Raises:
            IrregularError: a batch after the first uses parameters otherwise; the plan then sets these alone.
        """
        begun, capture = False, functools.partial(self._captured, names=names, weigh=weigh)
        while True:
            try:
                for pieces in self.problem.fixed_batches().mapped(capture):
                    begun = True
                    yield from pieces
                return
            except IrregularError as found:
                self.plan = self.plan.without(found.names)
                if begun:
                    raise

    def _captured(
        self, batch: Any, names: frozenset[str] | None = None, weigh: Weigh | None = None
    ) -> list[Captured]:
        with refusing(), differentiable():
            return self._pieces(batch, names, weigh or self.weigh)

    def _pieces(self, batch: Any, names: frozenset[str] | None, weigh: Weigh) -> list[Captured]:
        graph, loss = batch_capture.Graph(self.problem, batch, self.plan.alone), self.problem.loss_function
        measure = loss.curvature_weights if isinstance(loss, CrossEntropy) else loss.weights
        weights = measure(graph.values, graph.targets)
        scalars = batch_capture.Scalars(weigh(graph.values, graph.targets), self.joint)
        pieces = [
            (piece.uses, piece.rows.to(weights.device))
            for piece in batch_capture.capture(graph, self.plan, scalars, names)
        ]
        return [Captured(uses, weights[rows], graph.targets[rows]) for uses, rows in pieces]

    def _groups(self) -> list[list[str]]:
        """Layers whose features and errors fit memory together, in order."""
        if self.held:
            return [list(self.problem.layers)]
        groups: list[list[str]] = []
        used = self.limit + 1
        for layer, size in self.bytes_by_layer.items():
            instead = "Raise memory, of which that is a third, or take fewer examples."
            refuse_beyond(size, self.limit, f"features and errors of layer {layer!r} take about", instead)
            if used + size > self.limit:
                groups.append([])
                used = 0
            groups[-1].append(layer)
            used += size
        return groups


def captures_of(problem: Problem) -> Captures:
    """Features and errors of scalars whose squared gradients sum to G: C − 1 a row for cross-entropy, else C.

    The scalars of a row are the columns of a root of its loss curvature. What one of them holds serves all others of
    the same problem, and stays after the last for as long as graphs leave room in half of the problem's memory.
    """
    return Captures(problem, functools.partial(_root, problem), shared=True)


def _root(problem: Problem, outputs: Tensor, targets: Tensor) -> Tensor:
    """Cotangents (n, C, m) of the scalars that make G."""
    return curvature_root(problem.loss_function, outputs, targets, problem.total_weight).to(outputs)


@per_problem
def _held_of(problem: Problem) -> list[weakref.ref[Held]]:
    """What is held of a problem, if anything is, known weakly."""
    return []


@per_problem
def plan_of(problem: Problem) -> batch_capture.Plan:
    """How to capture a problem's gradients, learned once and kept with it.

    Learned in float64, or in the problem's own type where the network runs in no other.
    """
    problem.refuse_interacting_rows()
    with refusing():
        try:
            return capture_plan.learned(small_problem(problem, SAMPLE_ROWS, torch.float64))
        except FAILURES:
            if problem.dtype == torch.float64:
                raise
            return capture_plan.learned(small_problem(problem, SAMPLE_ROWS, problem.dtype))


def rows_an_example(problem: Problem) -> int:
    """R, rows of an example of the first batch; all of the batch's where these belong to no single examples."""
    outputs, _ = next(problem.row_batches())
    rows = plan_of(problem).rows(next(iter(problem.batches)), len(outputs))
    return len(outputs) if rows is None else rows.shape[1]


def _again(capture: Callable[[], Iterable[Captured]]) -> list[Captured]:
    """All batches, taken anew for as long as a batch changes the plan."""
    while True:
        with contextlib.suppress(IrregularError):
            return list(capture())


@contextlib.contextmanager
def refusing() -> Iterator[None]:
    """A network that fails when it is watched, or when its examples pass alone, cannot be taken apart this way."""
    try:
        yield
    except DeepSpectraError:
        raise
    except torch.OutOfMemoryError as failure:
        raise MemoryBudgetError(f"features and errors of a batch ran out of memory: {failure}") from failure
    except FAILURES as failure:
        reason = first_line(failure)
        raise CurvatureError(
            f"features and errors of this network cannot be told apart by example ({reason})."
        ) from failure


def parameters_of(problem: Problem, layer: str) -> dict[str, Tensor]:
    """The selected parameters that a layer owns, by name."""
    return {name: value for name, value in problem.parameters.items() if layer_of(name) == layer}


def num_parameters_of(problem: Problem, layer: str) -> int:
    """How many numbers these are."""
    return sum(value.numel() for value in parameters_of(problem, layer).values())


def layer_of(name: str) -> str:
    """The module that owns a parameter."""
    return name.rpartition(".")[0]

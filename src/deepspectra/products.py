"""How curvature acts on vectors: the fastest right way of differentiating, its graphs kept while they fit.

Each batch contributes through a *graph* built once at the problem's parameters. Kept graphs cost memory and
save the primal passes; batches whose graphs do not fit are rebuilt once for a whole block of vectors. The way
is chosen by measuring on one batch, after each candidate was checked against symmetry and a finite difference.
"""

from __future__ import annotations

import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from deepspectra.errors import CurvatureError, MemoryBudgetError
from deepspectra.problem import Problem, differentiable

Tree = dict[str, Tensor]
EXPECTED_PRODUCTS = 40  # over which the cost of building a kept graph is spread when ways are compared
BLOCK_BYTES = (2**30, 2**25)  # graph bytes times columns that go through a graph together: GPU, CPU
WORTH_TRACING = 10.0  # seconds that the expected products must take before linearising is tried
CHECK_ROWS = 4  # rows on which a way is checked, in float64
CHECK_TOLERANCE = 1e-5  # relative; right ways reach 1e-9, wrong ones were seen from 2e-4 to .2


# -- ways of differentiating a scalar function twice ---------------------------------------------------------


class Way(Protocol):
    """A graph of v ↦ (∂²s/∂θ²) v for a scalar function s of the parameters."""

    def __init__(self, function: Callable[[Tree], Tensor], parameters: Tree) -> None: ...

    def __call__(self, tangent: list[Tensor], *, batched: bool = False) -> list[Tensor]:
        """The product, one tensor a parameter; with `batched`, of K tangents stacked in front."""
        ...


class DoubleBackward:
    """Backward through the backward pass, whose graph is retained (Pearlmutter 1994)."""

    name = "double backward"

    def __init__(self, function: Callable[[Tree], Tensor], parameters: Tree) -> None:
        leaves = {name: value.detach().requires_grad_() for name, value in parameters.items()}
        self.leaves = list(leaves.values())
        with torch.enable_grad(), differentiable():
            value = function(leaves)
            gradient = torch.autograd.grad(value, self.leaves, create_graph=True, allow_unused=True)
        live = [(j, g) for j, g in enumerate(gradient) if g is not None and g.requires_grad]
        self.index = [j for j, _ in live]
        self.gradient = [g for _, g in live]

    def __call__(self, tangent: list[Tensor], *, batched: bool = False) -> list[Tensor]:
        """The product, one tensor a parameter; with `batched`, of K tangents stacked in front."""
        if not self.gradient:
            return [torch.zeros_like(part) for part in tangent]
        with differentiable():
            return list(
                torch.autograd.grad(
                    self.gradient,
                    self.leaves,
                    [tangent[j] for j in self.index],
                    retain_graph=True,
                    materialize_grads=True,
                    is_grads_batched=batched,
                )
            )


class Linearized:
    """Forward over reverse: the gradient linearised once, its tangent map evaluated per vector."""

    name = "linearize"

    def __init__(self, function: Callable[[Tree], Tensor], parameters: Tree) -> None:
        self.names = list(parameters)
        with warnings.catch_warnings(), differentiable():
            warnings.simplefilter("ignore")  # the tracer warns about its own bookkeeping
            _, self.linear = torch.func.linearize(torch.func.grad(function), parameters)

    def __call__(self, tangent: list[Tensor], *, batched: bool = False) -> list[Tensor]:
        """The product, one tensor a parameter; with `batched`, of K tangents stacked in front."""
        linear = torch.func.vmap(self.linear) if batched else self.linear
        product = linear(dict(zip(self.names, tangent, strict=True)))
        return [product[name] for name in self.names]


WAYS: tuple[type[DoubleBackward] | type[Linearized], ...] = (DoubleBackward, Linearized)


# -- the Jacobian of the outputs -----------------------------------------------------------------------------


class Forward:
    """Outputs of one batch with their graph: outputs, targets and u ↦ Jᵀ u."""

    def __init__(self, problem: Problem, batch: Any) -> None:
        leaves = {name: value.detach().requires_grad_() for name, value in problem.parameters.items()}
        self.names, self.leaves = list(leaves), list(leaves.values())
        with torch.enable_grad(), differentiable():
            self.graph, self.targets = problem.evaluate(leaves, batch)
        self.outputs = self.graph.detach()

    def pull(self, cotangent: Tensor, *, batched: bool = False) -> list[Tensor]:
        """Jᵀ u, one tensor a parameter; with `batched`, of K cotangents stacked in front."""
        if not self.graph.requires_grad:
            lead = cotangent.shape[:1] if batched else ()
            return [leaf.new_zeros((*lead, *leaf.shape)) for leaf in self.leaves]
        with differentiable():
            return list(
                torch.autograd.grad(
                    self.graph,
                    self.leaves,
                    cotangent,
                    retain_graph=True,
                    materialize_grads=True,
                    is_grads_batched=batched,
                )
            )


class Jacobian(Forward):
    """J = ∂z/∂θ of one batch: v ↦ J v beside u ↦ Jᵀ u."""

    def __init__(self, problem: Problem, batch: Any, *, linearize: bool) -> None:
        super().__init__(problem, batch)
        self._linear: Callable[[Tree], Tensor] | None = None
        self._transposed: list[tuple[int, Tensor]] = []
        if linearize:
            with warnings.catch_warnings(), differentiable():
                warnings.simplefilter("ignore")
                _, self._linear = torch.func.linearize(
                    lambda p: problem.evaluate(p, batch)[0], problem.parameters
                )
        elif self.graph.requires_grad:
            # J v as the derivative of the linear map u ↦ Jᵀ u, by reverse mode alone
            self._dummy = torch.zeros_like(self.outputs, requires_grad=True)
            with torch.enable_grad(), differentiable():
                parts = torch.autograd.grad(
                    self.graph, self.leaves, self._dummy, create_graph=True, allow_unused=True
                )
            self._transposed = [(j, part) for j, part in enumerate(parts) if part is not None]

    def push(self, tangent: list[Tensor], *, batched: bool = False) -> Tensor:
        """J v, of the outputs' shape; with `batched`, of K tangents stacked in front."""
        if self._linear is not None:
            linear = torch.func.vmap(self._linear) if batched else self._linear
            return linear(dict(zip(self.names, tangent, strict=True)))
        if not self._transposed:
            lead = tangent[0].shape[:1] if batched else ()
            return self.outputs.new_zeros((*lead, *self.outputs.shape))
        (product,) = torch.autograd.grad(
            [part for _, part in self._transposed],
            self._dummy,
            [tangent[j] for j, _ in self._transposed],
            retain_graph=True,
            is_grads_batched=batched,
        )
        return product


# -- products over all batches -------------------------------------------------------------------------------


@dataclass
class Store:
    """Graphs of one kind: which batches' are kept, and the bytes of one."""

    kept: dict[int, Any]
    bytes_each: int | None = None


class Products:
    """Sums over batches of H v, R v, J v and Jᵀ u, for one problem.

    None of them is divided by the total weight: callers divide once. Blocks are (P, K).
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.budget = problem.memory // 2
        self.reserved = 0
        self.stores: dict[str, Store] = {}
        self.sizes = [value.numel() for value in problem.parameters.values()]
        self.shapes = [value.shape for value in problem.parameters.values()]
        self._way: type[DoubleBackward] | type[Linearized] | None = None
        self._linearize: bool | None = None
        self.notes: dict[str, str] = {}
        self.faults: list[str] = []

    # blocks and vectors

    def _split(self, rows: Tensor) -> list[Tensor]:
        """Views of rows (K, P) or a vector (P,), one a parameter."""
        lead = rows.shape[:-1]
        return [part.view(*lead, *s) for part, s in zip(rows.split(self.sizes, -1), self.shapes, strict=True)]

    def _rows(self, block: Tensor) -> Tensor:
        return block.T.to(self.problem.dtype).contiguous()

    def _chunks(self, num_columns: int, graph_bytes: int) -> Iterator[slice]:
        """Columns that go through a graph together: many through a small graph, one through a large one.

        Together they cost little more than one as long as overhead dominates, and only then: on a CPU large
        blocks lose more to memory traffic than they save.
        """
        width = max(1, min(64, BLOCK_BYTES[self.problem.device.type == "cpu"] // max(1, graph_bytes)))
        for start in range(0, num_columns, width):
            yield slice(start, min(start + width, num_columns))

    def _through(self, total: Tensor, rows: Tensor, size: int, apply: Callable[..., list[Tensor]]) -> None:
        """Add apply(rows) to total, both (K, ·), in chunks of columns."""
        for chunk in self._chunks(len(rows), size):
            if chunk.stop - chunk.start == 1:
                _add(self._split(total[chunk.start]), apply(rows[chunk.start], batched=False))
            else:
                _add(self._split(total[chunk]), apply(rows[chunk], batched=True))

    def zeros(self, num_columns: int) -> Tensor:
        """(K, P) zeros to sum into, in at least float32."""
        dtype = torch.promote_types(self.problem.dtype, torch.float32)
        return torch.zeros(num_columns, sum(self.sizes), dtype=dtype, device=self.problem.device)

    # the graphs

    def _graphs(self, kind: str, build: Callable[[Any], Any]) -> Iterator[tuple[int, Any]]:
        """Each batch's graph: kept, or built now and kept if it fits."""
        store = self.stores.setdefault(kind, Store({}))
        for index, batch in enumerate(self.problem.batches):
            if index in store.kept:
                yield index, store.kept[index]
                continue
            if store.bytes_each is None:
                graph, store.bytes_each = _measured(lambda batch=batch: build(batch))
                self._refuse_beyond_memory(store.bytes_each)
            else:
                graph = build(batch)
            if self.kept_bytes() + self.reserved + store.bytes_each <= self.budget:
                store.kept[index] = graph
            yield index, graph

    def kept_bytes(self) -> int:
        """Bytes of all kept graphs, by the measured size of one of each kind."""
        return sum(len(store.kept) * (store.bytes_each or 0) for store in self.stores.values())

    def release(self) -> None:
        """Drop every kept graph, to make room for another kind."""
        for store in self.stores.values():
            store.kept.clear()

    def reserve(self, size: int) -> bool:
        """Set aside bytes of the graphs' budget for something else; False if they are not there."""
        if self.reserved + size > self.budget:
            return False
        self.reserved += size
        if self.kept_bytes() + self.reserved > self.budget:
            self.release()
        return True

    def _refuse_beyond_memory(self, size: int) -> None:
        if size > self.problem.memory:
            raise MemoryBudgetError(
                f"the graph of one batch takes {size / 2**30:.2f} GiB and memory is "
                f"{self.problem.memory / 2**30:.2f} GiB. Lower batch_size, or raise memory."
            )

    # second derivatives of scalars

    def hessian(self, block: Tensor) -> Tensor:
        """Σ_i ω_i ∂²ℓ_i/∂θ² applied to a block."""
        return self._second("hessian", self._loss_of, block)

    def residual(self, block: Tensor) -> Tensor:
        """Σ_i Σ_k ω_i (∂ℓ_i/∂z_k) ∂²z_{ik}/∂θ² applied to a block."""
        return self._second("residual", self._residual_of, block)

    def _second(self, kind: str, scalar: Callable[[Any], Callable[[Tree], Tensor]], block: Tensor) -> Tensor:
        way = self.way()
        total = self.zeros(block.shape[1])
        rows = self._rows(block)
        for _, graph in self._graphs(kind, lambda batch: way(scalar(batch), self.problem.parameters)):
            self._through(
                total, rows, self._size(kind), lambda r, batched: graph(self._split(r), batched=batched)
            )
        return total.T

    def _size(self, kind: str) -> int:
        return self.stores[kind].bytes_each or 0

    def _loss_of(self, batch: Any) -> Callable[[Tree], Tensor]:
        return lambda parameters: self.problem.loss_function.total(*self.problem.evaluate(parameters, batch))

    def _residual_of(self, batch: Any) -> Callable[[Tree], Tensor]:
        with torch.no_grad(), differentiable():
            outputs, targets = self.problem.evaluate(self.problem.parameters, batch)
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
        for chunk in self._chunks(len(rows), self._size("jacobian")):
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
        self._through(total, rows, self._size("jacobian"), jacobian.pull)

    def sandwich(self, middle: Callable[[Tensor, Tensor, Tensor], Tensor], block: Tensor) -> Tensor:
        """Jᵀ B J V with B given by middle(outputs, targets, tangents), in one pass over the data."""
        total = self.zeros(block.shape[1])
        rows = self._rows(block)
        for _, jacobian in self.jacobians():
            pushed = self._push(jacobian, rows)
            bent = [middle(jacobian.outputs, jacobian.targets, tangent) for tangent in pushed]
            self._pull(total, jacobian, torch.stack(bent))
        return total.T

    def pull_each(self, cotangent: Callable[[Tensor, Tensor], Tensor], num_columns: int) -> Tensor:
        """Jᵀ U with U (n, C, K) = cotangent(outputs, targets) a batch, each batch of one class: (P, K).

        For one pass: no graph is kept, and columns that are zero on a batch cost nothing there.
        """
        total = self.zeros(num_columns)
        store = self.stores.setdefault("forward", Store({}))
        for batch in self.problem.class_batches():
            graph, size = _measured(lambda batch=batch: Forward(self.problem, batch))
            store.bytes_each = max(size, store.bytes_each or 0)
            rows = cotangent(graph.outputs, graph.targets).movedim(-1, 0)
            (live,) = rows.flatten(1).any(1).nonzero(as_tuple=True)
            part = self.zeros(len(live))
            self._through(part, rows[live].to(graph.outputs.dtype), store.bytes_each, graph.pull)
            total.index_add_(0, live, part)
        return total.T

    # the choice

    def way(self) -> type[DoubleBackward] | type[Linearized]:
        """The fastest way that is right for this network.

        Double backward is tried first. Linearising costs seconds of tracing, so it is tried only where the
        products of a usual analysis would take longer, or where double backward is not right.
        """
        if self._way is None:
            right = [DoubleBackward] if self._is_right(DoubleBackward) else []
            timing = self._time(DoubleBackward) if right else None
            if timing is None or timing * self.problem.batches.num_batches * EXPECTED_PRODUCTS > WORTH_TRACING:
                right += [Linearized] if self._is_right(Linearized) else []
            if not right:
                raise CurvatureError(
                    "no way of differentiating this network twice is right: " + "; ".join(self.faults) + ". "
                    "Replace operations without a second derivative (custom autograd functions, fused "
                    "kernels), or use GaussNewton, which needs first derivatives only."
                )
            self._way = min(right, key=self._time) if len(right) > 1 else right[0]
            self.notes["way"] = self._way.name
            self.notes["check"] = "; ".join(self.faults) or "symmetric, and agrees with finite differences"
        return self._way

    def _is_right(self, way: type[DoubleBackward] | type[Linearized]) -> bool:
        """Whether a way works here and passes its check; if not, `faults` says why."""
        try:
            error = curvature_error(self._sample(), way)
        except (RuntimeError, NotImplementedError, TypeError, ValueError) as failure:
            self.faults.append(f"{way.name} failed ({str(failure).splitlines()[0]})")
            return False
        if error > CHECK_TOLERANCE:
            self.faults.append(f"{way.name} is wrong by {error:.1%} (symmetry or finite difference)")
        return error <= CHECK_TOLERANCE

    def _sample(self) -> Problem:
        return self.problem.sample(CHECK_ROWS, torch.float64)

    def _time(self, way: type[DoubleBackward] | type[Linearized]) -> float:
        """Seconds of one product with one batch, and its share of the building."""
        batch = next(iter(self.problem.batches))
        tangent = list(self.problem.parameters.values())
        way(self._loss_of(batch), self.problem.parameters)(tangent)  # warm up
        start = time.perf_counter()
        graph, size = _measured(lambda: way(self._loss_of(batch), self.problem.parameters))
        built = time.perf_counter()
        graph(tangent)
        product = time.perf_counter() - built
        fits = size * self.problem.batches.num_batches <= self.budget
        seconds = product + (built - start) / (EXPECTED_PRODUCTS if fits else 1)
        self.notes[f"seconds a batch, {way.name}"] = f"{seconds:.4f}"
        return seconds

    def linearize(self) -> bool:
        """Whether J v goes by the linearised forward pass, which is faster, or by reverse mode alone."""
        if self._linearize is None:
            batch = next(iter(self.problem.batches))
            if jacobian_error(self._sample(), linearize=False) > CHECK_TOLERANCE:
                raise CurvatureError(
                    "the first derivatives of this network disagree with finite differences; is a custom "
                    "backward pass wrong?"
                )
            start = time.perf_counter()
            jacobian = Jacobian(self.problem, batch, linearize=False)
            jacobian.pull(jacobian.push(list(self.problem.parameters.values())))
            seconds = (time.perf_counter() - start) * self.problem.batches.num_batches * EXPECTED_PRODUCTS
            self._linearize = seconds > WORTH_TRACING and self._linearizes()
            self.notes["jacobian"] = "linearize" if self._linearize else "double backward"
        return self._linearize

    def _linearizes(self) -> bool:
        try:
            return jacobian_error(self._sample(), linearize=True) <= CHECK_TOLERANCE
        except (RuntimeError, NotImplementedError, TypeError, ValueError):
            return False


_PRODUCTS: weakref.WeakKeyDictionary[Problem, Products] = weakref.WeakKeyDictionary()


def products_of(problem: Problem) -> Products:
    """The products of a problem, one object shared by all its operators."""
    if problem not in _PRODUCTS:
        _PRODUCTS[problem] = Products(problem)
    return _PRODUCTS[problem]


def _add(total: list[Tensor], parts: list[Tensor]) -> None:
    for into, part in zip(total, parts, strict=True):
        into.add_(part)


# -- checks --------------------------------------------------------------------------------------------------


def curvature_error(sample: Problem, way: type[DoubleBackward] | type[Linearized]) -> float:
    """Relative error of a way on a small float64 problem: its symmetry, and against differences of gradients.

    The point is moved a little at random, away from kinks that sit exactly at it (a zero bias before a ReLU);
    of three step sizes the best counts, for the same reason.
    """
    generator = torch.Generator().manual_seed(0)
    base = {name: value + 1e-3 * _noise(value, generator) for name, value in sample.parameters.items()}
    batch = next(iter(sample.batches))

    def value(parameters: Tree) -> Tensor:
        return sample.loss_function.total(*sample.evaluate(parameters, batch))

    graph = way(value, base)
    u, v = ({name: _noise(value, generator) for name, value in base.items()} for _ in range(2))
    hu, hv = graph(list(u.values())), graph(list(v.values()))
    scale = _norm(hu) * _norm(list(v.values())) + _norm(hv) * _norm(list(u.values()))
    asymmetry = abs(_dot(list(u.values()), hv) - _dot(list(v.values()), hu)) / scale if scale else 0.0

    def gradient(step: float) -> list[Tensor]:
        leaves = {n: (p + step * v[n]).detach().requires_grad_() for n, p in base.items()}
        with torch.enable_grad(), differentiable():
            return list(torch.autograd.grad(value(leaves), list(leaves.values()), materialize_grads=True))

    floor = 1e-9 * _norm(gradient(0.0))
    errors = []
    for step in (1e-4, 1e-5, 1e-6):
        difference = [(a - b) / (2 * step) for a, b in zip(gradient(step), gradient(-step), strict=True)]
        gap = _norm([d - h for d, h in zip(difference, hv, strict=True)])
        errors.append(gap / (_norm(hv) + floor / step + 1e-300))
    return max(min(errors), asymmetry * 10)


def jacobian_error(sample: Problem, *, linearize: bool) -> float:
    """Relative error of J v against differences of outputs, and of ⟨u, J v⟩ = ⟨Jᵀu, v⟩."""
    generator = torch.Generator().manual_seed(0)
    batch = next(iter(sample.batches))
    jacobian = Jacobian(sample, batch, linearize=linearize)
    v = {name: _noise(value, generator) for name, value in sample.parameters.items()}
    pushed = jacobian.push(list(v.values()))
    u = torch.randn(pushed.shape, generator=generator, dtype=torch.float64).to(pushed)
    left, right = float((u * pushed).sum()), _dot(jacobian.pull(u), list(v.values()))
    scale = float(u.norm() * pushed.norm()) + 1e-300
    errors = []
    for step in (1e-4, 1e-5, 1e-6):
        with torch.no_grad(), differentiable():
            ahead, behind = (
                sample.evaluate({n: p + s * v[n] for n, p in sample.parameters.items()}, batch)[0]
                for s in (step, -step)
            )
        gap = float(((ahead - behind) / (2 * step) - pushed).norm())
        errors.append(gap / (float(pushed.norm()) + 1e-9 * float(jacobian.outputs.norm()) / step + 1e-300))
    return max(min(errors), abs(left - right) / scale)


def _noise(value: Tensor, generator: torch.Generator) -> Tensor:
    """A random direction of the size of the parameter, so that every layer is tried at its own scale."""
    noise = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value)
    size = float(value.norm()) / max(1, value.numel()) ** 0.5
    return noise * (size if size > 0 else 0.1)


def _dot(a: list[Tensor], b: list[Tensor]) -> float:
    return sum(float((x * y).sum()) for x, y in zip(a, b, strict=True))


def _norm(a: list[Tensor]) -> float:
    return _dot(a, a) ** 0.5


class _Storages(TorchDispatchMode):
    """Remembers the storages that operations create, without keeping them alive."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(leaf, Tensor) and type(leaf) is Tensor:
                storage = leaf.untyped_storage()
                self.seen[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def alive(self) -> int:
        """Bytes of those that are still referred to."""
        return sum(size for reference, size in self.seen.values() if not reference.expired())


def _measured(build: Callable[[], Any]) -> tuple[Any, int]:
    """A graph and the bytes it keeps alive."""
    with _Storages() as storages:
        graph = build()
    return graph, storages.alive()

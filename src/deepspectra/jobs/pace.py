"""How long the steps of a job take and what they keep, measured on one batch of a problem."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from deepspectra.derivatives.products import products_of
from deepspectra.kfac.exact_blocks import places
from deepspectra.operators.curvature import Curvature, GaussNewton, Hessian, HessianBlock, Residual
from deepspectra.problem.batch_trees import length
from deepspectra.problem.cross_entropy import CrossEntropy
from deepspectra.problem.example_subsets import first_batch, limited
from deepspectra.problem.memory_budget import refuse_beyond, share
from deepspectra.problem.problem import Problem
from deepspectra.rows.captures import captures_of, num_parameters_of, parameters_of
from deepspectra.rows.features_and_errors import layer_errors, layer_inputs
from deepspectra.rows.held_rows import gram_of

OPERATORS: dict[str, Callable[[Problem], Curvature]] = {
    "hessian": Hessian,
    "residual": Residual,
    "gauss_newton": GaussNewton,
}
LONG = 2.0  # seconds of a graph and a product, from which they are measured once
TIMES, ENOUGH = 5, 0.3  # as often is a step timed, unless it takes longer together, in seconds
ROWS = 200  # of gradients, whose inner products are timed
CAPTURED = 2**26  # bytes of their errors at the outputs, beyond which they are fewer
BASIS_BYTES = 2**25  # of vectors, beyond what a cache holds, by which orthogonalising is timed
BENT = 1e-4  # ‖R v‖/‖H v‖ of a layer's blocks, from which that of R is not zero
CUBE_ROWS = 600  # of a dense matrix, whose eigenvalues and vectors are timed


class Stage(NamedTuple):
    """A stage of a job.

    Attributes:
        name: as the job calls it.
        products: with single vectors.
        seconds: that it takes.
        num_bytes: that it holds at most, beside model and data, and what earlier stages found.
        limit: of them, beyond which the job refuses; ∞ where it does with less.
        most: examples with which it would fit, where it is they that do not.
        step: what the job's progress calls it, if it does: a layer, all of them, or products.
        of: what kind of rows it looks at, if there are several.
        grows: power of the number of examples with which its seconds grow, at least.
        host_bytes: of a basis, beside, in the host's memory, where an accelerator has no room for it.
        beside: bytes of what earlier stages found, which stay.
        slow_products, slow_seconds, slow_bytes: the products, seconds and bytes (with those beside) of a spectrum
            without gaps, where a search for eigenpairs gives up; 0 where they are the same.
    """

    name: str
    products: int
    seconds: float
    num_bytes: float
    limit: float = math.inf
    most: float = math.inf
    step: str | None = None
    of: str = ""
    grows: int = 1
    host_bytes: float = 0.0
    beside: float = 0.0
    slow_products: int = 0
    slow_seconds: float = 0.0
    slow_bytes: float = 0.0

    @property
    def whole_bytes(self) -> float:
        """Of all that is held then, beside model and data."""
        return self.num_bytes + self.beside

    @property
    def products_at_most(self) -> int:
        """Where the spectrum has no gaps."""
        return max(self.products, self.slow_products)

    @property
    def seconds_at_most(self) -> float:
        """The same."""
        return max(self.seconds, self.slow_seconds)

    @property
    def bytes_at_most(self) -> float:
        """Of all that is held then."""
        return max(self.whole_bytes, self.slow_bytes)

    def slower(self, other: Stage) -> Stage:
        """This one, which at most is the other."""
        return self._replace(slow_products=other.products, slow_seconds=other.seconds, slow_bytes=other.whole_bytes)

    @property
    def fits(self) -> bool:
        """Whether the job will not refuse."""
        return self.num_bytes <= self.limit


class Layer(NamedTuple):
    """What one layer's features and errors take.

    Attributes:
        size: parameters.
        num_bytes: of features and errors of all the data.
        pair: seconds of the inner product of two gradients.
        features, errors: bytes of whole inputs, and of errors at whole outputs, as rows of matrices; 0 without.
    """

    size: int
    num_bytes: float
    pair: float
    features: float = 0.0
    errors: float = 0.0

    def has(self, kind: str) -> bool:
        """Whether there are rows of a kind: "features" | "errors" | "gradients"; of "hessian" no layer has."""
        return {"features": self.features > 0, "errors": self.errors > 0, "gradients": True}.get(kind, False)


class Rows(NamedTuple):
    """What the rows of gradients take: R = N (C − 1) of them.

    Attributes:
        seconds: of features and errors of all layers, once, of all the data.
        layers: by name.
    """

    seconds: float
    layers: dict[str, Layer]

    @property
    def num_bytes(self) -> float:
        """Of all layers."""
        return sum(layer.num_bytes for layer in self.layers.values())

    @property
    def pair(self) -> float:
        """Seconds of the inner product of two gradients to all parameters."""
        return sum(layer.pair for layer in self.layers.values())


class Pace:
    """Seconds and bytes of a problem's steps, each measured when it is first asked for.

    A process that computes with one thread of a CPU times itself in its own seconds, which other programs do not
    lengthen much; others go by the clock. What is measured with one batch is taken to be the same with each.

    Args:
        problem: with the ways of differentiating that were found right for it, or that are found now.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem, self.one = problem, first_batch(problem)
        self.scale = problem.num_examples / max(1, self.one.num_examples)  # batches as large as that one
        self.mine = self.scale / problem.batches.group.size  # of them, that one process goes through
        self._operators: dict[str, Curvature] = {}
        self._seconds: dict[tuple[str, int], float] = {}
        self._builds: dict[str, tuple[float, int]] = {}

    @functools.cached_property
    def gradient(self) -> float:
        """Seconds of a gradient of all the data."""
        return self.mine * self.timed(self.one.gradient)

    @property
    def vector(self) -> int:
        """Bytes of a vector of length P."""
        return self.problem.num_parameters * self._dtype.itemsize

    @property
    def row(self) -> int:
        """Bytes of what one process has of a vector of a basis, which all of them share out."""
        return self.problem.batches.group.width(self.problem.num_parameters) * self._dtype.itemsize

    @property
    def held_row(self) -> int:
        """The same of a basis of eigenpairs, in the type that the problem holds it in."""
        return self.row // self._dtype.itemsize * (self.problem.basis or self._dtype).itemsize

    def host_memory(self, kind: str) -> int:
        """Bytes of the host's memory for vectors of a basis that an accelerator has no room for."""
        return self._operator(kind).host_memory()

    def graphs(self, kind: str) -> int:
        """Bytes of the graphs of one kind of all of a process's batches."""
        return int(self.mine * self._built(kind)[1])

    def batch_graph(self, kind: str) -> int:
        """Of the one batch."""
        return self._built(kind)[1]

    def building(self, kind: str) -> float:
        """Seconds of these graphs."""
        return self.mine * self._built(kind)[0]

    def product(self, kind: str, width: int = 1) -> float:
        """Seconds a vector of products with H, R or G of blocks of so many; what does not fit is built each time."""
        build, num_bytes = self._built(kind)
        if (kind, width) not in self._seconds:
            block = self._block(width)
            operator = self._operator(kind)
            self._seconds[kind, width] = self.timed(lambda: operator @ block) / width
        kept = min(1.0, share(self.problem.memory, "graphs") / max(1.0, self.mine * num_bytes))
        again = 0.0 if kept == 1 else (1 - kept) * build / width
        return self.mine * (self._seconds[kind, width] + again)

    @functools.cached_property
    def step(self) -> float:
        """Seconds in which a process multiplies its part of a vector with another and takes that from it."""
        one = self._block(1)[: self.row // self._dtype.itemsize]
        most = min(BASIS_BYTES, share(self.problem.memory, "basis"))
        many = one.new_ones(max(2, min(256, most // self.row)), len(one))
        return self.timed(lambda: one - many.T @ (many @ one)) / len(many)

    @functools.cached_property
    def cube(self) -> float:
        """Seconds of all eigenvalues and vectors of a large dense matrix of float64, over the cube of its rows."""
        return _cube(self.problem.device)

    @property
    def scalars(self) -> int:
        """Gradients a row of the outputs, whose squares sum to G: C − 1 for cross-entropy, else C."""
        return max(1, self.problem.num_classes - isinstance(self.problem.loss_function, CrossEntropy))

    @functools.cached_property
    def positions(self) -> int:
        """Rows of the outputs an example: tokens of a sentence, or 1."""
        batch = next(iter(self.one.fixed_batches()))
        return max(1, len(self.one.values(batch)[0]) // max(1, length(batch)))

    @property
    def row_bytes(self) -> int:
        """Bytes of the errors at the outputs that one row of them brings: of each scalar, at every position."""
        return self.scalars * self.problem.num_classes * max(8, self.positions * self.problem.dtype.itemsize)

    @functools.cached_property
    def few(self) -> Problem:
        """A few examples, whose features and errors are measured.

        Raises:
            MemoryBudgetError: those are by their shape too large.
        """
        limit = share(self.problem.memory, "factors")
        few = max(2, min(ROWS // self.scalars, min(limit, CAPTURED) // self.row_bytes))
        least = self.row_bytes * (max(few, self.positions) if self.one.cuts else self.one.num_examples)
        size = least if least <= CAPTURED else max(least, self.row_bytes * self.problem.num_examples)
        refuse_beyond(size, limit, "errors at the outputs take", "Take fewer classes or positions, or raise memory.")
        some = limited(self.one, few) if self.one.num_examples > few and self.one.cuts else self.one
        products_of(some).inherit(products_of(self.problem))
        return some

    @functools.cached_property
    def rows(self) -> Rows:
        """What features and errors of all layers take, of a few examples.

        Raises:
            CurvatureError: they cannot be told apart by example.
            MemoryBudgetError: by their shape they are too large, or of one example already so large that those of
                all do not fit.
        """
        some = self.few
        captures, began = captures_of(some), self._now()
        captures.hold()
        seconds = self._now() - began
        scale = self.problem.num_examples / max(1, some.num_examples)
        found = {}
        for name, uses in captures.by_layer():
            num_rows = sum(batch[0].num_examples * batch[0].errors.shape[1] for batch in uses)
            num_bytes = scale * sum(use.num_bytes for batch in uses for use in batch)
            spent = self.timed(functools.partial(gram_of, [uses]))
            features, errors = (
                scale * sum(rows.nbytes for batch in uses for rows in of(batch).values())
                for of in (layer_inputs, layer_errors)
            )
            found[name] = Layer(num_parameters_of(some, name), num_bytes, spent / num_rows**2, features, errors)
        return Rows(scale / self.problem.batches.group.size * seconds, found)

    @functools.cached_property
    def factors(self) -> float:
        """Bytes of the Kronecker factors of all layers and their eigenvectors.

        Raises:
            CurvatureError: there are none, as of a weight that is used in different ways.
        """
        sizes = {name: value.numel() for name, value in self.few.parameters.items()}
        every = [
            place.shape
            for _, uses in captures_of(self.few).by_layer()
            for place in places(uses[0], sizes)
            if place.is_matrix
        ]
        return 16.0 * sum(groups * (outputs**2 + inputs**2) for groups, outputs, inputs in every)

    @functools.cached_property
    def bent(self) -> dict[str, float]:
        """Layers in whose parameters the outputs are not linear, so that their block of R is not zero.

        With the seconds of a product with their block of H.
        """
        hessian, found = self._operator("hessian"), {}
        assert isinstance(hessian, Hessian)
        for layer in self.rows.layers:
            names = list(parameters_of(self.problem, layer))
            block = HessianBlock(hessian, names)
            v = torch.randn(block.shape[0], 1, generator=torch.Generator().manual_seed(0)).to(self._block(1))
            (residual,) = Residual(self.one).diagonal_blocks([(names, v)])
            if float(residual.norm()) > BENT * float((block @ v).norm()):
                found[layer] = self.mine * self.timed(functools.partial(block.__matmul__, v))
        return found

    def _operator(self, kind: str) -> Curvature:
        if kind not in self._operators:
            OPERATORS[kind](self.problem)  # finds a way that is right
            products_of(self.one).inherit(products_of(self.problem))
            self._operators[kind] = OPERATORS[kind](self.one)
        return self._operators[kind]

    def _block(self, width: int) -> Tensor:
        generator = torch.Generator().manual_seed(width)
        block = torch.randn(self.problem.num_parameters, width, generator=generator)
        return block.to(self.problem.device, self._dtype)

    @property
    def _dtype(self) -> torch.dtype:
        """Of vectors."""
        return torch.promote_types(self.problem.dtype, torch.float32)

    def _built(self, kind: str) -> tuple[float, int]:
        """Seconds of building the batch's graph, and its bytes."""
        if kind not in self._builds:
            operator, block = self._operator(kind), self._block(1)
            graphs = products_of(self.one).graphs
            for _ in range(2):
                graphs.release()
                began = self._now()
                _ = operator @ block
                first = self._now() - began
                if first > LONG:  # beside which what happens only once, the first time, is little
                    break
            later = self.timed(lambda: operator @ block)
            self._builds[kind] = (
                max(0.0, first - later),
                graphs.largest("jacobian" if kind == "gauss_newton" else kind),
            )
            self._seconds[kind, 1] = later
        return self._builds[kind]

    def timed(self, work: Callable[[], object]) -> float:
        """Seconds of a step: the median of a few, after one that warms up if they are short."""
        found: list[float] = []
        while len(found) < TIMES + 1 and sum(found) < ENOUGH:
            began = self._now()
            work()
            found.append(self._now() - began)
        return statistics.median(found[1:] or found)

    def _now(self) -> float:
        return now(self.problem.device)


def now(device: torch.device) -> float:
    """Seconds, by the process's own clock where it computes with one thread of a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.process_time() if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter()


@functools.cache
def _cube(device: torch.device) -> float:
    matrix = torch.randn(CUBE_ROWS, CUBE_ROWS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix = (matrix + matrix.T).to(device)
    torch.linalg.eigh(matrix)
    began = now(device)
    torch.linalg.eigh(matrix)
    return (now(device) - began) / CUBE_ROWS**3

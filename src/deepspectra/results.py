"""Frozen results: a value, its error, what it cost and where it came from."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Literal, TypeVar, overload

import torch
from torch import Tensor

from deepspectra.errors import MissingNameError, OptionError
from deepspectra.frames import Tabular

if TYPE_CHECKING:
    from deepspectra.operators.base import Operator
    from deepspectra.problem import Problem


@dataclass(frozen=True)
class Cost:
    """What a result cost: products with single vectors, and wall-clock seconds."""

    num_products: int
    seconds: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.num_products + other.num_products, self.seconds + other.seconds)


@dataclass(frozen=True)
class Provenance:
    """Where a result came from."""

    operator: str
    size: int
    dtype: str
    device: str
    seed: int | None
    versions: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def of(operator: Operator, seed: int | None = None) -> Provenance:
        """The provenance of a computation on `operator`."""
        return Provenance._of(operator.name, operator.shape[0], operator, seed)

    @staticmethod
    def of_matrix(
        name: str, problem: Problem, *, size: int | None = None, seed: int | None = None
    ) -> Provenance:
        """The provenance of what is known of a problem's matrix without products with it."""
        return Provenance._of(name, problem.num_parameters if size is None else size, problem, seed)

    @staticmethod
    def of_rows(name: str, rows: Tensor, seed: int | None = None) -> Provenance:
        """The provenance of a computation on rows (..., D)."""
        return Provenance._of(name, rows.shape[-1], rows, seed)

    @staticmethod
    def _of(name: str, size: int, where: Operator | Problem | Tensor, seed: int | None) -> Provenance:
        dtype = str(where.dtype).removeprefix("torch.")
        return Provenance(name, size, dtype, str(where.device), seed, versions())


def versions() -> dict[str, str]:
    """Versions of this library, PyTorch and Python."""
    try:
        own = version("deepspectra")
    except PackageNotFoundError:  # running from a source tree that was never installed
        own = "unknown"
    return {"deepspectra": own, "torch": str(torch.__version__), "python": platform.python_version()}


Entry = TypeVar("Entry")


@dataclass(frozen=True)
class ByLayer(Mapping[str, Entry]):
    """Results of layers by name, from input to output.

    Attributes:
        layers: layer → its result.
        seconds: wall-clock time spent.
        provenance: where it came from.
    """

    layers: Mapping[str, Entry]
    seconds: float
    provenance: Provenance

    def __getitem__(self, name: str) -> Entry:
        if name not in self.layers:
            raise MissingNameError("layer", name, self.layers)
        return self.layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def _table(self, head: Sequence[str], numbers: Callable[[Entry], Iterable[float]]) -> list[str]:
        """A line for each layer; – for a number that is not defined."""
        rows = [f"{'layer':<26} " + " ".join(f"{name:>11}" for name in head)]
        for name, entry in self.layers.items():
            cells = ("–" if math.isnan(number) else f"{number:.3g}" for number in numbers(entry))
            rows.append(f"{name[-26:]:<26} " + " ".join(f"{cell:>11}" for cell in cells))
        return rows


@dataclass(frozen=True)
class Quadrature:
    """What random vectors in a Krylov basis say of a spectrum: Gauss quadrature of (1/P) Σ_i δ(λ − λ_i).

    Attributes:
        nodes: (m,) ascending, float64.
        weights: (r, m), one row of sum 1 a random vector.
        num_steps: of each random vector; its row is exact for polynomials of degree 2·num_steps − 1.
    """

    nodes: Tensor
    weights: Tensor
    num_steps: tuple[int, ...]


@dataclass(frozen=True)
class Separation:
    """How far eigenpairs lie from the rest of the spectrum, if the run has seen all of it that is near.

    Each eigenvalue of A is taken to lie within three residuals r of its own Ritz value θ, or, unless the basis spans
    R^P, where `eigenpairs` could not exclude that it has not been seen.

    Attributes:
        gaps: (K,) from each value to the nearest place of another eigenvalue: θ ± 3 r of a Ritz value, or unseen; 0
            within one.
        gap: the same from all K values to eigenvalues that are not among them; ∞ if there are none.
        norm: ‖A‖ as far as seen.
        complete: the basis spans R^P.
    """

    gaps: Tensor
    gap: float
    norm: float
    complete: bool


@dataclass(frozen=True)
class Eigenpairs(Tabular, columns=("values", "residual_norms", "error_bounds", "angle_bounds")):
    """Eigenvalues and eigenvectors, with measured residuals.

    Attributes:
        values: (K,) descending, float64.
        vectors: (P, K) orthonormal columns, on the operator's device and in its dtype (float32 for shorter
        ones).
        residual_norms: (K,) ‖A v − λ v‖, measured.
        converged: every pair met its tolerance and none is thought missing.
        num_products: products spent.
        seconds: wall-clock time spent.
        which: the end of the spectrum asked for.
        rtol: the relative tolerance asked for.
        provenance: where it came from.
        quadrature: what the run's random vectors saw of the spectrum without these pairs; None after a restart
            of the basis, or when they saw nothing else.
        separation: from the rest of the spectrum; None where it is not known.
        num_sample_products: products with the sample that the search started from, beside `num_products`.
    """

    values: Tensor
    vectors: Tensor
    residual_norms: Tensor
    converged: bool
    num_products: int
    seconds: float
    which: str
    rtol: float
    provenance: Provenance
    quadrature: Quadrature | None = None
    separation: Separation | None = None
    num_sample_products: int = 0

    @property
    def worst(self) -> float:
        """The largest relative residual ‖A v − λ v‖/|λ|; pairs that are exact count 0."""
        relative = self.residual_norms / self.values.abs()
        return max(torch.where(self.residual_norms == 0, 0.0, relative).tolist(), default=0.0)

    @property
    def status(self) -> str:
        """What stands behind the pairs: "certified" | "statistical" | "not converged".

        "certified": the residuals are met, and no pair can be missing, for the basis spans R^P. "statistical":
        they are met, and a fresh random vector would have shown a missing pair: but for 1 run in 5,000 one beyond
        the last but one wanted, but for 1 in 100 one that belongs in the last place. "not converged": neither is
        claimed.
        """
        if not self.converged:
            return "not converged"
        return "certified" if self.separation and self.separation.complete else "statistical"

    @property
    def error_bounds(self) -> Tensor:
        """(K,) bounds of |λ − an eigenvalue of A|: the residual r, which holds always, or the smaller r²/gap.

        The second (Kato and Temple) is for converged pairs, and needs the gap to the next eigenvalue. If the status
        is "certified" the gap is that of all eigenvalues; if "statistical", it ends where an unseen one may lie:
        within it one lies in at most 1 of 100 runs, and then the bounds may not hold. Bounds are those of the
        operator as it is computed, and include 100 ε‖A‖ for the rounding of the values.
        """
        residuals, gaps = self.residual_norms, self._gaps()
        squares = torch.where(gaps > residuals, residuals * (residuals / gaps), residuals)
        return squares + self._rounding()

    @property
    def angle_bounds(self) -> Tensor:
        """(K,) bounds r/gap of the sine between each vector and its eigenvector; ∞ where none is known.

        It is not known for pairs that have not converged, or are as near to another as its residual. Of such
        a cluster only the span means something: see `subspace_angle_bound`.
        """
        gaps, known = self._gaps(), self.residual_norms + self._rounding()
        return torch.where(gaps > 0, known / gaps, math.inf)

    @property
    def subspace_angle_bound(self) -> float:
        """A bound of the sine of the largest angle between the K vectors' span and the eigenspace; or ∞.

        Davis and Kahan's sin Θ theorem: the root of Σ r² over the gap between the K values and the rest.
        """
        if self.separation is None or not self.converged or self.separation.gap == 0:
            return math.inf
        return float(((self.residual_norms + self._rounding()) / self.separation.gap).norm())

    def _gaps(self) -> Tensor:
        known = self.separation is not None and self.converged
        return self.separation.gaps if self.separation and known else torch.zeros_like(self.values)

    def _rounding(self) -> float:
        norm = self.separation.norm if self.separation else float(self.values.abs().max())
        return 100 * torch.finfo(self.vectors.dtype).eps * norm  # what restarts add up to

    def __str__(self) -> str:
        rows = [f"{'':>4} {'λ':>12} {'‖Av − λv‖':>12} {'error of λ ≤':>14} {'sin ∠ ≤':>10}"]
        columns = (self.values, self.residual_norms, self.error_bounds, self.angle_bounds)
        rows += [
            f"{j:>4} {value:>12.5g} {residual:>12.2g} {error:>14.2g} {angle:>10.2g}"
            for j, (value, residual, error, angle) in enumerate(
                zip(*(column.tolist() for column in columns), strict=True), 1
            )
        ]
        state = f"converged ({self.status})" if self.converged else "NOT converged"
        before = f", after {self.num_sample_products} with a sample" if self.num_sample_products else ""
        rows.append(
            f"{self.which} {len(self.values)} of {self.provenance.operator}: {state}, worst residual/|λ| "
            f"{self.worst:.1e} (rtol {self.rtol:.1e}), {_cost(self.num_products, self.seconds)}{before}"
        )
        return "\n".join(rows)


@dataclass(frozen=True)
class Curve(Tabular, columns=("grid", "density", "standard_error")):
    """A smoothed spectral density with its error band.

    Attributes:
        grid: (num_points,) ascending, float64: λ on the linear scale, |λ| + ε on the logarithmic one.
        density: (num_points,) mass per unit of λ, or per decade of |λ| + ε.
        standard_error: (num_points,) of `density` over probes; NaN with fewer than two probes.
        scale: "linear" | "log".
        width: standard deviation of the Gaussian kernel, in units of λ or in decades.
        mass: what the curve integrates to: the mass of the nodes it shows.
    """

    grid: Tensor
    density: Tensor
    standard_error: Tensor
    scale: str
    width: float
    mass: float


@dataclass(frozen=True)
class Density(Tabular, columns=("nodes", "weights", "probes")):
    """A spectral density (1/P) Σ_i δ(λ − λ_i) as a quadrature: nodes and weights.

    Attributes:
        nodes: (M,) float64; an eigenvalue or a quadrature node.
        weights: (M,) non-negative, sum to 1.
        probes: (M,) which probe a node belongs to; −1 for an eigenvalue known by itself, of weight 1/P, or for all
            zeros of a spectrum that is known exactly.
        num_probes: random probes averaged over; 0 for a spectrum that is known exactly.
        num_steps: Krylov steps a probe was given; the resolution at which an exact spectrum is drawn.
        deflation_residual: the largest ‖A v − λ v‖/|λ| of the deflated pairs, 0 without.
        num_products: products spent.
        seconds: wall-clock time spent.
        provenance: where it came from.
    """

    nodes: Tensor
    weights: Tensor
    probes: Tensor
    num_probes: int
    num_steps: int
    deflation_residual: float
    num_products: int
    seconds: float
    provenance: Provenance

    @property
    def size(self) -> int:
        """P, the number of eigenvalues."""
        return self.provenance.size

    @property
    def exact(self) -> Tensor:
        """The eigenvalues known one by one, ascending."""
        return self.nodes[self.probes < 0].sort().values

    @property
    def mean(self) -> float:
        """The mean eigenvalue, tr A / P."""
        return float(self.nodes @ self.weights)

    @property
    def mean_standard_error(self) -> float:
        """Of `mean`, over probes; NaN with one, 0 for an exact spectrum."""
        if not self.num_probes:
            return 0.0
        _, *rows = self._rows_by_probe()
        return float(
            _standard_error(self.num_probes * torch.stack([self.nodes[r] @ self.weights[r] for r in rows]))
        )

    @overload
    def cdf(self, x: float) -> float: ...
    @overload
    def cdf(self, x: Tensor) -> Tensor: ...
    def cdf(self, x: float | Tensor) -> float | Tensor:
        """The mass at or below `x`, a number or a tensor of any shape: a step function from 0 to 1."""
        nodes, order = self.nodes.sort()
        steps = torch.cat([torch.zeros(1, dtype=torch.float64), self.weights[order].cumsum(0)])
        where = torch.as_tensor(x, dtype=torch.float64, device="cpu")
        mass = (steps / steps[-1])[torch.searchsorted(nodes, where.contiguous(), right=True)]
        return mass if isinstance(x, Tensor) else float(mass)

    def count_above(self, x: float) -> tuple[float, float]:
        """How many eigenvalues lie above `x`, and its standard error (NaN with one probe).

        The error adds the scatter over probes and the resolution: between two nodes of a quadrature the
        distribution is known to within the weight of either (Chebyshev, Markov and Stieltjes), taken as
        uniform. It is 0 where exact eigenvalues enclose `x`.
        """
        above = torch.where(self.nodes > x, self.weights, 0.0)
        if not self.num_probes:
            return float(self.size * above.sum()), 0.0
        exact, *rows = self._rows_by_probe()
        counts = torch.stack([above[r].sum() for r in rows]) * self.num_probes * self.size
        jumps = torch.stack([self._jump(x, exact, r) for r in rows]).mean() * self.num_probes * self.size
        error = torch.hypot(_standard_error(counts), jumps / math.sqrt(3))
        return float(self.size * above.sum()), float(error)

    def _jump(self, x: float, exact: Tensor, rows: Tensor) -> Tensor:
        """The larger weight of a probe's two nodes around `x`, if no exact node is nearer."""
        largest = torch.zeros((), dtype=torch.float64)
        for side in (1, -1):
            distance = side * (self.nodes[rows] - x)
            beyond = distance.where(distance > 0, math.inf)
            known = side * (self.nodes[exact] - x)
            nearest_known = torch.cat([known[known > 0], known.new_tensor([math.inf])]).min()
            if len(rows) and bool(beyond.min() < nearest_known):
                largest = torch.maximum(largest, self.weights[rows[beyond.argmin()]])
        return largest

    def smooth(
        self,
        scale: Literal["linear", "log"] = "linear",
        width: float | None = None,
        num_points: int = 1024,
        sign: int | None = None,
        epsilon: float = 1e-5,
    ) -> Curve:
        """The density convolved with a Gaussian: a view for drawing; compute with the nodes.

        "linear": mass per unit of λ, over the bulk. Nodes off the bulk (further from it than a tenth of its
        range, or 4/num_steps of it) are left out, to be drawn one by one, so that no outlier sets the width
        or the grid.
        "log": mass per decade of |λ| + ε, over all nodes, or those of one sign. The integral over λ, or over
        log10 of the grid, is `Curve.mass`: 1 less what was left out.

        Args:
            scale: "linear" | "log".
            width: standard deviation of the Gaussian, in units of λ or decades. Default d·(2/(M−1))/√(8 ln 3)
                with d half the range shown, widened by 5 % on each side, and M = num_steps.
            num_points: points of the grid.
            sign: +1 or −1 keeps the positive or negative nodes only.
            epsilon: ε relative to the largest |λ|; for "log" only.

        Raises:
            OptionError: an argument out of range, or no node of that sign.

        Source: Papyan, JMLR 21 (2020), appendix C.3 (Lin, Saad and Yang's width, κ = 3),
        C.7 (log spectrum, ε = 1e-5), D.2. Departures: the kernel is not truncated; the width is the bulk's.
        """
        _check_smooth(scale, width, num_points, sign, epsilon)
        shown = torch.ones_like(self.nodes, dtype=torch.bool) if sign is None else self.nodes * sign > 0
        if not bool(shown.any()):
            raise OptionError(f"sign={sign}: there are no eigenvalues of that sign. Use sign=None.")
        positions = self.nodes
        if scale == "log":
            positions = (self.nodes.abs() + epsilon * self.nodes.abs().max().clamp_min(TINY)).log10()
        else:
            body = shown & ((self.nodes != 0) | (self.num_probes > 0))  # zeros known as such are no bulk
            body = body if bool(body.any()) else shown
            first, last = _bulk(self.nodes[body], self.weights[body], self.num_steps)
            shown &= (self.nodes >= first) & (self.nodes <= last)
        low, high = positions[shown].aminmax()
        width = width or _default_width(float(low), float(high), self.num_steps)
        grid = torch.linspace(
            float(low) - 4 * width, float(high) + 4 * width, num_points, dtype=torch.float64
        )
        weights = torch.where(shown, self.weights, 0.0)
        curves = torch.stack([_broaden(grid, positions[r], weights[r], width) for r in self._rows_by_probe()])
        exact, probes = curves[0], curves[1:] * self.num_probes
        known = not self.num_probes
        return Curve(
            grid=10**grid if scale == "log" else grid,
            density=exact if known else exact + probes.mean(0),
            standard_error=torch.zeros_like(grid) if known else _standard_error(probes),
            scale=scale,
            width=width,
            mass=float(weights.sum()),
        )

    def _rows_by_probe(self) -> list[Tensor]:
        """Indices of the exact nodes, then of each probe's."""
        order = self.probes.argsort(stable=True)
        counts = torch.bincount(self.probes + 1, minlength=self.num_probes + 1)
        return list(torch.split(order, counts.tolist()))

    def __str__(self) -> str:
        negative = float(torch.where(self.nodes < 0, self.weights, 0.0).sum())
        low, high = self.nodes.aminmax()
        rows = [
            f"{'smallest, largest node':<26} {float(low):>12.5g} {float(high):>12.5g}",
            f"{'mean eigenvalue':<26} {self.mean:>12.5g}",
            f"{'mass below zero':<26} {negative:>12.4g}",
            f"{'eigenvalues known exactly':<26} {len(self.exact):>12,} of {self.size:,}",
            f"density of {self.provenance.operator}: {self._how()}"
            + (f", deflated pairs to {self.deflation_residual:.1e}" if self.deflation_residual else "")
            + f", {_cost(self.num_products, self.seconds)}",
        ]
        return "\n".join(rows)

    def _how(self) -> str:
        if not self.num_probes:
            return "exact"
        band = "no error band from one probe" if self.num_probes == 1 else "error band over probes"
        return f"{self.num_probes} probes × {self.num_steps} steps, {band}"


@dataclass(frozen=True)
class Estimate(Tabular, columns=("quantity", "value", "standard_error")):
    """A number that random vectors tell of an operator, with its standard error.

    Attributes:
        quantity: "trace" | "Frobenius norm".
        value: the estimate.
        standard_error: of `value`; 0 when exact, NaN when a single product allows none.
        num_products: products spent.
        seconds: wall-clock time spent.
        method: "exact" | "leave-one-out" | "Hutchinson".
        provenance: where it came from.
    """

    quantity: str
    value: float
    standard_error: float
    num_products: int
    seconds: float
    method: str
    provenance: Provenance

    def __str__(self) -> str:
        return (
            f"{self.quantity:<16} {self.value:>12.6g}\n{'standard error':<16} {self.standard_error:>12.2g}\n"
            f"{self.quantity} of {self.provenance.operator} by {self.method}, "
            f"{_cost(self.num_products, self.seconds)}"
        )


@dataclass(frozen=True)
class Diagonal(Tabular, columns=("values", "standard_error")):
    """A diagonal with a standard error per entry.

    Attributes:
        values: (P,) the estimates, on the operator's device and in its dtype (float32 for shorter ones).
        standard_error: (P,) of `values`; 0 when exact, NaN when a single product allows none.
        num_products: products spent.
        seconds: wall-clock time spent.
        method: "exact" | "leave-one-out" | "Hutchinson".
        provenance: where it came from.
    """

    values: Tensor
    standard_error: Tensor
    num_products: int
    seconds: float
    method: str
    provenance: Provenance

    def __str__(self) -> str:
        low, high = self.values.aminmax()
        sizes = [tensor.double().square().mean().sqrt() for tensor in (self.values, self.standard_error)]
        return (
            f"{'smallest, largest entry':<26} {float(low):>12.5g} {float(high):>12.5g}\n"
            f"{'root mean square':<26} {float(sizes[0]):>12.5g}\n"
            f"{'of the standard errors':<26} {float(sizes[1]):>12.2g}\n"
            f"diagonal of {self.provenance.operator} by {self.method}, "
            f"{_cost(self.num_products, self.seconds)}"
        )


TINY = 1e-300  # keeps the logarithm of a zero spectrum finite


def _cost(num_products: int, seconds: float) -> str:
    return f"{num_products} products, {seconds:.3g} s"


def _standard_error(samples: Tensor) -> Tensor:
    """Of the mean over the first dimension; NaN from one sample."""
    if len(samples) < 2:
        return torch.full(samples.shape[1:], math.nan, dtype=torch.float64)
    return samples.std(0) / math.sqrt(len(samples))


def _broaden(grid: Tensor, positions: Tensor, weights: Tensor, width: float) -> Tensor:
    kernel = (-0.5 * ((grid[:, None] - positions) / width).square()).exp()
    return kernel @ weights / (width * math.sqrt(2 * math.pi))


def _default_width(low: float, high: float, num_steps: int) -> float:
    half_range = 0.55 * (high - low)
    width = half_range * 2 / max(num_steps - 1, 1) / math.sqrt(8 * math.log(3))
    return width or 1e-3 * max(abs(low), abs(high)) or 1e-3  # all nodes equal: any narrow bump will do


def _bulk(nodes: Tensor, weights: Tensor, num_steps: int) -> tuple[float, float]:
    """The range of the bulk: of the middle 90 % of the mass, grown over nodes until a gap too wide for it."""
    nodes, order = nodes.sort()
    mass = weights[order].cumsum(0)
    first, last = torch.searchsorted(
        mass, torch.tensor([0.05, 0.95], dtype=torch.float64) * mass[-1]
    ).tolist()
    last = min(last, len(nodes) - 1)
    values, gap = nodes.tolist(), max(0.1, 4 / num_steps)
    while True:
        reach = gap * (values[last] - values[first])
        if first > 0 and values[first] - values[first - 1] <= reach:
            first -= 1
        elif last + 1 < len(values) and values[last + 1] - values[last] <= reach:
            last += 1
        else:
            return values[first], values[last]


def _check_smooth(scale: str, width: float | None, num_points: int, sign: int | None, epsilon: float) -> None:
    if scale not in ("linear", "log"):
        raise OptionError(f"scale must be 'linear' or 'log'; got {scale!r}.")
    if width is not None and not 0 < width < math.inf:
        raise OptionError(f"width must be positive; got {width!r}. Pass width=None for the default.")
    if not isinstance(num_points, int) or num_points < 2:
        raise OptionError(f"num_points must be an integer, at least 2; got {num_points!r}.")
    if sign not in (None, 1, -1):
        raise OptionError(f"sign must be None, +1 or -1; got {sign!r}.")
    if not 0 < epsilon < 1:
        raise OptionError(f"epsilon must lie between 0 and 1, relative to the largest |λ|; got {epsilon!r}.")

"""Frozen results: a value, its error, what it cost and where it came from."""

from __future__ import annotations

import math
import platform
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Literal, TypeVar, overload

import numpy as np
import torch
from torch import Tensor

from deepspectra.errors import OptionError
from deepspectra.frames import Tabular

if TYPE_CHECKING:
    from deepspectra.operators.base import Operator
    from deepspectra.problem.problem import Problem


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
        standard_error: (num_points,) of `density`: two of them are a 95 % band; NaN with fewer than two probes.
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
        num_probes: random probes averaged over; 0 for a spectrum that is known exactly. Eigenvalues that some of them
            were freed of, but not all, are nodes of weight 1/P among theirs.
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
        """Of `mean`: two of them are a 95 % band; NaN with one probe, 0 for an exact spectrum."""
        largest = float(self.nodes.abs().max()) or 1.0  # squares of the nodes may overflow
        return largest * float(self._errors(self.nodes[None] / largest))

    def mean_interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Where the mean eigenvalue lies in this share of all runs.

        Raises:
            OptionError: confidence is not between 0 and 1.
        """
        return _interval(self.mean, self.mean_standard_error, math.inf, confidence)

    def _errors(self, values: Tensor) -> Tensor:
        """Standard errors (k,) of the means over the spectrum of functions with these values (k, M) at the nodes.

        zᵀf(A)z/‖z‖² of a Gaussian z in d dimensions varies by 2/(d+2) times the variance of f over the spectrum,
        which the nodes know better than the scatter of a few probes does. No eigenvalue has less than 1/P. That
        variance is an estimate, too, low where the mean is when few eigenvalues make both, such as the copies of one
        that probes are not freed of: it is taken at the upper end of its own band.
        """
        free = self.probes >= 0
        mass = float(self.weights[free].sum())
        if not self.num_probes or not mass:
            return torch.zeros(len(values), dtype=torch.float64)
        if self.num_probes < 2:
            return torch.full((len(values),), math.nan, dtype=torch.float64)
        means = values[:, free] @ self.weights[free] / mass
        weights = self.weights[free].clamp_min(1 / (self.size * self.num_probes)) / mass
        unit = 2 / (mass * self.size + 2) / self.num_probes
        squares = (values[:, free] - means[:, None]).square()
        spread = squares @ weights
        doubt = (squares - spread[:, None]).square() @ weights
        return mass * (unit * (spread + 2 * (unit * doubt).sqrt())).sqrt()

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
        """How many eigenvalues lie above `x`, and its standard error (NaN with one probe); two are a 95 % band.

        The error adds that of the probes and the resolution: what a probe's moments say of its mass above x is
        certain to ± Christoffel's function at x, two errors wide. It is 0 where exact eigenvalues enclose `x`.
        """
        above = (self.nodes > x).double()
        count = float(self.size * (self.weights @ above))
        if not self.num_probes:
            return count, 0.0
        exact, *rows = self._rows_by_probe()
        blur = sum(self._resolution(x, exact, r) for r in rows)
        return count, self.size * math.hypot(float(self._errors(above[None])), blur / 2)

    def _resolution(self, x: float, exact: Tensor, rows: Tensor) -> float:
        """Christoffel's function at x of a probe's measure, 1/Σ p_k(x)² over its orthonormal polynomials.

        Two measures with the same moments, as many as `num_steps` polynomials have, differ by no more in the mass
        above x (Chebyshev, Markov and Stieltjes).
        """
        apart, known = self.nodes[rows] - x, self.nodes[exact] - x
        if not any(_nearest(side * apart) < _nearest(side * known) for side in (1, -1)):
            return 0.0
        weights = self.weights[rows]
        return float(weights.sum()) * christoffel(
            apart / apart.abs().max(), weights / weights.sum(), self.num_steps
        )

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
        kernel = _kernel(grid, positions, width) * shown
        return Curve(
            grid=10**grid if scale == "log" else grid,
            density=kernel @ self.weights,
            standard_error=self._errors(kernel),
            scale=scale,
            width=width,
            mass=float(self.weights[shown].sum()),
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
        standard_error: of `value`: two of them are a 95 % band, also from few products (`interval`); 0 when exact,
            NaN when a single product allows none.
        num_products: products spent.
        seconds: wall-clock time spent.
        method: "exact" | "leave-one-out" | "Hutchinson".
        provenance: where it came from.
        degrees_of_freedom: of the scatter that the error is known by; ∞ where it is not known by that.
    """

    quantity: str
    value: float
    standard_error: float
    num_products: int
    seconds: float
    method: str
    provenance: Provenance
    degrees_of_freedom: float = math.inf

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Where the truth lies in this share of all runs.

        Raises:
            OptionError: confidence is not between 0 and 1.
        """
        return _interval(self.value, self.standard_error, self.degrees_of_freedom, confidence)

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
        standard_error: (P,) of `values`: two of them are a 95 % band, also from few products (`interval`); 0 when
            exact, NaN when a single product allows none.
        num_products: products spent.
        seconds: wall-clock time spent.
        method: "exact" | "leave-one-out" | "Hutchinson".
        provenance: where it came from.
        degrees_of_freedom: of the scatter that the errors are known by; ∞ when exact.
    """

    values: Tensor
    standard_error: Tensor
    num_products: int
    seconds: float
    method: str
    provenance: Provenance
    degrees_of_freedom: float = math.inf

    def interval(self, confidence: float = 0.95) -> tuple[Tensor, Tensor]:
        """(P,) and (P,), between which an entry lies in this share of all runs.

        Raises:
            OptionError: confidence is not between 0 and 1.
        """
        return _interval(self.values, self.standard_error, self.degrees_of_freedom, confidence)

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


def standard_error(samples: Tensor, dim: int = 0) -> Tensor:
    """Of the mean of independent samples over one dimension; two of them are a 95 % band, however few there are.

    The scatter over √n, times Student's quantile over the normal one. NaN from one sample.
    """
    count = samples.shape[dim]
    if count < 2:
        return samples.mean(dim) * math.nan
    largest = samples.abs().amax(dim, keepdim=True).clamp_min(torch.finfo(samples.dtype).tiny)
    scatter = (samples / largest).std(dim) * largest.squeeze(dim)  # squares of the samples may overflow
    return scatter * (student_scale(count) / math.sqrt(count))


def student_scale(count: int) -> float:
    """By how much more scatters over √n two must be for a 95 % band if it is known from `count` samples alone."""
    return _quantile(COVERED, count - 1) / 2 if count > 1 else math.nan


COVERED = math.erf(math.sqrt(2))  # by two standard deviations of a normal variable: 95.4 %

Number = TypeVar("Number", float, Tensor)


def _interval(value: Number, error: Number, freedom: float, confidence: float) -> tuple[Number, Number]:
    """What `confidence` takes, if two errors are what `COVERED` takes."""
    if not 0 < confidence < 1:
        raise OptionError(f"confidence must lie between 0 and 1, such as 0.95; got {confidence!r}.")
    half = 2 * _quantile(confidence, freedom) / _quantile(COVERED, freedom) * error
    return value - half, value + half


def _quantile(confidence: float, freedom: float) -> float:
    """Of |t| for Student's t, or the normal distribution; NaN without a degree of freedom."""
    from scipy.special import ndtri, stdtrit  # noqa: PLC0415  (SciPy's import takes a while)

    share = (1 + confidence) / 2
    return float(ndtri(share) if math.isinf(freedom) else stdtrit(freedom, share))


def _nearest(distances: Tensor) -> float:
    """The smallest that is positive; ∞ without one."""
    return float(distances[distances > 0].min()) if bool((distances > 0).any()) else math.inf


def _kernel(grid: Tensor, positions: Tensor, width: float) -> Tensor:
    kernel = (-0.5 * ((grid[:, None] - positions) / width).square()).exp()
    return kernel / (width * math.sqrt(2 * math.pi))


def christoffel(nodes: Tensor, weights: Tensor, count: int) -> float:
    """1/Σ p_k(0)² of the first `count` orthonormal polynomials of a discrete measure on [−1, 1].

    It is the smallest ∫p² of polynomials with p(0) = 1 of a lower degree than `count`. They come by Lanczos'
    recurrence with full reorthogonalisation.
    """
    x, count = nodes.numpy(), min(count, len(nodes))
    columns = np.zeros((count + 1, len(x)))
    columns[0] = weights.sqrt().numpy()
    previous, current, beta, total = 0.0, 1.0, 0.0, 0.0  # p_{k−1}(0), p_k(0)
    for k in range(count):
        total += current * current
        image = x * columns[k]
        alpha = float(columns[k] @ image)
        for _ in range(2):
            image -= columns[: k + 1].T @ (columns[: k + 1] @ image)
        last, beta = beta, float(np.linalg.norm(image))
        if beta <= 1e-14 or not math.isfinite(total):
            break
        previous, current = current, (-alpha * current - last * previous) / beta
        columns[k + 1] = image / beta
    return 1 / total


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

"""A spectral density as a quadrature, nodes and weights: its moments, counts with errors, and a curve to draw."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from deepspectra.argument_checks import check_choice, check_count
from deepspectra.confidence import Number, count_interval, interval
from deepspectra.dataframes import Tabular
from deepspectra.errors import OptionError
from deepspectra.moment_bounds import Jacobi
from deepspectra.results import Cost, Result

TINY = 1e-300  # keeps the logarithm of a zero spectrum finite
ROUNDING = 10  # in units of ε·max|λ|: nodes are known no better
LEAST_ROUNDING = 1e-13  # relative to max|λ|, of what is computed from the nodes


@dataclass(frozen=True)
class Curve(Tabular, columns=("grid", "density", "standard_error")):
    """A smoothed spectral density with its error band.

    Attributes:
        grid: (num_points,) ascending, float64: λ on the linear scale, |λ| + ε on the logarithmic one.
        density: (num_points,) mass per unit of λ, or per decade of |λ| + ε.
        standard_error: (num_points,) of `density`: two of them are a 95 % band; NaN with one probe or step.
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


@dataclass(frozen=True, repr=False)
class Density(Result, Tabular, columns=("nodes", "weights", "probes")):
    """A spectral density (1/P) Σ_i δ(λ − λ_i) as a quadrature: nodes and weights.

    Attributes:
        nodes: (M,) float64; an eigenvalue or a quadrature node.
        weights: (M,) non-negative, sum to 1.
        probes: (M,) which probe a node belongs to; −1 for an eigenvalue known by itself, of weight 1/P, or for all
            zeros of a spectrum that is known exactly.
        residuals: (M,) ‖A v − λ v‖ of eigenvalues that were locked, 0 of other nodes.
        num_probes: random probes averaged over; 0 for a spectrum that is known exactly. Eigenvalues that some of them
            were freed of, but not all, are nodes of weight 1/P among theirs.
        num_steps: Krylov steps a probe was given; the resolution at which an exact spectrum is drawn.
        deflation_residual: the largest ‖A v − λ v‖/|λ| of the deflated pairs, 0 without.
        num_deflated: how many pairs were.
        others_below: above it lies no eigenvalue of the rest, as `eigenpairs` says of the largest; ∞ if nobody says.
        merged: whether copies of nodes were: no probe with fewer nodes than steps is known to have no others.
        num_products: products spent.
    """

    nodes: Tensor
    weights: Tensor
    probes: Tensor
    residuals: Tensor
    num_probes: int
    num_steps: int
    deflation_residual: float = 0.0
    num_deflated: int = 0
    others_below: float = math.inf
    merged: bool = False
    num_products: int = 0

    def __getstate__(self) -> dict[str, object]:
        """What is saved: the fields, and nothing that is made of them."""
        return {one.name: getattr(self, one.name) for one in fields(self)}

    @property
    def size(self) -> int:
        """P, the number of eigenvalues."""
        return self.provenance.size

    @property
    def exact(self) -> Tensor:
        """The eigenvalues known by themselves, ascending; all zeros of a spectrum that is known exactly are one."""
        return self.nodes[self.probes < 0].sort().values

    @property
    def mean(self) -> float:
        """The mean eigenvalue, tr A / P."""
        return float(self.nodes @ self.weights)

    @property
    def mean_standard_error(self) -> float:
        """Of `mean`: two of them are a 95 % band; NaN with one probe or step, 0 for an exact spectrum."""
        largest = float(self.nodes.abs().max()) or 1.0  # squares of the nodes may overflow
        return largest * float(self._errors(self.nodes[None] / largest))

    def mean_interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Where the mean eigenvalue lies in this share of all runs.

        Raises:
            OptionError: confidence is not between 0 and 1.
        """
        return interval(self.mean, self.mean_standard_error, math.inf, confidence)

    def _errors(self, values: Tensor) -> Tensor:
        """Standard errors (k,) of the means over the spectrum of functions with these values (k, M) at the nodes.

        zᵀf(A)z/‖z‖² of a Gaussian z in d dimensions varies by 2/(d+2) times the variance of f over the spectrum,
        which the nodes know better than the scatter of a few probes does, and those of one step do not. No eigenvalue
        has less than 1/P. That variance is an estimate, too, low where the mean is when few eigenvalues make both,
        such as the copies of one that probes are not freed of: it is taken at the upper end of its own band.
        """
        free = self.probes >= 0
        mass = float(self.weights[free].sum())
        if not self.num_probes or not mass:
            return torch.zeros(len(values), dtype=torch.float64)
        if min(self.num_probes, self.num_steps) < 2:
            return torch.full((len(values),), math.nan, dtype=torch.float64)
        means = values[:, free] @ self.weights[free] / mass
        weights = self.weights[free].clamp_min(1 / (self.size * self.num_probes)) / mass
        unit = 2 / (mass * self.size + 2) / self.num_probes
        squares = (values[:, free] - means[:, None]).square()
        spread = squares @ weights
        doubt = (squares - spread[:, None]).square() @ weights
        return mass * (unit * (spread + 2 * (unit * doubt).sqrt())).sqrt()

    def cdf(self, x: Number) -> Number:
        """The mass at or below `x`, a number or a tensor of any shape: a step function from 0 to 1."""
        nodes, order = self.nodes.sort()
        steps = torch.cat([torch.zeros(1, dtype=torch.float64), self.weights[order].cumsum(0)])
        where = torch.as_tensor(x, dtype=torch.float64, device="cpu")
        mass = (steps / steps[-1])[torch.searchsorted(nodes, where.contiguous(), right=True)]
        return mass if isinstance(x, Tensor) else float(mass)

    def count_above(self, x: float) -> tuple[float, float]:
        """How many eigenvalues lie above `x`, and its standard error, of which two are a 95 % band.

        The error adds that of the probes and the resolution: what a probe's moments say of its mass above x is
        certain to ± Christoffel's function at x, two errors wide, and locked eigenvalues are to their residuals. It
        is 0 where exact eigenvalues enclose `x`. NaN with one probe or step.
        """
        above = (self.nodes > x).double()
        count = float(self.size * (self.weights @ above))
        if not self.num_probes:
            return count, 0.0
        blur = sum(self._resolution(x, rows, jacobi) for rows, jacobi in self._measures)
        blur += float(_loose(self, torch.tensor(x, dtype=torch.float64), torch.ones_like(self.probes))[0])
        return count, self.size * math.hypot(float(self._errors(above[None])), blur / 2)

    @cached_property
    def _measures(self) -> list[tuple[Tensor, Jacobi]]:
        """Of each probe, the indices of its nodes, and as many polynomials of its measure as it has steps."""
        counts = torch.bincount(self.probes + 1, minlength=self.num_probes + 1)
        _, *rows = torch.split(self.probes.argsort(stable=True), counts.tolist())
        wanted = [min(self.num_steps, len(r)) if self.merged else self.num_steps for r in rows]
        return [
            (r, Jacobi.of(self.nodes[r].numpy(), self.weights[r].numpy(), count))
            for r, count in zip(rows, wanted, strict=True)
            if len(r)
        ]

    def _resolution(self, x: float, rows: Tensor, jacobi: Jacobi) -> float:
        """Christoffel's function at x of a probe's measure, unless exact eigenvalues enclose x."""
        apart, known = self.nodes[rows] - x, self.exact - x
        if jacobi.complete or not any(_nearest(s * apart) < _nearest(s * known) for s in (1, -1)):
            return 0.0
        return float(jacobi.christoffel(np.array([x]))[0])

    def cdf_band(self, x: Tensor, confidence: float = 0.95) -> tuple[Tensor, Tensor]:
        """Bounds of the mass at or below x, of x's shape: at each point they hold it in this share of all runs.

        They add what a probe's moments leave open of its own measure, which is certain (Chebyshev, Markov and
        Stieltjes), to how far the probes are from the spectrum. One probe is enough for that: of a set of k of d
        eigenvalues a Gaussian probe sees a share that is a Beta(k/2, (d − k)/2) variable. Both bounds are whole
        multiples of 1/P, 0 and 1 at the ends, and are `cdf` itself for a spectrum that is known exactly. Values of x
        that differ by the rounding of products are one. Deflated pairs of residual R move no more eigenvalues past x
        than they are, none by more than ‖R‖, and none at all past an x in a gap that is wide beside ‖R‖². Locked
        pairs with x within their residual lie on either side of it, and others blur the rest by its square over
        their distance.

        Raises:
            OptionError: confidence is not between 0 and 1.

        Cost: num_steps² operations a node and probe, once.
        """
        x = torch.as_tensor(x, dtype=torch.float64)
        return self._band(torch.full_like(x, -math.inf), x, confidence)

    def mass_band(self, edges: Tensor, confidence: float = 0.95) -> tuple[Tensor, Tensor]:
        """Bounds of the mass in each bin (a, b] between ascending edges (k + 1,): two tensors (k,).

        As those of `cdf_band`, and closer than their differences: where a bin holds little, little of it scatters.

        Raises:
            OptionError: edges do not ascend, or confidence is not between 0 and 1.
        """
        if edges.ndim != 1 or len(edges) < 2 or not bool((edges.diff() > 0).all()):
            raise OptionError(f"edges must be two or more ascending numbers; got {edges.tolist()}.")
        return self._band(edges[:-1], edges[1:], confidence)

    def _band(self, start: Tensor, end: Tensor, confidence: float) -> tuple[Tensor, Tensor]:
        """Bounds of the mass in (start, end], of any shape."""
        a, b = (x.detach().double().cpu() for x in (start, end))
        if bool(a.isnan().any() or b.isnan().any()):
            raise OptionError("a band is asked for at NaN; pass numbers, ±∞ among them.")
        if not self._measures:
            mass = self.cdf(b) - self.cdf(a)
            return mass, mass.clone()
        largest = float(self.nodes.abs().max())
        rounding = max(ROUNDING * torch.finfo(getattr(torch, self.provenance.dtype)).eps, LEAST_ROUNDING)
        return _beside_deflated(self, a, b, rounding * largest, confidence)

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
        grid = torch.linspace(float(low) - 4 * width, float(high) + 4 * width, num_points, dtype=torch.float64)
        kernel = (-0.5 * ((grid[:, None] - positions) / width).square()).exp() * shown
        kernel /= width * math.sqrt(2 * math.pi)
        return Curve(
            grid=10**grid if scale == "log" else grid,
            density=kernel @ self.weights,
            standard_error=self._errors(kernel),
            scale=scale,
            width=width,
            mass=float(self.weights[shown].sum()),
        )

    def __str__(self) -> str:
        negative = float(torch.where(self.nodes < 0, self.weights, 0.0).sum())
        few = [word for word, num in (("probe", self.num_probes), ("step", self.num_steps)) if num == 1]
        band = f"no error band from one {few[0]}" if few else "error band over probes"
        how = f"{self.num_probes} probes × {self.num_steps} steps, {band}" if self.num_probes else "exact"
        low, high = self.nodes.aminmax()
        rows = [
            f"{'smallest, largest node':<26} {float(low):>12.5g} {float(high):>12.5g}",
            f"{'mean eigenvalue':<26} {self.mean:>12.5g}",
            f"{'mass below zero':<26} {negative:>12.4g}",
            f"{'eigenvalues known exactly':<26} {round(float(_num_exact(self, high))):>12,} of {self.size:,}",
            f"density of {self.provenance.operator}: {how}"
            + (f", deflated pairs to {self.deflation_residual:.1e}" if self.deflation_residual else "")
            + f", {Cost(self.num_products, self.seconds)}",
            *self.provenance.caveats,
        ]
        return "\n".join(rows)


def _num_exact(density: Density, x: Tensor, sign: int = 0) -> Tensor:
    """How many eigenvalues that are known by themselves lie at or below x, of any shape, zeros counted one by one.

    With a sign the locked ones are moved by their residuals: up for the fewest, down for the most.
    """
    rows = density.probes < 0
    values, order = (density.nodes + sign * density.residuals)[rows].sort()
    counts = (density.weights[rows][order] * density.size).round().cumsum(0)
    return torch.cat([counts.new_zeros(1), counts])[torch.searchsorted(values, x.contiguous(), right=True)]


def _loose(density: Density, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The mass of those rows' locked eigenvalues with x within their residuals; by what others blur the rest.

    Without k rows and columns a matrix has up to k eigenvalues less below x (Cauchy), and what is left of it,
    [[Θ − x, Rᵀ], [R, A₂ − x]], as many as Θ and A₂ − x − R(Θ − x)⁻¹Rᵀ (Sylvester), whose last term is at most
    Σ_i r_i²/|θ_i − x|.
    """
    locked = density.residuals > 0
    residuals, weights = density.residuals[locked], density.weights[locked]
    distances = (density.nodes[locked] - x[..., None]).abs()
    near = distances <= residuals
    beyond = torch.where(near, 0.0, residuals.square() / distances.clamp_min(TINY))
    return near.double() @ (weights * rows[locked]), beyond @ weights * density.size


def _beside_deflated(density: Density, a: Tensor, b: Tensor, blur: float, confidence: float) -> tuple[Tensor, Tensor]:
    """Bounds of the mass in (a, b]: deflated pairs pass an end or not, or no eigenvalue is moved by more than ‖R‖."""
    low, high = _mass_within(density, a, b, blur, confidence)
    if not density.deflation_residual:
        return low, high
    values = density.exact.abs().topk(density.num_deflated).values  # no smaller than those deflated
    norm = density.deflation_residual * float(values.norm())  # of R, at most
    passed = [(x.isfinite() & ~_parted(density, x, norm)).double() for x in (a, b)]
    moved = (passed[0] + passed[1]) * density.num_deflated / density.size
    least, most = _mass_within(density, a, b, blur + norm, confidence)
    return torch.maximum(low - moved, least), torch.minimum(high + moved, most)


def _mass_within(density: Density, a: Tensor, b: Tensor, blur: float, confidence: float) -> tuple[Tensor, Tensor]:
    """Bounds of the mass in (a, b] if no eigenvalue is further off than `blur`, and what is locked as it says."""
    ends, (near, reach) = torch.stack([a, b]), _loose(density, torch.stack([a, b]), density.probes >= 0)
    reach = torch.where(ends.isfinite(), reach, 0.0) + blur
    ends = torch.stack([a + reach[0], b - reach[1], a - reach[0], b + reach[1]])
    least, most = torch.zeros(2, *ends.shape, dtype=torch.float64)
    for _, jacobi in density._measures:
        found = jacobi.mass_below(ends.flatten().numpy())
        least += torch.from_numpy(found[0]).view(ends.shape)
        most += torch.from_numpy(found[1]).view(ends.shape)
    free = float(density.weights[density.probes >= 0].sum())
    slack = near.sum(0) / free  # of eigenvalues that only some probes know
    least, most = (torch.where(ends == -math.inf, 0.0, mass / free).clamp(0, 1) for mass in (least, most))
    low, high = count_interval(
        (least[1] - most[0] - slack).clamp_min(0),
        (most[3] - least[2] + slack).clamp(0, 1),
        free * density.size,
        density.num_probes,
        confidence,
    )
    start, end = torch.stack([a + blur, a - blur]), torch.stack([b - blur, b + blur])
    low = low + (_num_exact(density, end[0], 1) - _num_exact(density, start[0], -1)).clamp_min(0)
    high = high + _num_exact(density, end[1], -1) - _num_exact(density, start[1], 1)
    return low / density.size, (high / density.size).clamp_max(1)


def _parted(density: Density, x: Tensor, norm: float) -> Tensor:
    """Whether as many eigenvalues lie below x as of the deflated values and the rest's together, if ‖R‖ ≤ norm.

    A − x is [[Θ − x, Rᵀ], [R, A₂ − x]], and its inertia that of A₂ − x and of Θ − x − Rᵀ(A₂ − x)⁻¹R (Sylvester).
    Above all of A₂ the last term is at most ‖R‖² over the distance to it: no sign changes if that is less than the
    distance to the nearest of Θ.
    """
    nearest = (density.exact - x[..., None]).abs().amin(-1)
    beyond = (x - density.others_below).clamp_min(0)
    return nearest * beyond > norm**2


def _nearest(distances: Tensor) -> float:
    """The smallest that is positive; ∞ without one."""
    return float(distances[distances > 0].min()) if bool((distances > 0).any()) else math.inf


def _default_width(low: float, high: float, num_steps: int) -> float:
    half_range = 0.55 * (high - low)
    width = half_range * 2 / max(num_steps - 1, 1) / math.sqrt(8 * math.log(3))
    return width or 1e-3 * max(abs(low), abs(high)) or 1e-3  # all nodes equal: any narrow bump will do


def _bulk(nodes: Tensor, weights: Tensor, num_steps: int) -> tuple[float, float]:
    """The range of the bulk: of the middle 90 % of the mass, grown over nodes until a gap too wide for it."""
    nodes, order = nodes.sort()
    mass = weights[order].cumsum(0)
    first, last = torch.searchsorted(mass, torch.tensor([0.05, 0.95], dtype=torch.float64) * mass[-1]).tolist()
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
    check_choice("scale", scale, ("linear", "log"))
    check_choice("sign", sign, (None, 1, -1))
    check_count("num_points", num_points, smallest=2)
    if width is not None and not 0 < width < math.inf:
        raise OptionError(f"width must be positive; got {width!r}. Pass width=None for the default.")
    if not 0 < epsilon < 1:
        raise OptionError(f"epsilon must lie between 0 and 1, relative to the largest |λ|; got {epsilon!r}.")

"""Frozen results: a value, its error, what it cost and where it came from."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeVar

import torch
from torch import Tensor

from deepspectra.confidence import interval
from deepspectra.dataframes import Tabular, preformatted, text_table
from deepspectra.errors import MissingNameError

Entry = TypeVar("Entry")
NOTHING = 1e-5  # relative error of a product, as float32 itself has: below it nothing is coarser


@dataclass(frozen=True)
class Cost:
    """What a result cost: products with single vectors, and wall-clock seconds."""

    num_products: int
    seconds: float

    def __str__(self) -> str:
        return f"{self.num_products} products, {self.seconds:.3g} s"


@dataclass(frozen=True)
class Provenance:
    """Where a result came from.

    Attributes:
        rounding: the relative error of a product, measured against float64 on a few examples, where a network
            computes in half precision or TF32; None where it does not, or nothing was measured.
        basis: in words, how a Krylov basis was held where not exactly on the device, and what that cost.
    """

    operator: str
    size: int
    dtype: str
    device: str
    seed: int | None
    versions: dict[str, str] = field(default_factory=dict)
    rounding: float | None = None
    basis: str = ""

    @staticmethod
    def of(
        source: Any, name: str = "", *, size: int | None = None, seed: int | None = None, basis: str = ""
    ) -> Provenance:
        """Of a computation on an operator, on rows (..., D), or on a problem: on its matrix G, unless named."""
        if size is None:
            size = source.shape[-1] if hasattr(source, "shape") else source.num_parameters
        of_matrix = (
            getattr(source, "name", "") if hasattr(source, "shape") else ""
        )  # a problem's own name is its user's
        name = name or of_matrix or "Gauss-Newton"
        dtype = str(source.dtype).removeprefix("torch.")
        rounding = getattr(source, "rounding", None)
        return Provenance(name, size, dtype, str(source.device), seed, versions(), rounding, basis)

    @property
    def caveats(self) -> tuple[str, ...]:
        """What a table says of its numbers, beside them."""
        found = (self.basis,) if self.basis else ()
        if self.rounding is None or self.rounding < NOTHING:
            return found
        return (f"products are off by {self.rounding:.1%}: half precision or TF32", *found)


@dataclass(frozen=True, kw_only=True, repr=False)
class Result:
    """What every result says beside its numbers.

    Attributes:
        seconds: wall-clock time spent.
        provenance: where it came from.
    """

    seconds: float
    provenance: Provenance

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.provenance.operator}, {self.provenance.size:,} dimensions>"

    def _repr_html_(self) -> str:
        """What notebooks show: all that `print` does."""
        return preformatted(str(self))


def origin(
    began: float, source: Any, name: str = "", *, size: int | None = None, seed: int | None = None, basis: str = ""
) -> dict[str, Any]:
    """What a `Result` says beside its numbers: began at that `time.perf_counter()`, and as `Provenance.of`."""
    provenance = Provenance.of(source, name, size=size, seed=seed, basis=basis)
    return {"seconds": time.perf_counter() - began, "provenance": provenance}


@dataclass(frozen=True, repr=False)
class ByLayer(Result, Mapping[str, Entry]):
    """Layer → its result, from input to output: what every analysis by layer returns. They are in `layers`.

    Attributes:
        left_out: what did not fit memory → why, and what to do.
    """

    layers: Mapping[str, Entry]
    left_out: Mapping[str, str] = field(default_factory=dict, kw_only=True)

    def __getitem__(self, name: str) -> Entry:
        if name not in self.layers:
            raise MissingNameError("layer", name, self.layers)
        return self.layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def _table(self, head: Sequence[str], cells: Callable[[Entry], Iterable[float | str]], *notes: str) -> str:
        """A line for each layer, as in `text_table`, and one for each that was left out."""
        rows = ((name[-26:], *cells(entry)) for name, entry in self.layers.items())
        left_out = (f"left out: {name or 'the model'}: {reason}" for name, reason in self.left_out.items())
        return text_table(("layer", *head), rows, *notes, *left_out)


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


@dataclass(frozen=True, repr=False)
class Eigenpairs(Result, Tabular, columns=("values", "residual_norms", "error_bounds", "angle_bounds")):
    """Eigenvalues and eigenvectors, with measured residuals.

    Attributes:
        values: (K,) descending, float64.
        vectors: (P, K) orthonormal columns, on the operator's device and in its dtype (float32 for shorter
        ones).
        residual_norms: (K,) ‖A v − λ v‖, measured.
        converged: every pair met its tolerance and none is thought missing.
        num_products: products spent.
        which: the end of the spectrum asked for.
        rtol: the relative tolerance asked for.
        separation: from the rest of the spectrum; None where it is not known.
        num_sample_products: products with the sample that the search started from, beside `num_products`.
    """

    values: Tensor
    vectors: Tensor
    residual_norms: Tensor
    converged: bool
    num_products: int
    which: str
    rtol: float
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
        return self.separation.gaps if self.separation and self.converged else torch.zeros_like(self.values)

    def _rounding(self) -> float:
        norm = self.separation.norm if self.separation else float(self.values.abs().max())
        return 100 * torch.finfo(self.vectors.dtype).eps * norm  # what restarts add up to

    def __str__(self) -> str:
        columns = (self.values, self.residual_norms, self.error_bounds, self.angle_bounds)
        numbers = zip(*(column.tolist() for column in columns), strict=True)
        rows = [(str(j), f"{value:.5g}", *(f"{n:.2g}" for n in rest)) for j, (value, *rest) in enumerate(numbers, 1)]
        state = f"converged ({self.status})" if self.converged else "NOT converged"
        before = f", after {self.num_sample_products} with a sample" if self.num_sample_products else ""
        return text_table(
            ("", "λ", "‖Av − λv‖", "error of λ ≤", "sin ∠ ≤"),
            rows,
            f"{self.which} {len(self.values)} of {self.provenance.operator}: {state}, worst residual/|λ| "
            f"{self.worst:.1e} (rtol {self.rtol:.1e}), {Cost(self.num_products, self.seconds)}{before}",
            *self.provenance.caveats,
        )


@dataclass(frozen=True, repr=False)
class Estimate(Result, Tabular, columns=("quantity", "value", "standard_error")):
    """A number that random vectors tell of an operator, with its standard error.

    Attributes:
        quantity: "trace" | "Frobenius norm".
        value: the estimate.
        standard_error: of `value`: two of them are a 95 % band, also from few products (`interval`); 0 when exact,
            NaN when a single product allows none.
        num_products: products spent.
        method: "exact" | "leave-one-out" | "Hutchinson".
        degrees_of_freedom: of the scatter that the error is known by; ∞ where it is not known by that.
    """

    quantity: str
    value: float
    standard_error: float
    num_products: int
    method: str
    degrees_of_freedom: float = math.inf

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Where the truth lies in this share of all runs.

        Raises:
            OptionError: confidence is not between 0 and 1.
        """
        return interval(self.value, self.standard_error, self.degrees_of_freedom, confidence)

    def __str__(self) -> str:
        cost = Cost(self.num_products, self.seconds)
        note = f"{self.quantity} of {self.provenance.operator} by {self.method}, {cost}"
        rows = [("standard error", f"{self.standard_error:.2g}")]
        return text_table((self.quantity, f"{self.value:.6g}"), rows, note, *self.provenance.caveats)


@dataclass(frozen=True, repr=False)
class Diagonal(Result, Tabular, columns=("values", "standard_error")):
    """A diagonal with a standard error per entry.

    Attributes:
        values: (P,) the estimates, on the operator's device and in its dtype (float32 for shorter ones).
        standard_error: (P,) of `values`: two of them are a 95 % band, also from few products (`interval`); 0 when
            exact, NaN when a single product allows none.
        num_products: products spent.
        method: "exact" | "leave-one-out" | "Hutchinson".
        degrees_of_freedom: of the scatter that the errors are known by; ∞ when exact.
    """

    values: Tensor
    standard_error: Tensor
    num_products: int
    method: str
    degrees_of_freedom: float = math.inf

    def interval(self, confidence: float = 0.95) -> tuple[Tensor, Tensor]:
        """(P,) and (P,), between which an entry lies in this share of all runs.

        Raises:
            OptionError: confidence is not between 0 and 1.
        """
        return interval(self.values, self.standard_error, self.degrees_of_freedom, confidence)

    def __str__(self) -> str:
        low, high = self.values.aminmax()
        sizes = [tensor.double().square().mean().sqrt() for tensor in (self.values, self.standard_error)]
        rows = [
            ("root mean square", f"{float(sizes[0]):.5g}"),
            ("of the standard errors", f"{float(sizes[1]):.2g}"),
        ]
        note = f"{self.provenance.operator} by {self.method}, {Cost(self.num_products, self.seconds)}"
        head = ("smallest, largest entry", f"{float(low):.5g}", f"{float(high):.5g}")
        return text_table(head, rows, f"diagonal of {note}", *self.provenance.caveats)

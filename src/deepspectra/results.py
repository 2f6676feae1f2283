"""Frozen results: a value, its error, what it cost and where it came from."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from deepspectra.operators.base import Operator


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
        return Provenance(
            operator=operator.name,
            size=operator.shape[0],
            dtype=str(operator.dtype).removeprefix("torch."),
            device=str(operator.device),
            seed=seed,
            versions=versions(),
        )


def versions() -> dict[str, str]:
    """Versions of this library, PyTorch and Python."""
    try:
        own = version("deepspectra")
    except PackageNotFoundError:  # running from a source tree that was never installed
        own = "unknown"
    return {"deepspectra": own, "torch": torch.__version__, "python": platform.python_version()}


@dataclass(frozen=True)
class Eigenpairs:
    """Eigenvalues and eigenvectors, with measured residuals.

    Attributes:
        values: (K,) descending, float64.
        vectors: (P, K) orthonormal columns, in the operator's dtype and on its device.
        residual_norms: (K,) ‖A v − λ v‖, measured.
        converged: every pair met its tolerance and none is thought missing.
        num_products: products spent.
        seconds: wall-clock time spent.
        which: the end of the spectrum asked for.
        rtol: the relative tolerance asked for.
        provenance: where it came from.
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

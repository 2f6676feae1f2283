"""Losses as sums over rows: the value, the gradient and the curvature with respect to the outputs.

A *row* is one prediction: an example of a classifier, or one token that is not ignored. Every loss here is
Σ ω_i ℓ_i / Σ ω_i over the rows of all the data. Batches contribute sums, and one division comes last, so
that ragged batches, class weights and ignored tokens give what one large batch would give.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from deepspectra.errors import CurvatureError, DataError, LossError, ShapeError, first_line


class Loss(ABC):
    """A mean over rows of a loss of (outputs, targets).

    Subclasses give `rows`, `total` and `weights`; gradient and curvature follow by automatic differentiation
    and are overridden where a closed form is better.
    """

    name: str

    def learn_layout(self, outputs: Tensor, targets: Tensor) -> bool:
        """Learn of a batch how outputs are read that fit two readings; whether it told, or nothing is to be told."""
        return True

    @abstractmethod
    def rows(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs (n, ...) and targets (n, ...), one row a prediction that counts; checks shapes."""

    @abstractmethod
    def total(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Σ ω_i ℓ_i over the rows, a scalar."""

    @abstractmethod
    def weights(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """ω (n,): what each row adds to the denominator."""

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """∂ total / ∂ outputs, of the outputs' shape."""
        with torch.enable_grad():
            leaf = outputs.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self.total(leaf, targets), leaf)
        return gradient

    def curvature(self, outputs: Tensor, targets: Tensor, tangents: Tensor) -> Tensor:
        """(∂² total / ∂ outputs²) applied to tangents, of the outputs' shape."""
        with torch.enable_grad():
            leaf = outputs.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self.total(leaf, targets), leaf, create_graph=True)
            if not gradient.requires_grad:
                return torch.zeros_like(outputs)
            try:
                (product,) = torch.autograd.grad(gradient, leaf, tangents, allow_unused=True)
            except RuntimeError as error:
                raise CurvatureError(
                    f"the loss {self.name!r} has no second derivative in the outputs ({first_line(error)}), "
                    "without which neither H nor G is known."
                ) from error
        return torch.zeros_like(outputs) if product is None else product

    def curvatures(self, outputs: Tensor, targets: Tensor, tangents: Tensor) -> Tensor:
        """`curvature` of each of several tangents, (K, ·) as they are."""
        return torch.stack([self.curvature(outputs, targets, one) for one in tangents])

    def settings(self) -> dict[str, Any]:
        """What was chosen of it, by name: numbers, words and tensors."""
        return _settings(self)

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Raise `DataError` when a target cannot be one, `LossError` when outputs do not fit the loss."""
        if targets.is_floating_point() and not torch.isfinite(targets).all():
            raise DataError("targets contain NaN or infinite values; every target must be finite.")


class MeanLoss(Loss):
    """Any callable (outputs, targets) → mean over the batch's rows; a batch counts by its rows.

    That it is a mean over rows is measured (`misfit`); a callable that is none is what it is on a single batch.
    """

    is_mean = False  # over rows, known beforehand

    def __init__(self, function: Callable[[Any, Tensor], Tensor], name: str | None = None) -> None:
        self.function = function
        self.name = name or str(getattr(function, "__name__", type(function).__name__))

    def rows(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """As given."""
        if outputs.ndim == 0:
            raise ShapeError("the model returns a scalar; it must return outputs with a batch dimension.")
        return outputs, targets

    def total(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean times the number of rows."""
        value = self.function(outputs, targets)
        if not isinstance(value, Tensor) or value.numel() != 1:
            given = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise LossError(
                f"the loss {self.name!r} returned {given}; it must return the mean over the batch, a scalar. "
                "Use reduction='mean'."
            )
        return value.reshape(()) * len(outputs)

    def weights(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """1 a row."""
        return constant(1, outputs)

    def settings(self) -> dict[str, Any]:
        """Those of the callable."""
        return _settings(self.function)

    def misfit(self, outputs: Tensor, targets: Tensor, generator: torch.Generator) -> float:
        """How far a batch's total is from those of a random third of its rows and of the rest, relatively.

        NaN where rows cannot be told apart.

        Of values and of gradients: near a minimum or a symmetric point the values alone say little. Outputs are dealt
        anew among the targets, since a fitted network's own losses may be nothing but rounding.

        Cost: values and gradients of the loss of the rows twice.
        """
        size = len(outputs)
        if size < 2 or not targets.ndim or (size % max(1, len(targets)) and len(targets) % size):
            return math.nan
        # So many rows of outputs belong with so many rows of targets.
        each = max(1, size // max(1, len(targets))), max(1, len(targets) // size)
        num = size // each[0]
        dealt = _rows_of(outputs, torch.randperm(num, generator=generator).to(outputs.device), each[0])
        order = torch.randperm(num, generator=generator).to(outputs.device)
        parts = order[: max(1, num // 3)], order[max(1, num // 3) :]
        try:
            (whole, slope), *others = [
                self._value_and_slope(_rows_of(dealt, part, each[0]), _rows_of(targets, part, each[1]))
                for part in (order, *parts)
            ]
        except Exception:  # a loss of batches of one size
            return math.nan
        values = torch.stack([value for value, _ in others])
        slopes = torch.cat([part for _, part in others])
        tiny = torch.finfo(torch.float64).tiny
        of_values = (whole - values.sum()).abs() / (whole.abs() + values.abs().sum()).clamp_min(tiny)
        of_slopes = (slope - slopes).norm() / (slope.norm() + slopes.norm()).clamp_min(tiny)
        return float(torch.stack([of_values, of_slopes]).max())  # NaN if either is

    def refuse_interacting_rows(self, outputs: Tensor, targets: Tensor) -> None:
        """Raise LossError if a tangent of one half of the rows has curvature in the other."""
        half = torch.arange(len(outputs), device=outputs.device) % 2 == 0
        tangents = torch.zeros_like(outputs)
        tangents[half] = torch.randn(
            tangents[half].shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64
        ).to(outputs)
        image = self.curvature(outputs, targets, tangents)
        if float(image[~half].norm()) > 1e-3 * float(image.norm()):
            raise LossError(
                f"the rows of a batch interact in the loss {self.name!r} (a contrast, a variance, a rank?), so that "
                "there are no losses and no gradients of single rows. H, G and R are known; the empirical Fisher "
                "matrix, Kronecker factors and errors are not."
            )

    def _value_and_slope(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return self.total(outputs, targets).detach().double(), self.gradient(outputs, targets).double()


def _rows_of(tensor: Tensor, units: Tensor, size: int) -> Tensor:
    """Rows of chosen units of so many consecutive rows."""
    rows: Tensor = tensor.reshape(-1, size, *tensor.shape[1:])[units].flatten(0, 1)
    return rows


class ElementwiseLoss(MeanLoss):
    """An nn loss that is a mean over all elements (L1, Huber, binary cross-entropy, …)."""

    def __init__(self, module: nn.Module) -> None:
        # Weights of elements are the same for all batches; those of examples fit one batch alone.
        self.is_mean = not isinstance(getattr(module, "weight", None), Tensor)
        summed = copy.deepcopy(module)
        summed.reduction = "sum"  # type: ignore[assignment]
        super().__init__(summed, type(module).__name__)
        self.module = summed

    def rows(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """As given, of one shape and type; of one example scalars too, as `squeeze` leaves them."""
        outputs, targets = (values if values.ndim else values[None] for values in (outputs, targets))
        if outputs.shape != targets.shape:
            raise ShapeError(
                f"{self.name}: outputs {tuple(outputs.shape)} and targets {tuple(targets.shape)} differ in shape, "
                "which PyTorch would broadcast. Reshape one to the other."
            )
        return outputs, targets.to(outputs)

    def total(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The sum over elements."""
        weights = {name: value.to(outputs) for name, value in self.module.named_buffers()}  # others share the module
        value: Tensor = torch.func.functional_call(self.module, weights, (outputs, targets))
        return value

    def weights(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The number of elements of each row."""
        return constant(outputs[0].numel() if len(outputs) else 1, outputs)


class SquaredError(ElementwiseLoss):
    """Mean over all elements of (z − y)², as `torch.nn.MSELoss`."""

    def __init__(self) -> None:
        super().__init__(nn.MSELoss())
        self.name = "mse"

    def rows(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs and targets (n, D)."""
        outputs, targets = super().rows(outputs, targets)
        return outputs.reshape(len(outputs), -1), targets.reshape(len(targets), -1)

    def total(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Σ (z − y)²."""
        return (outputs - targets).square().sum()

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """2 (z − y)."""
        return 2 * (outputs.detach() - targets)

    def curvature(self, outputs: Tensor, targets: Tensor, tangents: Tensor) -> Tensor:
        """2 t."""
        return 2 * tangents


def constant(value: float, outputs: Tensor) -> Tensor:
    """(n,) float64, whatever the dtype of the outputs: half precision cannot count to 257."""
    return torch.full((len(outputs),), float(value), dtype=torch.float64, device=outputs.device)


def _settings(of: object) -> dict[str, Any]:
    """Public numbers, words and tensors of a loss, a module or a partial, and of those within."""
    found = dict(getattr(of, "__dict__", {}))
    if isinstance(of, nn.Module):
        found |= dict(itertools.chain(of.named_buffers(), of.named_parameters()))
        del found["training"]
    elif isinstance(of, functools.partial):
        found |= {"of": getattr(of.func, "__name__", of.func), **of.keywords}
    chosen: dict[str, Any] = {}
    for name, value in found.items():
        if isinstance(value, (Loss, nn.Module, functools.partial)):
            chosen |= {f"{name}.{inner}": one for inner, one in _settings(value).items()}
        elif not name.startswith("_") and isinstance(value, (bool, int, float, str, Tensor, type(None))):
            chosen[name] = value
    return chosen

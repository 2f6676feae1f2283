"""Losses as sums over rows: the value, the gradient and the curvature with respect to the outputs.

A *row* is one prediction: an example of a classifier, or one token that is not ignored. Every loss here is
Σ ω_i ℓ_i / Σ ω_i over the rows of all the data. Batches contribute sums, and one division comes last, so
that ragged batches, class weights and ignored tokens give what one large batch would give.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from deepspectra.errors import DataError, LossError, ShapeError


class Loss(ABC):
    """A mean over rows of a loss of (outputs, targets).

    Subclasses give `rows`, `total` and `weights`; gradient and curvature follow by automatic differentiation
    and are overridden where a closed form is better.
    """

    name: str
    is_cross_entropy = False

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
            (product,) = torch.autograd.grad(gradient, leaf, tangents, allow_unused=True)
        return torch.zeros_like(outputs) if product is None else product

    def check_targets(self, targets: Tensor, num_classes: int) -> None:
        """Raise `DataError` when a target cannot be one."""
        if targets.is_floating_point() and not torch.isfinite(targets).all():
            raise DataError("targets contain NaN or infinite values; every target must be finite.")


class CrossEntropy(Loss):
    """Softmax cross-entropy with PyTorch's meaning of class weights, ignored index and label smoothing.

    Targets are class indices (n,), or class probabilities (n, C). Outputs may be (B, C), (B, C, ...) as
    `torch.nn.CrossEntropyLoss` takes them, or (B, ..., C) as language models give them. A batch that fits both
    readings is read as the others were, and if there are none, as PyTorch does.
    """

    name = "cross_entropy"
    is_cross_entropy = True

    def __init__(
        self, weight: Tensor | None = None, ignore_index: int = -100, label_smoothing: float = 0.0
    ) -> None:
        self.weight = None if weight is None else weight.detach()
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self._classes_last = False

    def rows(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (n, C) and labels (n,); ignored positions stay, with weight 0."""
        if outputs.ndim < 2:
            raise ShapeError(f"cross-entropy needs logits (B, C), got {tuple(outputs.shape)}.")
        if targets.is_floating_point():
            if targets.shape != outputs.shape or outputs.ndim != 2:
                raise ShapeError(
                    "floating-point targets are class probabilities and need the shape of the logits (B, C): "
                    f"got targets {tuple(targets.shape)} ({targets.dtype}) and logits {tuple(outputs.shape)}. "
                    "Class indices must have an integer dtype."
                )
            return outputs, targets
        if targets.dtype == torch.bool:
            raise DataError("cross-entropy targets are bool; pass class indices of dtype int64.")
        second = outputs.shape[2:] == targets.shape[1:] and outputs.shape[0] == targets.shape[0]
        last = outputs.shape[:-1] == targets.shape
        if second != last:
            self._classes_last = last
        if second or last:
            logits = outputs if last and (not second or self._classes_last) else outputs.movedim(1, -1)
        else:
            raise ShapeError(
                f"cross-entropy: logits {tuple(outputs.shape)} and targets {tuple(targets.shape)} do not match; "
                "expected (B, C) with (B,), (B, C, ...) with (B, ...), or (B, ..., C) with (B, ...)."
            )
        return logits.reshape(-1, logits.shape[-1]), targets.reshape(-1).long()

    def total(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Σ ω_i ℓ_i."""
        return F.cross_entropy(
            outputs,
            targets,
            weight=self._weight(outputs),
            ignore_index=self.ignore_index,
            reduction="sum",
            label_smoothing=self.label_smoothing,
        )

    def weights(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The class weight of each row's label; 1 without class weights or with soft targets; 0 if ignored."""
        if targets.is_floating_point():
            return outputs.new_ones(len(outputs))
        return self._counted(outputs, targets, self._weight(outputs))

    def curvature_weights(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """A (n,) with ∂²(Σ ω ℓ)/∂z_i² = a_i (diag p_i − p_i p_iᵀ)."""
        weight = self._weight(outputs)
        if weight is None:
            return self.weights(outputs, targets)
        smooth = weight.mean() * self.label_smoothing
        mixed = (1 - self.label_smoothing) * weight + smooth
        if targets.is_floating_point():
            return targets @ mixed
        return self._counted(outputs, targets, mixed)

    def curvature(self, outputs: Tensor, targets: Tensor, tangents: Tensor) -> Tensor:
        """a_i (p_i ∘ t − p_i (p_iᵀ t))."""
        p = outputs.detach().softmax(-1)
        centred = tangents - (p * tangents).sum(-1, keepdim=True)
        return self.curvature_weights(outputs, targets)[:, None] * p * centred

    def check_targets(self, targets: Tensor, num_classes: int) -> None:
        """Labels are integers in 0 … C−1."""
        super().check_targets(targets, num_classes)
        if targets.is_floating_point() or not targets.numel():
            return
        counted = targets[targets != self.ignore_index]
        if not counted.numel():
            return
        low, high = int(counted.min()), int(counted.max())
        if low < 0 or high >= num_classes:
            wrong = low if low < 0 else high
            raise DataError(
                f"label {wrong} is out of range: the model has {num_classes} outputs, so labels are "
                f"0 … {num_classes - 1}. Relabel the data, or name the padding label with "
                "loss=nn.CrossEntropyLoss(ignore_index=...)."
            )

    def labels(self, targets: Tensor) -> Tensor:
        """Class indices (n,); ignored rows, which have weight 0, are given class 0."""
        if targets.is_floating_point():
            raise LossError("class structure needs one class label an example, not class probabilities.")
        return targets.where(targets != self.ignore_index, 0)

    def _counted(self, outputs: Tensor, targets: Tensor, weight: Tensor | None) -> Tensor:
        kept = (targets != self.ignore_index).to(outputs)
        return kept if weight is None else kept * weight[self.labels(targets)]

    def _weight(self, like: Tensor) -> Tensor | None:
        if self.weight is None:
            return None
        if self.weight.shape != like.shape[-1:]:
            raise ShapeError(
                f"class weights have shape {tuple(self.weight.shape)} but the model has {like.shape[-1]} outputs."
            )
        return self.weight.to(like)


class SquaredError(Loss):
    """Mean over all elements of (z − y)², as `torch.nn.MSELoss`."""

    name = "mse"

    def rows(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs and targets (n, D)."""
        if outputs.shape != targets.shape:
            raise ShapeError(
                f"mse: outputs {tuple(outputs.shape)} and targets {tuple(targets.shape)} differ in shape, "
                "which PyTorch would broadcast. Reshape one to the other."
            )
        return outputs.reshape(len(outputs), -1), targets.reshape(len(targets), -1).to(outputs)

    def total(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Σ (z − y)²."""
        return (outputs - targets).square().sum()

    def weights(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The number of elements of each row."""
        return outputs.new_full((len(outputs),), outputs.shape[1])

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """2 (z − y)."""
        return 2 * (outputs.detach() - targets)

    def curvature(self, outputs: Tensor, targets: Tensor, tangents: Tensor) -> Tensor:
        """2 t."""
        return 2 * tangents


class MeanLoss(Loss):
    """Any callable (outputs, targets) → mean over the batch's rows; a batch counts by its rows.

    Exact over unequal batches when the callable is a plain mean over rows. `EmpiricalFisher` further needs
    rows that do not interact.
    """

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
        return outputs.new_ones(len(outputs))


class ElementwiseLoss(MeanLoss):
    """An nn loss that is a mean over all elements (L1, Huber, binary cross-entropy, …)."""

    def __init__(self, module: nn.Module) -> None:
        summed = copy.deepcopy(module)
        summed.reduction = "sum"  # type: ignore[assignment]
        super().__init__(summed, type(module).__name__)

    def total(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The sum over elements."""
        value: Tensor = self.function(outputs, targets)
        return value

    def weights(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The number of elements of each row."""
        return outputs.new_full((len(outputs),), outputs[0].numel() if len(outputs) else 1)


class NegativeLogLikelihood(MeanLoss):
    """`nn.NLLLoss` on log-probabilities (n, C), with class weights and ignored index."""

    def __init__(self, module: nn.NLLLoss) -> None:
        super().__init__(module, "NLLLoss")
        self.weight = module.weight
        self.ignore_index = module.ignore_index

    def total(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Σ ω_i ℓ_i."""
        weight = None if self.weight is None else self.weight.to(outputs)
        return F.nll_loss(outputs, targets, weight, ignore_index=self.ignore_index, reduction="sum")

    def weights(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The class weight of each label; 0 if ignored."""
        kept = targets != self.ignore_index
        if self.weight is None:
            return kept.to(outputs)
        return kept * self.weight.to(outputs)[targets.where(kept, 0)]


ELEMENTWISE = (
    nn.L1Loss,
    nn.SmoothL1Loss,
    nn.HuberLoss,
    nn.BCELoss,
    nn.BCEWithLogitsLoss,
    nn.PoissonNLLLoss,
    nn.SoftMarginLoss,
)


NAMED: dict[str, type[Loss]] = {"cross_entropy": CrossEntropy, "mse": SquaredError}


def resolve(loss: str | nn.Module | Callable[[Any, Tensor], Tensor] | Loss) -> Loss:
    """The `Loss` for what a user may give: a name, an nn loss module, or a callable."""
    if isinstance(loss, Loss):
        return loss
    if isinstance(loss, str):
        if loss not in NAMED:
            raise LossError(f"unknown loss {loss!r}; known names: {', '.join(NAMED)}; or pass a callable.")
        return NAMED[loss]()
    if not callable(loss):
        raise LossError(f"a loss is a name, an nn loss module or a callable, not {type(loss).__name__}.")
    reduction = getattr(loss, "reduction", "mean")
    if reduction not in ("mean", "batchmean"):
        raise LossError(
            f"{type(loss).__name__} has reduction={reduction!r}; the loss must be a mean over the examples: "
            "use reduction='mean'."
        )
    match loss:
        case nn.CrossEntropyLoss():
            found: Loss = CrossEntropy(loss.weight, loss.ignore_index, loss.label_smoothing)
        case nn.MSELoss():
            found = SquaredError()
        case nn.NLLLoss():
            found = NegativeLogLikelihood(loss)
        case _ if isinstance(loss, ELEMENTWISE):
            found = ElementwiseLoss(loss)
        case _:
            found = MeanLoss(loss)
    return found

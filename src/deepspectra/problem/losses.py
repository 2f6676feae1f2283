"""Losses as sums over rows: the value, the gradient and the curvature with respect to the outputs.

A *row* is one prediction: an example of a classifier, or one token that is not ignored. Every loss here is
Σ ω_i ℓ_i / Σ ω_i over the rows of all the data. Batches contribute sums, and one division comes last, so
that ragged batches, class weights and ignored tokens give what one large batch would give.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from deepspectra.errors import CurvatureError, DataError, LossError, ShapeError, first_line


class Loss(ABC):
    """A mean over rows of a loss of (outputs, targets).

    Subclasses give `rows`, `total` and `weights`; gradient and curvature follow by automatic differentiation
    and are overridden where a closed form is better.
    """

    name: str
    is_cross_entropy = False
    is_mean = True  # over rows, known beforehand
    unsettled = False  # the last outputs could be read in two ways, and no others told how

    def settle(self) -> None:
        """Settle how outputs that can be read in two ways are read."""
        self.unsettled = False

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
                    f"the loss {self.name!r} has no second derivative in the outputs "
                    f"({first_line(error)}), without which "
                    "neither H nor G is known."
                ) from error
        return torch.zeros_like(outputs) if product is None else product

    def rows_interact(self, outputs: Tensor, targets: Tensor) -> bool:
        """Whether the gradient of one half of the rows changes with the outputs of the other. Cost: one curvature."""
        return False

    def misfit(self, outputs: Tensor, targets: Tensor, generator: torch.Generator) -> float:
        """How far a batch's total is from the totals of its rows in two parts, relatively; 0 for sums over rows."""
        return 0.0

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Raise `DataError` when a target cannot be one, `LossError` when outputs do not fit the loss."""
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
        if weight is not None and not bool(((weight >= 0) & weight.isfinite()).all()):
            raise LossError(f"class weights must be finite and not negative, got {weight.tolist()}.")
        self.weight = None if weight is None else weight.detach()
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self._classes_last: bool | None = None  # for outputs that fit both readings; None if not yet known
        self.unsettled = False

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
        self.unsettled = second and last and outputs.ndim > 2 and self._classes_last is None
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
        return self._each(outputs, targets).sum()

    def _each(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """ω_i ℓ_i (n,).

        Of labels as log(1 + Σ_{k≠y} exp(z_k − z_y)): 1 − p_y, of which the derivatives of a fitted network are
        made, is never a difference, and keeps its digits however small it is.
        """
        if targets.is_floating_point() or self.label_smoothing:
            return F.cross_entropy(
                outputs,
                targets,
                weight=self._weight(outputs),
                ignore_index=self.ignore_index,
                reduction="none",
                label_smoothing=self.label_smoothing,
            )
        labels = CrossEntropy.labels(self, targets)[:, None]
        ahead = (outputs - outputs.gather(1, labels)).scatter(1, labels, -math.inf)
        most = ahead.detach().amax(1).clamp_min(0)  # the loss does not depend on it
        losses = most + ((ahead - most[:, None]).exp().sum(1) + (-most).expm1()).log1p()
        return losses * CrossEntropy.weights(self, outputs, targets).to(losses)

    def weights(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The class weight of each row's label; 1 without class weights or with soft targets; 0 if ignored."""
        if targets.is_floating_point():
            return _constant(1, outputs)
        return self._counted(targets, self._weight(outputs))

    def curvature_weights(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """A (n,) with ∂²(Σ ω ℓ)/∂z_i² = a_i (diag p_i − p_i p_iᵀ)."""
        weight = self._weight(outputs)
        if weight is None:
            return CrossEntropy.weights(self, outputs, targets)
        smooth = weight.mean() * self.label_smoothing
        mixed = (1 - self.label_smoothing) * weight + smooth
        if targets.is_floating_point():
            return (targets @ mixed).double()
        return self._counted(targets, mixed)

    def curvature(self, outputs: Tensor, targets: Tensor, tangents: Tensor) -> Tensor:
        """a_i (p_i ∘ t − p_i (p_iᵀ t)), with t counted from the likeliest class, which changes rounding alone."""
        p = outputs.detach().softmax(-1)
        tangents = tangents - tangents.gather(-1, p.argmax(-1, keepdim=True))
        centred = tangents - (p * tangents).sum(-1, keepdim=True)
        return self.curvature_weights(outputs, targets)[:, None].to(p) * p * centred

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Labels are integers in 0 … C−1; soft targets are probabilities."""
        super().check(outputs, targets)
        num_classes = outputs.shape[1]
        if targets.is_floating_point():
            if (targets < 0).any() or (targets.sum(1) - 1).abs().max() > 1e-3:
                raise DataError(
                    "floating-point targets of cross-entropy must be probabilities: non-negative, with rows that "
                    "sum to 1. For labels that do not exclude each other use loss=nn.BCEWithLogitsLoss()."
                )
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

    def settle(self) -> None:
        """Read outputs that fit both readings as PyTorch does from now on."""
        self._classes_last, self.unsettled = False, False

    def labels(self, targets: Tensor) -> Tensor:
        """Class indices (n,); ignored rows, which have weight 0, are given class 0."""
        if targets.is_floating_point():
            raise LossError("class structure needs one class label an example, not class probabilities.")
        return targets.where(targets != self.ignore_index, 0)

    def _counted(self, targets: Tensor, weight: Tensor | None) -> Tensor:
        kept = (targets != self.ignore_index).double()
        return kept if weight is None else kept * weight[CrossEntropy.labels(self, targets)]

    def _weight(self, like: Tensor) -> Tensor | None:
        if self.weight is None:
            return None
        if self.weight.shape != like.shape[-1:]:
            raise ShapeError(
                f"class weights have shape {tuple(self.weight.shape)} but the model has {like.shape[-1]} outputs."
            )
        return self.weight.to(like)


class DrawnCrossEntropy(CrossEntropy):
    """Cross-entropy of a sample in which each row has a weight: targets are (n, 2), labels beside weights."""

    def __init__(self, base: CrossEntropy) -> None:
        super().__init__(base.weight, base.ignore_index, base.label_smoothing)

    def rows(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (n, C) and targets (n, 2)."""
        super().rows(outputs, targets[:, 0].long())
        return outputs, targets

    def total(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Σ m_i ω_i ℓ_i."""
        losses = self._each(outputs, targets[:, 0].long())
        return (targets[:, 1].to(losses) * losses).sum()

    def weights(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """m_i ω_i."""
        return targets[:, 1] * super().weights(outputs, targets[:, 0].long())

    def curvature_weights(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """m_i a_i, with a_i of the loss without drawing."""
        return targets[:, 1] * super().curvature_weights(outputs, targets[:, 0].long())

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """As without drawing."""
        super().check(outputs, targets[:, 0].long())

    def labels(self, targets: Tensor) -> Tensor:
        """Class indices (n,)."""
        return super().labels(targets[:, 0].long())


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
        return _constant(outputs.shape[1], outputs)

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """2 (z − y)."""
        return 2 * (outputs.detach() - targets)

    def curvature(self, outputs: Tensor, targets: Tensor, tangents: Tensor) -> Tensor:
        """2 t."""
        return 2 * tangents


class MeanLoss(Loss):
    """Any callable (outputs, targets) → mean over the batch's rows; a batch counts by its rows.

    That it is a mean over rows is measured (`misfit`); a callable that is none is what it is on a single batch.
    """

    is_mean = False

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
        return _constant(1, outputs)

    def misfit(self, outputs: Tensor, targets: Tensor, generator: torch.Generator) -> float:
        """The same, by cutting the rows at random into a third and the rest; NaN where they cannot be told apart.

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

    def rows_interact(self, outputs: Tensor, targets: Tensor) -> bool:
        """As said there: a tangent of one half has curvature in the other."""
        half = torch.arange(len(outputs), device=outputs.device) % 2 == 0
        tangents = torch.zeros_like(outputs)
        tangents[half] = torch.randn(
            tangents[half].shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64
        ).to(outputs)
        image = self.curvature(outputs, targets, tangents)
        return float(image[~half].norm()) > 1e-3 * float(image.norm())

    def _value_and_slope(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return self.total(outputs, targets).detach().double(), self.gradient(outputs, targets).double()


def _rows_of(tensor: Tensor, units: Tensor, size: int) -> Tensor:
    """Rows of chosen units of so many consecutive rows."""
    rows: Tensor = tensor.reshape(-1, size, *tensor.shape[1:])[units].flatten(0, 1)
    return rows


class ElementwiseLoss(MeanLoss):
    """An nn loss that is a mean over all elements (L1, Huber, binary cross-entropy, …)."""

    def __init__(self, module: nn.Module) -> None:
        self.is_mean = not isinstance(
            getattr(module, "weight", None), Tensor
        )  # one of examples fits one batch alone
        summed = copy.deepcopy(module)
        summed.reduction = "sum"  # type: ignore[assignment]
        super().__init__(summed, type(module).__name__)
        self.module = summed

    def rows(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """As given, of one shape and type."""
        if outputs.shape != targets.shape:
            raise ShapeError(
                f"{self.name}: outputs {tuple(outputs.shape)} and targets {tuple(targets.shape)} differ in shape, "
                "which PyTorch would broadcast. Reshape one to the other."
            )
        return outputs, targets.to(outputs)

    def total(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The sum over elements."""
        value: Tensor = self.module.to(outputs)(outputs, targets)
        return value

    def weights(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The number of elements of each row."""
        return _constant(outputs[0].numel() if len(outputs) else 1, outputs)


class NegativeLogLikelihood(CrossEntropy):
    """`nn.NLLLoss` on log-probabilities: the cross-entropy, since log-softmax leaves log-probabilities as they are.

    So G is the Fisher matrix here too, and not zero, as it would be with log-probabilities for outputs.
    """

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """As for cross-entropy; and outputs are normalised."""
        super().check(outputs, targets)
        if len(outputs) and outputs.double().logsumexp(1).abs().max() > 1e-2:
            raise LossError(
                "NLLLoss needs log-probabilities, and the model's outputs are not (their exponentials do not sum "
                "to 1). End the model with LogSoftmax, or use loss='cross_entropy' on logits."
            )


def _constant(value: float, outputs: Tensor) -> Tensor:
    """(n,) float64, whatever the dtype of the outputs: half precision cannot count to 257."""
    return torch.full((len(outputs),), float(value), dtype=torch.float64, device=outputs.device)


ELEMENTWISE = (
    nn.L1Loss,
    nn.SmoothL1Loss,
    nn.HuberLoss,
    nn.BCELoss,
    nn.BCEWithLogitsLoss,
    nn.PoissonNLLLoss,
    nn.SoftMarginLoss,
)
FUNCTIONS: tuple[tuple[Any, type[nn.Module]], ...] = (  # and the module that each is the function of
    (F.cross_entropy, nn.CrossEntropyLoss),
    (F.nll_loss, nn.NLLLoss),
    (F.mse_loss, nn.MSELoss),
    (F.l1_loss, nn.L1Loss),
    (F.smooth_l1_loss, nn.SmoothL1Loss),
    (F.huber_loss, nn.HuberLoss),
    (F.binary_cross_entropy, nn.BCELoss),
    (F.binary_cross_entropy_with_logits, nn.BCEWithLogitsLoss),
    (F.poisson_nll_loss, nn.PoissonNLLLoss),
    (F.soft_margin_loss, nn.SoftMarginLoss),
)
NAMED: dict[str, type[Loss]] = {"cross_entropy": CrossEntropy, "mse": SquaredError}


def resolve(loss: str | nn.Module | Callable[[Any, Tensor], Tensor] | Loss) -> Loss:
    """The `Loss` for what a user may give: a name, an nn loss module, or a callable.

    Functions of `torch.nn.functional`, and `functools.partial` of them, are read as the modules of these arguments.
    """
    if isinstance(loss, Loss):
        return loss
    if isinstance(loss, str):
        if loss not in NAMED:
            raise LossError(f"unknown loss {loss!r}; known names: {', '.join(NAMED)}; or pass a callable.")
        return NAMED[loss]()
    if not callable(loss):
        raise LossError(f"a loss is a name, an nn loss module or a callable, not {type(loss).__name__}.")
    given = _module_of(loss)
    reduction = getattr(given, "reduction", "mean")
    if reduction not in ("mean", "batchmean"):
        raise LossError(
            f"{type(given).__name__} has reduction={reduction!r}; the loss must be a mean over the examples: "
            "use reduction='mean'."
        )
    plain = type(given)  # not isinstance: a subclass may compute something else
    if isinstance(given, nn.CrossEntropyLoss) and plain is nn.CrossEntropyLoss:
        found: Loss = CrossEntropy(given.weight, given.ignore_index, given.label_smoothing)
    elif isinstance(given, nn.NLLLoss) and plain is nn.NLLLoss:
        found = NegativeLogLikelihood(given.weight, given.ignore_index)
    elif plain is nn.MSELoss:
        found = SquaredError()
    elif isinstance(given, nn.Module) and plain in ELEMENTWISE:
        found = ElementwiseLoss(given)
    else:
        found = MeanLoss(given)
    return found


def _module_of(loss: Any) -> Any:
    """The nn module that a function of torch.nn.functional, or a partial of one, is; anything else as it is."""
    function: Any = loss
    options: dict[str, Any] = {}
    while isinstance(function, functools.partial) and not function.args:
        function, options = function.func, {**function.keywords, **options}
    for known, module in FUNCTIONS:
        if function is known and set(options) <= set(inspect.signature(module).parameters):
            return module(**options)
    return loss

"""Softmax cross-entropy: of labels or probabilities, of log-probabilities, and of a weighted sample."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from deepspectra.errors import DataError, LossError, ShapeError
from deepspectra.problem.label_losses import label_losses
from deepspectra.problem.losses import Loss, constant

FEW_CLASSES = 16  # fewer than what a processor's vectors hold


class CrossEntropy(Loss):
    """Softmax cross-entropy with PyTorch's meaning of class weights, ignored index and label smoothing.

    Targets are class indices (n,), or class probabilities (n, C). Outputs may be (B, C), (B, C, ...) as
    `torch.nn.CrossEntropyLoss` takes them, or (B, ..., C) as language models give them. A batch that fits both
    readings is read as the others were, and if there are none, as PyTorch does.
    """

    name = "cross_entropy"

    def __init__(self, weight: Tensor | None = None, ignore_index: int = -100, label_smoothing: float = 0.0) -> None:
        if weight is not None and not bool(((weight >= 0) & weight.isfinite()).all()):
            raise LossError(f"class weights must be finite and not negative, got {weight.tolist()}.")
        self.weight = None if weight is None else weight.detach()
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self._classes_last = False  # of outputs that fit both readings

    def rows(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (n, C) and labels (n,); ignored positions stay, with weight 0."""
        if outputs.ndim < 2:
            raise ShapeError(f"cross-entropy needs logits (B, C), got {tuple(outputs.shape)}.")
        if targets.is_floating_point():
            if targets.shape != outputs.shape or outputs.ndim != 2:
                raise ShapeError(
                    "floating-point targets are class probabilities and need the shape of the logits (B, C): "
                    f"got targets {tuple(targets.shape)} ({targets.dtype}) and logits {tuple(outputs.shape)}. "
                    "Class indices must have an integer dtype; for regression say loss='mse'."
                )
            return outputs, targets
        if targets.dtype == torch.bool:
            raise DataError("cross-entropy targets are bool; pass class indices of dtype int64.")
        second, last = _readings(outputs, targets)
        if not second and not last:
            raise ShapeError(
                f"cross-entropy: logits {tuple(outputs.shape)} and targets {tuple(targets.shape)} do not match; "
                "expected (B, C) with (B,), (B, C, ...) with (B, ...), or (B, ..., C) with (B, ...). "
                "Pass y.squeeze(1) of labels (B, 1), and y.argmax(1) of one-hot labels (B, C)."
            )
        logits = outputs if last and (not second or self._classes_last) else outputs.movedim(1, -1)
        return logits.reshape(-1, logits.shape[-1]), targets.reshape(-1).long()

    def learn_layout(self, outputs: Tensor, targets: Tensor) -> bool:
        """Where the classes are, if the batch fits one reading alone."""
        second, last = _readings(outputs, targets)
        if second and last:
            return outputs.ndim == 2
        self._classes_last = last
        return True

    def total(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Σ ω_i ℓ_i."""
        return self.each(outputs, targets).sum()

    def each(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """ω_i ℓ_i (n,).

        Of labels as `label_losses`, which keep their digits however well a network fits.
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
        losses = label_losses(outputs, self.labels(targets))
        return losses * self.weights(outputs, targets).to(losses)

    def weights(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The class weight of each row's label; 1 without class weights or with soft targets; 0 if ignored."""
        if targets.is_floating_point():
            return constant(1, outputs)
        return self._counted(targets, self._weight(outputs))

    def curvature_weights(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """A (n,) with ∂²(Σ ω ℓ)/∂z_i² = a_i (diag p_i − p_i p_iᵀ)."""
        weight = self._weight(outputs)
        if weight is None:
            return self.weights(outputs, targets)
        smooth = weight.mean() * self.label_smoothing
        mixed = (1 - self.label_smoothing) * weight + smooth
        if targets.is_floating_point():
            return (targets @ mixed).double()
        return self._counted(targets, mixed)

    def curvature(self, outputs: Tensor, targets: Tensor, tangents: Tensor) -> Tensor:
        """a_i (p_i ∘ t − p_i (p_iᵀ t))."""
        return self.curvatures(outputs, targets, tangents[None])[0]

    def curvatures(self, outputs: Tensor, targets: Tensor, tangents: Tensor) -> Tensor:
        """That of each of several, with t counted from the likeliest class, which changes rounding alone."""
        p = _probabilities(outputs.detach())
        likeliest = p.argmax(-1, keepdim=True)
        tangents = tangents - tangents.gather(-1, likeliest.expand(len(tangents), -1, -1))
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

    def labels(self, targets: Tensor) -> Tensor:
        """Class indices (n,); ignored rows, which have weight 0, are given class 0."""
        if targets.is_floating_point():
            raise LossError("class structure needs one class label an example, not class probabilities.")
        return targets.where(targets != self.ignore_index, 0)

    def _counted(self, targets: Tensor, weight: Tensor | None) -> Tensor:
        kept = (targets != self.ignore_index).double()
        return kept if weight is None else kept * weight[self.labels(targets)]

    def _weight(self, like: Tensor) -> Tensor | None:
        if self.weight is None:
            return None
        if self.weight.shape != like.shape[-1:]:
            raise ShapeError(
                f"class weights have shape {tuple(self.weight.shape)} but the model has {like.shape[-1]} outputs."
            )
        return self.weight.to(like)


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


class DrawnCrossEntropy(CrossEntropy):
    """A cross-entropy of a sample in which each row has a weight m: targets are (n, 2), labels beside weights."""

    def __init__(self, base: CrossEntropy) -> None:
        super().__init__(base.weight, base.ignore_index, base.label_smoothing)
        self.base = base

    def rows(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (n, C) and targets (n, 2)."""
        self.base.rows(outputs, self._drawn(targets)[0])
        return outputs, targets

    def each(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """m_i ω_i ℓ_i (n,)."""
        labels, times = self._drawn(targets)
        losses = self.base.each(outputs, labels)
        return times.to(losses) * losses

    def weights(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """m_i ω_i."""
        labels, times = self._drawn(targets)
        return times * self.base.weights(outputs, labels)

    def curvature_weights(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """m_i a_i, with a_i of the loss without drawing."""
        labels, times = self._drawn(targets)
        return times * self.base.curvature_weights(outputs, labels)

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """As without drawing."""
        self.base.check(outputs, self._drawn(targets)[0])

    def labels(self, targets: Tensor) -> Tensor:
        """Class indices (n,)."""
        return self.base.labels(self._drawn(targets)[0])

    @staticmethod
    def _drawn(targets: Tensor) -> tuple[Tensor, Tensor]:
        return targets[:, 0].long(), targets[:, 1]


def _readings(outputs: Tensor, targets: Tensor) -> tuple[bool, bool]:
    """Whether outputs can be (B, C, ...), and (B, ..., C), for these targets (B, ...)."""
    second = outputs.shape[2:] == targets.shape[1:] and outputs.shape[0] == targets.shape[0]
    return second, outputs.shape[:-1] == targets.shape


def _probabilities(outputs: Tensor) -> Tensor:
    """Softmax (n, C); of few classes along columns, where it is vectorised over rows and takes a fifth."""
    return outputs.softmax(-1) if outputs.shape[-1] >= FEW_CLASSES else outputs.T.contiguous().softmax(0).T

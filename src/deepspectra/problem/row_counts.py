"""Which rows outputs and targets are, how many they are, and whether the loss is a mean over them."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from deepspectra.errors import DataError, FallbackWarning, LossError, NonFiniteError
from deepspectra.problem.batch_trees import map_tensors, tensors
from deepspectra.problem.batches import Batches, Pair
from deepspectra.problem.evaluated_model import Evaluated, Tree, Trial, stamps
from deepspectra.problem.input_checks import CALLER, check_finite, check_outputs, reported, shapes_of
from deepspectra.problem.losses import Loss, MeanLoss

FEW_ROWS = 32  # of each batch, on which a loss is compared with a mean over rows
MISFIT = {torch.float64: 1e-9, torch.float32: 1e-4}  # relative, of the loss of a batch to those of its parts
MISFIT_HALF = 0.05
JUDGED = 8  # batches on each of which a loss is compared with a mean over rows,
LARGEST = 2**21  # and so many outputs of all together at most


def settle_layout(module: Evaluated, batches: Batches, loss: Loss, parameters: Tree) -> Trial:
    """Evaluate batches until it is settled how outputs are read; the first with rows, and what it gives."""
    first: Trial | None = None
    is_known = False
    before = stamps(module.model, "_buffers")
    for batch in batches:
        try:
            pair = _first_values(module, parameters, batch)
        except DataError:
            # It may run on all examples alone, as on the nodes of a graph.
            if first is not None or batches.num_batches == 1 or batches.held is None or not batches.join():
                raise
            return settle_layout(module, batches, loss, parameters)
        rows, _ = loss.rows(*pair)
        if not len(rows):
            continue
        first = first or Trial(batch, pair)
        is_known = loss.learn_layout(*pair)
        if is_known:
            break
    if first is None:
        raise DataError("no row counts: the model gives no outputs for any batch.")
    seen = stamps(module.model, "_buffers") | before
    module.written = {name for name, stamp in seen.items() if name not in before or not stamp.holds()}
    if not is_known:
        warnings.warn(
            "every batch gives outputs that fit both (B, C, ...) and (B, ..., C), the first of them "
            f"{tuple(first.pair[0].shape)}; they are read as (B, C, ...), as nn.CrossEntropyLoss does. If classes "
            "are last, pass forward=lambda model, batch: (model(batch[0]).flatten(0, -2), batch[1].flatten()); if "
            "they are second, .movedim(1, -1) before .flatten says so.",
            FallbackWarning,
            stacklevel=CALLER,
        )
    return first


def _first_values(module: Evaluated, parameters: Tree, batch: Any) -> Pair:
    """Outputs and targets of a batch; notes whether the network takes derivatives itself, or writes into it."""
    twin = map_tensors(Tensor.clone, batch)
    versions = [leaf._version for leaf in tensors(twin)]
    dtype = next(iter(parameters.values())).dtype
    with reported(DataError, f"the model, which is in {dtype}, failed on a batch of {shapes_of(batch)}"):
        try:
            pair = module.values(parameters, twin)
        except RuntimeError:
            module.differentiates = True
            try:
                pair = module.values(parameters, map_tensors(Tensor.clone, batch))
            except Exception:
                module.differentiates = False
            if not module.differentiates:
                raise
    module.writes = module.writes or [leaf._version for leaf in tensors(twin)] != versions
    return pair


@dataclass
class Count:
    """What a pass over the data finds."""

    num_rows: int = 0  # that count
    total_weight: float = 0.0  # Σ ω_i
    num_classes: int = 0  # outputs of a row
    # how far the loss is from a mean over rows, of each batch and of a few rows of all; NaN where it cannot be told
    misfits: list[float] = field(default_factory=list)

    def misfit(self, dtype: torch.dtype) -> float:
        """How far the loss is from a mean over rows beyond the rounding of the type; NaN if nothing could be told."""
        known = [misfit for misfit in self.misfits if not math.isnan(misfit)]
        worst = max(known, default=math.nan if self.misfits else 0.0)
        return 0.0 if worst <= MISFIT.get(dtype, MISFIT_HALF) else worst


def count_rows(module: Evaluated, batches: Batches, loss: Loss, parameters: Tree, first: Trial | None) -> Count:
    """Check shapes, labels and finiteness of every batch, and count; what the `first` gives is known."""
    found, generator = Count(), torch.Generator().manual_seed(0)
    value, several, room = 0.0, [], LARGEST
    doubted = loss if isinstance(loss, MeanLoss) and not loss.is_mean else None
    for batch in batches:
        known = first.pair if first is not None and batch is first.batch else None
        outputs, targets = loss.rows(*(known or module.values(parameters, batch)))
        check_finite(batch)
        found.num_classes = outputs.shape[1] if outputs.ndim > 1 else 1
        check_outputs(outputs)
        if not len(outputs):
            continue
        loss.check(outputs, targets)
        weights = loss.weights(outputs, targets).double()
        found.num_rows += int((weights > 0).sum())
        found.total_weight += float(weights.sum())
        failure = f"the loss {loss.name!r} failed on {shapes_of((outputs, targets))}"
        with reported(LossError, failure), torch.no_grad():
            value += float(loss.total(outputs, targets).double())
        if doubted is not None:
            judged = outputs, targets
            if len(outputs) == len(targets):
                # Rows of all batches, and of a few some more: a loss is no mean even if only rare rows show it.
                most = max(1, min(FEW_ROWS, LARGEST // (batches.num_batches * max(1, outputs[0].numel()))))
                order = torch.randperm(len(outputs), generator=generator).to(outputs.device)
                some = order[:most]
                if outputs[some].numel() <= room:
                    room -= outputs[some].numel()
                    several.append((outputs[some], targets[some]))
                if outputs.numel() > LARGEST:
                    more = order[: max(2, LARGEST // outputs[0].numel())]
                    judged = outputs[more], targets[more]
            if len(found.misfits) < JUDGED and len(outputs) > 1:
                found.misfits.append(doubted.misfit(*judged, generator))
    if found.total_weight <= 0:
        raise DataError("no row counts: every target is ignored or has weight 0.")
    if not math.isfinite(value):
        raise NonFiniteError("the loss is NaN or infinite on this data.")
    if doubted is not None and len(several) > 1 and len({(o.shape[1:], t.shape[1:]) for o, t in several}) == 1:
        outputs, targets = (torch.cat(column) for column in zip(*several, strict=True))
        found.misfits.append(doubted.misfit(outputs, targets, generator))
    return found


def join_batches(batches: Batches, misfit: float, loss: Loss) -> None:
    """Make one batch of all examples, for a loss that is no mean over rows; refuse several that the user chose."""
    if batches.join():
        return
    if misfit > 0:
        raise LossError(
            f"the loss {loss.name!r} is no mean over rows: of a batch cut in two it differs by {misfit:.2g} from the "
            "sum of its parts, relatively, so that results would depend on how the data is cut into batches. Use a "
            "mean over rows; for class weights, an ignored label or label smoothing pass "
            "nn.CrossEntropyLoss(weight=..., ignore_index=...) itself; or pass the data as one batch, data=[(x, y)], "
            "on which any loss is well defined."
        )
    warnings.warn(
        f"whether the loss {loss.name!r} is a mean over rows cannot be told from its outputs and targets; batches "
        "are weighted by their rows as if it were. If it is not, pass one batch.",
        FallbackWarning,
        stacklevel=CALLER + 1,
    )

"""What is found out of a model, its data and its loss before anything is computed from them.

How outputs are read, whether batches may be cut, whether the loss is a mean over rows, and that the gradient has no
way to the parameters that is missed.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from deepspectra.errors import (
    CurvatureError,
    DataError,
    FallbackWarning,
    LossError,
    NondeterminismError,
    NonFiniteError,
    OptionError,
    ParameterError,
)
from deepspectra.problem.batches import Batches, is_pair, map_tensors, tensors
from deepspectra.problem.checks import (
    AGREE,
    AGREE_HALF,
    Rows,
    check_finite,
    examples_are_rows,
    influence,
    reported,
    told,
)
from deepspectra.problem.evaluation import Evaluated, gradient, nodes, reached, twins
from deepspectra.problem.losses import Loss
from deepspectra.problem.memory import saved_by

FEW_ROWS = 32  # of each batch, on which a loss is compared with a mean over rows
MISFIT = {torch.float64: 1e-9, torch.float32: 1e-4}  # relative, of the loss of a batch to those of its parts
MISFIT_HALF = 0.05
FEWEST = 2  # examples of a batch that tell whether others of it matter
JUDGED = 8  # batches on each of which a loss is compared with a mean over rows,
LARGEST = 2**21  # and so many outputs of all together at most
CHECKPOINTS = "activation checkpointing must be off"
CALLER = 3  # frames up from a warning given here to the code that made the problem
Pair = tuple[Tensor, Tensor]
Tree = dict[str, Tensor]


# -- how outputs are read ------------------------------------------------------------------------------------


def settle(module: Evaluated, batches: Batches, loss: Loss, parameters: Tree) -> tuple[Any, Pair]:
    """Evaluate batches until it is settled how outputs are read; the first with rows, and what it gives.

    Raises:
        DataError: the model fails.
    """
    first: tuple[Any, Pair] | None = None
    is_known = False
    before = _places(module.model)
    for batch in batches:
        try:
            pair = _first_values(module, parameters, batch)
        except DataError:
            # It may run on all examples alone, as on the nodes of a graph.
            if first is not None or batches.num_batches == 1 or batches.held is None or not batches.join():
                raise
            return settle(module, batches, loss, parameters)
        rows, _ = loss.rows(*pair)
        if not len(rows):
            continue
        first = (batch, pair) if first is None else first
        is_known = loss.learn_layout(*pair)
        if is_known:
            break
    if first is None:
        raise DataError("no row counts: the model gives no outputs for any batch.")
    after = _places(module.model)
    module.written = {name for name in before | after if before.get(name) != after.get(name)}
    if not is_known:
        warnings.warn(
            "every batch gives outputs that fit both (B, C, ...) and (B, ..., C), the first of them "
            f"{tuple(first[1][0].shape)}; they are read as (B, C, ...), as nn.CrossEntropyLoss does. If classes are "
            "last, pass forward=lambda model, batch: (model(batch[0]).flatten(0, -2), batch[1].flatten()); if they "
            "are second, .movedim(1, -1) before .flatten says so.",
            FallbackWarning,
            stacklevel=CALLER,
        )
    return first


def _places(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Which tensor each buffer is, and how often it was written to."""
    return {name: (id(buffer), buffer._version) for name, buffer in model.named_buffers()}


def _first_values(module: Evaluated, parameters: Tree, batch: Any) -> Pair:
    """Outputs and targets of a batch; notes whether the network takes derivatives itself, or writes into it."""
    twin = map_tensors(Tensor.clone, batch)
    versions = [leaf._version for leaf in tensors(twin)]
    dtype = next(iter(parameters.values())).dtype
    with reported(DataError, f"the model, which is in {dtype}, failed on a batch of {told(batch)}"):
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


# -- whether batches may be cut ------------------------------------------------------------------------------


def arrange(
    module: Evaluated, batches: Batches, parameters: Tree, start: Any, pair: Pair, mode: str
) -> tuple[Any, Pair, bool]:
    """Make one batch of all examples where they may not be cut; the first batch, its outputs, and if it may be cut.

    Raises:
        DataError: examples influence each other, and are not all in one batch that the user gave.
        OptionError: mode "train" and several batches.
    """

    def evaluate(batch: Any) -> Pair:
        return module.values(parameters, batch)

    dtype, tried, outputs = next(iter(parameters.values())).dtype, start, pair[0]
    if mode == "eval" and _num_first(start) < FEWEST and batches.num_batches > 1:  # one example tells nothing
        tried = next((batch for batch in batches if _num_first(batch) >= FEWEST), start)
        outputs = outputs if tried is start else evaluate(tried)[0]
    kind = examples_are_rows(evaluate, tried, outputs, dtype) if mode == "eval" else Rows.WHOLE
    if kind is Rows.INFLUENCED:
        _check_outputs(outputs)
        _check_same(outputs, evaluate(tried)[0])
        if not batches.brought or batches.num_batches > 1:
            raise DataError(influence(module.model))
        warnings.warn(
            "the rows of the one batch influence each other; it is taken as a whole.",
            FallbackWarning,
            stacklevel=CALLER,
        )
    if kind is Rows.FIRST or (kind is Rows.SECOND and batches.brought):
        return start, pair, kind is Rows.FIRST and is_pair(start)
    if batches.num_batches == 1:
        return start, pair, False
    if batches.join():
        (start,) = batches
        return start, evaluate(start), False
    if kind is Rows.SECOND:
        raise DataError(
            "examples lie along the second dimension of the data, after positions, and batch_size= cuts the first. "
            "Leave it out, or pass batches of your own: data=[(x, y), ...]."
        )
    if mode == "train":
        raise OptionError(
            f"mode='train' is for one batch, and the data has {batches.num_batches}; pass data=[(x, y)]."
        )
    return start, pair, False


def _num_first(batch: Any) -> int:
    """The length of the first tensor of a batch."""
    return next((len(leaf) for leaf in tensors(batch) if leaf.ndim), 0)


def confirm(
    module: Evaluated, batches: Batches, parameters: Tree, outputs: Tensor, order: Tensor | None
) -> None:
    """The first batch, cut anew and in another order, gives what its examples gave: `outputs`, before `order`.

    Raises:
        DataError: examples influence each other, as batches of another size or in another order show.

    Cost: a forward pass of the batch.
    """
    batch = next(iter(batches))
    size = len(batch[0])
    here = (torch.arange(size) if order is None else order[:size].cpu()).to(outputs.device)
    common = here < len(outputs)
    if (order is None and size == len(outputs)) or not bool(common.any()):
        return
    again, _ = module.values(parameters, batch)
    if again.shape[1:] != outputs.shape[1:] or len(again) != size:
        return
    limit = AGREE.get(next(iter(parameters.values())).dtype, AGREE_HALF) * float(outputs.abs().max())
    if not float((outputs[here[common]] - again[common]).abs().max()) <= limit:
        raise DataError(influence(module.model))


# -- rows and the loss ---------------------------------------------------------------------------------------


@dataclass
class Survey:
    """What a pass over the data finds.

    Attributes:
        num_rows: that count.
        total_weight: Σ ω_i.
        num_classes: the number of outputs of a row.
        misfits: how far the loss is from a mean over rows, of each batch and of a few rows of all; NaN where it
            cannot be told.
    """

    num_rows: int = 0
    total_weight: float = 0.0
    num_classes: int = 0
    misfits: list[float] = field(default_factory=list)

    def is_mean(self, dtype: torch.dtype) -> bool:
        """The loss is a mean over rows, up to the rounding of the type."""
        known = [misfit for misfit in self.misfits if not math.isnan(misfit)]
        return (bool(known) or not self.misfits) and max(known, default=0.0) <= MISFIT.get(dtype, MISFIT_HALF)


def survey(evaluated: Iterable[tuple[Any, Tensor, Tensor]], loss: Loss, num_batches: int) -> Survey:
    """Check shapes, labels and finiteness of every batch, given as batch, outputs and targets, and count."""
    found, generator = Survey(), torch.Generator().manual_seed(0)
    value, several, room = 0.0, [], LARGEST
    for batch, outputs, targets in evaluated:
        check_finite(batch)
        found.num_classes = outputs.shape[1] if outputs.ndim > 1 else 1
        _check_outputs(outputs)
        if not len(outputs):
            continue
        loss.check(outputs, targets)
        weights = loss.weights(outputs, targets).double()
        found.num_rows += int((weights > 0).sum())
        found.total_weight += float(weights.sum())
        failure = f"the loss {loss.name!r} failed on {told((outputs, targets))}"
        with reported(LossError, failure), torch.no_grad():
            value += float(loss.total(outputs, targets).double())
        if not loss.is_mean:
            judged = outputs, targets
            if len(outputs) == len(targets):
                # Rows of all batches, and of a few some more: a loss is no mean even if only rare rows show it.
                most = max(1, min(FEW_ROWS, LARGEST // (num_batches * max(1, outputs[0].numel()))))
                order = torch.randperm(len(outputs), generator=generator).to(outputs.device)
                some = order[:most]
                if outputs[some].numel() <= room:
                    room -= outputs[some].numel()
                    several.append((outputs[some], targets[some]))
                if outputs.numel() > LARGEST:
                    more = order[: max(2, LARGEST // outputs[0].numel())]
                    judged = outputs[more], targets[more]
            if len(found.misfits) < JUDGED and len(outputs) > 1:
                found.misfits.append(loss.misfit(*judged, generator))
    if found.total_weight <= 0:
        raise DataError("no row counts: every target is ignored or has weight 0.")
    if not math.isfinite(value):
        raise NonFiniteError("the loss is NaN or infinite on this data.")
    if len(several) > 1 and len({(o.shape[1:], t.shape[1:]) for o, t in several}) == 1:
        outputs, targets = (torch.cat(column) for column in zip(*several, strict=True))
        found.misfits.append(loss.misfit(outputs, targets, generator))
    return found


def keep_whole(batches: Batches, found: Survey, loss: Loss, dtype: torch.dtype) -> None:
    """Make one batch of all examples, for a loss that is no mean over rows.

    Raises:
        LossError: it is none, and the data is several batches of the user's.
    """
    if batches.join():
        return
    misfit = max((m for m in found.misfits if not math.isnan(m)), default=0.0)
    if misfit > MISFIT.get(dtype, MISFIT_HALF):
        raise LossError(
            f"the loss {loss.name!r} is no mean over rows: of a batch cut in two it differs by "
            f"{misfit:.2g} from the sum "
            "of its parts, relatively, so that results would depend on how the data is cut into batches. Use a mean "
            "over rows; for class weights, an ignored label or label smoothing pass nn.CrossEntropyLoss(weight=..., "
            "ignore_index=...) itself; or pass the data as one batch, data=[(x, y)], on which "
            "any loss is well defined."
        )
    warnings.warn(
        f"whether the loss {loss.name!r} is a mean over rows cannot be told from its outputs and "
        f"targets; batches are "
        "weighted by their rows as if it were. If it is not, pass one batch.",
        FallbackWarning,
        stacklevel=CALLER + 1,
    )


# -- the gradient --------------------------------------------------------------------------------------------


def prove(
    module: Evaluated, loss: Loss, trainable: Collection[str], batch: Any, before: Pair, given: nn.Module
) -> int:
    """Prove that a batch's gradient in all trainable parameters can be had, and misses no way; the bytes it keeps.

    The graph of the outputs ends at all tensors that they depend on. Parameters of the copy or of the user's model
    among these are reached by another way than their names, and are replaced there too from now on.

    Args:
        module: the copy as it is evaluated.
        loss: of its outputs.
        trainable: names of parameters.
        batch: one with rows.
        before: what the network gave for it.
        given: the model as the user gave it.

    Raises:
        NondeterminismError: it gives something else now.
        CurvatureError: it cannot be backpropagated.
        ParameterError: no parameter has an effect, or some are reached by ways that cannot be followed.
        LossError: the loss reads parameters itself.

    Cost: a gradient of the batch; two where parameters are reached by other ways.
    """
    model = module.model
    own = {name: p for name, p in model.named_parameters() if name in trainable}
    theirs = twins(model, given)
    names = {id(p): name for name, p in own.items()}
    names |= {id(theirs[name]): name for name in own if name in theirs}
    every = {name: p.detach() for name, p in own.items()}

    def strangers(value: Tensor) -> list[str]:
        return sorted({names[id(leaf)] for leaf in reached(value) if id(leaf) in names})

    def graph() -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
        for p in own.values():
            p.requires_grad_()  # so that the graph shows where these are reached
        try:
            leaves, outputs, value = module.graph(loss, every, batch)
        finally:
            for p in own.values():
                p.requires_grad_(False)
        return outputs, value, gradient(value, leaves)

    with reported(CurvatureError, f"the loss cannot be backpropagated ({CHECKPOINTS})"):
        (outputs, value, parts), saved = saved_by(model, graph)
        if strangers(outputs) and not module.aliases:
            module.follow(given)
            outputs, value, parts = graph()
    _check_same(loss.rows(*before)[0], outputs.detach())
    if any("CheckpointFunction" in node.name() for node in nodes(outputs)):
        raise CurvatureError(
            f"the forward pass is checkpointed, and what is run again has no parameters: {CHECKPOINTS}."
        )
    if missed := strangers(outputs):
        raise ParameterError(
            f"the network reaches {', '.join(missed[:5])} by another way than as parameters of "
            f"its modules, such as a "
            "custom autograd function or a tensor kept from an earlier pass, which cannot be followed. Have forward "
            "read them from their modules."
        )
    if missed := strangers(value):
        raise LossError(
            f"the loss reads the parameters {', '.join(missed[:5])} itself, beside the outputs "
            f"(a penalty such as weight "
            "decay?). Leave that term out of loss= and add its curvature to the operator: "
            "H.shifted(2 * c) for c·‖θ‖²."
        )
    if all(part is None for part in parts):
        raise ParameterError(
            "no parameter of the model has any effect on the loss. Does forward= call the model it is given, and not "
            "another one, and outside of no_grad and inference_mode?"
        )
    dtype = next(iter(every.values())).dtype
    half = saved.dtypes & {torch.bfloat16, torch.float16}
    if half and dtype not in half:
        warnings.warn(
            f"the network computes in {', '.join(sorted(map(str, half)))} inside (autocast in "
            f"its forward?), though the "
            f"problem is in {dtype}: its derivatives are as coarse as that, a percent or so.",
            FallbackWarning,
            stacklevel=CALLER,
        )
    return saved.num_bytes


def _check_outputs(outputs: Tensor) -> None:
    """Raise NonFiniteError for outputs that are no numbers."""
    if not torch.isfinite(outputs).all():
        raise NonFiniteError(
            "the model's outputs contain NaN or infinite values; check weights, inputs and dtype."
        )


def _check_same(first: Tensor, again: Tensor) -> None:
    """Raise NondeterminismError unless two passes gave the same."""
    if first.shape != again.shape or not torch.allclose(
        first, again, rtol=1e-5, atol=1e-6 * float(first.abs().max())
    ):
        raise NondeterminismError(
            "the model gives different outputs for one batch in evaluation mode (functional dropout with "
            "training=True, or random noise in forward?). Make forward deterministic."
        )

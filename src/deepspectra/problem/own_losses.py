"""Models that compute their loss themselves: which outputs and targets it takes, and which loss it is."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from deepspectra.errors import DataError, LossError
from deepspectra.problem.batch_trees import map_tensors
from deepspectra.problem.batches import Batches, Pair
from deepspectra.problem.evaluated_model import Evaluated, Forward, differentiable
from deepspectra.problem.input_checks import reported, shapes_of
from deepspectra.problem.losses import Loss
from deepspectra.problem.named_losses import MODULES, Given, resolve

# Relative, of a mean over rows to the loss that the model gives: sums in another order, rounded in the loss's type.
SAME = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 0.02}
IGNORED = -100  # the label that losses of ours ignore
INSTEAD = "Pass forward=lambda model, batch: (outputs, targets) instead."


class Call(NamedTuple):
    """A loss of torch.nn.functional as a network called it."""

    function: Callable[..., Tensor]
    outputs: Tensor
    targets: Tensor
    options: dict[str, Any]

    def mean(self) -> Tensor:
        """The mean over its rows, whatever reduction was asked for."""
        return self.function(self.outputs, self.targets, **{**self.options, "reduction": "mean"})

    def is_same(self, given: Tensor) -> bool:
        """Whether this mean is the loss that the model gives, up to rounding; both are NaN where no row counts."""
        limit = max(SAME.get(one.dtype, 0.0) for one in (self.outputs, given))
        with torch.no_grad():
            return torch.allclose(self.mean().double(), given.double(), rtol=limit, atol=0.0, equal_nan=True)

    def is_like(self, other: Call) -> bool:
        """Whether it is the same function of other numbers, of as many rows."""
        return (
            self.function is other.function
            and self.outputs.shape == other.outputs.shape
            and self.targets.shape == other.targets.shape
            and self.options.keys() == other.options.keys()
            and all(_same(value, other.options[name]) for name, value in self.options.items())
        )

    def loss(self) -> Loss:
        """The same as a loss of ours."""
        defaults = inspect.signature(self.function).parameters
        given = {name: value for name, value in self.options.items() if value is not defaults[name].default}
        return resolve(functools.partial(self.function, **{**given, "reduction": "mean"}))


def _same(one: Any, other: Any) -> bool:
    """Whether two options are the same."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return one is other or (not isinstance(one, Tensor) and not isinstance(other, Tensor) and one == other)


def _joined(calls: Sequence[Call]) -> Call | None:
    """One call with the rows of several, those of an example side by side, if they are alike."""
    first = calls[0]
    if len(calls) == 1:
        return first
    if not first.outputs.ndim or not first.targets.ndim or not all(map(first.is_like, calls)):
        return None
    outputs, targets = (
        torch.stack(column, 1).flatten(0, 1)
        for column in zip(*((call.outputs, call.targets) for call in calls), strict=True)
    )
    return first._replace(outputs=outputs, targets=targets)


class _Calls(TorchFunctionMode):
    """Within this mode losses are seen as they are called; of these some, told by place, are not computed but 0."""

    def __init__(self, skipped: Sequence[int] = ()) -> None:
        super().__init__()
        self.skipped = skipped
        self.seen: list[Call] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in MODULES:
            return func(*args, **kwargs)
        options = inspect.signature(func).bind(*args, **kwargs).arguments
        self.seen.append(_call(func, dict(options)))
        if len(self.seen) - 1 not in self.skipped:
            return func(*args, **kwargs)
        outputs = options["input"]
        if options.get("reduction", "mean") != "none":
            return outputs.new_zeros(())
        with torch.no_grad():  # for the shape
            return torch.zeros_like(func(*args, **kwargs))


def _call(function: Callable[..., Tensor], options: dict[str, Any]) -> Call:
    """A call; what it ignores is labelled by −100, whichever label the batch at hand has for that."""
    outputs, targets, ignored = options.pop("input"), options.pop("target"), options.pop("ignore_index", IGNORED)
    if ignored != IGNORED and not targets.is_floating_point():
        targets = targets.masked_fill(targets == ignored, IGNORED)
    return Call(function, outputs, targets, options)


class OwnLoss:
    """A forward function for batches that are mappings, `model(**batch)`, as Hugging Face's models take them.

    Outputs and targets are those with which the model calls its loss, shifted, flattened and masked by itself, once
    or for several rows of each example, such as where an answer starts and where it ends. That their mean is the loss
    that the model gives is seen on one batch by `learn`, and on every batch by `compared`.
    """

    def __init__(self) -> None:
        self.places: Sequence[int] = (0,)  # of the loss among the calls of a pass
        self.options: dict[str, Any] = {}  # of these

    def __call__(self, model: nn.Module, batch: Any) -> Pair:
        """Outputs and targets of a batch."""
        calls = _Calls(self.places)
        with calls:
            model(**batch)
        call = self._called(calls, batch)
        return call.outputs, call.targets

    def compared(self, model: nn.Module, batch: Any) -> Pair:
        """The same, for a first pass over the data: the loss is computed, and compared with the mean over rows."""
        calls = _Calls()
        with calls:
            given = _loss_of(model(**batch))
        call = self._called(calls, batch)
        if given is None or not call._replace(options=self.options).is_same(given):
            raise LossError(
                f"for a batch with {_keys(batch)} the loss that the model gives, "
                f"{'none' if given is None else f'{float(given):.4g}'}, is not the mean over its rows of "
                f"{call.function.__name__}, {float(call.mean()):.4g}, as it is for the first batch: does it weigh or "
                "mask rows by another entry than the labels? Label what is not to count by the ignored index, -100. "
                f"{INSTEAD}"
            )
        return call.outputs, call.targets

    def _called(self, calls: _Calls, batch: Any) -> Call:
        found = _joined([calls.seen[place] for place in self.places]) if self.places[-1] < len(calls.seen) else None
        if found is None:
            raise DataError(
                f"the model calls no loss on a batch with {_keys(batch)}, or fewer than on the first; are its labels "
                "there?"
            )
        return found

    def learn(self, model: nn.Module, batch: Any) -> Loss:
        """The loss that the model gives, and which call of a pass it is.

        It is no more than that loss if it is 0 where that is: a term of any size shows, however it is rounded.
        """
        calls = _Calls()
        with torch.no_grad(), calls:
            given = _loss_of(model(**map_tensors(Tensor.clone, batch)))
        if given is None:
            raise DataError(
                f"the model gives no loss for a batch with {_keys(batch)}, and a batch that is a mapping needs one: "
                f"the labels under the name by which the model takes them. {INSTEAD}"
            )
        every = range(len(calls.seen))
        for places in [*((place,) for place in every), every][: len(every) + (len(every) > 1)]:
            call = _joined([calls.seen[place] for place in places])
            if call is not None and call.is_same(given):
                with torch.no_grad(), _Calls(places):
                    rest = _loss_of(model(**map_tensors(Tensor.clone, batch)))
                if rest is not None and float(rest) == 0:
                    self.places, self.options = places, call.options
                    return call.loss()
        called = ", ".join(call.function.__name__ for call in calls.seen) or "none of PyTorch's functions"
        raise LossError(
            f"the loss that the model gives, {float(given):.4g}, is no mean over rows of one loss of "
            f"torch.nn.functional (it calls {called}): is it a sum of several terms? {INSTEAD}"
        )


def settle_loss(loss: Given, module: Evaluated, batches: Batches, forward: object) -> tuple[Loss, Forward]:
    """The loss that is given; on batches that are mappings, unless it is another than the default, the model's own.

    And the forward function for all passes but the first over the data, in which the module's own compares the loss
    that the model gives for a batch with the mean over its rows.

    Cost: of mappings two forward passes of a batch.

    Raises:
        DataError: the model fails on the batch, or gives no loss for it.
        LossError: its loss is no mean over rows that was called, such as a sum of several.
    """
    known = resolve(loss)
    batch = next(iter(batches))
    if forward is not None or not isinstance(batch, Mapping):
        return known, module.function
    function = OwnLoss()
    passed = f"the model failed on a batch with {_keys(batch)}, {shapes_of(batch)}, passed by name. {INSTEAD} It said"
    with reported(DataError, passed), differentiable(), module.precise(dict(module.model.named_parameters())):
        own = function.learn(module.model, batch)
    module.function = function.compared
    return own if loss == "cross_entropy" else known, function


def _loss_of(found: Any) -> Tensor | None:
    """The loss among what a model gives."""
    loss: Tensor | None = found.get("loss") if isinstance(found, Mapping) else getattr(found, "loss", None)
    return loss


def _keys(batch: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, batch)) or "no entries"

"""Models that compute their loss themselves: which outputs and targets it takes, and which loss it is."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from deepspectra.errors import DataError, LossError
from deepspectra.problem.batch_trees import map_tensors
from deepspectra.problem.batches import Batches, Pair
from deepspectra.problem.evaluated_model import Evaluated
from deepspectra.problem.input_checks import reported, shapes_of
from deepspectra.problem.losses import Loss
from deepspectra.problem.named_losses import MODULES, Given, resolve

SAME = 1e-3  # relative, of a mean over rows to the loss that the model gives
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

    def loss(self) -> Loss:
        """The same as a loss of ours."""
        defaults = inspect.signature(self.function).parameters
        given = {name: value for name, value in self.options.items() if value is not defaults[name].default}
        return resolve(functools.partial(self.function, **{**given, "reduction": "mean"}))


class _Calls(TorchFunctionMode):
    """Within this mode losses are seen as they are called; but for the first time they are not computed."""

    def __init__(self, *, compute: bool) -> None:
        super().__init__()
        self.compute = compute
        self.seen: list[Call] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in MODULES:
            return func(*args, **(kwargs or {}))
        options = inspect.signature(func).bind(*args, **(kwargs or {})).arguments
        outputs, targets = options.pop("input"), options.pop("target")
        self.seen.append(Call(func, outputs, targets, options))
        return func(*args, **(kwargs or {})) if self.compute else outputs.new_zeros(())


class OwnLoss:
    """A forward function for batches that are mappings, `model(**batch)`, as Hugging Face's models take them.

    Outputs and targets are those with which the model calls its loss, shifted, flattened and masked by itself.
    """

    def __init__(self) -> None:
        self.place = 0  # of the loss among the calls of a pass

    def __call__(self, model: nn.Module, batch: Any) -> Pair:
        """Outputs and targets of a batch."""
        calls = _Calls(compute=False)
        with calls:
            model(**batch)
        if self.place >= len(calls.seen):
            raise DataError(f"the model calls no loss on a batch with {_keys(batch)}; are its labels there?")
        call = calls.seen[self.place]
        return call.outputs, call.targets

    def learn(self, model: nn.Module, batch: Any) -> Loss:
        """The loss that the model gives, and which call of a pass it is."""
        calls = _Calls(compute=True)
        with torch.no_grad(), calls:
            found = model(**batch)
        given = found.get("loss") if isinstance(found, Mapping) else getattr(found, "loss", None)
        if given is None:
            raise DataError(
                f"the model gives no loss for a batch with {_keys(batch)}, and a batch that is a mapping needs one: "
                f"the labels under the name by which the model takes them. {INSTEAD}"
            )
        for place, call in enumerate(calls.seen):
            if torch.allclose(call.mean().double(), given.double(), rtol=SAME, atol=0.0):
                self.place = place
                return call.loss()
        called = ", ".join(call.function.__name__ for call in calls.seen) or "none of PyTorch's functions"
        raise LossError(
            f"the loss that the model gives, {float(given):.4g}, is no mean over rows of one loss of "
            f"torch.nn.functional (it calls {called}): is it a sum of several terms? {INSTEAD}"
        )


def settle_loss(loss: Given, module: Evaluated, batches: Batches, forward: object) -> Loss:
    """The loss that is given; on batches that are mappings, unless it is another than the default, the model's own.

    Cost: of mappings a forward pass of a batch.

    Raises:
        DataError: the model fails on the batch, or gives no loss for it.
        LossError: its loss is no mean over rows that was called, such as a sum of several.
    """
    known = resolve(loss)
    batch = next(iter(batches))
    if forward is not None or not isinstance(batch, Mapping):
        return known
    module.function = function = OwnLoss()
    with reported(DataError, f"the model failed on a batch with {_keys(batch)}, {shapes_of(batch)}"):
        own = function.learn(module.model, map_tensors(Tensor.clone, batch))
    return own if loss == "cross_entropy" else known


def _keys(batch: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, batch)) or "no entries"

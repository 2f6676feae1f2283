"""A ready cell: a network of the zoo is trained as its recipe says, and the exact spectrum of G is looked at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deepspectra import zoo
from deepspectra.algorithms.estimates import trace
from deepspectra.analysis.gram_spectrum import gram_spectrum
from deepspectra.errors import NonFiniteError, OptionError
from deepspectra.operators.curvature import Residual
from deepspectra.problem.problem import Problem
from deepspectra.rows.averages import METHODS

KNOCKOUTS = {"class": ("class",), "class_logit": ("class", "logit")}
PROCESS = 700 * 2**20  # bytes of a process with PyTorch and a data set
MATRICES = 8  # of R × R numbers, R = N (C − 1), at the peak of a spectrum
COPIES = 4  # of the weights, beside those kept of each look
FLOAT64 = 8  # bytes


@dataclass(frozen=True)
class ZooCell:
    """A cell for `sweep` over some of model, data, per_class, learning_rate, epochs and seed.

    The seed is that of the examples' draw, of the first weights and of the order of training. With ``looks="epochs"``
    there is one training for all epochs of a task, 0 being its beginning; without an axis of epochs the end of
    training is looked at. G and its parts are exact (`gram_spectrum`, float64, two-way effects); an outlier is an
    eigenvalue over 1.25 times the largest of "within".

    Measures: ``loss``, ``accuracy`` and ``test_accuracy``; ``value``, the C² largest eigenvalues of G; ``outliers``,
    how many there are, and ``bulk_edge``; ``trace``, ``trace_class`` and so on for logit, interaction, within and
    true; ``share_class`` and so on, means over the outliers, NaN without any; ``left_class_subtraction``,
    ``left_class_projection``, ``left_class_logit_subtraction`` and ``left_class_logit_projection``, the outliers
    that are left without class means (and logit means), and with ``top_`` the largest eigenvalue then;
    ``num_examples`` and ``num_parameters``; ``trace_residual`` and ``trace_residual_error``, if asked for.

    Args:
        root: folder of the data sets' files, as in `zoo.load`.
        training_epochs: how long each network is trained, whatever the epochs looked at; by default as
            `zoo.recipe` says.
        residual_products: to spend on the trace of R, the Hessian without G; 0 for none.

    Cost: a training a task; four gradients, eight eigendecompositions of R × R numbers, R = N (C − 1), and
    `residual_products` products a look.
    """

    root: str | Path | None = field(default=None, repr=False)  # which does not change what is measured
    training_epochs: int | None = None
    residual_products: int = 0

    @property
    def version(self) -> str:
        """What tells its sweeps from others': to be raised when its numbers change."""
        return f"1 {self!r}"

    def __call__(
        self,
        *,
        model: str = "mlp",
        data: str = "digits",
        per_class: int | None = None,
        learning_rate: float | None = None,
        epochs: int | tuple[int, ...] | None = None,
        seed: int = 0,
    ) -> Mapping[str, Any] | Iterator[Mapping[str, Any]]:
        """The measures at each of some epochs, or at one."""
        size = zoo.paper_side(model, data)
        train = zoo.load(data, root=self.root, per_class=per_class, size=size, seed=seed)
        test = zoo.load(data, root=self.root, split="test", size=size)
        network = zoo.build(model, input_shape=train.input_shape, num_classes=train.num_classes, seed=seed)
        recipe = zoo.recipe(model, data, len(train))
        recipe = replace(
            recipe,
            epochs=recipe.epochs if self.training_epochs is None else self.training_epochs,
            learning_rate=recipe.learning_rate if learning_rate is None else learning_rate,
        )
        one = recipe.epochs if epochs is None else epochs
        looks = self._looks(network, train, test, recipe, one if isinstance(one, tuple) else (one,), seed)
        return looks if isinstance(one, tuple) else next(looks)

    def memory(
        self,
        *,
        model: str = "mlp",
        data: str = "digits",
        per_class: int | None = None,
        epochs: int | tuple[int, ...] | None = None,
        **_: object,
    ) -> float:
        """Bytes that a task needs, from the sizes of its network and data."""
        shape, num_classes, most = _data_size(data, str(self.root or ""), zoo.paper_side(model, data))
        num_examples = most if per_class is None else per_class * num_classes
        weights, features, outputs = _network_size(model, shape, num_classes)
        num_looks = len(epochs) if isinstance(epochs, tuple) else 1
        rows = num_examples * (num_classes - 1)
        held = num_examples * (features + num_classes * outputs)
        return PROCESS + FLOAT64 * (MATRICES * rows**2 + held + (COPIES + num_looks) * weights)

    def _looks(
        self,
        network: nn.Module,
        train: zoo.LabelledData,
        test: zoo.LabelledData,
        recipe: zoo.Recipe,
        epochs: tuple[int, ...],
        seed: int,
    ) -> Iterator[dict[str, Any]]:
        """Train once, keeping the weights at these epochs, then look at each."""
        if not 0 <= min(epochs) <= max(epochs) <= recipe.epochs:
            raise OptionError(f"epochs {epochs}: training begins at 0 and ends at {recipe.epochs}.")
        states: dict[int, dict[str, Tensor]] = {}

        def keep(epoch: int) -> None:
            if epoch in epochs:
                states[epoch] = {name: value.clone() for name, value in network.state_dict().items()}

        keep(0)
        diverged: NonFiniteError | None = None
        try:
            zoo.train(network, train, recipe, seed=seed, progress=lambda history: keep(len(history)))
        except NonFiniteError as error:  # there is something to see of before
            diverged = error
        for epoch in epochs:
            if epoch not in states:
                assert diverged is not None
                raise diverged
            network.load_state_dict(states[epoch])
            network.eval()
            yield self._measures(network, train, test, seed)

    def _measures(
        self, network: nn.Module, train: zoo.LabelledData, test: zoo.LabelledData, seed: int
    ) -> dict[str, Any]:
        problem = Problem(network, (train.inputs, train.targets))
        spectrum = gram_spectrum(problem, effects="two-way")
        above = spectrum.values > spectrum.threshold()
        traces, shares = spectrum.traces.tolist(), spectrum.shares[above].mean(0).tolist()
        found: dict[str, Any] = {
            "loss": problem.loss(),
            "accuracy": problem.accuracy(),
            "test_accuracy": zoo.accuracy(network, test),
            "num_examples": problem.num_examples,
            "num_parameters": problem.num_parameters,
            "value": spectrum.values[: problem.num_classes**2],
            "outliers": spectrum.num_outliers(),
            "bulk_edge": spectrum.bulk_edge,
            "trace": spectrum.values.sum(),
        }
        for name, total, share in zip(spectrum.part_names, traces, shares, strict=True):
            found[f"trace_{name}"], found[f"share_{name}"] = total, share
        for name, removed in KNOCKOUTS.items():
            for method in METHODS:
                values = spectrum.knockout(*removed, method=method)
                found[f"left_{name}_{method}"] = int((values > spectrum.threshold()).sum())
                found[f"top_{name}_{method}"] = values[0]
        if self.residual_products:
            residual = trace(Residual(problem), self.residual_products, seed)
            found["trace_residual"], found["trace_residual_error"] = residual.value, residual.standard_error
        return found


@cache
def _data_size(data: str, root: str, size: int | None) -> tuple[tuple[int, ...], int, int]:
    """Shape of an image, numbers of classes and of examples."""
    found = zoo.load(data, root=root or None, size=size)
    return found.input_shape, found.num_classes, len(found)


@cache
def _network_size(model: str, shape: tuple[int, ...], num_classes: int) -> tuple[int, int, int]:
    """Numbers of weights, of features of an example, and of outputs of all layers that have weights."""
    network = zoo.build(model, input_shape=shape, num_classes=num_classes).eval()
    features = outputs = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal features, outputs
        # of a convolution each is unfolded to as many as the kernel has places
        taps = module.weight[0, 0].numel() if isinstance(module, nn.Conv2d) else 1
        features += inputs[0].numel() * taps
        outputs += output.numel()

    for module in network.modules():
        if next(module.parameters(recurse=False), None) is not None:
            module.register_forward_hook(count)
    with torch.no_grad():
        network(torch.zeros(1, *shape))
    return sum(p.numel() for p in network.parameters()), features, outputs

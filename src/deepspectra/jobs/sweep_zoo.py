"""A ready cell: a network of the zoo is trained as its recipe says, and the exact spectrum of G is looked at."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deepspectra import zoo
from deepspectra.algorithms.estimates import trace
from deepspectra.analysis.gram_spectrum import GramSpectrum, gram_spectrum
from deepspectra.analysis.layer_measures import MEASURES, layer_measures
from deepspectra.errors import NonFiniteError, OptionError
from deepspectra.operators.curvature import Residual
from deepspectra.problem.problem import Problem
from deepspectra.rows.averages import METHODS

KNOCKOUTS = {"class": ("class",), "class_logit": ("class", "logit")}
PROCESS = 1000 * 2**20  # bytes of a process with PyTorch, whose CUDA build takes 850 MB, and a data set
MATRICES = 8  # of R × R numbers, R = N (C − 1), at the peak of a spectrum
COPIES = 4  # of the weights, beside those kept of each look
FLOAT64 = 8  # bytes
Looks = int | float | tuple[int | float, ...] | None


@dataclass(frozen=True)
class ZooCell:
    """A cell for `sweep` over model, data, per_class, classes, learning_rate, batch_norm, random_labels or seed.

    The seed is that of the examples' draw, of the first weights and of the order of training. A further axis says
    when a training is looked at, and goes with ``looks``, so that all looks of a task share one training: ``epochs``,
    0 being its beginning, or ``progress``, the share of the epochs that are over, 0 … 1, with which networks that are
    trained for different times compare. Without either the end of training is looked at. With ``batch_norm`` there
    is one after every ReLU (`zoo.normalised`), with ``random_labels`` those of the training set are drawn, and
    ``classes`` keeps so many of the data's, the first ones.

    Measures are those of `gram_measures`, and ``test_accuracy``; ``epoch``, of the look; ``rate``, the learning
    rate, with ``rate_test_accuracy`` and ``rate_loss`` of all that were tried; ``trace_residual`` and
    ``trace_residual_error``, if asked for; `by_layer`, ``layer``, the layers' names from input to output, and with
    ``layer_`` before the name the measures of `layer_measures`, NaN where one does not apply. A subclass may put its
    own `measures` and `recipe` in their place.

    Args:
        root: folder of the data sets' files, as in `zoo.load`.
        training_epochs: how long each network is trained, whatever is looked at; by default as `recipe` says.
        residual_products: to spend on the trace of R, the Hessian without G; 0 for none.
        rates: multiples of the learning rate that are tried; looked at is the network that classifies the test set
            best in the end, or, of equal ones, has the lowest loss.
        by_layer: whether every layer is measured as well.

    Cost: a training a task, or one a rate; four gradients, eight eigendecompositions of R × R numbers,
    R = N (C − 1), and `residual_products` products a look; by layer what `layer_measures` costs besides.
    """

    root: str | Path | None = field(default=None, repr=False)  # which does not change what is measured
    training_epochs: int | None = None
    residual_products: int = 0
    rates: tuple[float, ...] = ()
    by_layer: bool = field(default=False, repr=False)

    @property
    def version(self) -> str:
        """What tells its sweeps from others': to be raised when its numbers change."""
        return f"2 {self!r}" + " by layer" * self.by_layer

    def __call__(
        self,
        *,
        model: str = "mlp",
        data: str = "digits",
        per_class: int | None = None,
        classes: int | None = None,
        learning_rate: float | None = None,
        batch_norm: bool = False,
        random_labels: bool = False,
        epochs: Looks = None,
        progress: Looks = None,
        seed: int = 0,
    ) -> Mapping[str, Any] | Iterator[Mapping[str, Any]]:
        """The measures at each of some looks, or at one."""
        size = zoo.paper_side(model, data)
        train = zoo.load(data, root=self.root, per_class=per_class, size=size, seed=seed)
        test = zoo.load(data, root=self.root, split="test", size=size)
        train, test = (some if classes is None else some.of_classes(classes) for some in (train, test))
        train = train.relabelled(seed) if random_labels else train
        recipe = self.recipe(model, data, len(train))
        recipe = replace(
            recipe,
            epochs=recipe.epochs if self.training_epochs is None else self.training_epochs,
            learning_rate=recipe.learning_rate if learning_rate is None else learning_rate,
        )

        def build() -> nn.Module:
            network = zoo.build(model, input_shape=train.input_shape, num_classes=train.num_classes, seed=seed)
            return zoo.normalised(network, train.input_shape) if batch_norm else network

        looks = epochs if progress is None else progress
        asked = looks if isinstance(looks, tuple) else (recipe.epochs,) if looks is None else (looks,)
        at = tuple(int(one) if progress is None else round(one * recipe.epochs) for one in asked)
        if not 0 <= min(at) <= max(at) <= recipe.epochs or None not in (epochs, progress):
            raise OptionError(
                f"epochs={epochs}, progress={progress}: one of them, from 0 to {recipe.epochs} epochs or to 1. "
                "To train for longer pass training_epochs=, or --training-epochs on the command line."
            )
        found = self._looks(build, train, test, recipe, at, seed)
        return found if isinstance(looks, tuple) else next(found)

    def recipe(self, model: str, data: str, num_examples: int) -> zoo.Recipe:
        """How networks are trained, unless options or axes say otherwise."""
        return zoo.recipe(model, data, num_examples)

    def measures(self, problem: Problem, seed: int, ended: bool) -> dict[str, Any]:
        """What is measured of a network at the data that it was trained on, in training or at its end."""
        found = gram_measures(problem, gram_spectrum(problem, effects="two-way"))
        if self.residual_products:
            residual = trace(Residual(problem), self.residual_products, seed)
            found["trace_residual"], found["trace_residual_error"] = residual.value, residual.standard_error
        return found | (_of_layers(problem, seed) if self.by_layer else {})

    def memory(
        self,
        *,
        model: str = "mlp",
        data: str = "digits",
        per_class: int | None = None,
        classes: int | None = None,
        epochs: Looks = None,
        progress: Looks = None,
        **_: object,
    ) -> float:
        """Bytes that a task needs, from the sizes of its network and data."""
        shape, num_classes, most = _data_size(data, str(self.root or ""), zoo.paper_side(model, data))
        most, num_classes = most * (classes or num_classes) // num_classes, classes or num_classes
        num_examples = most if per_class is None else per_class * num_classes
        weights, features, outputs, factors = _network_size(model, shape, num_classes)
        looks = epochs if progress is None else progress
        num_looks = len(looks) if isinstance(looks, tuple) else 1
        held = self._held(num_examples, num_classes, features + num_classes * outputs, weights)
        held += (num_classes + MATRICES) * factors if self.by_layer else 0
        return PROCESS + FLOAT64 * (held + (COPIES + num_looks * max(1, len(self.rates))) * weights)

    def _held(self, num_examples: int, num_classes: int, num_captured: int, num_weights: int) -> int:
        """Numbers that the measures of a look hold at most, with so many features and errors of an example."""
        return MATRICES * (num_examples * (num_classes - 1)) ** 2 + num_examples * num_captured

    def _looks(
        self,
        build: Callable[[], nn.Module],
        train: zoo.LabelledData,
        test: zoo.LabelledData,
        recipe: zoo.Recipe,
        epochs: tuple[int, ...],
        seed: int,
    ) -> Iterator[dict[str, Any]]:
        """Train once a rate, keeping the weights at these epochs, then look at each of the best."""
        recipes = [replace(recipe, learning_rate=factor * recipe.learning_rate) for factor in self.rates or (1.0,)]
        tried = [_trained(build(), train, test, one, epochs, seed) for one in recipes]
        at = max(range(len(tried)), key=lambda j: (tried[j].test_accuracy, -tried[j].loss))
        about: dict[str, Any] = {"rate": recipes[at].learning_rate}
        if self.rates:
            about["rates"] = [one.learning_rate for one in recipes]
            about["rate_test_accuracy"] = [one.test_accuracy for one in tried]
            about["rate_loss"] = [one.loss for one in tried]
        network, best = build(), tried[at]
        for epoch in epochs:
            if epoch not in best.states:
                assert best.diverged is not None
                raise best.diverged
            network.load_state_dict(best.states[epoch])
            network.eval()
            problem = Problem(network, (train.inputs, train.targets))
            found = self.measures(problem, seed, epoch == recipe.epochs)
            yield {"epoch": epoch, "test_accuracy": zoo.accuracy(network, test)} | about | found


class _Trained(NamedTuple):
    """Weights at some epochs, and how well training ended; if it diverged, those of before."""

    states: dict[int, dict[str, Tensor]]
    test_accuracy: float
    loss: float
    diverged: NonFiniteError | None


def _trained(
    network: nn.Module,
    train: zoo.LabelledData,
    test: zoo.LabelledData,
    recipe: zoo.Recipe,
    epochs: tuple[int, ...],
    seed: int,
) -> _Trained:
    states: dict[int, dict[str, Tensor]] = {}

    def keep(epoch: int) -> None:
        if epoch in epochs:
            states[epoch] = {name: value.clone() for name, value in network.state_dict().items()}

    keep(0)
    try:
        history = zoo.train(network, train, recipe, seed=seed, progress=lambda history: keep(len(history)))
    except NonFiniteError as error:  # there is something to see of before
        return _Trained(states, 0.0, math.inf, error)
    return _Trained(states, zoo.accuracy(network, test), history.losses[-1] if history else math.nan, None)


def gram_measures(problem: Problem, spectrum: GramSpectrum) -> dict[str, Any]:
    """Numbers of a problem from the exact spectrum of its G, of two-way effects.

    An outlier is an eigenvalue over 1.25 times the largest of "within", the edge of the bulk.

    Returns:
        ``loss``, ``accuracy``, ``num_examples`` and ``num_parameters``; ``value``, the C² largest eigenvalues of G;
        ``outliers``, how many there are, and ``bulk_edge``; ``trace``, ``trace_class`` and so on for logit,
        interaction, within and true; ``share_class`` and so on, means over the outliers, NaN without any;
        ``value_without_class_subtraction``, ``…_projection``, ``value_without_class_logit_subtraction`` and
        ``…_projection``, the 2 C largest eigenvalues that are left without class means (and logit means), and with
        ``left_`` how many of all of them are outliers still; ``bump_distance``, how many decades the median
        eigenvalue of the interaction, what cross-class means make beyond class and logit means, is above that of
        "within", and ``bump_clearance``, above the edge.
    """
    num_classes = problem.num_classes
    above = spectrum.values > spectrum.threshold()
    traces, shares = spectrum.traces.tolist(), spectrum.shares[above].mean(0).tolist()
    found: dict[str, Any] = {
        "loss": problem.loss(),
        "accuracy": problem.accuracy(),
        "num_examples": problem.num_examples,
        "num_parameters": problem.num_parameters,
        "value": spectrum.values[: num_classes**2],
        "outliers": spectrum.num_outliers(),
        "bulk_edge": spectrum.bulk_edge,
        "trace": float(spectrum.values.sum()),
    }
    for name, total, share in zip(spectrum.part_names, traces, shares, strict=True):
        found[f"trace_{name}"], found[f"share_{name}"] = total, share
    for name, removed in KNOCKOUTS.items():
        for method in METHODS:
            values = spectrum.knockout(*removed, method=method)
            found[f"left_{name}_{method}"] = int((values > spectrum.threshold()).sum())
            found[f"value_without_{name}_{method}"] = values[: 2 * num_classes]
    bump, within = spectrum.parts["interaction"], spectrum.parts["within"]
    found["bump_distance"] = decades_over(bump, float(within.median()) if len(within) else 0.0)
    found["bump_clearance"] = decades_over(bump, spectrum.bulk_edge)
    return found


def _of_layers(problem: Problem, seed: int) -> dict[str, Any]:
    """`layer_measures` as arrays over the layers."""
    found = layer_measures(problem, seed)
    known = [key for key in MEASURES if any(key in one for one in found.values())]
    arrays = {f"layer_{key}": [one.get(key, math.nan) for one in found.values()] for key in known}
    return {"layer": [*found]} | arrays


def decades_over(values: Tensor, other: float) -> float:
    """log₁₀ of the median of some eigenvalues over another; NaN without any."""
    return math.log10(float(values.median()) / other) if len(values) and other > 0 else math.nan


@cache
def _data_size(data: str, root: str, size: int | None) -> tuple[tuple[int, ...], int, int]:
    """Shape of an image, numbers of classes and of examples."""
    found = zoo.load(data, root=root or None, size=size)
    return found.input_shape, found.num_classes, len(found)


@cache
def _network_size(model: str, shape: tuple[int, ...], num_classes: int) -> tuple[int, int, int, int]:
    """Numbers of weights, and of features of an example, outputs and entries of Kronecker factors of all layers."""
    network = zoo.build(model, input_shape=shape, num_classes=num_classes).eval()
    features = outputs = factors = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal features, outputs, factors
        # of a convolution each is unfolded to as many as the kernel has places
        taps = module.weight[0, 0].numel() if isinstance(module, nn.Conv2d) else 1
        features += inputs[0].numel() * taps
        outputs += output.numel()
        weight = next(module.parameters(recurse=False))
        factors += len(weight) ** 2 + (weight[0].numel() + 1) ** 2

    for module in network.modules():
        if next(module.parameters(recurse=False), None) is not None:
            module.register_forward_hook(count)
    with torch.no_grad():
        network(torch.zeros(1, *shape))
    return sum(p.numel() for p in network.parameters()), features, outputs, factors

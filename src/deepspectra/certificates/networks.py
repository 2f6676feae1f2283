"""From a problem's network to one with Gaussian weights, and what cannot be made into one."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deepspectra.certificates.stochastic_layers import (
    Draws,
    GaussianConvolution,
    GaussianLayer,
    GaussianLinear,
    Outputs,
)
from deepspectra.errors import CertificateError, DataError, OptionError
from deepspectra.problem.cross_entropy import CrossEntropy
from deepspectra.problem.input_checks import check_finite, reported, shapes_of
from deepspectra.problem.model_copy import owners_of
from deepspectra.problem.problem import Problem

CHUNK = 1000  # examples that pass at a time where nothing is differentiated, or fewer, that
DRAWN = 2**26  # weights at most are drawn for them, if convolutions draw them for each
SAMPLE = 3  # examples on which a network is understood
KINDS = (nn.Linear, nn.Conv2d)
Weighted = nn.Linear | nn.Conv2d
SHAPING = (nn.Flatten, nn.Identity)


@dataclass(frozen=True)
class Examples:
    """Labelled examples: inputs (n, ...), and labels (n,) in 0 … C − 1."""

    inputs: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def some(self, chosen: Tensor) -> Examples:
        """Those of these places."""
        chosen = chosen.to(self.labels.device)
        return Examples(self.inputs[chosen], self.labels[chosen])


def examples_of(problem: Problem) -> Examples:
    """All examples of a classification problem, one label each.

    Raises:
        CertificateError: no classifier, or rows that are no examples, such as the tokens of a sequence.
    """
    loss = problem.loss_function
    if not isinstance(loss, CrossEntropy):
        raise CertificateError(
            f"a certificate bounds the share of wrong labels, and the loss is {loss.name!r}: regression has none, "
            "and two classes take two outputs. Give a classifier with loss='cross_entropy'."
        )
    inputs, labels = [], []
    for batch in problem.fixed_batches():
        if not problem.can_split(batch) or not isinstance(batch[0], Tensor):
            raise CertificateError(
                "a certificate needs independent examples with one class label each, as pairs (x, y) of "
                "tensors; here examples have several rows or another form. Tokens of a sequence and nodes of "
                "a graph depend on each other, and the bound would be void."
            )
        inputs.append(batch[0])
        labels.append(batch[1].flatten().long())
    found = Examples(torch.cat(inputs), torch.cat(labels))
    if bool((found.labels == loss.ignore_index).any()):
        raise CertificateError(
            "some labels are ignored by the loss; leave these examples out, for they have no error."
        )
    if loss.weight is not None:
        raise CertificateError(
            "the loss weighs classes, and a certificate counts every error once. Leave weights out."
        )
    return found


def given_examples(test: Any, problem: Problem) -> Examples:
    """Test data, which are a pair (x, y) or a problem, as examples.

    Raises:
        OptionError: neither, or labels that do not fit.
        DataError: inputs that do not, see `given_inputs`.
    """
    if isinstance(test, Problem):
        return examples_of(test)
    if not isinstance(test, (tuple, list)) or len(test) != 2 or not all(isinstance(part, Tensor) for part in test):
        raise OptionError("test= takes a pair (x, y) of tensors, or a Problem.")
    x, y = test
    if y.ndim != 1 or y.is_floating_point() or y.is_complex() or len(x) != len(y) or not len(y):
        raise OptionError(
            f"test= takes as many inputs as labels (n,) of integers, at least one; got {tuple(x.shape)} and "
            f"{tuple(y.shape)} of {y.dtype}."
        )
    if int(y.min()) < 0 or int(y.max()) >= problem.num_classes:
        raise OptionError(f"test= has labels from {int(y.min())} to {int(y.max())} of {problem.num_classes} classes.")
    return Examples(given_inputs("test=", x, problem), y.to(problem.device).long())


def given_inputs(name: str, x: object, problem: Problem) -> Tensor:
    """Inputs that the network takes.

    Raises:
        OptionError: no tensor, or of no example.
        DataError: numbers that are not finite, or of a shape on which the network fails.
    """
    if not isinstance(x, Tensor) or not x.ndim or not len(x):
        given = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise OptionError(f"{name} takes a tensor of inputs (n, ...), at least one; got {given}.")
    check_finite(x)
    x = x.to(problem.device, problem.dtype if x.is_floating_point() else None)
    with reported(DataError, f"the network failed on {name} of {shapes_of(x)}"):
        problem.values((x[:2], torch.zeros(len(x[:2]), dtype=torch.long, device=problem.device)))
    return x


class GaussianNetwork:
    """A network whose fully connected layers and convolutions have Gaussian weights; other parameters are held.

    Attributes:
        model: the network, each such layer replaced by a `GaussianLayer`.
        layers: name → layer, from input to output; the last gives the logits.
        held: names of parameters that stay what they are, in prior and posterior.
    """

    def __init__(self, model: nn.Module, sample: Tensor, scale: float) -> None:
        uses = _uses(model, sample)
        *_, self.output = uses
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.layers: dict[str, GaussianLayer] = {}
        for name in uses:
            layer = _gaussian(weighted(self.model, name), scale)
            self.layers[name] = layer
            self.model = _replaced(self.model, name, layer)
        owned = {f"{name}.{key}".lstrip(".") for name in self.layers for key in ("weight", "bias")}
        self.held = tuple(name for name, _ in model.named_parameters() if name not in owned)
        self.first: str | None = next(iter(self.layers)) if _is_first(model, self.layers, sample) else None

    @property
    def chunk(self) -> int:
        """Examples that pass at a time where nothing is differentiated: always as many, for draws are by chunks."""
        convolutions = (one for one in self.layers.values() if isinstance(one, GaussianConvolution))
        return max(1, min(CHUNK, DRAWN // max((one.mean.numel() for one in convolutions), default=1)))

    def outputs(self, x: Tensor) -> Outputs:
        """Moments of the logits, given draws of the features of each example."""
        last = self.layers[self.output]
        assert isinstance(last, GaussianLinear)
        last.noted = []
        try:
            self.model(x)
            return last.noted[0]
        finally:
            last.noted = None

    def prepared(self, x: Tensor) -> Tensor:
        """Inputs as `outputs` takes them: the first layer's products done once, if only reshaping comes before."""
        if self.first is None:
            return x
        layer = self.layers[self.first]
        assert isinstance(layer, GaussianLinear)
        layer.takes_prepared = True
        return torch.cat([layer.prepared(part.flatten(1)) for part in torch.split(x, CHUNK)])

    def divergence(self) -> dict[str, Tensor]:
        """Layer → KL(Q ‖ P), double precision."""
        return {name: layer.divergence() for name, layer in self.layers.items()}

    def draw_from(self, draws: Draws) -> None:
        """Take noise from here."""
        self.draws = draws
        for layer in self.layers.values():
            layer.draws = draws

    def centre(self, model: nn.Module) -> None:
        """Move the posterior's mean to a plain network's weights."""
        for name, layer in self.layers.items():
            layer.move_to(weights_of(weighted(model, name)))

    def mean_model(self, like: nn.Module) -> nn.Module:
        """A plain network like the given one, with weights at the posterior's mean."""
        twin = copy.deepcopy(like).eval().requires_grad_(True)
        for name, layer in self.layers.items():
            set_weights(weighted(twin, name), layer.posterior_mean())
        return twin

    def state(self) -> dict[str, Any]:
        """Tensors from which `restore` makes the same posterior."""
        return {name: _tensors(layer) for name, layer in self.layers.items()}

    def restore(self, state: Mapping[str, Mapping[str, Tensor | None]]) -> None:
        """Take the posterior of `state`."""
        for name, layer in self.layers.items():
            for key, value in state[name].items():
                if key in ("left", "right", "prior_mean"):
                    setattr(layer, key, value)
                else:
                    assert value is not None
                    setattr(layer, key, nn.Parameter(value.clone()))


def weighted(model: nn.Module, name: str) -> Weighted:
    """The layer of this name."""
    found = model.get_submodule(name)
    assert isinstance(found, KINDS)
    return found


def weights_of(module: Weighted) -> Tensor:
    """(o, d) weights of a layer, the bias last."""
    weight = module.weight.detach().flatten(1)
    bias = module.bias
    return weight.clone() if bias is None else torch.cat([weight, bias.detach()[:, None]], 1)


@torch.no_grad()
def set_weights(module: Weighted, matrix: Tensor) -> None:
    """Write (o, d) into a layer."""
    has_bias = module.bias is not None
    module.weight.copy_(matrix[:, : matrix.shape[1] - has_bias].view_as(module.weight))
    if module.bias is not None:
        module.bias.copy_(matrix[:, -1])


@torch.no_grad()
def wrong(model: nn.Module, examples: Examples) -> int:
    """How many examples a plain network gets wrong."""
    parts = zip(torch.split(examples.inputs, CHUNK), torch.split(examples.labels, CHUNK), strict=True)
    return sum(int((model(x).argmax(-1) != y).sum()) for x, y in parts)


def _tensors(layer: GaussianLayer) -> dict[str, Tensor | None]:
    kept = ("mean", "log_ratio", "log_scale", "left", "right", "prior_mean")
    return {key: None if (value := getattr(layer, key)) is None else value.detach().clone() for key in kept}


def _gaussian(module: Weighted, scale: float) -> GaussianLayer:
    has_bias = module.bias is not None
    if isinstance(module, nn.Conv2d):
        return GaussianConvolution(weights_of(module), has_bias, scale, module)
    return GaussianLinear(weights_of(module), has_bias, scale)


def _replaced(model: nn.Module, name: str, layer: nn.Module) -> nn.Module:
    if not name:
        return layer
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)
    return model


@torch.no_grad()
def _uses(model: nn.Module, sample: Tensor) -> list[str]:
    """Names of the layers that can be Gaussian, in the order of their calls.

    Weights that are used twice, or at several positions of an example by a fully connected layer, have one draw for
    all of them; those layers are held, as are normalisations and embeddings.

    Raises:
        CertificateError: the logits are not the outputs of a fully connected layer.
    """
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {}
    handles = [
        module.register_forward_hook(lambda _, x, z, name=name: calls.setdefault(name, []).append((x[0], z)))
        for name, module in model.named_modules()
        if isinstance(module, KINDS)
    ]
    try:
        logits = model(sample)
    finally:
        for handle in handles:
            handle.remove()
    owners, found = owners_of(model), []
    for name, uses in calls.items():
        module = model.get_submodule(name)
        alone = len(uses) == 1 and all(owners[id(p)] == 1 for p in module.parameters())
        if isinstance(module, nn.Conv2d):
            fits = module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
        else:
            fits = type(module) is nn.Linear and uses[0][0].ndim == 2
        # A row that is no example, such as a position folded into the batch, would have draws of its own, and the
        # mean of many draws errs less than one.
        if alone and fits and len(uses[0][0]) == len(sample):
            found.append(name)
    last = found[-1] if found else None
    if last is None or not torch.equal(calls[last][0][1], logits) or calls[last][0][1].ndim != 2:
        raise CertificateError(
            "the logits must be the outputs of a torch.nn.Linear that is called once, on features (B, d), and whose "
            f"weights nothing else uses; {type(model).__name__} ends otherwise. End the network with such a layer, "
            "without softmax."
        )
    return found


@torch.no_grad()
def _is_first(model: nn.Module, layers: Mapping[str, GaussianLayer], sample: Tensor) -> bool:
    """Whether a fully connected layer has the flattened inputs themselves, and what it needs of them can be kept."""
    name, layer = next(iter(layers.items()))
    parts = name.split(".")
    above = [model, *(model.get_submodule(".".join(parts[:k])) for k in range(1, len(parts)))]
    # Within plain sequences nothing else takes the inputs.
    if not isinstance(layer, GaussianLinear) or any(type(module) is not nn.Sequential for module in above):
        return False
    seen: list[Tensor] = []
    own = model.get_submodule(name)
    handle = own.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    try:
        model(sample)
    finally:
        handle.remove()
    leaves = (module for module in model.modules() if not any(module.children()))
    shaping = all(isinstance(m, SHAPING) for m in itertools.takewhile(lambda m: m is not own, leaves))
    return shaping and torch.equal(seen[0], sample.flatten(1))

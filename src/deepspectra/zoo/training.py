"""Training as in the papers, and checkpoints.

SGD with momentum .9 and weight decay 5e-4, batches of 128, the learning rate divided by ten at one and two
thirds of the epochs, no augmentation.

Source: Papyan, "Traces of class/cross-class structure pervade deep learning spectra", JMLR 2020; the values
that its text omits are those of Papyan, Han and Donoho, "Prevalence of neural collapse", PNAS 2020.
"""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from deepspectra.argument_checks import check_choice, check_count
from deepspectra.errors import DataError, FileError, NonFiniteError, OptionError, first_line
from deepspectra.file_writing import save_whole
from deepspectra.zoo.data import DATA_NAMES, LabelledData
from deepspectra.zoo.models import MODEL_NAMES


@dataclass(frozen=True)
class History:
    """What happened in each epoch.

    Attributes:
        losses: mean cross-entropy over the epoch's examples, each before the step it takes part in.
        accuracies: share of them classified correctly, likewise.
        learning_rates: the learning rate.
    """

    losses: tuple[float, ...] = ()
    accuracies: tuple[float, ...] = ()
    learning_rates: tuple[float, ...] = ()

    def __len__(self) -> int:
        return len(self.losses)

    def extended(self, loss: float, accuracy: float, learning_rate: float) -> History:
        """This history and one epoch more."""
        return History((*self.losses, loss), (*self.accuracies, accuracy), (*self.learning_rates, learning_rate))


@dataclass(frozen=True)
class Recipe:
    """How to train a network on a data set.

    Attributes:
        epochs: passes over the data.
        learning_rate: of the first epoch.
        batch_size: examples a step.
        milestones: fractions of the epochs after which the learning rate is multiplied by `factor`.
        factor: see `milestones`.
        momentum: of SGD.
        weight_decay: coefficient of ‖θ‖² / 2, over all parameters.

    Raises:
        OptionError: a setting is outside its range.
    """

    epochs: int
    learning_rate: float
    batch_size: int = 128
    milestones: tuple[float, ...] = (1 / 3, 2 / 3)
    factor: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4

    def __post_init__(self) -> None:
        check_count("epochs", self.epochs, 0)
        check_count("batch_size", self.batch_size)
        if not self.learning_rate > 0:
            raise OptionError(f"learning_rate is {self.learning_rate}; it must be positive.")

    def rate(self, epoch: int) -> float:
        """The learning rate of an epoch, counted from 0."""
        return self.learning_rate * self.factor ** sum(epoch >= m * self.epochs for m in self.milestones)


# At batches of 64; in proportion for smaller ones.
_LEARNING_RATES = {
    "mlp": 0.05,
    "mlp-small": 0.05,
    "mlp-bn": 0.05,
    "lenet": 0.05,
    "vgg11-bn": 0.01,
    "resnet18": 0.02,
    "resnet18-small": 0.05,
    "transformer": 0.1,
}
_NUM_EXAMPLES = {"digits": 1442, "mnist": 60_000, "fashion": 60_000, "cifar10": 50_000, "cifar100": 50_000}


def recipe(model: str, data: str, num_examples: int | None = None) -> Recipe:
    """Settings to start from, for a network of the zoo on a CPU.

    Fewer examples take smaller batches and more epochs, for enough steps. With them `mlp`, `mlp-bn` and
    `lenet` fit the digits and 13 examples a class of MNIST to the last example, `mlp` fits 99.9 % of MNIST,
    and `resnet18` and `vgg11-bn` fit 13 examples a class of CIFAR-10. For `transformer` they are no more than
    a start. The papers' own settings are 200 or 350 epochs and the best of a hundred learning rates.

    Args:
        model: one of `MODEL_NAMES`.
        data: one of `DATA_NAMES`.
        num_examples: size of the training set; by default that of the whole data set.

    Returns:
        Epochs, learning rate, batch size and milestones for `train`.

    Raises:
        OptionError: a name is unknown, or `num_examples` is not positive.
    """
    check_choice("model", model, MODEL_NAMES)
    check_choice("data", data, DATA_NAMES)
    num_examples = _NUM_EXAMPLES[data] if num_examples is None else num_examples
    check_count("num_examples", num_examples)
    if num_examples >= 10_000:
        batch_size, epochs = 128, 15
    elif num_examples >= 1000:
        batch_size, epochs = 64, 30
    else:
        batch_size, epochs = 16, 40
    milestones = Recipe.milestones
    if model == "resnet18" and num_examples < 1000:  # dear, but soon fitted at its first learning rate
        epochs, milestones = 12, (0.7, 0.9)
    elif model == "resnet18":
        epochs = min(epochs, 20)
    elif model == "vgg11-bn" and num_examples < 10_000:
        # Its last maps are of one pixel, so batch norm needs large batches, the last one too.
        batch_size = min(range(48, 97), key=lambda size: (-num_examples % size, abs(size - 64)))
        epochs, milestones = (30 if num_examples < 1000 else 20), (0.7, 0.9)
    elif model == "transformer":  # slow under SGD
        epochs *= 2
    return Recipe(epochs, _LEARNING_RATES[model] * min(batch_size, 64) / 64, batch_size, milestones)


def train(
    model: nn.Module,
    data: LabelledData,
    recipe: Recipe | None = None,
    *,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: Callable[[History], object] | None = None,
    **settings: Any,
) -> History:
    """Train a classifier in place by SGD on the cross-entropy, and leave it in eval mode.

    The order of the examples comes from a generator of its own, so that on a CPU the same seed gives the same
    weights bit for bit, unless the network draws random numbers itself. A last batch of one example joins the
    batch before it, because batch norm cannot train on one.

    Args:
        model: the network, from images (B, C, H, W) to logits (B, number of classes).
        data: what to train on.
        recipe: how, such as `recipe("mlp", "digits")`.
        seed: seed of the order of the examples.
        device: where to train; the model moves there. By default where it is.
        progress: called after each epoch with the history so far.
        settings: those of `Recipe` by name, in its place or other than it says; without a recipe `epochs` and
            `learning_rate` at least.

    Returns:
        The loss, accuracy and learning rate of each epoch.

    Raises:
        OptionError: a setting is outside its range.
        DataError: there are no examples.
        NonFiniteError: the loss became NaN or infinite.

    Cost: a gradient over all the data an epoch.

    Source: see the module.
    """
    recipe = Recipe(**settings) if recipe is None else replace(recipe, **settings)
    if not len(data):
        raise DataError(f"There are no examples in {data.name} ({data.split}) to train on.")
    device = _device(model) if device is None else torch.device(device)
    model.to(device)
    inputs, targets = data.inputs.to(device), data.targets.to(device)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=recipe.learning_rate,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
    )
    history = History()
    try:
        for epoch in range(recipe.epochs):
            rate = recipe.rate(epoch)
            for group in optimizer.param_groups:
                group["lr"] = rate
            model.train()
            order = torch.randperm(len(targets), generator=generator).to(device)
            total_loss, num_correct = 0.0, 0
            for index in _batches(order, recipe.batch_size):
                logits = model(inputs[index])
                loss = nn.functional.cross_entropy(logits, targets[index])
                if not math.isfinite(loss.item()):
                    raise NonFiniteError(
                        f"The training loss became {loss.item()} in epoch {epoch + 1} at learning rate "
                        f"{rate:g}; lower it, or check the data for values that are not finite."
                    )
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                total_loss += loss.item() * len(index)
                num_correct += int((logits.argmax(dim=1) == targets[index]).sum())
            history = history.extended(total_loss / len(targets), num_correct / len(targets), rate)
            if progress is not None:
                model.eval()
                progress(history)
    finally:
        model.eval()
    return history


def _batches(order: Tensor, batch_size: int) -> list[Tensor]:
    batches = list(torch.split(order, batch_size))
    if len(batches) > 1 and len(batches[-1]) == 1:
        batches[-2:] = [torch.cat(batches[-2:])]
    return batches


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


@torch.no_grad()
def accuracy(model: nn.Module, data: LabelledData, *, batch_size: int = 1000) -> float:
    """Share of examples whose largest logit is that of their class, in eval mode.

    Args:
        model: the network; it keeps its mode.
        data: what to classify.
        batch_size: examples a forward pass.

    Returns:
        A number in 0 … 1.

    Raises:
        DataError: there are no examples.
    """
    if not len(data):
        raise DataError(f"There are no examples in {data.name} ({data.split}) to classify.")
    device, was_training = _device(model), model.training
    model.eval()
    try:
        num_correct = 0
        for index in torch.split(torch.arange(len(data)), batch_size):
            x, y = data.inputs[index], data.targets[index]
            num_correct += int((model(x.to(device)).argmax(dim=1) == y.to(device)).sum())
    finally:
        model.train(was_training)
    return num_correct / len(data)


def save_checkpoint(path: str | Path, model: nn.Module, meta: Mapping[str, Any] | None = None) -> None:
    """Write the parameters and buffers of a network to a safetensors file.

    The file appears whole or not at all: a killed run leaves no half of one.

    Args:
        path: the file, by custom ``*.safetensors``; its folder is made.
        model: the network.
        meta: what to remember beside the weights (epoch, accuracy, recipe); anything JSON holds.

    Raises:
        OptionError: `meta` is not JSON.
        FileError: the file cannot be written.
    """
    try:
        note = json.dumps(dict(meta or {}))
    except (TypeError, ValueError) as error:
        raise OptionError(f"meta cannot be saved: {error}; give numbers, strings, lists and dicts.") from error
    # Cloned, because safetensors refuses tensors that share memory (tied weights).
    state = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in model.state_dict().items()
    }
    save_whole(Path(path), lambda staged: save_file(state, staged, metadata={_META: note}))


_META = "deepspectra"
_WRAPPERS = ("state_dict", "model_state_dict", "model")


def load_checkpoint(path: str | Path, model: nn.Module) -> dict[str, Any]:
    """Fill a network with the parameters and buffers of a file.

    Reads safetensors files and PyTorch files of a state dict, bare or under the key ``state_dict``,
    ``model_state_dict`` or ``model``; PyTorch files are read with ``weights_only=True``, so that they run no
    code. A prefix ``module.`` on every name, left by data-parallel training, is dropped. Nothing is changed
    if anything does not fit.

    Args:
        path: the file.
        model: a network of the same architecture; it keeps its device, dtype and mode.

    Returns:
        The `meta` given to `save_checkpoint`; empty for files of another origin.

    Raises:
        FileError: the file is missing, damaged or of another format, or its names or shapes differ from the
            network's; the message lists the first few that differ.
    """
    path = Path(path)
    state, meta = _read_state(path)
    if state and all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    expected = model.state_dict()
    # Counters of batch norm, which nothing here reads; checkpoints of old PyTorch lack them.
    missing = [n for n in expected if n not in state and not n.endswith("num_batches_tracked")]
    differences = [
        *(f"{name} is missing" for name in missing),
        *(f"{name} is not in the network" for name in state if name not in expected),
        *(
            f"{name} is {tuple(tensor.shape)}, not {tuple(expected[name].shape)}"
            for name, tensor in state.items()
            if name in expected and tensor.shape != expected[name].shape
        ),
    ]
    if differences:
        shown = "; ".join(differences[:4]) + (f"; and {len(differences) - 4} more" if differences[4:] else "")
        raise FileError(
            f"The checkpoint {path} does not fit the network: {shown}. Give the checkpoint's own "
            "architecture, input shape and number of classes."
        )
    model.load_state_dict(state, strict=False)
    return meta


def _read_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with path.open("rb") as file:
            head = file.read(9)
        if head[8:] == b"{":  # safetensors: the header's length in 8 bytes, then JSON
            with safe_open(path, framework="pt") as archive:
                meta = json.loads((archive.metadata() or {}).get(_META, "{}"))
                return {name: archive.get_tensor(name) for name in archive.keys()}, meta  # noqa: SIM118
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise FileError(f"There is no checkpoint {path}; give the path of an existing file.") from error
    # A damaged file can fail in any of these ways.
    except (OSError, SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError, ValueError) as error:
        reason = first_line(error)
        raise FileError(
            f"The checkpoint {path} cannot be read, it may be truncated or hold more than weights: {reason}"
        ) from error
    for key in _WRAPPERS:
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(isinstance(t, Tensor) for t in state.values()):
        raise FileError(
            f"{path} holds no state dict; save one with save_checkpoint, or with "
            "torch.save(model.state_dict(), path)."
        )
    return dict(state), {}

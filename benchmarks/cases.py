"""Networks and data: real sets where `DEEPSPECTRA_DATA` names their folder, else the digits of scikit-learn."""

from __future__ import annotations

import copy
import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

import deepspectra as ds
from deepspectra import zoo

BATCH = 500  # examples a batch for the peers, who weigh batches equally: it divides all sizes here


@dataclass(frozen=True)
class Case:
    """A network in evaluation mode, and its data."""

    name: str
    model: nn.Module
    x: Tensor
    y: Tensor

    @property
    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """Batches of equal size, as every tool reads them alike."""
        return list(zip(self.x.split(BATCH), self.y.split(BATCH), strict=True))

    @property
    def num_parameters(self) -> int:
        """P."""
        return sum(p.numel() for p in self.model.parameters())

    def problem(self) -> ds.Problem:
        """A new problem, with nothing kept from earlier ones."""
        return ds.Problem(self.model, (self.x, self.y))

    def copy(self) -> Case:
        """The same with a network of its own, for tools that leave hooks behind."""
        return replace(self, model=copy.deepcopy(self.model))

    def gradient(self) -> Tensor:
        """The gradient of the mean loss, by plain PyTorch."""
        parameters = list(self.model.parameters())
        total = torch.zeros(self.num_parameters)
        for x, y in self.batches:
            loss = nn.functional.cross_entropy(self.model(x), y, reduction="sum")
            total += torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters)])
        return total / len(self.y)

    def vector(self, seed: int, num: int = 1) -> Tensor:
        """Random (P, num)."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(self.num_parameters, num, generator=generator)


class Pooled(nn.Module):
    """Images averaged over squares."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, H / side, W / side)."""
        return nn.functional.avg_pool2d(x, self.side)


def small_vgg(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Five 3 × 3 convolutions with batch norm and three poolings, then one linear layer."""
    layers: list[nn.Module] = []
    channels = input_shape[0]
    for filters, pool in ((32, 0), (32, 1), (64, 0), (64, 1), (128, 1)):
        layers += [nn.Conv2d(channels, filters, 3, padding=1), nn.BatchNorm2d(filters), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] * pool
        channels = filters
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(2 * input_shape[1] * input_shape[2], num_classes))


def small_resnet(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """ResNet18's stages with one block each: 4.9 million parameters."""
    network = zoo.resnet18(input_shape, num_classes)
    for stage in (network.layer1, network.layer2, network.layer3, network.layer4):
        del stage[1:]  # type: ignore[union-attr, operator]
    return network


def tiny(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """An MLP whose spectrum can be had exactly: 3,030 parameters on 28 × 28 images, 3,010 on 8 × 8."""
    if input_shape[1] == 28:
        return nn.Sequential(Pooled(4), *zoo.mlp((1, 7, 7), num_classes, widths=(40, 20)))
    return zoo.mlp(input_shape, num_classes, widths=(40,))


def toy(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """The smallest, to see that everything runs."""
    return zoo.mlp(input_shape, num_classes, widths=(8,))


_NAMES = {
    "mlp": "MLP",
    "lenet": "LeNet",
    "transformer": "transformer",
    "vgg": "VGG-like",
    "resnet": "ResNet",
    "tiny": "small MLP",
    "toy": "toy MLP",
}
_OWN = {"vgg": small_vgg, "resnet": small_resnet, "tiny": tiny, "toy": toy}


def build(network: str, data: str, num: int, *, epochs: int | None = None, size: int | None = None) -> Case:
    """A network trained on `num` examples, from the checkpoint of an earlier run where there is one.

    Args:
        network: "mlp", "lenet", "transformer", "vgg", "resnet", "tiny" or "toy".
        data: a data set of the zoo; the digits instead if there are no files.
        num: examples, equally many a class.
        epochs: of training; by default those of the zoo's recipe, 0 for the initial network.
        size: side to which images are padded.
    """
    if "DEEPSPECTRA_DATA" not in os.environ:
        data = "digits"
    num = min(num, 1000) if data == "digits" else num
    examples = zoo.load(data, per_class=num // 10, size=size)
    shape = examples.input_shape
    if network in _OWN:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = _OWN[network](shape, 10)
    else:
        model = zoo.build(network, input_shape=shape, num_classes=10)
    recipe = zoo.recipe("lenet" if network in _OWN else network, data, num)
    epochs = recipe.epochs if epochs is None else epochs
    kept = Path(tempfile.gettempdir()) / "deepspectra-bench" / f"{network}-{data}-{num}-{epochs}-{size}.safetensors"
    if kept.is_file():
        zoo.load_checkpoint(kept, model)
    elif epochs:
        zoo.train(model, examples, epochs=epochs, learning_rate=recipe.learning_rate,
                  batch_size=recipe.batch_size, milestones=recipe.milestones)  # fmt: skip
        zoo.save_checkpoint(kept, model)
    state = "" if epochs else ", untrained"
    kind = {"mnist": "MNIST", "fashion": "Fashion", "cifar10": "CIFAR-10"}.get(data, data)
    return Case(f"{_NAMES[network]}, {kind} {num:,}{state}", model.eval(), examples.inputs, examples.targets)

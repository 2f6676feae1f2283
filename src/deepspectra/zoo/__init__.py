"""The papers' networks and data sets, and the training that joins them: for the demo, sweeps and tests."""

from deepspectra.zoo.convolutional import lenet, resnet18, vgg11, vgg11_bn
from deepspectra.zoo.data import CIFAR100_SAMPLE_SIZES, DATA_NAMES, SAMPLE_SIZES, LabelledData, load
from deepspectra.zoo.models import MODEL_NAMES, build, mlp, normalised, paper_side, transformer
from deepspectra.zoo.training import (
    History,
    Recipe,
    accuracy,
    load_checkpoint,
    recipe,
    save_checkpoint,
    train,
)

__all__ = [
    "CIFAR100_SAMPLE_SIZES",
    "DATA_NAMES",
    "MODEL_NAMES",
    "SAMPLE_SIZES",
    "History",
    "LabelledData",
    "Recipe",
    "accuracy",
    "build",
    "lenet",
    "load",
    "load_checkpoint",
    "mlp",
    "normalised",
    "paper_side",
    "recipe",
    "resnet18",
    "save_checkpoint",
    "train",
    "transformer",
    "vgg11",
    "vgg11_bn",
]

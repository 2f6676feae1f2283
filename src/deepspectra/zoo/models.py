"""The networks of the papers, and a small transformer, as plain modules.

Sizes in comments: B images, C channels, H × W pixels, T tokens, D features. Every network maps images
(B, C, H, W) to logits (B, num_classes), has no dropout, works in place nowhere, and so has second
derivatives. Parameter names are those of the published checkpoints (``features.0.weight``,
``layer1.0.conv1.weight``, ...), which therefore load.

Source: Papyan, "Traces of class/cross-class structure pervade deep learning spectra", JMLR 2020, and its
predecessors (VGG11, ResNet18, MLP); Wu et al., "Dissecting Hessian", 2020 (LeNet-5).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from deepspectra.errors import OptionError
from deepspectra.zoo.convolutional import lenet, resnet18, vgg11_bn
from deepspectra.zoo.transformer import transformer


def mlp(
    input_shape: tuple[int, ...],
    num_classes: int,
    widths: tuple[int, ...] = (512, 512),
    batch_norm: bool = False,
) -> nn.Module:
    """A ReLU network of fully connected layers ``fc1``, ``fc2``, ...

    With batch norm the order is linear, norm, ReLU, and the linear layers before a norm have no bias.
    Initial weights are PyTorch's.

    Args:
        input_shape: shape of one example; it is flattened.
        num_classes: number of logits.
        widths: sizes of the hidden layers; ``()`` is softmax regression.
        batch_norm: normalise each hidden layer.

    Raises:
        OptionError: a width is not positive.

    Source: Papyan, JMLR 2020, section 7, has ``widths=(2048,) * 7, batch_norm=True``.
    """
    if any(width < 1 for width in widths):
        raise OptionError(f"widths are {widths}; every width must be at least 1.")
    modules: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    fan_in = math.prod(input_shape)
    for depth, width in enumerate(widths, start=1):
        modules[f"fc{depth}"] = nn.Linear(fan_in, width, bias=not batch_norm)
        if batch_norm:
            modules[f"bn{depth}"] = nn.BatchNorm1d(width)
        modules[f"relu{depth}"] = nn.ReLU()
        fan_in = width
    modules[f"fc{len(widths) + 1}"] = nn.Linear(fan_in, num_classes)
    return nn.Sequential(modules)


_BUILDERS: Mapping[str, Callable[[tuple[int, ...], int], nn.Module]] = {
    "mlp": mlp,
    "mlp-small": partial(mlp, widths=(32, 32)),
    "mlp-bn": partial(mlp, batch_norm=True),
    "lenet": lenet,
    "vgg11-bn": vgg11_bn,
    "resnet18": resnet18,
    "resnet18-small": partial(resnet18, widths=(8, 16, 32, 64)),
    "transformer": transformer,
}
MODEL_NAMES = tuple(_BUILDERS)
PAPER_SIDE = 32  # to which the papers pad images for convolutional networks


def paper_side(model: str, data: str) -> int | None:
    """`size` of `load` with which the papers train a network on a data set; None for its own."""
    padded = model in ("lenet", "vgg11-bn", "resnet18", "resnet18-small") and data in ("mnist", "fashion")
    return PAPER_SIDE if padded else None


def normalised(model: nn.Module, input_shape: tuple[int, ...]) -> nn.Module:
    """The same network with batch norm, without parameters of its own, after every ReLU module.

    Features that enter the next layer then have mean zero and variance one over the data. The names and shapes of
    the parameters stay what they are, so that layers can be compared with those of the plain network.

    Args:
        model: a network whose ReLUs are `nn.ReLU` modules; it is changed.
        input_shape: (C, H, W) of one image.

    Returns:
        The network, in train mode.

    Raises:
        OptionError: no such modules, or there is batch norm already.

    Source: Wu et al. 2020, arXiv 2010.04261, appendix on batch norm (after the ReLU, no affine transformation).
    """
    modules = dict(model.named_modules())
    places = [name for name, module in modules.items() if isinstance(module, nn.ReLU)]
    if not places or any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in modules.values()):
        raise OptionError(
            "batch norm is put after ReLU modules of a network without batch norm, such as mlp and lenet; "
            f"this one has {len(places)} ReLU modules" + (" and batch norm already." if places else ".")
        )
    shapes = _output_shapes(model, [modules[name] for name in places], input_shape)
    for name, shape in zip(places, shapes, strict=True):
        norm = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape)]
        parent, _, child = name.rpartition(".")
        setattr(modules[parent], child, nn.Sequential(modules[name], norm(shape[1], affine=False)))
    return model.train()


@torch.no_grad()
def _output_shapes(
    model: nn.Module, watched: list[nn.Module], input_shape: tuple[int, ...]
) -> list[torch.Size]:
    """Of watched modules, for two images."""
    shapes: dict[nn.Module, torch.Size] = {}

    def note(module: nn.Module, _: object, output: Tensor) -> None:
        shapes[module] = output.shape

    hooks = [module.register_forward_hook(note) for module in watched]
    parameter = next(model.parameters())
    model(torch.zeros(2, *input_shape, dtype=parameter.dtype, device=parameter.device))
    for hook in hooks:
        hook.remove()
    return [shapes[module] for module in watched]


def build(name: str, *, input_shape: tuple[int, ...], num_classes: int, seed: int = 0) -> nn.Module:
    """A freshly initialised network, the same one for the same seed.

    The weights are drawn on the CPU under `seed`; the global random state is left as it was.

    Args:
        name: one of `MODEL_NAMES`.
        input_shape: (C, H, W) of one image.
        num_classes: number of logits.
        seed: seed of the initial weights.

    Returns:
        The network, in train mode, in the default dtype.

    Raises:
        OptionError: the name is unknown, or `num_classes` is not positive.
        ShapeError: the network does not take images of this shape.
    """
    if name not in _BUILDERS:
        raise OptionError(f"Unknown model {name!r}; choose one of {', '.join(MODEL_NAMES)}.")
    if num_classes < 1:
        raise OptionError(f"num_classes is {num_classes}; it must be at least 1.")
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        return _BUILDERS[name](input_shape, num_classes)

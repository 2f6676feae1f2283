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

from deepspectra.argument_checks import check_choice, check_count
from deepspectra.errors import OptionError, ShapeError
from deepspectra.zoo.convolutional import image_shape, lenet, resnet18, vgg11_bn


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


class Attention(nn.Module):
    """Self-attention over all tokens."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (B, T, 3, heads, D / heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, T, D / heads)
        out = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.proj(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Attention and a GELU layer of four times the width, each on a normalised input and added to it."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, num_heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """An encoder over the patches of an image, mean-pooled."""

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        num_classes: int,
        *,
        patch: tuple[int, int],
        width: int,
        depth: int,
        num_heads: int,
    ) -> None:
        super().__init__()
        channels, height, breadth = input_shape
        self.patch = patch
        self.embed = nn.Linear(channels * patch[0] * patch[1], width)
        self.position = nn.Parameter(torch.empty((height // patch[0]) * (breadth // patch[1]), width))
        self.blocks = nn.Sequential(*(Block(width, num_heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)
        nn.init.normal_(self.position, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, num_classes) of images (B, C, H, W)."""
        (batch, channels, height, breadth), (rows, columns) = x.shape, self.patch
        x = x.reshape(batch, channels, height // rows, rows, breadth // columns, columns)
        x = x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (B, T, C rows columns)
        x = self.blocks(self.embed(x) + self.position)  # (B, T, D)
        return self.head(self.norm(x).mean(dim=1))  # type: ignore[no-any-return]


def transformer(
    input_shape: tuple[int, ...],
    num_classes: int,
    *,
    patch: tuple[int, int] | None = None,
    width: int = 64,
    depth: int = 2,
    num_heads: int = 4,
) -> nn.Module:
    """A small pre-norm transformer encoder that classifies images: LayerNorm, GELU, mean pooling.

    About 100,000 parameters. Attention is `scaled_dot_product_attention`, whose fused kernels have no second
    derivative: for Hessian products run it under ``torch.nn.attention.sdpa_kernel(SDPBackend.MATH)``.
    Initial weights are PyTorch's; position embeddings are N(0, .02).

    Args:
        input_shape: (C, H, W).
        num_classes: number of logits.
        patch: (rows, columns) of one token's patch, dividing the image; ``(1, W)`` makes tokens of rows. By
            default the largest of 4, 2 and 1 pixels square that divides the image and leaves 16 tokens.
        width: features per token.
        depth: number of blocks.
        num_heads: attention heads, dividing `width`.

    Raises:
        ShapeError: the image has no (C, H, W) shape, or the patch does not divide it.
        OptionError: the heads do not divide the width.
    """
    channels, height, breadth = image_shape("transformer", input_shape, smallest=1)
    if patch is None:
        fits = (p for p in (4, 2) if height % p == breadth % p == 0 and height * breadth >= 16 * p * p)
        side = next(fits, 1)
        patch = (side, side)
    if min(patch) < 1 or height % patch[0] or breadth % patch[1]:
        raise ShapeError(f"Patches of {patch} do not divide images of {height} × {breadth}; change `patch`.")
    if num_heads < 1 or width % num_heads:
        raise OptionError(f"{num_heads} heads do not divide a width of {width}; change `num_heads`.")
    return Transformer(
        (channels, height, breadth), num_classes, patch=patch, width=width, depth=depth, num_heads=num_heads
    )


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
    norms: dict[nn.Module, nn.Module] = {}

    def make(module: nn.Module, _: object, output: Tensor) -> None:
        kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[output.ndim]
        norms[module] = kind(output.shape[1], affine=False)

    hooks = [modules[name].register_forward_hook(make) for name in places]
    parameter = next(model.parameters())
    with torch.no_grad():
        model(torch.zeros(2, *input_shape, dtype=parameter.dtype, device=parameter.device))
    for name, hook in zip(places, hooks, strict=True):
        hook.remove()
        parent, _, child = name.rpartition(".")
        setattr(modules[parent], child, nn.Sequential(modules[name], norms[modules[name]]))
    return model.train()


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
    check_choice("model", name, MODEL_NAMES)
    check_count("num_classes", num_classes)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        return _BUILDERS[name](input_shape, num_classes)

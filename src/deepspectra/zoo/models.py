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

from deepspectra.errors import OptionError, ShapeError


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

    Returns:
        The network.

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


def lenet(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """LeNet-5 with ReLU and max-pooling: 6 and 16 filters of 5 × 5, then 120 and 84 units.

    On 32 × 32 images it is the published network. Smaller images are padded before a convolution by at most
    two pixels a side, towards the 32 and 14 pixels that the two convolutions expect: 28 × 28 images give the
    usual MNIST variant, and 8 × 8 images work. Initial convolutions are N(0, √(2/n)), n = 25 × filters;
    the linear layers' are PyTorch's.

    Args:
        input_shape: (C, H, W), sides of at least 4.
        num_classes: number of logits.

    Returns:
        The network.

    Raises:
        ShapeError: the image has no (C, H, W) shape or a side under 4 pixels.

    Source: Wu et al. 2020, appendix (LeNet5 on CIFAR-10: 400, 120, 84, 10).
    """
    channels, *sides = _image_shape("lenet", input_shape, smallest=4)
    first = [_padding(side, 32) for side in sides]
    sides = [(side + 2 * pad - 4) // 2 for side, pad in zip(sides, first, strict=True)]
    second = [_padding(side, 14) for side in sides]
    sides = [(side + 2 * pad - 4) // 2 for side, pad in zip(sides, second, strict=True)]
    model = nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(channels, 6, 5, padding=(first[0], first[1])),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(6, 16, 5, padding=(second[0], second[1])),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fc1=nn.Linear(16 * math.prod(sides), 120),
            relu3=nn.ReLU(),
            fc2=nn.Linear(120, 84),
            relu4=nn.ReLU(),
            fc3=nn.Linear(84, num_classes),
        )
    )
    _initialise_convolutions(model)
    return model


def _padding(side: int, expected: int) -> int:
    """Pixels a side towards the expected size, at most what keeps a 5 × 5 convolution's output size."""
    return min(2, max(0, math.ceil((expected - side) / 2)))


class VGG(nn.Module):
    """Convolutions `features`, flattened, and the fully connected `classifier`."""

    def __init__(self, features: nn.Module, classifier: nn.Module) -> None:
        super().__init__()
        self.features = features
        self.classifier = classifier

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, num_classes) of images (B, C, H, W)."""
        return self.classifier(self.features(x).flatten(1))  # type: ignore[no-any-return]


def vgg11_bn(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """VGG11 with batch norm; in the classifier batch norm stands where dropout was.

    28,157,706 parameters for 3 × 32 × 32 images and 10 classes: the two hidden linear layers of 4096 have
    no bias. Initial convolutions are N(0, √(2/n)), n = 9 × filters, linear weights N(0, .01), biases zero.

    Args:
        input_shape: (C, H, W), sides of at least 32 (five poolings).
        num_classes: number of logits.

    Returns:
        The network.

    Raises:
        ShapeError: the image has no (C, H, W) shape or a side under 32 pixels.

    Source: Papyan 2019 and JMLR 2020, with the code of the former.
    """
    channels, height, width = _image_shape("vgg11-bn", input_shape, smallest=32)
    layers: list[nn.Module] = []
    for filters, pool in ((64, 1), (128, 1), (256, 0), (256, 1), (512, 0), (512, 1), (512, 0), (512, 1)):
        layers += [nn.Conv2d(channels, filters, 3, padding=1), nn.BatchNorm2d(filters), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] * pool
        channels = filters
    classifier = nn.Sequential(
        nn.Linear(512 * (height // 32) * (width // 32), 4096, bias=False),
        nn.BatchNorm1d(4096),
        nn.ReLU(),
        nn.Linear(4096, 4096, bias=False),
        nn.BatchNorm1d(4096),
        nn.ReLU(),
        nn.Linear(4096, num_classes),
    )
    model = VGG(nn.Sequential(*layers), classifier)
    _initialise_convolutions(model)
    for module in classifier:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


def vgg11(input_shape: tuple[int, ...], num_classes: int, width: int = 64) -> nn.Module:
    """VGG11 without batch norm and dropout, all convolutions of one width, then linear layers of 512 and 512.

    Initial convolutions are N(0, √(2/n)), n = 9 × filters; linear weights are PyTorch's.

    Args:
        input_shape: (C, H, W), sides of at least 32 (five poolings).
        num_classes: number of logits.
        width: channels of every convolution.

    Returns:
        The network.

    Raises:
        ShapeError: the image has no (C, H, W) shape or a side under 32 pixels.

    Source: Wu et al. 2020, whose VGG11-W32 to -W200 have these convolutions.
    """
    channels, height, width_of_image = _image_shape("vgg11", input_shape, smallest=32)
    layers: list[nn.Module] = []
    for pool in (1, 1, 0, 1, 0, 1, 0, 1):
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(), *[nn.MaxPool2d(2)] * pool]
        channels = width
    classifier = nn.Sequential(
        nn.Linear(width * (height // 32) * (width_of_image // 32), 512),
        nn.ReLU(),
        nn.Linear(512, 512),
        nn.ReLU(),
        nn.Linear(512, num_classes),
    )
    model = VGG(nn.Sequential(*layers), classifier)
    _initialise_convolutions(model)
    return model


class BasicBlock(nn.Module):
    """Two 3 × 3 convolutions with batch norm, or with biases in its place, beside a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, batch_norm: bool = True) -> None:
        super().__init__()
        bias, norm = not batch_norm, nn.BatchNorm2d if batch_norm else nn.Identity
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=bias)
        self.bn1 = norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=bias)
        self.bn2 = norm(out_channels)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=bias), norm(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, out, H / stride, W / stride)."""
        out = self.bn2(self.conv2(nn.functional.relu(self.bn1(self.conv1(x)))))
        return nn.functional.relu(out + self.downsample(x))


class ResNet(nn.Module):
    """A 3 × 3 stem without pooling, four stages of basic blocks, the mean over pixels, a linear layer."""

    def __init__(
        self, in_channels: int, num_classes: int, widths: tuple[int, int, int, int], batch_norm: bool
    ) -> None:
        super().__init__()
        first, second, third, fourth = widths
        self.conv1 = nn.Conv2d(in_channels, first, 3, padding=1, bias=not batch_norm)
        self.bn1 = nn.BatchNorm2d(first) if batch_norm else nn.Identity()
        self.layer1 = self._stage(first, first, 1, batch_norm)
        self.layer2 = self._stage(first, second, 2, batch_norm)
        self.layer3 = self._stage(second, third, 2, batch_norm)
        self.layer4 = self._stage(third, fourth, 2, batch_norm)
        self.fc = nn.Linear(fourth, num_classes)

    @staticmethod
    def _stage(in_channels: int, out_channels: int, stride: int, batch_norm: bool) -> nn.Module:
        return nn.Sequential(
            BasicBlock(in_channels, out_channels, stride, batch_norm),
            BasicBlock(out_channels, out_channels, 1, batch_norm),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, num_classes) of images (B, C, H, W)."""
        x = nn.functional.relu(self.bn1(self.conv1(x)))  # (B, first width, H, W)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))  # (B, last width, H / 8, W / 8)
        return self.fc(x.mean(dim=(2, 3)))  # type: ignore[no-any-return]


def resnet18(
    input_shape: tuple[int, ...],
    num_classes: int,
    widths: tuple[int, int, int, int] = (64, 128, 256, 512),
    batch_norm: bool = True,
) -> nn.Module:
    """ResNet18 for small images: a 3 × 3 stem and no max-pooling.

    11,173,962 parameters for 3 channels and 10 classes. Initial convolutions are N(0, √(2/n)),
    n = kernel area × filters, or PyTorch's without batch norm; the last layer's weights are PyTorch's.

    Args:
        input_shape: (C, H, W), any size.
        num_classes: number of logits.
        widths: channels of the four stages.
        batch_norm: after every convolution; else the convolutions have biases.

    Returns:
        The network.

    Raises:
        ShapeError: the image has no (C, H, W) shape.

    Source: Papyan 2019 and JMLR 2020; Wu et al. 2020 with four equal widths (48, 64 or 80) and no batch norm.
    """
    channels, _, _ = _image_shape("resnet18", input_shape, smallest=1)
    model = ResNet(channels, num_classes, widths, batch_norm)
    if batch_norm:
        _initialise_convolutions(model)
    return model


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

    Returns:
        The network.

    Raises:
        ShapeError: the image has no (C, H, W) shape, or the patch does not divide it.
        OptionError: the heads do not divide the width.
    """
    channels, height, breadth = _image_shape("transformer", input_shape, smallest=1)
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


def _image_shape(name: str, input_shape: tuple[int, ...], smallest: int) -> tuple[int, int, int]:
    if len(input_shape) != 3:
        raise ShapeError(f"{name} takes images (channels, height, width); input_shape is {input_shape}.")
    channels, height, width = input_shape
    if min(height, width) < smallest:
        raise ShapeError(
            f"{name} takes images of at least {smallest} × {smallest} pixels; these are {height} × {width}. "
            f"Pad them, with `size={smallest}` where the data are loaded."
        )
    return channels, height, width


def _initialise_convolutions(model: nn.Module) -> None:
    """Convolutions N(0, √(2/n)) with n = kernel area × filters (fan-out), biases zero, as in the papers."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            n = math.prod(module.kernel_size) * module.out_channels
            nn.init.normal_(module.weight, std=math.sqrt(2 / n))
            if module.bias is not None:
                nn.init.zeros_(module.bias)


_BUILDERS: Mapping[str, Callable[[tuple[int, ...], int], nn.Module]] = {
    "mlp": mlp,
    "mlp-bn": partial(mlp, batch_norm=True),
    "lenet": lenet,
    "vgg11-bn": vgg11_bn,
    "resnet18": resnet18,
    "transformer": transformer,
}
MODEL_NAMES = tuple(_BUILDERS)


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

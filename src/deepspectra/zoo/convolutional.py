"""Convolutional networks: LeNet-5, VGG11 and ResNet18."""

from __future__ import annotations

import math
from collections import OrderedDict
from itertools import pairwise

from torch import Tensor, nn

from deepspectra.errors import ShapeError


def lenet(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """LeNet-5 with ReLU and max-pooling: 6 and 16 filters of 5 × 5, then 120 and 84 units.

    On 32 × 32 images it is the published network. Smaller images are padded before a convolution by at most
    two pixels a side, towards the 32 and 14 pixels that the two convolutions expect: 28 × 28 images give the
    usual MNIST variant, and 8 × 8 images work. Initial convolutions are N(0, √(2/n)), n = 25 × filters;
    the linear layers' are PyTorch's.

    Args:
        input_shape: (C, H, W), sides of at least 4.
        num_classes: number of logits.

    Raises:
        ShapeError: the image has no (C, H, W) shape or a side under 4 pixels.

    Source: Wu et al. 2020, appendix (LeNet5 on CIFAR-10: 400, 120, 84, 10).
    """
    channels, *sides = image_shape("lenet", input_shape, smallest=4)
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
    """Eight 3 × 3 convolutions, with a pooling behind five of them, flattened, and three linear layers.

    With batch norm it stands before every ReLU, and hidden linear layers have no bias.
    """

    def __init__(
        self,
        image: tuple[int, int, int],
        num_classes: int,
        *,
        widths: tuple[int, ...],
        hidden: int,
        batch_norm: bool,
    ) -> None:
        super().__init__()
        channels, height, breadth = image
        layers: list[nn.Module] = []
        for width, pool in zip(widths, (1, 1, 0, 1, 0, 1, 0, 1), strict=True):
            layers += [nn.Conv2d(channels, width, 3, padding=1), *[nn.BatchNorm2d(width)] * batch_norm]
            layers += [nn.ReLU(), *[nn.MaxPool2d(2)] * pool]
            channels = width
        self.features = nn.Sequential(*layers)
        layers, size = [], channels * (height // 32) * (breadth // 32)
        for fan_in in (size, hidden):
            layers += [nn.Linear(fan_in, hidden, bias=not batch_norm)]
            layers += [*[nn.BatchNorm1d(hidden)] * batch_norm, nn.ReLU()]
        self.classifier = nn.Sequential(*layers, nn.Linear(hidden, num_classes))
        _initialise_convolutions(self)

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

    Raises:
        ShapeError: the image has no (C, H, W) shape or a side under 32 pixels.

    Source: Papyan 2019 and JMLR 2020, with the code of the former.
    """
    image, widths = image_shape("vgg11-bn", input_shape, smallest=32), (64, 128, 256, 256, 512, 512, 512, 512)
    model = VGG(image, num_classes, widths=widths, hidden=4096, batch_norm=True)
    for module in model.classifier:
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

    Raises:
        ShapeError: the image has no (C, H, W) shape or a side under 32 pixels.

    Source: Wu et al. 2020, whose VGG11-W32 to -W200 have these convolutions.
    """
    image = image_shape("vgg11", input_shape, smallest=32)
    return VGG(image, num_classes, widths=(width,) * 8, hidden=512, batch_norm=False)


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
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=not batch_norm)
        self.bn1 = nn.BatchNorm2d(widths[0]) if batch_norm else nn.Identity()
        for stage, (fan_in, width) in enumerate(pairwise((widths[0], *widths)), start=1):
            first = BasicBlock(fan_in, width, 1 if stage == 1 else 2, batch_norm)
            self.add_module(f"layer{stage}", nn.Sequential(first, BasicBlock(width, width, 1, batch_norm)))
        self.fc = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, num_classes) of images (B, C, H, W)."""
        x = nn.functional.relu(self.bn1(self.conv1(x)))  # (B, first width, H, W)
        for stage in range(1, 5):
            x = self.get_submodule(f"layer{stage}")(x)  # at last (B, last width, H / 8, W / 8)
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

    Raises:
        ShapeError: the image has no (C, H, W) shape.

    Source: Papyan 2019 and JMLR 2020; Wu et al. 2020 with four equal widths (48, 64 or 80) and no batch norm.
    """
    channels, _, _ = image_shape("resnet18", input_shape, smallest=1)
    model = ResNet(channels, num_classes, widths, batch_norm)
    if batch_norm:
        _initialise_convolutions(model)
    return model


def image_shape(name: str, input_shape: tuple[int, ...], smallest: int) -> tuple[int, int, int]:
    """(C, H, W); ShapeError if it has no such form, or a side under `smallest` pixels."""
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

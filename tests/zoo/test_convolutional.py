"""The convolutional networks: published sizes, images of every size, the papers' initial weights."""

import pytest
import torch
from torch import nn

from deepspectra.errors import ShapeError
from deepspectra.zoo import build, resnet18, vgg11


def num_parameters(model):
    return sum(p.numel() for p in model.parameters())


def test_narrow_networks_without_batch_norm_have_the_sizes_of_their_convolutions():
    w = 48
    convolutions = 9 * 3 * w + w + 7 * (9 * w * w + w)
    linear = w * 512 + 512 + 512 * 512 + 512 + 512 * 10 + 10
    assert num_parameters(vgg11((3, 32, 32), 10, width=w)) == convolutions + linear
    blocks = 16 * (9 * w * w + w) + 3 * (w * w + w)  # three stages begin with a 1 x 1 shortcut
    narrow = resnet18((3, 32, 32), 10, widths=(w,) * 4, batch_norm=False)
    assert num_parameters(narrow) == 9 * 3 * w + w + blocks + w * 10 + 10
    assert not any(isinstance(module, nn.BatchNorm2d) for module in narrow.modules())
    assert vgg11((1, 40, 32), 3, width=4)(torch.randn(2, 1, 40, 32)).shape == (2, 3)
    small = resnet18((1, 9, 9), 3, widths=(4,) * 4, batch_norm=False)
    assert small(torch.randn(2, 1, 9, 9)).shape == (2, 3)
    with pytest.raises(ShapeError, match="vgg11"):
        vgg11((1, 28, 28), 10)


def test_vgg_takes_images_of_32_pixels_and_more_only():
    model = build("vgg11-bn", input_shape=(1, 40, 40), num_classes=3).eval()
    assert model(torch.zeros(1, 1, 40, 40)).shape == (1, 3)
    with pytest.raises(ShapeError, match="size=32"):
        build("vgg11-bn", input_shape=(1, 28, 28), num_classes=10)


def test_convolutions_start_with_the_papers_variance():
    model = build("resnet18", input_shape=(3, 32, 32), num_classes=10)
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 30_000:
            fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
            # The relative standard error of a variance of 30,000 draws is √(2 / 30,000) = .008.
            assert module.weight.var().item() * fan_out / 2 == pytest.approx(1, abs=0.04)

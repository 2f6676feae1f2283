"""The networks: published sizes, seeds, second derivatives, and images of every size."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from deepspectra import zoo
from deepspectra.errors import OptionError, ShapeError
from deepspectra.zoo import MODEL_NAMES, build, lenet, mlp, transformer


def num_parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "input_shape", "expected"),
    [
        ("mlp", (1, 28, 28), 784 * 512 + 512 + 512 * 512 + 512 + 512 * 10 + 10),
        ("mlp-bn", (1, 28, 28), 784 * 512 + 1024 + 512 * 512 + 1024 + 512 * 10 + 10),
        ("lenet", (3, 32, 32), 62_006),
        ("lenet", (1, 28, 28), 61_706),
        ("vgg11-bn", (3, 32, 32), 28_157_706),
        ("resnet18", (3, 32, 32), 11_173_962),
    ],
)
def test_the_published_networks_have_their_published_sizes(name, input_shape, expected):
    assert num_parameters(build(name, input_shape=input_shape, num_classes=10)) == expected


@pytest.mark.parametrize("input_shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 40, 36)])
@pytest.mark.parametrize("name", ["mlp", "mlp-bn", "lenet", "resnet18", "transformer"])
def test_every_network_takes_every_image_size(name, input_shape):
    model = build(name, input_shape=input_shape, num_classes=7).eval()
    assert model(torch.zeros(2, *input_shape)).shape == (2, 7)


@pytest.mark.parametrize("name", ["mlp", "mlp-bn", "lenet", "resnet18", "transformer"])
def test_a_seed_fixes_the_weights_and_the_global_state_stays(name):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, same, other = (build(name, input_shape=(1, 8, 8), num_classes=3, seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    pairs = list(zip(first.parameters(), same.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert not all(torch.equal(a, c) for a, _, c in pairs)


@pytest.mark.parametrize("name", ["mlp-bn", "lenet", "transformer"])
def test_the_kinds_of_layer_have_symmetric_second_derivatives(name):
    model = build(name, input_shape=(1, 8, 8), num_classes=3).double().eval()
    parameters = list(model.parameters())
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 1, 8, 8, generator=generator, dtype=torch.float64)
    u, v = ([torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters] for _ in range(2))

    def product(direction):
        loss = nn.functional.cross_entropy(model(x), torch.tensor([0, 1, 2, 0]))
        gradient = torch.autograd.grad(loss, parameters, create_graph=True)
        inner = sum((g * d).sum() for g, d in zip(gradient, direction, strict=True))
        return torch.autograd.grad(inner, parameters)

    with sdpa_kernel(SDPBackend.MATH):
        left = sum((a * b).sum() for a, b in zip(u, product(v), strict=True))
        right = sum((a * b).sum() for a, b in zip(v, product(u), strict=True))
    assert left.abs() > 0
    torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-9)


def test_the_tokens_are_the_patches_row_by_row():
    model = transformer((2, 4, 6), 3, patch=(2, 3))
    x = torch.arange(2 * 4 * 6.0).reshape(1, 2, 4, 6)
    tokens = []
    model.embed.register_forward_pre_hook(lambda _, inputs: tokens.append(inputs[0]))
    model(x)
    expected = torch.stack([x[0, :, r : r + 2, c : c + 3].flatten() for r in (0, 2) for c in (0, 3)])
    torch.testing.assert_close(tokens[0][0], expected)


def test_attention_mixes_tokens_as_the_formula_says():
    model = transformer((1, 4, 4), 2, patch=(2, 2), width=8, num_heads=2).double()
    attention = model.blocks[0].attention
    x = torch.randn(3, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    query, key, value = attention.qkv(x).chunk(3, dim=-1)
    heads = []
    for h in (slice(0, 4), slice(4, 8)):
        weights = (query[..., h] @ key[..., h].mT / 4**0.5).softmax(dim=-1)
        heads.append(weights @ value[..., h])
    torch.testing.assert_close(attention(x), attention.proj(torch.cat(heads, dim=-1)))


@pytest.mark.parametrize("input_shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32)])
def test_the_transformer_is_small(input_shape):
    assert 20_000 < num_parameters(build("transformer", input_shape=input_shape, num_classes=10)) < 200_000


def test_widths_are_free():
    assert num_parameters(mlp((1, 2, 2), 3, widths=())) == 4 * 3 + 3
    assert [name for name, _ in mlp((4,), 3, widths=(5,), batch_norm=True).named_parameters()] == [
        *("fc1.weight", "bn1.weight", "bn1.bias", "fc2.weight", "fc2.bias"),
    ]


def test_misuse_says_what_to_do():
    with pytest.raises(OptionError, match="one of " + ", ".join(map(repr, MODEL_NAMES))):
        build("vgg", input_shape=(3, 32, 32), num_classes=10)
    with pytest.raises(OptionError, match="num_classes must be an integer, at least 1"):
        build("mlp", input_shape=(3, 32, 32), num_classes=0)
    with pytest.raises(OptionError, match="at least 1"):
        mlp((4,), 3, widths=(5, 0))
    with pytest.raises(ShapeError, match=r"takes images \(channels, height, width\)"):
        lenet((784,), 10)
    with pytest.raises(ShapeError, match="at least 4 × 4"):
        lenet((1, 3, 8), 10)
    with pytest.raises(ShapeError, match="do not divide images"):
        transformer((1, 8, 8), 10, patch=(3, 3))
    with pytest.raises(OptionError, match="heads do not divide"):
        transformer((1, 8, 8), 10, num_heads=5)


def test_batch_norm_after_every_relu_keeps_names_and_centres_features() -> None:
    plain = zoo.build("lenet", input_shape=(1, 8, 8), num_classes=10)
    changed = zoo.normalised(zoo.build("lenet", input_shape=(1, 8, 8), num_classes=10), (1, 8, 8))
    assert {n: p.shape for n, p in plain.named_parameters()} == {n: p.shape for n, p in changed.named_parameters()}
    seen = []
    changed.fc2.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    changed(torch.randn(50, 1, 8, 8))
    assert seen[0].mean(0).abs().max() < 1e-5
    live = seen[0].std(0) > 0.1  # units that never fire stay zero
    assert live.any()
    assert (seen[0].std(0, correction=0)[live] - 1).abs().median() < 1e-2
    with pytest.raises(OptionError, match="batch norm already"):
        zoo.normalised(changed, (1, 8, 8))
    with pytest.raises(OptionError, match="0 ReLU modules"):
        zoo.normalised(zoo.build("transformer", input_shape=(1, 8, 8), num_classes=10), (1, 8, 8))

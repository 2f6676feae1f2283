"""Layers, classes and networks of which little is left: no raw errors, and no numbers made of rounding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import deepspectra as ds
from deepspectra.errors import FallbackWarning
from nets import Case, chunks, labels
from reference import Reference, error


def mlp(outputs: int = 3, activation: nn.Module | None = None) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), activation or nn.Tanh(), nn.Linear(5, outputs)).double()


def data(num: int = 10, num_classes: int = 3) -> tuple[Tensor, Tensor]:
    return torch.randn(num, 4).double(), labels(num, num_classes)


def silent() -> ds.Problem:
    """Hidden units that never fire: the first layer has no effect, the second has its bias alone."""
    model = mlp(activation=nn.ReLU())
    nn.init.zeros_(model[0].weight)
    nn.init.constant_(model[0].bias, -1.0)
    return ds.Problem(model, data())


def test_layers_whose_block_is_zero_are_left_out_of_a_comparison() -> None:
    other = ds.Problem(mlp(activation=nn.ReLU()), data())
    for pair in ((silent(), other), (other, silent())):
        found = ds.compare(*pair, num_whole=0)
        assert list(found) == ["2"]
        assert "nan" not in str(found)
    assert list(ds.compare(other, other, num_whole=0)) == ["0", "2"]


@pytest.mark.parametrize("shift", [0.0, 7.0])
def test_features_that_are_the_same_for_all_have_no_collapse(shift: float) -> None:
    torch.manual_seed(1)
    x = torch.full((9, 4), 1 / 3 + shift).double() + 1e-16 * torch.randn(9, 4).double()
    for entry in ds.collapse(ds.Problem(mlp(), (x, torch.arange(9) % 3))).values():
        for value in (entry.nc1, entry.nc2_norms, entry.nc2_angles, entry.nc2_simplex):
            assert value != value
        assert 0 <= entry.nc4 <= 1


def test_features_that_differ_by_little_have_their_collapse() -> None:
    x, y = data(30)
    wanted = ds.collapse(ds.Problem(nn.Linear(4, 3).double(), (x, y)))[""]
    near = ds.collapse(ds.Problem(nn.Linear(4, 3).double(), (1e-6 * x + 1, y)))[""]
    assert near.nc1 == pytest.approx(wanted.nc1, rel=1e-4)
    assert near.nc2_simplex == pytest.approx(wanted.nc2_simplex, rel=1e-4)


@pytest.mark.parametrize("of", ["gradients", "errors"])
@pytest.mark.parametrize("level", ["class", "cross_class"])
def test_means_whose_weights_leave_the_range_of_the_dtype_are_zero(of: str, level: str) -> None:
    torch.manual_seed(2)
    model, (x, y) = mlp(), data(12)
    model[2].bias.data[2] -= 400  # probabilities of 1e-174, whose roots are zero in float32
    short, long = (ds.class_means(ds.Problem(model, (x, y), dtype=t), of, level=level) for t in (torch.float32, None))
    assert bool(short.class_means.isfinite().all())
    heavy = long.class_weights > 1e-6
    assert error(short.class_means[heavy], long.class_means[heavy].float()) < 1e-2
    if level == "cross_class":
        assert bool(short.cross_class_means.isfinite().all())
        heavy = long.cross_class_weights > 1e-6
        assert bool((long.cross_class_weights.sqrt().float() == 0).any())
        assert error(short.cross_class_means[heavy], long.cross_class_means[heavy].float()) < 1e-2


def test_classes_with_the_same_logits_are_one_group_and_that_is_said() -> None:
    model = mlp(4)
    nn.init.zeros_(model[2].weight)
    model[2].bias.data = torch.tensor([0.0, 0.0, 1.0, 1.0]).double()
    with pytest.warns(FallbackWarning, match="2 groups and not 3"):
        found = ds.class_groups(ds.Problem(model, data(10, 4)), 3)
    assert found[0] == found[1] != found[2] == found[3]


def test_classes_that_all_have_the_same_logits_are_in_arbitrary_groups() -> None:
    model = mlp(4)
    nn.init.zeros_(model[2].weight)
    nn.init.zeros_(model[2].bias)
    problem = ds.Problem(model, data(10, 4))
    with pytest.warns(FallbackWarning, match="arbitrary"):
        found = ds.class_groups(problem, 2)
    assert found.tolist() == [0, 0, 1, 1]
    assert ds.class_groups(problem, 1).tolist() == [0, 0, 0, 0]


def test_the_default_kinds_of_many_labels_an_example_are_without_cfac() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Conv2d(2, 3, 1)).double()
    problem = ds.Problem(model, (torch.randn(4, 1, 3, 3).double(), torch.randint(0, 3, (4, 2, 2))))
    assert ds.kronecker_quality(problem).kinds == ("kfac", "ekfac")


@pytest.mark.parametrize(
    "options",
    [
        {"groups": 2},
        {"groups": 4},
        {"groups": 2, "stride": 2, "bias": False},
        {"groups": 2, "dilation": 2, "padding": 1},
    ],
    ids=str,
)
def test_factors_of_grouped_convolutions_are_those_of_each_group(options: dict) -> None:
    torch.manual_seed(3)
    conv = nn.Conv2d(4, 4, 2, **options)
    size = functional.conv2d(
        torch.zeros(1, 4, 5, 5), conv.weight, None, conv.stride, conv.padding, conv.dilation, conv.groups
    )
    model = nn.Sequential(conv, nn.Tanh(), nn.Flatten(), nn.Linear(size.numel(), 3)).double()
    x, y = torch.randn(6, 4, 5, 5).double(), labels(6, 3)
    case = Case(model, chunks(x, y, [4, 2]))
    K = ds.kronecker(case.problem())
    block, groups = K.blocks["0"], conv.groups
    patches = functional.unfold(x, 2, conv.dilation, conv.padding, conv.stride)  # (6, 4·4, T)
    patches = patches.view(6, groups, -1, patches.shape[2])
    if conv.bias is not None:
        patches = torch.cat([patches, torch.ones_like(patches[:, :, :1])], 2)
    A = torch.einsum("bgdt,bget->gde", patches, patches) / (6 * patches.shape[3])
    assert error(block.right[0], A) < 1e-10
    out = model[0](x).detach().requires_grad_()
    logits = model[1:](out)
    p = logits.detach().softmax(1)
    S = torch.zeros(groups, 4 // groups, 4 // groups).double()
    for k in range(3):
        for b in range(6):
            (e,) = torch.autograd.grad(
                functional.cross_entropy(logits[b : b + 1], torch.tensor([k])), out, retain_graph=True
            )
            e = e[b].view(groups, 4 // groups, -1)
            S += p[b, k] / 6 * torch.einsum("got,gpt->gop", e, e)
    assert error(block.left[0], S) < 1e-10
    index = K.index["0"]
    diagonal = Reference(case).gauss_newton.diagonal()[index]
    assert ds.kronecker(case.problem(), "ekfac").blocks["0"].trace == pytest.approx(float(diagonal.sum()), rel=1e-10)

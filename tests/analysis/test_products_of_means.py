"""Products of means for means of products, by definition, and gradients without the mean feature."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import deepspectra as ds
from deepspectra.analysis.products_of_means import _centred, _centred_gram
from deepspectra.rows.captures import captures_of
from deepspectra.rows.parameter_uses import Matrix
from nets import CASES, labels
from reference import agrees, case_and_reference, descending, error, inputs_and_errors

FIVE = ("class", "logit", "interaction", "within", "true")


def test_with_one_example_a_class_means_of_products_are_products_of_means() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5)).double()
    x, y = torch.randn(5, 4, dtype=torch.float64), torch.arange(5)
    for layer in ds.layers(ds.Problem(model, (x, y))).values():
        assert layer.khatri_rao is not None
        off = ~torch.eye(5, dtype=torch.bool)
        assert (layer.khatri_rao.class_cosine - 1).abs().max() < 1e-10
        assert layer.khatri_rao.class_error.max() < 1e-10
        assert (layer.khatri_rao.cross_cosine[off] - 1).abs().max() < 1e-10
        assert layer.khatri_rao.cross_cosine.diagonal().isnan().all()


@pytest.mark.parametrize("name", ["relu_mlp", "unbalanced"])
def test_the_khatri_rao_claim_is_measured_by_its_definition(name: str) -> None:
    case, ref = case_and_reference(name)
    modules = dict(case.model.named_modules())
    w_c, g_c, w_ck, g_ck = ref.means
    names = list(ref.parameters)
    for layer in ds.layers(case.problem()).values():
        h, e = inputs_and_errors(ref, modules[layer.name])
        start = sum(ref.parameters[n].numel() for n in names[: names.index(f"{layer.name}.weight")])
        stop = start + ref.parameters[f"{layer.name}.weight"].numel()
        assert layer.khatri_rao is not None
        for c in range(ref.num_classes):
            inside = ref.labels == c
            h_c = h[inside].mean(0)
            others = [k for k in range(ref.num_classes) if k != c]
            e_ck = {k: (ref.weights[inside, k, None] * e[inside, k]).sum(0) / w_ck[c, k] for k in others}
            e_c = sum((w_ck[c, k] * e_ck[k] for k in others), torch.zeros_like(e_ck[others[0]])) / w_c[c]
            pairs = [(g_c[c], e_c, layer.khatri_rao.class_cosine[c], layer.khatri_rao.class_error[c])]
            pairs += [
                (g_ck[c, k], e_ck[k], layer.khatri_rao.cross_cosine[c, k], layer.khatri_rao.cross_error[c, k])
                for k in others
            ]
            for gradient, mean_error, cosine, relative in pairs:
                truth, product = gradient[start:stop], torch.outer(mean_error, h_c).flatten()
                expected = truth @ product / (truth.norm() * product.norm())
                assert float(cosine) == pytest.approx(float(expected), abs=1e-9)
                assert float(relative) == pytest.approx(float((truth - product).norm() / truth.norm()), abs=1e-9)


@pytest.mark.parametrize("name", ["relu_mlp", "conv_pool", "absent_class", "class_weights"])
def test_gradients_without_the_mean_feature(name: str) -> None:
    """Against gradients to a weight less Σ e ⊗ h̄, where Σ e is the gradient to its bias."""
    case, ref = case_and_reference(name)
    starts, at = {}, 0
    for key, value in ref.parameters.items():
        starts[key], at = (at, value.numel()), at + value.numel()
    modules = dict(case.model.named_modules())
    for layer in ds.layers(case.problem()).values():
        module = modules[layer.name]
        assert isinstance(module, (nn.Linear, nn.Conv2d))
        inputs, _ = inputs_and_errors(ref, module)
        if isinstance(module, nn.Conv2d):
            images = inputs.view(len(inputs), module.in_channels, -1)
            side = math.isqrt(images.shape[2])
            patches = torch.nn.functional.unfold(images.view(*images.shape[:2], side, side), module.kernel_size)
            features = patches.mT
        else:
            features = inputs[:, None]
        counts = (ref.weights.sum(1) > 0).double()  # rows of classes with weight
        mean = (counts[:, None, None] * features).sum((0, 1)) / (counts.sum() * features.shape[1])
        (start, size), (begin, num) = starts[f"{layer.name}.weight"], starts[f"{layer.name}.bias"]
        rows, summed = ref.rows[:, start : start + size], ref.rows[:, begin : begin + num]
        centred = rows - torch.einsum("ro,d->rod", summed, mean).flatten(1)
        scale = float(descending(centred.T @ centred)[0])
        assert layer.centred is not None
        assert agrees(layer.centred.values, centred.T @ centred, scale)
        for part in FIVE:
            expected = centred.T @ ref.projections[part] @ centred
            assert agrees(layer.centred.parts[part], expected, scale)


class Turned(nn.Module):
    """x W + b, with W (inputs, outputs)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(16, 6)), nn.Parameter(torch.randn(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias, x, self.weight)


@pytest.mark.parametrize("kind", ["matrix", "transposed", "convolution", "groups"])
def test_rows_without_the_mean_feature_have_those_inner_products(kind: str) -> None:
    """The smaller side decides which are formed; both are the same rows."""
    torch.manual_seed(0)
    convolution = nn.Conv2d(4, 6, 2, padding=1, groups=2 if kind == "groups" else 1)
    first: dict[str, nn.Module] = {"matrix": nn.Linear(16, 6), "transposed": Turned()}
    model = nn.Sequential(first.get(kind, convolution), nn.Tanh(), nn.Flatten(), nn.LazyLinear(3)).double()
    x = torch.randn(8, 16, dtype=torch.float64)
    x = x if kind in first else x.view(8, 4, 2, 2)
    model(x)
    captures = captures_of(ds.Problem(model, [(x[:3], labels(3, 3)), (x[3:], labels(5, 3))]))
    captures.hold()
    uses = [batch[0] for batch in dict(captures.by_layer())["0"]]
    assert all(isinstance(use, Matrix) and use.slice.transposed == (kind == "transposed") for use in uses)
    mean = torch.randn(uses[0].features().shape[2], dtype=torch.float64)
    rows = torch.cat([_centred(use, mean) for use in uses])
    assert rows.shape == (16, uses[0].slice.numel)
    assert error(rows @ rows.T, _centred_gram(uses, mean)) < 1e-12


def test_logit_means_of_constant_features_are_products_with_them() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3)).double()
    x = torch.randn(1, 4).double().expand(12, 4).contiguous()
    (layer,) = ds.layers(ds.Problem(model, (x, labels(12, 3)))).values()
    assert layer.khatri_rao is not None
    assert error(layer.khatri_rao.logit_cosine, torch.ones(3).double()) < 1e-12
    assert layer.centred is not None
    assert float(layer.centred.values[0]) < 1e-12 * float(layer.gradients.values[0])


def test_reused_layers_have_no_product_of_means() -> None:
    reused = ds.layers(CASES["reused_module"]().problem()).values()
    assert any(layer.khatri_rao is None and layer.features is not None for layer in reused)

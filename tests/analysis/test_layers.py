"""Class structure layer by layer, against hooks and formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import deepspectra as ds
from deepspectra.errors import FallbackWarning, LossError, MemoryBudgetError, OptionWarning
from deepspectra.operators.curvature import HessianBlock
from deepspectra.rows.averages import Averages
from deepspectra.rows.held_rows import gram_bytes
from deepspectra.rows.spectrum import Spectrum
from nets import CASES, CLASSIFICATION, Case, chunks, labels
from reference import Reference, agrees, case_and_reference, descending, error, inputs_and_errors

FIVE = ("class", "logit", "interaction", "within", "true")


@pytest.mark.parametrize("name", ["relu_mlp", "unbalanced", "absent_class", "conv_pool", "class_weights"])
def test_features_and_errors_are_what_hooks_see(name: str) -> None:
    case, ref = case_and_reference(name)
    found = ds.layers(case.problem())
    modules = dict(case.model.named_modules())
    for layer in found.values():
        h, e = inputs_and_errors(ref, modules[layer.name])
        assert layer.features is not None
        assert layer.errors is not None
        num = len(h)
        moment = h.T @ h / num
        mean = h.mean(0)
        by_class = [h[ref.labels == c] for c in ref.labels.unique()]
        between = torch.zeros_like(moment)
        for some in by_class:
            between += len(some) / num * torch.outer(some.mean(0) - mean, some.mean(0) - mean)
        scale = float(descending(moment)[0])
        assert agrees(layer.features.values, moment, scale)
        assert agrees(layer.features.parts["mean"], torch.outer(mean, mean), scale)
        assert agrees(layer.features.parts["class"], between, scale)
        assert agrees(layer.features.parts["within"], moment - between - torch.outer(mean, mean), scale)

        rows = (ref.weights.sqrt()[..., None] * e).flatten(0, 1)
        scale = float(descending(rows.T @ rows)[0])
        assert agrees(layer.errors.values, rows.T @ rows, scale)
        for part in FIVE:
            assert agrees(layer.errors.parts[part], rows.T @ ref.projections[part] @ rows, scale)


@pytest.mark.parametrize("name", CLASSIFICATION)
def test_gradients_of_a_layer_are_its_block_of_g(name: str) -> None:
    case, ref = case_and_reference(name)
    for layer in ds.layers(case.problem()).values():
        block = ref.block(ref.gauss_newton, f"{layer.name}.*" if layer.name else "*")
        if layer.name:
            own = [p for p in ref.parameters if p.rpartition(".")[0] == layer.name]
            block = ref.block(ref.gauss_newton, *own)
        else:
            own = [p for p in ref.parameters if "." not in p]
            block = ref.block(ref.gauss_newton, *own)
        assert layer.num_parameters == len(block)
        scale = float(descending(block)[0])
        assert agrees(layer.gradients.values, block, scale)
        for part in FIVE:
            assert agrees(layer.gradients.parts[part], ref.block(ref.parts[part], *own), scale)


@pytest.mark.parametrize("groups", [2, 4])
def test_grouped_kernels_have_the_features_of_their_group(groups: int) -> None:
    """Products of means, and gradients without the mean feature, by their definitions."""
    torch.manual_seed(groups)
    net = nn.Sequential(nn.Conv2d(4, 8, 2, groups=groups), nn.Tanh(), nn.Flatten(), nn.Linear(32, 3)).double()
    x, y = torch.randn(9, 4, 3, 3).double(), labels(9, 3)
    case = Case(net, [(x[:4], y[:4]), (x[4:], y[4:])])
    ref = Reference(case)
    layer = ds.layers(case.problem(), hessian=False)["0"]
    assert layer.khatri_rao is not None
    assert layer.centred is not None
    features = torch.nn.functional.unfold(x, 2).mT.unflatten(2, (groups, -1))  # (n, T, groups, d)
    _, e = inputs_and_errors(ref, net[0])
    e = e.view(len(x), 3, groups, 8 // groups, 4)
    size, biases = net[0].weight.numel(), 8
    w_c, g_c, w_ck, g_ck = ref.means
    for c in range(3):
        inside = ref.labels == c
        h_c = features[inside].mean(0)
        for k in range(3):
            if k != c:
                mean_error = (ref.weights[inside, k, None, None, None] * e[inside, k]).sum(0) / w_ck[c, k]
                product = torch.einsum("got,tgd->god", mean_error, h_c).flatten()
                gradient = g_ck[c, k, :size]
                cosine = gradient @ product / (gradient.norm() * product.norm())
                assert float(layer.khatri_rao.cross_cosine[c, k]) == pytest.approx(float(cosine), abs=1e-9)
    mean = features.mean((0, 1))[:, None].expand(groups, 8 // groups, -1).flatten(0, 1)  # (o, d)
    rows, summed = ref.rows[:, :size], ref.rows[:, size : size + biases]
    centred = rows - torch.einsum("ro,od->rod", summed, mean).flatten(1)
    scale = float(descending(centred.T @ centred)[0])
    assert agrees(layer.centred.values, centred.T @ centred, scale)
    assert agrees(layer.gradients.values, ref.block(ref.gauss_newton, "0.*"), scale)
    assert float(w_c.min()) > 0
    assert g_c.isfinite().all()


@pytest.mark.parametrize("scale", [1e4, 1e12])
def test_a_saturated_network_has_layers_of_no_curvature(scale: float) -> None:
    net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    nn.init.normal_(net[2].weight, std=scale)
    problem = ds.Problem(net, (torch.randn(9, 5).double(), labels(9, 3)))
    largest = float(torch.linalg.eigvalsh(ds.GaussNewton(problem).dense())[-1])
    for layer in ds.layers(problem, hessian=False).values():
        assert float(layer.gradients.values[0]) <= 1.0001 * largest
        assert layer.khatri_rao is not None
        assert layer.collapse is not None
        assert layer.collapse.nc1 > 0


def test_normalisations_have_gradients_only() -> None:
    found = ds.layers(CASES["conv_batchnorm"]().problem())
    norm = found["1"]
    assert norm.features is None
    assert norm.errors is None
    assert norm.shape == (3,)
    with pytest.raises(KeyError, match="no layer 'nothing'"):
        found["nothing"]


def test_layers_that_do_not_fit_together_are_captured_in_groups() -> None:
    case = CASES["relu_mlp"]()
    whole = ds.layers(case.problem())
    problem = case.problem()
    problem.memory = gram_bytes(60) + 1  # the Gram matrix just fits; not all layers at once
    seen: list[tuple[int, int | None, str]] = []
    parts = ds.layers(problem, progress=lambda *now: seen.append(now))
    assert list(whole) == ["0", "2", "4"]
    assert seen == [(0, 3, "0"), (1, 3, "2"), (2, 3, "4")]
    for one, other in zip(whole.values(), parts.values(), strict=True):
        assert error(one.gradients.values, other.gradients.values) < 1e-12
    problem.memory = 2000
    with pytest.raises(MemoryBudgetError, match="layer"):
        ds.layers(problem)


def test_batches_do_not_matter() -> None:
    case = CASES["conv_batchnorm"]()
    x, y = case.tensors
    one, other = (
        ds.layers(case.problem()),
        ds.layers(ds.Problem(case.model, chunks(x, y, [1, 4, len(x) - 5]))),
    )
    for a, b in zip(one.values(), other.values(), strict=True):
        assert error(a.gradients.values, b.gradients.values) < 1e-10
        if a.collapse and b.collapse:
            assert a.collapse.nc1 == pytest.approx(b.collapse.nc1, rel=1e-9)


def test_either_side_of_rows_gives_the_same_spectrum() -> None:
    torch.manual_seed(1)
    rows = torch.randn(40, 7).double()
    basis = torch.linalg.qr(torch.randn(40, 5).double()).Q
    averages = Averages({"class": basis[:, :2]}, basis, ("class", "within"))
    wide = Spectrum.of_gram(rows @ rows.T, averages, 7, 1e-16)
    narrow = Spectrum.of_rows(rows, averages, 1e-16)
    assert narrow.vectors is None
    assert error(wide.values, narrow.values) < 1e-12
    for part in ("class", "within"):
        assert error(wide.part(part)[0], narrow.part(part)[0]) < 1e-12
        assert error(wide.part(part)[1], narrow.part(part)[1]) < 1e-12


def test_stable_ranks() -> None:
    case, ref = case_and_reference("relu_mlp")
    values = descending(ref.gauss_newton)
    found = ds.gram_spectrum(case.problem())
    assert found.stable_rank == pytest.approx(float(values.square().sum() / values[0] ** 2), rel=1e-9)
    assert found.intrinsic_dimension == pytest.approx(float(values.sum() / values[0]), rel=1e-9)


def test_a_layer_whose_matrix_is_too_large_for_memory_is_left_out() -> None:
    model = nn.Sequential(nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 3))
    problem = ds.Problem(model, (torch.randn(900, 300), labels(900, 3)), memory="60MiB", batch_size=100)
    with pytest.warns(FallbackWarning, match="leaves out 0: a matrix of 1,800 rows"):
        assert list(ds.layers(problem)) == ["2"]
    with pytest.raises(MemoryBudgetError, match="1,800 rows"):
        ds.layers(problem.restrict("0.*"))


def test_text_dtype_and_errors() -> None:
    problem = CASES["relu_mlp"](torch.float32).problem()
    text = str(ds.layers(problem))
    assert "NC1" in text
    assert len(text.splitlines()) == 10
    assert text.count("that of G") == 3
    assert ds.layers(problem, dtype=torch.float64)["0"].gradients.provenance.dtype == "float64"
    assert ds.layers(problem, effects="four-way")["0"].gradients.part_names == (
        "class",
        "cross",
        "within",
        "true",
    )
    with pytest.raises(LossError, match="class structure"):
        ds.layers(CASES["mse_module"]().problem())


def own_names(ref: Reference, layer: str) -> list[str]:
    return [name for name in ref.parameters if name.rpartition(".")[0] == layer]


PIECEWISE_LINEAR = ("relu_mlp", "conv_batchnorm", "conv_pool")


CURVED = ("layernorm_gelu", "attention_module", "tied_modules", "reused_module")


@pytest.mark.parametrize("name", PIECEWISE_LINEAR)
def test_blocks_of_h_are_those_of_g_where_outputs_are_linear_in_a_layer(name: str) -> None:
    case, ref = case_and_reference(name)
    for layer in ds.layers(case.problem(), num=3).values():
        block = ref.block(ref.hessian, *own_names(ref, layer.name))
        assert layer.hessian is not None
        assert layer.hessian.is_gauss_newton
        assert layer.hessian.residual < 1e-13
        assert error(layer.hessian.values, descending(block)[:3]) < 1e-9
        assert layer.hessian.trace == pytest.approx(float(block.trace()), rel=1e-9)
        assert layer.hessian.trace_standard_error == 0
        assert layer.hessian.density.size == len(block)


@pytest.mark.parametrize("name", CURVED)
def test_blocks_of_h_are_measured_where_they_are_not_those_of_g(name: str) -> None:
    case, ref = case_and_reference(name)
    apart = 0
    for layer in ds.layers(case.problem(), num=3).values():
        block = ref.block(ref.hessian, *own_names(ref, layer.name))
        residual = block - ref.block(ref.gauss_newton, *own_names(ref, layer.name))
        h = layer.hessian
        assert h is not None
        assert h.is_gauss_newton == (float(residual.norm()) < 1e-12)
        if h.is_gauss_newton:
            continue
        apart += 1
        expected = descending(block)
        size = float(residual.norm()) / float(ref.block(ref.gauss_newton, *own_names(ref, layer.name)).norm())
        assert size / 3 < h.residual < 3 * size
        allowed = h.residual_norms + 1e-9
        assert bool(((h.values - expected[: len(h.values)]).abs() <= allowed).all())
        assert h.smallest == pytest.approx(float(expected[-1]), rel=1e-2)
        assert abs(h.trace - float(block.trace())) <= 4 * h.trace_standard_error + 1e-9
    assert apart


@pytest.mark.parametrize("way", ["double backward", "linearize"])
def test_products_with_blocks_of_h_from_shared_graphs(way: str) -> None:
    case, ref = case_and_reference("layernorm_gelu")
    hessian = ds.Hessian(case.problem(), way=way)
    for layer in dict.fromkeys(name.rpartition(".")[0] for name in ref.parameters):
        names = own_names(ref, layer)
        expected = ref.block(ref.hessian, *names)
        assert error(HessianBlock(hessian, names).dense(), expected) < 1e-10
    blocks = [(own_names(ref, layer), torch.randn(48, 2).double()) for layer in ("0",)]
    (found,) = ds.Residual(case.problem()).diagonal_blocks(blocks)
    residual = ref.block(ref.hessian, *blocks[0][0]) - ref.block(ref.gauss_newton, *blocks[0][0])
    assert error(found, residual @ blocks[0][1]) < 1e-10


class OnceOnly(torch.autograd.Function):
    """A doubling that PyTorch cannot differentiate twice."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return 2 * gradient


class Doubled(nn.Module):
    """A layer of such a function."""

    def forward(self, x: Tensor) -> Tensor:
        return OnceOnly.apply(x)


def test_without_second_derivatives_there_are_no_blocks_of_h() -> None:
    model = nn.Sequential(nn.Linear(4, 5), Doubled(), nn.ReLU(), nn.Linear(5, 3)).double()
    problem = ds.Problem(model, (torch.randn(9, 4).double(), labels(9, 3)))
    with pytest.warns(FallbackWarning, match="hessian=False"):
        found = ds.layers(problem)
    assert all(layer.hessian is None for layer in found.values())
    assert [layer.hessian for layer in ds.layers(problem, hessian=False).values()] == [None, None]
    with pytest.warns(OptionWarning, match="num=3 is not used"):
        ds.layers(problem, hessian=False, num=3)
    assert "‖R‖/‖G‖" in str(found)

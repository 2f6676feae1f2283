"""What top eigenvectors are made of, against dense blocks and closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import deepspectra as ds
from deepspectra.errors import OptionError
from nets import CASES, labels
from reference import case_and_reference, error


def test_reshaped_eigenvectors_and_correspondences_are_those_of_dense_blocks() -> None:
    case, ref = case_and_reference("relu_mlp")
    found = ds.dissect(case.problem(), num=3, num_directions=4, num_whole=0)
    assert found.whole is None
    kron = ds.kronecker(case.problem())
    for name, layer in found.items():
        own = [f"{name}.weight", f"{name}.bias"]
        values, vectors = torch.linalg.eigh(ref.block(ref.gauss_newton, *own))
        assert error(layer.values, values.flip(0)[:3]) < 1e-9
        outputs, inputs = layer.shape
        factors = kron.blocks[name]
        u = torch.linalg.eigh(factors.left[0, 0])[1].flip(1)
        v = torch.linalg.eigh(factors.right[0, 0])[1].flip(1)
        for j in range(3):
            h = vectors[:, -1 - j]
            weight, bias = h.split([outputs * (inputs - 1), outputs])
            matrix = torch.cat([weight.view(outputs, inputs - 1), bias[:, None]], 1)
            singular = torch.linalg.svdvals(matrix)
            assert float(layer.rank_one[j]) == pytest.approx(float(singular[0] / singular.norm()), abs=1e-7)
            columns = (matrix @ v).square().sum(0), (matrix.T @ u).square().sum(0)
            assert (layer.input_correspondence[:, j] - columns[0][:4]).abs().max() < 1e-7
            assert (layer.output_correspondence[:, j] - columns[1][:4]).abs().max() < 1e-7
        products = torch.outer(torch.linalg.eigvalsh(factors.left[0, 0]), torch.linalg.eigvalsh(factors.right[0, 0]))
        top = products.flatten().sort(descending=True).values[:3]
        assert error(layer.factored_values, top) < 1e-9


def test_inputs_are_described_without_their_bias() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    x = torch.randn(40, 5, dtype=torch.float64) + torch.tensor([3.0, 0, 0, 0, 0], dtype=torch.float64)
    found = ds.dissect(ds.Problem(model, (x, labels(40, 3))))
    for name, h in (("0", x), ("2", model[1](model[0](x)).detach())):
        values, vectors = torch.linalg.eigh(h.T @ h / 40)
        assert found[name].input_ratio == pytest.approx(float(values[-1] / values[-2]))
        mean = h.mean(0) / h.mean(0).norm()
        assert found[name].input_alignment == pytest.approx(float(vectors[:, -1] @ mean) ** 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inputs_along_one_direction_have_no_second_eigenvalue_made_of_rounding(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(60, 1).double() @ torch.randn(1, 5).double(), labels(60, 3)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    found = ds.dissect(ds.Problem(model, (x, y), dtype=dtype), num_whole=0)
    assert found["0"].input_ratio == math.inf
    assert 1 < found["2"].input_ratio < 1e4
    nothing = ds.dissect(ds.Problem(model, (0 * x, y), dtype=dtype), num_whole=0)
    assert math.isnan(nothing["0"].input_ratio)


def test_a_table_of_one_row_has_no_second_frequency() -> None:
    model = nn.Sequential(nn.Embedding(1, 4), nn.Flatten(), nn.Linear(8, 3)).double()
    found = ds.dissect(ds.Problem(model, (torch.zeros(12, 2).long(), labels(12, 3))), num_whole=0)
    assert found["0"].input_ratio == math.inf


def test_one_example_has_eigenvectors_that_are_products() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x = torch.randn(1, 5, dtype=torch.float64)
    found = ds.dissect(ds.Problem(model, (x, torch.tensor([1]))), num=2)
    for layer in found.values():
        assert (layer.rank_one - 1).abs().max() < 1e-8
        assert (layer.input_correspondence[0] - 1).abs().max() < 1e-8
        assert error(layer.values, layer.factored_values) < 1e-8


def test_a_linear_network_s_output_factors_have_the_closed_range() -> None:
    """Without activations E[M] = Sᵀ E[A] S exactly, of range Sᵀ(1^⊥)."""
    torch.manual_seed(0)
    layers = [nn.Linear(4, 7, bias=False), nn.Linear(7, 6, bias=False), nn.Linear(6, 3, bias=False)]
    model = nn.Sequential(*layers).double()
    x = torch.randn(30, 4, dtype=torch.float64)
    found = ds.dissect(ds.Problem(model, (x, labels(30, 3))))
    assert len(found) == 3
    for layer in found.values():
        assert layer.closed_range == pytest.approx(1, abs=1e-8)
        assert 0 < layer.closed_form <= 1 + 1e-12
    assert found["2"].closed_form == pytest.approx(1)
    S = (model[2].weight @ model[1].weight).detach()
    along = S.sum(0) / S.sum(0).norm()
    rows = S - torch.outer(S @ along, along)
    closed = torch.linalg.svd(rows)[2][:2].T
    top = torch.linalg.svd(S - S.mean(0))[2][:2].T
    assert found["0"].closed_form == pytest.approx(float((closed.T @ top).square().sum() / 2), abs=1e-8)


def test_convolutions_have_no_closed_form_behind_them_only() -> None:
    problem = CASES["conv_pool"]().problem()
    found = ds.dissect(problem)
    assert list(found) == [layer.name for layer in ds.layers(problem).values() if layer.features is not None]
    assert not math.isnan(found[list(found)[-1]].closed_range)
    assert len(str(found).splitlines()) == len(found) + 3
    with pytest.raises(OptionError, match="num"):
        ds.dissect(problem, num=0)


def test_the_whole_is_what_dense_rows_with_mean_inputs_give() -> None:
    case, ref = case_and_reference("relu_mlp")
    found = ds.dissect(case.problem(), num=4).whole
    rows = ref.rows.flatten(0, -2)
    x, _ = case.tensors
    starts, at = {}, 0
    for name, value in ref.parameters.items():
        starts[name], at = at, at + value.numel()
    flat, published, errors, directions = [], [], [], []
    for name, module in case.model.named_children():
        if isinstance(module, nn.Linear):
            mean = torch.cat([x.mean(0), torch.ones(1).double()]).detach()
            begin = starts[f"{name}.bias"]
            e = rows[:, begin : begin + module.out_features]  # the gradient to a bias is the error
            flat += [torch.einsum("ro,i->roi", e, mean[:-1]).flatten(1), e]
            errors.append(e)
            directions.append(mean)
        x = module(x)
    approximate = torch.cat(flat, 1)
    values, vectors = (some.flip(-1) for some in torch.linalg.eigh(approximate.T @ approximate))
    exact = torch.linalg.eigh(ref.gauss_newton)[1].flip(1)[:, :4]
    assert error(found.values, torch.linalg.eigvalsh(ref.gauss_newton).flip(0)[:4]) < 1e-4
    assert error(found.approximated, values[:4]) < 1e-9
    for k in range(1, 5):
        expected = float((vectors[:, :k].T @ exact[:, :k]).square().sum() / k)
        assert float(found.overlaps[k - 1]) == pytest.approx(expected, abs=1e-3)
    sigma, u = (some.flip(-1) for some in torch.linalg.eigh(torch.cat(errors, 1).T @ torch.cat(errors, 1)))
    pieces = torch.split(u, [e.shape[1] for e in errors])
    for piece, mean in zip(pieces, directions, strict=True):
        published += [torch.einsum("ok,i->oik", piece, mean[:-1]).flatten(0, 1), piece * mean[-1]]
    w = torch.cat(published)[:, :4]
    assert error(found.published, sigma[:4] * w.square().sum(0)) < 1e-9
    q = torch.linalg.qr(w).Q
    assert float(found.published_overlaps[3]) == pytest.approx(float((q.T @ exact).square().sum() / 4), abs=1e-3)
    assert bool((found.overlaps[3] <= found.reach.mean() + 1e-9).all())
    assert "E[x]" in str(found)


@pytest.mark.parametrize("name", ["mlp", "convolutions", "embedding"])
def test_the_whole_is_exact_where_inputs_do_not_vary(name: str) -> None:
    torch.manual_seed(3)
    if name == "mlp":
        model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
        x = torch.randn(1, 5)
    elif name == "convolutions":  # constant images, kernels of one pixel, groups
        model = nn.Sequential(
            nn.Conv2d(2, 4, 1), nn.Tanh(), nn.Conv2d(4, 4, 1, groups=2), nn.Flatten(), nn.Linear(36, 3)
        )
        x = torch.randn(1, 2, 1, 1).expand(1, 2, 3, 3).contiguous()
    else:
        model = nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(8, 3))
        x = torch.tensor([[2, 2]])
    problem = ds.Problem(model.double(), (x.double() if name != "embedding" else x, torch.tensor([1])))
    found = ds.dissect(problem, num=2).whole
    assert error(found.approximated, found.values) < 1e-4
    assert bool((found.overlaps - 1).abs().max() < 1e-4)
    assert bool((found.reach - 1).abs().max() < 1e-4)

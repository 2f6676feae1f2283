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
    found = ds.dissect(case.problem(), num=3, num_directions=4)
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
        products = torch.outer(
            torch.linalg.eigvalsh(factors.left[0, 0]), torch.linalg.eigvalsh(factors.right[0, 0])
        )
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
    assert list(found) == [layer.name for layer in ds.layers(problem) if layer.features is not None]
    assert not math.isnan(found[list(found)[-1]].closed_range)
    assert len(str(found).splitlines()) == len(found) + 2
    with pytest.raises(OptionError, match="num"):
        ds.dissect(problem, num=0)

"""Which classes, pairs of classes and layers make an eigenvalue: sums, dense references, and errors that hold."""

import functools

import pytest
import torch

import deepspectra as ds
from deepspectra.analysis.attribute import pair_shares
from deepspectra.analysis.outlier_sources import class_pair_shares, layer_shares, share_errors
from nets import trained_on_digits


@functools.cache
def problem():
    net, data = trained_on_digits(6, (8,), epochs=20)
    return ds.Problem(net.double(), (data.inputs.double(), data.targets))


@functools.cache
def parts():
    return ds.decompose(problem(), effects="two-way")


def exact_pairs():
    values, vectors = torch.linalg.eigh(ds.Hessian(problem()).dense())
    return values.flip(0)[:12], vectors.flip(1)[:, :12]


def test_shares_of_pairs_of_classes_are_those_of_their_mean_gradients():
    values, vectors = exact_pairs()
    found = class_pair_shares(parts(), vectors, values)
    means, weights = ds.class_means(problem()).cross_class_means, parts().projections.cell_weights
    for c, k in ((0, 3), (4, 4), (7, 1)):
        expected = weights[c, k] * (means[c, k].double() @ vectors).square() / values
        torch.testing.assert_close(found[:, c, k], expected.double(), rtol=1e-6, atol=1e-12)
    kinds = [name for name in parts() if name != "within"]
    expected = sum(((vectors * (parts()[name] @ vectors)).sum(0)) for name in kinds) / values
    torch.testing.assert_close(found.sum((1, 2)), expected, rtol=1e-8, atol=1e-10)


def test_shares_of_layers_sum_to_one():
    _, vectors = exact_pairs()
    found = layer_shares(problem(), vectors)
    torch.testing.assert_close(found.sum(1), torch.ones(12, dtype=torch.float64))
    owned = [name.rpartition(".")[0] == problem().layers[0] for name in problem().parameter_names]
    tree = problem().unflatten(vectors[:, 3])
    first = sum(float(tree[name].square().sum()) for name, mine in zip(tree, owned, strict=True) if mine)
    assert float(found[3, 0]) == pytest.approx(first)


@pytest.mark.parametrize("rtol", [0.1, 0.03, 1e-3])
def test_errors_of_shares_hold(rtol):
    values, vectors = exact_pairs()
    norm = float(torch.linalg.eigvalsh(ds.GaussNewton(problem()).dense())[-1])
    exact = class_pair_shares(parts(), vectors, values)
    known = 0
    for seed in range(4):
        pairs = ds.eigenpairs(ds.Hessian(problem()), num=6, rtol=rtol, seed=seed)
        found = class_pair_shares(parts(), pairs.vectors, pairs.values)
        errors = share_errors(found, pairs, norm)
        sure = errors.isfinite()
        known += int(sure[:, 0, 0].sum())
        assert bool(((found - exact[:6]).abs() <= errors + 1e-9)[sure].all())
        by_class = share_errors(found.sum(2), pairs, norm)
        assert bool(((found - exact[:6]).sum(2).abs() <= by_class + 1e-9)[by_class.isfinite()].all())
        whole, truth = (table[:, :-1].sum(1) for table in (pair_shares(parts(), pairs), exact_shares()))
        of_g = share_errors(whole, pairs, norm)
        assert bool(((whole - truth).abs() <= of_g + 1e-9)[of_g.isfinite()].all())
    assert known >= 12
    if rtol == 1e-3:
        assert float(errors.nan_to_num().max()) < 0.05  # and they are not idle


def exact_shares():
    values, vectors = exact_pairs()
    columns = [(vectors * (parts()[name] @ vectors)).sum(0) / values for name in parts()]
    table = torch.stack(columns, 1)[:6]
    return torch.cat([table, 1 - table.sum(1, keepdim=True)], 1)

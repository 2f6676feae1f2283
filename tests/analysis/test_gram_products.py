"""Products with the Gram matrix of the gradients: its spectrum is G's without zeros, and its trace is G's."""

import math

import pytest
import torch
from torch import nn

import deepspectra as ds
from deepspectra.analysis.gram_spectrum import RowGram, gradient_trace, nonzero_density
from deepspectra.rows.gradients import GradientRows
from nets import CLASSIFICATION
from reference import case_and_reference


@pytest.mark.parametrize("name", CLASSIFICATION)
def test_the_sum_of_all_squared_gradients_is_the_trace_of_g(name):
    case, ref = case_and_reference(name)
    trace, error = gradient_trace(case.problem())
    assert error == 0
    assert trace == pytest.approx(float(ref.gauss_newton.trace()), rel=1e-9)


@pytest.mark.parametrize("name", ["relu_mlp", "absent_class", "every_option", "conv_pool"])
def test_the_gram_matrix_has_the_non_zero_spectrum(name):
    case, ref = case_and_reference(name)
    gram = RowGram(GradientRows(case.problem()))
    dense = gram.dense()
    torch.testing.assert_close(dense, dense.T)
    num = min(len(dense), len(ref.gauss_newton))
    found, expected = (torch.linalg.eigvalsh(one).flip(0)[:num] for one in (dense, ref.gauss_newton))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12 * float(expected[0]))


def test_of_many_classes_random_sums_tell_the_trace_with_its_error():
    """A convolution, a table of embeddings and a matrix used twice; over seeds the error is that which is said."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.twice, self.out = nn.Conv1d(3, 4, 3, padding=1), nn.Linear(4, 4), nn.Linear(4, 30)

        def forward(self, x):
            hidden = torch.tanh(self.conv(x)).mean(2)
            return self.out(torch.tanh(self.twice(torch.tanh(self.twice(hidden)))))

    torch.manual_seed(0)
    problem = ds.Problem(Net().double(), (torch.randn(50, 3, 6).double(), torch.arange(50) % 30))
    exact = float(ds.GaussNewton(problem).dense().trace())
    found = torch.tensor([gradient_trace(problem, seed) for seed in range(12)], dtype=torch.float64)
    assert (found[:, 1] > 0).all()
    assert abs(found[:, 0] - exact).max() < 0.1 * exact
    off = (found[:, 0] - exact) / found[:, 1]  # Student's t of 15 degrees of freedom
    assert 0.6 < float(off.std()) < 1.6
    assert abs(float(off.mean())) < 4 / math.sqrt(12)


def test_inner_products_and_formed_gradients_square_the_same(monkeypatch):
    case, _ = case_and_reference("conv_pool")
    found = []
    for inner in (True, False):
        monkeypatch.setattr("deepspectra.analysis.gram_spectrum._prefers_inner", lambda _, inner=inner: inner)
        found.append(gradient_trace(case.problem())[0])
    assert found[0] == pytest.approx(found[1], rel=1e-12)


@pytest.mark.parametrize("num", [1, 3, 12])
def test_its_density_is_that_of_g_with_the_zeros_that_are_known(num):
    """Whatever pairs are taken out first, and if some of them are of eigenvalue zero."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3)).double()
    problem = ds.Problem(net, (torch.randn(5, 6).double(), torch.arange(5) % 3))  # 10 rows, 93 parameters
    matrix = ds.GaussNewton(problem).dense()
    values, vectors = torch.linalg.eigh(matrix)
    pairs = ds.eigenpairs(matrix, num)
    top, u = values.flip(0)[:num].clamp_min(0), vectors.flip(1)[:, :num]
    pairs = type(pairs)(
        **{
            **vars(pairs),
            "values": top,
            "vectors": u,
            "residual_norms": torch.zeros_like(top),
        }
    )
    gram = RowGram(GradientRows(problem))
    rows = gram.reduced(gram.rows.apply(u))
    rows = rows / rows.norm(dim=0).clamp_min(1e-300)
    found = nonzero_density(gram, pairs, rows, 3, 10, seed=1)
    assert found.size == 93
    assert float(found.weights.sum()) == pytest.approx(1, abs=1e-12)
    assert float(found.weights[found.nodes == 0].sum()) == pytest.approx(83 / 93, abs=1e-12)
    assert found.mean * 93 == pytest.approx(float(matrix.trace()), rel=1e-9)
    for x in torch.logspace(-4, 0, 9, dtype=torch.float64) * values[-1]:
        assert found.cdf(float(x)) == pytest.approx(float((values <= x).double().mean()), abs=1e-9)

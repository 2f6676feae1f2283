"""A start saves products and changes nothing: given, known to the operator, or found with a sample."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import deepspectra as ds
from deepspectra.algorithms.start_vectors import sample_size
from deepspectra.operators.base import Operator
from nets import digits_problem


@pytest.fixture(scope="module")
def problem():
    return digits_problem()


@pytest.mark.parametrize("operator", [ds.Hessian, ds.GaussNewton])
def test_a_sampled_start_saves_products_and_changes_nothing(problem, operator):
    whole = operator(problem)
    cold = ds.eigenpairs(whole, num=9, rtol=1e-3)
    warm = ds.eigenpairs(whole, num=9, rtol=1e-3, start="sampled")
    assert warm.converged
    assert warm.num_products < cold.num_products
    torch.testing.assert_close(warm.values, cold.values, rtol=1e-5, atol=0)
    assert ds.overlap(warm.vectors, cold.vectors) > 1 - 1e-5


def test_a_sample_of_a_sum_is_the_sum_of_samples(problem):
    both = ds.Hessian(problem) + 2 * ds.GaussNewton(problem)
    pairs = ds.eigenpairs(both, num=5, rtol=1e-2, start="sampled")
    torch.testing.assert_close(pairs.values, ds.eigenpairs(both, num=5).values, rtol=1e-3, atol=0)


def test_examples_are_sampled_first_where_few_make_the_curvature(problem):
    H = ds.Hessian(problem)
    assert 0 < H.sample_size(3e-2) < H.sample_size(1e-2) < problem.num_examples / 4
    assert H.sample_size(1e-2) == ds.GaussNewton(problem).sample_size(1e-2)
    assert H.sample_size(1e-9) == 0  # takes too many
    for other in (ds.Residual(problem), ds.EmpiricalFisher(problem), H - ds.GaussNewton(problem)):
        assert sample_size(other, 1e-2) == 0  # importance is that of G
    sampled = ds.eigenpairs(H, num=9, rtol=4e-2)
    asked = ds.eigenpairs(H, num=9, rtol=4e-2, start="sampled")
    random = ds.eigenpairs(H, num=9, rtol=4e-2, start="random")
    assert torch.equal(sampled.values, asked.values)
    assert sampled.num_products < random.num_products
    assert sampled.num_sample_products > 0 == random.num_sample_products
    assert f"after {sampled.num_sample_products} with a sample" in str(sampled)
    assert ds.eigenpairs(H, num=3, rtol=4e-2, which="smallest").converged  # from a random vector
    x, y = next(iter(problem.batches))
    net = copy.deepcopy(problem.model).requires_grad_()
    few = ds.Problem(net, (x, y))
    assert ds.Hessian(few).sample_size(3e-2) == 0  # nothing to gain
    pairs = [{"x": x, "y": y} for x, y in problem.batches]
    undrawn = ds.Problem(net, pairs, forward=lambda model, batch: (model(batch["x"]), batch["y"]))
    assert ds.Hessian(undrawn).sample_size(3e-2) == 0


def test_examples_that_matter_alike_are_not_sampled():
    torch.manual_seed(0)
    net = nn.Linear(20, 10)
    untrained = ds.Problem(net, (0.01 * torch.randn(1500, 20), torch.arange(1500) % 10))
    assert ds.Hessian(untrained).sample_size(1e-2) == 0


class Doubled(Operator):
    """A diagonal with eigenvalues that come twice; its sample is a little another matrix, where they do not."""

    def __init__(self, values: torch.Tensor, mixing: torch.Tensor | None = None) -> None:
        super().__init__(len(values), dtype=values.dtype, device="cpu", name="doubled")
        self.values, self.mixing = values, mixing

    def _apply(self, block):
        product = self.values[:, None] * block
        return product if self.mixing is None else product + self.mixing @ (self.mixing.T @ block)

    def sample_size(self, error):
        return 0

    def sampled(self, generator, num_samples=None):
        mixing = torch.randn(len(self.values), 30, generator=generator, dtype=torch.float64)
        return Doubled(self.values, mixing * (1e-3 / len(self.values)) ** 0.5)


@pytest.mark.parametrize("seed", range(8))
def test_copies_are_found_from_a_sample_too(seed):
    generator = torch.Generator().manual_seed(seed)
    top = torch.tensor([3, 2.9, 2.2, 2.2, 1.9, 1.85, 1.8, 1.6, 1.4, 1.4, 1.25, 1.2], dtype=torch.float64)
    bulk = torch.rand(988, generator=generator, dtype=torch.float64) ** 6
    operator = Doubled(torch.cat([top, bulk]))
    pairs = ds.eigenpairs(operator, 10, rtol=1e-2, start="sampled", seed=seed)
    torch.testing.assert_close(pairs.values, top[:10], rtol=1e-3, atol=0)
    assert pairs.num_products < 30

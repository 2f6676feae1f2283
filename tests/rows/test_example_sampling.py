"""Few examples are drawn as often as they should be, and their curvature is unbiased."""

from __future__ import annotations

import math

import pytest
import torch

import deepspectra as ds
from deepspectra.problem.example_subsets import drawn_problem
from deepspectra.rows.example_sampling import importance, inclusion, num_enough, systematic
from nets import digits_problem


@pytest.fixture(scope="module")
def problem():
    return digits_problem()


def test_probabilities_are_proportional_and_capped():
    sizes = torch.tensor([100.0, 1, 1, 1, 2, 0], dtype=torch.float64)
    probabilities = inclusion(sizes, 3)
    torch.testing.assert_close(probabilities, torch.tensor([1, 0.4, 0.4, 0.4, 0.8, 0]).double())
    assert inclusion(sizes, 6).tolist() == [1, 1, 1, 1, 1, 0]


def test_every_example_is_drawn_as_often_as_it_should_be():
    probabilities = inclusion(torch.arange(1, 41, dtype=torch.float64), 12)
    counts = torch.zeros(40, dtype=torch.float64)
    for seed in range(600):
        chosen = systematic(probabilities, torch.Generator().manual_seed(seed))
        assert len(chosen) == len(chosen.unique()) == 12
        counts[chosen] += 1
    error = (probabilities * (1 - probabilities) / 600).sqrt()
    assert ((counts / 600 - probabilities).abs() < 4.5 * error + 1e-12).all()


def test_importance_is_that_of_softmax_and_last_features(problem):
    (x, y) = next(iter(problem.batches))
    body, head = problem.model[:-1], problem.model[-1]
    with torch.no_grad():
        h = body(x)
        p = head(h).softmax(1)
    expected = (1 - p.square().sum(1)) * (1 + h.square().sum(1))
    torch.testing.assert_close(importance(problem)[: len(y)], expected)
    assert not any(module._forward_hooks for module in problem.model.modules())


def test_the_drawn_hessian_is_unbiased(problem):
    v = ds.class_means(problem, level="class").class_means[0]
    exact = float(v @ (ds.Hessian(problem) @ v))
    probabilities = inclusion(importance(problem), 200)
    found = []
    for seed in range(30):
        chosen = systematic(probabilities, torch.Generator().manual_seed(seed))
        sample = drawn_problem(problem, chosen, 1 / probabilities[chosen])
        found.append(float(v @ (ds.Hessian(sample) @ v)))
    found = torch.tensor(found)
    assert abs(float(found.mean()) - exact) < 4 * float(found.std()) / math.sqrt(len(found))
    assert float(found.std()) < 0.3 * exact


def test_enough_draws_are_the_fewest_whose_estimate_is_steady():
    sizes = torch.cat([torch.linspace(0, 1, 60).double() ** 4, torch.zeros(5, dtype=torch.float64)])
    number = num_enough(sizes, 0.1)
    for count, enough in ((number, True), (number - 1, False)):
        probabilities = inclusion(sizes, count)
        generator = torch.Generator().manual_seed(0)
        drawn = torch.rand(20_000, len(sizes), generator=generator, dtype=torch.float64) < probabilities
        estimates = (drawn * (sizes / probabilities.clamp_min(1e-300))).sum(1)
        variation = float(estimates.std() / sizes.sum())
        assert variation == pytest.approx(0.1, rel=0.1)
        exact = float((sizes**2 * (1 / probabilities.clamp_min(1e-300) - 1)).sum().sqrt() / sizes.sum())
        assert (exact <= 0.1) == enough
    assert num_enough(sizes, 1e-9) == 59
    assert num_enough(torch.zeros(8, dtype=torch.float64), 0.1) == 0

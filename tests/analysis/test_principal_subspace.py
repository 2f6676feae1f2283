"""The sampled subspace: an unbiased draw, exact when everything is drawn, and a certificate that tells the truth."""

import copy
import math

import pytest
import torch
from torch import nn

import deepspectra as ds
from deepspectra import errors
from deepspectra.algorithms.eigenpairs import sample_size
from deepspectra.analysis.principal_subspace import residual_norm
from deepspectra.operators.base import Operator
from deepspectra.problem.subsets import drawn_problem
from deepspectra.rows.importance_sampling import importance, inclusion, num_enough, systematic
from nets import trained_on_digits


@pytest.fixture(scope="module")
def problem():
    net, data = trained_on_digits(None, (32, 32), epochs=15, batch=32)
    return ds.Problem(net.double(), (data.inputs.double(), data.targets), batch_size=400)


@pytest.fixture(scope="module")
def top(problem):
    return ds.eigenpairs(ds.Hessian(problem), num=9, rtol=1e-4)


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


LOSSES = {
    "plain": nn.CrossEntropyLoss(),
    "class weights": nn.CrossEntropyLoss(weight=torch.linspace(0.5, 2, 10).double()),
    "smoothed, ignoring a class": nn.CrossEntropyLoss(label_smoothing=0.1, ignore_index=3),
}


@pytest.mark.parametrize("name", LOSSES)
def test_drawing_everything_is_the_problem_itself(problem, name):
    batches = [(x, y) for x, y in problem.batches][:2]
    net = copy.deepcopy(problem.model).requires_grad_()
    whole = ds.Problem(net, batches, loss=LOSSES[name])
    every = torch.arange(sum(len(y) for _, y in batches))
    drawn = drawn_problem(whole, every, torch.ones(len(every)))
    v = torch.randn(whole.num_parameters, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for operator in (ds.Hessian, ds.GaussNewton, ds.Residual):
        torch.testing.assert_close(operator(drawn) @ v, operator(whole) @ v, rtol=1e-9, atol=1e-13)
    assert drawn.loss() == pytest.approx(whole.loss(), rel=1e-12)


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


def test_the_subspace_is_found_and_certified(problem, top):
    space = ds.principal_subspace(problem, level="sampled", num_samples=400, seed=1)
    overlap = ds.overlap(space.vectors, top.vectors)
    assert space.level == "sampled"
    assert space.vectors.shape == (problem.num_parameters, 9)
    identity = torch.eye(9, dtype=torch.float64)
    torch.testing.assert_close(space.vectors.T @ space.vectors, identity, atol=1e-8, rtol=0)
    assert overlap > 0.95
    assert space.certificate.overlap_at_least <= overlap
    assert f"{space.certificate.num_samples:,} examples" in str(space)
    torch.testing.assert_close(space.values, top.values, rtol=0.2, atol=0)


def test_importance_beats_chance(problem, top):
    """With as many uniform examples the subspace is worse: the curvature sits in few of them."""
    by_importance = ds.principal_subspace(problem, level="sampled", num_samples=150, num_checks=0, seed=3)
    every = (
        torch.randperm(problem.num_examples, generator=torch.Generator().manual_seed(3))[:150].sort().values
    )
    uniform = drawn_problem(problem, every, torch.ones(150))
    chance = ds.eigenpairs(ds.Hessian(uniform), num=9, rtol=1e-2)
    assert ds.overlap(by_importance.vectors, top.vectors) > ds.overlap(chance.vectors, top.vectors) + 0.05
    assert math.isnan(by_importance.certificate.residual_norm)


def test_the_residual_is_estimated_without_bias(problem):
    space = ds.principal_subspace(problem, level="sampled", num_samples=200, num_checks=0)
    image = ds.Hessian(problem) @ space.vectors
    exact = float((image - space.vectors @ (space.vectors.T @ image)).norm())
    norm, error = residual_norm(problem, space.vectors, 40, torch.Generator().manual_seed(0))
    assert abs(norm - exact) < 4 * error < exact


def test_an_exact_eigenspace_is_certified(problem):
    space = ds.principal_subspace(problem, level="sampled", num_samples=problem.num_examples, num=5)
    assert space.certificate.overlap_at_least > 0.9


def test_what_cannot_be_drawn_from_is_refused(problem):
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).double()
    x, y = torch.randn(20, 64, dtype=torch.float64), torch.arange(20) % 10
    tokens = ds.Problem(net, [{"x": x, "y": y}], forward=lambda model, batch: (model(batch["x"]), batch["y"]))
    with pytest.raises(errors.OptionError, match="drawn"):
        ds.principal_subspace(tokens, level="sampled")
    squares = ds.Problem(net, (x, torch.randn(20, 10, dtype=torch.float64)), loss="mse")
    with pytest.raises(errors.LossError, match="cross-entropy"):
        ds.principal_subspace(squares, level="sampled")
    with pytest.raises(errors.LossError, match="cross-entropy"):
        ds.eigenpairs(ds.Hessian(squares), 3, start="sampled")
    with pytest.raises(errors.OptionError, match="not made of examples"):
        ds.eigenpairs(torch.eye(30), 3, start="sampled")
    with pytest.raises(errors.OptionError, match="made of averages"):
        ds.eigenpairs(ds.decompose(problem)["within"], 3, start="sampled")
    for options in ({"num_samples": 0}, {"num_samples": 10**6}, {"num_checks": -1}, {"num": 0}):
        with pytest.raises(errors.OptionError):
            ds.principal_subspace(problem, level="sampled", **options)


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


def test_a_sample_and_all_share_the_memory_for_graphs(problem):
    H = ds.Hessian(problem)
    H @ torch.ones(problem.num_parameters, dtype=torch.float64)
    kept = H.products.graphs.num_bytes()
    assert kept > 0
    few = H.sampled(torch.Generator().manual_seed(0), 100)
    few @ torch.ones(problem.num_parameters, dtype=torch.float64)
    more, allowance = few.products.graphs.num_bytes(), H.products.allowance
    assert more > 0
    assert H.products.graphs.num_bytes() == kept
    assert allowance.room() == allowance.size - kept - more
    assert allowance.reserve(allowance.size)
    assert H.products.graphs.num_bytes() == few.products.graphs.num_bytes() == 0
    few @ torch.ones(problem.num_parameters, dtype=torch.float64)
    assert few.products.graphs.num_bytes() == 0
    allowance.give_back(allowance.size)
    few @ torch.ones(problem.num_parameters, dtype=torch.float64)
    assert allowance.room() < allowance.size
    del few
    assert allowance.room() == allowance.size


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

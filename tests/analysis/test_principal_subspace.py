"""The sampled subspace: an unbiased draw, exact when everything is drawn, and a certificate that tells the truth."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import deepspectra as ds
from deepspectra import errors
from deepspectra.analysis.principal_subspace import overlap_bound, residual_norm
from deepspectra.confidence import standard_error
from deepspectra.problem.example_subsets import drawn_problem
from nets import CENTRAL, digits_problem
from reference import case_and_reference, error, onto


@pytest.fixture(scope="module")
def problem():
    return digits_problem()


@pytest.fixture(scope="module")
def top(problem):
    return ds.eigenpairs(ds.Hessian(problem), num=9, rtol=1e-4)


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
    every = torch.randperm(problem.num_examples, generator=torch.Generator().manual_seed(3))[:150].sort().values
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


def test_of_sentences_as_few_are_drawn_as_of_examples_with_a_row_each():
    torch.manual_seed(0)
    tokens = torch.randint(0, 9, (400, 5))
    net = nn.Sequential(nn.Embedding(9, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    sentences = ds.Problem(
        net, [(tokens, tokens % 3)], forward=lambda model, batch: (model(batch[0]).flatten(0, 1), batch[1].flatten())
    )
    space = ds.principal_subspace(sentences, level="sampled", num_checks=0)
    assert space.certificate.num_samples == 500


def test_what_cannot_be_drawn_from_is_refused(problem):
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).double()
    x, y = torch.randn(20, 64, dtype=torch.float64), torch.arange(20) % 10
    uncut = ds.Problem(net, (x, y)).variant(cuts=False)
    with pytest.raises(errors.OptionError, match="drawn"):
        ds.principal_subspace(uncut, level="sampled")
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


@pytest.mark.parametrize("level", ["class", "cross_class"])
@pytest.mark.parametrize("name", ["relu_mlp", "layernorm_gelu", "attention_function", *CENTRAL])
def test_the_averaged_subspace_is_spanned_by_the_means(name: str, level: str) -> None:
    """Its eigenpairs are those of G_class + G_true, or of these and G_cross: by averaging alone."""
    case, ref = case_and_reference(name)
    space = ds.principal_subspace(case.problem(), level=level)
    matrix = ref.parts["class"] + ref.parts["true"] + (ref.parts["cross"] if level == "cross_class" else 0)
    expected = torch.linalg.eigvalsh(matrix).flip(0)
    values, U = space.values, space.vectors
    K = len(values)
    assert U.shape == (ref.num_parameters, K)
    assert (values.diff() <= 0).all()
    assert (values - expected[:K]).abs().max() < 1e-9 * expected[0]
    assert expected[K:].abs().max() < 1e-9 * expected[0], "all that is not zero is there"
    assert (U.T @ U - torch.eye(K).to(U)).abs().max() < 1e-8
    sizeable = values > 1e-6 * values[0]
    assert (matrix @ U - U * values).abs()[:, sizeable].max() < 1e-8 * values[0]
    _, g_c, _, g_ck = ref.means
    means = g_c if level == "class" else g_ck.flatten(0, 1)
    inside = onto(U)
    large = means.norm(dim=1) > 1e-8 * means.norm(dim=1).max()
    assert error(means[large] @ inside, means[large]) < 1e-6


def test_num_asks_for_the_largest() -> None:
    case, ref = case_and_reference("relu_mlp")
    space = ds.principal_subspace(case.problem(), level="cross_class", num=3)
    expected = torch.linalg.eigvalsh(ref.parts["class"] + ref.parts["true"] + ref.parts["cross"]).flip(0)[:3]
    assert space.vectors.shape == (ref.num_parameters, 3)
    assert error(space.values, expected) < 1e-9


def test_the_least_overlap_allows_for_what_three_checks_do_not_know() -> None:
    H = torch.diag(torch.tensor([3.0, 2.0, *[0.1] * 30], dtype=torch.float64))
    angle = torch.tensor(0.05, dtype=torch.float64)
    u = torch.zeros(32, 1, dtype=torch.float64)
    u[0], u[1] = angle.cos(), angle.sin()
    image = H @ u
    image -= u @ (u.T @ image)
    draws = torch.randn(400, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    squares = (draws * float(image.norm())).square()  # what the checks see of one direction
    norms = squares.mean(1).sqrt()
    errors = standard_error(squares, 1) / (2 * norms)
    kept, plain = (
        sum(
            overlap_bound(float(n + 2 * k * e), 1.0, 1) <= float(angle.cos() ** 2)
            for n, e in zip(norms, errors, strict=True)
        )
        / 400
        for k in (1, 0)
    )
    assert kept > 0.85 > 0.6 > plain

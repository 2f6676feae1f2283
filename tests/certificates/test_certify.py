"""Certificates hold, are computed from their ledger, can be stopped, and are refused where there are none."""

import pytest
import torch
from torch import nn

import deepspectra as ds
from certificates_problems import Kept, data, mlp, problem
from deepspectra.certificates.binomial_bounds import monte_carlo_bound
from deepspectra.certificates.networks import GaussianNetwork, examples_of
from deepspectra.certificates.priors import Prior
from deepspectra.errors import CertificateError, DataError, OptionError

FEW = {"epochs": 6, "batch_size": 100, "passes": 4}


@pytest.fixture(scope="module")
def certificate():
    return ds.certify(problem(), test=data(800, seed=1), epochs=25, batch_size=100, passes=10)


def test_the_bound_follows_from_the_ledger_and_covers_what_is_measured(certificate):
    found = certificate
    assert found.value == found.ledger.certified(found.empirical_bound)
    assert found.empirical_bound == monte_carlo_bound(found.empirical_error, 15_000, 0.01)
    assert found.num_draws == 15_000
    assert found.ledger.num_examples == 1500
    assert found.ledger.confidence == pytest.approx(0.965)
    assert found.test_error < found.value < 0.5
    assert not found.is_vacuous
    charged = dict(found.ledger.rows())
    assert sum("λ of" in name for name in charged) == 2
    assert charged["KL of 1"] == pytest.approx(float(found.network.layers["1"].divergence().detach()), rel=1e-12)
    assert charged["KL of 1"] == found.layers["1"].divergence


def test_scales_of_the_prior_lie_on_their_grid(certificate):
    grid = certificate.prior.places
    for name, layer in certificate.network.layers.items():
        place = grid.nearest(layer.scale)
        assert layer.scale == pytest.approx(grid.variance(place), rel=1e-6)
        assert f"λ of {name}, place {place} of its grid" in certificate.ledger.charges


def test_the_quadratic_model_says_what_small_noise_costs():
    # weights near the prior's learnt centre, with little noise: the second order is all there is
    found = ds.certify(problem(), Prior("learnt", epochs=10), **FEW)
    model, measured = found.loss_increase
    assert model == pytest.approx(measured, rel=0.35, abs=2e-3)
    assert model == pytest.approx(sum(layer.loss_increase for layer in found.layers.values()))


def test_what_the_network_predicts_follows_from_the_seed(certificate):
    x = data(200, seed=3)[0]
    assert torch.equal(certificate.predict(x, 1), certificate.predict(x, 1))
    labels = torch.stack([certificate.predict(x, seed) for seed in range(10)])
    assert bool((labels != labels[0]).any())


@pytest.mark.parametrize("prior", ["isotropic", "learnt"])
def test_a_stopped_certificate_ends_as_an_unbroken_one(prior):
    kept = Kept(fails_after=4)
    with pytest.raises(KeyboardInterrupt):
        ds.certify(problem(), prior, store=kept, **FEW)
    resumed = ds.certify(problem(), prior, store=kept, **FEW)
    whole = ds.certify(problem(), prior, **FEW)
    assert resumed.value == pytest.approx(whole.value, abs=1e-6)
    assert len(resumed.curve) == len(whole.curve) == 6


@pytest.mark.parametrize("variant", ["base", "appr", "iter", "iter.m"])
def test_published_variants_start_at_trained_weights(variant):
    found = ds.certify(problem(), variant=variant, **FEW)
    assert found.settings.start == "trained"
    assert found.mean_error < 0.2
    layer = found.network.layers["1"]
    assert (layer.left is None) == (variant == "base")
    assert "starts at trained weights" in str(found)
    assert "not the error" not in str(found)


def test_random_labels_get_a_bound_that_is_no_better_than_chance():
    x, _ = data(600)
    y = torch.randint(2, (600,), generator=torch.Generator().manual_seed(9))
    found = ds.certify(ds.Problem(mlp(), (x, y)), **FEW)
    assert found.value >= 0.5
    assert found.is_vacuous
    assert "vacuous" in str(found)


def _regression():
    return ds.Problem(nn.Linear(5, 1), (torch.randn(20, 5), torch.randn(20, 1)), loss="mse")


def _tokens():
    net = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7))
    return ds.Problem(net, (torch.randint(7, (6, 3)), torch.randint(7, (6, 3))))


def _softmax():
    return ds.Problem(nn.Sequential(nn.Linear(5, 3), nn.LogSoftmax(1)), (torch.randn(20, 5), torch.arange(20) % 3))


@pytest.mark.parametrize(
    ("make", "words"),
    [(_regression, "regression has none"), (_tokens, "Tokens of a sequence"), (_softmax, "without softmax")],
)
def test_what_cannot_be_certified_is_refused_with_the_reason(make, words):
    with pytest.raises(CertificateError, match=words):
        ds.certify(make())


def test_state_holds_the_whole_posterior(certificate):
    examples = examples_of(problem())
    twin = GaussianNetwork(mlp(), examples.inputs[:3], 1.0)
    twin.restore(certificate.network.state())
    for one, two in zip(twin.layers.values(), certificate.network.layers.values(), strict=True):
        assert torch.equal(one.posterior_mean(), two.posterior_mean())
        assert torch.equal(one.divergence(), two.divergence())


@pytest.mark.slow
def test_published_variants_rank_as_published():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 10, generator=generator)
    y = (x[:, 0] + 0.5 * x[:, 1] ** 2 > 0.3).long() + (x[:, 2] > 1).long()
    of = ds.Problem(mlp(10, 3, 40), (x, y))
    values = {
        variant: ds.certify(of, variant=variant, epochs=15, batch_size=100, passes=10).value
        for variant in ("base", "appr", "iter")
    }
    assert values["base"] > values["appr"] > values["iter"]
    assert ds.certify(of, epochs=15, batch_size=100, passes=10).value < values["base"]


@pytest.mark.parametrize(
    ("unlabelled", "words"),
    [
        ([1.0, 2.0], "unlabelled= takes a tensor of inputs .* got list"),
        (torch.zeros(0, 5), r"unlabelled= .* at least one; got \(0, 5\)"),
        (torch.tensor(1.0), r"unlabelled= .* got \(\)"),
        (torch.zeros(4, 6), r"the network failed on unlabelled= of \(4, 6\)"),
        (torch.full((4, 5), float("inf")), "NaN or infinite"),
    ],
)
def test_unlabelled_inputs_are_checked_before_any_work(unlabelled, words):
    with pytest.raises((OptionError, DataError), match=words):
        ds.certify(problem(100), unlabelled=unlabelled, progress=_no_work)


def _no_work(*_):
    raise AssertionError("work was done before the check")


@pytest.mark.parametrize(
    ("test", "words"),
    [
        (3, "pair"),
        ((torch.zeros(0, 5), torch.zeros(0, dtype=torch.long)), "at least one"),
        ((torch.zeros(4, 5), torch.tensor([0, 1, 2, 1])), "labels from 0 to 2 of 2 classes"),
        ((torch.zeros(4, 5), torch.tensor([0, -1, 0, 1])), "labels from -1"),
        ((torch.zeros(4, 5), torch.eye(4)[:, :2]), "integers"),
        ((torch.full((4, 5), float("nan")), torch.tensor([0, 1, 0, 1])), "NaN"),
        ((torch.zeros(4, 6), torch.tensor([0, 1, 0, 1])), "failed"),
    ],
)
def test_test_data_are_checked_as_data_are(test, words):
    with pytest.raises((OptionError, DataError), match=words):
        ds.certify(problem(), test=test, **FEW)

"""Certificates hold, are computed from their ledger, can be stopped, and are refused where there are none."""

import dataclasses
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import deepspectra as ds
from certificates_problems import cnn, data, images, mlp, problem
from deepspectra.certificates import optimise
from deepspectra.certificates.binomial_bounds import binomial_bound, monte_carlo_bound
from deepspectra.certificates.ledger import Grid
from deepspectra.certificates.networks import Examples, GaussianNetwork, examples_of
from deepspectra.certificates.priors import Blur, Prior, fresh, prepare, split
from deepspectra.certificates.settings import Settings
from deepspectra.errors import CertificateError, OptionError

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
    assert charged["KL of 1"] == pytest.approx(
        float(found.network.layers["1"].divergence().detach()), rel=1e-12
    )
    assert charged["KL of 1"] == found.layers["1"].divergence


def test_scales_of_the_prior_lie_on_their_grid(certificate):
    grid = certificate.prior.places
    for name, layer in certificate.network.layers.items():
        place = grid.nearest(layer.scale)
        assert layer.scale == pytest.approx(grid.variance(place), rel=1e-6)
        assert f"λ of {name}, place {place} of its grid" in certificate.ledger.charges


def test_the_binomial_bound_stands_beside_it_and_says_which_is_tighter(certificate):
    (beside,) = certificate.test_bounds
    wrong = int((problem().model(data(800, seed=1)[0]).argmax(1) != data(800, seed=1)[1]).sum())
    assert beside.value == binomial_bound(wrong, 800, 0.035)
    said = str(certificate)
    assert (
        "The binomial bound of your network is "
        + ("tighter" if beside.value < certificate.value else "looser")
        in said
    )


def test_the_unmodified_network_is_bounded_by_the_surrogate_and_their_disagreement(certificate):
    found = certificate.deterministic
    assert found.value == min(1.0, certificate.value + found.disagreement_bound)
    assert found.disagreement_bound == binomial_bound(round(found.disagreement * 800), 800, 0.01)
    unseen = ds.certify(problem(), unlabelled=data(300, seed=2)[0], **FEW)
    assert unseen.deterministic.num_inputs == 300
    assert "trained on 1,200 of the examples" in unseen.test_bounds[0].sentence(unseen.value)
    without = ds.certify(problem(), **FEW)
    assert without.deterministic is None
    assert "nothing is certified" in str(without)


def test_the_quadratic_model_says_what_small_noise_costs():
    # weights near the prior's learnt centre, with little noise: the second order is all there is
    found = ds.certify(problem(), Prior("learnt", epochs=10), **FEW)
    model, measured = found.loss_increase
    assert model == pytest.approx(measured, rel=0.35, abs=2e-3)
    assert model == pytest.approx(sum(layer.loss_increase for layer in found.layers.values()))


def test_several_priors_are_charged_and_so_is_what_was_tried_before():
    found = ds.certify(problem(), ["isotropic", Prior("isotropic", tried=7)], **FEW)
    assert found.ledger.charges["priors of this call, 2 tried"] == pytest.approx(math.log(2))
    assert found.empirical_bound == monte_carlo_bound(found.empirical_error, found.num_draws, 0.005)
    alone = ds.certify(problem(), Prior("isotropic", tried=7), **FEW)
    assert alone.ledger.charges["priors before, 7 tried"] == pytest.approx(math.log(7))


def test_a_learnt_prior_never_sees_the_examples_of_the_bound():
    x, y = data(400)
    taught, rest = split(400, 0.5, 0)
    assert sorted([*taught.tolist(), *rest.tolist()]) == list(range(400))
    other = y.clone()
    other[rest] = 1 - other[rest]
    made = [prepare(Prior("learnt", epochs=2), mlp(), Examples(x, labels), 0) for labels in (y, other)]
    for one, two in zip(*(prior.plain.parameters() for prior in made), strict=True):
        assert torch.equal(one, two)
    assert torch.equal(made[0].bound.inputs, x[rest])
    assert torch.equal(made[1].bound.labels, other[rest])


def test_scales_of_a_learnt_prior_are_fixed_unless_a_grid_is_given_and_paid_for():
    fixed = ds.certify(problem(), "learnt", **FEW)
    assert not fixed.ledger.charges
    again = ds.certify(problem(), "learnt", seed=0, **FEW | {"epochs": 1})
    assert [one.scale for one in fixed.layers.values()] == [one.scale for one in again.layers.values()]
    free = ds.certify(problem(), Prior("learnt", grid=Grid()), **FEW)
    assert len(free.ledger.charges) == 2


def test_a_data_free_prior_knows_neither_weights_nor_labels():
    x, y = data(300)
    made = [
        prepare(Prior(), model, examples_of(ds.Problem(model, (x, labels))), 0)
        for model, labels in ((mlp(seed=0), y), (mlp(seed=5), 1 - y))
    ]
    for one, two in zip(*(p.network.layers.values() for p in made), strict=True):
        assert torch.equal(one.prior_mean, two.prior_mean)
        assert one.scale == two.scale


def test_a_smooth_prior_is_w_equal_v_times_blur():
    x, y = images(200)
    model = mlp(36, 3)
    made = prepare(
        Prior("smooth", blur=1.0), model, examples_of(ds.Problem(model, (x, y), batch_size=200)), 0
    )
    V = fresh(model, 0)[1].weight
    W = Blur(1.0)(V.detach().view(-1, 1, 6, 6)).flatten(1)
    ordered = examples_of(ds.Problem(model, (x, y), batch_size=200)).inputs
    assert torch.allclose(ordered.flatten(1) @ W.T, made.bound.inputs.flatten(1) @ V.T, atol=1e-5)
    row = Blur(1.0)(torch.eye(36).view(36, 1, 6, 6))
    assert torch.allclose(row.flatten(1), row.flatten(1).T, atol=1e-6)


def test_a_network_with_convolutions_is_certified_and_its_draws_are_independent():
    x, y = images(500)
    found = ds.certify(
        ds.Problem(cnn(), (x, y)), test=images(300, seed=1), epochs=20, batch_size=50, passes=4
    )
    assert set(found.layers) == {"0", "4"}
    assert found.value < 2 / 3
    assert found.test_error < found.value


def test_what_the_network_predicts_follows_from_the_seed(certificate):
    x = data(200, seed=3)[0]
    assert torch.equal(certificate.predict(x, 1), certificate.predict(x, 1))
    labels = torch.stack([certificate.predict(x, seed) for seed in range(10)])
    assert bool((labels != labels[0]).any())


class Kept(dict):
    """A store in memory that fails after so many writes."""

    def __init__(self, fails_after=10**9):
        super().__init__()
        self.left = fails_after

    def read(self, name):
        return self.get(name)

    def write(self, name, value):
        self[name] = value
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


@pytest.mark.parametrize("prior", ["isotropic", "learnt"])
def test_a_stopped_certificate_ends_as_an_unbroken_one(prior):
    kept = Kept(fails_after=4)
    with pytest.raises(KeyboardInterrupt):
        ds.certify(problem(), prior, store=kept, **FEW)
    resumed = ds.certify(problem(), prior, store=kept, **FEW)
    whole = ds.certify(problem(), prior, **FEW)
    assert resumed.value == pytest.approx(whole.value, abs=1e-6)
    assert len(resumed.curve) == len(whole.curve) == 6


def test_descent_ends_with_its_minutes_and_says_so(monkeypatch):
    # a clock of which every look costs a second, of 12 that there are
    monkeypatch.setattr(optimise, "time", SimpleNamespace(perf_counter=itertools.count().__next__))
    said = []
    settings = FEW | {"epochs": 400, "minutes": 0.2}
    found = ds.certify(problem(), progress=lambda *a: said.append(a), **settings)
    assert len(found.curve) == 12
    assert "stopped after 12 of 400 epochs" in str(found)
    assert any("about" in name for *_, name in said)
    kept = Kept()
    ds.certify(problem(), store=kept, **settings | {"minutes": 0.1})
    assert len(ds.certify(problem(), store=kept, **settings).curve) > 6  # there are more minutes now


@pytest.mark.parametrize("bound", ["quadratic", "lambda"])
def test_weaker_bounds_are_there_for_comparison(bound):
    found = ds.certify(problem(), bound=bound, **FEW)
    as_kl = dataclasses.replace(found.ledger, bound="kl").certified(found.empirical_bound)
    assert as_kl <= found.value


@pytest.mark.parametrize("variant", ["base", "appr", "iter", "iter.m"])
def test_published_variants_start_at_trained_weights(variant):
    found = ds.certify(problem(), variant=variant, **FEW)
    assert found.settings.start == "trained"
    assert found.mean_error < 0.2
    layer = found.network.layers["1"]
    assert (layer.left is None) == (variant == "base")


def test_random_labels_get_a_bound_that_is_no_better_than_chance():
    x, _ = data(600)
    y = torch.randint(2, (600,), generator=torch.Generator().manual_seed(9))
    found = ds.certify(ds.Problem(mlp(), (x, y)), **FEW)
    assert found.value >= 0.5
    assert found.is_vacuous
    assert "vacuous" in str(found)


class Twice(nn.Module):
    """Uses a layer twice."""

    def __init__(self):
        super().__init__()
        self.shared, self.last = nn.Linear(5, 5), nn.Linear(5, 2)

    def forward(self, x):
        return self.last(self.shared(self.shared(x).relu()))


def test_weights_that_are_used_twice_are_held_and_need_a_learnt_prior():
    with pytest.raises(CertificateError, match=r"shared.weight.*learnt"):
        ds.certify(ds.Problem(Twice(), data(200)), **FEW)
    found = ds.certify(ds.Problem(Twice(), data(400)), "learnt", **FEW)
    assert set(found.layers) == {"last"}
    assert found.network.held == ("shared.weight", "shared.bias")


def _regression():
    return ds.Problem(nn.Linear(5, 1), (torch.randn(20, 5), torch.randn(20, 1)), loss="mse")


def _tokens():
    net = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7))
    return ds.Problem(net, (torch.randint(7, (6, 3)), torch.randint(7, (6, 3))))


def _softmax():
    return ds.Problem(
        nn.Sequential(nn.Linear(5, 3), nn.LogSoftmax(1)), (torch.randn(20, 5), torch.arange(20) % 3)
    )


@pytest.mark.parametrize(
    ("make", "words"),
    [(_regression, "regression has none"), (_tokens, "Tokens of a sequence"), (_softmax, "without softmax")],
)
def test_what_cannot_be_certified_is_refused_with_the_reason(make, words):
    with pytest.raises(CertificateError, match=words):
        ds.certify(make())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"basis": "fourier"}, "fourier"),
        ({"colour": 3}, "no such setting"),
        ({"delta": 0.0}, "delta"),
        ({"minutes": -1}, "minutes"),
        ({"variant": "best"}, "variant"),
    ],
)
def test_settings_out_of_range_are_named(options, words):
    with pytest.raises(OptionError, match=words):
        ds.certify(problem(50), **options)
    with pytest.raises(OptionError, match="prior"):
        ds.certify(problem(50), "uniform")
    with pytest.raises(CertificateError, match="images"):
        ds.certify(problem(50), "smooth")


def test_steps_are_enough_for_few_examples_and_for_many():
    settings = Settings()
    assert settings.batch_size_of(60_000) == 500
    assert settings.epochs_of(60_000) == 42
    assert settings.epochs_of(1500) == 167


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

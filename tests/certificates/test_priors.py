"""Priors are fixed before the examples of the bound are seen, and those that were tried are charged."""

import math

import pytest
import torch
from torch import nn

import deepspectra as ds
from certificates_problems import data, images, mlp, problem
from deepspectra.certificates.binomial_bounds import monte_carlo_bound
from deepspectra.certificates.ledger import Grid
from deepspectra.certificates.networks import Examples, examples_of
from deepspectra.certificates.priors import Blur, Prior, fresh, learn, prepare, split
from deepspectra.errors import CertificateError, OptionError

FEW = {"epochs": 6, "batch_size": 100, "passes": 4}


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


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"share": math.nan}, "share .* got nan"),
        ({"share": 1.0}, "share .* below 1; got 1.0"),
        ({"blur": math.inf}, "blur .* got inf"),
        ({"blur": -1}, "blur .* got -1"),
        ({"centre": torch.zeros(3)}, "centre=Tensor; expected a network"),
        ({"grid": 3}, "grid=3; expected a Grid"),
        ({"tried": 0}, "tried must be an integer, at least 1"),
    ],
)
def test_priors_out_of_range_are_refused(options, words):
    with pytest.raises(OptionError, match=words):
        Prior(**options)


def test_a_centre_is_the_same_network_with_other_weights():
    same = Prior(centre=mlp(seed=5))
    assert ds.certify(problem(100), same, epochs=1, passes=1).num_draws == 100
    for other in (mlp(width=7), mlp(inputs=4), nn.Linear(5, 2)):
        with pytest.raises(OptionError, match="centre= must be the same network"):
            ds.certify(problem(100), Prior(centre=other))
    broken = mlp()
    nn.init.constant_(broken[1].bias, math.nan)
    with pytest.raises(OptionError, match=r"NaN or infinite weights, in 1\.bias"):
        ds.certify(problem(100), Prior(centre=broken))


def test_a_smooth_prior_is_w_equal_v_times_blur():
    x, y = images(200)
    model = mlp(36, 3)
    made = prepare(Prior("smooth", blur=1.0), model, examples_of(ds.Problem(model, (x, y), batch_size=200)), 0)
    V = fresh(model, 0)[0][1].weight
    W = Blur(1.0)(V.detach().view(-1, 1, 6, 6)).flatten(1)
    ordered = examples_of(ds.Problem(model, (x, y), batch_size=200)).inputs
    assert torch.allclose(ordered.flatten(1) @ W.T, made.bound.inputs.flatten(1) @ V.T, atol=1e-5)
    row = Blur(1.0)(torch.eye(36).view(36, 1, 6, 6))
    assert torch.allclose(row.flatten(1), row.flatten(1).T, atol=1e-6)


class Scaled(nn.Module):
    """Has a weight and a buffer, and draws the first anew only if told to."""

    def __init__(self, draws):
        super().__init__()
        self.draws, self.layer = draws, nn.Linear(5, 2)
        self.scale = nn.Parameter(torch.full((5,), 3.0))
        self.register_buffer("shift", torch.full((5,), 7.0))

    def reset_parameters(self):
        if self.draws:
            nn.init.ones_(self.scale)

    def forward(self, x):
        return self.layer((x - self.shift) * self.scale)


def test_weights_that_no_layer_draws_anew_are_not_taken_for_fresh_ones():
    twin, kept = fresh(Scaled(draws=True), 0)
    assert kept == ("shift",)
    assert twin.scale.tolist() == [1.0] * 5
    assert twin.shift.tolist() == [7.0] * 5
    with pytest.raises(CertificateError, match="scale is not drawn anew"):
        fresh(Scaled(draws=False), 0)


def test_buffers_that_are_held_are_told():
    found = ds.certify(ds.Problem(Scaled(draws=True), data(200)), "learnt", **FEW)
    assert found.kept == ("shift",)
    assert any(sentence.startswith("shift of the network were held as given") for sentence in found.sentences)
    assert ds.certify(problem(200), **FEW).kept == ()


def test_learning_depends_on_its_seed_alone():
    x, y = data(100)
    model = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.Linear(8, 2))
    after = []
    for noise in (1, 2):
        twin, _ = fresh(model, 0)
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        learn(twin, Examples(x, y), 2, 0)
        assert torch.equal(torch.get_rng_state(), before)
        after.append(twin[0].weight.detach())
    assert torch.equal(*after)

"""Which layers of a network get a posterior, and how its draws are made."""

import pytest
import torch
from torch import nn

import deepspectra as ds
from certificates_problems import Twice, cnn, data, images
from deepspectra.certificates.networks import GaussianNetwork
from deepspectra.errors import CertificateError

FEW = {"epochs": 6, "batch_size": 100, "passes": 4}


def test_a_network_with_convolutions_is_certified_and_its_draws_are_independent():
    x, y = images(500)
    found = ds.certify(ds.Problem(cnn(), (x, y)), test=images(300, seed=1), epochs=20, batch_size=50, passes=4)
    assert set(found.layers) == {"0", "4"}
    assert found.value < 2 / 3
    assert found.test_error < found.value


def test_weights_that_are_used_twice_are_held_and_need_a_learnt_prior():
    with pytest.raises(CertificateError, match=r"shared.weight.*learnt"):
        ds.certify(ds.Problem(Twice(), data(200)), **FEW)
    found = ds.certify(ds.Problem(Twice(), data(400)), "learnt", **FEW)
    assert set(found.layers) == {"last"}
    assert found.network.held == ("shared.weight", "shared.bias")


class Folded(nn.Module):
    """Every pixel is a row of a batch for the first layer."""

    def __init__(self):
        super().__init__()
        self.pixel, self.last = nn.Linear(1, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.pixel(x.reshape(-1, 1))).reshape(len(x), -1, 4).mean(1))


def test_positions_that_are_folded_into_the_batch_have_one_draw():
    # each would have its own, and their mean would err less than any network of the posterior
    assert GaussianNetwork(Folded(), images(3)[0], 1.0).held == ("pixel.weight", "pixel.bias")
    with pytest.raises(CertificateError, match=r"pixel\.weight.*learnt"):
        ds.certify(ds.Problem(Folded(), images(200)), **FEW)


class Skipped(nn.Module):
    """Takes its inputs twice."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(5, 5)

    def forward(self, x):
        return x + self.first(x)


class Chain(nn.Sequential):
    """A sequence with a forward of its own."""

    def forward(self, x):
        return super().forward(x) + x[:, :2]


def test_inputs_that_others_take_too_are_not_made_ready_for_the_first_layer_alone():
    for model in (nn.Sequential(Skipped(), nn.Linear(5, 2)), nn.Sequential(Chain(nn.Linear(5, 2)), nn.Linear(2, 2))):
        assert GaussianNetwork(model, data(3)[0], 1.0).first is None
        assert ds.certify(ds.Problem(model, data(200)), **FEW).value <= 1


class Reads(nn.Module):
    """Reads the weights of a layer itself."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.last(torch.relu(self.first(x) + self.first.weight.sum()))


def test_a_network_that_reads_its_weights_elsewhere_is_refused_in_words():
    with pytest.raises(CertificateError, match="Reads does not work with Gaussian weights in its layers"):
        ds.certify(ds.Problem(Reads(), data(200)), **FEW)

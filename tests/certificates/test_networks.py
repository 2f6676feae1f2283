"""Which layers of a network get a posterior, and how its draws are made."""

import pytest

import deepspectra as ds
from certificates_problems import Twice, cnn, data, images
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

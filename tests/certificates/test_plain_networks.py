"""What stands beside a certificate: the binomial bound of a plain network, and the network as it is."""

import pytest

import deepspectra as ds
from certificates_problems import data, problem
from deepspectra.certificates.binomial_bounds import binomial_bound

FEW = {"epochs": 6, "batch_size": 100, "passes": 4}


@pytest.fixture(scope="module")
def certificate():
    return ds.certify(problem(), test=data(800, seed=1), epochs=25, batch_size=100, passes=10)


def test_the_binomial_bound_stands_beside_it_and_says_which_is_tighter(certificate):
    (beside,) = certificate.test_bounds
    wrong = int((problem().model(data(800, seed=1)[0]).argmax(1) != data(800, seed=1)[1]).sum())
    assert beside.value == binomial_bound(wrong, 800, 0.035)
    said = str(certificate)
    assert (
        "The binomial bound of your network is " + ("tighter" if beside.value < certificate.value else "looser")
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

"""Settings are checked."""

import math

import pytest

import deepspectra as ds
from certificates_problems import problem
from deepspectra.certificates.settings import Settings
from deepspectra.errors import CertificateError, OptionError

FEW = {"epochs": 6, "batch_size": 100, "passes": 4}


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


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rate": math.nan}, "rate must be a finite number above 0; got nan"),
        ({"rate": -1}, "rate .* got -1"),
        ({"rate": math.inf}, "rate .* got inf"),
        ({"rate": True}, "rate .* got True"),
        ({"minutes": math.inf}, "minutes .* got inf"),
        ({"minutes": math.nan}, "minutes .* got nan"),
        ({"minutes": 0}, "minutes .* got 0"),
        ({"minutes": "5"}, "minutes .* got '5'"),
        ({"warm_up": 1.5}, "warm_up .* got 1.5"),
        ({"warm_up": math.nan}, "warm_up .* got nan"),
        ({"warm_up": -0.1}, "warm_up .* got -0.1"),
        ({"refreshes": 0.3}, "refreshes=0.3; expected shares"),
        ({"refreshes": (0.3, 1.2)}, "each of refreshes .* got 1.2"),
        ({"refreshes": (math.nan,)}, "each of refreshes .* got nan"),
        ({"transports": "yes"}, "transports='yes'"),
        ({"delta": "small"}, "delta .* got 'small'"),
        ({"delta": 0.6, "monte_carlo_delta": 0.5}, "sum to less than 1"),
    ],
)
def test_numbers_out_of_range_are_refused_before_any_work(options, words):
    with pytest.raises(OptionError, match=words):
        Settings.of(**options)


def test_shares_may_be_all_or_nothing():
    assert Settings.of(warm_up=0).warm_up_of(10) == 0
    assert Settings.of(warm_up=1).warm_up_of(10) == 1
    assert Settings.of(refreshes=[]).refreshes == []


@pytest.mark.parametrize(
    ("variant", "words"),
    [
        ("base", ["trained weights", "along the weights themselves", "cross-entropy of a draw"]),
        ("appr", ["trained weights", "along the curvature's eigenbasis", "cross-entropy of a draw"]),
        ("iter", ["trained weights", "along the curvature's eigenbasis", "cross-entropy of a draw"]),
        ("iter.m", ["trained weights", "along the curvature's eigenbasis", "cross-entropy of a draw"]),
        (None, ["minimises the bound, not the error"]),
    ],
)
def test_what_is_said_of_a_variant_is_how_it_was_found(variant, words):
    said = " ".join(Settings.of(variant).sentences("isotropic"))
    assert all(word in said for word in words)
    assert ("not the error" in said) == (variant is None)

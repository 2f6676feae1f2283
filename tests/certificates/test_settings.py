"""Settings are checked."""

import pytest

import deepspectra as ds
from certificates_problems import problem
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

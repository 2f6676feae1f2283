"""A small trained network, whose outliers are attributed and knocked out."""

import pytest

import deepspectra as ds
from nets import trained_on_digits


@pytest.fixture(scope="module")
def problem():
    net, data = trained_on_digits(12, (12,), epochs=40)
    return ds.Problem(net.double(), (data.inputs.double(), data.targets))


@pytest.fixture(scope="module")
def dense(problem):
    parts = ds.decompose(problem, effects="two-way")
    return ds.Hessian(problem).dense(), {name: part.dense() for name, part in parts.items()}


@pytest.fixture(scope="module")
def attribution(problem):
    return ds.attribute(ds.Hessian(problem), ds.decompose(problem, effects="two-way"), rtol=1e-8)

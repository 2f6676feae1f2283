"""Examples that are given several times, or again as test data, are told from independent ones."""

import pytest
import torch

import deepspectra as ds
from certificates_problems import data, mlp
from deepspectra.certificates.independence import check_independence
from deepspectra.certificates.networks import Examples
from deepspectra.errors import DataError, DependenceWarning

FEW = {"epochs": 1, "batch_size": 100, "passes": 1}


def test_examples_that_were_drawn_again_are_told():
    x, y = data(60)
    again = torch.randint(60, (300,), generator=torch.Generator().manual_seed(0))
    drawn = len(torch.unique(again))
    with pytest.warns(DependenceWarning, match=rf"^{300 - drawn} of 300 inputs are repeats"):
        ds.certify(ds.Problem(mlp(), (x[again], y[again])), **FEW)


def test_a_few_equal_images_are_taken_for_chance():
    x, y = data(200)
    x[1:3] = -0.0
    x[0] = 0.0
    check_independence(Examples(x, y), {})  # two of 200
    x[3] = 0.0
    with pytest.warns(DependenceWarning, match="^3 of 200 inputs"):
        check_independence(Examples(x, y), {})


@pytest.mark.parametrize("name", ["test", "unlabelled"])
def test_what_the_posterior_has_seen_is_no_test(name):
    x, y = data(300)
    seen = torch.cat([data(95, seed=1)[0], x[:5]])
    given = {"test": (seen, y[:100]), "unlabelled": seen}[name]
    with pytest.raises(DataError, match=rf"5 of 100 inputs of {name}= are among the examples"):
        ds.certify(ds.Problem(mlp(), (x, y)), **{name: given}, **FEW)
    check_independence(Examples(x, y), {"test=": torch.cat([data(199, seed=1)[0], x[:1]])})  # one in 200 is chance

"""Descent on a bound ends when it should, on the bound it was told."""

import dataclasses
import itertools
from types import SimpleNamespace

import pytest

import deepspectra as ds
from certificates_problems import Kept, problem
from deepspectra.certificates import optimise
from deepspectra.certificates.settings import Settings

FEW = {"epochs": 6, "batch_size": 100, "passes": 4}


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


def test_steps_are_enough_for_few_examples_and_for_many():
    settings = Settings()
    assert settings.batch_size_of(60_000) == 500
    assert settings.epochs_of(60_000) == 42
    assert settings.epochs_of(1500) == 167

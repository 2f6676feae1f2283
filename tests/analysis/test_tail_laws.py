"""Fits of tails agree with other programs, and weights count as copies do."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

import deepspectra as ds
from deepspectra.analysis.bulk_laws import Sample
from deepspectra.analysis.tail_laws import comes_nearer, scan, thresholds_of
from spectra import log_normal, pareto


def test_fits_agree_with_the_powerlaw_package() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        powerlaw = pytest.importorskip("powerlaw")
    for values in (pareto(400, 2.5)(np.random.default_rng(0)), log_normal(400, 1)(np.random.default_rng(1))):
        found = ds.tail(torch.from_numpy(values), num_draws=1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fit = powerlaw.Fit(values, xmin=found.power_law.x_min, verbose=0)
            assert fit.power_law.alpha == pytest.approx(found.power_law.exponent, rel=1e-9)
            assert pytest.approx(found.power_law.distance, abs=1.01 / found.power_law.num_tail) == fit.power_law.D
            ratio, p_value = fit.distribution_compare("power_law", "exponential")
            assert found.alternatives["exponential"].ratio == pytest.approx(ratio, rel=1e-4)
            assert found.alternatives["exponential"].p_value == pytest.approx(p_value, rel=1e-3)
            ratio, _ = fit.distribution_compare("power_law", "lognormal")
            assert found.alternatives["log-normal"].ratio == pytest.approx(ratio, abs=0.02)


def test_weights_count_as_copies_do() -> None:
    rng = np.random.default_rng(0)
    values = np.sort(pareto(200, 2)(rng))
    copies = rng.integers(1, 4, 200)
    one, other = (
        Sample(values, copies.astype(float)),
        Sample(np.repeat(values, copies), np.ones(copies.sum())),
    )
    places = thresholds_of(one)[:20]
    for name in ("power law", "exponential", "log-normal"):
        weighted, repeated = scan(name, one, places), scan(name, other, places)
        for field in ("counts", "effective", "rates", "heights"):
            assert getattr(weighted, field) == pytest.approx(getattr(repeated, field))


@pytest.mark.parametrize("size", [40, 700, 3000])
def test_what_is_ruled_out_by_a_few_values_is_ruled_out_by_all(size: int) -> None:
    for seed in range(30):
        values = np.random.default_rng(seed).pareto(1 + seed % 3, size) + 1
        values[: size // 3] = np.exp(np.random.default_rng(seed + 99).normal(0, 1, size // 3))
        sample = Sample(np.sort(values), np.ones(size))
        least = float(scan("power law", sample, thresholds_of(sample)).distances.min())
        for shift in (-1e-3, -1e-9, 1e-9, 1e-3):
            assert comes_nearer(sample, least + shift) == (shift > 0)

"""The law of a spectrum's bulk and tail, on spectra whose law is known."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch

import deepspectra as ds
from deepspectra.errors import DataError, OptionError
from nets import CASES
from spectra import Draw, log_normal, pareto


def covariance(size: int, samples: int) -> Draw:
    """ZZᵀ/samples of a normal Z (size, samples)."""

    def draw(rng: np.random.Generator) -> np.ndarray:
        z = rng.normal(size=(size, samples))
        return np.linalg.eigvalsh(z @ z.T / samples)

    return draw


def orthogonal(size: int) -> Draw:
    """The Gaussian orthogonal ensemble."""

    def draw(rng: np.random.Generator) -> np.ndarray:
        z = rng.normal(size=(size, size))
        return np.linalg.eigvalsh(z + z.T)

    return draw


def spiked(size: int) -> Draw:
    """Diag(5, 4, 3, 0, …) + ZZᵀ/size: figure 15 of Papyan, JMLR 21 (2020)."""

    def draw(rng: np.random.Generator) -> np.ndarray:
        z = rng.normal(size=(size, size)) / math.sqrt(size)
        return np.linalg.eigvalsh(np.diag([5.0, 4.0, 3.0] + [0.0] * (size - 3)) + z @ z.T)

    return draw


def heavy(size: int, samples: int, offset: float = 0.0, index: float = 1.0) -> Draw:
    """ZZᵀ/samples with entries of a Pareto law: density ∝ λ^−(1 + index/2); the same figure for 500 × 1000."""

    def draw(rng: np.random.Generator) -> np.ndarray:
        z = (1 - rng.random((size, samples))) ** (-1 / index) - offset
        return np.linalg.eigvalsh(z @ z.T / samples)

    return draw


def exponential(size: int) -> Draw:
    return lambda rng: rng.exponential(size=size)


# name → a draw, its law, and the exponent
QUICK: dict[str, tuple[Draw, str, float]] = {
    "covariance 100 × 400": (covariance(100, 400), "Marchenko-Pastur", math.nan),
    "covariance 200 × 200": (covariance(200, 200), "Marchenko-Pastur", math.nan),
    "covariance 300 × 100, zeros": (covariance(300, 100), "Marchenko-Pastur", math.nan),
    "orthogonal 150": (orthogonal(150), "semicircle", math.nan),
    "spiked 200": (spiked(200), "Marchenko-Pastur", math.nan),
    "heavy 500 × 1000": (heavy(500, 1000), "power law", 1.5),
    "Pareto 1.5": (pareto(500, 1.5), "power law", 1.5),
    "Pareto 2.5, smooth body": (pareto(800, 2.5, body="smooth"), "power law", 2.5),
    "exponential": (exponential(500), "exponential", math.nan),
    "log-normal": (log_normal(1000, 1), "log-normal", math.nan),
}


FULL: dict[str, tuple[Draw, str, float]] = {
    **QUICK,
    "covariance 200 × 2000": (covariance(200, 2000), "Marchenko-Pastur", math.nan),
    "covariance 300 × 600": (covariance(300, 600), "Marchenko-Pastur", math.nan),
    "covariance 500 × 500": (covariance(500, 500), "Marchenko-Pastur", math.nan),
    "orthogonal 500": (orthogonal(500), "semicircle", math.nan),
    "spiked 600": (spiked(600), "Marchenko-Pastur", math.nan),
    "heavy 500 × 1000 from 0": (heavy(500, 1000, 1), "power law", 1.5),
    "Pareto 2": (pareto(500, 2), "power law", 2),
    "Pareto 2.5": (pareto(1000, 2.5), "power law", 2.5),
    "Pareto 2.5, a fifth": (pareto(2000, 2.5, 0.2), "power law", 2.5),
    "Pareto 3": (pareto(1000, 3), "power law", 3),
    "Pareto 4": (pareto(2000, 4), "power law", 4),
    "exponential 1000": (exponential(1000), "exponential", math.nan),
    "log-normal 2": (log_normal(1000, 2), "log-normal", math.nan),
    "log-normal 3": (log_normal(2000, 3), "log-normal", math.nan),
}


def tails(draw: Draw, num: int, num_draws: int) -> list[ds.analysis.tail.Tail]:
    return [ds.tail(torch.from_numpy(draw(np.random.default_rng(1000 + k))), num_draws=num_draws) for k in range(num)]


def verdicts(draw: Draw, num: int, num_draws: int) -> Counter[str]:
    return Counter(found.verdict for found in tails(draw, num, num_draws))


@pytest.mark.parametrize("name", QUICK)
def test_known_laws_are_told(name: str) -> None:
    draw, law, _ = QUICK[name]
    assert verdicts(draw, 4, 20)[law] >= 3


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL)
def test_known_laws_are_told_in_95_of_100_draws(name: str) -> None:
    draw, law, _ = FULL[name]
    found = verdicts(draw, 100, 200)
    assert found[law] >= 95, found


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, (_, law, _) in FULL.items() if law == "power law"])
def test_intervals_of_the_exponent_cover(name: str) -> None:
    draw, _, exponent = FULL[name]
    laws = [found.power_law for found in tails(draw, 200, 1)]
    assert sum(law.low <= exponent <= law.high for law in laws) >= 0.92 * 200


def test_few_log_normal_draws_are_called_a_power_law() -> None:
    found = verdicts(log_normal(300, 1), 20, 20)
    assert found["power law"] <= 3
    assert found["undecided"]  # of so few


@pytest.mark.slow
@pytest.mark.parametrize(("size", "most"), [(400, 7), (500, 28), (600, 19), (700, 10), (1000, 10)])
def test_log_normal_draws_are_called_a_power_law_no_more_often_than_is_said(size: int, most: int) -> None:
    """Of 100 draws; allowed is what is said and three standard errors."""
    found = verdicts(log_normal(size, 1), 100, 1)
    assert found["power law"] <= most, found


def test_what_float32_resolves_is_judged_however_many_eigenvalues_there_are() -> None:
    """And what it leaves of zeros is not: those of a dense matrix of rank 200 of 600."""
    values = torch.from_numpy(pareto(2000, 1.8, share=1.0)(np.random.default_rng(0)))
    found = ds.tail(values.float(), num_draws=2)
    assert (found.num, found.num_zero) == (2000, 0)
    bound_of_rank = float(values.max()) * 2000 * torch.finfo(torch.float32).eps
    assert bound_of_rank > 2 * float(values.min())
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(600, 200, generator=generator)
    dense = torch.linalg.eigvalsh(root @ root.T / 200)
    assert ds.tail(dense, num_draws=2).num_zero == 400


def test_outliers_and_zeros_are_counted_and_units_do_not_matter() -> None:
    values = torch.from_numpy(spiked(150)(np.random.default_rng(0)))
    values = torch.cat([values, torch.full((50,), 1e-17)])
    found = ds.tail(values, num_draws=5)
    assert (found.num, found.num_zero, found.num_above) == (150, 50, 0)
    assert found.bulk_laws["Marchenko-Pastur"].num_outside == 3
    small = ds.tail(values * 1e-9, num_draws=5)
    assert small.power_law.exponent == pytest.approx(found.power_law.exponent)
    assert small.bulk_laws["Marchenko-Pastur"].distance == pytest.approx(found.bulk_laws["Marchenko-Pastur"].distance)
    without = ds.tail(values, above=4.2, num_draws=5)
    assert (without.num, without.num_above) == (147, 3)
    assert without.bulk_laws["Marchenko-Pastur"].num_outside == 0
    mirrored = ds.tail(-values, side="negative", num_draws=5)
    assert mirrored.power_law == found.power_law
    assert mirrored.verdict == found.verdict == "Marchenko-Pastur"


def operator_of(draw: Draw, seed: int = 0) -> torch.Tensor:
    return torch.diag(torch.from_numpy(draw(np.random.default_rng(seed))))


def test_an_exact_density_is_judged_as_its_eigenvalues_are() -> None:
    A = operator_of(pareto(120, 2))
    exact = ds.tail(ds.density(A, num_probes=2, num_steps=120), num_draws=5)
    assert exact.power_law.exponent == pytest.approx(ds.tail(A.diag(), num_draws=5).power_law.exponent)
    problem = CASES["relu_mlp"]().problem()
    spectrum = ds.gram_spectrum(problem)
    assert ds.tail(spectrum, num_draws=5).power_law == ds.tail(spectrum.density, num_draws=5).power_law


def test_a_density_is_judged_as_far_as_it_resolves() -> None:
    for draw in (covariance(400, 800), orthogonal(400), exponential(400), pareto(400, 2.5)):
        few = ds.tail(ds.density(operator_of(draw), num_probes=3, num_steps=12), num_draws=5)
        assert few.verdict in ("not resolved", "undecided")
    one = ds.tail(ds.density(operator_of(pareto(400, 2.5)), num_probes=1, num_steps=20), num_draws=5)
    assert one.verdict == "not resolved"  # a single probe has no error
    assert math.isnan(one.power_law.exponent)
    assert math.isinf(one.resolved_from)


def test_nodes_of_a_heavy_tail_give_its_exponent() -> None:
    A = operator_of(pareto(1500, 2))
    exact = ds.tail(A.diag(), num_draws=5).power_law
    found = ds.tail(ds.density(A, num_probes=8, num_steps=56), num_draws=5)
    law = found.power_law
    assert found.verdict == "power law"
    assert law.effective < law.num_tail
    assert law.low <= exact.exponent <= law.high
    assert law.low <= 2 <= law.high


def test_nodes_of_log_normal_eigenvalues_are_called_no_power_law() -> None:
    for seed in range(3):
        nodes = ds.density(operator_of(log_normal(800, 2), seed), num_probes=3, num_steps=40)
        assert ds.tail(nodes, num_draws=5).verdict in ("log-normal", "undecided", "not resolved")


def test_results_are_read() -> None:
    found = ds.tail(torch.from_numpy(pareto(300, 2)(np.random.default_rng(0))), num_draws=20)
    text = str(found)
    assert text.splitlines()[-1].startswith("power law: a power law of α = ")
    assert "Marchenko-Pastur" in text
    row = found.to_dataframe()
    assert len(row) == 1
    assert row.exponent[0] == found.power_law.exponent
    assert "power law" in found.to_latex()


def test_what_cannot_be_judged_is_refused() -> None:
    values = torch.linspace(1, 2, 50, dtype=torch.float64)
    with pytest.raises(DataError, match="finite"):
        ds.tail(values.log().log())
    with pytest.raises(DataError, match="floating-point"):
        ds.tail(torch.arange(5))
    with pytest.raises(DataError, match="another side"):
        ds.tail(values, side="negative")
    with pytest.raises(DataError, match="another side"):
        ds.tail(values, above=0.5)
    with pytest.raises(DataError, match="ends of a spectrum"):
        ds.tail(ds.eigenpairs(torch.diag(values), 3))
    with pytest.raises(OptionError, match="side"):
        ds.tail(values, side="both")
    with pytest.raises(OptionError, match="confidence"):
        ds.tail(values, confidence=95)
    with pytest.raises(OptionError, match="num_draws"):
        ds.tail(values, num_draws=0)
    assert ds.tail(values[:20]).verdict == "not resolved"


def test_copies_of_one_value_have_no_tail() -> None:
    with pytest.raises(DataError, match="no tail"):
        ds.tail(torch.ones(500))


def test_ties_of_the_largest_eigenvalues_are_no_tail() -> None:
    none = ds.tail(torch.tensor([1.0, -1.0] * 50))
    assert math.isnan(none.power_law.exponent)
    tied = ds.tail(torch.cat([torch.ones(60), torch.rand(300, generator=torch.Generator().manual_seed(0))]))
    assert tied.power_law.high < 1e6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_copies_that_differ_by_rounding_are_one_value(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    noise = 1 + torch.finfo(dtype).eps * torch.randn(60, generator=generator, dtype=torch.float64)
    with pytest.raises(DataError, match="no tail"):
        ds.tail((3 * noise).to(dtype))
    for scale in (1.0, 1e-20):
        with pytest.raises(DataError, match="no tail"):
            ds.tail(ds.density(2 * scale * torch.eye(60, dtype=dtype), num_probes=4, num_steps=8))
    none = ds.tail(torch.cat([noise, -noise]).to(dtype))
    assert none.verdict == "not resolved"
    assert math.isnan(none.power_law.exponent)
    tied = ds.tail(torch.cat([noise, torch.rand(300, generator=generator, dtype=torch.float64)]).to(dtype))
    assert tied.power_law.high < 1e6


@pytest.mark.parametrize("scale", [1e-250, 1e200])
@pytest.mark.parametrize("name", ["covariance 100 × 400", "orthogonal 150", "Pareto 1.5"])
def test_a_law_has_no_unit(name: str, scale: float) -> None:
    values = torch.from_numpy(QUICK[name][0](np.random.default_rng(0)))
    assert ds.tail(scale * values, num_draws=1).verdict == ds.tail(values, num_draws=1).verdict == QUICK[name][1]

"""The bound is computed from the ledger: published rows follow, and what was not charged shows in a simulation."""

import math

import numpy as np
import pytest
from scipy.special import ndtr

from deepspectra.certificates.binomial_bounds import monte_carlo_bound
from deepspectra.certificates.ledger import Grid, Ledger
from deepspectra.errors import OptionError

# Wu et al. 2020, arXiv 2010.04261v6, table 10: KL, error of the stochastic network on the training set (its
# Monte-Carlo upper bound), ½ log λ, and the bound; those whose λ sits on c = .1 at the place they should have, j = 1
PUBLISHED = {
    "T-600, Base": (4612.6, 0.03373, -1.3313, 0.1540),
    "T-600, Appr": (3980.6, 0.03417, -1.6063, 0.1432),
    "T-600, Iter": (3766.1, 0.02347, -1.2913, 0.1198),
    "T-600, Iter(D)": (3751.1, 0.02366, -1.2913, 0.1199),
    "T-600, Iter.M": (3929.9, 0.02494, -1.3213, 0.1255),
    "T-600², Iter(D)": (4956.8, 0.02523, -1.7963, 0.1443),
    "T-1200, Iter(D)": (5021.1, 0.02316, -1.4763, 0.1413),
    "T-300², Iter(D)": (3833.7, 0.02526, -1.4763, 0.1244),
    "R-600, Iter.M": (340.62, 0.5065, -2.5263, 0.5616),
    "T-600₁₀, Appr": (9095.8, 0.04159, -1.6013, 0.2424),
    "T-600₁₀, Iter": (8697.9, 0.02947, -1.3063, 0.2132),
    "T-600₁₀, Iter.M": (8870.9, 0.03294, -1.4613, 0.2227),
    "T-200²₁₀, Appr": (11068, 0.0366, -1.4213, 0.2621),
    "T-600²₁₀, Iter": (10568, 0.03057, -1.5713, 0.2431),
}
AT_THE_CAP = {
    "T-200²₁₀, Base": (21896, 0.04706, 0.4165, 0.4168),
    "T-200²₁₀, Iter": (9821, 0.02229, 0.2145, 0.2149),
    "T-600₁₀, Base": (12674, 0.03854, 0.2879, 0.2882),
    "T-300², Base": (5514.9, 0.03329, 0.1686, 0.1690),
    "T-600²₁₀, Base": (17212, 0.03884, 0.3472, 0.3475),
}


def _published(kl, nats):
    ledger = Ledger(60_000, 0.025, {"all": kl}, form="langford")
    return ledger.charged("prior scale", nats)


@pytest.mark.parametrize("row", PUBLISHED)
def test_published_bounds_follow_from_their_kl_and_error(row):
    kl, error, half_log, bound = PUBLISHED[row]
    grid = Grid(100, 0.1)
    nats = grid.nats(grid.precision * math.log(grid.largest / math.exp(2 * half_log)))
    assert round(_published(kl, nats).certified(error), 4) == pytest.approx(bound, abs=1.01e-4)


@pytest.mark.parametrize("row", AT_THE_CAP)
def test_rows_at_the_end_of_the_grid_were_printed_with_nats_that_nobody_had(row):
    kl, error, printed, valid = AT_THE_CAP[row]
    assert _published(kl, Grid(100, 0.1).nats(1)).certified(error) == pytest.approx(valid, abs=1.01e-4)
    given = 2 * math.log(100 * 1e-7) + math.log(math.pi**2 / 6)  # λ = c − 1e-8, as the code had it
    assert given < -20
    shifted = _published(kl + given, 0.0)
    assert shifted.certified(error) == pytest.approx(printed, abs=1.01e-4)
    with pytest.raises(OptionError, match="no place of the grid"):
        Grid(100, 0.1).nats(100 * 1e-7)
    with pytest.raises(OptionError, match="at least 0"):
        _published(kl, given)


def test_all_places_of_a_grid_cost_one_delta_together():
    assert sum(math.exp(-Grid().nats(place)) for place in range(1, 200_000)) == pytest.approx(1, abs=1e-5)
    grid = Grid(100, 0.1)
    assert grid.nearest(grid.variance(37)) == 37
    assert grid.nearest(5.0) == 1


def test_the_bound_is_what_the_ledger_says():
    ledger = Ledger(1000, 0.025, {"fc1": 10.0, "fc2": 2.5}).charged("scale of fc1", 3.0).tried("blur", 4)
    ledger = ledger.must_hold("Monte Carlo", 0.01)
    assert ledger.total_divergence == 12.5
    expected = (12.5 + 3 + math.log(4) + math.log(2 * math.sqrt(1000) / 0.025)) / 1000
    assert ledger.nats_an_example == pytest.approx(expected, rel=1e-15)
    assert sum(nats for _, nats in ledger.rows()) / 1000 == pytest.approx(expected, rel=1e-15)
    assert ledger.confidence == pytest.approx(0.965)
    assert all(word in str(ledger) for word in ("blur, 4 tried", "KL of fc1", "Monte Carlo 0.01", "0.965"))
    with pytest.raises(OptionError, match="already"):
        ledger.charged("scale of fc1", 1.0)


# -- coverage: problems whose true risk is known ------------------------------------------------------------------


def _failures_in_the_plane(repetitions, delta, seed, num_draws=2000):
    """Labels are sign(x₁) but for one in five, x on the circle; prior N(0, I), posteriors N(μ, s I) of the data.

    The error of w ~ N(μ, s I) at angle φ is Φ(−y μ·x/√s), so its mean over the circle is the true risk. Of 96
    posteriors the one of the smallest bound is kept, so that the bound must hold for all of them at once. Its error
    on the data is bounded from draws, as a certificate's is, with another δ/2 that they may fail.
    """
    draw, n = np.random.default_rng(seed), 40
    angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    means = np.stack([np.cos(angles), np.sin(angles)], 1)
    sizes = [(r, s) for r in (0.5, 1.5) for s in (0.3, 1.0)]
    circle = (np.arange(720) + 0.5) / 720 * 2 * np.pi
    failed = 0
    for _ in range(repetitions):
        phi = draw.uniform(0, 2 * np.pi, n)
        y = np.where(np.cos(phi) > 0, 1, -1) * np.where(draw.uniform(size=n) < 0.2, -1, 1)
        x = np.stack([np.cos(phi), np.sin(phi)], 1)
        best = (2.0, 0, 0, 0)
        for r, s in sizes:
            risks = ndtr(-y[:, None] * (x @ means.T) * r / np.sqrt(s)).mean(0)
            ledger = Ledger(n, delta, {"w": s - 1 - math.log(s) + r * r / 2})
            k = int(risks.argmin())
            best = min(best, (ledger.certified(float(risks[k])), k, r, s))
        _, k, r, s = best
        own = ndtr(-y * (x @ means[k]) * r / np.sqrt(s))
        share = draw.binomial(num_draws, own.mean()) / num_draws
        ledger = Ledger(n, delta / 2, {"w": s - 1 - math.log(s) + r * r / 2}).must_hold("draws", delta / 2)
        bound = ledger.certified(monte_carlo_bound(share, num_draws, delta / 2))
        wrong = ndtr(-np.where(np.cos(circle) > 0, 1, -1) * np.cos(circle - angles[k]) * r / np.sqrt(s)).mean()
        failed += bound < 0.2 + 0.6 * wrong
    return failed


def _failures_with_tuned_priors(repetitions, delta, seed, *, charge):
    """Labels are coin tosses, so that every classifier errs on half of all data; the prior is the best of 4,096.

    Each prior is N(100 u_k, I) with u_k a direction in R^20; the posterior is the prior that errs least on the
    training set, so its KL is 0.
    """
    draw, n, num = np.random.default_rng(seed), 64, 4096
    u = draw.normal(size=(20, num))
    u /= np.linalg.norm(u, axis=0)
    failed = 0
    for _ in range(repetitions):
        x, y = draw.normal(size=(n, 20)), draw.choice([-1, 1], n)
        shares = (np.sign(x @ u) != y[:, None]).mean(0)  # at so large a mean, the draws of w agree with u
        ledger = Ledger(n, delta, {"w": 0.0})
        if charge:
            ledger = ledger.tried("prior mean", num)
        failed += ledger.certified(float(shares.min())) < 0.5
    return failed


def test_bounds_cover_the_true_risk():
    assert _failures_in_the_plane(300, 0.2, 0) <= 0.2 * 300


def test_a_prior_tuned_on_the_training_set_must_be_charged():
    assert _failures_with_tuned_priors(100, 0.025, 1, charge=True) <= 2
    # the same simulation sees the fault when the ledger says nothing of the 4,096 that were tried
    assert _failures_with_tuned_priors(100, 0.025, 1, charge=False) > 10


@pytest.mark.slow
@pytest.mark.parametrize("delta", [0.025, 0.2])
def test_bounds_cover_the_true_risk_in_thousands_of_repetitions(delta):
    assert _failures_in_the_plane(4000, delta, 2) <= delta * 4000
    assert _failures_with_tuned_priors(2000, delta, 3, charge=True) <= delta * 2000
    assert _failures_with_tuned_priors(2000, delta, 3, charge=False) > 2 * delta * 2000

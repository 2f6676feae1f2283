"""Bounds on a probability of error from a share of errors: the binary kl and its inverse, and who uses them."""

from __future__ import annotations

import math

from deepspectra.argument_checks import check_number
from deepspectra.errors import OptionError

SERIES = 0.1  # |x| up to which x − log(1 + x) is summed as a series
TERMS = 20  # of it: the first one left out is 0.1²²
HALVINGS = 200


def kl(q: float, p: float) -> float:
    """Divergence of two coins, q log(q/p) + (1 − q) log((1 − q)/(1 − p)); ∞ where p is 0 or 1 and q is not.

    Raises:
        OptionError: q or p is no probability.
    """
    check_probability("q", q)
    check_probability("p", p)
    return _divergence(q, p - q) if 0 < p < 1 else 0.0 if p == q else math.inf


def kl_inverse(q: float, c: float) -> float:
    """The largest p with kl(q ‖ p) ≤ c: the upper bound on a risk whose estimate q is within c of it.

    Args:
        q: observed share of errors.
        c: nats an example, such as (KL + log(2√n/δ))/n; 0 gives q, ∞ gives 1.

    Raises:
        OptionError: q is no probability, or c is negative or NaN.

    Cost: microseconds. Error below 1e-10 whatever q and c: the distance p − q is found to its own relative rounding.
    """
    check_probability("q", q)
    if not c >= 0:
        raise OptionError(f"c={c!r} must be at least 0: nats by which a share of errors may differ from its mean.")
    # the distance d, and not p, is bisected: near q the divergence is d²/(2 q (1 − q)), too small for the digits of p
    low, high = 0.0, 1.0 - q
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        low, high = (middle, high) if _divergence(q, middle) <= c else (low, middle)
    return min(1.0, q + high)


def monte_carlo_bound(share: float, num_draws: int, delta: float) -> float:
    """Upper bound kl⁻¹(share | log(2/δ)/draws) on the mean of independent draws in [0, 1], not all of one mean.

    Chernoff's bound for unequal means follows from that for equal ones, for their geometric mean is no larger than
    their arithmetic one.

    Source: Langford and Caruana 2001; Dziugaite and Roy 2017, arXiv 1703.11008, section 6.
    """
    check_delta("delta", delta)
    return kl_inverse(share, math.log(2 / delta) / num_draws)


def binomial_bound(num_errors: int, num_examples: int, delta: float) -> float:
    """Clopper and Pearson's upper bound on the error of one fixed classifier, from examples that it has not seen.

    The largest p with P(Bin(n, p) ≤ errors) ≥ δ: no test-set bound that looks only at this count is smaller.

    Raises:
        OptionError: counts that are impossible, or δ outside (0, 1).
    """
    from scipy.special import betaincinv  # noqa: PLC0415  (SciPy's import takes a while)

    check_delta("delta", delta)
    if not 0 <= num_errors <= num_examples or num_examples < 1:
        raise OptionError(f"{num_errors} errors of {num_examples} examples: expected 0 ≤ errors ≤ examples ≥ 1.")
    if num_errors == num_examples:
        return 1.0
    return float(betaincinv(num_errors + 1, num_examples - num_errors, 1 - delta))


def quadratic_bound(risk: float, c: float) -> float:
    """(√(R + κ) + √κ)² with κ = c/2: weaker than `kl_inverse`, of which it is a relaxation.

    Source: Rivasplata et al. 2019, arXiv 1908.07380, f_quad.
    """
    return min(1.0, (math.sqrt(risk + c / 2) + math.sqrt(c / 2)) ** 2)


def lambda_bound(risk: float, c: float) -> float:
    """Smallest over λ in (0, 2) of R/(1 − λ/2) + c/(λ (1 − λ/2)), which holds for all λ at once.

    Source: Thiemann et al. 2017, arXiv 1608.05610.
    """
    if c == 0:
        return risk
    best = best_lambda(risk, c)
    return min(1.0, (risk + c / best) / (1 - best / 2))


def best_lambda(risk: float, c: float) -> float:
    """The λ of `lambda_bound`, 2/(1 + √(1 + 2R/c))."""
    return 2 / (1 + math.sqrt(1 + 2 * risk / c))


BOUNDS = {"kl": kl_inverse, "quadratic": quadratic_bound, "lambda": lambda_bound}


def price(bound: str, risk: float, c: float, num_examples: int) -> float:
    """What a nat costs in risk, (∂B/∂KL) / (∂B/∂R): descent on R + price · KL is descent on the bound B(R, KL/n)."""
    risk = min(max(risk, 1e-6), 1 - 1e-6)
    if bound == "lambda":
        return 1 / (num_examples * best_lambda(risk, c))
    if bound == "quadratic":
        return (1 + math.sqrt((risk + c / 2) / (c / 2))) / (2 * num_examples)
    above = min(kl_inverse(risk, c), 1 - 1e-6)
    return 1 / (num_examples * max(1e-3, math.log(above * (1 - risk) / (risk * (1 - above)))))


def check_probability(name: str, value: float) -> None:
    """Raise OptionError unless 0 ≤ value ≤ 1."""
    if not 0 <= value <= 1:
        raise OptionError(f"{name}={value!r} must lie between 0 and 1.")


def check_delta(name: str, value: float) -> None:
    """Raise OptionError unless 0 < value < 1."""
    check_number(name, value, 0, 1)


def _divergence(q: float, d: float) -> float:
    """Of coins q and q + d: q φ(d/q) + (1 − q) φ(−d/(1 − q)), φ(x) = x − log(1 + x), where no linear terms cancel."""
    first = q * _excess(d / q) if q else d
    second = (1 - q) * _excess(-d / (1 - q)) if q < 1 else -d
    return first + second


def _excess(x: float) -> float:
    """Of x over log(1 + x), to relative rounding: x − log(1 + x)."""
    if abs(x) > SERIES:
        return x - math.log1p(x) if x > -1 else math.inf
    return sum((-x) ** k / k for k in range(2, TERMS + 2))

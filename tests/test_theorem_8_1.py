"""Theorem 8.1 of Papyan 2020 (JMLR 21:252): a model whose outliers, bump and bulk are known in closed form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deepspectra as ds
from nets import Case


def dense(parts: Any) -> dict[str, Tensor]:
    return {name: operator.dense() for name, operator in parts.items()}


T, ALPHA, C8, D8 = 2.5, 0.3, 4, 9


def given_logits(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits Wx + log p with W = 0: the derivative is softmax regression's, p is 1−α on the true class."""
    x, y = batch
    p = torch.full((len(y), C8), ALPHA / (C8 - 1), dtype=x.dtype)
    p[torch.arange(len(y)), y] = 1 - ALPHA
    return model(x) + p.log(), y


def theorem_8_1() -> list[tuple[float, int]]:
    """Eigenvalues of E[G] and their multiplicities: outliers, bump, bulk, zeros."""
    s, a, b = T**2, ALPHA / (C8 - 1), 2 - ALPHA * C8 / (C8 - 1)
    return [
        (a * (s * (1 - ALPHA) + b), C8),
        (a * (s / C8 + b), C8 * (C8 - 2)),
        (a * b, (D8 - C8) * (C8 - 1)),
        (0.0, D8),
    ]


def regression_at_zero(noise: Tensor, labels: Tensor) -> Case:
    x = T * torch.eye(C8, D8, dtype=torch.float64)[labels] + noise
    model = nn.Linear(D8, C8, bias=False).double()
    nn.init.zeros_(model.weight)
    return Case(model, [(x, labels)], forward=given_logits)


def exact_design() -> Case:
    """Noise ±√D e_d, each once in each class: mean 0 and covariance I exactly, so that G is E[G]."""
    steps = D8**0.5 * torch.eye(D8, dtype=torch.float64)
    return regression_at_zero(torch.cat([steps, -steps]).repeat(C8, 1), torch.arange(C8).repeat_interleave(2 * D8))


def spectrum(levels: list[tuple[float, int]]) -> Tensor:
    values = [value for value, multiplicity in levels for _ in range(multiplicity)]
    return torch.tensor(sorted(values, reverse=True), dtype=torch.float64)


def test_theorem_8_1_holds_exactly_in_an_exact_design() -> None:
    """C outliers a(s(1−α)+b), C(C−2) in the bump a(s/C+b), (D−C)(C−1) in the bulk ab, D zeros."""
    found = torch.linalg.eigvalsh(ds.GaussNewton(exact_design().problem()).dense()).flip(0)
    expected = spectrum(theorem_8_1())
    assert len(expected) == C8 * D8
    assert (found - expected).abs().max() < 1e-12


def test_theorem_8_1_holds_within_sampling_error() -> None:
    """40,000 Gaussian examples: deviations below twice the ‖G − E[G]‖ that random matrix theory expects."""
    n = 40_000
    labels = torch.arange(n) % C8
    noise = torch.randn(n, D8, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    found = torch.linalg.eigvalsh(ds.GaussNewton(regression_at_zero(noise, labels).problem()).dense()).flip(0)
    expected = spectrum(theorem_8_1())
    tolerance = 2 * expected[0] * (2 * (D8 / n) ** 0.5)
    assert (found - expected).abs().max() < tolerance
    gaps = [expected[j] - expected[j + 1] for j in (C8 - 1, C8 * (C8 - 1) - 1)]
    assert tolerance < min(gaps) / 3, "the tolerance tells outliers, bump and bulk apart"


def test_theorem_8_1_attributes_outliers_bump_and_bulk() -> None:
    """Knock-outs move the feature they cause: the bulk is all within, and class means carry the outliers."""
    problem = exact_design().problem()
    parts = dense(ds.decompose(problem))
    values, U = torch.linalg.eigh(ds.GaussNewton(problem).dense())
    values, U = values.flip(0), U.flip(1)
    ends = torch.tensor([m for _, m in theorem_8_1()]).cumsum(0).tolist()
    spaces = {"outliers": slice(0, ends[0]), "bump": slice(ends[0], ends[1]), "bulk": slice(ends[1], ends[2])}

    def shares(feature: str) -> dict[str, float]:
        u, v = U[:, spaces[feature]], values[spaces[feature]]
        return {part: ((u * (m @ u)).sum(0) / v).mean().item() for part, m in parts.items()}

    s, a, b = T**2, ALPHA / (C8 - 1), 2 - ALPHA * C8 / (C8 - 1)
    outliers, bump, bulk = shares("outliers"), shares("bump"), shares("bulk")
    for found in (outliers, bump, bulk):
        assert sum(found.values()) == pytest.approx(1, abs=1e-10)
    assert bulk["within"] == pytest.approx(1, abs=1e-10)
    assert outliers["cross"] == pytest.approx(0, abs=1e-10)
    assert outliers["class"] + outliers["true"] == pytest.approx(s * (1 - ALPHA) / (s * (1 - ALPHA) + b), rel=1e-9)
    assert bump["cross"] == pytest.approx((s / C8) / (s / C8 + b), rel=1e-9)
    assert a * b == pytest.approx(values[spaces["bulk"]][0].item(), rel=1e-9)

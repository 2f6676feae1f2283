"""Cosines between gradients of examples, against gradients that are formed one by one."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

import deepspectra as ds
from deepspectra.errors import LossError, OptionError
from nets import CASES, labels
from reference import case_and_reference, error


def brute_force(rows: Tensor, y: Tensor, *, skip_true: bool) -> list[float]:
    """Mean cosines by group, from rows (n, C, P), with loops."""
    sums, counts = [0.0] * 4, [0] * 4
    num, size = rows.shape[:2]
    for i, j in itertools.permutations(range(num), 2):
        for k, m in itertools.product(range(size), repeat=2):
            if skip_true and (k == y[i] or m == y[j]):
                continue
            group = (0 if k == m else 2) if y[i] == y[j] else (1 if k == m else 3)
            a, b = rows[i, k], rows[j, m]
            sums[group] += float(a @ b / (a.norm() * b.norm()))
            counts[group] += 1
    return [total / count for total, count in zip(sums, counts, strict=True)]


@pytest.mark.parametrize("name", ["relu_mlp", "conv_batchnorm", "unbalanced"])
def test_cosines_are_those_of_gradients_formed_one_by_one(name: str) -> None:
    case, ref = case_and_reference(name)
    found = ds.clustering(case.problem())
    assert found.num_examples == len(ref.labels)
    logits = brute_force(ref.jacobian, ref.labels, skip_true=False)
    assert error(found.logits, torch.tensor(logits, dtype=torch.float64)) < 1e-9
    p = ref.outputs[0].detach().softmax(1)
    eye = torch.eye(p.shape[1], dtype=p.dtype)
    g = torch.einsum("nkc,ncp->nkp", p[:, None] - eye, ref.jacobian)
    gradients = brute_force(g, ref.labels, skip_true=True)
    assert error(found.gradients, torch.tensor(gradients, dtype=torch.float64)) < 1e-9


def test_a_linear_models_logit_gradients_cluster_by_logit_only() -> None:
    """∇z_k(x) = y_k ⊗ x: different logits are orthogonal, the same have the cosine of the inputs."""
    model = nn.Linear(3, 4, bias=False).double()
    x = torch.ones(12, 3, dtype=torch.float64)
    found = ds.clustering(ds.Problem(model, (x, torch.arange(12) % 4)))
    assert error(found.logits, torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64)) < 1e-12


def test_standard_errors_are_the_scatter_of_draws() -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x, y = torch.randn(600, 5, dtype=torch.float64), labels(600, 3)
    problem = ds.Problem(model, (x, y))
    runs = [ds.clustering(problem, num_examples=30, seed=seed) for seed in range(20)]
    scatter = torch.stack([run.logits for run in runs]).std(0)
    claimed = torch.stack([run.logits_standard_error for run in runs]).mean(0)
    assert bool((claimed > 0.5 * scatter).all())
    assert bool((claimed < 2 * scatter).all())
    whole = ds.clustering(problem, num_examples=600)
    away = (torch.stack([run.logits for run in runs]).mean(0) - whole.logits).abs()
    assert bool((away < 4 * scatter / math.sqrt(len(runs))).all())


def test_as_many_of_each_class_are_drawn() -> None:
    torch.manual_seed(2)
    model = nn.Linear(5, 3).double()
    y = torch.tensor([0] * 280 + [1] * 14 + [2] * 6)
    problem = ds.Problem(model, (torch.randn(300, 5, dtype=torch.float64), y))
    assert ds.clustering(problem, num_examples=18).num_examples == 18
    assert ds.clustering(problem, num_examples=60).num_examples == 20 + 14 + 6
    first, again = (ds.clustering(problem, num_examples=18, seed=5).logits for _ in range(2))
    assert torch.equal(first, again)


def test_text_and_errors() -> None:
    problem = CASES["relu_mlp"]().problem()
    assert "neither" in str(ds.clustering(problem))
    with pytest.raises(OptionError, match="num_examples"):
        ds.clustering(problem, num_examples=1)
    with pytest.raises(LossError, match="cross-entropy"):
        ds.clustering(CASES["mse_module"]().problem())

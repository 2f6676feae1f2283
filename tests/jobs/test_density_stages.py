"""Densities as stages: of a dense matrix each number once, and the Hessian's without products of its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import deepspectra as ds
from deepspectra.algorithms.dense_spectrum import DenseMatrix


def problems() -> list[ds.Problem]:
    """Of 100 parameters and over 4,500 gradients, too many for inner products of all; and another on other data."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 10))
    return [ds.Problem(net, (torch.randn(n, 3), torch.arange(n) % 10), dtype=torch.float64) for n in (520, 510)]


def products(found: ds.Analysis) -> dict[str, int]:
    """Of each density."""
    taken = found.dataset["cost_products"].to_series().to_dict()
    return {name[-1]: int(number) for name, number in taken.items() if name.startswith("density of")}


def nodes(found: ds.Analysis, operator: str) -> np.ndarray:
    """All eigenvalues, ascending."""
    return np.sort(found.dataset["density_node"].sel(operator=operator).dropna("node").values)


def test_the_hessian_is_a_sum_and_takes_no_products() -> None:
    one, _ = problems()
    found = ds.analyze(one, progress=False)
    assert products(found) == {"G": one.num_parameters, "R": one.num_parameters, "H": 0}
    exact = torch.linalg.eigvalsh(ds.Hessian(one).dense()).numpy()
    np.testing.assert_allclose(nodes(found, "hessian"), exact, atol=1e-12 * abs(exact).max(), rtol=0)


def test_behind_a_stop_the_matrices_are_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, _ = problems()
    undisturbed = ds.analyze(one, progress=False)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(DenseMatrix, "add", stop)
        with pytest.raises(KeyboardInterrupt):
            ds.analyze(one, progress=False, resume=tmp_path)
    found = ds.analyze(one, progress=False, resume=tmp_path)
    assert products(found)["H"] == 2 * one.num_parameters
    for operator in ("hessian", "gauss_newton", "residual"):
        np.testing.assert_array_equal(nodes(found, operator), nodes(undisturbed, operator))


def test_test_data_have_theirs_too() -> None:
    one, other = problems()
    found = ds.analyze(one, test=other, progress=False).dataset
    exact = torch.linalg.eigvalsh(ds.Hessian(other).dense()).numpy()
    saved = found["test_density_node"].sel(operator="hessian").dropna("test_node").values
    np.testing.assert_allclose(np.sort(saved), exact, atol=1e-12 * abs(exact).max(), rtol=0)

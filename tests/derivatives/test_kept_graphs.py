"""Graphs are kept while they fit, and never change a number."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import deepspectra as ds
from deepspectra import errors
from given import X, Y


def test_a_graph_that_does_not_fit_says_what_to_lower() -> None:
    model = nn.Sequential(nn.Linear(5, 64), nn.Tanh(), nn.Linear(64, 3)).double()
    for operator in (ds.Hessian, ds.GaussNewton):
        problem = ds.Problem(model, (X, Y), memory="5KB")
        with pytest.raises(errors.MemoryBudgetError, match=r"batch_size.*memory") as caught:
            operator(problem) @ torch.ones(problem.num_parameters, dtype=torch.float64)
        assert isinstance(caught.value, MemoryError)

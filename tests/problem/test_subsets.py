"""Problems on some of the examples, or on draws with weights, are problems of the same loss."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import deepspectra as ds
from deepspectra.problem.subsets import drawn_problem
from nets import digits_problem


@pytest.fixture(scope="module")
def problem():
    return digits_problem()


LOSSES = {
    "plain": nn.CrossEntropyLoss(),
    "class weights": nn.CrossEntropyLoss(weight=torch.linspace(0.5, 2, 10).double()),
    "smoothed, ignoring a class": nn.CrossEntropyLoss(label_smoothing=0.1, ignore_index=3),
}


@pytest.mark.parametrize("name", LOSSES)
def test_drawing_everything_is_the_problem_itself(problem, name):
    batches = [(x, y) for x, y in problem.batches][:2]
    net = copy.deepcopy(problem.model).requires_grad_()
    whole = ds.Problem(net, batches, loss=LOSSES[name])
    every = torch.arange(sum(len(y) for _, y in batches))
    drawn = drawn_problem(whole, every, torch.ones(len(every)))
    v = torch.randn(whole.num_parameters, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for operator in (ds.Hessian, ds.GaussNewton, ds.Residual):
        torch.testing.assert_close(operator(drawn) @ v, operator(whole) @ v, rtol=1e-9, atol=1e-13)
    assert drawn.loss() == pytest.approx(whole.loss(), rel=1e-12)

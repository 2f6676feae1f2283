"""Capturing a batch: every scalar of every example, in as few passes as there are, or refused with the reason."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import deepspectra as ds
from deepspectra.errors import CurvatureError, MemoryBudgetError
from deepspectra.problem.example_subsets import small_problem
from deepspectra.rows import batch_capture, capture_plan
from deepspectra.rows.held_rows import HeldRows
from example_orders import (
    IGNORED,
    NETWORKS,
    Convolved,
    Placed,
    classes,
    made,
    named,
    pair,
    random,
    same_values,
    truth,
)
from reference import error


def pieces(problem: ds.Problem, weights: Tensor, *, joint: bool) -> Iterator[batch_capture.Piece]:
    """The only batch, with scalars of these weights."""
    plan = capture_plan.learned(small_problem(problem, 3, torch.float64))
    while True:
        try:
            graph = batch_capture.Graph(problem, *problem.batches, plan.alone)
            yield from batch_capture.capture(graph, plan, batch_capture.Scalars(weights, joint))
            return
        except batch_capture.IrregularError as found:
            plan = plan.without(found.names)


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_scalars_are_of_each_row_or_sums_over_the_rows_of_an_example(name: str, joint: bool) -> None:
    net, batches, forward = NETWORKS[name]()
    net = net.double().eval()
    problem = ds.Problem(net, batches[-1:], **({} if forward is pair else {"forward": forward}))
    (batch,) = problem.batches
    with sdpa_kernel(SDPBackend.MATH):
        z = forward(net, batch)[0]
    z = z.reshape(-1, z.shape[-1])
    weights, seen = random(*z.shape, 2), []
    for piece in pieces(problem, weights, joint=joint):
        rows = piece.rows.view(piece.uses[0].num_examples, -1)
        seen += rows.flatten().tolist()
        found = {
            n: torch.zeros(len(rows), 2 if joint else 2 * rows.shape[1], v.numel()).double()
            for n, v in net.named_parameters()
        }
        for use in piece.uses:
            stretch = slice(use.slice.start, use.slice.start + use.slice.numel)
            found[use.slice.name][..., stretch] += use.formed(slice(None))
        each = torch.einsum("ncm,nc->nm", weights, z)[rows]  # (B, R, 2)
        scalars = each.sum(1, keepdim=True) if joint else each
        for scalar, mine in zip(scalars.flatten(), torch.cat(list(found.values()), 2).flatten(0, 1), strict=True):
            parameters = list(net.parameters())
            parts = torch.autograd.grad(scalar, parameters, retain_graph=True, materialize_grads=True)
            assert error(mine, torch.cat([part.flatten() for part in parts])) < 1e-12
    assert sorted(seen) == list(range(len(z)))


def test_batches_that_do_not_fit_together_are_right_or_refused() -> None:
    problem, true = made("if any")
    kron = ds.kronecker(problem)  # streams what does not fit
    small = HeldRows(problem)
    small.captures.limit = 0
    assert not small.captures.hold()
    with pytest.raises(CurvatureError, match="'scale' otherwise on one batch than on another"):
        list(small.captures.batches())
    assert small.captures.plan.alone == {"scale"}
    small.captures.limit = max(small.captures.bytes_by_layer.values())
    assert same_values(torch.linalg.eigvalsh(small.gram()).flip(0), true.dense)
    assert kron.trace > 0


def test_what_all_examples_share_is_no_single_example() -> None:
    net = Placed().double()
    batch = {"where": torch.arange(4)[None], "tokens": classes(5, 4, num=5), "y": classes(5)}
    problem = ds.Problem(net, [batch], forward=named("tokens", "where"))
    rows = HeldRows(problem)
    assert rows.captures.hold()
    (piece,) = rows.captures.held
    assert {use.num_examples for use in piece.uses} == {5}
    assert same_values(ds.gram_spectrum(problem).values, truth(net, [batch], named("tokens", "where")).dense)


def test_rows_that_do_not_count_take_no_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = {"x": random(7, 4), "y": torch.tensor([0, IGNORED, 1, IGNORED, IGNORED, 2, IGNORED])}
    net = Convolved(7).double()
    problem = ds.Problem(net, [graph], forward=named("x"))
    rows = HeldRows(problem)
    plain, passes = torch.autograd.grad, []
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: passes.append(k) or plain(*a, **k))
    assert rows.captures.hold()
    assert len([k for k in passes if not k.get("allow_unused")]) == 3 * 2
    monkeypatch.undo()
    assert same_values(ds.gram_spectrum(problem).values, truth(net, [graph], named("x")).dense)


def test_too_many_passes_are_refused_with_what_to_pass_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, _ = made("nodes")
    monkeypatch.setattr(batch_capture, "MOST_PASSES", 13)
    with pytest.raises(CurvatureError, match=r"14 backward passes over whole batches\. Pass forward="):
        ds.gram_spectrum(problem)
    dataset = ds.analyze(problem, num_probes=2, num_steps=8, progress=False).dataset
    assert "14 backward passes" in dataset.attrs["provenance"]
    assert float(dataset.trace.sel(operator="gauss_newton")) > 0
    monkeypatch.undo()
    problem.memory = 1000
    with pytest.raises(MemoryBudgetError, match="Pass forward="):
        ds.kronecker(problem)

"""Knock-outs bound the eigenvalues of what is left, whatever the memory and the products allow."""

from __future__ import annotations

import pytest
import torch

import deepspectra as ds
from deepspectra import errors
from deepspectra.algorithms.eigenpairs import explore
from deepspectra.analysis.attribute import attribute_known
from nets import clustered
from reference import Reference, descending


@pytest.mark.parametrize("removed", [("class",), ("logit",), ("class", "logit")])
def test_knockouts_by_subtraction_bound_the_exact_eigenvalues(attribution, dense, removed):
    H, parts = dense
    taken = sum(parts[name] for name in removed)
    if "class" in removed:
        taken = taken + parts["true"]
    exact = descending(H - taken)
    found = attribution.knockout(*removed)
    check_bounds(found, exact)
    assert found.num_outliers <= int((exact > attribution.threshold).sum()) <= found.num_outliers_at_most


@pytest.mark.parametrize("removed", [("class",), ("logit",), ("class", "logit")])
def test_knockouts_by_projection_bound_the_exact_eigenvalues(attribution, dense, removed):
    H, parts = dense
    values, vectors = torch.linalg.eigh(sum(parts[name] for name in removed))
    basis = vectors[:, values > 1e-10 * values[-1]]
    outside = torch.eye(len(H)).double() - basis @ basis.T
    check_bounds(attribution.knockout(*removed, method="projection"), descending(outside @ H @ outside))


def check_bounds(found, exact):
    """Ritz values lie below the exact ones, each within its residual of some; the largest is close."""
    assert (found.values <= exact[: len(found.values)] * (1 + 1e-6)).all()
    for value, residual in zip(found.values, found.residual_norms, strict=True):
        assert (exact - value).abs().min() <= residual * (1 + 1e-6) + 1e-9
    assert float(found.values[0]) == pytest.approx(float(exact[0]), rel=0.1)


@pytest.mark.parametrize("spare", [0, 3, 15])
def test_a_basis_that_memory_cuts_short_is_restarted(problem, attribution, dense, spare):
    """Room for the pairs, three residuals and the knock-outs alone: no second basis, and right numbers."""
    H, parts = ds.Hessian(problem), ds.decompose(problem, effects="two-way")
    capacity = 13 + 3 + 3 * 10 + 19 + spare
    H.memory = capacity * 8 * H.shape[0]
    pairs, basis = explore(H, 13, rtol=1e-6)
    assert len(basis.rows) == capacity
    assert basis.num_free < 30 + 19
    found = attribute_known(H, parts, pairs, basis)
    assert not found.knockout("means").residual_norms > 0.06 * found.bulk_edge
    assert found.bulk_edge == pytest.approx(attribution.bulk_edge, rel=0.01)
    assert found.num_products <= 25
    for removed in (("class",), ("logit",), ("class", "logit")):
        taken = sum(dense[1][name] for name in (*removed, *(["true"] if "class" in removed else [])))
        check_bounds(found.knockout(*removed), descending(dense[0] - taken))


def test_a_restart_counts_the_residuals_it_drops(problem):
    """A Q = [Q, W] H still holds, but for what `lost_squares` says."""
    H = ds.Hessian(problem)
    _, basis = explore(H, 5, rtol=1e-2)
    basis.append(torch.randn(4, H.shape[0], generator=torch.Generator().manual_seed(1)).double())
    ritz = basis.ritz()
    pending = torch.linalg.qr(torch.randn(basis.num_pending, 2, generator=torch.Generator().manual_seed(2)).double())[
        0
    ]
    basis.contract(ritz.coefficients[:, -20:], pending)
    assert (basis.num_basis, basis.num_pending) == (20, 2)
    torch.testing.assert_close(basis.rows[:22] @ basis.rows[:22].T, torch.eye(22).double())
    after = basis.ritz()
    torch.testing.assert_close(after.values, ritz.values[-20:])
    torch.testing.assert_close(after.residual_norms, ritz.residual_norms[-20:])
    found = H @ basis.combine(after.coefficients) - basis.combine(after.coefficients) * after.values
    torch.testing.assert_close(found.norm(dim=0), after.residual_norms, atol=1e-9, rtol=1e-6)


def test_a_basis_that_spans_everything_is_exact():
    """Fewer parameters than products: the edge and the knock-outs come from the whole matrix."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = torch.nn.Linear(3, 3).double()
        data = torch.randn(30, 3).double(), torch.arange(30) % 3
    problem = ds.Problem(net, data)
    H, parts = ds.Hessian(problem), ds.decompose(problem, effects="two-way")
    pairs, basis = explore(H, 6, rtol=1e-3)
    found = attribute_known(H, parts, pairs, basis)
    bulk = H.dense() - sum(part.dense() for name, part in parts.items() if name != "within")
    assert found.bulk_edge == pytest.approx(float(descending(bulk)[0]), rel=1e-2)
    without = descending(H.dense() - parts["logit"].dense())
    assert float(found.knockout("logit").values[0]) == pytest.approx(float(without[0]), rel=1e-2)


def test_knockouts_that_no_memory_has_room_for_are_refused_with_numbers(problem):
    H, parts = ds.Hessian(problem), ds.decompose(problem, effects="two-way")
    H.memory = parts.num_bytes(22)
    allowance = parts.rows.products.allowance
    allowance.size, budget = parts.num_bytes(14), allowance.size
    try:
        pairs, _ = explore(H, 13, rtol=1e-2)
        with pytest.raises(errors.MemoryBudgetError, match="at least 37 vectors"):
            ds.attribute(H, parts, pairs=pairs)
        allowance.size = parts.num_bytes(16)
        short = ds.attribute(H, parts, pairs=pairs)
        assert short.num_products < 30
        assert allowance.reserved == 0
    finally:
        allowance.size = budget
        parts.rows.products.release()


def test_knock_outs_bound_the_eigenvalues_of_what_is_left() -> None:
    """Rayleigh-Ritz values of A − B, each with a true eigenvalue within its residual norm.

    Class goes with true, whose means are collinear with the class means; "means" is all but within.
    """
    case = clustered()
    problem, ref = case.problem(), Reference(case)
    found = ds.attribute(ds.Hessian(problem), ds.decompose(problem))
    stands_for = {"class": ["class", "true"], "logit": ["logit"], "means": ["class", "cross", "true"]}
    tried = set()
    for knockout in found.knockouts:
        if knockout.method != "subtraction" or not set(knockout.removed) <= set(stands_for):
            continue
        tried.add(knockout.removed)
        parts = {part for name in knockout.removed for part in stands_for[name]}
        left = torch.linalg.eigvalsh(ref.hessian - sum(ref.parts[part] for part in parts)).flip(0)
        values, scale = knockout.values, left.abs().max()
        assert (values <= left[: len(values)] + 1e-6 * scale).all(), knockout.removed
        distance = (values[:, None] - left).abs().min(1).values
        assert (distance <= knockout.residual_norms + 1e-6 * scale).all(), knockout.removed
    assert tried >= {("class",), ("class", "logit")}

"""Shares, the bulk's edge and knock-outs, against dense float64 linear algebra."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import deepspectra as ds
from deepspectra import errors
from deepspectra.algorithms.eigenpairs import explore
from deepspectra.analysis.attribute import Attribution, attribute_known
from deepspectra.analysis.knockouts import Knockout
from deepspectra.operators.parts import Means
from nets import clustered
from reference import Reference, descending


def test_shares_equal_the_quadratic_forms_of_the_dense_parts(attribution, dense):
    H, parts = dense
    values, vectors = torch.linalg.eigh(H)
    values, vectors = values.flip(0), vectors.flip(1)
    residual = H - sum(parts.values())
    for j in range(len(attribution.values)):
        u = vectors[:, j]
        expected = torch.stack([u @ part @ u for part in (*parts.values(), residual)]) / values[j]
        torch.testing.assert_close(attribution.pair_shares[j], expected, atol=1e-6, rtol=0)
    assert attribution.part_names == (*parts, "residual")


def test_shares_of_each_pair_sum_to_one(attribution):
    torch.testing.assert_close(attribution.pair_shares.sum(1), torch.ones(len(attribution.values)).double())
    assert attribution.shares.shape == (attribution.num_outliers, 6)


def test_the_edge_is_the_largest_eigenvalue_without_any_mean(attribution, dense):
    H, parts = dense
    bulk = H - sum(part for name, part in parts.items() if name != "within")
    exact = float(descending(bulk)[0])
    assert attribution.bulk_edge == pytest.approx(exact, rel=0.01)
    assert attribution.threshold == pytest.approx(attribution.margin * attribution.bulk_edge)
    assert attribution.num_outliers == int((descending(H) > attribution.threshold).sum()) > 0


def test_the_basis_that_found_the_pairs_saves_products(problem):
    H, parts = ds.Hessian(problem), ds.decompose(problem, effects="two-way")
    pairs, basis = explore(H, 13, rtol=1e-3)
    with_basis = attribute_known(H, parts, pairs, basis)
    alone = ds.attribute(H, parts, pairs=pairs)
    assert with_basis.num_products < alone.num_products
    assert with_basis.bulk_edge == pytest.approx(alone.bulk_edge, rel=0.01)
    assert with_basis.num_outliers == alone.num_outliers
    for ours, theirs in zip(with_basis.knockouts, alone.knockouts, strict=True):
        assert float(ours.values[0]) == pytest.approx(float(theirs.values[0]), rel=0.05)


def test_a_budget_of_products_leaves_honest_counts(problem, attribution):
    H, parts = ds.Hessian(problem), ds.decompose(problem, effects="two-way")
    hurried = ds.attribute(H, parts, max_products=0)
    for removed in (("class",), ("class", "logit")):
        found, exact = hurried.knockout(*removed), attribution.knockout(*removed)
        assert found.num_outliers <= exact.num_outliers_at_most
        assert float(found.residual_norms[0]) >= float(exact.residual_norms[0])


def test_gauss_newton_has_no_residual_share(problem):
    found = ds.attribute(ds.GaussNewton(problem), ds.decompose(problem, effects="two-way"), rtol=1e-8)
    assert found.shares[:, -1].abs().max() < 1e-8


def test_the_published_four_parts_attribute_too(problem, attribution):
    found = ds.attribute(ds.Hessian(problem), ds.decompose(problem), rtol=1e-8)
    assert found.part_names == ("class", "cross", "within", "true", "residual")
    cross = attribution.pair_shares[:, 1] + attribution.pair_shares[:, 2]
    torch.testing.assert_close(found.pair_shares[:, 1], cross, atol=1e-6, rtol=0)
    assert found.knockout("class", "logit").num_outliers == attribution.knockout("class", "logit").num_outliers


def test_means_in_memory_or_in_sample_space_are_one_operator(problem):
    v = torch.randn(problem.num_parameters, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    held = ds.decompose(problem)
    streamed = ds.decompose(problem)
    allowance = streamed.rows.products.allowance
    allowance.size, size = 0, allowance.size
    try:
        assert not streamed.holds_means()
        sample_space = Means(streamed) @ v
    finally:
        allowance.size = size
    assert held.holds_means()
    torch.testing.assert_close(Means(held) @ v, sample_space, rtol=1e-8, atol=1e-12)
    held.forget_means()


def test_verdicts_state_counts_and_thresholds(attribution):
    text = " ".join(attribution.verdicts)
    assert f"{attribution.num_outliers} outliers" in text
    assert f"{attribution.threshold:.3g}" in text
    assert "residual" in text
    assert str(attribution).endswith(attribution.verdicts[-1])


def told(values, shares, left):
    """The last verdict on outliers with these shares of class, logit, within and residual, over a threshold of 10.

    `left` gives values and residual norms without class, and without class and logit.
    """
    knockouts = []
    for removed, (rest, norms) in zip((("class",), ("class", "logit")), left, strict=True):
        at_least, errors_of = torch.tensor(rest).double(), torch.tensor(norms).double()
        for method in ("subtraction", "projection"):
            knockouts.append(Knockout(removed, method, at_least, errors_of, 10.0))
    values, shares = torch.tensor(values).double(), torch.tensor(shares).double()
    return Attribution(
        values=values,
        residual_norms=torch.zeros_like(values),
        part_names=("class", "logit", "within", "residual"),
        pair_shares=shares.expand(len(values), 4),
        bulk_edge=8.0,
        threshold=10.0,
        margin=1.25,
        num_outliers=int((values > 10).sum()),
        complete=True,
        knockouts=tuple(knockouts),
        num_products=0,
        seconds=0.0,
        provenance=None,
    ).verdicts[-1]


def test_the_verdict_says_how_much_no_means_make():
    """Knock-outs alone may bring under the threshold what is mostly something else."""
    text = told([14.0, 3.0], [0.03, 0.34, 0.24, 0.39], [([13.0, 2.0], [0, 0]), ([9.0, 1.0], [0, 0])])
    assert text == (
        "Without the class and logit means 1 of 1 outliers fall below the threshold, but means do not make most of "
        "them: by share 39% of them is residual and 24% within, which no means make."
    )


def test_the_verdict_says_what_the_errors_leave_open():
    left = [([9.0, 5.0], [2.0, 0.1]), ([1.0, 1.0], [0, 0])]
    text = told([14.0, 13.0], [0.9, 0.05, 0.05, 0.0], left)
    assert "attributable to the class means (then below the threshold: 2 of 2, or 1 within the error)" in text
    left = [([11.0, 11.0], [0, 0]), ([11.0, 9.0, 8.0, 7.0], [0, 0, 0, 0])]
    text = told([14.0, 13.0, 12.0, 11.0], [0.5, 0.3, 0.1, 0.1], left)
    assert "for the most part to the class and logit means (then below the threshold: 3 of 4)" in text
    text = told([14.0, 13.0], [0.1, 0.1, 0.1, 0.7], [([12.0, 11.0], [0, 0])] * 2)
    assert text == "So neither explains the outliers: more than 25% of them stay."


def test_the_verdicts_shares_are_those_of_the_outliers(attribution):
    residual, within = (round(100 * attribution.mean_shares[name]) + 0 for name in ("residual", "within"))
    assert within > 0
    assert f"by share {residual}% of them is residual and {within}% within" in attribution.verdicts[-1]


def test_no_outlier_is_a_verdict_too(problem):
    found = ds.attribute(ds.Hessian(problem), ds.decompose(problem, effects="two-way"), margin=1e6)
    assert found.num_outliers == 0
    assert found.verdicts[0].startswith("No outlier")


def test_parts_of_another_problem_are_refused(problem):
    other = ds.Problem(
        torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)).double(),
        (torch.zeros(4, 1, 8, 8).double(), torch.arange(4)),
    )
    with pytest.raises(errors.ShapeError, match="one problem"):
        ds.attribute(ds.Hessian(problem), ds.decompose(other))
    with pytest.raises(errors.OptionError, match="decompose"):
        ds.attribute(ds.Hessian(problem), {"class": ds.Hessian(problem)})
    with pytest.raises(errors.OptionError, match="margin"):
        ds.attribute(ds.Hessian(problem), ds.decompose(problem), margin=0.5)
    with pytest.raises(errors.OptionError, match="no knock-out"):
        ds.attribute(ds.Hessian(problem), ds.decompose(problem)).knockout("within")


@pytest.mark.parametrize("capacity", [None, 22])
def test_means_beyond_memory_change_no_number(problem, capacity):
    """Cross-class means that do not fit are not made, and the basis that is too small grows: the same findings."""
    H = ds.Hessian(problem)
    found = []
    for held in (True, False):
        parts = ds.decompose(problem, effects="two-way")
        allowance = parts.rows.products.allowance
        budget, H.memory = allowance.size, problem.memory // 4
        room = 13 + 3 + 20 + 19 if capacity else 0
        allowance.size = budget if held else parts.num_bytes(room)
        if capacity and not held:
            H.memory = parts.num_bytes(capacity)
        try:
            pairs, basis = explore(H, 13, rtol=1e-6)
            found.append(attribute_known(H, parts, pairs, basis))
            assert parts.has_means is False
            assert allowance.reserved == 0
        finally:
            allowance.size = budget
            parts.rows.products.release()
        if capacity and not held:
            assert len(basis.rows) == room
    one, other = found
    assert one.bulk_edge == pytest.approx(other.bulk_edge, rel=1e-3)
    for ours, theirs in zip(one.knockouts, other.knockouts, strict=True):
        assert (ours.name, ours.num_outliers) == (theirs.name, theirs.num_outliers)
        assert float(ours.values[0]) == pytest.approx(float(theirs.values[0]), rel=0.02)


def test_a_dropped_decomposition_gives_back_the_memory_of_its_means(problem):
    parts = ds.decompose(problem, effects="two-way")
    allowance = parts.rows.products.allowance
    before = allowance.reserved
    assert parts.holds_means()
    assert allowance.reserved == before + parts.num_bytes(100)
    parts.forget_means()
    assert allowance.reserved == before
    assert parts.holds_means()
    del parts
    assert allowance.reserved == before


@pytest.mark.parametrize("kind", ["hessian", "gauss_newton"])
@pytest.mark.parametrize("effects", ["four-way", "two-way"])
def test_shares_sum_to_one_and_are_quadratic_forms(kind: str, effects: str) -> None:
    """share_j(B) = u_jᵀ B u_j / λ_j over G's parts and the residual."""
    case = clustered()
    problem, ref = case.problem(), Reference(case)
    operator = {"hessian": ds.Hessian, "gauss_newton": ds.GaussNewton}[kind](problem)
    parts = ds.decompose(problem, effects=effects)
    found = ds.attribute(operator, parts, pairs=ds.eigenpairs(operator, num=7, rtol=1e-9))
    values, U = torch.linalg.eigh(getattr(ref, kind))
    values, U = values.flip(0), U.flip(1)
    assert found.num_outliers >= 2
    assert found.shares.shape == (found.num_outliers, len(parts) + 1)
    assert (found.shares.sum(1) - 1).abs().max() < 1e-6
    expected = {
        **{name: ref.parts[name] for name in parts},
        "residual": getattr(ref, kind) - ref.gauss_newton,
    }
    for column, name in enumerate(found.part_names):
        for j in range(found.num_outliers):
            share = (U[:, j] @ expected[name] @ U[:, j] / values[j]).item()
            assert found.shares[j, column].item() == pytest.approx(share, abs=1e-5), (name, j)
    assert found.verdicts
    assert all(isinstance(sentence, str) for sentence in found.verdicts)


def test_pairs_must_be_the_largest_of_the_operator(problem):
    H, parts = ds.Hessian(problem), ds.decompose(problem, effects="two-way")
    with pytest.raises(errors.OptionError, match="smallest end"):
        ds.attribute(H, parts, pairs=ds.eigenpairs(H, 3, "smallest"))
    with pytest.raises(errors.DataError, match="pairs holds eigenpairs"):
        ds.attribute(H, parts, pairs=ds.eigenpairs(0.1 * H, 13))


def largest_without_means(H, parts):
    means = sum(parts[name].dense().double() for name in ("class", "logit", "interaction", "true"))
    return float(torch.linalg.eigvalsh(H.dense().double() - means)[-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num", [1, 2, 3])
def test_pairs_that_span_their_own_start_are_gone_on_from(num, dtype):
    """The random vector beside them is not the one, at the same seed, in whose Krylov space they lie."""
    for seed in range(4):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).to(dtype)
        problem = ds.Problem(net, (torch.randn(60, 6).to(dtype), torch.arange(60) % 4))
        H, parts = ds.Hessian(problem), ds.decompose(problem, effects="two-way")
        with pytest.warns(errors.ConvergenceWarning):
            rough = ds.eigenpairs(H, num, max_products=num, start="random", seed=seed)
        found = ds.attribute(H, parts, pairs=rough, seed=seed)
        off = abs(found.bulk_edge - largest_without_means(H, parts))
        assert off <= 0.05 * found.bulk_edge + float(found.knockouts[-1].residual_norms[0])


def test_all_pairs_of_a_small_space_leave_no_other_direction():
    torch.manual_seed(0)
    problem = ds.Problem(nn.Linear(2, 3).double(), (torch.randn(30, 2).double(), torch.arange(30) % 3))
    H, parts = ds.Hessian(problem), ds.decompose(problem, effects="two-way")
    found = ds.attribute(H, parts, pairs=ds.eigenpairs(H, 9))
    assert found.bulk_edge == pytest.approx(largest_without_means(H, parts), rel=1e-6)


def test_pairs_that_have_not_converged_leave_the_count_open(problem, attribution):
    H, parts = ds.Hessian(problem), ds.decompose(problem, effects="two-way")
    with pytest.warns(errors.ConvergenceWarning):
        rough = ds.eigenpairs(H, 3, max_products=3)
    found = ds.attribute(H, parts, pairs=rough)
    assert attribution.complete
    assert not found.complete
    assert found.num_outliers <= attribution.num_outliers
    assert not found.num_outliers or found.verdicts[0].startswith("At least")

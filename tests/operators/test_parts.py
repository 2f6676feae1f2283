"""Class means and the parts of G are the analysis of variance of the gradients.

Papyan 2019 (arXiv 1901.08244) and 2020 (arXiv 2008.11865): G = G_class + G_cross + G_within + G_true.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import deepspectra as ds
from deepspectra.errors import LossError, OptionError
from deepspectra.operators.parts import decompose
from deepspectra.rows.held_rows import HeldRows
from nets import CASES, CLASSIFICATION, Case, chunks
from reference import Reference, case_and_reference, close, error, rank

RTOL = 1e-8


FOUR = ("class", "cross", "within", "true")


FIVE = ("class", "logit", "interaction", "within", "true")


def dense(parts: Any) -> dict[str, Tensor]:
    return {name: operator.dense() for name, operator in parts.items()}


# ------------------------------------------------------------------------------------------------- the parts


@pytest.mark.parametrize("effects", [None, "two-way"])
@pytest.mark.parametrize("name", CLASSIFICATION)
def test_products_with_the_parts_equal_the_analysis_of_variance(name: str, effects: str | None) -> None:
    """Each part is AᵀΠA with Π an explicit projection in sample space."""
    case, ref = case_and_reference(name)
    options = {} if effects is None else {"effects": effects}
    parts = ds.decompose(case.problem(), **options)
    assert set(parts) == set(FOUR if effects is None else FIVE)
    V = torch.randn(ref.num_parameters, 4, dtype=torch.float64)
    for part, operator in parts.items():
        assert operator.shape == (ref.num_parameters, ref.num_parameters)
        assert close(operator @ V, ref.parts[part] @ V, ref.gauss_newton @ V), part
        assert close(operator @ V[:, 0], ref.parts[part] @ V[:, 0], ref.gauss_newton @ V[:, 0]), part
    assert close(sum(operator @ V for operator in parts.values()), ref.gauss_newton @ V, ref.gauss_newton @ V)


@pytest.mark.parametrize("name", ["unbalanced", "absent_class", "every_option"])
def test_parts_agree_with_the_published_formulas(name: str) -> None:
    """Σ_c w_c g_c g_cᵀ and so on: means, no projection anywhere."""
    case, ref = case_and_reference(name)
    parts = dense(ds.decompose(case.problem()))
    for part, expected in ref.parts_by_means.items():
        assert close(parts[part], expected, ref.gauss_newton), part


@pytest.mark.parametrize("effects", ["four", "two-way"])
def test_parts_are_symmetric_positive_semidefinite_and_sum_to_gauss_newton(effects: str) -> None:
    case, ref = case_and_reference("unbalanced")
    problem = case.problem()
    parts = dense(ds.decompose(problem, **({} if effects == "four" else {"effects": effects})))
    scale = torch.linalg.eigvalsh(ref.gauss_newton)[-1]
    for part, matrix in parts.items():
        assert (matrix - matrix.T).abs().max() < 1e-12 * scale, part
        assert torch.linalg.eigvalsh(matrix)[0] > -1e-11 * scale, part
    assert error(sum(parts.values()), ref.gauss_newton) < RTOL
    assert error(sum(parts.values()), ds.GaussNewton(problem).dense()) < RTOL


def test_logit_and_interaction_refine_cross() -> None:
    case, ref = case_and_reference("unbalanced")
    problem = case.problem()
    four, five = dense(ds.decompose(problem)), dense(ds.decompose(problem, effects="two-way"))
    assert close(five["logit"] + five["interaction"], four["cross"], ref.gauss_newton)
    for part in ("class", "within", "true"):
        assert close(five[part], four[part], ref.gauss_newton)


def test_knocking_a_part_out_leaves_the_sum_of_the_others() -> None:
    """Aᵀ(I − Π)A: still positive semi-definite."""
    case, ref = case_and_reference("relu_mlp")
    problem = case.problem()
    parts = ds.decompose(problem)
    left = (ds.GaussNewton(problem) - parts["class"]).dense()
    assert error(left, ref.gauss_newton - ref.parts["class"]) < RTOL
    assert torch.linalg.eigvalsh(left)[0] > -1e-10


def _feeds(case: Case) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    x, y = case.tensors
    order = torch.randperm(len(x))
    yield "class-sorted", (x[y.argsort()], y[y.argsort()]), {"batch_size": 4}
    yield "unsorted", (x[order], y[order]), {"batch_size": 5}
    yield "one at a time", (x, y), {"batch_size": 1}
    yield "one batch", (x, y), {"batch_size": len(x)}
    yield "shuffled loader", DataLoader(TensorDataset(x, y), batch_size=6, shuffle=True), {}
    yield "ragged", chunks(x[order], y[order], [1, 3, len(x) - 4]), {}


@pytest.mark.parametrize(
    "name", ["unbalanced", "absent_class", "every_option", "token_classes", "conv_batchnorm"]
)
def test_the_order_and_batching_of_the_data_do_not_matter(name: str) -> None:
    case, ref = case_and_reference(name)
    V = torch.randn(ref.num_parameters, 2, dtype=torch.float64)
    feeds = list(_feeds(case)) if case.tensors[1].ndim == 1 else list(_feeds(case))[2:4]
    for feed, data, options in feeds:
        problem = case.problem(data, **options)
        assert error(ds.class_means(problem).class_means, ref.means[1]) < RTOL, feed
        for part, operator in ds.decompose(problem, effects="two-way").items():
            assert close(operator @ V, ref.parts[part] @ V, ref.gauss_newton @ V), (feed, part)


@pytest.mark.parametrize("glob", ["0.*", "*.bias"])
def test_parts_of_a_restricted_problem_are_diagonal_blocks(glob: str) -> None:
    case, ref = case_and_reference("relu_mlp")
    for part, operator in ds.decompose(case.problem().restrict(glob)).items():
        assert close(operator.dense(), ref.block(ref.parts[part], glob), ref.gauss_newton), part


# ------------------------------------------------------------------------------------------------------ ranks


def _generic(num_classes: int, num: int = 30, width: int = 8) -> Case:
    """Softmax regression with more parameters than any rank below."""
    torch.manual_seed(num_classes)
    x, y = torch.randn(num, width, dtype=torch.float64), torch.arange(num) % num_classes
    return Case(nn.Linear(width, num_classes).double(), [(x, y)])


@pytest.mark.parametrize("num_classes", [3, 4, 5])
def test_parts_have_the_ranks_of_their_projections(num_classes: int) -> None:
    """C, C(C−2), C; the logits' C−1 and the interaction's C²−3C+1 (as far as P allows)."""
    C = num_classes
    problem = _generic(C).problem()
    four, five = dense(ds.decompose(problem)), dense(ds.decompose(problem, effects="two-way"))
    assert rank(four["class"]) == C
    assert rank(four["true"]) == C
    assert rank(four["cross"]) == C * (C - 2)
    assert rank(five["logit"]) == C - 1
    assert rank(five["interaction"]) == C**2 - 3 * C + 1
    assert rank(five["class"] + five["logit"]) == 2 * C - 1


@pytest.mark.parametrize("num_classes", [3, 4, 5])
def test_identity_3_means_span_at_most_all_ordered_pairs(num_classes: int) -> None:
    """rank(G_class + G_true + G_cross) = C(C−1): the true-class means lie in the others' span."""
    parts = dense(ds.decompose(_generic(num_classes).problem()))
    assert rank(parts["class"] + parts["true"]) == num_classes
    assert rank(parts["class"] + parts["true"] + parts["cross"]) == num_classes * (num_classes - 1)


def test_two_classes_have_no_cross_part() -> None:
    """With one other class, its cross-class mean is the class mean: cross, logit and interaction are zero."""
    case = _generic(2)
    ref, problem = Reference(case), case.problem()
    for effects in ({}, {"effects": "two-way"}):
        parts = dense(ds.decompose(problem, **effects))
        for part in {"cross", "logit", "interaction"} & set(parts):
            assert parts[part].abs().max() < 1e-12 * ref.gauss_newton.abs().max()
        assert error(sum(parts.values()), ref.gauss_newton) < RTOL


@pytest.mark.parametrize("name", ["unbalanced", "absent_class", "every_option"])
def test_logits_first_is_the_other_order(name: str) -> None:
    case, ref = case_and_reference(name)
    parts = dense(ds.decompose(case.problem(), effects="two-way", first="logit"))
    assert close(parts["logit"], ref.parts["logit_first"], ref.gauss_newton)
    assert close(parts["class"], ref.parts["class_second"], ref.gauss_newton)
    for part in ("interaction", "within", "true"):
        assert close(parts[part], ref.parts[part], ref.gauss_newton), part


@pytest.mark.parametrize("name", ["unbalanced", "absent_class", "relu_mlp"])
def test_class_plus_logit_does_not_depend_on_the_order(name: str) -> None:
    """The additive space is the classes' and then the logits', or the logits' and then the classes'."""
    case, ref = case_and_reference(name)
    five = dense(ds.decompose(case.problem(), effects="two-way"))
    other_way = ref.parts["logit_first"] + ref.parts["class_second"]
    assert close(five["class"] + five["logit"], other_way, ref.gauss_newton)
    assert not close(five["class"], ref.parts["class_second"], ref.gauss_newton)


# --------------------------------------------------------------------------------- identities, as properties


@st.composite
def problems(draw: st.DrawFn, max_examples: int = 16) -> Case:
    """Softmax regression with any labels, any confidence and any cut into batches."""
    C = draw(st.integers(3, 5))
    y = draw(st.lists(st.integers(0, C - 1), min_size=1, max_size=max_examples))
    scale = draw(st.sampled_from([0.0, 0.1, 1.0, 3.0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(len(y), 4, generator=generator, dtype=torch.float64)
    model = nn.Linear(4, C).double()
    with torch.no_grad():
        model.weight.copy_(scale * torch.randn(C, 4, generator=generator, dtype=torch.float64))
        model.bias.copy_(scale * torch.randn(C, generator=generator, dtype=torch.float64))
    cut = draw(st.integers(0, len(y) - 1))
    sizes = [cut, len(y) - cut] if cut else [len(y)]
    return Case(model, chunks(x, torch.tensor(y), sizes))


@given(case=problems())
def test_any_labels_any_confidence(case: Case) -> None:
    """Parts and means are their definitions, whichever classes occur and however often."""
    ref, problem = Reference(case), case.problem()
    for effects, names in (({}, FOUR), ({"effects": "two-way"}, FIVE)):
        parts = dense(ds.decompose(problem, **effects))
        for part in names:
            assert close(parts[part], ref.parts[part], ref.gauss_newton), part
    assert close(ds.class_means(problem).cross_class_means, ref.means[3], ref.means[3])


@given(case=problems())
def test_identity_1_extended_gradients_average_to_zero(case: Case) -> None:
    """Σ_k p_{i,k} g_{i,k} = 0 for each i, and so Σ_k w_{c,k} g_{c,k} = 0 for each class."""
    ref, means = Reference(case), ds.class_means(case.problem())
    size = ref.gradients.abs().max()
    assert torch.einsum("ik,ikp->ip", ref.probabilities, ref.gradients).abs().max() < 1e-13 * size
    sums = torch.einsum("ck,ckp->cp", means.cross_class_weights, means.cross_class_means)
    assert sums.abs().max() < 1e-12 * size


@given(case=problems())
def test_identity_2_true_class_means_are_the_class_means_turned(case: Case) -> None:
    """w_{c,c} g_{c,c} = −w_c g_c, so G_class + G_true = Σ_c w_c (1 + w_c / w_{c,c}) g_c g_cᵀ."""
    ref, problem = Reference(case), case.problem()
    means, parts = ds.class_means(problem), ds.decompose(problem)
    w_c, g_c = means.class_weights, means.class_means
    w_cc, g_cc = means.cross_class_weights.diagonal(), torch.einsum("ccp->cp", means.cross_class_means)
    left, right = w_cc[:, None] * g_cc, -w_c[:, None] * g_c
    assert (left - right).abs().max() < 1e-13 * ref.gradients.abs().max()
    seen = w_cc > 0
    factor = (w_c * (1 + w_c / w_cc))[seen]
    both = parts["class"].dense() + parts["true"].dense()
    assert close(torch.einsum("c,cp,cq->pq", factor, g_c[seen], g_c[seen]), both, ref.gauss_newton)


@given(seed=st.integers(0, 2**31), num_classes=st.integers(3, 5))
def test_identity_4_one_example_splits_by_its_competitors(seed: int, num_classes: int) -> None:
    """Σ_k p_k g_k g_kᵀ = p_c/(1−p_c) g_c g_cᵀ + Σ_{k≠c} p_k (g_k − ḡ)(·)ᵀ with ḡ = −p_c/(1−p_c) g_c.

    Here g_c is g_k at k = c. The library's class + true is the first term, its cross the second.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 4, generator=generator, dtype=torch.float64)
    model = nn.Linear(4, num_classes).double()
    with torch.no_grad():
        model.weight.copy_(torch.randn(num_classes, 4, generator=generator, dtype=torch.float64))
    case = Case(model, [(x, torch.tensor([seed % num_classes]))])
    ref, c = Reference(case), seed % num_classes
    p, g = ref.probabilities[0], ref.gradients[0]
    first = p[c] / (1 - p[c]) * torch.outer(g[c], g[c])
    mean = -p[c] / (1 - p[c]) * g[c]
    second = sum(p[k] * torch.outer(g[k] - mean, g[k] - mean) for k in range(num_classes) if k != c)
    parts = dense(ds.decompose(case.problem()))
    assert close(first + second, ref.gauss_newton, ref.gauss_newton)
    assert close(parts["class"] + parts["true"], first, ref.gauss_newton)
    assert close(parts["cross"], second, ref.gauss_newton)
    assert parts["within"].abs().max() < RTOL * ref.gauss_newton.abs().max()


@given(case=problems())
def test_identity_5_traces_and_the_small_gram_matrix(case: Case) -> None:
    """Traces of the parts sum to tr G, each is positive semi-definite, G_class has a C × C Gram matrix."""
    problem = case.problem()
    parts, means = dense(ds.decompose(problem)), ds.class_means(problem)
    trace = ds.GaussNewton(problem).dense().trace()
    assert sum(m.trace() for m in parts.values()).item() == pytest.approx(trace.item(), rel=1e-10)
    for part, matrix in parts.items():
        assert torch.linalg.eigvalsh(matrix)[0] > -1e-12 * trace, part
    rows = means.class_weights.sqrt()[:, None] * means.class_means
    small, large = torch.linalg.eigvalsh(rows @ rows.T), torch.linalg.eigvalsh(parts["class"])
    assert (large[-len(small) :] - small).abs().max() < 1e-10 * trace


# -------------------------------------------------------------------------------------- extreme probabilities


def test_probabilities_that_underflow_leave_everything_finite() -> None:
    """At logits of a thousand most p are exactly 0 or 1: their means have no weight and make no NaN."""
    case = CASES["softmax_regression"]()
    with torch.no_grad():
        case.model.weight.mul_(1e3)
    ref, problem = Reference(case), case.problem()
    assert (ref.probabilities == 0).any()
    means = ds.class_means(problem)
    assert means.class_means.isfinite().all()
    assert means.cross_class_means.isfinite().all()
    V = torch.randn(ref.num_parameters, 2, dtype=torch.float64)
    for effects in ({}, {"effects": "two-way"}):
        products = [operator @ V for operator in ds.decompose(problem, **effects).values()]
        assert all(p.isfinite().all() for p in products)
        assert (sum(products) - ref.gauss_newton @ V).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("margin", [10.0, 40.0, 90.0])
def test_a_class_whose_label_is_thought_impossible(margin: float, dtype: torch.dtype) -> None:
    """p of about e^−margin on the true class: the true part is tiny, and rounding does not blow it up."""
    case = CASES["softmax_regression"]()
    with torch.no_grad():
        case.model.bias.copy_(torch.tensor([0.0, 0.0, -margin]))
    ref = Reference(case)
    assert ref.means[2][2, 2] < 0.1 * ref.means[0][2]
    parts = dense(ds.decompose(case.problem(dtype=dtype)))
    tolerance = 1e-4 if dtype == torch.float32 else 1e-9
    scale = ref.gauss_newton.abs().max()
    assert (sum(parts.values()) - ref.gauss_newton).abs().max() < tolerance * scale
    for part, matrix in parts.items():
        assert (matrix - ref.parts[part]).abs().max() < tolerance * scale, part


# ----------------------------------------------------------------------------------------- asked for in vain


@pytest.mark.parametrize("name", ["linear_regression", "soft_targets", "callable_loss"])
def test_class_structure_needs_softmax_and_labels(name: str) -> None:
    """The hierarchy is of softmax cross-entropy with class labels: other losses are refused, by name."""
    problem = CASES[name]().problem()
    for ask in (ds.class_means, ds.decompose, ds.principal_subspace):
        with pytest.raises(LossError, match=r"(?i)cross.?entropy|label|class") as caught:
            ask(problem)
        assert isinstance(caught.value, ValueError)


def test_unknown_effects_and_levels() -> None:
    problem = CASES["softmax_regression"]().problem()
    with pytest.raises(OptionError, match="three-way"):
        ds.decompose(problem, effects="three-way")
    with pytest.raises(OptionError, match="chance"):
        ds.decompose(problem, effects="two-way", first="chance")
    with pytest.raises(OptionError, match="superclass"):
        ds.principal_subspace(problem, level="superclass")
    with pytest.raises(OptionError, match="colours"):
        ds.class_means(problem, of="colours")


# ---------------------------------------------------------------------------------------------- Theorem 8.1

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
    return regression_at_zero(
        torch.cat([steps, -steps]).repeat(C8, 1), torch.arange(C8).repeat_interleave(2 * D8)
    )


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
    assert outliers["class"] + outliers["true"] == pytest.approx(
        s * (1 - ALPHA) / (s * (1 - ALPHA) + b), rel=1e-9
    )
    assert bump["cross"] == pytest.approx((s / C8) / (s / C8 + b), rel=1e-9)
    assert a * b == pytest.approx(values[spaces["bulk"]][0].item(), rel=1e-9)


@pytest.mark.parametrize("name", ["unbalanced", "absent_class", "token_classes", "conv_batchnorm"])
@pytest.mark.parametrize("effects", ["four-way", "two-way"])
def test_parts_of_held_rows_are_the_parts(name: str, effects: str) -> None:
    case, ref = case_and_reference(name)
    parts = decompose(case.problem(), effects=effects, hold=True)
    assert isinstance(parts.rows, HeldRows)
    assert parts.rows.captures.hold()
    for part, operator in parts.items():
        assert (operator.dense() - ref.parts[part]).abs().max() < 1e-10 * ref.gauss_newton.abs().max()

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
from deepspectra.errors import DeepSpectraError, LossError, OptionError
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


@pytest.mark.parametrize("name", ["unbalanced", "absent_class", "every_option", "token_classes", "conv_batchnorm"])
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


@pytest.mark.parametrize("name", ["unbalanced", "absent_class", "token_classes", "conv_batchnorm"])
@pytest.mark.parametrize("effects", ["four-way", "two-way"])
def test_parts_of_held_rows_are_the_parts(name: str, effects: str) -> None:
    case, ref = case_and_reference(name)
    parts = decompose(case.problem(), effects=effects, hold=True)
    assert isinstance(parts.rows, HeldRows)
    assert parts.rows.captures.hold()
    for part, operator in parts.items():
        assert (operator.dense() - ref.parts[part]).abs().max() < 1e-10 * ref.gauss_newton.abs().max()


def other_problems() -> dict[str, ds.Problem]:
    """Problems with as many parameters as `relu_mlp`, each different in one thing."""
    case = CASES["relu_mlp"]()
    x, y = case.tensors
    turned = CASES["relu_mlp"]()
    with torch.no_grad():
        next(turned.model.parameters()).mul_(1.5)
    smooth, weighted = (
        torch.nn.CrossEntropyLoss(label_smoothing=0.1),
        torch.nn.CrossEntropyLoss(weight=torch.linspace(1, 2, 4).double()),
    )
    return {
        "weights": turned.problem(),
        "data": ds.Problem(case.model, (x + 1, y)),
        "data, its labels": ds.Problem(case.model, (x, (y + 1) % 4)),
        "loss, smoothed": ds.Problem(case.model, (x, y), loss=smooth),
        "loss, weighted": ds.Problem(case.model, (x, y), loss=weighted),
        "dtypes": case.problem().to(torch.float32),
    }


@pytest.mark.parametrize("which", [*other_problems()])
def test_parts_of_another_problem_of_the_same_size_are_refused(which: str) -> None:
    problem, other = CASES["relu_mlp"]().problem(), other_problems()[which]
    parts = ds.decompose(problem, effects="two-way")
    odd = which.partition(",")[0]
    with pytest.raises(OptionError, match=f"two problems, which differ in their {odd}"):
        ds.attribute(ds.Hessian(other), parts)
    if which != "dtypes":
        with pytest.raises(DeepSpectraError, match=f"differ in their {odd}"):
            ds.attribute(ds.Hessian(problem) - ds.Residual(other), parts)


def test_running_statistics_make_another_problem_too() -> None:
    case, other = CASES["conv_batchnorm"](), CASES["conv_batchnorm"]()
    other.model[1].running_mean += 1
    with pytest.raises(OptionError, match="differ in their weights"):
        ds.attribute(ds.Hessian(other.problem()), ds.decompose(case.problem()))


def test_restrictions_to_other_parameters_are_other_problems() -> None:
    problem = CASES["relu_mlp"]().problem()
    square = ds.Problem(
        torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(2))).double(),
        (torch.randn(6, 4).double(), torch.arange(6) % 4),
    )
    with pytest.raises(OptionError, match="differ in their parameters"):
        ds.attribute(ds.Hessian(square.restrict("0.*")), ds.decompose(square.restrict("1.*")))
    some = problem.restrict("0.*")
    assert (
        ds.attribute(ds.Hessian(problem.restrict("0.*")), ds.decompose(some)).provenance.size == some.num_parameters
    )


def test_the_same_problem_made_anew_summed_or_sampled_is_accepted() -> None:
    case = CASES["relu_mlp"]()
    problem = case.problem()
    parts = ds.decompose(problem, effects="two-way")
    x, y = case.tensors
    g = ds.GaussNewton(problem)
    some = {
        "made anew": ds.GaussNewton(CASES["relu_mlp"]().problem()),
        "in another order": ds.GaussNewton(ds.Problem(case.model, (x.flip(0), y.flip(0)))),
        "a sum": ds.Hessian(problem) - ds.Residual(problem),
    }
    expected = ds.attribute(g, parts, rtol=1e-8)
    for name, operator in some.items():
        found = ds.attribute(operator, parts, rtol=1e-8)
        assert error(found.values, expected.values) < 1e-6, name
    sampled = g.sampled(torch.Generator().manual_seed(0), 15)
    assert len(ds.attribute(sampled, parts).values)

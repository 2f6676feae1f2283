"""What is gone when a part is knocked out: one matrix under one name, whoever is asked, against dense truth."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

import deepspectra as ds
from deepspectra.analysis.gram_spectrum import gradient_spectrum
from deepspectra.analysis.knockouts import Knockout
from deepspectra.operators.parts import decompose
from deepspectra.rows.averages import METHODS, Averages
from deepspectra.rows.spectrum import Spectrum, range_of, significant, symmetric_pairs, symmetric_values
from reference import (
    GONE,
    Reference,
    case_and_reference,
    descending,
    error,
    inputs_and_errors,
    onto,
    projections_of,
    without,
)

NAMES = ("relu_mlp", "conv_pool", "conv_batchnorm", "unbalanced", "absent_class", "every_option")


PROJECTABLE = [name for name in GONE if name != "within"]


EVERY = [*((name, "subtraction") for name in GONE), *((name, "projection") for name in PROJECTABLE)]


GROUPS = torch.tensor([0, 1, 0, 2])


def same(found: Tensor, matrix: Tensor, scale: float, rtol: float = 1e-9) -> bool:
    """Whether values are the matrix's eigenvalues, up to zeros on either side."""
    expected = descending(matrix)
    size = max(len(found), len(expected))
    both = [functional.pad(some, (0, size - len(some))).sort().values for some in (found, expected)]
    return bool((both[0] - both[1]).abs().max() <= rtol * scale)


def top(matrix: Tensor) -> float:
    return float(descending(matrix)[0])


def gone(on: dict[str, Tensor], knockout: str) -> Tensor:
    """The projection on all that is gone."""
    return torch.stack([on[part] for part in GONE[knockout]]).sum(0)


def names_of(knockout: str) -> tuple[str, ...]:
    return tuple(knockout.split(" + "))


@pytest.mark.parametrize("name", NAMES)
def test_knockouts_of_the_exact_spectrum_are_those_of_dense_matrices(name: str) -> None:
    case, ref = case_and_reference(name)
    g, scale = ref.gauss_newton, top(ref.gauss_newton)
    found = ds.gram_spectrum(case.problem(), effects="two-way")
    published = ds.gram_spectrum(case.problem())
    for knockout, method in EVERY:
        left = without(g, ref.rows, gone(ref.projections, knockout), method)
        assert same(found.knockout(*names_of(knockout), method=method), left, scale), (knockout, method)
        if knockout in ("class", "cross", "true", "means", "within"):
            assert same(published.knockout(knockout, method=method), left, scale), (knockout, method)
    left = descending(g - ref.parts["class"] - ref.parts["true"])
    assert found.num_outliers("class") == int((left > found.threshold()).sum())


@pytest.mark.parametrize("name", NAMES)
def test_layers_errors_and_features_mean_the_same_by_a_name(name: str) -> None:
    case, ref = case_and_reference(name)
    modules, on = dict(case.model.named_modules()), ref.projections
    member = functional.one_hot(ref.labels, ref.num_classes).double()
    centre = onto(torch.ones(len(member), 1).double())
    about = {"mean": centre, "class": onto(member) - centre}
    for layer in ds.layers(case.problem(), hessian=False).values():
        names = [n for n in ref.parameters if n.rpartition(".")[0] == layer.name]
        kinds = {"gradients": Reference(case, names).rows}
        if layer.errors is not None and name != "every_option":  # of which hooks see ignored rows too
            h, e = inputs_and_errors(ref, modules[layer.name])
            kinds["errors"] = (ref.weights.sqrt()[..., None] * e).flatten(0, 1)
            h = h / len(h) ** 0.5
            for removed, method in itertools.product((("mean",), ("class",), ("mean", "class")), METHODS):
                left = without(h.T @ h, h, sum(about[part] for part in removed), method)
                assert same(layer.features.knockout(*removed, method=method), left, top(h.T @ h)), removed
        for of, rows in kinds.items():
            moment, spectrum = rows.T @ rows, getattr(layer, of)
            for knockout, method in EVERY:
                left = without(moment, rows, gone(on, knockout), method)
                found = spectrum.knockout(*names_of(knockout), method=method)
                assert same(found, left, top(moment)), (layer.name, of, knockout, method)


@pytest.mark.parametrize("name", ["relu_mlp", "unbalanced"])
def test_groups_of_classes_are_knocked_out_alike(name: str) -> None:
    case, ref = case_and_reference(name)
    on, g = projections_of(ref, GROUPS), ref.gauss_newton
    held = decompose(case.problem(), effects="two-way", hold=True, groups=GROUPS)
    exact = gradient_spectrum(held)
    for knockout, method in EVERY:
        left = without(g, ref.rows, gone(on, knockout), method)
        assert same(exact.without(names_of(knockout), method), left, top(g)), (knockout, method)
    found = ds.attribute(ds.GaussNewton(held.problem), held, rtol=1e-8)
    for knockout, method in itertools.product(("class", "logit", "class + logit"), METHODS):
        left = without(g, ref.rows, gone(on, knockout), method)
        check_attributed(found.knockout(*names_of(knockout), method=method), left)


def check_attributed(found: Knockout, left: Tensor) -> None:
    """Ritz values below the exact ones, each near one of them, and the largest right to a hundredth."""
    exact = descending(left)
    assert float(found.values[0]) == pytest.approx(float(exact[0]), rel=1e-2)
    assert (found.values <= exact[: len(found.values)] + 1e-8 * exact[0]).all()
    distances = (found.values[:, None] - exact).abs().min(1).values
    assert (distances <= found.residual_norms + 1e-8 * exact[0]).all()


@pytest.mark.parametrize(
    ("name", "kind", "effects"),
    [
        ("relu_mlp", "hessian", "two-way"),
        ("relu_mlp", "gauss_newton", "four-way"),
        ("conv_pool", "gauss_newton", "two-way"),
        ("conv_batchnorm", "hessian", "two-way"),
        ("unbalanced", "gauss_newton", "two-way"),
        ("absent_class", "hessian", "four-way"),
        ("every_option", "gauss_newton", "two-way"),
    ],
)
def test_attributed_knockouts_are_those_of_dense_matrices(name: str, kind: str, effects: str) -> None:
    case, ref = case_and_reference(name)
    problem, matrix = case.problem(), getattr(ref, kind)
    operator = {"gauss_newton": ds.GaussNewton, "hessian": ds.Hessian}[kind](problem)
    found = ds.attribute(operator, ds.decompose(problem, effects=effects), rtol=1e-6)
    for knockout, method in itertools.product(("class", "logit", "class + logit"), METHODS):
        left = without(matrix, ref.rows, gone(ref.projections, knockout), method)
        one = found.knockout(*names_of(knockout), method=method)
        check_attributed(one, left)
        assert found.knockout(*GONE[knockout], method=method) is one


def test_class_alone_would_be_another_matrix() -> None:
    """What the tests above would not tell apart if it were near."""
    for name in NAMES[:3]:
        _, ref = case_and_reference(name)
        together, alone = (
            top(ref.gauss_newton - sum(ref.parts[part] for part in gone)) for gone in (("class", "true"), ("class",))
        )
        assert alone > 1.03 * together, name


def test_the_reports_rows_are_those_of_attribution_of_the_exact_spectrum_and_of_regions() -> None:
    case, ref = case_and_reference("relu_mlp")
    problem = case.problem()
    saved = ds.analyze(problem, progress=False).dataset
    exact = ds.gram_spectrum(problem, effects="two-way")
    parts = ds.decompose(problem, effects="two-way")
    whole = {"gauss_newton": ds.GaussNewton(problem), "hessian": ds.Hessian(problem)}
    attributed = {name: ds.attribute(operator, parts, rtol=1e-8) for name, operator in whole.items()}
    assert set(saved.knockout.values) == {"nothing", "class", "logit", "class + logit", "means"}
    for knockout, method in itertools.product(("class", "logit", "class + logit"), METHODS):
        for name in whole:
            row = saved.sel({"operator": name, "knockout": knockout, "method": method})
            values = row.knockout_value.dropna("pair").values
            left = without(getattr(ref, name), ref.rows, gone(ref.projections, knockout), method)
            dense = descending(left)
            assert values[0] == pytest.approx(float(dense[0]), rel=1e-2)
            other = attributed[name].knockout(*names_of(knockout), method=method)
            assert values[0] == pytest.approx(float(other.values[0]), rel=2e-2)
        np.testing.assert_allclose(
            saved.knockout_value.sel({"operator": "gauss_newton", "knockout": knockout, "method": method}),
            exact.knockout(*names_of(knockout), method=method)[: saved.sizes["pair"]],
            atol=1e-9 * float(exact.values[0]),
        )
    outliers = slice(0, ref.num_classes - 1)
    before = saved.eigenvalue.sel(operator="gauss_newton").values[outliers]
    for method in METHODS:
        shifts = ds.regions(problem, method=method, by_layer=False, num_groups=0).whole
        for knockout in ("class", "class + logit"):
            row = saved.sel({"operator": "gauss_newton", "knockout": knockout, "method": method})
            moved = np.abs(np.log10(before / row.knockout_value.values[outliers])).mean()
            assert shifts.of(knockout, "outliers") == pytest.approx(moved, abs=1e-4), (knockout, method)


def test_operators_can_be_left_without_parts_by_hand() -> None:
    """A − B of operators, and products from both sides: the published knock-out of class alone is the former."""
    case, ref = case_and_reference("conv_pool")
    problem = case.problem()
    parts, g, scale = ds.decompose(problem, effects="two-way"), ds.GaussNewton(problem), top(ref.gauss_newton)
    exact = ds.gram_spectrum(problem, effects="two-way")
    assert same(descending((g - parts["class"]).dense()), ref.gauss_newton - ref.parts["class"], scale)
    both = g - parts["class"] - parts["true"]
    assert same(exact.knockout("class"), both.dense(), scale)
    q = torch.linalg.qr(parts.factor("class")).Q
    outside = torch.eye(len(q), dtype=q.dtype) - q @ q.T
    projected = outside @ g @ outside
    assert same(exact.knockout("class", method="projection"), projected, scale)


@pytest.mark.parametrize("name", ["relu_mlp", "conv_batchnorm"])
def test_with_logit_first_true_goes_when_class_and_logit_both_go(name: str) -> None:
    case, ref = case_and_reference(name)
    on, g = projections_of(ref, first="logit"), ref.gauss_newton
    exact = ds.gram_spectrum(case.problem(), effects="two-way", first="logit")
    parts = ds.decompose(case.problem(), effects="two-way", first="logit")
    found = ds.attribute(ds.GaussNewton(case.problem()), parts, rtol=1e-8)
    for knockout, method in EVERY:
        left = without(g, ref.rows, on["class"] if knockout == "class" else gone(on, knockout), method)
        assert same(exact.knockout(*names_of(knockout), method=method), left, top(g)), (knockout, method)
        if knockout in ("class", "logit", "class + logit"):
            check_attributed(found.knockout(*names_of(knockout), method=method), left)
    other = ds.gram_spectrum(case.problem(), effects="two-way")
    for method in METHODS:  # the sum of the two does not depend on their order
        both = (
            exact.knockout("class", "logit", method=method),
            other.knockout("class", "logit", method=method),
        )
        assert error(*both) < 1e-9


def test_one_rule_says_which_ranks_are_rounding() -> None:
    assert significant(torch.tensor([2.0, 1e-5, 1e-6])).tolist() == [True, True, False]
    assert significant(torch.zeros(3)).tolist() == [False] * 3
    assert significant(torch.zeros(0)).tolist() == []
    columns = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1e-7, 0.0], [0.0, 0.0, 1e-3]], dtype=torch.float64)
    assert range_of(columns).shape == (3, 2)
    assert range_of(torch.zeros(4, 0)).shape == (4, 0)
    none = torch.zeros(4, 0).double()
    nothing = Spectrum(torch.ones(4).double(), Averages({"class": none}, none, ("class", "within")))
    for method in METHODS:
        torch.testing.assert_close(nothing.without(("class",), method), torch.ones(4).double())


@pytest.mark.parametrize("sign", [1, -1])  # of a definite matrix, and of one with eigenvalues below those zeros
def test_rows_of_zeros_are_left_out_of_an_eigenproblem(monkeypatch, sign):
    torch.manual_seed(0)
    rows = torch.randn(12, 20, dtype=torch.float64)
    live = torch.tensor([1, 4, 5, 9])
    rows[[i for i in range(12) if i not in live]] = 0
    matrix = rows @ rows.T
    matrix[1, 1] *= sign
    expected = torch.linalg.eigvalsh(matrix).flip(0)
    sides = []
    for name in ("eigh", "eigvalsh"):
        real = getattr(torch.linalg, name)
        monkeypatch.setattr(torch.linalg, name, lambda m, real=real: sides.append(len(m)) or real(m))
    values, vectors = symmetric_pairs(matrix)
    torch.testing.assert_close(values, expected)
    torch.testing.assert_close(symmetric_values(matrix), expected)
    torch.testing.assert_close(vectors * values @ vectors.T, matrix)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(12, dtype=torch.float64))
    assert sides == [4, 4]


def test_an_eigenproblem_that_fails_says_of_what():
    with pytest.raises(ds.errors.NonFiniteError, match="a matrix of 3 rows"):
        symmetric_pairs(torch.full((3, 3), torch.nan, dtype=torch.float64))

"""Class means and parts of features and errors, against hooks and formulas; neural collapse by itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import deepspectra as ds
from deepspectra.errors import CurvatureError, MemoryBudgetError, OptionError, OptionWarning
from nets import CASES, chunks
from reference import case_and_reference, error, inputs_and_errors

NAMES = ["relu_mlp", "unbalanced", "absent_class", "conv_pool", "class_weights"]


RTOL = 1e-10


def dense(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: part.dense() for name, part in parts.items()}


@pytest.mark.parametrize("name", NAMES)
def test_class_means_of_features_are_averages_of_what_enters(name: str) -> None:
    case, ref = case_and_reference(name)
    means = ds.class_means(case.problem(), of="features")
    modules = dict(case.model.named_modules())
    assert means.cross_class_means is None
    for layer in means.layers:
        h, _ = inputs_and_errors(ref, modules[layer])
        found = means.layer(layer)
        for c in range(ref.num_classes):
            inside = ref.labels == c
            expected = h[inside].mean(0) if inside.any() else torch.zeros_like(h[0])
            assert error(found.class_means[c], expected) < RTOL
            assert float(found.class_weights[c]) == pytest.approx(float(inside.double().mean()))
        assert error(found.mean, h.mean(0)) < RTOL


@pytest.mark.parametrize("name", NAMES)
def test_class_means_of_errors_are_weighted_averages_of_what_comes_back(name: str) -> None:
    case, ref = case_and_reference(name)
    means = ds.class_means(case.problem(), of="errors")
    modules = dict(case.model.named_modules())
    w_c, _, w_ck, _ = ref.means
    for layer in means.layers:
        _, e = inputs_and_errors(ref, modules[layer])
        found = means.layer(layer)
        assert found.cross_class_means is not None
        scale = float(e.norm(dim=2).max())
        for c in range(ref.num_classes):
            inside = ref.labels == c
            sums = (ref.weights[inside, :, None] * e[inside]).sum(0)
            others = [k for k in range(ref.num_classes) if k != c]
            if not inside.any():
                assert not found.class_means[c].any()
                continue
            cells = sums / w_ck[c, :, None]
            assert (found.cross_class_means[c] - cells).norm(dim=1).max() < RTOL * scale
            assert (found.class_means[c] - sums[others].sum(0) / w_c[c]).norm() < RTOL * scale
    assert error(means.class_weights, w_c) < RTOL
    assert error(means.cross_class_weights, w_ck) < RTOL


@pytest.mark.parametrize("name", NAMES)
def test_parts_of_features_sum_to_their_second_moment(name: str) -> None:
    case, ref = case_and_reference(name)
    parts = ds.decompose(case.problem(), of="features")
    modules = dict(case.model.named_modules())
    h = torch.cat([inputs_and_errors(ref, modules[layer])[0] for layer in parts.matrices], 1)
    mean = h.mean(0)
    centred = h - torch.stack([h[ref.labels == c].mean(0) for c in ref.labels.tolist()])
    found, moment = dense(parts), h.T @ h / len(h)
    assert list(found) == ["mean", "class", "within"]
    assert error(sum(found.values()), moment) < RTOL
    assert error(found["mean"], torch.outer(mean, mean)) < RTOL
    assert (found["within"] - centred.T @ centred / len(h)).norm() < RTOL * moment.norm()


@pytest.mark.parametrize("effects", ["four-way", "two-way"])
@pytest.mark.parametrize("name", NAMES)
def test_parts_of_errors_are_projections_of_their_rows(name: str, effects: str) -> None:
    case, ref = case_and_reference(name)
    parts = ds.decompose(case.problem(), of="errors", effects=effects)
    modules = dict(case.model.named_modules())
    for layer in parts.matrices:
        _, e = inputs_and_errors(ref, modules[layer])
        rows = (ref.weights.sqrt()[..., None] * e).flatten(0, 1)
        found, moment = dense(parts.layer(layer)), rows.T @ rows
        assert error(sum(found.values()), moment) < RTOL
        for part, matrix in found.items():
            assert (matrix - rows.T @ ref.projections[part] @ rows).norm() < RTOL * moment.norm()


def test_layers_together_are_layers_one_after_the_other() -> None:
    problem = CASES["relu_mlp"]().problem()
    for of in ("features", "errors"):
        parts = ds.decompose(problem, of=of)
        whole = parts["class"].dense()
        start = 0
        for layer in parts.matrices:
            block = parts.layer(layer)["class"].dense()
            stop = start + len(block)
            assert error(whole[start:stop, start:stop], block) < RTOL
            start = stop
        assert start == len(whole)


def test_class_means_of_a_layers_gradients_are_those_of_the_restricted_problem() -> None:
    problem = CASES["conv_batchnorm"]().problem()
    means = ds.class_means(problem)
    assert tuple(means.layers) == problem.layers
    for layer in means.layers:
        own = ds.class_means(problem.restrict(f"{layer}.*"))
        found = means.layer(layer)
        assert error(found.class_means, own.class_means) < RTOL
        assert error(found.cross_class_means, own.cross_class_means) < RTOL


def test_tokens_have_the_features_of_their_positions() -> None:
    case, ref = case_and_reference("token_classes")
    means = ds.class_means(case.problem(), of="features").layer("head")
    embedded = case.model.embedding.weight.detach()[torch.cat([x for x, _ in case.batches])].tanh()
    targets = torch.cat([y for _, y in case.batches])
    expected = torch.stack([embedded[targets == c].mean(0) for c in range(3)])
    assert error(means.class_means, expected) < RTOL
    assert error(means.mean, embedded[targets != 9].mean(0)) < RTOL
    assert ref.num_classes == 3


def test_fused_attention_projections_and_reused_modules_have_means() -> None:
    for name in ("attention_module", "reused_module", "tied_parameter"):
        problem = CASES[name]().problem()
        features, errors = ds.class_means(problem, of="features"), ds.class_means(problem, of="errors")
        assert features.layers
        assert errors.layers
        assert bool(features.class_means.isfinite().all())
        parts = ds.decompose(problem, of="errors")
        moment = sum(parts[part].dense() for part in parts)
        rows = torch.cat(list(parts.matrices.values()), 1)
        assert error(moment, rows.T @ rows) < RTOL


def test_features_take_no_backward_pass_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["relu_mlp"]()
    problems = [ds.Problem(case.model, chunks(*case.tensors, [5] * n + [20 - 5 * n])) for n in (1, 3)]
    plain, counts = torch.autograd.grad, []
    for problem in problems:
        calls: list[int] = []
        with monkeypatch.context() as patch:
            patch.setattr(torch.autograd, "grad", lambda *a, **k: calls.append(1) or plain(*a, **k))  # noqa: B023
            ds.class_means(problem, of="features")
        counts.append(len(calls))
    assert counts[0] == counts[1]  # of the few examples on which the uses of parameters are understood


def test_batches_do_not_matter_to_means() -> None:
    case = CASES["conv_batchnorm"]()
    x, y = case.tensors
    other = ds.Problem(case.model, chunks(x, y, [1, 4, len(x) - 5]))
    for of in ("features", "errors"):
        one, two = ds.class_means(case.problem(), of=of), ds.class_means(other, of=of)
        assert error(one.class_means, two.class_means) < RTOL


def test_text_and_errors() -> None:
    problem = CASES["relu_mlp"]().problem()
    assert "class means of features, 4 classes" in str(ds.class_means(problem, of="features"))
    with pytest.raises(OptionError, match="of='colours'"):
        ds.decompose(problem, of="colours")
    with pytest.raises(KeyError, match="no layer 'nothing'"):
        ds.class_means(problem, of="errors").layer("nothing")
    with pytest.raises(KeyError, match="no part 'cross'"):
        ds.decompose(problem, of="features")["cross"]
    with pytest.raises(KeyError, match="no layer 'nothing'"):
        ds.decompose(problem, of="features").layer("nothing")
    norms = nn.Sequential(nn.BatchNorm1d(4)).double().eval()
    bare = ds.Problem(norms, (torch.randn(8, 4, dtype=torch.float64), torch.arange(8) % 4))
    with pytest.raises(CurvatureError, match="no layer"):
        ds.collapse(bare)
    problem.memory = 2000
    for of in ("features", "errors"):
        with pytest.raises(MemoryBudgetError, match="Raise memory"):
            ds.decompose(problem, of=of)
    with pytest.raises(MemoryBudgetError, match="means"):
        ds.class_means(problem, of="errors")


@pytest.mark.parametrize(
    "call",
    [
        lambda problem: ds.decompose(problem, "features", effects="two-way"),
        lambda problem: ds.class_means(problem, "features", level="cross_class"),
        lambda problem: ds.regions(problem, "hessian", by_layer=True, num_groups=0),
    ],
)
def test_options_that_change_nothing_are_warned_of(call: Callable[[ds.Problem], object]) -> None:
    with pytest.warns(OptionWarning, match="change"):
        call(CASES["relu_mlp"]().problem())

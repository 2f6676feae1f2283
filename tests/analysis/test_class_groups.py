"""Averages over groups of classes, against brute force, and the groups that a network's logits suggest."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import deepspectra as ds
from deepspectra.errors import OptionError
from nets import CASES, Case, chunks, labels
from reference import Reference, case_and_reference, descending, error, projections

NAMES = ("relu_mlp", "conv_pool", "absent_class", "class_weights", "token_classes")


def groups_of(num_classes: int) -> Tensor:
    """Two classes together, the others alone: 0, 1, 0, 2, ..."""
    return torch.tensor([0, 1, 0, *range(2, num_classes - 1)])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("effects", ["four-way", "two-way"])
@pytest.mark.parametrize("hold", [False, True])
def test_parts_by_groups_are_averages_over_groups(name: str, effects: str, hold: bool) -> None:
    case, ref = case_and_reference(name)
    groups = groups_of(ref.num_classes)
    expected = projections(ref.weights, ref.labels, groups)
    parts = ds.decompose(case.problem(), effects=effects, hold=hold, groups=groups)
    total = torch.zeros_like(ref.gauss_newton)
    for part, operator in parts.items():
        dense = operator.dense()
        wanted = ref.rows.T @ expected[part] @ ref.rows
        assert float((dense - wanted).norm()) < 1e-9 * float(ref.gauss_newton.norm())
        total += dense
    assert error(total, ref.gauss_newton) < 1e-9


@pytest.mark.parametrize("name", NAMES)
def test_means_by_groups(name: str) -> None:
    case, ref = case_and_reference(name)
    groups = groups_of(ref.num_classes)
    means = ds.class_means(case.problem(), groups=groups)
    alone = ds.class_means(case.problem(), level="class", groups=groups)
    size = int(groups.max()) + 1
    assert means.class_means.shape == (size, case.problem().num_parameters)
    for a in range(size):
        mine = groups[ref.labels] == a
        for b in range(size):
            weights = ref.weights[mine][:, groups == b]
            gradients = ref.gradients[mine][:, groups == b]
            assert float(means.cross_class_weights[a, b]) == pytest.approx(float(weights.sum()), abs=1e-15)
            if float(weights.sum()) > 0:
                mean = (weights[..., None] * gradients).sum((0, 1)) / weights.sum()
                assert error(means.cross_class_means[a, b], mean) < 1e-8
        weights, gradients = ref.weights[mine][:, groups != a], ref.gradients[mine][:, groups != a]
        if float(weights.sum()) > 0:
            mean = (weights[..., None] * gradients).sum((0, 1)) / weights.sum()
            assert error(means.class_means[a], mean) < 1e-8
            assert error(alone.class_means[a], mean) < 1e-8


@pytest.mark.parametrize("level", ["class", "cross_class"])
def test_principal_subspace_by_groups(level: str) -> None:
    case, ref = case_and_reference("relu_mlp")
    groups = groups_of(ref.num_classes)
    on = projections(ref.weights, ref.labels, groups)
    part = on["class"] + on["true"] if level == "class" else torch.eye(len(on["within"])) - on["within"]
    found = ds.principal_subspace(case.problem(), level=level, groups=groups)
    expected = descending(ref.rows.T @ part @ ref.rows)[: len(found.values)]
    assert error(found.values, expected) < 1e-8


def test_features_and_errors_by_groups() -> None:
    case, ref = case_and_reference("relu_mlp")
    groups = groups_of(ref.num_classes)
    x, y = case.tensors
    parts = ds.decompose(case.problem(), of="features", groups=groups).layer("0")
    means = torch.stack([x[groups[y] == a].mean(0) for a in groups.unique()])
    sizes = torch.stack([(groups[y] == a).sum() for a in groups.unique()]).double()
    centred = means - x.mean(0)
    assert error(parts["class"].dense(), (centred.T * sizes / len(x)) @ centred) < 1e-10
    assert error(ds.class_means(case.problem(), "features", groups=groups).layer("0").class_means, means) < 1e-10
    errors = ds.decompose(case.problem(), of="errors", groups=groups)
    whole = sum(errors[part].dense() for part in errors)
    single = ds.decompose(case.problem(), of="errors")
    assert error(whole, sum(single[part].dense() for part in single)) < 1e-10
    crossed = ds.class_means(case.problem(), "errors", groups=groups)
    assert crossed.cross_class_means.shape[:2] == (3, 3)
    factor = torch.linalg.matrix_rank(errors["class"].dense())
    assert int(factor) <= 3


# -- ignored labels -------------------------------------------------------------------------------------------


def image_classifier() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 4, 1)).double()


def ignoring(kind: str, ignored: int) -> Case:
    """Four classes, of which some rows are ignored: single labels, or the pixels of images."""
    torch.manual_seed(2)
    loss = nn.CrossEntropyLoss(ignore_index=ignored)
    if kind == "labels":
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4)).double()
        x, y = torch.randn(11, 3).double(), torch.tensor([0, 1, 9, 3, 2, 0, 1, 9, 3, 1, 2])
        return Case(model, chunks(x, y.where(y < 9, ignored), [6, 5]), loss=loss)
    x, y = torch.randn(3, 1, 2, 3).double(), torch.randint(0, 5, (3, 2, 3))
    flat = chunks(x, y.where(y < 4, ignored), [2, 1])
    forward = lambda model, batch: (model(batch[0]).movedim(1, -1).flatten(0, -2), batch[1].flatten())  # noqa: E731
    return Case(image_classifier(), flat, loss=loss, forward=forward)


@pytest.mark.parametrize("kind", ["labels", "pixels"])
@pytest.mark.parametrize("ignored", [255, -100, 4, 1])
def test_ignored_rows_are_in_no_group(kind: str, ignored: int) -> None:
    case = ignoring(kind, ignored)
    ref, groups = Reference(case), torch.tensor([0, 1, 0, 1])
    if kind == "pixels":  # read as images, not by forward=
        case = Case(case.model, case.batches, loss=case.loss)
    on = projections(ref.weights, ref.labels, groups)
    parts = {name: ref.rows.T @ on[name] @ ref.rows for name in ("class", "cross", "within", "true")}
    scale = float(ref.gauss_newton.norm())
    for hold in (False, True):
        found = ds.decompose(case.problem(), hold=hold, groups=groups)
        assert max(float((found[name].dense() - parts[name]).norm()) for name in parts) < 1e-9 * scale
    both = ds.class_means(case.problem(), groups=groups)
    alone = ds.class_means(case.problem(), level="class", groups=groups)
    for a in (0, 1):
        mine = groups[ref.labels] == a
        weights, gradients = ref.weights[mine][:, groups != a], ref.gradients[mine][:, groups != a]
        mean = (weights[..., None] * gradients).sum((0, 1)) / weights.sum()
        assert error(both.class_means[a], mean) < 1e-8
        assert error(alone.class_means[a], mean) < 1e-8
    for level, wanted in (
        ("class", parts["class"] + parts["true"]),
        ("cross_class", ref.gauss_newton - parts["within"]),
    ):
        space = ds.principal_subspace(case.problem(), level=level, groups=groups)
        assert error(space.values, descending(wanted)[: len(space.values)]) < 1e-8
    shares = ds.attribute(ds.GaussNewton(case.problem()), ds.decompose(case.problem(), groups=groups)).pair_shares
    assert error(shares.sum(1), torch.ones(len(shares)).double()) < 1e-8


def test_groups_of_classes_do_not_depend_on_ignored_rows() -> None:
    model = nn.Linear(2, 4, bias=False).double()  # on the first input classes go 0 with 1, on the second 0 with 2
    model.weight.data = torch.tensor([[1, 1], [1, -1], [-1, 1], [-1, -1]]).double()
    x = torch.randn(12, 2).double() * torch.tensor([1.0, 0.01])
    y = torch.arange(12) % 4
    x[4:8], y[4:8] = torch.tensor([0.0, 50.0]).double(), 255
    found = ds.class_groups(ds.Problem(model, (x, y), nn.CrossEntropyLoss(ignore_index=255)), 2)
    assert found[0] == found[1] != found[2] == found[3]


def test_every_class_its_own_group_changes_nothing() -> None:
    case, ref = case_and_reference("conv_pool")
    single = torch.arange(ref.num_classes)
    for of in ("gradients", "features", "errors"):
        one = ds.class_means(case.problem(), of)
        other = ds.class_means(case.problem(), of, groups=single)
        assert torch.equal(one.class_means, other.class_means)


def test_attribution_by_groups() -> None:
    case, ref = case_and_reference("relu_mlp")
    parts = ds.decompose(case.problem(), effects="two-way", groups=groups_of(ref.num_classes))
    found = ds.attribute(ds.GaussNewton(case.problem()), parts)
    assert error(found.pair_shares.sum(1), torch.ones(len(found.values)).double()) < 1e-8


def test_a_thousand_classes_in_twenty_groups() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 30), nn.ReLU(), nn.Linear(30, 1000))
    x, y = torch.randn(64, 12), torch.randint(0, 1000, (64,))
    problem = ds.Problem(model, (x, y), memory="200MiB")
    groups = torch.arange(1000) % 20
    means = ds.class_means(problem, groups=groups)
    assert means.cross_class_means.shape == (20, 20, problem.num_parameters)
    logits = model(x)
    p = logits.softmax(1).detach()
    mine = groups[y] == 3
    outside = groups != 3
    weights = (p[mine][:, outside] / 64).double()
    pulled = p[mine].double() * weights.sum(1, keepdim=True)  # Σ_k w (p − y_k)
    pulled[:, outside] -= weights
    gradients = torch.autograd.grad(logits[mine], list(model.parameters()), pulled.float())
    expected = torch.cat([g.flatten() for g in gradients]) / float(weights.sum())
    assert error(means.class_means[3].double(), expected.double()) < 1e-4
    averaged = ds.principal_subspace(problem, level="cross_class", groups=groups)
    top = ds.eigenpairs(ds.GaussNewton(problem), 5, rtol=1e-2)
    assert bool((averaged.values[:5] <= top.values * (1 + 1e-2)).all())


def test_groups_that_are_none_are_refused() -> None:
    problem = CASES["relu_mlp"]().problem()
    for groups, message in (
        ([0, 1], "4 integers"),
        ([0.5] * 4, "4 integers"),
        ("abc", "4 integers"),
        ([0, 1, 3, 3], "gaps"),
        ([-1, 0, 1, 2], "from 0"),
    ):
        with pytest.raises(OptionError, match=message):
            ds.decompose(problem, groups=groups)
        with pytest.raises(OptionError, match=message):
            ds.class_means(problem, groups=groups)
    with pytest.raises(OptionError, match="sample"):
        ds.principal_subspace(problem, level="sampled", groups=[0, 1, 2, 3])


def test_classes_whose_logits_move_together_are_one_group() -> None:
    torch.manual_seed(0)
    weight = torch.randn(3, 8).repeat_interleave(torch.tensor([4, 2, 3]), 0) + 0.01 * torch.randn(9, 8)
    model = nn.Sequential(nn.Linear(8, 9, bias=False))
    model[0].weight.data = weight
    problem = ds.Problem(model, (torch.randn(90, 8), labels(90, 3)))  # six classes have no example
    found = ds.class_groups(problem, 3)
    assert len(found.unique()) == 3
    for block in (slice(0, 4), slice(4, 6), slice(6, 9)):
        assert len(found[block].unique()) == 1
    assert torch.equal(found, ds.class_groups(problem, 3))
    assert ds.class_groups(problem, 9, num_rows=20).sort().values.tolist() == list(range(9))
    with pytest.raises(OptionError, match="at most 9"):
        ds.class_groups(problem, 10)
    ds.decompose(problem, groups=found)


def test_logits_are_compared_on_rows_spread_over_all_the_data() -> None:
    weight = torch.tensor([[1, 0, 1], [1, 0, -1], [-1, 0, 1], [-1, 0, -1]])  # by the last input classes go 0 with 2
    model = nn.Sequential(nn.Linear(3, 4, bias=False))
    model[0].weight.data = weight.float()
    x = torch.zeros(100, 3)
    x[:60, 0], x[60:, 2] = 1, 2  # behind the first rows, as where data are sorted
    found = ds.class_groups(ds.Problem(model, (x, torch.arange(100) // 25)), 2, num_rows=60)
    assert found[0] == found[2] != found[1] == found[3]


def test_an_analysis_by_groups(tmp_path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))
    y = labels(40, 5)
    problem = ds.Problem(model, (torch.randn(40, 6), y))
    found = ds.analyze(problem, groups=[0, 0, 1, 2, 2], num_probes=2, num_steps=8, progress=False)
    found = found.labelled(class_names=["a", "b", "c"])
    assert found.dataset["class"].values.tolist() == ["a", "b", "c"]
    counts = torch.bincount(torch.tensor([0, 0, 1, 2, 2])[y]).tolist()
    assert found.dataset["class_count"].values.tolist() == counts
    parts = ds.decompose(problem, effects="two-way", groups=[0, 0, 1, 2, 2])
    trace = found.dataset["part_trace"].sel(part="class").item()
    assert trace == pytest.approx(float(parts["class"].dense().trace()), rel=1e-4)
    page = found.to_html(tmp_path / "report.html").read_text()
    assert "3 groups of 5 classes" in page
    with pytest.raises(OptionError, match="2 class names for 3"):
        found.labelled(class_names=["a", "b"])

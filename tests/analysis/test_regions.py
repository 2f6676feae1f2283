"""How far knock-outs move regions of spectra, against dense eigenvalues and data sets without a group."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import deepspectra as ds
from deepspectra.analysis.regions import Shifts
from deepspectra.errors import LossError, MemoryBudgetError, OptionError
from deepspectra.jobs.regions_dataset import regions_dataset
from nets import CASES, labels
from reference import GONE, case_and_reference, error

REMOVED = {name: GONE[name] for name in ("class", "class + logit", "interaction", "cross", "within")}


REMOVED_OF_HESSIAN = REMOVED | {"residual": ("residual",)}


def descending(matrix: Tensor) -> Tensor:
    return torch.linalg.eigvalsh((matrix + matrix.T) / 2).flip(0).clamp_min(0)


def by_hand(before: Tensor, after: Tensor) -> float:
    logs = [value.clamp_min(1e-300).log10() for value in (before, after)]
    return float((logs[0] - logs[1]).abs().clamp_max(3).mean())


@pytest.mark.parametrize("name", ["relu_mlp", "conv_pool", "class_weights"])
def test_shifts_of_g_are_those_of_dense_eigenvalues(name: str) -> None:
    case, ref = case_and_reference(name)
    found = ds.regions(case.problem(), num_groups=0)
    values, num = descending(ref.gauss_newton), ref.num_classes
    rank = int((values > 1e-10 * values[0]).sum())
    for knockout, removed in REMOVED.items():
        left = descending(ref.gauss_newton - sum(ref.parts[part] for part in removed))
        for region, cut in (("outliers", slice(0, num - 1)), ("bump", slice(num - 1, min(num**2, rank)))):
            if left[cut].min() < 1e-12 * values[0]:
                continue  # ranks that are gone are rounding, in the dense matrix
            expected = by_hand(values[cut], left[cut])
            assert found.whole.of(knockout, region) == pytest.approx(expected, abs=1e-6)
    assert bool(found.whole.standard_errors.isnan().all())
    assert list(found) == list(ds.layers(case.problem()))


@pytest.mark.parametrize("of", ["gradients", "features"])
def test_the_whole_alone_is_that_of_all_layers(of: str) -> None:
    case, _ = case_and_reference("conv_pool")
    alone = ds.regions(case.problem(), of, by_layer=False, num_groups=2)
    whole = ds.regions(case.problem(), of, num_groups=2).whole
    torch.testing.assert_close(alone.whole.values, whole.values, equal_nan=True)
    assert len(alone) == 0


def test_features_and_errors_are_judged_as_their_second_moments() -> None:
    case, _ = case_and_reference("relu_mlp")
    parts = ds.decompose(case.problem(), effects="two-way", of="errors")
    found = ds.regions(case.problem(), "errors", num_groups=0)
    name = next(iter(found))
    own = parts.layer(name)
    matrices = {part: own[part].dense() for part in own}
    total = sum(matrices.values())
    left = descending(total - matrices["class"] - matrices["true"] - matrices["logit"])
    assert found[name].of("class + logit", "outliers") == pytest.approx(
        by_hand(descending(total)[:3], left[:3]), abs=1e-8
    )
    features = ds.regions(case.problem(), "features", num_groups=0)
    split = ds.decompose(case.problem(), of="features").layer(name)
    left = descending(split["within"].dense() + split["mean"].dense())
    total = sum(split[part].dense() for part in split)
    num = case.problem().num_classes
    assert features[name].of("class", "outliers") == pytest.approx(
        by_hand(descending(total)[:num], left[:num]), abs=1e-8
    )
    assert math.isnan(features[name].of("class", "bump"))


@pytest.mark.parametrize("of", ["gradients", "hessian"])
def test_parts_can_be_projected_out_too(of: str) -> None:
    case, ref = case_and_reference("relu_mlp")
    found = ds.regions(case.problem(), of, method="projection", num_groups=0)
    assert found.whole.knockouts == ("class", "class + logit", "interaction", "cross")
    matrix = projected(ref, ref.hessian if of == "hessian" else ref.gauss_newton)
    whole = torch.linalg.eigvalsh(matrix).flip(0)
    num = ref.num_classes
    for knockout in ("class", "class + logit"):
        part = projected(ref, sum(ref.parts[name] for name in REMOVED[knockout]))
        values, vectors = torch.linalg.eigh(part)
        q = vectors[:, values > 1e-10 * values[-1]]
        away = torch.eye(len(q), dtype=q.dtype) - q @ q.T
        left = torch.linalg.eigvalsh(away @ matrix @ away).flip(0)[: num - 1]
        expected = by_hand(whole[: num - 1], left.clamp_min(0))
        assert found.whole.of(knockout, "outliers") == pytest.approx(expected, abs=1e-6)
    assert "by projection" in str(found)
    page = regions_dataset([found], case.problem())
    assert page.attrs["method"] == "projection"
    assert "bulk ← within" not in page.attrs["verdict"]


def test_errors_are_those_of_leaving_groups_of_examples_out() -> None:
    case, _ = case_and_reference("relu_mlp")
    x, y = case.tensors
    by_class = y.argsort(stable=True)  # the order of the rows, which are batched by class
    x, y = x[by_class], y[by_class]
    found = ds.regions(ds.Problem(case.model, (x, y)), num_groups=3, seed=5)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(5))
    tables = []
    for group in torch.tensor_split(order, 3):
        kept = torch.ones(len(y), dtype=torch.bool)
        kept[group] = False
        rest = ds.Problem(case.model, (x[kept], y[kept]))
        tables.append(ds.regions(rest, num_groups=0).whole.values)
    left_out = torch.stack(tables)
    expected = (2 / 3 * (left_out - left_out.mean(0)).square().sum(0)).sqrt()
    finite = ~expected.isnan()
    assert error(found.whole.standard_errors[finite], expected[finite]) < 1e-6


def test_what_moves_most_must_lead_by_two_standard_errors() -> None:
    values = torch.tensor([[0.5, 0.1, 0.0], [0.5, 0.4, 0.1], [0.3, math.nan, 0.1], [0.3, math.nan, math.nan]])
    shifts = Shifts(
        ("a", "b", "c", "d"), ("outliers", "bump", "bulk"), values.double(), torch.full((4, 3), 0.1).double()
    )
    assert shifts.moved("a") == "outliers"
    assert shifts.moved("b") is None
    assert shifts.moved("c") is None
    assert shifts.moved("d") == "outliers"
    assert "±" in str(shifts)


def test_nothing_leads_a_region_that_is_empty_without_some_group_of_examples() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    data = torch.randn(6, 6).double(), torch.tensor([0, 0, 0, 1, 1, 2])  # 12 rows, of which one is bulk
    found, alone = (ds.regions(ds.Problem(model, data), by_layer=False, num_groups=n).whole for n in (6, 0))
    assert not found.values.isnan().any()
    assert found.standard_errors[:, 2].isnan().all()
    assert not found.standard_errors[:, :2].isnan().any()
    assert {found.moved(name) for name in found.knockouts} == {None}
    assert found.makes("within", "bulk") is None
    assert alone.moved("within") == "bulk"


def test_in_collapsed_features_class_means_make_the_outliers_and_scatter_the_bulk() -> None:
    torch.manual_seed(0)
    means, y = 3 * torch.randn(4, 30).double(), labels(120, 4)
    x = means[y] + 0.1 * torch.randn(120, 30).double()
    model = nn.Sequential(nn.Linear(30, 4)).double()
    found = ds.regions(ds.Problem(model, (x, y)), "features", num_groups=4).whole
    assert found.moved("mean + class") == "outliers"
    assert found.moved("within") == "bulk"
    assert found.of("within", "outliers") < 0.01
    assert found.of("mean + class", "outliers") > 1


def test_bad_options_are_refused() -> None:
    problem = CASES["relu_mlp"]().problem()
    with pytest.raises(OptionError, match="'removal'"):
        ds.regions(case_and_reference("relu_mlp")[0].problem(), method="removal")
    with pytest.raises(OptionError, match="'weights'"):
        ds.regions(problem, "weights")
    with pytest.raises(OptionError, match="at least 2"):
        ds.regions(problem, num_groups=1)
    with pytest.raises(OptionError, match="num_groups"):
        ds.regions(problem, num_groups=10_000)
    with pytest.raises(LossError, match="class structure"):
        ds.regions(CASES["mse_module"]().problem())
    model = nn.Sequential(nn.Linear(20, 3))
    with pytest.raises(MemoryBudgetError, match="4,000 rows"):
        ds.regions(ds.Problem(model, (torch.randn(2000, 20), labels(2000, 3)), memory="100MiB"))
    assert "decades" in str(ds.regions(problem, num_groups=0))


def projected(ref, matrix: Tensor) -> Tensor:
    """A matrix in the range of G."""
    values, vectors = torch.linalg.eigh(ref.gauss_newton)
    q = vectors[:, values > 1e-10 * values[-1]]
    return q.T @ matrix @ q


@pytest.mark.parametrize("name", ["relu_mlp", "conv_pool", "class_weights"])
def test_shifts_of_h_are_those_of_dense_eigenvalues_in_the_space_of_gradients(name: str) -> None:
    case, ref = case_and_reference(name)
    found = ds.regions(case.problem(), "hessian", num_groups=0)
    whole = torch.linalg.eigvalsh(projected(ref, ref.hessian)).flip(0)
    parts = dict(ref.parts) | {"residual": ref.hessian - ref.gauss_newton}
    num = ref.num_classes
    positive = int((whole > 1e-10 * whole[0]).sum())
    assert found.whole.knockouts[-1] == "residual"
    for knockout, removed in REMOVED_OF_HESSIAN.items():
        left = torch.linalg.eigvalsh(projected(ref, ref.hessian - sum(parts[p] for p in removed))).flip(0)
        for region, cut in (("outliers", slice(0, num - 1)), ("bump", slice(num - 1, min(num**2, positive)))):
            if left[cut].abs().min() < 1e-9 * whole[0]:
                continue  # its sign is rounding
            expected = by_hand(whole[cut], left[cut].clamp_min(0))
            assert found.whole.of(knockout, region) == pytest.approx(expected, abs=1e-6), (knockout, region)
    assert len(found) == 0
    values, vectors = torch.linalg.eigh(ref.gauss_newton)
    q = vectors[:, values > 1e-10 * values[-1]]
    theta, y = torch.linalg.eigh(q.T @ ref.hessian @ q)
    top = q @ y[:, -(num - 1) :]
    missed = (ref.hessian @ top - top * theta[-(num - 1) :]).norm(dim=0) / theta[-(num - 1) :]
    assert found.missed == pytest.approx(float(missed.max()), abs=1e-7)
    assert f"within {found.missed:.1%} of eigenvalues of H" in str(found) or not found.missed


@pytest.mark.parametrize("loss", ["plain", "weighted", "ignored"])
def test_errors_of_h_are_those_of_leaving_groups_out_of_it(loss: str) -> None:
    case, _ = case_and_reference("relu_mlp")
    num = case.problem().num_classes
    x, y = case.tensors
    by_class = y.argsort(stable=True)
    x, y = x[by_class], y[by_class]
    options: dict[str, object] = {}
    if loss == "weighted":
        weight = torch.linspace(0.5, 2, num, dtype=torch.float64)
        options["loss"] = nn.CrossEntropyLoss(weight=weight, label_smoothing=0.1)
    if loss == "ignored":
        y = y.clone()
        y[[1, 4]] = -100
    problem = ds.Problem(case.model, (x, y), **options)
    found = ds.regions(problem, "hessian", num_groups=3, seed=5)
    alone = ds.regions(problem, "hessian", num_groups=0)
    torch.testing.assert_close(found.whole.values, alone.whole.values, rtol=1e-6, atol=1e-8)
    held = torch.cat([batch[1] for batch in problem.batches])  # labels in the order of the rows
    x, y = torch.cat([batch[0] for batch in problem.batches]), held
    full = ds.GaussNewton(problem).dense()
    values, vectors = torch.linalg.eigh(full)
    q = vectors[:, values > 1e-10 * values[-1]]
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(5))
    tables = []
    for group in torch.tensor_split(order, 3):
        kept = torch.ones(len(y), dtype=torch.bool)
        kept[group] = False
        some = ds.Problem(case.model, (x[kept], y[kept]), **options)
        hessian, gauss_newton = ds.Hessian(some).dense(), ds.GaussNewton(some).dense()
        parts = ds.decompose(some, effects="two-way")
        means = parts["class"].dense() + parts["true"].dense()
        before = torch.linalg.eigvalsh(q.T @ hessian @ q).flip(0)
        rank = int((before > 1e-12 * before[0]).sum())
        row = []
        for removed in (hessian - gauss_newton, means):
            after = torch.linalg.eigvalsh(q.T @ (hessian - removed) @ q).flip(0).clamp_min(0)
            row.append(by_hand(before[: min(num - 1, rank)], after[: min(num - 1, rank)]))
        tables.append(row)
    left_out = torch.tensor(tables, dtype=torch.float64)
    expected = (2 / 3 * (left_out - left_out.mean(0)).square().sum(0)).sqrt()
    for name, value in zip(("residual", "class"), expected.tolist(), strict=True):
        row = found.whole.knockouts.index(name)
        assert float(found.whole.standard_errors[row, 0]) == pytest.approx(value, rel=1e-5)
        assert value > 0


def test_a_group_of_examples_that_do_not_count_changes_nothing() -> None:
    case, _ = case_and_reference("relu_mlp")
    x, y = case.tensors
    y = y.clone()
    y[0] = -100
    problem = ds.Problem(case.model, (x, y))
    found = ds.regions(problem, "hessian", num_groups=len(y) - 1)  # some group is that example alone
    assert bool(found.whole.standard_errors[:, 0].isfinite().all())


def test_h_of_a_problem_in_float32_is_that_in_float64() -> None:
    case, _ = case_and_reference("relu_mlp")
    wide = case.problem()
    found = ds.regions(wide.to(torch.float32), "hessian", num_groups=0).whole.values
    torch.testing.assert_close(found, ds.regions(wide, "hessian", num_groups=0).whole.values, rtol=1e-3, atol=1e-3)


def test_examples_that_cannot_be_left_out_are_said() -> None:
    case, _ = case_and_reference("relu_mlp")
    x, y = case.tensors
    problem = ds.Problem(case.model, (x, y)).variant(cuts=False)
    with pytest.raises(OptionError, match="With num_groups=0 none is left out"):
        ds.regions(problem, "hessian")
    assert len(ds.regions(problem, "hessian", num_groups=0).whole.knockouts) == 6


def test_ranks_beyond_that_of_the_spectrum_do_not_count() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 6)).double()
    model(torch.randn(40, 8).double())
    problem = ds.Problem(model.eval(), (torch.randn(30, 8).double(), labels(30, 6)))
    narrow = ds.regions(problem, num_groups=0)["1"]  # 8 parameters: 5 outliers, 3 of the bump, no bulk
    matrix = problem.restrict("1.*")
    values = descending(ds.GaussNewton(matrix).dense())
    parts = ds.decompose(matrix, effects="two-way")
    for knockout, removed in REMOVED.items():
        left = descending(ds.GaussNewton(matrix).dense() - sum(parts[name].dense() for name in removed))
        for region, cut in (("outliers", slice(0, 5)), ("bump", slice(5, 8))):
            if left[cut].min() > 1e-12 * values[0]:
                assert narrow.of(knockout, region) == pytest.approx(by_hand(values[cut], left[cut]), abs=1e-6)
        assert math.isnan(narrow.of(knockout, "bulk"))


def test_a_part_makes_a_region_that_it_moves_most_and_far_enough() -> None:
    values = torch.tensor([[0.5, 0.2, 0.1], [0.05, 0.02, 0.01], [0.5, 0.45, 0.1]], dtype=torch.float64)
    errors = torch.full_like(values, 0.03)
    shifts = Shifts(("a", "b", "c"), ("outliers", "bump", "bulk"), values, errors)
    assert [shifts.makes("a", region) for region in shifts.regions] == [True, False, False]
    assert shifts.makes("b", "outliers") is False  # moved most, and by an eighth only
    assert [shifts.makes("c", region) for region in shifts.regions] == [None, None, False]

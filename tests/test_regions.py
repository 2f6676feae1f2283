"""How far knock-outs move regions of spectra, against dense eigenvalues and data sets without a group."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import deepspectra as ds
from deepspectra.analysis.regions import REMOVED, Shifts
from deepspectra.errors import LossError, MemoryBudgetError, OptionError
from nets import CASES, labels
from reference import case_and_reference, error


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
    assert list(found) == [layer.name for layer in ds.layers(case.problem())]


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

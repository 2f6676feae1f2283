"""Kronecker factors of drawn errors: right on average, and as far off as they say."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import deepspectra as ds
from deepspectra.errors import FallbackWarning, OptionError
from deepspectra.kfac.kronecker import all_from
from deepspectra.kfac.operators import Kronecker
from deepspectra.rows import random_combinations
from deepspectra.rows.random_combinations import DrawnCaptures
from nets import Case, chunks, labels
from reference import Reference, error

QUARTIC = lambda z, y: ((z - y).square() + 0.1 * (z - y) ** 4).mean()  # noqa: E731


def small(kind: str) -> Case:
    """Few examples, in two batches: class labels, images of numbers, images of labels, or a loss without a name."""
    torch.manual_seed(3)
    if kind in ("labels", "quartic", "binary"):
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4)).double()
        x = torch.randn(9, 3).double()
        if kind == "labels":
            return Case(model, chunks(x, labels(9, 4), [5, 4]))
        y = torch.rand(9, 4).double()
        return Case(model, chunks(x, y, [5, 4]), loss=QUARTIC if kind == "quartic" else nn.BCEWithLogitsLoss())
    model = nn.Sequential(nn.Conv2d(1, 3, 2, padding=1), nn.Tanh(), nn.Conv2d(3, 2, 2)).double()
    x = torch.randn(6, 1, 3, 2).double()
    if kind == "images":
        return Case(model, chunks(x, torch.randn(6, 2, 3, 2).double(), [4, 2]), loss="mse")
    y = torch.randint(0, 2, (6, 3, 2))
    y[0, 0], y[5, 2, 1] = 255, 255
    return Case(model, chunks(x, y, [4, 2]), loss=nn.CrossEntropyLoss(ignore_index=255))


def drawn(case: Case, samples: int, runs: int, kind: str = "kfac", sharing: str = "expand") -> list[Kronecker]:
    captures = DrawnCaptures(case.problem(), samples, seed=0)
    return [all_from(captures, (kind,), sharing)[kind] for _ in range(runs)]


def check(found: list[Tensor], exact: list[Tensor], errors: list[float], covered: float = 0.9) -> None:
    """Matrices of many runs against what they estimate, with their relative standard errors."""
    missed = torch.stack([one - truth for one, truth in zip(found, exact, strict=True)])
    squares = missed.square().flatten(1).sum(1)
    stated = torch.tensor([e * float(one.norm()) for e, one in zip(errors, found, strict=True)]).double()
    assert float(missed.mean(0).square().sum()) < 12 * float(squares.mean()) / len(found)  # no bias
    assert float(stated.square().mean() / squares.mean()) == pytest.approx(1, abs=5 / len(found) ** 0.5)
    assert float((squares.sqrt() <= 2 * stated).double().mean()) >= covered
    assert float((squares.sqrt() <= 0.3 * stated).double().mean()) <= 0.35


def check_blocks(case: Case, samples: int, num: int, kind: str = "kfac", sharing: str = "expand") -> None:
    """Every block of so many runs."""
    exact = ds.kronecker(case.problem(), kind, sharing=sharing, samples=0)
    runs = drawn(case, samples, num, kind, sharing)
    for name, block in exact.blocks.items():
        found, errors = (
            [run.blocks[name].dense() for run in runs],
            [run.standard_errors[name] for run in runs],
        )
        check(found, [block.dense()] * num, errors, 0.85 if min(samples, num / 8) > 8 else 0.75)


@pytest.mark.parametrize("kind", ["labels", "images", "pixels"])
def test_factors_of_draws_are_unbiased_with_the_error_they_state(kind: str) -> None:
    check_blocks(small(kind), 11, 60)


@pytest.mark.slow
@pytest.mark.parametrize("samples", [3, 16])
@pytest.mark.parametrize("kind", ["labels", "images", "pixels", "quartic", "binary"])
def test_factors_of_draws_cover_the_truth_in_200_runs(kind: str, samples: int) -> None:
    check_blocks(small(kind), samples, 200)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "sharing"), [("cfac", "expand"), ("kfac", "reduce")])
def test_sums_of_products_and_reduced_factors_state_their_error(kind: str, sharing: str) -> None:
    check_blocks(small("labels" if kind == "cfac" else "images"), 9, 200, kind, sharing)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["labels", "binary"])
def test_the_diagonal_of_ekfac_is_unbiased_in_the_eigenvectors_that_it_has(kind: str) -> None:
    case = small(kind)
    runs = drawn(case, 9, 200, "ekfac")
    G = Reference(case).gauss_newton
    for name in runs[0].blocks:
        index = runs[0].index[name]
        found, exact = [], []
        for run in runs:
            block = run.blocks[name]
            basis = torch.kron(block.left[0], block.right[0])
            found.append(block.diagonal.flatten())
            exact.append((basis * (G[index[:, None], index] @ basis)).sum(0))
        check(found, exact, [run.standard_errors[name] for run in runs])


def test_vectors_alone_have_blocks_of_draws_with_an_error() -> None:
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 3)).double()
    case = Case(model, chunks(torch.randn(8, 3).double(), labels(8, 3), [8]))
    assert {"1.weight", "1.bias"} < set(ds.kronecker(case.problem()).blocks)
    check_blocks(case, 9, 60)


def test_nothing_is_drawn_unless_it_is_asked_for_or_there_is_too_much(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for kind, num in (("labels", 3), ("images", 12), ("pixels", 6), ("quartic", 4)):
        problem = small(kind).problem()
        assert random_combinations.num_scalars(problem) == num
        exact = ds.kronecker(problem)
        assert exact.samples == 0
        assert set(exact.standard_errors.values()) == {0.0}
        monkeypatch.setattr(random_combinations, "MOST_PASSES", num - 1)
        monkeypatch.setattr(random_combinations, "SAMPLES", 2)
        with pytest.warns(FallbackWarning, match=f"{num} scalars.*samples=0"):
            found = ds.kronecker(problem)
        assert found.samples == 2
        assert all(e > 0 for e in found.standard_errors.values())
        assert "2 draws" in repr(found)
        assert error(ds.kronecker(problem, samples=0).dense(), exact.dense()) == 0
        assert ds.kronecker(problem, "optimal").samples == 0
        assert ds.kronecker(problem, samples=num).samples == 0
        assert ds.kronecker(problem, samples=num - 1).samples == num - 1
        monkeypatch.undo()


def test_draws_follow_the_seed_and_errors_fall_with_their_number() -> None:
    problem = small("images").problem()
    one, same, other = (ds.kronecker(problem, samples=4, seed=seed).dense() for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    drawn = (all_from(DrawnCaptures(problem, num, 0), ("kfac",))["kfac"] for num in (8, 800))
    few, many = (one.standard_errors for one in drawn)
    assert all(0 < many[name] < few[name] / 5 for name in few)
    assert all(torch.tensor(list(ds.kronecker(problem, samples=1).standard_errors.values())).isnan())


class Chosen(nn.Module):
    """Values choose the places of examples, which are therefore held before the first is given out."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.o = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        order = x[:, 0].argsort()
        return self.o(torch.tanh(self.a(x[order])))[order.argsort()]


@pytest.mark.parametrize("chosen", [False, True])
def test_every_pass_draws_anew(chosen: bool) -> None:
    torch.manual_seed(5)
    model = Chosen() if chosen else nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    captures = DrawnCaptures(
        Case(model.double(), chunks(torch.randn(6, 3).double(), labels(6, 3), [6])).problem(), 2, 0
    )
    assert captures.plan.by_value == chosen
    first, second = ([use.errors for batch in captures.batches() for use in batch.uses] for _ in range(2))
    assert all(error(one, other) > 0.1 for one, other in zip(first, second, strict=True))


def test_rows_that_belong_to_no_examples_share_their_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(6)
    links, a, o = (torch.rand(8, 8) < 0.4).double() + torch.eye(8).double(), nn.Linear(3, 4), nn.Linear(4, 3)
    model = nn.ModuleList([a, o]).double()
    data = {"x": torch.randn(8, 3).double(), "y": labels(8, 3), "links": links}
    problem = ds.Problem(
        model, [data], forward=lambda m, b: (b["links"] @ m[1](torch.tanh(b["links"] @ m[0](b["x"]))), b["y"])
    )
    assert random_combinations.num_scalars(problem) == 16
    exact = ds.kronecker(problem, samples=0)
    captures = DrawnCaptures(problem, 9, 0)
    runs = [all_from(captures, ("kfac",))["kfac"] for _ in range(60)]
    for name, block in exact.blocks.items():
        found, errors = (
            [run.blocks[name].dense() for run in runs],
            [run.standard_errors[name] for run in runs],
        )
        check(found, [block.dense()] * 60, errors, 0.75)
    monkeypatch.setattr(random_combinations, "MOST_PASSES", 15)
    with pytest.warns(FallbackWarning, match="16 scalars"):
        ds.kronecker(problem)


def test_an_inverse_of_draws_is_that_of_their_factors() -> None:
    K = ds.kronecker(small("pixels").problem(), "ekfac", samples=4)
    identity = torch.eye(K.shape[0]).double()
    assert error(K.inverse(0.1).dense() @ (K.dense() + 0.1 * identity), identity) < 1e-10


@pytest.mark.parametrize("samples", [-1, 1.5, True, "4"])
def test_a_number_of_draws_is_an_integer(samples: object) -> None:
    with pytest.raises(OptionError, match="samples"):
        ds.kronecker(small("labels").problem(), samples=samples)


@pytest.mark.parametrize("seed", [-(2**63) - 1, 1.5, True, "0", 2**63])
def test_a_seed_is_an_integer(seed: object) -> None:
    with pytest.raises(OptionError, match="seed"):
        ds.kronecker(small("labels").problem(), samples=1, seed=seed)


def test_the_nearest_sum_is_not_fitted_to_draws() -> None:
    with pytest.raises(OptionError, match="Use 0"):
        ds.kronecker(small("labels").problem(), "optimal", samples=4)

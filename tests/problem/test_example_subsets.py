"""Problems on some of the examples, or on draws with weights, are problems of the same loss."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deepspectra as ds
from deepspectra.errors import OptionError
from deepspectra.problem.example_subsets import (
    can_draw,
    class_batches,
    drawn_problem,
    limited,
    problem_of_rows,
    small_problem,
    sum_by_example,
)
from nets import digits_problem


@pytest.fixture(scope="module")
def problem():
    return digits_problem()


LOSSES = {
    "plain": nn.CrossEntropyLoss(),
    "class weights": nn.CrossEntropyLoss(weight=torch.linspace(0.5, 2, 10).double()),
    "smoothed, ignoring a class": nn.CrossEntropyLoss(label_smoothing=0.1, ignore_index=3),
}


@pytest.mark.parametrize("name", LOSSES)
def test_drawing_everything_is_the_problem_itself(problem, name):
    batches = [(x, y) for x, y in problem.batches][:2]
    net = copy.deepcopy(problem.model).requires_grad_()
    whole = ds.Problem(net, batches, loss=LOSSES[name])
    every = torch.arange(sum(len(y) for _, y in batches))
    drawn = drawn_problem(whole, every, torch.ones(len(every)))
    v = torch.randn(whole.num_parameters, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for operator in (ds.Hessian, ds.GaussNewton, ds.Residual):
        torch.testing.assert_close(operator(drawn) @ v, operator(whole) @ v, rtol=1e-9, atol=1e-13)
    assert drawn.loss() == pytest.approx(whole.loss(), rel=1e-12)


def test_a_few_rows_are_rows_that_count_in_another_type() -> None:
    x, y = torch.randn(12, 4), torch.arange(12) % 3
    y[::2] = -100  # 6 count
    whole = ds.Problem(nn.Linear(4, 3), [(x[:2], y[:2]), (x[2:], y[2:])])
    few = small_problem(whole, 3, torch.float64)
    ((inputs, labels),) = few.batches
    assert few.num_examples == 3
    assert few.dtype == torch.float64
    assert bool((labels >= 0).all())
    assert set(map(tuple, inputs.tolist())) <= set(map(tuple, x.double().tolist()))
    most = max(int((labels >= 0).sum()) for _, labels in whole.batches)
    assert small_problem(whole, 100, torch.float64).num_examples == most < 6
    assert whole.dtype == torch.float32


def test_a_drawn_problem_weights_its_examples_and_divides_by_all() -> None:
    x, y = torch.randn(9, 4, dtype=torch.float64), torch.arange(9) % 3
    model = nn.Linear(4, 3).double()
    chosen, weights = torch.tensor([1, 4, 8]), torch.tensor([2.0, 0.5, 3.0], dtype=torch.float64)
    whole = ds.Problem(model, [(x[:5], y[:5]), (x[5:], y[5:])])
    inputs, labels = (torch.cat(parts) for parts in zip(*whole.batches, strict=True))
    with torch.no_grad():
        each = nn.functional.cross_entropy(model(inputs[chosen]), labels[chosen], reduction="none")
    drawn = drawn_problem(whole, chosen, weights)
    assert drawn.loss() == pytest.approx(float(weights @ each) / 9, rel=1e-12)
    regression = ds.Problem(model, (x, torch.randn(9, 3, dtype=torch.float64)), loss="mse")
    with pytest.raises(OptionError, match="examples can be drawn from"):
        drawn_problem(regression, chosen, weights)


@pytest.mark.parametrize("groups", [None, torch.tensor([0, 1, 0])])
def test_batches_by_class_hold_one_class_and_all_examples(groups: torch.Tensor | None) -> None:
    x, y = torch.randn(10, 4, dtype=torch.float64), torch.tensor([0, 2, 1, 0, 1, 1, 2, 0, 1, 2])
    problem = ds.Problem(nn.Linear(4, 3).double(), [(x[:7], y[:7]), (x[7:], y[7:])])
    kind = y if groups is None else groups[y]
    seen = list(class_batches(problem, groups))
    for _, labels in seen:
        assert len((labels if groups is None else groups[labels]).unique()) == 1
    assert sorted(torch.cat([inputs for inputs, _ in seen])[:, 0].tolist()) == sorted(x[:, 0].tolist())
    some = torch.cat([inputs for inputs, _ in class_batches(problem, groups, {1})])
    assert sorted(some[:, 0].tolist()) == sorted(x[kind == 1, 0].tolist())


@pytest.mark.parametrize("cut", [True, False])
def test_a_limited_problem_has_about_so_many_of_the_examples(cut: bool) -> None:
    x, y = torch.randn(90, 4), torch.arange(90) % 3
    batches = [(x[start : start + 25], y[start : start + 25]) for start in range(0, 90, 25)]
    whole = ds.Problem(nn.Linear(4, 3), batches)
    if not cut:
        whole = whole.variant(cuts=False)
    few = limited(whole, 30)
    assert few.num_examples == (30 if cut else 50)
    inputs = torch.cat([inputs for inputs, _ in few.batches])
    assert len(inputs) == few.num_examples
    assert set(map(tuple, inputs.tolist())) <= set(map(tuple, x.tolist()))
    assert whole.num_examples == 90
    assert limited(whole, 1000).num_examples == 90
    for num in (1, 31, 46, 89) if cut else ():
        chosen = torch.cat([inputs for inputs, _ in limited(whole, num).batches])
        at = (torch.cat([inputs for inputs, _ in whole.batches])[:, None] == chosen).all(2).nonzero()[:, 0]
        assert len(at) == num
        assert num == 1 or int(at.diff().max()) <= -(-90 // num)
    with pytest.raises(OptionError, match="limit"):
        limited(whole, 0)


def test_limited_batches_may_be_anything_that_is_cut() -> None:
    batches = [{"x": torch.randn(20, 4), "y": torch.arange(20) % 3} for _ in range(2)]
    whole = ds.Problem(nn.Linear(4, 3), batches, forward=lambda model, batch: (model(batch["x"]), batch["y"]))
    assert limited(whole, 10).num_examples == (10 if whole.cuts else 20)
    regression = ds.Problem(nn.Linear(4, 1), (torch.randn(40, 4), torch.randn(40, 1)), loss="mse")
    assert limited(regression, 10).num_examples == 10


class Tagger(nn.Module):
    """A class a position, with a loss of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(9, 4), nn.GRU(4, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, tokens: Tensor, labels: Tensor | None = None) -> SimpleNamespace:
        z = self.head(self.mix(self.embed(tokens))[0])
        loss = None if labels is None else nn.functional.cross_entropy(z.flatten(0, 1), labels.flatten())
        return SimpleNamespace(logits=z, loss=loss)


def sentences() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 9, (12, 5), generator=generator)
    labels = tokens % 3
    labels[2, 3:] = -100
    return {"tokens": tokens, "labels": labels}


def tagger(batches: Any, **options: Any) -> ds.Problem:
    torch.manual_seed(0)
    return ds.Problem(Tagger().double().eval(), batches, **options)


def test_limited_sentences_are_some_with_counted_tokens() -> None:
    data = sentences()
    data["labels"][:, 2:] = -100
    data["labels"][::2] = -100  # six sentences with two labels each
    few = limited(tagger([data]), 4)
    assert few.num_examples == 4
    assert torch.equal(next(iter(few.batches))["tokens"], data["tokens"][[5, 11]])
    with_few = limited(tagger([data]), 1)
    assert with_few.num_examples == 2


def test_sentences_are_drawn_with_all_their_tokens() -> None:
    data = sentences()
    whole = tagger([{name: part[:7] for name, part in data.items()}, {name: part[7:] for name, part in data.items()}])
    assert can_draw(whole)
    chosen, weights = torch.tensor([1, 2, 7, 11]), torch.tensor([2.0, 0.5, 3.0, 1.0], dtype=torch.float64)
    drawn = drawn_problem(whole, chosen, weights)
    with torch.no_grad():
        z = whole.model(data["tokens"][chosen]).logits.flatten(0, 1)
        each = nn.functional.cross_entropy(z, data["labels"][chosen].flatten(), reduction="none").view(4, 5)
    assert drawn.loss() == pytest.approx(float(weights @ each.sum(1)) / 58, rel=1e-12)
    assert drawn.num_examples == 18
    assert drawn.batches.num_batches == 1
    every = drawn_problem(whole, torch.arange(12), torch.ones(12, dtype=torch.float64))
    v = torch.randn(whole.num_parameters, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for operator in (ds.Hessian, ds.GaussNewton, ds.Residual):
        torch.testing.assert_close(operator(every) @ v, operator(whole) @ v, rtol=1e-9, atol=1e-13)
    assert len(next(iter(small_problem(whole, 5, torch.float64).batches))["tokens"]) == 2


def test_single_tokens_are_not_taken_out_of_their_sentences() -> None:
    whole = tagger([sentences()])
    with pytest.raises(OptionError, match="as sentences have tokens"):
        problem_of_rows(whole, torch.tensor([0, 7]), 60)


def test_sums_by_example_are_over_its_rows() -> None:
    data = sentences()
    whole = tagger([data])
    found = sum_by_example(whole, [torch.arange(60.0)])
    torch.testing.assert_close(found, torch.arange(60.0).view(12, 5).sum(1))
    vectors = ds.Problem(nn.Linear(4, 3), (torch.randn(6, 4), torch.arange(6) % 3))
    assert sum_by_example(vectors, [torch.arange(6.0)]).tolist() == list(range(6))


def test_batches_beyond_the_memory_are_cut_by_sentences() -> None:
    data = sentences()
    whole = tagger([data])
    (first,) = whole.batches
    assert len(first["tokens"]) == 12
    cut = tagger([data], memory=2**17)
    lengths = [len(batch["tokens"]) for batch in cut.batches]
    assert len(lengths) > 3
    assert sum(lengths) == 12
    assert cut.num_examples == whole.num_examples == 58
    assert cut.loss() == pytest.approx(whole.loss(), rel=1e-12)
    torch.testing.assert_close(cut.gradient(), whole.gradient(), rtol=1e-10, atol=1e-14)
    rows = [{name: part[j] for name, part in data.items()} for j in range(12)]
    loaded = tagger(torch.utils.data.DataLoader(rows, batch_size=6), memory=2**17)
    assert [len(batch["tokens"]) for batch in loaded.batches][:1] == lengths[:1]
    torch.testing.assert_close(loaded.gradient(), whole.gradient(), rtol=1e-10, atol=1e-14)

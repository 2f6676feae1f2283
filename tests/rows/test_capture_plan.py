"""What is learned on a few examples: which uses are understood, and what may choose where an example lies."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import deepspectra as ds
from deepspectra.rows.gradients import GradientRows
from deepspectra.rows.held_rows import HeldRows
from example_orders import Experts, classes, pair, random, same_values, truth, xy
from nets import CASES, CLASSIFICATION, Case, chunks, held, labels
from reference import error, same_spectrum


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("skipping", [False, True])
def test_routed_networks_in_batches_of_any_size(batch_size: int, skipping: bool) -> None:
    net, (x, y) = Experts(skipping=skipping).double(), xy(8)
    problem = ds.Problem(net, (x, y), batch_size=batch_size)
    assert same_values(ds.gram_spectrum(problem).values, truth(net, [(x, y)], pair).dense)
    assert len(ds.layers(problem, hessian=False)) == 5
    assert ds.kronecker(problem).trace > 0


def test_plain_networks_are_not_watched_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no value can choose the place of an example, a batch takes C − 1 backward passes."""
    x, y = random(6, 1, 6, 6), classes(6)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3)
    )
    rows = HeldRows(ds.Problem(net.double().eval(), (x, y)))
    plain, passes = torch.autograd.grad, []
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: passes.append(k) or plain(*a, **k))
    assert rows.captures.hold()
    assert not rows.captures.plan.by_value
    assert len([k for k in passes if not k.get("allow_unused")]) == 2


def test_masks_choose_no_places() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.out = nn.Embedding(6, 4), nn.Linear(4, 3)
            self.inner = nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, batch_first=True)

        def forward(self, tokens: Tensor) -> Tensor:
            gone = tokens == 0
            h = self.inner(self.embed(tokens), src_key_padding_mask=gone).masked_fill(gone[..., None], 0.0)
            return self.out(h.sum(1))

    tokens = classes(5, 4, num=6)
    tokens[:, 0] = 1
    net, data = Masked().double().eval(), [(tokens, classes(5))]
    problem = ds.Problem(net, data)
    assert not HeldRows(problem).captures.plan.by_value
    assert same_values(ds.gram_spectrum(problem).values, truth(net, data, pair).dense)


# parameters that no rule covers, and so are differentiated one example at a time
ALONE = {
    "tied_parameter": ("temperature",),
    "attention_function": ("position",),
    "reparametrised": ("0.parametrizations.weight.original",),
    "recurrent": ("lstm.weight_ih_l0", "lstm.weight_hh_l0", "lstm.bias_ih_l0", "lstm.bias_hh_l0"),
}


@pytest.mark.parametrize("name", CLASSIFICATION)
def test_every_use_is_understood_but_for_the_known_exceptions(name: str) -> None:
    assert HeldRows(CASES[name]().problem()).captures.plan.alone == set(ALONE.get(name, ()))


def test_a_first_batch_of_one_example_does_not_hide_the_order_of_examples() -> None:
    case = CASES["attention_module"]()
    x, y = case.tensors
    problem = case.problem(chunks(x, y, [1, len(x) - 1]))
    rows = held(problem)
    assert {layout.kind for layout in (call.layout for call in rows.captures.plan.calls)} == {
        "blocks",
        "second",
        "interleaved",
    }
    block = torch.randn(problem.num_parameters, 2, dtype=torch.float64)
    assert error(rows.apply(block), GradientRows(problem).apply(block)) < 1e-12


def test_a_sequence_model_whose_examples_come_second() -> None:
    """Tensors (T, B, d), as recurrent models and attention have them."""

    class Second(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 5)
            self.norm = nn.LayerNorm(5)
            self.flat = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(torch.tanh(self.inner(x.transpose(0, 1))))
            steps, num = h.shape[:2]
            return self.flat(h.reshape(steps * num, -1)).view(steps, num, -1).mean(0)

    x, y = torch.randn(9, 6, 4, dtype=torch.float64), labels(9, 3)
    problem = Case(Second().double(), chunks(x, y, [4, 5])).problem()
    rows = held(problem)
    assert rows.captures.plan.alone == set()
    assert {layout.kind for layout in (call.layout for call in rows.captures.plan.calls)} == {
        "second",
        "interleaved",
    }
    truth = ds.GaussNewton(problem).dense()
    assert same_spectrum(ds.gram_spectrum(problem).values, truth, float(truth.norm()))


class Mixture(nn.Module):
    """Two experts, each of which sees the tokens that a gate sends to it."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(6, 2)
        self.experts = nn.ModuleList([nn.Linear(6, 5), nn.Linear(6, 5)])
        self.out = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        shares = self.gate(tokens).softmax(-1)
        found = tokens.new_zeros(len(tokens), 5)
        for i, expert in enumerate(self.experts):
            mine = (shares.argmax(-1) == i).nonzero().flatten()
            found = found.index_add(0, mine, torch.tanh(expert(tokens[mine])) * shares[mine, i, None])
        return self.out(found).view(len(x), -1, 3).mean(1)


@pytest.mark.parametrize("seed", range(4))
def test_tokens_routed_by_their_values_are_right(seed: int) -> None:
    torch.manual_seed(seed)
    model, x, y = Mixture().double(), torch.randn(8, 4, 6).double(), torch.arange(8) % 3
    dense = ds.GaussNewton(ds.Problem(model, (x, y))).dense()
    for batch_size in (1, 2, 4):
        found = ds.gram_spectrum(ds.Problem(model, (x, y), batch_size=batch_size)).values
        assert same_spectrum(found, dense, float(dense.norm()))

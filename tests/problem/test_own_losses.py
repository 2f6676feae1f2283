from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import deepspectra as ds
from deepspectra import errors
from deepspectra.problem.losses import SquaredError
from hugging_face import FAMILIES, casts_up_only, counted, family, own_loss, sentences, tf


@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_derivatives_of_a_model_as_it_comes_are_those_of_the_loss_it_gives(name):
    model, batches = family(name)
    problem = ds.Problem(model, batches)
    assert problem.num_examples == sum(counted(name, batch) for batch in batches)

    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")
    leaves = {key: p.detach().requires_grad_() for key, p in model.named_parameters()}
    tangents = torch.randn(problem.num_parameters, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with casts_up_only():
        value = own_loss(model, name, batches)(leaves)
        slopes = torch.autograd.grad(value, leaves.values(), create_graph=True)
        products = [
            torch.autograd.grad(slopes, leaves.values(), list(problem.unflatten(v).values()), retain_graph=True)
            for v in tangents.T
        ]
    flat = [torch.cat([part.flatten() for part in product]) for product in products]
    expected = torch.stack(flat, 1)

    assert problem.loss() == pytest.approx(float(value.detach()), rel=1e-12)
    torch.testing.assert_close(problem.gradient(), problem.flatten(dict(zip(leaves, slopes, strict=True))).detach())
    for found in (
        ds.Hessian(problem) @ tangents,
        ds.GaussNewton(problem) @ tangents + ds.Residual(problem) @ tangents,
    ):
        assert float((found - expected).norm()) < 1e-12 * float(expected.norm())


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # of forward mode, at its first use
@pytest.mark.parametrize("name", ["gpt2", "t5", "vit"])
def test_gauss_newton_of_a_model_as_it_comes_is_that_of_its_logits(name):
    model, batches = family(name)
    problem = ds.Problem(model, batches)
    model.set_attn_implementation("eager")
    start = {key: p.detach() for key, p in model.named_parameters()}
    tangents = torch.randn(problem.num_parameters, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    direction = problem.unflatten(tangents[:, 0])
    expected = torch.zeros(problem.num_parameters, dtype=torch.float64)
    for batch in batches:

        def logits(parameters, batch=batch):
            found = torch.func.functional_call(model, parameters, (), batch).logits
            labels = batch["labels"]
            found, labels = (found[:, :-1], labels[:, 1:]) if name == "gpt2" else (found, labels)
            return found.reshape(-1, found.shape[-1])[labels.reshape(-1) != -100]

        with casts_up_only():
            z, dz = torch.func.jvp(logits, (start,), (direction,))
            _, pull = torch.func.vjp(logits, start)
            p = z.softmax(-1)
            (pulled,) = pull(p * dz - p * (p * dz).sum(-1, keepdim=True))
        expected += problem.flatten(pulled) / problem.num_examples
    found = (ds.GaussNewton(problem) @ tangents)[:, 0]
    assert float((found - expected).norm()) < 1e-12 * float(expected.norm())


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_a_model_as_it_comes_gives_the_same_as_with_a_forward_of_logits_and_labels(name):
    model, batches = family(name)

    def forward(model, batch):
        logits, labels = model(**batch).logits, batch["labels"]
        if name == "gpt2":
            return logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        return logits.reshape(-1, logits.shape[-1]), labels.flatten()

    given, by_hand = ds.Problem(model, batches), ds.Problem(model, batches, forward=forward)
    assert given.loss() == pytest.approx(by_hand.loss(), rel=1e-12)
    assert given.num_examples == by_hand.num_examples
    torch.testing.assert_close(given.gradient(), by_hand.gradient())


def test_labels_may_lie_in_a_dataset_of_mappings_and_in_outputs_of_pairs():
    model, (first, *_) = family("bert")
    rows = [{key: value[j] for key, value in first.items()} for j in range(3)]
    of_rows = ds.Problem(model, torch.utils.data.DataLoader(rows, batch_size=2))
    assert of_rows.loss() == pytest.approx(ds.Problem(model, [first]).loss(), rel=1e-12)
    pairs = ds.Problem(model, (first["input_ids"], first["labels"]))
    unmasked = {**first, "attention_mask": torch.ones_like(first["attention_mask"])}
    assert pairs.loss() == pytest.approx(ds.Problem(model, [unmasked]).loss(), rel=1e-12)


@pytest.mark.filterwarnings("ignore:the model is in training mode", "ignore:.*gradient_checkpointing_enable")
@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_gradient_checkpointing_changes_nothing(name):
    model, batches = family(name)
    plain = ds.Problem(model, batches)
    model.train()
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        problem = ds.Problem(model, batches)
        assert torch.equal(problem.gradient(), plain.gradient())
        v = torch.randn(plain.num_parameters, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        for kind in (ds.Hessian, ds.GaussNewton, ds.Residual):
            assert torch.equal(kind(problem) @ v, kind(plain) @ v)


class Own(nn.Module):
    """A model that takes its inputs by name and gives its loss."""

    def __init__(self, loss) -> None:
        super().__init__()
        self.linear, self.loss = nn.Linear(3, 2), loss

    def forward(self, x, labels=None):
        z = self.linear(x)
        return SimpleNamespace(logits=z, loss=None if labels is None else self.loss(z, labels))


X, Y = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 1, 0, 1, 0])


def test_the_loss_is_taken_with_its_options_and_its_kind():
    torch.manual_seed(0)
    weight = torch.tensor([1.0, 3.0])
    model = Own(nn.CrossEntropyLoss(weight=weight, ignore_index=0, label_smoothing=0.1))
    problem = ds.Problem(model, [{"x": X, "labels": Y}])
    assert problem.loss() == pytest.approx(float(model(X, Y).loss.detach()), rel=1e-5)
    assert problem.num_examples == 3
    regression = ds.Problem(Own(F.mse_loss), [{"x": X, "labels": X[:, :2]}])
    assert isinstance(regression.loss_function, SquaredError)


def test_a_sum_divided_by_the_number_of_labels_is_the_mean():
    model = Own(lambda z, y: F.cross_entropy(z, y, reduction="sum") / len(y))
    assert ds.Problem(model, [{"x": X, "labels": Y}]).loss() == pytest.approx(
        float(model(X, Y).loss.detach()), rel=1e-5
    )


@pytest.mark.parametrize(
    ("loss", "kind", "match"),
    [
        (lambda z, y: F.cross_entropy(z, y) + z.square().mean(), errors.LossError, "sum of several terms"),
        (lambda z, y: -z.log_softmax(-1)[range(len(y)), y].mean(), errors.LossError, "none of PyTorch's functions"),
    ],
)
def test_a_loss_of_another_kind_is_refused_with_what_to_do(loss, kind, match):
    with pytest.raises(kind, match=match):
        ds.Problem(Own(loss), [{"x": X, "labels": Y}])


class Weighing(nn.Module):
    """A model that gives the mean of its rows' losses by weights, which are among its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x, weights, labels):
        each = F.cross_entropy(self.linear(x), labels, reduction="none").view(2, -1)
        return SimpleNamespace(loss=(each * weights.view(2, -1)).sum() / weights.sum())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rows_that_a_later_batch_masks_or_weighs_are_refused(dtype):
    torch.manual_seed(0)
    model, ones = Weighing().to(dtype), torch.ones(6)
    first = {"x": X, "weights": ones, "labels": Y}
    even = ds.Problem(model, [first, {"x": 2 * X, "weights": ones, "labels": Y}])
    expected = (model(X.to(dtype), ones, Y).loss + model(2 * X.to(dtype), ones, Y).loss) / 2
    assert even.loss() == pytest.approx(float(expected.detach()), rel=1e-5 if dtype != torch.bfloat16 else 0.02)
    for weights in (torch.tensor([1.0, 1, 1, 1, 0, 0]), torch.linspace(0, 5, 6)):
        with pytest.raises(errors.LossError, match="weigh or mask rows by another entry than the labels"):
            ds.Problem(model, [first, {"x": 2 * X, "weights": weights, "labels": Y}])


def test_options_of_another_batch_must_be_those_of_the_first_but_for_the_label_that_is_ignored():
    torch.manual_seed(0)
    batches = [{"x": X, "labels": Y}, {"x": X[:4], "labels": Y[:4]}]
    smoothed = Own(lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1 if len(y) < 6 else 0.0))
    with pytest.raises(errors.LossError, match="as it is for the first batch"):
        ds.Problem(smoothed, batches)
    ignoring = Own(lambda z, y: F.cross_entropy(z, y, ignore_index=int(len(y) < 6)))
    problem = ds.Problem(ignoring, batches)
    losses = [float(ignoring(b["x"], b["labels"]).loss.detach()) for b in batches]
    assert problem.num_examples == 5
    assert problem.loss() == pytest.approx((3 * losses[0] + 2 * losses[1]) / 5, rel=1e-5)


class TwoHeads(nn.Module):
    """A model that gives the mean, or another combination, of the losses of two heads."""

    def __init__(self, of_second: float = 0.5, num_second: int = 2) -> None:
        super().__init__()
        self.heads, self.of_second = nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, num_second)]), of_second

    def forward(self, x, first, second):
        losses = [F.cross_entropy(head(x), y) for head, y in zip(self.heads, (first, second), strict=True)]
        return SimpleNamespace(loss=(1 - self.of_second) * losses[0] + self.of_second * losses[1])


def test_the_mean_of_two_losses_is_one_of_twice_as_many_rows():
    torch.manual_seed(0)
    model, batch = TwoHeads().double(), {"x": X.double(), "first": Y, "second": 1 - Y}
    problem = ds.Problem(model, [batch])
    assert (problem.num_examples, problem.cuts) == (12, True)
    assert problem.loss() == pytest.approx(float(model(**batch).loss.detach()), rel=1e-12)
    halves = [
        ds.Problem(head, (batch["x"], batch[y])) for head, y in zip(model.heads, ("first", "second"), strict=True)
    ]
    expected = torch.block_diag(*(ds.GaussNewton(half).dense() / 2 for half in halves))
    torch.testing.assert_close(ds.GaussNewton(problem).dense(), expected)


@pytest.mark.parametrize("other", [{"of_second": 0.3}, {"num_second": 3}])
def test_another_combination_of_two_losses_is_refused(other):
    with pytest.raises(errors.LossError, match="sum of several terms"):
        ds.Problem(TwoHeads(**other), [{"x": X, "first": Y, "second": 1 - Y}])


def test_a_batch_of_ignored_labels_may_come_first():
    batches = [{"x": X, "labels": torch.full((6,), -100)}, {"x": X, "labels": Y}]
    model = Own(F.cross_entropy)
    assert ds.Problem(model, batches).loss() == pytest.approx(ds.Problem(model, batches[1:]).loss(), rel=1e-5)


@pytest.mark.parametrize("size", [1e-3, 1e-9])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_further_term_is_refused_however_small(size, dtype):
    torch.manual_seed(0)
    for term in (lambda z: z.logsumexp(-1).square().mean(), lambda z: F.mse_loss(z, torch.zeros_like(z))):
        model = Own(lambda z, y, term=term: F.cross_entropy(z, y) + size * term(z)).to(dtype)
        with pytest.raises(errors.LossError, match="sum of several terms"):
            ds.Problem(model, [{"x": X, "labels": Y}])


@pytest.mark.parametrize("balanced", [False, True])
def test_the_default_balancing_of_experts_is_refused(balanced):
    torch.manual_seed(0)
    sizes = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = tf.MixtralConfig(
        vocab_size=24, num_key_value_heads=1, num_local_experts=3, output_router_logits=balanced, **sizes
    )
    model, batch = tf.MixtralForCausalLM(config).eval(), sentences()
    if not balanced:
        assert ds.Problem(model, [batch]).loss() == pytest.approx(float(model(**batch).loss.detach()), rel=1e-5)
        return
    assert config.router_aux_loss_coef == 1e-3
    with pytest.raises(errors.LossError, match="sum of several terms"):
        ds.Problem(model, [batch])


@pytest.mark.parametrize("size", [1, 4])
def test_a_regression_head_takes_batches_of_one_example(size):
    """Its outputs and labels are squeezed, of one example to scalars."""
    torch.manual_seed(0)
    model, x = Own(lambda z, y: F.mse_loss(z.squeeze(), y.squeeze())), torch.randn(5, 3)
    model.linear = nn.Linear(3, 1)
    rows = [{"x": one, "labels": one.sum()} for one in x]
    found = ds.Problem(model, torch.utils.data.DataLoader(rows, batch_size=size))
    expected = ds.Problem(model.linear, (x, x.sum(1, keepdim=True)), "mse")
    assert (found.num_examples, found.num_classes) == (5, 1)
    assert found.loss() == pytest.approx(expected.loss(), rel=1e-5)
    v = torch.randn(4)
    for kind in (ds.Hessian, ds.GaussNewton):
        torch.testing.assert_close(kind(found) @ v, kind(expected) @ v)
    torch.testing.assert_close(ds.kronecker(found).dense(), ds.kronecker(expected).dense())


def test_batches_without_labels_are_refused_by_name():
    with pytest.raises(errors.DataError, match="gives no loss for a batch with 'x'"):
        ds.Problem(Own(F.cross_entropy), [{"x": X}])
    with pytest.raises(errors.DataError, match="calls no loss on a batch with 'x'"):
        ds.Problem(Own(F.cross_entropy), [{"x": X, "labels": Y}, {"x": X}])
    with pytest.raises(errors.DataError, match=r"the model failed on a batch with 'z'.*Pass forward=lambda model"):
        ds.Problem(Own(F.cross_entropy), [{"z": X, "labels": Y}])


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5"])
def test_a_model_in_bfloat16_is_near_its_own_in_float64(name):
    model, batches = family(name)
    half, exact = (ds.Problem(model.bfloat16(), batches, dtype=dtype) for dtype in (torch.bfloat16, torch.float64))
    assert half.loss() == pytest.approx(exact.loss(), rel=0.02)
    v = half.gradient().double()
    for kind in (ds.Hessian, ds.GaussNewton):
        found, right = (kind(half) @ v.bfloat16()).double(), kind(exact) @ v.bfloat16().double()
        assert float((found - right).norm()) < 0.1 * float(right.norm())
    assert "bfloat16" in ds.Hessian(half).products.notes["rounding of H v"]


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_spectrum_and_parts_of_a_model_as_it_comes_are_those_of_its_gauss_newton(name):
    model, batches = family(name)
    problem = ds.Problem(model, batches)
    dense = ds.GaussNewton(problem).dense()
    expected = torch.linalg.eigvalsh(dense).flip(0)
    found = ds.gram_spectrum(problem).values[:30]
    assert float((found - expected[: len(found)]).abs().max()) < 1e-12 * float(expected[0])
    v = torch.randn(problem.num_parameters, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    parts = ds.decompose(problem, effects="two-way", groups=lambda token: "odd" if token % 2 else "even")
    torch.testing.assert_close(sum(parts[part] @ v for part in parts), dense @ v)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "gpt2" else pytest.mark.slow) for name in FAMILIES]
)
def test_a_model_as_it_comes_is_analysed(name, tmp_path):
    model, batches = family(name)
    problem = ds.Problem(model, batches)
    groups = None if problem.num_classes < 4 else [token % 3 for token in range(problem.num_classes)]
    found = ds.analyze(problem, effort="quick", num=4, groups=groups, progress=False)
    exact = torch.linalg.eigvalsh(ds.Hessian(problem).dense()).flip(0)[:4]
    values = torch.from_numpy(found.dataset.eigenvalue.sel(operator="hessian").values[:4])
    torch.testing.assert_close(values, exact, rtol=1e-3, atol=0.0)
    assert found.to_html(tmp_path / "report.html").stat().st_size > 10_000

"""What may be cut into batches and examples is found out; what may not stays whole."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import deepspectra as ds
from deepspectra import errors
from deepspectra.problem.cross_entropy import CrossEntropy
from reference import error
from truth import truth

GENERATOR = torch.Generator().manual_seed(0)
X, Y = (
    torch.randn(12, 5, dtype=torch.float64, generator=GENERATOR),
    torch.tensor([0, 0, 0, 1, 0, 2, 1, 0, 0, 2, 1, 0]),
)
HALVES = [(X[:5], Y[:5]), (X[5:], Y[5:])]
WEIGHT = torch.tensor([0.2, 1.0, 5.0], dtype=torch.float64)


def mlp(outputs: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, outputs)).double()


# ------------------------------------------------------------------------------------------------- losses


def summed(z: Tensor, y: Tensor) -> Tensor:
    return functional.cross_entropy(z, y, reduction="sum")


def weighted(z: Tensor, y: Tensor) -> Tensor:
    return functional.cross_entropy(z, y, weight=WEIGHT)


def ignoring(z: Tensor, y: Tensor) -> Tensor:
    return functional.cross_entropy(z, y, ignore_index=2)


def jaccard(z: Tensor, y: Tensor) -> Tensor:
    """Soft intersection over union of the whole batch."""
    p, t = z.softmax(1), functional.one_hot(y, 3).to(z)
    return 1 - (p * t).sum() / (p + t - p * t).sum()


def diversity(z: Tensor, y: Tensor) -> Tensor:
    """Negative entropy of the mean prediction."""
    mean = z.softmax(1).mean(0)
    return (mean * mean.log()).sum()


def contrastive(z: Tensor, y: Tensor) -> Tensor:
    z = functional.normalize(z)
    return functional.cross_entropy(5 * z @ z.T, torch.arange(len(z)).roll(1))


NO_MEANS = [summed, weighted, ignoring, jaccard, diversity, contrastive]


@pytest.mark.parametrize("loss", NO_MEANS)
def test_a_loss_that_is_no_mean_is_what_it_is_on_the_one_batch(loss: Callable[..., Tensor]) -> None:
    model = mlp()
    gradient, hessian = truth(model, lambda: loss(model(X), Y))
    for data in ((X, Y), [(X, Y)]):
        problem = ds.Problem(model, data, loss=loss)
        assert problem.batches.num_batches == 1
        assert not problem.cuts
        assert error(problem.gradient(), gradient) < 1e-12
        assert error(ds.Hessian(problem).dense(), hessian) < 1e-9
        whole = ds.GaussNewton(problem).dense() + ds.Residual(problem).dense()
        assert error(whole, hessian) < 1e-9


@pytest.mark.parametrize("loss", NO_MEANS)
def test_a_loss_that_is_no_mean_is_refused_over_several_batches(loss: Callable[..., Tensor]) -> None:
    for data, options in ((HALVES, {}), ((X, Y), {"batch_size": 8})):
        with pytest.raises(errors.LossError, match=r"no mean over rows.*data=\[\(x, y\)\]"):
            ds.Problem(mlp(), data, loss=loss, **options)


def test_batches_of_one_class_each_do_not_hide_class_weights() -> None:
    """Within each batch the weights cancel."""
    order = Y.argsort()
    x, y = X[order], Y[order]
    batches = [(x[y == c], y[y == c]) for c in range(3)]
    with pytest.raises(errors.LossError, match="no mean over rows"):
        ds.Problem(mlp(), batches, loss=weighted)


def test_data_that_we_would_cut_stays_one_batch_for_a_loss_that_is_no_mean() -> None:
    x, y = torch.randn(3000, 5, dtype=torch.float64), torch.arange(3000) % 3
    wide = nn.Sequential(nn.Linear(5, 3000), nn.Tanh(), nn.Linear(3000, 3)).double()
    assert ds.Problem(wide, (x, y)).batches.num_batches > 1
    problem = ds.Problem(wide, (x, y), loss=contrastive)
    assert problem.batches.num_batches == 1
    assert problem.loss() == pytest.approx(float(contrastive(wide(x), y).detach()), rel=1e-12)


def own_mean(z: Tensor, y: Tensor) -> Tensor:
    return -z.log_softmax(1).gather(1, y[:, None]).mean()


def test_means_are_taken_as_such_even_of_a_fitted_network_in_float32() -> None:
    """Losses of 1e-7 are nothing but rounding, and still a mean."""
    model = mlp().float()
    with torch.no_grad():
        model[2].weight.zero_()
        model[2].bias.copy_(torch.tensor([18.0, 0.0, 0.0]))
    batches = [(x.float(), torch.zeros(len(x), dtype=torch.long)) for x, _ in HALVES]
    problem = ds.Problem(model, batches, loss=own_mean)
    assert problem.loss() < 1e-6
    assert ds.Problem(mlp(), HALVES, loss=own_mean).cuts


@pytest.mark.parametrize(
    "loss",
    [
        partial(functional.cross_entropy, weight=WEIGHT),
        partial(functional.cross_entropy, weight=WEIGHT, ignore_index=1, label_smoothing=0.1),
        partial(partial(functional.cross_entropy, ignore_index=1), label_smoothing=0.2),
    ],
)
def test_partials_of_known_losses_are_read_as_their_modules(loss: Any) -> None:
    model = mlp()
    gradient, hessian = truth(model, lambda: loss(model(X), Y))
    for data in ((X, Y), HALVES):
        problem = ds.Problem(model, data, loss=loss)
        assert isinstance(problem.loss_function, CrossEntropy)
        assert error(problem.gradient(), gradient) < 1e-12
        assert error(ds.Hessian(problem).dense(), hessian) < 1e-9


@pytest.mark.parametrize(
    "loss",
    [
        functional.l1_loss,
        functional.mse_loss,
        partial(functional.huber_loss, delta=0.5),
        partial(functional.binary_cross_entropy_with_logits, pos_weight=torch.tensor(2.0)),
    ],
)
def test_functions_refuse_to_broadcast_as_their_modules_do(loss: Any) -> None:
    model, t = mlp(1), (X[:, 0] > 0).double()
    with pytest.raises(errors.ShapeError, match=r"\(12, 1\)"):
        ds.Problem(model, (X, t), loss=loss)
    _, hessian = truth(model, lambda: loss(model(X), t[:, None]))
    problem = ds.Problem(model, [(X[:5], t[:5, None]), (X[5:], t[5:, None])], loss=loss)
    assert (ds.Hessian(problem).dense() - hessian).abs().max() < 1e-12


def test_a_loss_whose_rows_cannot_be_told_apart_is_told() -> None:
    """Targets of another number than the outputs, which no cut keeps together."""
    model = mlp()

    def loss(z: Tensor, y: Tensor) -> Tensor:
        return (z.mean(0) - y.mean()).square().sum()

    batches = [(X[:6], torch.rand(4, dtype=torch.float64)), (X[6:], torch.rand(4, dtype=torch.float64))]
    with pytest.warns(errors.FallbackWarning, match="cannot be told"):
        ds.Problem(model, batches, loss=loss)


# --------------------------------------------------------------------------------------------- first axis


class Tagger(nn.Module):
    """Positions first: (T, B, 5) to (T, B, 3)."""

    def __init__(self, *, transformer: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix = nn.TransformerEncoderLayer(5, 1, 4, 0.0) if transformer else nn.GRU(5, 5)
        self.last = nn.Linear(5, 3)
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.mix(x)
        return self.last(mixed[0] if isinstance(mixed, tuple) else mixed)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("transformer", [False, True])
def test_sequences_whose_positions_come_first_are_never_cut(transformer: bool) -> None:
    x, y = torch.randn(40, 4, 5, dtype=torch.float64), torch.arange(160).view(40, 4) % 3
    model = Tagger(transformer=transformer)

    def loss() -> Tensor:
        return functional.cross_entropy(model(x).flatten(0, 1), y.flatten())

    expected = float(loss().detach())
    for data in ((x, y), [(x, y)]):
        problem = ds.Problem(model, data, memory="100KB")
        assert not problem.cuts
        assert problem.batches.num_batches == 1
        assert problem.loss() == pytest.approx(expected, rel=1e-12)
    problem = ds.Problem(model, (x, y))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        gradient = torch.autograd.grad(loss(), list(model.parameters()))
    assert error(problem.gradient(), torch.cat([part.flatten() for part in gradient])) < 1e-12
    assert ds.class_means(problem).class_means.isfinite().all()


class Nodes(nn.Module):
    """Rows are the nodes of one graph."""

    def __init__(self, size: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.o = nn.Linear(5, 4), nn.Linear(4, 3)
        self.register_buffer("adjacency", torch.eye(size) + torch.eye(size).roll(1, 0))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.adjacency @ self.o(torch.tanh(self.adjacency @ self.a(x)))


@pytest.mark.parametrize("size", [12, 700])
def test_nodes_of_a_graph_stay_together_and_in_order(size: int) -> None:
    """Of 700 the first 512 alone are no batch of the network's."""
    x, y = torch.randn(size, 5, dtype=torch.float64), torch.randint(3, (size,))
    model = Nodes(size)
    _, hessian = truth(model, lambda: functional.cross_entropy(model(x), y))
    for data in ((x, y), [(x, y)]):
        problem = ds.Problem(model, data)
        assert not problem.splits_by_class
        assert error(ds.Hessian(problem).dense(), hessian) < 1e-9


class Attending(nn.Module):
    """Each row attends to all others of its batch: a set."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.o = nn.Linear(5, 4).double(), nn.Linear(4, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.o(torch.tanh((h @ h.T).softmax(1) @ h))


def test_rows_that_influence_each_other_are_taken_as_the_one_batch_that_is_given() -> None:
    model = Attending()
    for data, options in (((X, Y), {}), ((X, Y), {"batch_size": 12}), (HALVES, {})):
        with pytest.raises(errors.DataError, match=r"influence each other.*data=\[\(x, y\)\]"):
            ds.Problem(model, data, **options)
    with pytest.warns(errors.FallbackWarning, match="taken as a whole"):
        problem = ds.Problem(model, [(X, Y)])
    _, hessian = truth(model, lambda: functional.cross_entropy(model(X), Y))
    assert error(ds.Hessian(problem).dense(), hessian) < 1e-9


def test_examples_that_come_first_are_cut_and_sorted_as_before() -> None:
    problem = ds.Problem(mlp(), HALVES)
    assert problem.cuts
    assert problem.splits_by_class
    assert torch.equal(torch.cat([y for _, y in problem.batches]), Y.sort().values)


def test_a_batch_size_that_would_cut_positions_is_refused() -> None:
    x, y = torch.randn(6, 4, 5, dtype=torch.float64), torch.arange(24).view(6, 4) % 3
    with pytest.raises(errors.DataError, match=r"second dimension.*batch_size="):
        ds.Problem(Tagger(transformer=False), (x, y), batch_size=2)


def test_a_first_batch_of_one_example_hides_no_influence() -> None:
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x - x.mean(0))

    with pytest.raises(errors.DataError, match="influence each other"):
        ds.Problem(Centred(), [(X[:1], Y[:1]), (X[1:], Y[1:])])


def test_batches_of_one_row_say_nothing_against_a_mean() -> None:
    expected = ds.Problem(mlp(), (X, Y)).loss()
    for sizes in ([11, 1], [1] * 12, [1, 11]):
        batches = list(zip(X.split(sizes), Y.split(sizes), strict=True))
        assert ds.Problem(mlp(), batches, loss=own_mean).loss() == pytest.approx(expected, rel=1e-12)
    with pytest.raises(errors.LossError, match="no mean over rows"):
        ds.Problem(mlp(), [(x[None], y[None]) for x, y in zip(X, Y, strict=True)], loss=summed_twice)


def summed_twice(z: Tensor, y: Tensor) -> Tensor:
    return functional.cross_entropy(z, y) * len(z)


def test_a_loss_of_one_s_own_is_judged_on_a_bounded_number_of_rows() -> None:
    """However many batches there are, and however many outputs."""
    seen: list[int] = []

    def counted(z: Tensor, y: Tensor) -> Tensor:
        seen.append(z.numel())
        return functional.cross_entropy(z, y)

    x, y = torch.randn(2000, 5, dtype=torch.float64), torch.arange(2000) % 3
    batches = list(zip(x.split(5), y.split(5), strict=True))
    ds.Problem(mlp(), batches, loss=counted)
    assert len(seen) < 400 + 80
    assert max(seen) <= 2**21


class Texts(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Each item with a text beside its tensors."""

    def __len__(self) -> int:
        return 1200

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"x": X[index % 12], "y": Y[index % 12], "text": f"item {index}"}


def test_lists_beside_the_tensors_of_a_batch_lose_no_examples() -> None:
    problem = ds.Problem(mlp(), Texts(), forward=lambda model, batch: (model(batch["x"]), batch["y"]))
    assert problem.num_examples == 1200
    assert problem.loss() == pytest.approx(ds.Problem(mlp(), (X, Y)).loss(), rel=1e-12)

"""Rows are found and counted, and a loss that is no mean over them is found out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import deepspectra as ds
from deepspectra import errors
from given import HALVES, UNEVEN, X, mlp, refused, seeded_mlp
from nets import Case
from reference import Reference, error
from truth import truth

WEIGHT = torch.tensor([0.2, 1.0, 5.0], dtype=torch.float64)


def test_every_label_ignored() -> None:
    refused(errors.DataError, "ignore", lambda: ds.Problem(mlp(), (X, torch.full((12,), -100))))


def tokens(*shapes: tuple[int, int]) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randint(7, shape), torch.randint(5, shape)) for shape in shapes]


def test_batches_that_fit_two_readings_are_read_as_the_others() -> None:
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 5)).double()
    batches = tokens((3, 5), (2, 4))
    losses = [ds.Problem(model, given).loss() for given in (batches, batches[::-1])]
    flat = [torch.cat([batch[part].flatten() for batch in batches]) for part in (0, 1)]
    expected = float(functional.cross_entropy(model(flat[0]), flat[1]).detach())
    assert losses == pytest.approx([expected, expected], rel=1e-12)


def test_tokens_that_always_fit_two_readings_are_told_how_they_are_read() -> None:
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 5)).double()
    (batch,) = tokens((3, 5))
    with pytest.warns(errors.FallbackWarning, match=r"\(B, C, \.\.\.\).*forward="):
        problem = ds.Problem(model, [batch])
    second = functional.cross_entropy(model(batch[0]), batch[1])
    assert problem.loss() == pytest.approx(float(second.detach()), rel=1e-12)
    problem.to(torch.float32)
    said = ds.Problem(model, [batch], forward=lambda model, pair: (model(pair[0]).flatten(0, -2), pair[1].flatten()))
    last = functional.cross_entropy(model(batch[0]).movedim(-1, 1), batch[1])
    assert said.loss() == pytest.approx(float(last.detach()), rel=1e-12)


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
    model = seeded_mlp()
    gradient, hessian = truth(model, lambda: loss(model(X), UNEVEN))
    for data in ((X, UNEVEN), [(X, UNEVEN)]):
        problem = ds.Problem(model, data, loss=loss)
        assert problem.batches.num_batches == 1
        assert not problem.cuts
        assert error(problem.gradient(), gradient) < 1e-12
        assert error(ds.Hessian(problem).dense(), hessian) < 1e-9
        whole = ds.GaussNewton(problem).dense() + ds.Residual(problem).dense()
        assert error(whole, hessian) < 1e-9


@pytest.mark.parametrize("loss", NO_MEANS)
def test_a_loss_that_is_no_mean_is_refused_over_several_batches(loss: Callable[..., Tensor]) -> None:
    for data, options in ((HALVES, {}), ((X, UNEVEN), {"batch_size": 8})):
        with pytest.raises(errors.LossError, match=r"no mean over rows.*data=\[\(x, y\)\]"):
            ds.Problem(seeded_mlp(), data, loss=loss, **options)


def test_batches_of_one_class_each_do_not_hide_class_weights() -> None:
    """Within each batch the weights cancel."""
    order = UNEVEN.argsort()
    x, y = X[order], UNEVEN[order]
    batches = [(x[y == c], y[y == c]) for c in range(3)]
    with pytest.raises(errors.LossError, match="no mean over rows"):
        ds.Problem(seeded_mlp(), batches, loss=weighted)


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
    model = seeded_mlp().float()
    with torch.no_grad():
        model[2].weight.zero_()
        model[2].bias.copy_(torch.tensor([18.0, 0.0, 0.0]))
    batches = [(x.float(), torch.zeros(len(x), dtype=torch.long)) for x, _ in HALVES]
    problem = ds.Problem(model, batches, loss=own_mean)
    assert problem.loss() < 1e-6
    assert ds.Problem(seeded_mlp(), HALVES, loss=own_mean).cuts


def test_a_loss_whose_rows_cannot_be_told_apart_is_told() -> None:
    """Targets of another number than the outputs, which no cut keeps together."""
    model = seeded_mlp()

    def loss(z: Tensor, y: Tensor) -> Tensor:
        return (z.mean(0) - y.mean()).square().sum()

    batches = [(X[:6], torch.rand(4, dtype=torch.float64)), (X[6:], torch.rand(4, dtype=torch.float64))]
    with pytest.warns(errors.FallbackWarning, match="cannot be told"):
        ds.Problem(model, batches, loss=loss)


def test_batches_of_one_row_say_nothing_against_a_mean() -> None:
    expected = ds.Problem(seeded_mlp(), (X, UNEVEN)).loss()
    for sizes in ([11, 1], [1] * 12, [1, 11]):
        batches = list(zip(X.split(sizes), UNEVEN.split(sizes), strict=True))
        assert ds.Problem(seeded_mlp(), batches, loss=own_mean).loss() == pytest.approx(expected, rel=1e-12)
    with pytest.raises(errors.LossError, match="no mean over rows"):
        ds.Problem(seeded_mlp(), [(x[None], y[None]) for x, y in zip(X, UNEVEN, strict=True)], loss=summed_twice)


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
    ds.Problem(seeded_mlp(), batches, loss=counted)
    assert len(seen) < 400 + 80
    assert max(seen) <= 2**21


def test_a_batch_as_long_as_there_are_classes_is_read_like_the_others() -> None:
    """Outputs (B, T, C) whose T differs from batch to batch: at T = C two readings fit, and one is wrong."""
    torch.manual_seed(50)
    model = torch.nn.Sequential(torch.nn.Embedding(6, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3)).double()
    batches = [(torch.randint(6, (2, length)), torch.randint(3, (2, length))) for length in (5, 3, 4)]
    case = Case(model, batches, classes_last=True)
    problem = case.problem()
    assert problem.loss() == pytest.approx(Reference(case).loss, rel=1e-12)

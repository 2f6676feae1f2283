"""The copy that is evaluated: without wrappers, in the mode that was asked for, the user's own left alone."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize
from torch.utils.data import DataLoader, TensorDataset

import deepspectra as ds
from deepspectra import errors
from given import Captured, Net, X, Y, check, mlp, normed, use
from nets import CASES, Case
from reference import Reference, case_and_reference, error
from truth import truth


def test_dropout_left_on_is_switched_off_with_a_warning() -> None:
    model = mlp(nn.Tanh(), nn.Dropout(0.5)).train()
    ref = Reference(Case(model, [(X, Y)]))
    with pytest.warns(errors.DeepSpectraWarning, match=r"(?i)dropout"):
        problem = ds.Problem(model, (X, Y))
    assert problem.loss() == pytest.approx(ref.loss, rel=1e-12)
    assert error(ds.Hessian(problem).dense(), ref.hessian) < 1e-9
    assert model.training
    assert model[2].training


def test_batch_norm_in_train_mode_is_evaluated_with_a_warning() -> None:
    case, ref = CASES["conv_batchnorm"](), case_and_reference("conv_batchnorm")[1]
    case.model.train()
    before = copy.deepcopy(case.model.state_dict())
    with pytest.warns(errors.DeepSpectraWarning, match=r"(?i)batch.?norm"):
        problem = case.problem()
    assert problem.loss() == pytest.approx(ref.loss, rel=1e-12)
    assert error(ds.Hessian(problem).dense(), ref.hessian) < 1e-9
    assert case.model.training
    assert case.model[1].training
    assert all(torch.equal(case.model.state_dict()[key], kept) for key, kept in before.items())


def test_modes_set_by_hand_are_left_as_they_were() -> None:
    model = mlp(nn.Tanh(), nn.Dropout(0.5)).train()
    model[2].eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", errors.DeepSpectraWarning)
        use(ds.Problem(model, (X, Y)))
    assert model.training
    assert not model[2].training


def test_train_mode_without_noise_needs_no_warning() -> None:
    """Warnings are errors here, so that passing means none was given."""
    use(ds.Problem(mlp().train(), (X, Y)))


def test_wrappers_are_taken_off() -> None:
    model, expected = Net(), ("a.weight", "a.bias", "o.weight", "o.bias")
    parallel = nn.DataParallel(model)
    _, hessian = truth(model, lambda: functional.cross_entropy(model(X), Y))
    problem = ds.Problem(parallel, (X, Y))
    assert problem.parameter_names == expected
    assert error(ds.Hessian(problem).dense(), hessian) < 1e-9


@pytest.mark.parametrize("mode", ["mean", "sum", "max"])
@pytest.mark.parametrize("padding", [None, 1])
def test_embedding_bags_have_second_derivatives(mode: str, padding: int | None) -> None:
    ids = torch.randint(7, (12, 4), generator=torch.Generator().manual_seed(1))

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(2)
            self.e, self.o = nn.Embedding(7, 5, padding_idx=padding).double(), nn.Linear(5, 3).double()

        def forward(self, ids: Tensor) -> Tensor:
            rows, counted = self.e(ids), (ids != padding if padding is not None else ids >= 0)[..., None]
            if mode == "max":
                return self.o(rows.masked_fill(~counted, -torch.inf).amax(1))
            total = (rows * counted).sum(1)
            return self.o(total / counted.sum(1) if mode == "mean" else total)

    plain = Plain()
    bag = nn.Sequential(nn.EmbeddingBag(7, 5, mode=mode, padding_idx=padding, sparse=mode == "sum"), nn.Linear(5, 3))
    bag = bag.double()
    bag.load_state_dict(dict(zip(bag.state_dict(), plain.state_dict().values(), strict=True)))
    gradient, hessian = truth(plain, lambda: functional.cross_entropy(plain(ids), Y))
    problem = ds.Problem(bag, (ids, Y))
    assert error(problem.gradient(), gradient) < 1e-12
    assert error(ds.Hessian(problem).dense(), hessian) < 1e-9


def test_bags_of_one_list_with_offsets() -> None:
    index, offsets = torch.tensor([3, 1, 2, 2, 6, 0, 5]), torch.tensor([0, 2, 2, 5])
    bag = nn.EmbeddingBag(7, 3).double()
    expected = bag(index, offsets)
    batch = {"index": index, "offsets": offsets, "y": torch.tensor([0, 1, 2, 0])}
    problem = ds.Problem(bag, [batch], forward=lambda m, b: (m(b["index"], b["offsets"]), b["y"]))
    ((outputs, _),) = problem.row_batches()
    assert error(outputs, expected.detach()) < 1e-12
    assert (ds.Hessian(problem).dense()).isfinite().all()


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_sparse_embeddings_inputs_and_adjacency() -> None:
    ids = torch.randint(7, (12, 4), generator=torch.Generator().manual_seed(1))
    sparse, dense = (
        nn.Sequential(nn.Embedding(7, 5, sparse=s), nn.Flatten(), nn.Linear(20, 3)).double() for s in (True, False)
    )
    dense.load_state_dict(sparse.state_dict())
    gradient, hessian = truth(dense, lambda: functional.cross_entropy(dense(ids), Y))
    problem = ds.Problem(sparse, (ids, Y))
    assert error(problem.gradient(), gradient) < 1e-12
    assert error(ds.Hessian(problem).dense(), hessian) < 1e-9
    net = Net()
    check(net, (X.to_sparse(), Y))
    adjacency = (torch.rand(12, 12, generator=torch.Generator().manual_seed(0)) < 0.3).double()

    def graph(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        return batch["a"] @ model(batch["a"] @ batch["x"]), batch["y"]

    for a in (adjacency, adjacency.to_sparse(), adjacency.to_sparse_csr()):
        check(
            net,
            [{"a": a, "x": X, "y": Y}],
            lambda: functional.cross_entropy(adjacency @ net(adjacency @ X), Y),
            forward=graph,
        )


def test_batch_norm_in_training_mode_takes_the_statistics_of_the_one_batch() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).double().train()
    before = copy.deepcopy(model.state_dict())
    twin = copy.deepcopy(model)
    _, hessian = truth(twin, lambda: functional.cross_entropy(twin(X), Y))
    for data in ((X, Y), [(X, Y)], DataLoader(TensorDataset(X, Y), batch_size=12)):
        problem = ds.Problem(model, data, mode="train")
        assert problem.mode == "train"
        assert error(ds.Hessian(problem).dense(), hessian) < 1e-9
        assert "training mode" in ds.Hessian(problem).name
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    with pytest.raises(errors.OptionError, match="one batch, and the data has 2"):
        ds.Problem(model, [(X[:6], Y[:6]), (X[6:], Y[6:])], mode="train")
    with pytest.raises(errors.OptionError, match="'eval' or 'train'"):
        ds.Problem(model, (X, Y), mode="training")
    dropped = nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.5), nn.Linear(4, 3)).double()
    with pytest.warns(errors.FallbackWarning, match="dropout"):
        ds.Problem(dropped, (X, Y), mode="train")


def test_a_captured_model_in_training_mode_is_refused() -> None:
    model = Captured()
    model.drop = nn.Dropout(0.0)
    with (
        pytest.warns(errors.FallbackWarning, match="training mode"),
        pytest.raises(errors.ParameterError, match=r"call model\.eval\(\)"),
    ):
        ds.Problem(model, (X, Y))


class Tripled(nn.DataParallel):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * self.module(x)


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self._orig_mod = Net()

    def forward(self, x: Tensor) -> Tensor:
        return 3 * self._orig_mod(x)


def test_only_wrappers_that_change_nothing_are_taken_off() -> None:
    for model in (Tripled(Net()), Wrapped()):
        check(model)
    hooked_wrapper = nn.DataParallel(Net())
    hooked_wrapper.register_forward_hook(lambda *given: 3 * given[-1])
    with pytest.raises(errors.ParameterError, match="hooks are registered on a wrapper, DataParallel"):
        ds.Problem(hooked_wrapper, (X, Y))


def test_tables_with_a_largest_norm() -> None:
    ids = torch.randint(7, (12,), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 5, max_norm=1.0), nn.Linear(5, 3)).double()
    problem = ds.Problem(model, (ids, Y))
    model(ids)  # shortens the rows that are looked up, in place
    shortened = nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 3)).double()
    shortened.load_state_dict(model.state_dict())
    _, hessian = truth(shortened, lambda: functional.cross_entropy(shortened(ids), Y))
    assert error(ds.Hessian(problem).dense(), hessian) < 1e-9
    tied = nn.Sequential(nn.Embedding(7, 5, max_norm=1.0), nn.Linear(5, 7)).double()
    tied[1].weight = tied[0].weight
    with pytest.raises(errors.ParameterError, match="max_norm"):
        ds.Problem(tied, (ids, ids))


def test_caches_and_copies_that_are_none_are_refused() -> None:
    model = normed(parametrizations.spectral_norm)().eval()
    with parametrize.cached(), pytest.raises(errors.OptionError, match="cached"):
        ds.Problem(model, (X, Y))

    class Shared(Net):
        def __deepcopy__(self, memo: Any) -> Any:
            return self

    with pytest.raises(errors.ParameterError, match="shares parameters"):
        ds.Problem(nn.Sequential(Shared(), nn.Linear(3, 3).double()), (X, Y))

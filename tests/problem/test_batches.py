"""Data of any kind are the same examples at every pass, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, TensorDataset

import deepspectra as ds
from deepspectra import errors
from given import Net, X, Y, mlp, refused
from nets import CASES, Case, chunks
from reference import Reference, case_and_reference, error
from truth import truth


def test_more_inputs_than_labels() -> None:
    refused((errors.ShapeError, errors.DataError), "12.*11|11.*12", lambda: ds.Problem(mlp(), (X, Y[:11])))


def test_an_empty_loader() -> None:
    empty = TensorDataset(X[:0], Y[:0])
    for data in (DataLoader(empty), empty, [], (X[:0], Y[:0])):
        refused(errors.DataError, "empty|no (data|example|batch)|0 ", lambda data=data: ds.Problem(mlp(), data))


@pytest.mark.parametrize("data", [None, 3, "mnist", X], ids=["None", "int", "str", "tensor"])
def test_data_of_an_unknown_kind(data: Any) -> None:
    refused(errors.DataError, type(data).__name__, lambda: ds.Problem(mlp(), data))


def test_a_generator_is_used_up_after_one_pass() -> None:
    """It cannot be read again, so it is refused."""
    refused(errors.DataError, "generator", lambda: ds.Problem(mlp(), (b for b in chunks(X, Y, [6, 6]))))


class Listed(Dataset):
    """A data set as torchvision's are: a tensor and a Python int."""

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return X[index], int(Y[index])


def test_labels_as_python_integers() -> None:
    ref = Reference(Case(mlp(), [(X, Y)]))
    for data in (Listed(), DataLoader(Listed(), batch_size=5)):
        problem = ds.Problem(ref.case.model, data)
        assert error(ds.Hessian(problem).dense(), ref.hessian) < 1e-9


def test_inputs_of_another_precision_than_the_model() -> None:
    """Data follow the model's dtype."""
    model = mlp()
    ref = Reference(Case(model, [(X.float().double(), Y)]))
    problem = ds.Problem(model, (X.float(), Y))
    assert error(ds.Hessian(problem).dense(), ref.hessian) < 1e-9


class Noisy(Dataset):
    """Random augmentation: another input at every reading."""

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return X[index] + 0.1 * torch.randn(5, dtype=torch.float64), Y[index]


def test_random_augmentation() -> None:
    for data in (DataLoader(Noisy(), batch_size=4), DataLoader(Noisy(), batch_size=4, shuffle=True)):
        refused(errors.NondeterminismError, "augment|random|differ", lambda data=data: ds.Problem(mlp(), data))


def test_a_shuffling_loader_that_drops_its_last_batch() -> None:
    """Each pass leaves other examples out, so it is not one data set."""
    loader = DataLoader(TensorDataset(X, Y), batch_size=5, shuffle=True, drop_last=True)
    refused(errors.NondeterminismError, "differ|other|drop|shuffle", lambda: ds.Problem(mlp(), loader))


def test_a_shuffling_loader_gives_the_numbers_of_its_data() -> None:
    ref = Reference(Case(mlp(), [(X, Y)]))
    loader = DataLoader(TensorDataset(X, Y), batch_size=5, shuffle=True)
    problem = ds.Problem(ref.case.model, loader)
    assert problem.loss() == pytest.approx(ref.loss, rel=1e-12)
    for _ in range(2):
        assert error(ds.Hessian(problem).dense(), ref.hessian) < 1e-9


def test_a_loader_too_large_to_hold_is_read_at_every_pass() -> None:
    """In order it gives the same numbers; shuffled it would pair batches with other batches' graphs."""
    x = torch.randn(400, 5, dtype=torch.float64)
    model, data = mlp(), TensorDataset(x, torch.arange(400) % 3)
    whole = ds.Problem(model, DataLoader(data, batch_size=20))
    read = ds.Problem(model, DataLoader(data, batch_size=20), memory=60_000)
    v = torch.randn(whole.num_parameters, dtype=torch.float64)
    assert read.loss() == pytest.approx(whole.loss(), rel=1e-12)
    for operator in (ds.Hessian, ds.GaussNewton):
        assert error(operator(read) @ v, operator(whole) @ v) < 1e-9
    for part, operator in ds.decompose(read).items():
        assert error(operator @ v, ds.decompose(whole)[part] @ v) < 1e-9, part
    refused(
        errors.NondeterminismError,
        "shuffle.*memory",
        lambda: ds.Problem(model, DataLoader(data, batch_size=20, shuffle=True), memory=60_000),
    )


def test_dictionary_batches_are_read_by_forward() -> None:
    case, ref = case_and_reference("dict_batches")
    problem = case.problem()
    assert problem.num_examples == 13
    assert error(ds.Hessian(problem).dense(), ref.hessian) < 1e-9


def test_dictionary_batches_without_forward_say_what_to_pass() -> None:
    case = CASES["dict_batches"]()
    refused(
        (errors.DataError, errors.ShapeError),
        "forward",
        lambda: ds.Problem(case.model, case.batches, loss=case.loss),
    )


def test_a_loader_of_dictionaries() -> None:
    case, ref = case_and_reference("dict_batches")
    x = torch.cat([b["inputs"] for b in case.batches])
    y = torch.cat([b["labels"] for b in case.batches])
    rows = [{"inputs": a, "labels": b} for a, b in zip(x, y, strict=True)]
    problem = case.problem(DataLoader(rows, batch_size=4, shuffle=True))
    assert error(ds.Hessian(problem).dense(), ref.hessian) < 1e-9


def test_data_overwritten_later_does_not_change_a_problem() -> None:
    x, y, net = X.clone(), Y.clone(), Net()
    gradient, hessian = truth(net, lambda: functional.cross_entropy(net(X), Y))
    problems = [ds.Problem(Net(), data, batch_size=size) for data, size in (((x, y), None), ((x, y), 12))]
    problems.append(ds.Problem(Net(), [(x, y)], forward=lambda m, b: (m(b[0]), b[1])))
    x.zero_()
    y.zero_()
    buffer_x, buffer_y = torch.empty(3, 5, dtype=torch.float64), torch.empty(3, dtype=torch.long)

    def collate(rows: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        for j, (a, b) in enumerate(rows):
            buffer_x[j], buffer_y[j] = a, b
        return buffer_x[: len(rows)], buffer_y[: len(rows)]

    loader = DataLoader(TensorDataset(X, Y), batch_size=3, collate_fn=collate)
    problems += [ds.Problem(Net(), loader), ds.Problem(Net(), loader, memory=3000)]
    for problem in problems:
        v = torch.ones(problem.num_parameters, dtype=torch.float64)
        assert error(problem.gradient(), gradient) < 1e-12
        if problem.memory > 3000:
            assert error(ds.Hessian(problem) @ v, hessian @ v) < 1e-9


class Broken(Dataset):  # type: ignore[type-arg]
    def __init__(self, fault: str) -> None:
        self.fault = fault

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index == 7 and self.fault == "missing":
            raise OSError("no such image")
        return X[index][: 4 if index == 7 else 5], Y[index]


def test_data_sets_that_fail_midway_say_at_which_item() -> None:
    with pytest.raises(errors.DataError, match="item 7: OSError: no such image"):
        ds.Problem(Net(), Broken("missing"))
    with pytest.raises(errors.DataError, match=r"differ in shape.*item 0.*item 7.*collate_fn"):
        ds.Problem(Net(), Broken("ragged"))
    with pytest.raises(errors.DataError, match=r"batch 1.*no such image"):
        ds.Problem(Net(), DataLoader(Broken("missing"), batch_size=5))


def test_two_tensor_batches_with_a_forward_are_two_batches():
    batches = [torch.cat([X, Y[:, None]], 1), torch.cat([X[:5], Y[:5, None]], 1)]
    problem = ds.Problem(mlp(), batches, forward=lambda model, b: (model(b[:, :5]), b[:, 5].long()))
    assert problem.num_examples == 17


def test_numpy_arrays_are_named():
    with pytest.raises(errors.DataError, match="NumPy"):
        ds.Problem(mlp(), (X.numpy(), Y.numpy()))

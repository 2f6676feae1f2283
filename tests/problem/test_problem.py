"""Bad input gets an error that says what was given, or a warning and the right number."""

from __future__ import annotations

import copy
import re
import warnings
from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, TensorDataset

import deepspectra as ds
from deepspectra import errors
from nets import CASES, Case, chunks, labels
from reference import Reference, case_and_reference, error
from truth import OnceDifferentiable

X, Y = (
    torch.randn(12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),
    torch.arange(12) % 3,
)


def mlp(*middle: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), *(middle or (nn.Tanh(),)), nn.Linear(6, 3)).double()


def use(problem: Any) -> None:
    """What a user does with a problem, for faults that may be found only then."""
    problem.loss()
    problem.gradient()
    v = torch.ones(problem.num_parameters, dtype=torch.float64)
    for operator in (ds.Hessian, ds.GaussNewton):
        operator(problem) @ v


def refused(kinds: type | tuple[type, ...], words: str, build: Callable[[], Any]) -> BaseException:
    """The error that building or using a problem raises: of this tree and kind, naming what was given."""
    with pytest.raises(kinds, match=f"(?is){words}") as caught:
        use(build())
    assert isinstance(caught.value, errors.DeepSpectraError)
    assert any(isinstance(caught.value, kind) for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))
    assert len(str(caught.value)) > 20, "an error says what was given, what was expected and what to do"
    return caught.value


BUILTINS = {
    errors.ShapeError: ValueError,
    errors.DataError: ValueError,
    errors.NonFiniteError: ArithmeticError,
    errors.NondeterminismError: RuntimeError,
    errors.ParameterError: ValueError,
    errors.LossError: ValueError,
    errors.CurvatureError: RuntimeError,
    errors.MemoryBudgetError: MemoryError,
    errors.OptionError: ValueError,
    errors.MissingNameError: KeyError,
    errors.FileError: OSError,
    errors.WorkerError: RuntimeError,
    errors.TargetError: ImportError,
}


def test_every_error_is_also_the_builtin_a_caller_expects() -> None:
    tree = {
        e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, errors.DeepSpectraError)
    }
    assert tree - {errors.DeepSpectraError} == set(BUILTINS)
    for kind, builtin in BUILTINS.items():
        assert issubclass(kind, builtin)
    assert issubclass(errors.FallbackWarning, errors.DeepSpectraWarning)
    assert issubclass(errors.DeepSpectraWarning, UserWarning)


# ------------------------------------------------------------------------------------------ shapes and labels


def test_more_inputs_than_labels() -> None:
    refused((errors.ShapeError, errors.DataError), "12.*11|11.*12", lambda: ds.Problem(mlp(), (X, Y[:11])))


def test_logits_of_another_length_than_the_labels() -> None:
    refused(
        (errors.ShapeError, errors.DataError),
        "4.*3|3.*4",
        lambda: ds.Problem(mlp(), [(X[:4], Y[:3])]),
    )


def test_labels_with_a_column_too_many() -> None:
    refused((errors.ShapeError, errors.DataError), r"\(12, 1\)", lambda: ds.Problem(mlp(), (X, Y[:, None])))


def test_a_scalar_output_is_not_broadcast_against_its_targets() -> None:
    """(N, 1) against (N,) would be a mean over N² pairs."""
    model = nn.Linear(5, 1).double()
    for loss in ("mse", nn.MSELoss()):
        refused(
            errors.ShapeError,
            r"\(12, 1\).*\(12,\)|\(12,\).*\(12, 1\)",
            lambda loss=loss: ds.Problem(model, (X, X[:, 0]), loss=loss),
        )


@pytest.mark.parametrize("label", [-1, 3, 1000])
def test_labels_out_of_range(label: int) -> None:
    wrong = Y.clone()
    wrong[7] = label
    refused(errors.DataError, str(label), lambda: ds.Problem(mlp(), (X, wrong)))
    refused(errors.DataError, str(label), lambda: ds.Problem(mlp(), chunks(X, wrong, [6, 6])))


def test_labels_out_of_range_in_tokens() -> None:
    case = CASES["token_classes"]()
    tokens, targets = case.tensors
    targets = targets.clone()
    targets[1, 2] = 5
    refused(errors.DataError, "5", lambda: case.problem((tokens, targets)))


def test_float_labels() -> None:
    refused((errors.DataError, errors.ShapeError), "float", lambda: ds.Problem(mlp(), (X, Y.double())))


def test_integer_targets_of_a_regression() -> None:
    """A class index is no target of a squared error: refused, or an error of shape."""
    refused((errors.DataError, errors.ShapeError), ".", lambda: ds.Problem(mlp(), (X, Y), loss="mse"))


def test_a_model_that_fails_on_its_data() -> None:
    """What the network says about the shape is kept."""
    with pytest.raises((errors.DeepSpectraError, RuntimeError), match="mat1 and mat2"):
        ds.Problem(mlp(), (X[:, :4], Y))


def test_every_label_ignored() -> None:
    refused(errors.DataError, "ignore", lambda: ds.Problem(mlp(), (X, torch.full((12,), -100))))


# ------------------------------------------------------------------------------------------------- not finite


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_not_finite(value: float) -> None:
    model = mlp()
    with torch.no_grad():
        model[2].weight[1, 1] = value
    caught = refused(errors.NonFiniteError, "2.weight", lambda: ds.Problem(model, (X, Y)))
    assert isinstance(caught, ArithmeticError)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_inputs_not_finite(value: float) -> None:
    spoilt = X.clone()
    spoilt[3, 2] = value
    refused(
        (errors.DataError, errors.NonFiniteError), "nan|inf|finite", lambda: ds.Problem(mlp(), (spoilt, Y))
    )


def test_a_buffer_not_finite() -> None:
    """A NaN that only the outputs show."""
    case = CASES["conv_batchnorm"]()
    case.model[1].running_mean[0] = float("nan")
    refused(errors.NonFiniteError, "nan|finite", case.problem)


# ------------------------------------------------------------------------------------------------------- data


def test_an_empty_loader() -> None:
    empty = TensorDataset(X[:0], Y[:0])
    for data in (DataLoader(empty), empty, [], (X[:0], Y[:0])):
        refused(
            errors.DataError, "empty|no (data|example|batch)|0 ", lambda data=data: ds.Problem(mlp(), data)
        )


@pytest.mark.parametrize("data", [None, 3, "mnist", X], ids=["None", "int", "str", "tensor"])
def test_data_of_an_unknown_kind(data: Any) -> None:
    refused(errors.DataError, type(data).__name__, lambda: ds.Problem(mlp(), data))


def test_a_generator_is_used_up_after_one_pass() -> None:
    """It cannot be read again, so it is refused; or it is kept, and every number is right."""
    ref = Reference(Case(mlp(), [(X, Y)]))
    try:
        problem = ds.Problem(ref.case.model, (batch for batch in chunks(X, Y, [6, 6])))
    except errors.DataError:
        return
    assert error(ds.Hessian(problem).dense(), ref.hessian) < 1e-9


def test_an_absent_class_changes_nothing_else() -> None:
    case, ref = case_and_reference("absent_class")
    problem = case.problem()
    assert problem.num_classes == 4
    assert error(ds.Hessian(problem).dense(), ref.hessian) < 1e-9


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


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int16])
def test_labels_of_another_integer_type(dtype: torch.dtype) -> None:
    """Understood, or refused by name; not PyTorch's complaint from inside."""
    ref = Reference(Case(mlp(), [(X, Y)]))
    try:
        problem = ds.Problem(ref.case.model, (X, Y.to(dtype)))
    except errors.DataError:
        return
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
        refused(
            errors.NondeterminismError, "augment|random|differ", lambda data=data: ds.Problem(mlp(), data)
        )


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


def test_reading_the_data_leaves_the_global_random_state_alone() -> None:
    """No draw from the global generator: a training run around a measurement is the run without it."""
    case = CASES["relu_mlp"]()
    before = torch.get_rng_state()
    use(case.problem())
    assert torch.equal(torch.get_rng_state(), before)


# ----------------------------------------------------------------------------------------------------- memory


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


def test_a_graph_that_does_not_fit_says_what_to_lower() -> None:
    model = nn.Sequential(nn.Linear(5, 64), nn.Tanh(), nn.Linear(64, 3)).double()
    for operator in (ds.Hessian, ds.GaussNewton):
        problem = ds.Problem(model, (X, Y), memory="5KB")
        with pytest.raises(errors.MemoryBudgetError, match=r"batch_size.*memory") as caught:
            operator(problem) @ torch.ones(problem.num_parameters, dtype=torch.float64)
        assert isinstance(caught.value, MemoryError)


@pytest.mark.parametrize("memory", ["much", -1, 0, "8 parsecs"])
def test_memory_that_is_no_size(memory: Any) -> None:
    refused(errors.OptionError, re.escape(str(memory)), lambda: ds.Problem(mlp(), (X, Y), memory=memory))


@pytest.mark.parametrize("batch_size", [0, -3, 2.5, "all"])
def test_batch_sizes_that_are_no_counts(batch_size: Any) -> None:
    refused(
        errors.OptionError,
        re.escape(str(batch_size)),
        lambda: ds.Problem(mlp(), (X, Y), batch_size=batch_size),
    )


# ------------------------------------------------------------------------------------------------- parameters


@pytest.mark.parametrize("glob", ["encoder.*", "", ["nothing", "here.*"]])
def test_a_glob_that_matches_nothing(glob: Any) -> None:
    word = glob if isinstance(glob, str) else glob[0]
    caught = refused(errors.ParameterError, word, lambda: ds.Problem(mlp(), (X, Y), parameters=glob))
    assert "0.weight" in str(caught), "the message lists what there is"
    problem = ds.Problem(mlp(), (X, Y))
    with pytest.raises(errors.ParameterError):
        problem.restrict(glob)


def test_nothing_left_to_differentiate() -> None:
    model = mlp()
    model.requires_grad_(False)
    refused(errors.ParameterError, "grad|frozen|train", lambda: ds.Problem(model, (X, Y)))


def test_a_glob_that_matches_only_frozen_parameters() -> None:
    case = CASES["frozen_parameter"]()
    refused(errors.ParameterError, "2.weight", lambda: case.problem(parameters="2.weight"))


def test_frozen_parameters_stay_frozen_and_are_held_fixed() -> None:
    case, ref = CASES["frozen_parameter"](), case_and_reference("frozen_parameter")[1]
    problem = case.problem()
    assert error(ds.Hessian(problem).dense(), ref.hessian) < 1e-9
    assert [n for n, p in case.model.named_parameters() if not p.requires_grad] == ["0.bias", "2.weight"]


def test_unused_parameters_alone_have_no_curvature() -> None:
    case = CASES["unused_parameter"]()
    problem = case.problem(parameters="unused.*")
    assert problem.gradient().abs().max() == 0
    for operator in (ds.Hessian, ds.GaussNewton, ds.Residual, ds.EmpiricalFisher):
        assert operator(problem).dense().abs().max() == 0


def test_a_glob_on_the_other_name_of_a_tied_weight() -> None:
    """The weight is listed once; its second name finds it, or is refused. It is not left out in silence."""
    case, ref = case_and_reference("tied_modules")
    try:
        problem = case.problem(parameters="output.*")
    except errors.ParameterError:
        return
    expected = ref.block(ref.hessian, "embedding.weight", "output.bias")
    assert error(ds.Hessian(problem).dense(), expected) < 1e-9


def test_flatten_refuses_other_names_and_shapes() -> None:
    problem = ds.Problem(mlp(), (X, Y))
    tree = problem.unflatten(problem.gradient())
    missing = {n: t for n, t in tree.items() if n != "0.bias"}
    with pytest.raises((errors.ParameterError, errors.ShapeError), match=r"0\.bias"):
        problem.flatten(missing)
    with pytest.raises(errors.ShapeError, match=r"0\.weight"):
        problem.flatten(tree | {"0.weight": torch.zeros(5, 6, dtype=torch.float64)})
    with pytest.raises(errors.ShapeError, match=str(problem.num_parameters)):
        problem.unflatten(torch.zeros(problem.num_parameters + 1, dtype=torch.float64))


# ---------------------------------------------------------------------------------------- train mode, dropout


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


class OverBatch(nn.Module):
    """Attention of each example to all others of its batch."""

    def forward(self, x: Tensor) -> Tensor:
        return (x @ x.T).softmax(-1) @ x


@pytest.mark.parametrize("batch_size", [5, 12])
def test_examples_that_influence_each_other(batch_size: int) -> None:
    without_statistics = mlp(nn.BatchNorm1d(6, track_running_stats=False)).eval()
    caught = refused(
        errors.DataError,
        "influence each other.*batch_size",
        lambda: ds.Problem(without_statistics, (X, Y), batch_size=batch_size),
    )
    assert "'1'" in str(caught), "the module is named"
    assert "track_running_stats" in str(caught)
    refused(
        errors.DataError,
        "influence each other",
        lambda: ds.Problem(mlp(OverBatch()), (X, Y), batch_size=batch_size),
    )


def test_examples_in_a_fixed_order_that_labels_would_sort() -> None:
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()
            self.register_buffer("neighbours", torch.eye(12).roll(1, 0).double())

        def forward(self, x: Tensor) -> Tensor:
            return self.neighbours @ self.inner(x)

    graph = Graph()
    expected = Reference(Case(graph, [(X, Y)])).hessian
    for data in ((X, Y), [(X, Y)]):
        problem = ds.Problem(graph, data)
        assert not problem.cuts
        assert error(ds.Hessian(problem).dense(), expected) < 1e-9


def test_positions_that_come_before_examples_may_influence_each_other() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.last = nn.RNN(5, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.rnn(x)[0].flip(0).cumsum(0))

    x, y = torch.randn(6, 4, 5, dtype=torch.float64), torch.arange(24).view(6, 4) % 3
    assert ds.Problem(Recurrent().double(), [(x, y)]).num_examples == 24


def test_dropout_that_is_always_on() -> None:
    class AlwaysOn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, x: Tensor) -> Tensor:
            return functional.dropout(self.inner(x), 0.3, training=True)

    refused(errors.NondeterminismError, "dropout|random|differ", lambda: ds.Problem(AlwaysOn(), (X, Y)))


def test_a_model_whose_state_moves_with_every_call() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.inner(x) * (1 + 0.01 * self.calls)

    refused(errors.NondeterminismError, "differ", lambda: ds.Problem(Counting(), (X, Y)))


# --------------------------------------------------------------------------------------- no second derivative


class WrongTwice(torch.autograd.Function):
    """tanh, whose backward is right and whose second derivative is silently zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = torch.tanh(x)
        ctx.slope = (1 - y**2).detach()
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.slope


class Custom(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(x)


@pytest.mark.parametrize("function", [OnceDifferentiable, WrongTwice])
def test_an_op_with_no_or_a_wrong_second_derivative(function: Any) -> None:
    torch.manual_seed(3)
    model = mlp(Custom(function))

    def product() -> Any:
        problem = ds.Problem(model, (X, Y))
        return ds.Hessian(problem) @ torch.randn(problem.num_parameters, dtype=torch.float64)

    with pytest.raises(errors.CurvatureError, match=r"(?i)second|deriv|finite difference") as caught:
        product()
    assert isinstance(caught.value, RuntimeError)


@pytest.mark.parametrize("function", [OnceDifferentiable, WrongTwice])
def test_gauss_newton_needs_first_derivatives_only(function: Any) -> None:
    """Right, or refused; not wrong."""
    torch.manual_seed(3)
    model, right = mlp(Custom(function)), mlp()
    right.load_state_dict(model.state_dict())
    try:
        dense = ds.GaussNewton(ds.Problem(model, (X, Y))).dense()
    except errors.CurvatureError:
        return
    assert error(dense, Reference(Case(right, [(X, Y)])).gauss_newton) < 1e-9


def test_weight_norm_has_a_wrong_second_derivative_in_pytorch() -> None:
    """Its fused kernel fails `gradgradcheck` (torch 2.13, CPU): refused, or right some other way.

    G, which needs first derivatives only, is right.
    """
    torch.manual_seed(5)
    fused = mlp()
    nn.utils.parametrizations.weight_norm(fused[0])
    with torch.no_grad():
        fused[0].parametrizations.weight.original0.mul_(1.5)

    class Plain(nn.Module):
        def forward(self, length: Tensor, direction: Tensor) -> Tensor:
            return direction * (length / direction.norm(dim=1, keepdim=True))

        def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
            return weight.norm(dim=1, keepdim=True), weight

    plain = mlp()
    nn.utils.parametrize.register_parametrization(plain[0], "weight", Plain())
    plain.load_state_dict(fused.state_dict())
    ref, problem = Reference(Case(plain, [(X, Y)])), ds.Problem(fused, (X, Y))
    assert list(problem.parameter_names) == list(ref.parameters)
    assert error(ds.GaussNewton(problem).dense(), ref.gauss_newton) < 1e-9
    assert error(ds.Hessian(ds.Problem(plain, (X, Y))).dense(), ref.hessian) < 1e-9
    for kind, operator in (("hessian", ds.Hessian), ("residual", ds.Residual)):
        try:
            matrix = operator(problem).dense()
        except errors.CurvatureError:
            continue
        assert error(matrix, getattr(ref, kind)) < 1e-9, kind


@pytest.mark.parametrize("name", ["attention_module", "attention_function", "layernorm_gelu"])
def test_transformers_pass_the_curvature_check(name: str) -> None:
    """Fused attention and layer norm are known traps, and no fault of the user's."""
    use(CASES[name]().problem())


# ------------------------------------------------------------------------------------------------------- loss


@pytest.mark.parametrize("loss", ["huber", "", 3, None])
def test_an_unknown_loss(loss: Any) -> None:
    words = repr(loss) if isinstance(loss, str) else type(loss).__name__
    refused(errors.LossError, words, lambda: ds.Problem(mlp(), (X, Y), loss=loss))


def per_example(z: Tensor, y: Tensor) -> Tensor:
    return functional.cross_entropy(z, y, reduction="none")


def test_a_loss_that_returns_one_number_an_example() -> None:
    refused(errors.LossError, "mean|scalar|12", lambda: ds.Problem(mlp(), (X, Y), loss=per_example))


def test_a_loss_that_returns_no_tensor() -> None:
    refused(errors.LossError, "float", lambda: ds.Problem(mlp(), (X, Y), loss=lambda z, y: 0.5))


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_loss_module_that_is_not_a_mean(reduction: str) -> None:
    for module, target in (
        (nn.CrossEntropyLoss(reduction=reduction), Y),
        (nn.MSELoss(reduction=reduction), X[:, :3]),
    ):
        refused(
            errors.LossError,
            reduction,
            lambda module=module, target=target: ds.Problem(mlp(), (X, target), loss=module),
        )


def test_the_names_of_losses_are_the_modules() -> None:
    for name, module, target in (
        ("cross_entropy", nn.CrossEntropyLoss(), Y),
        ("mse", nn.MSELoss(), X[:, :3]),
    ):
        model = mlp()
        named, given = (ds.Problem(model, (X, target), loss=loss) for loss in (name, module))
        assert named.loss() == pytest.approx(given.loss(), rel=1e-14)
        assert error(named.gradient(), given.gradient()) < 1e-13


# ---------------------------------------------------------------------------------------------------- forward


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


def test_forward_must_return_outputs_and_targets() -> None:
    refused(
        (errors.DataError, errors.ShapeError),
        "forward",
        lambda: ds.Problem(mlp(), (X, Y), forward=lambda model, batch: model(batch[0])),
    )


def test_outputs_may_be_anything_a_loss_of_one_s_own_understands() -> None:
    """A scalar output for each example, and a loss of one's own."""
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1), nn.Flatten(0)).double()

    def loss(z: Tensor, y: Tensor) -> Tensor:
        return functional.softplus(-z * (2.0 * y - 1.0)).mean()

    y = (Y == 1).double()
    problem = ds.Problem(model, chunks(X, y, [7, 5]), loss=loss)
    parameters = list(model.parameters())
    total = loss(model(X), y)
    gradient = torch.autograd.grad(total, parameters, create_graph=True)
    flat = torch.cat([g.flatten() for g in gradient])
    rows = [
        torch.autograd.grad(entry, parameters, retain_graph=True, materialize_grads=True) for entry in flat
    ]
    expected = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    assert problem.loss() == pytest.approx(total.item(), rel=1e-12)
    assert error(ds.Hessian(problem).dense(), expected) < 1e-9


def test_labels_helper_covers_every_class() -> None:
    assert set(labels(9, 4).tolist()) == {0, 1, 2, 3}


# ------------------------------------------------------------------------------------------- arguments, batches


def test_a_device_that_is_not_there() -> None:
    refused(errors.OptionError, "nodevice", lambda: ds.Problem(mlp(), (X, Y), device="nodevice"))
    refused(errors.OptionError, "cuda:99", lambda: ds.Problem(mlp(), (X, Y), device="cuda:99"))


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, "float64"])
def test_a_dtype_that_is_not_of_real_numbers(dtype: Any) -> None:
    refused(
        errors.OptionError,
        re.escape(str(dtype)),
        lambda: ds.Problem(mlp(), (X, Y), dtype=dtype),
    )


def test_parameters_and_forward_of_the_wrong_type() -> None:
    refused(errors.ParameterError, "glob.*3", lambda: ds.Problem(mlp(), (X, Y), parameters=3))  # type: ignore[arg-type]
    refused(errors.OptionError, "forward.*3", lambda: ds.Problem(mlp(), (X, Y), forward=3))  # type: ignore[arg-type]


@pytest.mark.parametrize("inputs", [X[:, :4], (X > 0).long()])
def test_inputs_that_the_model_does_not_take_are_told(inputs: Tensor) -> None:
    caught = refused(errors.DataError, "failed.*mat1 and mat2", lambda: ds.Problem(mlp(), (inputs, Y)))
    assert isinstance(caught.__cause__, RuntimeError)
    assert str(tuple(inputs.shape)) in str(caught)


def test_batches_suit_the_network_unless_their_size_is_given() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2000, 5, dtype=torch.float64, generator=generator), torch.arange(2000) % 3
    wide = nn.Sequential(nn.Linear(5, 5000), nn.Tanh(), nn.Linear(5000, 3)).double()

    def sizes(model: nn.Module, data: Any, **options: Any) -> list[int]:
        return [len(labels) for _, labels in ds.Problem(model, data, **options).batches]

    assert sizes(mlp(), (x, y)) == sizes(mlp(), TensorDataset(x, y)) == [2000]
    found = sizes(wide, (x, y))  # 40 kB an example: about 840 make 32 MiB
    assert found == [1000, 1000]
    assert sizes(wide, (x, y), memory="100MB")[0] < 100
    loader = DataLoader(TensorDataset(x, y), batch_size=500)
    assert sizes(mlp(), (x, y), batch_size=500) == sizes(mlp(), loader) == [500] * 4
    pair = sizes(nn.Linear(5, 1).double(), (x, x[:, :1]), loss="mse")
    assert pair == [2000]
    alike = [ds.Problem(wide, (x, y), batch_size=size).gradient() for size in (None, 300)]
    assert torch.allclose(*alike, rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_is_told(reentrant: bool) -> None:
    class Recomputed(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(super().forward, x, use_reentrant=reentrant)

    network = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), Recomputed(5, 3))
    with pytest.raises(errors.CurvatureError, match="activation checkpointing must be off"):
        ds.Problem(network, (torch.randn(6, 4), torch.arange(6) % 3))


@pytest.mark.parametrize(
    "entry", [ds.Hessian, ds.GaussNewton, ds.class_means, ds.decompose, ds.principal_subspace, ds.analyze]
)
def test_a_model_in_place_of_a_problem(entry: Any) -> None:
    with pytest.raises(errors.OptionError, match=r"expected a deepspectra\.Problem.*got Linear"):
        entry(nn.Linear(4, 3))


def test_models_that_cannot_be_copied_as_they_are() -> None:
    lazy = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 3))
    refused(errors.ParameterError, "lazy", lambda: ds.Problem(lazy, (X, Y)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.trace(mlp(), X)
    refused(errors.ParameterError, "jit", lambda: ds.Problem(scripted, (X, Y)))


def test_complex_parameters_and_buffers_are_refused() -> None:
    buffered = mlp()
    buffered.register_buffer("phase", torch.ones(2, dtype=torch.complex128))
    refused(errors.ParameterError, "'phase' is complex", lambda: ds.Problem(buffered, (X, Y)))
    owner = mlp()
    owner.register_parameter("phase", nn.Parameter(torch.ones(2, dtype=torch.complex128)))
    refused(errors.ParameterError, "'phase' is complex", lambda: ds.Problem(owner, (X, Y)))


@pytest.mark.parametrize("loss", [nn.TripletMarginLoss(), nn.CTCLoss(), nn.KLDivLoss(reduction="batchmean")])
def test_losses_that_do_not_take_outputs_and_labels(loss: nn.Module) -> None:
    caught = refused(
        errors.LossError, rf"{type(loss).__name__}.*failed", lambda: ds.Problem(mlp(), (X, Y), loss=loss)
    )
    assert caught.__cause__ is not None


def test_binary_targets_may_be_integers() -> None:
    targets, model = (X[:, :3] > 0).long(), mlp()
    ours = ds.Problem(model, (X, targets), nn.BCEWithLogitsLoss())
    theirs = ds.Problem(model, (X, targets.double()), nn.BCEWithLogitsLoss())
    assert ours.loss() == pytest.approx(theirs.loss(), rel=1e-14)


class Encoding(UserDict):  # type: ignore[type-arg]
    """A mapping whose entries are attributes too."""

    def __getattr__(self, name: str) -> Any:
        if name == "data":
            raise AttributeError(name)
        return self.data[name]


@dataclass(frozen=True)
class Pair:
    x: Tensor
    y: Tensor
    note: str = ""


@pytest.mark.parametrize("kind", [Encoding, Pair])
def test_batches_keep_their_class(kind: Any) -> None:
    def forward(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        return model(batch.x), batch.y

    model = mlp()
    batches = [kind(x=X[:8].float(), y=Y[:8]), kind(x=X[8:].float(), y=Y[8:])]
    problem = ds.Problem(model, batches, forward=forward)
    assert problem.loss() == pytest.approx(ds.Problem(model, (X.float(), Y)).loss(), rel=1e-14)
    assert batches[0].x.dtype == torch.float32, "what was given is as it was"


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
    said = ds.Problem(
        model, [batch], forward=lambda model, pair: (model(pair[0]).flatten(0, -2), pair[1].flatten())
    )
    last = functional.cross_entropy(model(batch[0]).movedim(-1, 1), batch[1])
    assert said.loss() == pytest.approx(float(last.detach()), rel=1e-12)

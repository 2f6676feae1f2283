"""What cannot be used is refused beforehand, or found out by a gradient of one batch, and said."""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import CheckpointFunction

import deepspectra as ds
from deepspectra import errors
from given import Net, X, Y, mlp, refused
from nets import CASES


def test_a_model_that_fails_on_its_data() -> None:
    """What the network says about the shape is kept."""
    with pytest.raises((errors.DeepSpectraError, RuntimeError), match="mat1 and mat2"):
        ds.Problem(mlp(), (X[:, :4], Y))


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
    refused((errors.DataError, errors.NonFiniteError), "nan|inf|finite", lambda: ds.Problem(mlp(), (spoilt, Y)))


def test_a_buffer_not_finite() -> None:
    """A NaN that only the outputs show."""
    case = CASES["conv_batchnorm"]()
    case.model[1].running_mean[0] = float("nan")
    refused(errors.NonFiniteError, "nan|finite", case.problem)


@pytest.mark.parametrize("batch_size", [0, -3, 2.5, "all"])
def test_batch_sizes_that_are_no_counts(batch_size: Any) -> None:
    refused(
        errors.OptionError,
        re.escape(str(batch_size)),
        lambda: ds.Problem(mlp(), (X, Y), batch_size=batch_size),
    )


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


def test_forward_must_return_outputs_and_targets() -> None:
    refused(
        (errors.DataError, errors.ShapeError),
        "forward",
        lambda: ds.Problem(mlp(), (X, Y), forward=lambda model, batch: model(batch[0])),
    )


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


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_checkpointing_by_other_functions_than_checkpoint_is_told() -> None:
    class Recomputed(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return CheckpointFunction.apply(super().forward, True, x)

    network = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), Recomputed(5, 3))
    with pytest.raises(errors.CurvatureError, match="activation checkpointing must be off"):
        ds.Problem(network, (torch.randn(6, 4), torch.arange(6) % 3))


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


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w.T

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return g @ w, g.T @ x


class Hidden(Net):
    """A listed parameter that only a custom function sees."""

    def __init__(self) -> None:
        super().__init__()
        self.mine = [self.a.weight]

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.tanh(Product.apply(x, self.mine[0])))


class Stale(Net):
    """A weight computed at the first pass, with its graph."""

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "doubled"):
            object.__setattr__(self, "doubled", 2 * self.a.weight)
        return self.o(torch.tanh(x @ self.doubled.T))


@pytest.mark.parametrize("make", [Hidden, Stale])
def test_ways_that_cannot_be_followed_name_the_parameters(make: Callable[[], nn.Module]) -> None:
    model = make()
    model(X)
    with pytest.raises(errors.ParameterError, match=r"a\.weight"):
        ds.Problem(model, (X, Y))


def test_a_loss_that_reads_parameters_is_refused() -> None:
    model = Net()

    def decayed(outputs: Tensor, targets: Tensor) -> Tensor:
        penalty = sum(p.square().sum() for p in model.o.parameters())
        return functional.cross_entropy(outputs, targets) + 0.1 * penalty

    with pytest.raises(errors.LossError, match=r"o\.bias, o\.weight.*weight decay"):
        ds.Problem(model, (X, Y), loss=decayed)


def test_lower_precision_inside_the_network_is_told() -> None:
    class Cast(Net):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return super().forward(x)

    with pytest.warns(errors.FallbackWarning, match="bfloat16 inside"):
        ds.Problem(Cast().float(), (X.float(), Y))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit
def test_modules_that_cannot_be_followed_are_named() -> None:
    scripted = nn.Sequential(torch.jit.trace(nn.Linear(5, 4).double(), X), nn.Linear(4, 3).double())
    with pytest.raises(errors.ParameterError, match=r"module '0'.*jit"):
        ds.Problem(scripted, (X, Y))
    locked = Net()
    locked.lock = threading.Lock()
    with pytest.raises(errors.ParameterError, match=r"cannot be copied.*lock"):
        ds.Problem(locked, (X, Y))

    class Blind(Net):
        @torch.inference_mode()
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    with pytest.raises(errors.ParameterError, match="inference_mode"):
        ds.Problem(Blind(), (X, Y))


def test_a_forward_that_ignores_the_model_is_refused():
    net, other = mlp(), mlp()
    with pytest.raises(errors.ParameterError, match="forward="):
        ds.Problem(net, [{"x": X, "y": Y}], forward=lambda model, batch: (other(batch["x"]), batch["y"]))

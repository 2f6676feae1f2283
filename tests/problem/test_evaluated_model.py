"""Numbers are those of the model as given, however it reaches its parameters and whatever its forward pass does."""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, prune, spectral_norm
from torch.utils import checkpoint

import deepspectra as ds
from deepspectra import errors
from deepspectra.problem.plain_operations import PLAIN
from given import Captured, Net, X, Y, check, normed
from reference import error
from truth import truth

# ----------------------------------------------------------------------- parameters reached by another way


class Kept(Net):
    """A dictionary of lists of its own parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.mine = {"weights": [self.a.weight, self.o.weight]}

    def forward(self, x: Tensor) -> Tensor:
        first, last = self.mine["weights"]
        return torch.tanh(x @ first.T) @ last.T + self.o.bias


class Weak(Net):
    def __init__(self) -> None:
        super().__init__()
        self.first = weakref.ref(self.a)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.tanh(self.first()(x)))


GLOBAL: dict[str, nn.Module] = {}


class Global(Net):
    def __init__(self) -> None:
        super().__init__()
        GLOBAL["first"] = self.a

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.tanh(GLOBAL["first"](x)))


class Cached(Net):
    """A weight kept by another name, outside of the registered ones."""

    def __init__(self) -> None:
        super().__init__()
        object.__setattr__(self, "table", self.a.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.tanh(torch.addmm(self.a.bias, x, self.table.T)))


def hooked() -> nn.Module:
    net = Net()
    net.extra = nn.Linear(5, 4, bias=False).double()
    net.a.register_forward_hook(lambda _, given, out: out + net.extra(given[0]))
    net.o.register_forward_pre_hook(lambda _, given: (given[0] * net.a.weight.square().sum(),))
    return net


@pytest.mark.parametrize("make", [Net, Kept, Captured, Weak, Global, Cached, hooked])
def test_parameters_are_followed_wherever_the_network_reaches_them(make: Callable[[], nn.Module]) -> None:
    model = make()
    problem = check(model)
    product = ds.Hessian(problem) @ torch.ones(problem.num_parameters, dtype=torch.float64)
    with torch.no_grad():  # later training of what was captured does not change the problem
        for p in model.parameters():
            p.mul_(2)
    again = ds.Hessian(problem) @ torch.ones(problem.num_parameters, dtype=torch.float64)
    assert torch.equal(product, again)


def test_only_the_selected_of_captured_parameters_vary() -> None:
    model = Captured()
    whole, some = ds.Problem(model, (X, Y)), ds.Problem(model, (X, Y), parameters="o.*")
    size = some.num_parameters
    assert error(ds.Hessian(some).dense(), ds.Hessian(whole).dense()[-size:, -size:]) < 1e-12
    assert (
        error(
            ds.gram_spectrum(whole).values[:4],
            torch.linalg.eigvalsh(ds.GaussNewton(whole).dense()).flip(0)[:4],
        )
        < 1e-9
    )


def test_forward_that_captured_the_model() -> None:
    model = Net()
    check(model, [(X, Y)], forward=lambda _, batch: (model(batch[0]), batch[1]))


def test_constants_of_other_models_are_no_parameters() -> None:
    """A teacher that needs gradients of its own, in forward= and in the loss."""
    model, teacher = Net(), Net()

    def distilled(outputs: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(outputs, targets) + 0.1 * teacher.o.bias.square().sum()

    problem = ds.Problem(model, [(X, Y)], loss=distilled, forward=lambda m, b: (m(b[0]) + teacher(b[0]), b[1]))
    _, hessian = truth(model, lambda: functional.cross_entropy(model(X) + teacher(X).detach(), Y))
    assert error(ds.Hessian(problem).dense(), hessian) < 1e-9


# ------------------------------------------------------------------------------- what the forward pass does


class Physics(nn.Module):
    """Derivatives with respect to the input, by autograd or by torch.func."""

    def __init__(self, *, functional_way: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 1)).double()
        self.functional_way = functional_way

    def forward(self, x: Tensor) -> Tensor:
        if self.functional_way:
            slope = torch.func.vmap(torch.func.grad(lambda z: self.net(z).squeeze(-1)))(x)
        else:
            x = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.net(x).sum(), x, create_graph=True)
        return slope.sum(1, keepdim=True) + self.net(x)


@pytest.mark.parametrize("functional_way", [False, True])
def test_forward_passes_that_differentiate(functional_way: bool) -> None:
    model, x, t = Physics(functional_way=functional_way), X[:, :2], X[:, 2:3]
    check(model, (x, t), lambda: functional.mse_loss(model(x), t), loss="mse")


class Writing(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mul_(2).clamp_(-1, 1))


def test_forward_passes_that_write_into_their_input() -> None:
    model, given = Writing(), X.clone()
    check(model, (given, Y), lambda: functional.cross_entropy(model(X.clone()), Y))
    assert torch.equal(given, X), "what was given is as it was"


def pruned() -> nn.Module:
    net = Net()
    prune.l1_unstructured(net.a, "weight", 0.4)
    return net


@pytest.mark.parametrize("make", [pruned, normed(spectral_norm), normed(parametrizations.spectral_norm)])
def test_weights_that_hooks_and_parametrizations_compute(make: Callable[[], nn.Module]) -> None:
    model = make()
    model(X)  # leaves a weight with a graph behind, which PyTorch does not copy
    check(model.eval())


class Polar(nn.Module):
    """Real parameters (…, 2) read as complex."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3)))

    def forward(self, x: Tensor) -> Tensor:
        return (torch.view_as_complex(self.w) @ x.to(torch.complex128).T).abs().T


def test_real_parameters_that_are_read_as_complex() -> None:
    check(Polar())


@pytest.mark.filterwarnings("ignore")  # of the compiler's own imports
def test_compiled_models_modules_and_functions_run_as_they_were_written() -> None:
    class Decorated(Net):
        @torch.compile(backend="eager")
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    inner = Net()
    inner.a = torch.compile(inner.a, backend="eager")
    captured = Net()
    captured.forward = torch.compile(captured.forward, backend="eager")
    for model in (torch.compile(Net(), backend="eager"), inner, captured, Decorated()):
        problem = check(model)
        assert problem.parameter_names == ("a.weight", "a.bias", "o.weight", "o.bias")


def test_autocast_and_inference_mode_around_a_call_are_refused() -> None:
    problem = ds.Problem(Net(), (X, Y))
    calls: list[Callable[[], Any]] = [
        lambda: ds.Problem(Net(), (X, Y)),
        problem.gradient,
        lambda: ds.Hessian(problem),
    ]
    for call in calls:
        with torch.autocast("cpu"), pytest.raises(errors.OptionError, match="autocast"):
            call()
        with torch.inference_mode(), pytest.raises(errors.OptionError, match="inference"):
            call()
    with torch.no_grad():
        assert float(problem.gradient().norm()) > 0


# ------------------------------------------------------------- ways that only some data take, and later changes


class Rarely(Captured):
    """Goes by the captured layer for rows with a flag, of which the first batch has none."""

    def forward(self, x: Tensor) -> Tensor:
        plain = torch.tanh(self.a(x))
        flagged = x[:, :1] > 5
        return self.o(torch.where(flagged, 2 * self.first(x), plain) if bool(flagged.any()) else plain)


def test_ways_that_other_batches_take_are_followed_too() -> None:
    x = X.clone()
    x[9, 0] = 7.0
    model = Rarely()
    check(model, [(x[:6], Y[:6]), (x[6:], Y[6:])], lambda: functional.cross_entropy(model(x), Y))


def test_what_is_captured_and_frozen_stays_as_it_was() -> None:
    model = Captured()
    model.a.requires_grad_(False)
    model.n = nn.BatchNorm1d(4).double()
    model.first = lambda x: model.n(torch.tanh(model.a(x)))
    model.eval()
    problem = check(model)
    before = problem.loss()
    with torch.no_grad():
        model.a.weight.mul_(2)
        model.n.running_mean.add_(1)
    assert problem.loss() == before
    assert problem.to(torch.float32).loss() == pytest.approx(before, rel=1e-5)
    assert len(list(ds.layers(problem, hessian=False))) > 0
    model.train()
    with pytest.raises(errors.ParameterError, match="its mode was set"):
        problem.loss()
    model.eval()
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    with pytest.raises(errors.ParameterError, match="exchanged"):
        problem.gradient()


def test_buffers_that_the_network_sets_itself_are_no_edits() -> None:
    class Counting(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros((), dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            self.calls = self.calls + 1
            return super().forward(x)

    check(Counting())


def test_hooks_on_tensors_inside_the_network_ask_for_gradients() -> None:
    class Watched(Net):
        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            h.register_hook(lambda g: None)
            return self.o(torch.tanh(h))

    check(Watched())


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_functions_are_differentiated_as_others(reentrant: bool) -> None:
    class Checkpointed(Net):
        def forward(self, x: Tensor) -> Tensor:
            run = functools.partial(checkpoint.checkpoint, use_reentrant=reentrant)
            return run(lambda h: self.o(torch.tanh(h)), run(self.a, x))

    before = [getattr(holder, name) for holder, name, _ in PLAIN]
    net = Checkpointed()
    check(net, mean=lambda: functional.cross_entropy(net.o(torch.tanh(net.a(X))), Y))
    assert [getattr(holder, name) for holder, name, _ in PLAIN] == before


def test_checkpointed_functions_tell_their_failures() -> None:
    class Failing(Net):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint.checkpoint(lambda h: h @ h, self.o(torch.tanh(self.a(x))), use_reentrant=False)

    with pytest.raises(errors.DataError, match="mat1 and mat2"):
        ds.Problem(Failing(), (X, Y))

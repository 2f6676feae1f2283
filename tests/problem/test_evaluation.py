"""Numbers are those of the model as given, however it reaches its parameters and whatever its forward pass does."""

from __future__ import annotations

import copy
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm
from torch.utils.data import DataLoader, Dataset, TensorDataset

import deepspectra as ds
from deepspectra import errors
from reference import error
from truth import OnceDifferentiable, truth

GENERATOR = torch.Generator().manual_seed(0)
X, Y = torch.randn(12, 5, dtype=torch.float64, generator=GENERATOR), torch.arange(12) % 3


def check(
    model: nn.Module, data: Any = None, mean: Callable[[], Tensor] | None = None, **options: Any
) -> ds.Problem:
    """Gradient, H and H = G + R are right."""
    gradient, hessian = truth(model, mean or (lambda: functional.cross_entropy(model(X), Y)))
    problem = ds.Problem(model, (X, Y) if data is None else data, **options)
    assert error(problem.gradient(), gradient) < 1e-12
    assert error(ds.Hessian(problem).dense(), hessian) < 1e-9
    parts = ds.GaussNewton(problem).dense() + ds.Residual(problem).dense()
    assert error(parts, hessian) < 1e-9
    return problem


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.o = nn.Linear(5, 4).double(), nn.Linear(4, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.tanh(self.a(x)))


# ----------------------------------------------------------------------- parameters reached by another way


class Kept(Net):
    """A dictionary of lists of its own parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.mine = {"weights": [self.a.weight, self.o.weight]}

    def forward(self, x: Tensor) -> Tensor:
        first, last = self.mine["weights"]
        return torch.tanh(x @ first.T) @ last.T + self.o.bias


class Captured(Net):
    """A function that captured the model, and a bound method of a module."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = (lambda x: torch.tanh(self.a(x))), self.o.forward

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x))


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


def test_constants_of_other_models_are_no_parameters() -> None:
    """A teacher that needs gradients of its own, in forward= and in the loss."""
    model, teacher = Net(), Net()

    def distilled(outputs: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(outputs, targets) + 0.1 * teacher.o.bias.square().sum()

    problem = ds.Problem(
        model, [(X, Y)], loss=distilled, forward=lambda m, b: (m(b[0]) + teacher(b[0]), b[1])
    )
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


def normed(norm: Callable[[nn.Module], nn.Module]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        net = Net()
        net.a = norm(net.a)
        return net

    return make


@pytest.mark.parametrize("make", [pruned, normed(spectral_norm), normed(parametrizations.spectral_norm)])
def test_weights_that_hooks_and_parametrizations_compute(make: Callable[[], nn.Module]) -> None:
    model = make()
    model(X)  # leaves a weight with a graph behind, which PyTorch does not copy
    check(model.eval())


class Polar(nn.Module):
    """Real parameters (…, 2) read as complex."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(
            torch.randn(3, 5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        )

    def forward(self, x: Tensor) -> Tensor:
        return (torch.view_as_complex(self.w) @ x.to(torch.complex128).T).abs().T


def test_real_parameters_that_are_read_as_complex() -> None:
    check(Polar())


def test_wrappers_are_taken_off() -> None:
    model, expected = Net(), ("a.weight", "a.bias", "o.weight", "o.bias")
    parallel = nn.DataParallel(model)
    _, hessian = truth(model, lambda: functional.cross_entropy(model(X), Y))
    problem = ds.Problem(parallel, (X, Y))
    assert problem.parameter_names == expected
    assert error(ds.Hessian(problem).dense(), hessian) < 1e-9


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
    bag = nn.Sequential(
        nn.EmbeddingBag(7, 5, mode=mode, padding_idx=padding, sparse=mode == "sum"), nn.Linear(5, 3)
    )
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
        nn.Sequential(nn.Embedding(7, 5, sparse=s), nn.Flatten(), nn.Linear(20, 3)).double()
        for s in (True, False)
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


def test_lower_precision_inside_the_network_is_told() -> None:
    class Cast(Net):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return super().forward(x)

    with pytest.warns(errors.FallbackWarning, match="bfloat16 inside"):
        ds.Problem(Cast().float(), (X.float(), Y))


def test_parameters_of_two_precisions_are_told() -> None:
    class Mixed(Net):
        def __init__(self) -> None:
            super().__init__()
            self.a.float()

        def forward(self, x: Tensor) -> Tensor:
            return self.o(torch.tanh(self.a(x.to(self.a.weight.dtype))).to(self.o.weight.dtype))

    with pytest.warns(errors.FallbackWarning, match=r"float32, torch\.float64.*float64"):
        problem = ds.Problem(Mixed(), (X, Y))
    assert problem.dtype == torch.float64


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


def test_first_derivatives_alone_are_enough_for_what_the_error_names() -> None:
    class Custom(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.o(OnceDifferentiable.apply(self.a(x)))

    once, plain = ds.Problem(Custom(), (X, Y)), ds.Problem(Net(), (X, Y))
    for operator in (ds.Hessian, ds.GaussNewton):
        with pytest.raises(errors.CurvatureError, match="class_means, gram_spectrum, layers"):
            operator(once)
    assert error(ds.gram_spectrum(once).values, ds.gram_spectrum(plain).values) < 1e-10
    assert error(ds.class_means(once).class_means, ds.class_means(plain).class_means) < 1e-10
    assert len(list(ds.layers(once, hessian=False))) == 2


# ------------------------------------------------------------------------------------------ use and reuse


def used() -> ds.Problem:
    problem = ds.Problem(Net(), (X, Y))
    ds.Hessian(problem) @ torch.ones(problem.num_parameters, dtype=torch.float64)
    return problem


def test_copies_and_pickles_of_used_problems_and_operators() -> None:
    problem = used()
    operator, v = ds.Hessian(problem), torch.ones(problem.num_parameters, dtype=torch.float64)
    for again in (copy.deepcopy, copy.copy, lambda thing: pickle.loads(pickle.dumps(thing))):
        twin = again(problem)
        assert error(ds.Hessian(twin) @ v, operator @ v) < 1e-13
        assert error(again(operator) @ v, operator @ v) < 1e-13
        assert twin.parameter_names == problem.parameter_names
    with pytest.raises(errors.ParameterError, match="copied or pickled"):
        copy.deepcopy(ds.Problem(Captured(), (X, Y)))


@pytest.mark.parametrize("edit", ["in place", "replaced"])
def test_weights_edited_after_the_problem_was_made_are_refused(edit: str) -> None:
    problem = used()
    weight = problem.model.o.weight
    with torch.no_grad():
        if edit == "in place":
            weight.mul_(2)
        else:
            weight.data = 2 * weight
    v = torch.ones(problem.num_parameters, dtype=torch.float64)
    calls: list[Callable[[], Any]] = [lambda: ds.Hessian(problem) @ v, problem.gradient, problem.loss]
    for call in calls:
        with pytest.raises(errors.ParameterError, match=r"edited.*o\.weight"):
            call()


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


def test_threads_leave_global_switches_as_they_were() -> None:
    before = torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.flash_sdp_enabled()
    problems, faults = [ds.Problem(Net(), (X, Y)) for _ in range(4)], []

    def work(problem: ds.Problem) -> None:
        operator, v = ds.Hessian(problem), torch.ones(problem.num_parameters, dtype=torch.float64)
        faults.extend(None for _ in range(20) if not (operator @ v).isfinite().all())

    threads = [threading.Thread(target=work, args=(problem,)) for problem in problems]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    assert before == (torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.flash_sdp_enabled())


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


# --------------------------------------------------------------------- batch norm of the one batch in hand


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
    plain, model.first = model.first, lambda x: model.n(torch.tanh(model.a(x)))
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
    assert callable(plain)


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

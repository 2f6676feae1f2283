"""The model as it is evaluated: a copy that does not train, its parameters replaced wherever it reaches them."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from deepspectra.errors import DataError, OptionError, ParameterError
from deepspectra.problem.batch_trees import map_tensors
from deepspectra.problem.batches import Pair
from deepspectra.problem.double_precision import DoubleThroughout, names_single
from deepspectra.problem.losses import Loss
from deepspectra.problem.model_copy import DROPOUTS, NORMS, named_tensors, twins
from deepspectra.problem.plain_operations import PLAIN

Tree = dict[str, Tensor]
Forward = Callable[[nn.Module, Any], Pair]


class Trial(NamedTuple):
    """A batch, and the outputs and targets that the network gave for it."""

    batch: Any
    pair: Pair


class Evaluated(nn.Module):
    """The problem's own copy of a model, with a forward function, evaluated at parameters given by name."""

    def __init__(self, model: nn.Module, function: Forward) -> None:
        super().__init__()
        self.model = model
        self.function = function
        # Parameter or buffer → other tensors by which the network reaches it: a list of its own parameters, or the
        # user's model, captured by a function or a hook. They are replaced too, operation by operation.
        self.aliases: dict[str, list[Tensor]] = {}
        self.suspects: set[int] = set()  # identities of what would be aliases, while the problem is made
        self.is_caught = False  # operations were given some of them
        self.original: list[tuple[dict[str, Any], str, Any]] = []  # where what was captured stood
        self.differentiates = False  # the forward pass takes derivatives itself, and does not run without gradients
        self.writes = False  # the forward pass writes into its batch, and is given copies
        self.narrows = True  # operations may be asked for float32 by name: known by `stamp`, of the passes before
        self.asks = False  # they were asked in a pass that was watched
        self.written: set[str] = set()  # buffers that the forward pass writes into
        self.stamps: dict[str, Stamp] = {}  # how other buffers and the parameters were when the problem was made

    def forward(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Outputs and targets."""
        pair = self.function(self.model, batch)
        if not isinstance(pair, tuple) or len(pair) != 2 or not all(isinstance(t, Tensor) for t in pair):
            kind = f"tuple of {len(pair)}" if isinstance(pair, tuple) else type(pair).__name__
            raise DataError(f"forward returned a {kind}; it must return a pair of tensors (outputs, targets).")
        return pair

    def at(self, parameters: Mapping[str, Tensor], batch: Any) -> tuple[Tensor, Tensor]:
        """Outputs and targets at the given parameters; the others are the model's own."""
        named = {f"model.{name}": value for name, value in parameters.items()}
        batch = map_tensors(Tensor.clone, batch) if self.writes else batch
        with self.precise(parameters), self._replaced(parameters):
            pair: tuple[Tensor, Tensor] = torch.func.functional_call(self, named, (batch,))
        return pair

    def precise(self, parameters: Mapping[str, Tensor]) -> contextlib.AbstractContextManager[Any]:
        """Within this a network in float64 computes in float64 throughout."""
        double = self.narrows and next(iter(parameters.values())).dtype == torch.float64
        return DoubleThroughout() if double else contextlib.nullcontext()

    def values(self, parameters: Mapping[str, Tensor], batch: Any) -> tuple[Tensor, Tensor]:
        """The same without a graph."""
        if self.differentiates:  # hooks and derivatives inside ask for tensors that need gradients
            parameters = leaves_of(parameters)
        with torch.set_grad_enabled(self.differentiates), differentiable():
            outputs, targets = self.at(parameters, batch)
        return outputs.detach(), targets

    def graph(self, loss: Loss, parameters: Mapping[str, Tensor], batch: Any) -> tuple[list[Tensor], Tensor, Tensor]:
        """Leaves that stand for the parameters, outputs of a batch's rows and their summed loss, with their graph."""
        leaves = leaves_of(parameters)
        with torch.enable_grad(), differentiable():
            outputs, targets = loss.rows(*self.at(leaves, batch))
            value = loss.total(outputs, targets)
        return list(leaves.values()), outputs, value

    def _replaced(self, parameters: Mapping[str, Tensor]) -> contextlib.AbstractContextManager[Any]:
        if not self.aliases:
            return _Watched(self) if self.suspects else contextlib.nullcontext()
        own = named_tensors(self.model)
        given = {
            id(alias): parameters.get(name, own[name].detach())
            for name, aliases in self.aliases.items()
            for alias in aliases
        }
        return _Replaced(given)

    def suspect(self, given: nn.Module, replaced: Iterable[str]) -> None:
        """Watch for tensors of the user's model, and for the copy's own parameters that are `replaced` by name."""
        own = dict(self.model.named_parameters())
        self.suspects = {id(own[name]) for name in replaced}
        self.suspects |= {id(tensor) for tensor in twins(self.model, given).values()}

    def follow(self, given: nn.Module) -> None:
        """Replace the copy's own and the user's tensors from now on, wherever they are reached."""
        theirs = twins(self.model, given)
        named = named_tensors(self.model)
        self.aliases = {name: [own, theirs[name]] for name, own in named.items() if name in theirs}
        modules = list(given.modules())
        if any(module.training and isinstance(module, (NORMS, DROPOUTS)) for module in modules):
            raise ParameterError(
                "the network reaches the model itself, captured by a function or a hook, and this is in training "
                "mode: call model.eval() before."
            )
        for module in modules:
            for holder in (module._parameters, module._buffers):
                self.original += [(holder, name, tensor) for name, tensor in holder.items()]
            self.original.append((vars(module), "training", module.training))

    def stamp(self) -> None:
        """Note how the weights are now, but for what the network writes itself; suspect nothing any more."""
        if self.suspects:
            self.suspects, self.narrows = set(), self.asks
        now = stamps(self.model, "_parameters", "_buffers")
        self.stamps = {name: stamp for name, stamp in now.items() if name not in self.written}

    def refuse_edits(self) -> None:
        """Raise ParameterError if weights were edited since they were stamped, or what is followed was exchanged."""
        if edited := [name for name, stamp in self.stamps.items() if not stamp.holds()]:
            raise ParameterError(
                f"problem.model was edited after the problem was made: {', '.join(edited[:5])}. Edit the model that "
                "you made the problem of, and make a new one."
            )
        if any(holder.get(name) is not value for holder, name, value in self.original):
            raise ParameterError(
                "the network reaches the model itself, captured by a function or a hook, and tensors of that were "
                "exchanged, or its mode was set, since the problem was made. Make a new one."
            )

    def __getstate__(self) -> dict[str, Any]:
        if self.aliases:
            raise ParameterError(
                "a problem whose network reaches its parameters by other ways than their names cannot be copied or "
                "pickled; make a new one of the model."
            )
        return {**vars(self), "stamps": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.stamp()

    def recast(self, model: nn.Module, function: Forward | None = None) -> Evaluated:
        """The same with a further copy of the model, whose own parameters may be aliases as this one's are."""
        other = Evaluated(model, function or self.function)
        other.differentiates, other.writes, other.written = self.differentiates, self.writes, self.written
        other.original, other.narrows = self.original, self.narrows
        before, after = named_tensors(self.model), named_tensors(model)
        for name, aliases in self.aliases.items():
            other.aliases[name] = [after[name] if alias is before[name] else alias for alias in aliases]
        other.stamp()
        return other


class Stamp(NamedTuple):
    """Which tensor a parameter or buffer was, where its numbers lay, and how often they had been written."""

    holder: dict[str, Any]
    key: str
    tensor: Tensor
    address: int
    version: int

    def holds(self) -> bool:
        """Whether it is as it was."""
        tensor = self.tensor
        return (
            self.holder.get(self.key) is tensor
            and tensor._version == self.version
            and _address(tensor) == self.address
        )


def stamps(model: nn.Module, *kinds: str) -> dict[str, Stamp]:
    """Of all its "_parameters" or "_buffers" as they are now, by name."""
    return {
        f"{path}.{key}".lstrip("."): Stamp(getattr(module, kind), key, tensor, _address(tensor), tensor._version)
        for path, module in model.named_modules()
        for kind in kinds
        for key, tensor in getattr(module, kind).items()
        if tensor is not None
    }


def _address(tensor: Tensor) -> int:
    return tensor.data_ptr() if tensor.layout == torch.strided else 0


class _Watched(TorchFunctionMode):
    """Within this mode it is noted which suspects operations are given, and whether they are asked for float32."""

    def __init__(self, module: Evaluated) -> None:
        super().__init__()
        self.module = module

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for value in (*args, *kwargs.values()):
            several = value if isinstance(value, (list, tuple)) else (value,)
            self.module.is_caught |= any(id(one) in self.module.suspects for one in several)
        self.module.asks |= names_single(func, args, kwargs)
        return func(*args, **kwargs)


class _Replaced(TorchFunctionMode):
    """Within this mode operations take other tensors in place of some, told by their identity."""

    def __init__(self, given: dict[int, Tensor]) -> None:
        super().__init__()
        self.given = given

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*map_tensors(self._swap, args), **map_tensors(self._swap, kwargs or {}))

    def _swap(self, tensor: Tensor) -> Tensor:
        return self.given.get(id(tensor), tensor)


def leaves_of(parameters: Mapping[str, Tensor]) -> Tree:
    """The same numbers, of which derivatives are taken."""
    return {name: value.detach().requires_grad_() for name, value in parameters.items()}


def gradient(value: Tensor, leaves: list[Tensor]) -> tuple[Tensor | None, ...]:
    """One tensor a leaf, None where it does not enter."""
    if not value.requires_grad:
        return (None,) * len(leaves)
    return torch.autograd.grad(value, leaves, allow_unused=True)


def add_gradient(total: Tensor, value: Tensor, leaves: list[Tensor]) -> None:
    """Add a value's gradient, of the leaves one after the other, to a vector (P,)."""
    places = torch.split(total, [leaf.numel() for leaf in leaves])
    for place, part in zip(places, gradient(value, leaves), strict=True):
        if part is not None:
            place.add_(part.reshape(-1))


def nodes(value: Tensor) -> Iterator[Any]:
    """The nodes of a value's graph."""
    left = [value.grad_fn] if value.grad_fn is not None else []
    seen = set(left)
    while left:
        node = left.pop()
        yield node
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                left.append(following)


def reached(value: Tensor) -> Iterator[Tensor]:
    """The tensors at which the graph of a value ends: whatever it can be differentiated by."""
    return (node.variable for node in nodes(value) if node.name() == "torch::autograd::AccumulateGrad")


def forward_pair(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """The model's outputs for the first of a pair (x, y), and the second."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2 or not isinstance(batch[1], Tensor):
        kind = f"{type(batch).__name__} of {len(batch)}" if hasattr(batch, "__len__") else type(batch).__name__
        raise DataError(
            f"a batch is a {kind}; expected a pair (x, y). For other batches pass "
            "forward=lambda model, batch: (outputs, targets)."
        )
    outputs = model(batch[0])
    outputs = getattr(outputs, "logits", outputs)  # of a model's output with a name for everything
    if not isinstance(outputs, Tensor):
        raise DataError(
            f"the model returns {type(outputs).__name__}, not a tensor; pass "
            "forward=lambda model, batch: (outputs, targets) to pick the outputs."
        )
    return outputs, batch[1]


# -- how operations run --------------------------------------------------------------------------------------


class _Kernels:
    """Attention by operations that have second derivatives; compiled and checkpointed functions as they were written.

    What is checkpointed would be run again outside of the pass, without its parameters. Hardly any memory is lost:
    graphs of second derivatives keep whatever the first pass dropped.

    The switches are PyTorch's and global: the first who enters sets them and the last who leaves, of all threads,
    puts them back.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.depth = 0
        self.undo = contextlib.ExitStack()

    def __enter__(self) -> None:
        with self.lock:
            if not self.depth:
                fast_path = torch.backends.mha.get_fastpath_enabled()
                self.undo.callback(torch.backends.mha.set_fastpath_enabled, fast_path)
                torch.backends.mha.set_fastpath_enabled(False)
                self.undo.enter_context(sdpa_kernel(SDPBackend.MATH))
                if "torch._dynamo" in sys.modules:  # else nothing was compiled, and its import takes seconds
                    self.undo.enter_context(torch.compiler.set_stance("force_eager"))
                for holder, name, plain in PLAIN:
                    if found := vars(holder).get(name):
                        self.undo.callback(setattr, holder, name, found)
                    elif hasattr(holder, name):  # inherited
                        self.undo.callback(delattr, holder, name)
                    else:
                        continue
                    setattr(holder, name, plain)
            self.depth += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.depth -= 1
            if not self.depth:
                self.undo.close()


_KERNELS = _Kernels()


@contextlib.contextmanager
def differentiable() -> Iterator[None]:
    """Evaluate by operations that have second derivatives: plain attention instead of the fused kernels."""
    refuse_modes()
    with _KERNELS:
        yield


def refuse_modes() -> None:
    """Raise OptionError within the caller's autocast, which rounds every product, or inference mode."""
    for device in ("cpu", "cuda"):
        if torch.is_autocast_enabled(device):
            raise OptionError(
                "autocast is on around this call and would lower the precision of every product. Leave its block, or "
                f"call within torch.autocast({device!r}, enabled=False). Lower precision by choice is dtype=."
            )
    if nn.utils.parametrize._cache_enabled:
        raise OptionError(
            "this call is made within torch.nn.utils.parametrize.cached(), which would keep weights computed before. "
            "Leave its block."
        )
    if torch.is_inference_mode_enabled():
        raise OptionError(
            "this call is made in inference mode, where nothing can be differentiated. Leave the block of "
            "torch.inference_mode(), or call within torch.inference_mode(False)."
        )

"""The model as it is evaluated: a copy that does not train, its parameters replaced wherever it reaches them."""

from __future__ import annotations

import contextlib
import copy
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from deepspectra.errors import DataError, FallbackWarning, OptionError, ParameterError, first_line
from deepspectra.problem.batches import map_tensors, tensors
from deepspectra.problem.losses import Loss

Forward = Callable[[nn.Module, Any], tuple[Tensor, Tensor]]
NORMS = nn.modules.batchnorm._BatchNorm
DROPOUTS = nn.modules.dropout._DropoutNd


class Evaluated(nn.Module):
    """A model with its forward function, evaluated at parameters that are given by name.

    Args:
        model: the problem's own copy.
        function: (model, batch) → (outputs, targets).

    Attributes:
        aliases: parameter or buffer → other tensors by which the network reaches it: a list of its own parameters,
            or the user's model, captured by a function or a hook. They are replaced too, operation by operation.
        suspects: while the problem is made, tensors that would be such aliases, by identity, and their names.
        caught: names of those that operations were given.
        differentiates: the forward pass takes derivatives itself, and does not run without gradients.
        writes: the forward pass writes into its batch, and is given copies.
        written: buffers that the forward pass writes into.
    """

    def __init__(self, model: nn.Module, function: Forward) -> None:
        super().__init__()
        self.model = model
        self.function = function
        self.aliases: dict[str, list[Tensor]] = {}
        self.suspects: dict[int, str] = {}
        self.caught: set[str] = set()
        self.original: list[tuple[dict[str, Any], str, Any]] = []  # where what was captured stood
        self.differentiates = False
        self.writes = False
        self.written: set[str] = set()

    def forward(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Outputs and targets."""
        pair = self.function(self.model, batch)
        if not isinstance(pair, tuple) or len(pair) != 2 or not all(isinstance(t, Tensor) for t in pair):
            kind = f"tuple of {len(pair)}" if isinstance(pair, tuple) else type(pair).__name__
            raise DataError(
                f"forward returned a {kind}; it must return a pair of tensors (outputs, targets)."
            )
        return pair

    def at(self, parameters: Mapping[str, Tensor], batch: Any) -> tuple[Tensor, Tensor]:
        """Outputs and targets at the given parameters; the others are the model's own."""
        named = {f"model.{name}": value for name, value in parameters.items()}
        batch = map_tensors(Tensor.clone, batch) if self.writes else batch
        with self._replaced(parameters):
            pair: tuple[Tensor, Tensor] = torch.func.functional_call(self, named, (batch,))
        return pair

    def values(self, parameters: Mapping[str, Tensor], batch: Any) -> tuple[Tensor, Tensor]:
        """The same without a graph."""
        if self.differentiates:  # hooks and derivatives inside ask for tensors that need gradients
            parameters = {name: value.detach().requires_grad_() for name, value in parameters.items()}
        with torch.set_grad_enabled(self.differentiates), differentiable():
            outputs, targets = self.at(parameters, batch)
        return outputs.detach(), targets

    def graph(
        self, loss: Loss, parameters: Mapping[str, Tensor], batch: Any
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """Leaves that stand for the parameters, outputs of a batch's rows and their summed loss, with their graph."""
        leaves = {name: value.detach().requires_grad_() for name, value in parameters.items()}
        with torch.enable_grad(), differentiable():
            outputs, targets = loss.rows(*self.at(leaves, batch))
            value = loss.total(outputs, targets)
        return list(leaves.values()), outputs, value

    def _replaced(self, parameters: Mapping[str, Tensor]) -> contextlib.AbstractContextManager[Any]:
        if not self.aliases:
            return _Watched(self) if self.suspects else contextlib.nullcontext()
        own = dict((*self.model.named_parameters(), *self.model.named_buffers()))
        given = {
            id(alias): parameters.get(name, own[name].detach())
            for name, aliases in self.aliases.items()
            for alias in aliases
        }
        return _Replaced(given)

    def suspect(self, given: nn.Module, replaced: Iterable[str]) -> None:
        """Watch for tensors of the user's model, and for the copy's own parameters that are `replaced` by name."""
        own = dict(self.model.named_parameters())
        self.suspects = {id(own[name]): name for name in replaced}
        self.suspects |= {id(tensor): name for name, tensor in twins(self.model, given).items()}

    def follow(self, given: nn.Module) -> None:
        """Replace the copy's own and the user's tensors from now on, wherever they are reached.

        Raises:
            ParameterError: the user's model is in training mode, in which it would go on.
        """
        theirs = twins(self.model, given)
        named = (*self.model.named_parameters(), *self.model.named_buffers())
        self.aliases = {name: [own, theirs[name]] for name, own in named if name in theirs}
        modules = list(given.modules())
        if any(module.training and isinstance(module, (NORMS, DROPOUTS)) for module in modules):
            raise ParameterError(
                "the network reaches the model itself, captured by a function or a hook, and "
                "this is in training mode: "
                "call model.eval() before."
            )
        for module in modules:
            for holder in (module._parameters, module._buffers):
                self.original += [(holder, name, tensor) for name, tensor in holder.items()]
            self.original.append((vars(module), "training", module.training))

    def changed(self) -> bool:
        """Whether tensors of a captured model were exchanged, or its mode set, since they are followed."""
        return any(holder.get(name) is not value for holder, name, value in self.original)

    def recast(self, model: nn.Module) -> Evaluated:
        """The same with a further copy of the model, whose own parameters may be aliases as this one's are."""
        other = Evaluated(model, self.function)
        other.differentiates, other.writes, other.written = self.differentiates, self.writes, self.written
        other.original = self.original
        before, after = (
            dict((*module.named_parameters(), *module.named_buffers())) for module in (self.model, model)
        )
        for name, aliases in self.aliases.items():
            other.aliases[name] = [after[name] if alias is before[name] else alias for alias in aliases]
        return other


class _Watched(TorchFunctionMode):
    """Within this mode it is noted which suspects operations are given."""

    def __init__(self, module: Evaluated) -> None:
        super().__init__()
        self.module = module

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        suspects = self.module.suspects
        for value in (*args, *kwargs.values()):
            for one in value if isinstance(value, (list, tuple)) else (value,):
                if id(one) in suspects:
                    self.module.caught.add(suspects[id(one)])
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


def gradient(value: Tensor, leaves: list[Tensor]) -> tuple[Tensor | None, ...]:
    """One tensor a leaf, None where it does not enter."""
    if not value.requires_grad:
        return (None,) * len(leaves)
    return torch.autograd.grad(value, leaves, allow_unused=True)


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
        kind = (
            f"{type(batch).__name__} of {len(batch)}" if hasattr(batch, "__len__") else type(batch).__name__
        )
        raise DataError(
            f"a batch is a {kind}; expected a pair (x, y). For other batches pass "
            "forward=lambda model, batch: (outputs, targets)."
        )
    outputs = model(batch[0])
    if not isinstance(outputs, Tensor):
        raise DataError(
            f"the model returns {type(outputs).__name__}, not a tensor; pass "
            "forward=lambda model, batch: (outputs, targets) to pick the outputs."
        )
    return outputs, batch[1]


# -- the copy ------------------------------------------------------------------------------------------------


def evaluation_copy(model: nn.Module, mode: str = "eval") -> nn.Module:
    """A copy of the model, without wrappers, in evaluation mode; says so when it was in training mode and it matters.

    In mode "train" batch norm takes the statistics of its batch.
    """
    modules = list(model.modules())
    if mode == "eval" and any(m.training and isinstance(m, (NORMS, DROPOUTS)) for m in modules):
        warnings.warn(
            "the model is in training mode with dropout or batch norm; the spectrum is that of evaluation "
            "mode (dropout off, running statistics). Call model.eval() to say so yourself.",
            FallbackWarning,
            stacklevel=3,
        )
    if mode == "train" and any(isinstance(m, DROPOUTS) and m.p > 0 for m in modules):
        warnings.warn(
            "mode='train' is for batch norm; dropout is random and stays off.", FallbackWarning, stacklevel=3
        )
    try:
        twin = _copied(model, modules)
    except Exception as error:  # whatever the attributes of a module raise when they are copied
        raise ParameterError(
            f"the model cannot be copied: {first_line(error)}. Delete the attribute that cannot (a lock, a "
            "generator, an open file), or give its class a __deepcopy__."
        ) from error
    if {id(tensor) for tensor in twin.parameters()} & {id(tensor) for tensor in model.parameters()}:
        raise ParameterError(
            "a copy of the model shares parameters with it (a __deepcopy__ that returns itself?), so that one would "
            "change the other."
        )
    owners = Counter(id(p) for module in twin.modules() for p in module._parameters.values() if p is not None)
    twin.eval()
    for module in twin.modules():
        if mode == "train" and isinstance(module, NORMS):
            module.track_running_stats, module.running_mean, module.running_var = False, None, None
        if type(module) is nn.EmbeddingBag:
            module.__class__ = _Bag
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            _as_table(module, owners)
    for p in twin.parameters():
        p.grad = None
    return twin


def _as_table(module: nn.Embedding | nn.EmbeddingBag, owners: Counter[int]) -> None:
    """Look rows up and nothing else: no sparse gradients, none scaled by frequency, no row shortened by the way."""
    module.sparse = module.scale_grad_by_freq = False
    if module.max_norm is not None:
        if owners[id(module.weight)] > 1:
            raise ParameterError(
                "an embedding with max_norm shortens rows of a weight that other modules use "
                "too; take max_norm out, or "
                "do not tie the weight."
            )
        with torch.no_grad():
            rows = torch.arange(module.num_embeddings, device=module.weight.device)
            nn.functional.embedding(rows, module.weight, None, module.max_norm, module.norm_type)
        module.max_norm = None


def _copied(model: nn.Module, modules: list[nn.Module]) -> nn.Module:
    memo: dict[int, Any] = {}
    for module in modules:
        inner = unwrapped(module)
        if inner is not module:
            memo[id(module)] = copy.deepcopy(inner, memo)
        # What a hook computes anew at each pass (pruning, spectral norm) has a graph and cannot be copied.
        for value in tensors(list(vars(module).values())):
            if not value.is_leaf:
                memo[id(value)] = value
            elif value.layout not in (torch.strided, torch.sparse_coo):  # these PyTorch does not copy deeply
                memo[id(value)] = value.clone()
    twin: nn.Module = copy.deepcopy(model, memo)
    return twin


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside wrappers that only run it: those of torch.compile and of data parallelism."""
    compiled = getattr(sys.modules.get("torch._dynamo.eval_frame"), "OptimizedModule", None)
    while True:
        kind = type(model)  # a subclass may do something else
        if kind in (nn.DataParallel, nn.parallel.DistributedDataParallel):
            inner = model.module
        elif compiled is not None and isinstance(model, compiled):
            inner = model._orig_mod
        else:
            return model
        if model._forward_hooks or model._forward_pre_hooks:
            raise ParameterError(
                f"hooks are registered on a wrapper, {kind.__name__}, which is taken off; "
                f"register them on the module "
                "inside."
            )
        assert isinstance(inner, nn.Module)
        model = inner


def twins(model: nn.Module, given: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of the user's model by the names that they have in the copy."""
    found: dict[str, Tensor] = {}
    for kind in ("named_parameters", "named_buffers"):
        own, theirs = list(getattr(model, kind)()), list(getattr(given, kind)())
        if len(own) == len(theirs):
            found |= {name: tensor for (name, _), (_, tensor) in zip(own, theirs, strict=True)}
        else:  # a copy that leaves some out
            names = {name for name, _ in own}
            found |= {name: tensor for name, tensor in theirs if name in names}
    return found


class _Bag(nn.EmbeddingBag):
    """The module out of operations that can be differentiated twice, which PyTorch's own kernel cannot."""

    def forward(
        self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None
    ) -> Tensor:
        """Sums, means or maxima (B, d) of the rows of each bag."""
        index = input.flatten()
        if input.ndim == 2:
            offsets = torch.arange(0, len(index) + 1, input.shape[1], device=input.device)[: len(input)]
        assert offsets is not None
        size = len(offsets) - int(self.include_last_offset and input.ndim == 1)
        starts = offsets[:size].long()
        bag = torch.searchsorted(starts, torch.arange(len(index), device=input.device), right=True) - 1
        counted = torch.ones_like(index, dtype=torch.bool)
        if self.padding_idx is not None:
            counted = index != self.padding_idx
        rows = nn.functional.embedding(index[counted], self.weight, self.padding_idx)
        bag = bag[counted]
        if per_sample_weights is not None:
            rows = rows * per_sample_weights.flatten()[counted, None]
        if self.mode == "max":
            zeros = rows.new_zeros(size, rows.shape[1])
            return zeros.scatter_reduce(0, bag[:, None].expand_as(rows), rows, "amax", include_self=False)
        total = rows.new_zeros(size, rows.shape[1]).index_add(0, bag, rows)
        if self.mode == "sum":
            return total
        return total / torch.bincount(bag, minlength=size).clamp_min(1)[:, None].to(total)


# -- how operations run --------------------------------------------------------------------------------------


class _Kernels:
    """Attention by operations that have second derivatives, and compiled functions as they were written.

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
            self.depth += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.depth -= 1
            if not self.depth:
                self.undo.close()


_KERNELS = _Kernels()


@contextlib.contextmanager
def differentiable() -> Iterator[None]:
    """Evaluate by operations that have second derivatives: plain attention instead of the fused kernels.

    Raises:
        OptionError: within the caller's autocast or inference mode.
    """
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

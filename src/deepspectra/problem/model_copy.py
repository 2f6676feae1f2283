"""The copy of a model that is evaluated: without wrappers, and in evaluation mode."""

from __future__ import annotations

import copy
import sys
import warnings
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from deepspectra.errors import FallbackWarning, ParameterError, first_line
from deepspectra.problem.batch_trees import tensors

NORMS = nn.modules.batchnorm._BatchNorm
DROPOUTS = nn.modules.dropout._DropoutNd


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
    owners = owners_of(twin)
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


def owners_of(model: nn.Module) -> Counter[int]:
    """The id of each parameter → how many modules hold it: more than one where it is tied."""
    return Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)


def _as_table(module: nn.Embedding | nn.EmbeddingBag, owners: Counter[int]) -> None:
    """Look rows up and nothing else: no sparse gradients, none scaled by frequency, no row shortened by the way."""
    module.sparse = module.scale_grad_by_freq = False
    if module.max_norm is not None:
        if owners[id(module.weight)] > 1:
            raise ParameterError(
                "an embedding with max_norm shortens rows of a weight that other modules use too; take max_norm "
                "out, or do not tie the weight."
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
                f"hooks are registered on a wrapper, {kind.__name__}, which is taken off; register them on the "
                "module inside."
            )
        assert isinstance(inner, nn.Module)
        model = inner


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    return dict((*model.named_parameters(), *model.named_buffers()))


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
            offsets = torch.arange(len(input), device=input.device) * input.shape[1]
        assert offsets is not None
        size = len(offsets) - int(self.include_last_offset and input.ndim == 1)
        starts = offsets[:size].long()
        bag = torch.searchsorted(starts, torch.arange(len(index), device=input.device), right=True) - 1
        counted = index != (-1 if self.padding_idx is None else self.padding_idx)
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

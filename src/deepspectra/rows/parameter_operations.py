"""Which operations of a network use its parameters, as it calls them.

Operations are seen as they are called, so that fused, tied and reused parameters are found wherever they are used.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from deepspectra.derivatives.convolution_derivatives import read_call
from deepspectra.problem.batch_trees import map_tensors, tensors
from deepspectra.rows.parameter_uses import Convolution, Lookup, Matrix, Slice, Use, Vectors


class Watch(TorchFunctionMode):
    """Sees every operation that uses one of the parameters.

    An operation that a rule understands is cut off from the parameters: what still leads from the outputs to one of
    them is a way that no rule understands.
    """

    def __init__(self, leaves: dict[str, Tensor]) -> None:
        super().__init__()
        self.names = {id(leaf): name for name, leaf in leaves.items()}
        self.uses: list[tuple[Use, Tensor]] = []  # with the output of the operation, in the graph
        self.by_value = False  # whether values may choose where examples lie

    def find(self, tensor: Any) -> Slice | None:
        """Which stretch of which parameter a tensor is, if any."""
        if not isinstance(tensor, Tensor):
            return None
        if id(tensor) in self.names:
            return Slice(self.names[id(tensor)], 0, tuple(tensor.shape))
        base = tensor._base
        if base is None or id(base) not in self.names or not tensor.requires_grad:
            return None
        start = int(tensor.storage_offset() - base.storage_offset())
        for transposed, view in ((False, tensor), (True, tensor.mT if tensor.ndim == 2 else tensor)):
            if view.is_contiguous():
                return Slice(self.names[id(base)], start, tuple(view.shape), transposed)
        return None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.is_grad_enabled() and (func in RULES or isinstance(func, FunctionType)):
            found = [leaf for leaf in tensors((args, kwargs)) if self.find(leaf)]
            if found and func in RULES:
                return self._use(func, args, kwargs, found)
            inside = _opened(func) if found else None
            if inside is not None:
                with self:
                    return inside(*args, **kwargs)
        output = func(*args, **kwargs)
        if not self.by_value and func not in RULES:
            self.by_value = _chooses(func, (*args, *kwargs.values()), output)
        return output

    def _use(self, func: Any, args: Any, kwargs: Any, found: list[Tensor]) -> Tensor:
        """The output of an operation with parameters, cut off from them if all are understood."""
        ours = {id(leaf) for leaf in found}
        cut = map_tensors(lambda leaf: leaf.detach() if id(leaf) in ours else leaf, (args, kwargs))
        output: Tensor = func(*cut[0], **cut[1])
        try:
            uses = RULES[func](self.find, output, *args, **kwargs)
        except TypeError:  # called in a form that the rule does not know
            uses = []
        if len(uses) != len(found):
            whole: Tensor = func(*args, **kwargs)
            return whole
        if not output.requires_grad:
            output.requires_grad_()
        self.uses += [(use, output) for use in uses]
        return output.clone()  # what follows may write into it


READS = (
    "__bool__", "__contains__", "__float__", "__index__", "__int__", "allclose", "equal", "is_nonzero", "item",
    "numpy", "tolist",
)  # fmt: skip
IN_PLACE = (
    "__add__", "__eq__", "__ge__", "__gt__", "__le__", "__lt__", "__mul__", "__ne__", "__radd__", "__rmul__",
    "__rsub__", "__sub__", "__truediv__", "add", "bool", "div", "double", "eq", "float", "full_like", "ge", "gt",
    "isfinite", "isinf", "isnan", "le", "long", "lt", "masked_fill", "masked_fill_", "mul", "ne", "ones_like",
    "scaled_dot_product_attention", "sub", "to", "type", "type_as", "where", "zeros_like",
)  # fmt: skip


def _chooses(func: Any, args: Any, output: Any) -> bool:
    """Whether an operation can bring values to where other values say.

    Values choose as indices or masks, or once they are numbers of Python; but not where every value stays where it
    was.
    """
    name = getattr(func, "__name__", "")
    if name == "__get__":  # of an attribute
        return False
    if name in READS:
        return True
    if name == "__getitem__":
        items = args[1] if isinstance(args[1], tuple) else (args[1],)
        if any(isinstance(index, list) for index in items):
            return True
    return name not in IN_PLACE and len({leaf.is_floating_point() for leaf in tensors((args, output))}) > 1


def _opened(func: FunctionType) -> FunctionType | None:
    """A function of torch.nn.functional that runs its own body, so that the operations in it are seen."""
    checks = [name for name in func.__code__.co_names if name.startswith("has_torch_function")]
    if func.__module__ != functional.__name__ or not checks:
        return None
    names = {**func.__globals__, **dict.fromkeys(checks, lambda *_: False)}
    inside = FunctionType(func.__code__, names, func.__name__, func.__defaults__, func.__closure__)
    inside.__kwdefaults__ = func.__kwdefaults__
    return inside


Find = Callable[[Any], Slice | None]


def _bias(find: Find, bias: Any, axis: int) -> list[Use]:
    found = find(bias)
    return [Vectors(found, None, (axis,))] if found and len(found.shape) == 1 else []


def _linear(find: Find, output: Tensor, input: Tensor, weight: Any, bias: Any = None) -> list[Use]:
    found = find(weight)
    matrix: list[Use] = [Matrix(found, input.detach())] if found and len(found.shape) == 2 else []
    return matrix + _bias(find, bias, output.ndim - 2)


def _matmul(find: Find, output: Tensor, input: Tensor, other: Any) -> list[Use]:
    found = find(other)
    if not found or len(found.shape) != 2 or input.ndim < 2:
        return []
    turned = Slice(found.name, found.start, found.shape, not found.transposed)
    return [Matrix(turned, input.detach())]


def _addmm(find: Find, output: Tensor, input: Any, mat1: Tensor, mat2: Any) -> list[Use]:
    return _matmul(find, output, mat1, mat2) + _bias(find, input, output.ndim - 2)


def _convolution(
    find: Find, output: Tensor, input: Tensor, weight: Any, bias: Any = None, *rest: Any, **options: Any
) -> list[Use]:
    call = read_call(output.ndim - 2, input, weight, bias, *rest, **options)
    if call is None:
        return []
    found = find(weight)
    kernel: list[Use] = []
    if found and not found.transposed and len(found.shape) == output.ndim:
        kernel = [Convolution(found, call[0].detach(), call[-1])]
    return kernel + _bias(find, bias, 0)


def _embedding(
    find: Find,
    output: Tensor,
    input: Tensor,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> list[Use]:
    found = find(weight)
    if not found or found.transposed or max_norm is not None or scale_grad_by_freq:
        return []
    if padding_idx is not None and padding_idx < 0:
        padding_idx += found.shape[0]
    return [Lookup(found, input.detach(), padding_idx)]


def _normalisation(function: Callable[..., Tensor]) -> Callable[..., list[Use]]:
    """The rule of y = normalised x · weight + bias."""
    signature = inspect.signature(function)

    def rule(find: Find, output: Tensor, *args: Any, **kwargs: Any) -> list[Use]:
        call = signature.bind(*args, **kwargs)
        weight, bias = find(call.arguments.get("weight")), find(call.arguments.get("bias"))
        shape = call.arguments.get("normalized_shape")
        dims = output.ndim - 1
        axes = (0,) if shape is None else tuple(range(dims - len(shape), dims))
        uses: list[Use] = []
        if weight:
            call.arguments.update(weight=None, **({"bias": None} if "bias" in signature.parameters else {}))
            with torch.no_grad():
                uses.append(Vectors(weight, function(*call.args, **call.kwargs).detach(), axes))
        if bias:
            uses.append(Vectors(bias, None, axes))
        return uses

    return rule


RULES: dict[Any, Callable[..., list[Use]]] = {
    functional.linear: _linear,
    torch.matmul: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    torch.mm: _matmul,
    Tensor.mm: _matmul,
    torch.addmm: _addmm,
    torch.conv1d: _convolution,
    torch.conv2d: _convolution,
    functional.embedding: _embedding,
    **{
        function: _normalisation(function)
        for function in (
            functional.batch_norm,
            functional.instance_norm,
            functional.layer_norm,
            functional.group_norm,
            functional.rms_norm,
        )
    },
}

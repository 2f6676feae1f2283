"""One bundle of model, loss and data: everything a spectrum depends on, checked once."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from deepspectra.errors import DataError, FallbackWarning, OptionError, ParameterError
from deepspectra.problem.batch_cut_checks import cut_anew, settle_cuts
from deepspectra.problem.batch_trees import length
from deepspectra.problem.batches import Batches, Move, Pair, is_labelled
from deepspectra.problem.cross_entropy import CrossEntropy
from deepspectra.problem.double_precision import HALF
from deepspectra.problem.evaluated_model import Evaluated, Forward, Trial, add_gradient, forward_pair
from deepspectra.problem.input_checks import check_given, check_gradient, reported, usable_device
from deepspectra.problem.losses import Loss, MeanLoss
from deepspectra.problem.memory_budget import free_memory, largest_batch_size, parse_bytes, share, suitable_batch_size
from deepspectra.problem.model_copy import evaluation_copy, unwrapped
from deepspectra.problem.named_losses import Given
from deepspectra.problem.own_losses import settle_loss
from deepspectra.problem.parameters import common_dtype, flatten, select_parameters, unflatten
from deepspectra.problem.row_counts import count_rows, join_batches, settle_layout

Result = TypeVar("Result")


class _Named:
    """What is to be set by whoever knows: what results and reports are to call model, data and classes.

    And `basis`, the type in which operators made from then on hold the basis of their eigenpairs (`Operator.basis`).
    """

    name = data_name = ""
    class_names: Sequence[str] | None = None
    basis: torch.dtype | None = None


class Problem(_Named):
    """A model, its loss and its data: L(θ) = Σ_i ω_i ℓ(f(x_i; θ), y_i) / Σ_i ω_i.

    Model and data are copied, the model in evaluation mode, so that later training does not change the problem and
    the problem does not change the model. Each *row* i is one prediction: an example, or a token that is not
    ignored. A batch is cut into smaller ones, or into classes, only where a few examples alone were seen to give the
    rows that they give within it; nodes of a graph, or examples along another dimension, stay whole.

    Args:
        model: any module; tied weights, buffers, batch norm and attention are fine. Wrappers of torch.compile and
            of data parallelism are taken off, and names are those without them.
        data: a DataLoader, a Dataset, a pair (x, y) of tensors, or a list of batches: pairs (x, y), or mappings for
            which `model(**batch)` gives a loss, whose outputs and targets are then taken. Shuffling is fine; random
            augmentation is not.
        loss: "cross_entropy", "mse", an nn loss module, or a callable (outputs, targets) → mean loss over the rows,
            torch.nn.functional's and `functools.partial` of them included. A callable that is no mean over rows is
            taken for one batch, if the data is one or can be.
        parameters: a glob or several over parameter names; the trainable ones among the matches are used.
        forward: function (model, batch) → (outputs, targets), for other batches.
        batch_size: examples a batch, for tensors and Datasets; by default backpropagation keeps about 32 MiB of them,
            or twice the bytes of the weights if that is more (512 MiB on a GPU), of any at most 1/32 of the memory,
            or 1/8 where the weights are so many.
        device: where to compute; by default where the model's parameters are.
        dtype: floating-point type of weights, data and products; by default the model's. In float64 the network
            computes in float64 throughout, where it casts to float32 too.
        memory: bytes, or text such as "8GiB", for data, retained graphs and basis vectors together; by
            default two thirds of what is free on the device.
        mode: "eval", or "train" for the one batch that is given, whose own statistics batch norm then takes (dropout
            stays off). The operators of such a problem say so in their names.

    Attributes:
        num_parameters: P, the selected parameters, tied ones counted once.
        num_examples: N, rows that count.
        num_classes: C, the number of outputs of a row.
        parameter_names: names of the selected parameters, in the order of the vector.
        layers: names of the modules that own them.
        memory: the budget in bytes.
        casts: types of half precision in which the network computes inside, where it is in another.
        cuts: whether batches may be cut into examples along the first dimension.

    Raises:
        ParameterError: nothing trainable is selected, or the model is complex, lazy or compiled by torch.jit, or
            reaches parameters by ways that cannot be followed.
        OptionError: a device, dtype, forward, batch size, memory or mode that cannot be used, or a call within the
            caller's autocast or inference mode.
        DataError: no data, labels out of range, values not finite, a failing model, examples that influence others.
        ShapeError: outputs and targets do not fit.
        NonFiniteError: a weight, an output or the loss is NaN or infinite.
        NondeterminismError: two passes differ.
        LossError: the loss is unknown, not a mean, reads parameters itself, or fails on its outputs and targets.
        CurvatureError: the loss cannot be backpropagated.

    Cost: a forward pass over the data, up to four of one batch, its gradient, and a second reading of a loader.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Any,
        loss: Given = "cross_entropy",
        *,
        parameters: str | Sequence[str] | None = None,
        forward: Forward | None = None,
        batch_size: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        memory: int | str | None = None,
        mode: str = "eval",
    ) -> None:
        check_given(model, forward, dtype, mode)
        self.device = usable_device(device) if device is not None else next(model.parameters()).device
        self.dtype = dtype or common_dtype(model)
        self.memory = parse_bytes(memory) if memory is not None else free_memory(self.device) * 2 // 3
        self.mode, self.reads_pairs = mode, forward is None
        twin = evaluation_copy(model, mode)
        self._trainable = frozenset(name for name, p in twin.named_parameters() if p.requires_grad)
        twin.requires_grad_(False).to(device=self.device, dtype=self.dtype)
        self._module = module = Evaluated(twin, forward or forward_pair)
        self.parameters = select_parameters(twin, self._trainable, parameters)
        move, budget = Move(self.device, self.dtype), share(self.memory, "data")
        self.batches = Batches(data, batch_size=batch_size, move=move, budget=budget, pairs=self.reads_pairs)
        self.loss_function, function = settle_loss(loss, module, self.batches, forward)
        self._derived: dict[object, Any] = {}  # what `per_problem` functions have made
        module.suspect(given := unwrapped(model), self.parameters)
        first = settle_layout(module, self.batches, self.loss_function, self.parameters)
        first, self.cuts = settle_cuts(module, self.batches, self.parameters, first, mode)
        self._count(first)
        module.function = function
        if module.is_caught:
            module.follow(given)
        saved = check_gradient(module, self.loss_function, self._trainable, first, given)
        self.casts = saved.dtypes & HALF - {self.dtype}
        each = saved.num_bytes / max(1, length(first.batch)) if self.cuts else 0.0
        self.batch_size = suitable_batch_size(each, self.model, self.memory, self.device)
        most = self.most_examples = largest_batch_size(each, self.model, self.memory)  # of any that may be cut
        if self.cuts:
            by_label = isinstance(self.loss_function, CrossEntropy) and self.reads_pairs
            cut_anew(module, self.batches, self.parameters, first, (self.batch_size, most), by_label=by_label)
        module.stamp()

    def _count(self, first: Trial | None = None) -> None:
        """Count the rows; hold the data together if the loss is no mean over rows. What `first` gives is known."""
        found = count_rows(self._module, self.batches, self.loss_function, self.parameters, first)
        self.num_examples, self.num_classes, self.total_weight = found.num_rows, found.num_classes, found.total_weight
        misfit = found.misfit(self.dtype)
        if misfit != 0 and (self.cuts or self.batches.num_batches > 1):
            join_batches(self.batches, misfit, self.loss_function)
            self.cuts = False

    @property
    def model(self) -> nn.Module:
        """The problem's own copy of the model."""
        return self._module.model

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """Names of the selected parameters, in the order of the vector."""
        return tuple(self.parameters)

    @property
    def num_parameters(self) -> int:
        """P."""
        return sum(value.numel() for value in self.parameters.values())

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the modules that own the selected parameters; "" is the model itself."""
        return tuple(dict.fromkeys(name.rpartition(".")[0] for name in self.parameters))

    def flatten(self, tree: dict[str, Tensor]) -> Tensor:
        """The vector (P,) of a mapping from every parameter name to a tensor of its shape."""
        return flatten(tree, self.parameters)

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """The mapping from parameter names to tensors of a vector (P,)."""
        return unflatten(vector, self.parameters)

    def evaluate(self, parameters: Mapping[str, Tensor], batch: Any) -> Pair:
        """Outputs (n, C) and targets of a batch's rows at the given parameters."""
        return self.loss_function.rows(*self._module.at(parameters, batch))

    def values(self, batch: Any, parameters: Mapping[str, Tensor] | None = None) -> Pair:
        """The same without a graph, at the problem's own parameters unless told otherwise."""
        return self.loss_function.rows(*self._module.values(parameters or self.parameters, batch))

    def row_batches(self) -> Iterator[Pair]:
        """Outputs and targets of each batch, at the problem's own parameters."""
        return self.fixed_batches().mapped(self.values)

    def fixed_batches(self) -> Batches:
        """The batches, for a pass over the data.

        Raises:
            ParameterError: weights of `problem.model` were edited; what is known of them would be half stale.
        """
        self._module.refuse_edits()
        return self.batches

    @property
    def splits_by_class(self) -> bool:
        """Whether batches are examples with one label each, so that they can be split by class."""
        return self.can_split(next(iter(self.batches)))

    def can_split(self, batch: Any) -> bool:
        """The same of one batch."""
        return self.cuts and self.reads_pairs and is_labelled(batch)

    def refuse_interacting_rows(self) -> None:
        """Raise LossError if the loss of a row depends on other rows of its batch, so that none has one of its own.

        Cost: a forward pass, the loss and its curvature of one batch.
        """
        if isinstance(self.loss_function, MeanLoss) and not self.loss_function.is_mean:
            self.loss_function.refuse_interacting_rows(*next(self.row_batches()))

    def loss(self) -> float:
        """L(θ)."""
        return self._sums(functools.partial(_summed_loss, self.loss_function), 1)[0] / self.total_weight

    def gradient(self) -> Tensor:
        """∇L(θ), (P,). Cost: one gradient."""
        dtype = torch.promote_types(self.dtype, torch.float32)
        total, batches = torch.zeros(self.num_parameters, dtype=dtype, device=self.device), self.fixed_batches()
        with batches.group.summing(total):
            for _, batch in batches.mine():
                leaves, _, value = self._module.graph(self.loss_function, self.parameters, batch)
                add_gradient(total, value, leaves)
        return total.div_(self.total_weight)

    def accuracy(self) -> float:
        """Share of rows whose largest output is the label; NaN when targets are not labels."""
        hits, rows = self._sums(functools.partial(_hits, self.loss_function), 2)
        return hits / rows

    def _sums(self, numbers: Callable[[Tensor, Tensor], Tensor], size: int) -> list[float]:
        """Sums over all batches of so many numbers that outputs and targets of one give."""
        total, batches = torch.zeros(size, dtype=torch.float64, device=self.device), self.fixed_batches()
        with batches.group.summing(total):
            for _, batch in batches.mine():
                total += numbers(*self.values(batch))
        found: list[float] = total.tolist()
        return found

    def variant(self, **changes: Any) -> Problem:
        """This problem with other attributes and nothing derived of it; counted anew on other batches."""
        other = object.__new__(type(self))
        vars(other).update(vars(self), _derived={}, **changes)
        if "batches" in changes:
            other._count()
        return other

    def restrict(self, parameters: str | Sequence[str]) -> Problem:
        """The same problem in fewer parameters; the others are held fixed. Model and data are shared."""
        chosen = select_parameters(self.model, self._trainable, parameters)
        fewer = {name: value for name, value in chosen.items() if name in self.parameters}
        if fewer:
            return self.variant(parameters=fewer)
        raise ParameterError(f"parameters={parameters!r} selects none of this problem's parameters.")

    def to(self, dtype: torch.dtype) -> Problem:
        """This problem in another floating-point type, as a further copy of the model.

        Raises:
            DataError: the model fails in that type.
        """
        if dtype == self.dtype:
            return self
        failure = f"the model, taken in {dtype}, failed on data that it takes in {self.dtype}"
        with reported(DataError, failure), warnings.catch_warnings():
            warnings.simplefilter("ignore", FallbackWarning)  # what there is to say was said of this problem
            return self.cast(dtype, self.batches.moved(Move(self.device, dtype)))

    def cast(self, dtype: torch.dtype, batches: Batches) -> Problem:
        """The problem on other batches, with a model of its own in another dtype."""
        twin = evaluation_copy(self.model).to(device=self.device, dtype=dtype)
        own = _detached(twin, self.parameters)
        return self.variant(dtype=dtype, _module=self._module.recast(twin), parameters=own, batches=batches)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_derived": {}, "parameters": self.parameter_names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.parameters = _detached(self.model, state["parameters"])

    def __repr__(self) -> str:
        outputs = "classes" if isinstance(self.loss_function, CrossEntropy) else "outputs"
        sizes = f"{self.num_parameters:,} parameters, {self.num_examples:,} examples, {self.num_classes} {outputs}"
        return f"<Problem: {type(self.model).__name__}, {sizes}, {self.loss_function.name}>"


def _detached(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """A model's parameters of these names."""
    own = dict(model.named_parameters())
    return {name: own[name].detach() for name in names}


def _summed_loss(loss: Loss, outputs: Tensor, targets: Tensor) -> Tensor:
    """Σ ω_i ℓ_i of a batch, float64."""
    with torch.no_grad():
        return loss.total(outputs.to(torch.promote_types(outputs.dtype, torch.float32)), targets).double()


def _hits(loss: Loss, outputs: Tensor, targets: Tensor) -> Tensor:
    """(2,) rows of a batch that are right, and rows that count; of no labels NaN and 1."""
    found = (math.nan, 1.0)
    if not targets.is_floating_point() and targets.ndim == 1 and outputs.ndim == 2:
        counted = loss.weights(outputs, targets) > 0
        found = float((outputs.argmax(-1) == targets)[counted].sum()), float(counted.sum())
    return torch.tensor(found, dtype=torch.float64, device=outputs.device)


def per_problem(function: Callable[[Problem], Result]) -> Callable[[Problem], Result]:
    """A function of a problem whose result is made once, shared by all callers and freed with the problem.

    Copies, pickles and the problems made of it begin without.
    """

    @functools.wraps(function)
    def once(problem: Problem) -> Result:
        if once not in problem._derived:
            problem._derived[once] = function(problem)
        found: Result = problem._derived[once]
        return found

    return once


def check_problem(problem: object) -> None:
    """Raise OptionError unless it is a `Problem`."""
    if not isinstance(problem, Problem):
        raise OptionError(f"expected a deepspectra.Problem(model, data, loss); got {type(problem).__name__}.")

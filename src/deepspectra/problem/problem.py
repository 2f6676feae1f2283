"""One bundle of model, loss and data: everything a spectrum depends on, checked once."""

from __future__ import annotations

import functools
import operator
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from deepspectra.errors import (
    DataError,
    FallbackWarning,
    LossError,
    OptionError,
    ParameterError,
    ShapeError,
)
from deepspectra.problem.admission import arrange, confirm, keep_whole, prove, settle, survey
from deepspectra.problem.batches import Batches, Move, is_labelled, map_tensors, num_bytes
from deepspectra.problem.checks import check_model, reported, usable
from deepspectra.problem.cross_entropy import CrossEntropy, DrawnCrossEntropy
from deepspectra.problem.evaluation import (
    Evaluated,
    Forward,
    evaluation_copy,
    forward_pair,
    gradient,
    refuse_modes,
    unwrapped,
)
from deepspectra.problem.losses import Loss
from deepspectra.problem.memory import free_memory, parse_bytes
from deepspectra.problem.named_losses import resolve
from deepspectra.problem.selection import selected

BATCH_BYTES = (2**29, 2**25)  # that backpropagation keeps of a batch, unless sizes are given: GPU, CPU
WEIGHT_BYTES = 2  # or so many times the bytes of the weights, if that is more: each batch reads them all
GRAPHS = 32  # such batches fit the memory

Result = TypeVar("Result")
Stamp = tuple[
    dict[str, Any], str, str, Tensor, int, int
]  # of a weight: holder, key, name, place, times written


class Problem:
    """A model, its loss and its data: L(θ) = Σ_i ω_i ℓ(f(x_i; θ), y_i) / Σ_i ω_i.

    Model and data are copied, the model in evaluation mode, so that later training does not change the problem and
    the problem does not change the model. Each *row* i is one prediction: an example, or a token that is not
    ignored. A batch is cut into smaller ones, or its examples into classes, only where a few examples alone were seen
    to give the rows that they give within it; what has its examples in another dimension, or has nodes of a graph for
    rows, stays whole.

    Args:
        model: any module; tied weights, buffers, batch norm and attention are fine. Wrappers of torch.compile and
            of data parallelism are taken off, and names are those without them.
        data: a DataLoader, a Dataset, a pair (x, y) of tensors, or a list of batches (x, y). Shuffled loaders
            are fine; random augmentation is not.
        loss: "cross_entropy", "mse", an nn loss module, or a callable (outputs, targets) → mean loss over the rows,
            torch.nn.functional's and `functools.partial` of them included. A callable that is no mean over rows is
            taken for one batch, if the data is one or can be.
        parameters: a glob or several over parameter names; the trainable ones among the matches are used.
        forward: function (model, batch) → (outputs, targets), for batches that are not pairs (x, y).
        batch_size: examples a batch, for tensors and Datasets; by default so many that backpropagation keeps about
            32 MiB of them, or twice the bytes of the weights if that is more (512 MiB on a GPU).
        device: where to compute; by default where the model's parameters are.
        dtype: floating-point type of weights, data and products; by default the model's.
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
        cuts: whether batches may be cut into examples along the first dimension of their tensors.
        mode: "eval" or "train".

    Raises:
        ParameterError: nothing is selected, or nothing selected is trainable, or the model is complex, lazy or
            compiled by torch.jit, or reaches parameters by ways that cannot be followed.
        OptionError: a device, dtype, forward, batch size, memory or mode that cannot be used, or a call within the
            caller's autocast or inference mode.
        DataError: no data, labels out of range, values not finite, a model that fails on a batch, or examples that
            influence each other in evaluation mode.
        ShapeError: outputs and targets do not fit.
        NonFiniteError: a weight, an output or the loss is NaN or infinite.
        NondeterminismError: two passes differ.
        LossError: the loss is unknown, not a mean, reads parameters itself, or fails on its outputs and targets.
        CurvatureError: the loss cannot be backpropagated.

    Cost: a forward pass over the data, and of one batch or a few of its examples up to twice more, the gradient of
    one batch, and a second reading of a loader.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Any,
        loss: str | nn.Module | Callable[[Any, Tensor], Tensor] | Loss = "cross_entropy",
        *,
        parameters: str | Sequence[str] | None = None,
        forward: Forward | None = None,
        batch_size: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        memory: int | str | None = None,
        mode: str = "eval",
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ParameterError(f"model must be an nn.Module, got {type(model).__name__}.")
        refuse_modes()
        check_model(model)
        if forward is not None and not callable(forward):
            raise OptionError(
                f"forward must be a function (model, batch) → (outputs, targets), got {forward!r}."
            )
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise OptionError(f"dtype must be a floating-point type such as torch.float64, got {dtype!r}.")
        if mode not in ("eval", "train"):
            raise OptionError(f"mode={mode!r}; it is 'eval' or 'train'.")
        reference = next((p for p in model.parameters() if p.is_floating_point()), None)
        if reference is None:
            raise ParameterError("the model has no parameters.")
        self.device = usable(device) if device is not None else reference.device
        self.dtype = dtype or _one_dtype(model, reference.dtype)
        self.memory = parse_bytes(memory) if memory is not None else free_memory(self.device) * 2 // 3
        self.mode = mode
        self.loss_function = resolve(loss)
        twin = evaluation_copy(model, mode)
        self._trainable = frozenset(name for name, p in twin.named_parameters() if p.requires_grad)
        twin.requires_grad_(False).to(device=self.device, dtype=self.dtype)
        self._module = Evaluated(twin, forward or forward_pair)
        self.parameters = selected(self.model, self._trainable, parameters)
        self.batches = Batches(
            data,
            batch_size=batch_size,
            move=Move(self.device, self.dtype),
            budget=self.memory // 4,
            pairs=forward is None,
        )
        self._derived: dict[object, Any] = {}  # what `per_problem` functions have made
        self._stamps: list[Stamp] = []
        given = unwrapped(model)
        self._module.suspect(given, self.parameters)
        start, pair = settle(self._module, self.batches, self.loss_function, self.parameters)
        start, pair, self.cuts = arrange(self._module, self.batches, self.parameters, start, pair, mode)
        self._survey(start, pair)
        if self._module.caught:
            self._module.follow(given)
        saved = prove(self._module, self.loss_function, self._trainable, start, pair, given)
        self._module.suspects = {}
        self._example_bytes = saved / max(1, len(start[1])) if self.cuts else 0.0
        order = None
        if self.cuts:
            if isinstance(self.loss_function, CrossEntropy) and forward is None:
                order = self.batches.sort_by_label()
            self._resize()
            confirm(self._module, self.batches, self.parameters, pair[0], order)
        self._stamps = self._stamped()

    @property
    def model(self) -> nn.Module:
        """The problem's own copy of the model."""
        return self._module.model

    # -- parameters ------------------------------------------------------------------------------------------

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
        if set(tree) != set(self.parameters):
            odd = sorted(set(tree) ^ set(self.parameters))
            raise ShapeError(f"flatten needs exactly the selected parameters; these differ: {odd[:5]}.")
        for name, value in self.parameters.items():
            if tree[name].shape != value.shape:
                raise ShapeError(f"{name}: expected {tuple(value.shape)}, got {tuple(tree[name].shape)}.")
        return torch.cat([tree[name].reshape(-1) for name in self.parameters])

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """The mapping from parameter names to tensors of a vector (P,)."""
        if vector.shape != (self.num_parameters,):
            raise ShapeError(f"expected a vector ({self.num_parameters},), got {tuple(vector.shape)}.")
        sizes = [value.numel() for value in self.parameters.values()]
        parts = torch.split(vector, sizes)
        return {
            name: part.view(value.shape)
            for (name, value), part in zip(self.parameters.items(), parts, strict=True)
        }

    def restrict(self, parameters: str | Sequence[str]) -> Problem:
        """The same problem in fewer parameters; the others are held fixed. Model and data are shared."""
        other = self.bare()
        chosen = selected(self.model, self._trainable, parameters)
        other.parameters = {name: value for name, value in chosen.items() if name in self.parameters}
        if not other.parameters:
            raise ParameterError(f"parameters={parameters!r} selects none of this problem's parameters.")
        return other

    # -- evaluation ------------------------------------------------------------------------------------------

    def evaluate(self, parameters: dict[str, Tensor], batch: Any) -> tuple[Tensor, Tensor]:
        """Outputs (n, C) and targets of a batch's rows at the given parameters."""
        return self.loss_function.rows(*self._module.at(parameters, batch))

    def values(self, batch: Any, parameters: Mapping[str, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """The same without a graph, at the problem's own parameters unless told otherwise."""
        given = self.parameters if parameters is None else parameters
        return self.loss_function.rows(*self._module.values(given, batch))

    def row_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Outputs and targets of each batch, at the problem's own parameters."""
        return ((outputs, targets) for _, outputs, targets in self._evaluated())

    def _evaluated(self) -> Iterator[tuple[Any, Tensor, Tensor]]:
        for batch in self.fixed_batches():
            yield batch, *self.values(batch)

    def fixed_batches(self) -> Batches:
        """The batches, for a pass over the data.

        Raises:
            ParameterError: weights of `problem.model` were edited; what is known of them would be half stale.
        """
        edited = [
            name
            for holder, key, name, tensor, place, version in self._stamps
            if holder.get(key) is not tensor or tensor._version != version or _place(tensor) != place
        ]
        if edited:
            raise ParameterError(
                f"problem.model was edited after the problem was made: {', '.join(edited[:5])}. Edit the model that "
                "you made the problem of, and make a new one."
            )
        if self._module.changed():
            raise ParameterError(
                "the network reaches the model itself, captured by a function or a hook, and tensors of that were "
                "exchanged, or its mode was set, since the problem was made. Make a new one."
            )
        return self.batches

    def _stamped(self) -> list[Stamp]:
        """Where each weight stands and lies and how often it was written to, but for what the network writes."""
        return [
            (holder, key, name, tensor, _place(tensor), tensor._version)
            for path, module in self.model.named_modules()
            for holder in (module._parameters, module._buffers)
            for key, tensor in holder.items()
            if tensor is not None and (name := f"{path}.{key}".lstrip(".")) not in self._module.written
        ]

    @property
    def splits_by_class(self) -> bool:
        """Whether batches are examples with one label each, which `class_batches` splits by class."""
        return self._can_split(next(iter(self.batches)))

    def _can_split(self, batch: Any) -> bool:
        return self.cuts and self._module.function is forward_pair and is_labelled(batch)

    def class_batches(
        self, groups: Tensor | None = None, among: Collection[int] | None = None
    ) -> Iterator[Any]:
        """The batches, split so that each holds one class, or one of `groups` (C,), where they can be split.

        With `among` those of these classes or groups only.
        """
        for batch in self.fixed_batches():
            if not self._can_split(batch):
                yield batch
                continue
            labels = batch[1]
            if groups is not None:  # ignored rows, which may have any label, count with those of class 0
                known = labels.where((labels >= 0) & (labels < len(groups)), 0)
                labels = groups.to(labels.device)[known]
            for label in labels.unique():
                if among is not None and int(label) not in among:
                    continue
                kept = labels == label
                yield batch if kept.all() else (batch[0][kept], batch[1][kept])

    def refuse_interacting_rows(self) -> None:
        """Raise LossError if the loss of a row depends on other rows of its batch, so that none has one of its own.

        Cost: a forward pass, the loss and its curvature of one batch.
        """
        if self.loss_function.is_mean:
            return
        outputs, targets = next(self.row_batches())
        if self.loss_function.rows_interact(outputs, targets):
            raise LossError(
                f"the rows of a batch interact in the loss {self.loss_function.name!r} (a "
                f"contrast, a variance, a rank?), "
                "so that there are no losses and no gradients of single rows. H, G and R are "
                "known; the empirical Fisher "
                "matrix, Kronecker factors and errors are not."
            )

    def loss(self) -> float:
        """L(θ)."""
        total = 0.0
        for outputs, targets in self.row_batches():
            with torch.no_grad():
                total += float(self.loss_function.total(self._at_least_single(outputs), targets).double())
        return total / self.total_weight

    def gradient(self) -> Tensor:
        """∇L(θ), (P,). Cost: one gradient."""
        dtype = torch.promote_types(self.dtype, torch.float32)
        total = torch.zeros(self.num_parameters, dtype=dtype, device=self.device)
        for batch in self.fixed_batches():
            leaves, _, value = self._module.graph(self.loss_function, self.parameters, batch)
            values = self.parameters.values()
            parts = gradient(value, leaves)
            filled = [torch.zeros_like(v) if g is None else g for g, v in zip(parts, values, strict=True)]
            total += torch.cat([part.reshape(-1) for part in filled])
        return total / self.total_weight

    def _at_least_single(self, outputs: Tensor) -> Tensor:
        return outputs.to(torch.promote_types(outputs.dtype, torch.float32))

    def accuracy(self) -> float:
        """Share of rows whose largest output is the label; NaN when targets are not labels."""
        hits, rows = 0, 0
        for outputs, targets in self.row_batches():
            if targets.is_floating_point() or targets.ndim != 1 or outputs.ndim != 2:
                return float("nan")
            counted = self.loss_function.weights(outputs, targets) > 0
            hits += int((outputs.argmax(-1) == targets)[counted].sum())
            rows += int(counted.sum())
        return hits / rows

    # -- other problems ----------------------------------------------------------------------------------------

    def _survey(self, start: Any = None, pair: tuple[Tensor, Tensor] | None = None) -> None:
        """Count the rows; hold the data together if the loss is no mean over rows. What `start` gives is known."""
        evaluated = (
            (
                batch,
                *(
                    self.values(batch)
                    if pair is None or batch is not start
                    else self.loss_function.rows(*pair)
                ),
            )
            for batch in self.batches
        )
        found = survey(evaluated, self.loss_function, self.batches.num_batches)
        self.num_examples, self.total_weight = found.num_rows, found.total_weight
        self.num_classes = found.num_classes
        if not found.is_mean(self.dtype) and (self.cuts or self.batches.num_batches > 1):
            keep_whole(self.batches, found, self.loss_function, self.dtype)
            self.cuts = False

    def _resize(self) -> None:
        """Batches of a size that suits the network, where nobody chose one."""
        if not self._example_bytes:
            return
        weights = sum(p.numel() * p.element_size() for p in self.model.parameters())
        wanted = max(BATCH_BYTES[self.device.type == "cpu"], WEIGHT_BYTES * weights)
        self.batches.resize(max(1, int(min(wanted, self.memory / GRAPHS) / max(1.0, self._example_bytes))))

    def to(self, dtype: torch.dtype) -> Problem:
        """This problem in another floating-point type, as a further copy of the model.

        Raises:
            DataError: the model fails in that type.
        """
        if dtype == self.dtype:
            return self
        other = self._cast(dtype)
        other.batches = self.batches.moved(Move(self.device, dtype))
        with (
            reported(DataError, f"the model, taken in {dtype}, failed on data that it takes in {self.dtype}"),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore", FallbackWarning)  # what there is to say was said of this problem
            other._survey()
        return other

    def sample(self, num_rows: int, dtype: torch.dtype) -> Problem:
        """This problem on a few rows that count, or on one batch that cannot be cut, in another dtype."""
        other = self._cast(dtype)
        move = Move(self.device, dtype)
        batch = self.some_rows(num_rows)
        other.batches = Batches([move(batch)], batch_size=None, move=move, budget=4 * num_bytes(batch) + 1)
        other._survey()
        return other

    def bare(self) -> Problem:
        """The same problem, its model and its data, with nothing kept."""
        other = object.__new__(type(self))
        vars(other).update(vars(self), _derived={})
        return other

    def __getstate__(self) -> dict[str, Any]:
        if self._module.aliases:
            raise ParameterError(
                "a problem whose network reaches its parameters by other ways than their names cannot be copied or "
                "pickled; make a new one of the model."
            )
        return {**vars(self), "_derived": {}, "parameters": tuple(self.parameters), "_stamps": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        own = dict(self.model.named_parameters())
        self.parameters = {name: own[name].detach() for name in state["parameters"]}
        self._stamps = self._stamped()

    def _cast(self, dtype: torch.dtype) -> Problem:
        """A copy with a model of its own in another dtype; its data is yet to be replaced."""
        other = self.bare()
        other.dtype = dtype
        twin = evaluation_copy(self.model).to(device=self.device, dtype=dtype)
        other._module = self._module.recast(twin)
        own = dict(other.model.named_parameters())
        other.parameters = {name: own[name].detach() for name in self.parameters}
        other._stamps = other._stamped()
        return other

    @property
    def can_draw(self) -> bool:
        """Examples can be drawn: batches are (x, labels), and the loss is cross-entropy."""
        return isinstance(self.loss_function, CrossEntropy) and self.splits_by_class

    def drawn(self, chosen: Tensor, weights: Tensor) -> Problem:
        """This problem on chosen examples (ascending indices in the order of `batches`), each with a weight.

        Losses and derivatives are Σ m_i ω_i (·)_i over the chosen examples, divided by Σ ω_i over all: unbiased
        when each is drawn with probability 1/m_i.
        """
        loss = self.loss_function
        if not self.can_draw or not isinstance(loss, CrossEntropy):
            raise OptionError(
                "examples can be drawn from batches (x, labels), one label an example, with cross-entropy only."
            )
        inputs, targets, start = [], [], 0
        for batch in self.batches:
            here = (chosen >= start) & (chosen < start + len(batch[1]))
            kept = (chosen[here] - start).to(batch[1].device)
            pairs = [batch[1][kept].double(), weights[here].to(batch[1].device, torch.float64)]
            inputs.append(batch[0][kept])
            targets.append(torch.stack(pairs, 1))
            start += len(batch[1])
        other = self.bare()
        other.loss_function = DrawnCrossEntropy(loss)
        data = (torch.cat(inputs), torch.cat(targets))
        move = Move(self.device, self.dtype)
        other.batches = Batches(data, batch_size=None, move=move, budget=self.memory // 4)
        other._survey()
        other._resize()
        other.total_weight = self.total_weight
        return other

    def some_rows(self, num_rows: int) -> Any:
        """A batch of at most so many rows that count, or a whole batch that cannot be cut.

        Of the first batch that has so many, or of the one that has most.
        """
        most, found = 0, None
        for batch, outputs, targets in self._evaluated():
            (counted,) = (self.loss_function.weights(outputs, targets) > 0).nonzero(as_tuple=True)
            if len(counted) <= most:
                continue
            most, found = len(counted), batch
            if self.cuts and self._module.function is forward_pair and len(outputs) == len(batch[1]):
                chosen = counted[:: max(1, len(counted) // num_rows)][:num_rows]
                found = map_tensors(operator.itemgetter(chosen), batch)
            if most >= num_rows:
                break
        if found is None:
            raise DataError("no row counts: every target is ignored or has weight 0.")
        return found

    def __repr__(self) -> str:
        return (
            f"<Problem: {type(self.model).__name__}, {self.num_parameters:,} parameters, "
            f"{self.num_examples:,} examples, {self.num_classes} classes, {self.loss_function.name}>"
        )


def _place(tensor: Tensor) -> int:
    """Where its numbers lie."""
    return tensor.data_ptr() if tensor.layout == torch.strided else 0


def _one_dtype(model: nn.Module, first: torch.dtype) -> torch.dtype:
    """The type of the model's parameters; the widest, with a word, of several."""
    found = {p.dtype for p in model.parameters() if p.is_floating_point()}
    widest = functools.reduce(torch.promote_types, found, first)
    if len(found) > 1:
        warnings.warn(
            f"the model's parameters are of the types {', '.join(sorted(map(str, found)))}; all are taken in "
            f"{widest}. Pass dtype= to choose.",
            FallbackWarning,
            stacklevel=3,
        )
    return widest


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

"""The parts of a second moment AᵀA: AᵀΠA for each average Π of its rows, of G or of features and errors."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from deepspectra.argument_checks import check_choice
from deepspectra.errors import MissingNameError, OptionError, OptionWarning
from deepspectra.operators.base import Operator, Sum
from deepspectra.operators.curvature import Curvature
from deepspectra.problem.cross_entropy import CrossEntropy, DrawnCrossEntropy
from deepspectra.problem.problem import Problem
from deepspectra.rows.averages import Averages
from deepspectra.rows.features_and_errors import (
    LayerRows,
    error_averages,
    error_rows,
    feature_averages,
    feature_rows,
)
from deepspectra.rows.gradients import GradientRows
from deepspectra.rows.held_rows import HeldRows
from deepspectra.rows.projections import FOUR_WAY, TWO_WAY, Groups, collinear, grouped

KINDS = ("gradients", "features", "errors")
SMALL = ("class", "logit", "true")  # parts of rank at most C, held as factors


class Parts(Mapping[str, Operator]):
    """The parts of a second moment by name; they sum to it exactly, and each is positive semi-definite.

    Attributes:
        rows: A, of which it is AᵀA.
        averages: of these rows.
    """

    def __init__(self, names: tuple[str, ...], make: Callable[[Any, str], Operator]) -> None:
        self._names, self._make = names, make

    def __getitem__(self, name: str) -> Operator:
        if name not in self._names:
            raise MissingNameError("part", name, self._names)
        return self._make(self, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class LayerParts(Parts):
    """The parts of the second moment of features or of errors.

    Attributes:
        of: "features" or "errors".
        rows: those of every layer, one after the other.
        matrices: layer → its rows (R, D).
        averages: of these rows.
    """

    def __init__(self, of: str, rows: LayerRows, averages: Averages) -> None:
        super().__init__(averages.parts, LayerPart)
        self.of, self.rows, self.averages = of, rows, averages
        self.matrices = rows.matrices

    def layer(self, name: str) -> LayerParts:
        """The same for one layer."""
        return LayerParts(self.of, self.rows.layer(name), self.averages)


class LayerPart(Operator):
    """XᵀΠX for one average. Cost: two products with X, 4 R D flops a column."""

    def __init__(self, parts: LayerParts, part: str) -> None:
        like = next(iter(parts.rows.matrices.values()))
        name = f"{part} part of {parts.of}"
        super().__init__(parts.rows.size, dtype=like.dtype, device=like.device, name=name)
        self.parts = parts
        self.part = part

    def _apply(self, block: Tensor) -> Tensor:
        rows, averages = self.parts.rows, self.parts.averages
        return rows.transpose(averages.project(self.part, rows.apply(block)))


class Decomposition(Parts):
    """The parts of G.

    Attributes:
        rows: the gradients as rows.
        projections: the averages of those rows.
        effects: "four-way" or "two-way".
    """

    def __init__(
        self,
        rows: GradientRows,
        effects: str = "four-way",
        first: str = "class",
        groups: Groups | None = None,
    ) -> None:
        names = {"four-way": FOUR_WAY, "two-way": TWO_WAY}
        check_choice("effects", effects, tuple(names))
        if effects == "four-way" and first != "class":
            raise OptionError("first= orders the two-way effects; the published four parts take no order.")
        super().__init__(names[effects], Part)
        self.rows, self.problem = rows, rows.problem
        self.effects = effects
        found = grouped(groups, self.problem.num_classes, self.problem.device)
        self.projections = rows.projections(first, found)
        self._factors: dict[str, Tensor] = {}
        self._reserved: weakref.finalize[..., Decomposition] | None = None  # memory set aside for the means

    @property
    def held(self) -> HeldRows:
        """The rows, with features and errors that are held: of `hold=True`."""
        assert isinstance(self.rows, HeldRows)
        return self.rows

    def factor(self, name: str) -> Tensor:
        """F (P, r) with F Fᵀ the part "class", "logit" or "true", or "means": all cells, r = C². Kept.

        Cost: class or true 1.3 gradients together, logit or means about 2C/3 gradients.
        """
        if name not in self._factors:
            self._factors[name] = self._new_factor(name)
        return self._factors[name]

    def _new_factor(self, name: str) -> Tensor:
        projections = self.projections
        if name == "class" and projections.first == "class":
            true, (classes, _) = self.factor("true"), collinear(projections.cell_weights)
            scale = classes * projections.cell_weights.diagonal().sqrt()
            present = projections.class_weights > 0
            return -true[:, present] * scale[present].to(true)
        if name == "means":
            return self.rows.cells(projections)
        basis = projections.basis(name)
        if "means" in self._factors:
            return self._factors["means"] @ basis.flatten(0, 1).to(self._factors["means"])
        return self.rows.factor(projections, basis)

    def check_operator(self, operator: Operator) -> None:
        """Raise OptionError unless an operator is of the same problem as the parts, as far as it says of which it is.

        So is one of a sample drawn from it, and of a problem made anew of the same model, data and loss.
        """
        for problem in _problems_of(operator):
            if odd := _difference(problem, self.problem):
                raise OptionError(
                    f"the {operator.name} and the parts are of two problems, which differ in their {odd}; what one "
                    "owes to the other means nothing. Make both of one problem: attribute(Hessian(problem), "
                    "decompose(problem))."
                )

    def num_bytes(self, columns: int) -> int:
        """Bytes of so many vectors of length P, in the dtype that factors have."""
        dtype = torch.promote_types(self.problem.dtype, torch.float32)
        return columns * self.problem.num_parameters * dtype.itemsize

    @property
    def has_means(self) -> bool:
        """Whether all C² cross-class means are in memory."""
        return "means" in self._factors

    def holds_means(self) -> bool:
        """Whether all C² cross-class means are held, or can be within the memory budget."""
        if self.has_means:
            return True
        size = self.num_bytes(self.projections.num_classes**2)
        allowance = self.rows.products.allowance
        if self._reserved is not None or not allowance.reserve(size):
            return False
        self._reserved = weakref.finalize(self, allowance.give_back, size)
        self.factor("means")
        return True

    def forget_means(self) -> None:
        """Free the C² cross-class means."""
        self._factors.pop("means", None)
        if self._reserved is not None:
            self._reserved()
        self._reserved = None


class _Averaged(Curvature):
    """What averages over all examples make."""

    def __init__(self, decomposition: Decomposition, name: str) -> None:
        super().__init__(decomposition.problem, name)
        self.decomposition = decomposition

    def sampled(self, generator: torch.Generator, num_samples: int | None = None) -> Curvature:
        """None: averages over few examples are not those over all."""
        raise OptionError(f"start='sampled': {self.name} is made of averages. Pass start=None.")


class Part(_Averaged):
    """AᵀΠA for one projection.

    Class, logit and true are held as factors once used. Cross, interaction and within cost about a
    Gauss-Newton product each: J V, averages of an N × C array, Jᵀ.
    """

    def __init__(self, decomposition: Decomposition, name: str) -> None:
        super().__init__(decomposition, f"{name} part of G")
        self.part = name

    def _apply(self, block: Tensor) -> Tensor:
        if self.part in SMALL:
            factor = self.decomposition.factor(self.part)
            return factor @ (factor.T @ block)
        return self.decomposition.rows.project(self.decomposition.projections, self.part, block)


class Means(_Averaged):
    """The sum of all parts that means make, G − within: Aᵀ(I − Π_within)A.

    Cost: with all C² means in memory nothing but their making; else about a Gauss-Newton product each, and
    coordinates of many vectors as much as the means.
    """

    def __init__(self, decomposition: Decomposition) -> None:
        super().__init__(decomposition, "means part of G")
        self.num = decomposition.projections.num_classes**2

    def coordinates(self, block: Tensor) -> Tensor:
        """Mᵀ V (C², K) for the C² means M of this matrix M Mᵀ, whether they are in memory or not."""
        if self.decomposition.holds_means():
            return self.decomposition.factor("means").T @ block
        return self.decomposition.rows.coordinates(self.decomposition.projections, block)

    def combine(self, coordinates: Tensor) -> Tensor:
        """M X (P, K) for X (C², K)."""
        if self.decomposition.holds_means():
            means = self.decomposition.factor("means")
            return means @ coordinates.to(means)
        rows, projections = self.decomposition.rows, self.decomposition.projections
        cells = coordinates.view(projections.num_classes, projections.num_classes, -1)
        return rows.combine(projections, cells.to(self.device, self.dtype))

    def _apply(self, block: Tensor) -> Tensor:
        return self.combine(self.coordinates(block))


def decompose(
    problem: Problem,
    of: str = "gradients",
    *,
    effects: str = "four-way",
    first: str = "class",
    hold: bool = False,
    groups: Groups | None = None,
) -> Decomposition | LayerParts:
    """Split G, or the second moment of features or of errors, into parts made by averages over classes.

    Args:
        problem: one with cross-entropy and class labels.
        of: "gradients", whose second moment is G (P × P); "features" h of every layer, Σ h hᵀ / N; or
            backpropagated "errors" e at the output of every layer, Σ w e eᵀ. Of features and errors the parts
            act on all layers one after the other, and `.layer(name)` is one of them.
        effects: "four-way": class, cross, within, true (Papyan 2020, JMLR 21:252, section 6);
            "two-way": class, logit, interaction, within, true, with cross = logit + interaction. Features have
            no potential class; their parts are mean, class and within.
        first: "class" or "logit": which of the two effects takes what both could explain.
        hold: of gradients: keep features and errors of every layer in memory if they fit (`HeldRows`);
            products with the parts then cost two thirds of a gradient, and means a third of one each.
        groups: (C,) the group of each class, numbered from 0, or a function that gives the group of a class, as a
            number or a name: averages are then over groups, both of true and of potential classes, and "true" is the
            own group. With thousands of classes C means and C² cross-class means are too many to hold or to read;
            `class_groups` finds groups, and a single group for all but a few chosen classes leaves these.

    Returns:
        A mapping from names to operators that sum to the whole exactly, for unbalanced and absent classes and
        ragged batches too. `sum` of their products is the whole's product.

    Raises:
        LossError: the loss is not the cross-entropy of class labels.
        OptionError: unknown `of`, effects or order, or groups that are not one number a class.
        CurvatureError: features and errors cannot be told apart by example.
        MemoryBudgetError: features or errors of all layers do not fit a third of the problem's memory.

    Cost: one forward pass; errors also C − 1 backward passes without weight gradients. The parts say what
    their products cost.
    """
    check_choice("of", of, KINDS)
    if of == "gradients":
        return Decomposition(HeldRows(problem) if hold else GradientRows(problem), effects, first, groups)
    rows = HeldRows(problem)
    parts = Decomposition(rows, effects, first, groups)
    if of == "features":
        if effects != "four-way" or first != "class":
            warnings.warn(
                "decompose: features have no potential class; effects= and first= change nothing of them.",
                OptionWarning,
                stacklevel=2,
            )
        return LayerParts(of, feature_rows(rows), feature_averages(rows, parts.projections.groups))
    return LayerParts(of, error_rows(rows), error_averages(rows, parts.projections, tuple(parts)))


def _problems_of(operator: Operator) -> Iterator[Problem]:
    """The problems that an operator, or a sum of several, is made of; none of a matrix."""
    inner = [term for _, term in operator.terms] if isinstance(operator, Sum) else []
    for term in inner:
        yield from _problems_of(term)
    problem = getattr(operator, "problem", None)
    if isinstance(problem, Problem):
        yield problem


def _difference(one: Problem, other: Problem) -> str:
    """In what two problems differ of all that their curvature depends on; "" if in nothing."""
    if one is other:
        return ""
    if (one.dtype, one.device) != (other.dtype, other.device):
        return "dtypes or devices"
    if one.parameter_names != other.parameter_names:
        return "parameters"
    if one.model is not other.model and not _same_weights(one, other):
        return "weights"
    drawn = any(isinstance(some.loss_function, DrawnCrossEntropy) for some in (one, other))
    marks = zip(one.batches.mark, other.batches.mark, strict=True)
    if not drawn and not all(math.isclose(a, b, rel_tol=1e-7, abs_tol=1e-9) for a, b in marks):
        return "data"
    weights = one.total_weight, other.total_weight  # a sample has that of all its data
    return "" if _loss(one) == _loss(other) and math.isclose(*weights, rel_tol=1e-7) else "loss"


def _same_weights(one: Problem, other: Problem) -> bool:
    """Whether two models have the same parameters and buffers."""
    first, second = (
        {name: value for name, value in some.model.state_dict().items() if isinstance(value, Tensor)}
        for some in (one, other)
    )
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def _loss(problem: Problem) -> tuple[object, ...]:
    """What the curvature of the outputs depends on, beside outputs and targets."""
    loss = problem.loss_function
    if not isinstance(loss, CrossEntropy):
        return (loss.name,)
    return loss.label_smoothing, None if loss.weight is None else tuple(loss.weight.tolist())

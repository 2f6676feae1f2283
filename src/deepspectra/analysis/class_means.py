"""Class means and cross-class means of gradients, features and backpropagated errors."""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from deepspectra.argument_checks import check_choice
from deepspectra.dataframes import text_table
from deepspectra.errors import MissingNameError, OptionWarning
from deepspectra.operators.parts import KINDS
from deepspectra.problem.memory_budget import refuse_beyond
from deepspectra.problem.problem import Problem
from deepspectra.results import Result, origin
from deepspectra.rows.averages import means_of
from deepspectra.rows.captures import Captured, layer_of
from deepspectra.rows.features_and_errors import (
    alike,
    counted,
    error_averages,
    feature_averages,
    layer_errors,
    layer_inputs,
    membership,
)
from deepspectra.rows.gradients import GradientRows, class_sums, labelled_loss
from deepspectra.rows.held_rows import HeldRows
from deepspectra.rows.parameter_uses import Use
from deepspectra.rows.projections import Groups, Projections, collinear, grouped, num_groups

LEVELS = ("class", "cross_class")


@dataclass(frozen=True, repr=False)
class ClassMeans(Result):
    """Weighted means of gradients or errors over classes and over (class, potential class) cells, or of features.

    Attributes:
        class_means: (C, P) g_c = Σ_{k≠c} w_{c,k} g_{c,k} / w_c, or the plain mean h_c of features; zero for an
            absent class, and where the weights w are too small for the dtype. All layers one after the other.
        cross_class_means: (C, C, P) g_{c,k}; None when level="class", and of features.
        class_weights: (C,) w_c; of features the shares N_c/N.
        cross_class_weights: (C, C) w_{c,k}, the diagonal belongs to the true class; None of features.
        of: "gradients", "features" or "errors".
        layers: layer → where it lies in the last dimension, as slices.
    """

    class_means: Tensor
    cross_class_means: Tensor | None
    class_weights: Tensor
    cross_class_weights: Tensor | None
    of: str
    layers: Mapping[str, tuple[slice, ...]]

    def layer(self, name: str) -> ClassMeans:
        """The means of one layer."""
        if name not in self.layers:
            raise MissingNameError("layer", name, self.layers)
        cut, crossed = self.layers[name], self.cross_class_means
        means = torch.cat([self.class_means[:, piece] for piece in cut], -1)
        if crossed is not None:
            crossed = torch.cat([crossed[..., piece] for piece in cut], -1)
        layers = {name: (slice(0, means.shape[1]),)}
        return replace(self, class_means=means, cross_class_means=crossed, layers=layers)

    @property
    def mean(self) -> Tensor:
        """(P,) the weighted mean of the class means: of features their global mean h̄."""
        weights = (self.class_weights / self.class_weights.sum()).to(self.class_means)
        return weights @ self.class_means

    def __str__(self) -> str:
        norms = self.class_means.norm(dim=1).tolist()
        return text_table(
            ("class", "weight w_c", "norm"),
            zip(map(str, range(len(norms))), self.class_weights.tolist(), norms, strict=True),
            f"class means of {self.of}, {len(norms)} classes, {self.class_means.shape[1]:,} numbers in "
            f"{len(self.layers)} layers",
        )


def class_means(
    problem: Problem,
    of: str = "gradients",
    *,
    level: str | None = None,
    groups: Groups | None = None,
) -> ClassMeans:
    """Means over the examples of each class, and of each (class, potential class), of gradients, errors or features.

    g_{c,k} averages over the examples i of class c the gradient they would have were they of class k, with
    weights w_{i,k} = p_{i,k}/N; g_c averages g_{c,k} over k ≠ c. Over all k the mean is exactly zero. Errors
    e_{i,k} are averaged in the same way; features have no potential class, and h_c is their plain mean.

    Args:
        problem: one with cross-entropy and class labels.
        of: "gradients"; "features" that enter each layer with a matrix or a kernel; "errors" at the output of
            each layer with a matrix, a kernel or a table.
        level: "cross_class" (the default) for both kinds, "class" for the C class means alone, as always of features.
        groups: (C,) the group of each class, as in `decompose`; C is then the number of groups.

    Raises:
        OptionError: another `of` or `level`, or groups that are not one number a class.
        LossError: the loss is not the cross-entropy of class labels.
        MemoryBudgetError: the means do not fit the problem's memory; C² P numbers are needed, or C P.
        CurvatureError: features and errors cannot be told apart by example.

    Cost: of gradients, class means one gradient; cross-class means C−1 backward passes on one forward pass. Batches
    that cannot be split by class (tokens, `forward=`) take a backward pass for each class, and each of up to C² − C
    cells, that they touch. Of errors the latter without weight gradients; of features a forward pass.

    Source: Papyan, JMLR 21:252 (2020), sections 4–6; the exclusion of k = c is forced by Σ_k p_k g_k = 0.
    """
    began = time.perf_counter()
    if of == "features" and level == "cross_class":
        warnings.warn(
            "class_means: features have no potential class; level='cross_class' changes nothing.",
            OptionWarning,
            stacklevel=2,
        )
    level = level or "cross_class"
    check_choice("of", of, KINDS)
    check_choice("level", level, LEVELS)
    if of == "gradients":
        factors = _of_gradients(problem, level, check_means(problem, level, groups))
    else:
        rows = HeldRows(problem)
        projections = rows.projections(groups=grouped(groups, problem.num_classes, problem.device))
        factors = _of_features(rows, projections) if of == "features" else _of_errors(rows, projections, level)
    weights, cells = factors.class_weights, factors.cell_weights
    means = means_of(factors.classes, weights).T
    crossed = None
    if factors.cells is not None and cells is not None:
        crossed = means_of(factors.cells, cells).permute(1, 2, 0)
    return ClassMeans(
        class_means=means,
        cross_class_means=crossed,
        class_weights=weights,
        cross_class_weights=cells,
        of=of,
        layers=factors.layers,
        **origin(began, means, of),
    )


class _Factors(NamedTuple):
    """XᵀB of rows X and averages B: √w_c x̄_c (D, C), √w_{c,k} x̄_{c,k} (D, C, C), their weights, places of layers."""

    classes: Tensor
    cells: Tensor | None
    class_weights: Tensor
    cell_weights: Tensor | None
    layers: dict[str, tuple[slice, ...]]


def _of_gradients(problem: Problem, level: str, groups: Tensor | None) -> _Factors:
    layers = _parameter_places(problem)
    if level == "cross_class":
        rows = GradientRows(problem)
        projections = rows.projections(groups=groups)
        return _of_cells(rows.cells(projections), projections, layers)
    sums, cells = class_sums(problem, groups)  # one pass, which need not know the weights beforehand
    weights = cells.clone().fill_diagonal_(0).sum(1)
    return _Factors(sums * -collinear(cells)[0].to(sums), None, weights, cells, layers)


def _of_cells(factor: Tensor, projections: Projections, layers: dict[str, tuple[slice, ...]]) -> _Factors:
    """From √w_{c,k} x̄_{c,k} (D, C²), of which the class means are collinear with the true ones (c, c)."""
    cells = factor.view(-1, *projections.by_class.shape)
    scale = collinear(projections.cell_weights)[0] * projections.cell_weights.diagonal().sqrt()
    classes = cells.diagonal(dim1=1, dim2=2) * -scale.to(cells)
    return _Factors(classes, cells, projections.class_weights, projections.cell_weights, layers)


def _of_features(rows: HeldRows, projections: Projections) -> _Factors:
    groups = projections.groups
    sizes, weight = membership(rows, groups).sum(0), counted(rows)
    basis = feature_averages(rows, groups).every * (weight / weight.sum()).sqrt()[:, None]
    means, layers = _averaged(rows.captures.features(), layer_inputs, basis, rows.problem.memory)
    return _Factors(means.T, None, sizes / sizes.sum(), None, layers)


def _of_errors(rows: HeldRows, projections: Projections, level: str) -> _Factors:
    basis = error_averages(rows, projections, ()).every  # (R, C²)
    means, layers = _averaged(rows.captures.batches(), layer_errors, basis, rows.problem.memory)
    found = _of_cells(means.T, projections, layers)
    return found if level == "cross_class" else found._replace(cells=None)


def _averaged(
    batches: Iterable[Captured], read: Callable[[list[Use]], dict[str, Tensor]], basis: Tensor, memory: int
) -> tuple[Tensor, dict[str, tuple[slice, ...]]]:
    """BᵀX (r, D) of rows X read from each batch, all layers one after the other, and where each of them is."""
    sums: dict[str, Tensor] = {}
    start = 0
    for found in alike(read(batch.uses) for batch in batches):
        if not sums:
            each = sum(rows.shape[1] * rows.element_size() for rows in found.values())
            what = f"{basis.shape[1]:,} means of all layers"
            refuse_beyond(basis.shape[1] * each, memory, f"{what} take", "Restrict the parameters, or raise memory.")
        stop = start + max(len(rows) for rows in found.values())
        for name, rows in found.items():
            sums[name] = sums.get(name, 0) + basis[start:stop].T.to(rows) @ rows
        start = stop
    ends = itertools.accumulate((total.shape[1] for total in sums.values()), initial=0)
    pairs = zip(sums, itertools.pairwise(ends), strict=True)
    places: dict[str, tuple[slice, ...]] = {name: (slice(*pair),) for name, pair in pairs}
    return torch.cat(list(sums.values()), 1), places


def _parameter_places(problem: Problem) -> dict[str, tuple[slice, ...]]:
    """Layer → where its parameters are in a vector (P,)."""
    places: dict[str, tuple[slice, ...]] = {}
    start = 0
    for name, value in problem.parameters.items():
        layer = layer_of(name)
        places[layer] = (*places.get(layer, ()), slice(start, start + value.numel()))
        start += value.numel()
    return places


def check_means(problem: Problem, level: str, groups: Groups | None) -> Tensor | None:
    """The groups of classes, checked, if means of gradients of this level are to be had. Raises as `class_means`."""
    labelled_loss(problem)
    found = grouped(groups, problem.num_classes, problem.device)
    num = num_groups(found, problem.num_classes) ** (2 if level == "cross_class" else 1)
    size = num * problem.num_parameters * torch.promote_types(problem.dtype, torch.float32).itemsize
    what = f"{num:,} means of {problem.num_parameters:,} parameters"
    advice = "Ask for level='class', put classes into groups, restrict the parameters, or raise memory."
    refuse_beyond(size, problem.memory, f"{what} take", advice)
    return found

"""Features and errors as rows: what enters each layer, and what backpropagation brings to its output.

They are averaged as gradients are. Rows of features are h_i/√N, with the parts mean, class and within; rows of errors
are √w_{i,k} e_{i,k}, with the parts of G.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from deepspectra.errors import CurvatureError, MissingNameError
from deepspectra.problem.memory_budget import refuse_beyond
from deepspectra.rows.averages import Averages
from deepspectra.rows.captures import Captured, layer_of
from deepspectra.rows.gradients import GradientRows
from deepspectra.rows.held_rows import HeldRows
from deepspectra.rows.parameter_uses import Convolution, Lookup, Matrix, Use
from deepspectra.rows.projections import Projections, num_groups


class LayerRows:
    """Rows X (R, D) of features or errors, the layers' one after the other."""

    def __init__(self, matrices: Mapping[str, Tensor]) -> None:
        self.matrices = matrices  # layer → its columns of X
        self.size = sum(matrix.shape[1] for matrix in matrices.values())

    def layer(self, name: str) -> LayerRows:
        """Those of one layer."""
        if name not in self.matrices:
            raise MissingNameError("layer", name, self.matrices)
        return LayerRows({name: self.matrices[name]})

    def gram(self) -> Tensor:
        """Inner products of the rows (R, R), float64."""
        return sum((X @ X.T).double() for X in self.matrices.values())  # type: ignore[return-value]

    def apply(self, block: Tensor) -> Tensor:
        """X V for a block (D, K): (R, K)."""
        pieces = torch.split(block, [X.shape[1] for X in self.matrices.values()])
        return sum(X @ piece for X, piece in zip(self.matrices.values(), pieces, strict=True))  # type: ignore[return-value]

    def transpose(self, rows: Tensor) -> Tensor:
        """Xᵀ α for α (R, K): (D, K)."""
        return torch.cat([X.T @ rows for X in self.matrices.values()])


def features_of(rows: HeldRows) -> dict[str, Tensor]:
    """Layer → h (N, D), for every layer that multiplies features by a matrix or a kernel. Cost: a forward pass."""
    return _gathered(rows, rows.captures.features(), layer_inputs, len(rows.labels))


def feature_rows(rows: HeldRows) -> LayerRows:
    """h_i/√N of every layer, 0 of rows that do not count."""
    weight = counted(rows)
    root = (weight / weight.sum()).sqrt()[:, None]
    return LayerRows({name: features * root.to(features) for name, features in features_of(rows).items()})


def error_rows(rows: HeldRows) -> LayerRows:
    """√w_{i,k} e_{i,k} at the output of every layer that has a matrix, a kernel or a table, as N (C − 1) rows."""
    num_rows = len(rows.labels) * (rows.weights.shape[1] - 1)
    return LayerRows(_gathered(rows, rows.captures.batches(), layer_errors, num_rows))


def layer_inputs(uses: list[Use]) -> dict[str, Tensor]:
    """Layer → what enters it (n, D), one row for each of the n rows of a batch; layers without are left out.

    An example with one row gives its whole input, all positions together; an example with a row a position gives
    the input there. Rows that belong to no single examples, as in graphs, have no input of their own.
    """
    found: dict[str, list[Tensor]] = {}
    for use in uses:
        if not isinstance(use, Matrix) or use.is_whole:
            continue
        if use.num_examples == use.num_rows:
            found.setdefault(layer_of(use.slice.name), []).append(use.inputs)
        elif not isinstance(use, Convolution) and use.features().shape[:2].numel() == use.num_rows:
            found.setdefault(layer_of(use.slice.name), []).append(use.features().flatten(0, 1))
    return {name: torch.cat(inputs, 1) for name, inputs in found.items()}


def layer_errors(uses: list[Use]) -> dict[str, Tensor]:
    """Layer → errors at its output (n (C − 1), D) for a batch's n rows, all positions together."""
    found: dict[str, list[Tensor]] = {}
    for use in uses:
        if isinstance(use, (Matrix, Lookup)):
            found.setdefault(layer_of(use.slice.name), []).append(use.errors.flatten(2).flatten(0, 1))
    return {name: torch.cat(errors, 1) for name, errors in found.items()}


def counted(rows: GradientRows) -> Tensor:
    """(N,) float64: 1 where a row counts, 0 where its label is ignored or its class has weight zero."""
    return (rows.curvature > 0).double()


def membership(rows: GradientRows, groups: Tensor | None = None) -> Tensor:
    """(N, C) float64: 1 where a row that counts is of a class, or of a group of classes."""
    labels = rows.labels if groups is None else groups[rows.labels]
    one_hot = torch.nn.functional.one_hot(labels, num_groups(groups, rows.weights.shape[1]))
    return one_hot.double() * counted(rows)[:, None]


def feature_averages(rows: GradientRows, groups: Tensor | None = None) -> Averages:
    """Of the N rows of features: "mean", and "class" about it."""
    return Averages.of_members(membership(rows, groups))


def error_averages(rows: HeldRows, projections: Projections, parts: tuple[str, ...]) -> Averages:
    """Of the N (C − 1) rows of errors, and of held gradients."""
    return projections.averages(parts, rows.complement.reduce)


def _gathered(
    rows: HeldRows, batches: Iterable[Captured], of: Callable[[list[Use]], dict[str, Tensor]], num_rows: int
) -> dict[str, Tensor]:
    """The rows of all batches."""
    pieces: dict[str, list[Tensor]] = {}
    for found in alike(of(batch.uses) for batch in batches):
        if not pieces:
            size = num_rows * sum(tensor.shape[1] * tensor.element_size() for tensor in found.values())
            instead = "Raise memory, of which that is a third, take fewer examples, or restrict the parameters."
            refuse_beyond(size, rows.captures.limit, f"{num_rows:,} rows of all layers take", instead)
        for name, tensor in found.items():
            pieces.setdefault(name, []).append(tensor)
    return {name: torch.cat(tensors) for name, tensors in pieces.items()}


def alike(read: Iterable[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Layer → rows of each batch, layers with no numbers left out.

    Raises:
        CurvatureError: a layer has rows on some batches only, or rows of another length, or no layer has rows.
    """
    widths: dict[str, int] = {}
    for found in read:
        here = {name: rows.shape[1] for name, rows in found.items()}
        if missing := sorted(widths.keys() ^ here.keys()) if widths else []:
            raise CurvatureError(
                f"layer {missing[0]!r} has features of its own for each output row on some batches only: on others "
                "rows belong to no single examples, or a way through the network is chosen by values. Those of "
                "gradients can be had: of='gradients', gram_spectrum and layers work. Or restrict the parameters."
            )
        widths = widths or here
        for name, width in here.items():
            if width != widths[name]:
                both = " or ".join(f"{size:,}" for size in sorted((width, widths[name])))
                raise CurvatureError(
                    f"rows of layer {name!r} have {both} numbers: examples have unequal numbers of positions, of "
                    "which whole features or errors make no matrix. Those of gradients do: of='gradients', "
                    "gram_spectrum and layers work. Or pad all examples to one length, or restrict the parameters."
                )
        if not any(widths.values()):
            raise CurvatureError("no layer multiplies features by a matrix, one row of features for each output row.")
        yield {name: rows for name, rows in found.items() if widths[name]}

"""Class structure layer by layer: features that enter, errors that come back, gradients, and neural collapse."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deepspectra.analysis.collapse import Collapse, collapse_of
from deepspectra.analysis.gram_spectrum import GramSpectrum, spectrum_of
from deepspectra.analysis.khatri_rao import KhatriRao, centred_spectrum, khatri_rao
from deepspectra.analysis.kronecker_quality import KroneckerQuality, kronecker_quality
from deepspectra.analysis.layer_blocks import SMALL
from deepspectra.analysis.layer_hessians import LayerHessian, layer_hessians
from deepspectra.argument_checks import LayerProgress, announced, check_count
from deepspectra.errors import CurvatureError, FallbackWarning, OptionWarning
from deepspectra.operators.parts import Decomposition
from deepspectra.problem.memory_budget import refuse_beyond
from deepspectra.problem.problem import Problem
from deepspectra.results import ByLayer, origin
from deepspectra.rows.averages import Averages
from deepspectra.rows.captures import parameters_of
from deepspectra.rows.held_rows import HeldRows, gram_bytes, gram_of, moment_of
from deepspectra.rows.layer_rows import (
    counted,
    error_averages,
    feature_averages,
    layer_errors,
    layer_inputs,
)
from deepspectra.rows.parameter_uses import Lookup, Matrix, Use
from deepspectra.rows.spectrum import Spectrum

PARTS = ("features", "mean", "class", "errors", "class")
STRUCTURE = ("λ₁ of G", "class", "logit", "within", *PARTS, "⊗ class", "⊗ cross", "NC1")


@dataclass(frozen=True)
class Layer:
    """What one layer's features, errors and gradients are made of.

    Attributes:
        name: of the module that owns the parameters.
        shape: of its first matrix or kernel, or of its first parameter.
        num_parameters: selected ones.
        features: spectrum of (1/N) Σ h hᵀ with parts "mean", "class" and "within", of the whole input of an
            example; None where rows are not examples, nothing is multiplied by features, or examples have unequal
            numbers of positions. With a row a position it is the input there.
        errors: spectrum of Σ w e eᵀ with the parts of G, of the whole output; None where there are none, or
            examples have unequal numbers of positions.
        gradients: spectrum of the layer's block of G.
        khatri_rao: see there; None without features, or where a parameter is used several times.
        collapse: see there; None without features.
        hessian: spectrum of the layer's block of H; None unless asked for, or without second derivatives.
        centred: spectrum of the gradients to the matrix or kernel with h − h̄ in place of the features h: what G's
            block would be without the mean feature; None where `khatri_rao` is, and for more than 3,000 rows.
    """

    name: str
    shape: tuple[int, ...]
    num_parameters: int
    features: GramSpectrum | None
    errors: GramSpectrum | None
    gradients: GramSpectrum
    khatri_rao: KhatriRao | None
    collapse: Collapse | None
    hessian: LayerHessian | None = None
    centred: GramSpectrum | None = None


@dataclass(frozen=True)
class Layers(ByLayer[Layer]):
    """Every layer, in the order of the parameters.

    Attributes:
        kronecker: how well Kronecker-factored approximations stand for each block of G, if asked for.
    """

    kronecker: KroneckerQuality | None = None

    def __str__(self) -> str:
        tables = [
            self._table(
                STRUCTURE,
                _structure,
                "shares of the largest eigenvalue of gradients; largest eigenvalue and trace shares of features and "
                "errors; ⊗: mean cosine between means of gradients and products of means",
            ),
            self._table(
                ("parameters", "λ₁ of G", "tr G", "stable rank", "‖R‖/‖G‖", "λ₁ of H", "tr H", "lowest of H"),
                _curvature,
                "blocks of each layer: stable rank ‖G‖_F²/‖G‖₂²; R = H − G, relative Frobenius norm",
            ),
        ]
        return "\n".join([*tables, *([str(self.kronecker)] if self.kronecker else [])])


def _structure(layer: Layer) -> list[float | str]:
    """What a layer's spectra are made of."""
    top = dict(zip(layer.gradients.part_names, layer.gradients.shares[0].tolist(), strict=True))
    products = layer.khatri_rao
    cosines = (products.class_cosine, products.cross_cosine) if products else (torch.tensor(math.nan),) * 2
    return [
        float(layer.gradients.values[0]),
        *(top.get(name, math.nan) for name in ("class", "logit", "within")),
        *_first(layer.features, ("mean", "class")),
        *_first(layer.errors, ("class",)),
        *(float(cosine.nanmean()) for cosine in cosines),
        layer.collapse.nc1 if layer.collapse else math.nan,
    ]


def _curvature(layer: Layer) -> list[float | str]:
    """Numbers of a layer's blocks of G and H."""
    values, h = layer.gradients.values, layer.hessian
    cells: list[float | str] = [f"{layer.num_parameters:,}", float(values[0]), float(values.sum())]
    cells.append(layer.gradients.stable_rank)
    if h is not None:
        cells.append(h.residual)
        cells += ["that of G"] if h.is_gauss_newton else [float(h.values[0]), h.trace, h.smallest]
    return cells


def _first(spectrum: GramSpectrum | None, parts: tuple[str, ...]) -> list[float]:
    """The largest eigenvalue, and what parts have of the trace."""
    if spectrum is None:
        return [math.nan] * (1 + len(parts))
    traces = dict(zip(spectrum.part_names, (spectrum.traces / spectrum.values.sum()).tolist(), strict=True))
    return [float(spectrum.values[0]), *(traces[part] for part in parts)]


def layers(
    problem: Problem,
    *,
    effects: str = "two-way",
    kronecker: Sequence[str] = (),
    hessian: bool = True,
    num: int | None = None,
    dtype: torch.dtype | None = None,
    progress: LayerProgress | None = None,
) -> Layers:
    """Class structure of every layer: exact spectra of features, errors and gradients with their parts.

    Features are whole inputs of an example and errors whole outputs, all positions together. Everything is
    exact, from Gram matrices; for up to about 12,000 rows N (C − 1). The Hessian's block of a layer is seen to be
    that of G, which is exact, or its largest eigenvalues, trace and density are found by products.

    Args:
        problem: one with cross-entropy and class labels.
        effects: "two-way" or "four-way", as in `decompose`.
        kronecker: approximations to be judged as by `kronecker_quality`, such as ("kfac", "cfac").
        hessian: whether to look at the Hessian's blocks too; a network without second derivatives has none, and
            gets a FallbackWarning.
        num: eigenvalues of each block of the Hessian; by default the number of classes. Warned of without them.
        dtype: to compute in; the problem's own by default.
        progress: called with (layers done, layers in all, name of the next).

    Raises:
        OptionError: num below 1.
        LossError: the loss is not the cross-entropy of class labels.
        MemoryBudgetError: a Gram matrix, or one layer's features and errors, do not fit memory.
        CurvatureError: features and errors cannot be told apart by example.

    Cost: C − 1 backward passes without weight gradients, repeated for every group of layers whose features and
    errors fit memory together; Gram matrices and their eigenvalues, three a layer; for the Hessian a pass that
    builds second-order graphs, and about 100 products with each block that is not G's.

    Source: Papyan 2020, JMLR 21:252, sections 4–6.
    """
    began = time.perf_counter()
    if num is not None and not hessian:
        warnings.warn(f"num={num} is not used: hessian=False.", OptionWarning, stacklevel=2)
    num = problem.num_classes if num is None else num
    check_count("num", num)
    parts = Decomposition(problem if dtype is None else problem.to(dtype), effects=effects, hold=True)
    rows = parts.rows
    assert isinstance(rows, HeldRows)
    averages = error_averages(rows, parts.projections, tuple(parts))
    found = {}
    for name, uses in announced(rows.captures.by_layer(), progress, len(parts.problem.layers)):
        found[name] = _layer(name, uses, parts, averages)
    rows.captures.release()
    if hessian:
        found = _with_hessian(parts.problem, found, num, progress)
    quality = kronecker_quality(problem, kronecker, dtype=dtype, progress=progress) if kronecker else None
    return Layers(found, quality, **origin(began, parts.problem))


def _with_hessian(
    problem: Problem, found: dict[str, Layer], num: int, progress: LayerProgress | None
) -> dict[str, Layer]:
    """The layers with the spectra of their blocks of H, if the network has second derivatives."""
    spectra = {name: layer.gradients for name, layer in found.items()}
    try:
        blocks = layer_hessians(problem, spectra, num, progress=progress)
    except CurvatureError as error:
        warnings.warn(
            f"layers: without the Hessian's blocks, since {error} Pass hessian=False if that is meant.",
            FallbackWarning,
            stacklevel=3,
        )
        return found
    return {name: replace(layer, hessian=blocks[name]) for name, layer in found.items()}


def _layer(name: str, uses: list[list[Use]], parts: Decomposition, averages: Averages) -> Layer:
    rows = parts.rows
    own = parameters_of(parts.problem, name)
    size = sum(value.numel() for value in own.values())
    matrices = [[use for use in batch if isinstance(use, Matrix)] for batch in uses]
    fed = [use for use in uses[0] if isinstance(use, (Matrix, Lookup))]
    first = next((use.slice.shape for use in fed), next(iter(own.values())).shape)
    features = _stacked([layer_inputs(batch).get(name) for batch in uses])
    errors = _stacked([layer_errors(batch).get(name) for batch in uses])
    single = features is not None and all(
        len(batch) == 1 and batch[0].num_examples == batch[0].num_rows for batch in matrices
    )
    return Layer(
        name=name,
        shape=tuple(first),
        num_parameters=size,
        features=None if features is None else _feature_spectrum(features, parts, name),
        errors=None if errors is None else _row_spectrum(errors, averages, parts, f"errors of {name}"),
        gradients=_gradient_spectrum(uses, averages, size, parts, name),
        khatri_rao=khatri_rao([batch[0] for batch in matrices], parts, averages) if single else None,
        collapse=None if features is None else collapse_of(features, rows, name),
        centred=centred_spectrum([batch[0] for batch in matrices], parts, averages, name)
        if single and len(averages.every) <= SMALL
        else None,
    )


def _stacked(pieces: Sequence[Tensor | None]) -> Tensor | None:
    """Rows of all batches; None if a batch has none, or examples have unequal numbers of positions."""
    found = [piece for piece in pieces if piece is not None]
    widths = {piece.shape[1] for piece in found}
    one_width = len(found) == len(pieces) and len(widths) == 1 and widths != {0}
    return torch.cat(found) if one_width else None


def _row_spectrum(rows: Tensor, averages: Averages, parts: Decomposition, what: str) -> GramSpectrum:
    """Of rows that are held."""
    began = time.perf_counter()
    spectrum = Spectrum.of_rows(rows, averages, torch.finfo(parts.problem.dtype).eps)
    return spectrum_of(spectrum, began, rows, what)


def _gradient_spectrum(
    uses: list[list[Use]], averages: Averages, size: int, parts: Decomposition, name: str
) -> GramSpectrum:
    """Of a layer's gradients, from their inner products or from their second moment, whichever is smaller."""
    began = time.perf_counter()
    num_rows = len(averages.every)
    side = min(num_rows, size)
    what = f"a matrix of {side:,} rows, for the spectrum of {name or 'the model'}, and its eigenvectors"
    refuse_beyond(
        gram_bytes(side), parts.problem.memory, f"{what} take", "Take fewer examples, or raise memory."
    )
    eps = torch.finfo(parts.problem.dtype).eps
    spectrum = (
        Spectrum.of_moment(*moment_of(uses, averages), eps)
        if size < num_rows
        else Spectrum.of_gram(gram_of([uses]), averages, size, eps)
    )
    return spectrum_of(spectrum, began, parts.problem, f"gradients of {name}", size=size)


def _feature_spectrum(features: Tensor, parts: Decomposition, name: str) -> GramSpectrum:
    """Of (1/N) Σ h hᵀ: global mean, class means about it, scatter within classes."""
    weight = counted(parts.rows)
    scaled = features * (weight / weight.sum()).sqrt().to(features)[:, None]
    return _row_spectrum(scaled, feature_averages(parts.rows), parts, f"features of {name}")

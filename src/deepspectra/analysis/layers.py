"""Class structure layer by layer: features that enter, errors that come back, gradients, and neural collapse."""

from __future__ import annotations

import functools
import math
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from deepspectra.algorithms.density import density
from deepspectra.algorithms.eigenpairs import eigenpairs
from deepspectra.algorithms.estimates import trace
from deepspectra.analysis.collapse import Collapse, collapse_of
from deepspectra.analysis.gram_spectrum import GramSpectrum, spectrum_of
from deepspectra.analysis.kronecker_quality import Fit, KroneckerQuality, LayerFits, quality_of
from deepspectra.analysis.layer_blocks import SMALL
from deepspectra.analysis.products_of_means import KhatriRao, centred_spectrum, khatri_rao
from deepspectra.argument_checks import LayerProgress, announced, check_count, seeded
from deepspectra.errors import CurvatureError, FallbackWarning, MemoryBudgetError, OptionWarning
from deepspectra.operators.curvature import Hessian, HessianBlock, Residual
from deepspectra.operators.parts import Decomposition
from deepspectra.problem.finished_stages import FinishedStages, Label, stages_of
from deepspectra.problem.memory_budget import refuse_beyond
from deepspectra.problem.problem import Problem
from deepspectra.quadrature import Density
from deepspectra.results import ByLayer, origin
from deepspectra.rows.averages import Averages
from deepspectra.rows.captures import num_parameters_of, parameters_of
from deepspectra.rows.features_and_errors import (
    counted,
    error_averages,
    feature_averages,
    layer_errors,
    layer_inputs,
)
from deepspectra.rows.held_rows import HeldRows, gram_bytes, gram_of, moment_of
from deepspectra.rows.parameter_uses import Lookup, Matrix, Use
from deepspectra.rows.spectrum import Spectrum

PARTS = ("features", "mean", "class", "errors", "class")
STRUCTURE = ("λ₁ of G", "class", "logit", "within", *PARTS, "⊗ class", "⊗ cross", "NC1")
CHECKS = 2  # random vectors by which R's blocks are seen to be zero or not
ROUNDING = 100  # times ε, below which R's block is zero
RTOL = 1e-2  # of eigenpairs of a block of H,
PROBES, STEPS = 2, 24  # of its density,
TRACE_PRODUCTS = 16  # and of its trace


@dataclass(frozen=True)
class LayerHessian:
    """The spectrum of one layer's diagonal block of the Hessian.

    Where the outputs are linear in the layer's own parameters (piecewise linear networks without sharing of
    weights) the residual's block is zero and the Hessian's is that of G, whose exact spectrum this then is.

    Attributes:
        residual: ‖R‖_F/‖G‖_F of the blocks, estimated from 2 random vectors; 0 up to rounding, ∞ where
            only G's is zero.
        values: (K,) largest eigenvalues, descending.
        residual_norms: (K,) ‖H v − λ v‖, measured; 0 where G's block was taken.
        trace: of the block.
        trace_standard_error: of `trace`.
        density: of its eigenvalues.
        num_products: with the block, spent on all of it.
    """

    residual: float
    values: Tensor
    residual_norms: Tensor
    trace: float
    trace_standard_error: float
    density: Density
    num_products: int

    @property
    def smallest(self) -> float:
        """The lowest node of the density."""
        return float(self.density.nodes.min())

    @property
    def is_gauss_newton(self) -> bool:
        """Whether the block is G's, up to rounding."""
        return not self.num_products


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
            block would be without the mean feature; None where `khatri_rao` is, and where the smaller
            of rows and parameters is above 3,000.
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


@dataclass(frozen=True, repr=False)
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


RESULTS = (Averages, Collapse, Fit, GramSpectrum, KhatriRao, Layer, LayerFits, LayerHessian)  # of what is kept


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
    resume: str | Path | None = None,
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
        resume: a folder where finished layers are kept; called again with it after a stop, it goes on behind them,
            with the same result up to rounding. Spectra alone take room; it can be removed in the end.
        progress: called with (layers done, layers in all, name of the next).

    Raises:
        OptionError: num below 1.
        LossError: the loss is not the cross-entropy of class labels.
        MemoryBudgetError: one layer's features and errors do not fit memory, or of no layer the Gram matrix. A layer
            among others is left out, with a FallbackWarning that says so; `left_out` has the reason, and with
            `resume` and more memory that layer alone is done.
        FileError: the folder to resume from is of another problem or of other options, or damaged.
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
    rows = HeldRows(problem if dtype is None else problem.to(dtype))
    parts = Decomposition(rows, effects)
    options: dict[str, Label] = {"effects": effects, "hessian": hessian, "eigenvalues of H": num}
    options["kronecker"] = ",".join(kronecker)
    run = _Run(progress, stages_of("layers", [parts.problem], resume, RESULTS, **options))
    found = run.layers(parts)
    rows.captures.release()
    if hessian:
        found = _with_hessian(parts.problem, found, num, run)
    quality = None
    if kronecker:
        quality = quality_of(parts.problem, kronecker, progress=progress, stages=run.stages)
        run.left_out |= {f"Kronecker factors of {name}": why for name, why in quality.left_out.items()}
    for name, reason in run.left_out.items():  # what was computed of the others is not lost for it
        warnings.warn(f"layers leaves out {name}: {reason}", FallbackWarning, stacklevel=2)
    return Layers(found, quality, left_out=run.left_out, **origin(began, parts.problem))


class _Run:
    """One call of `layers`: what it keeps of finished layers, and what it leaves out for want of memory."""

    def __init__(self, progress: LayerProgress | None, stages: FinishedStages) -> None:
        self.progress, self.stages = progress, stages
        self.left_out: dict[str, str] = {}

    def layers(self, parts: Decomposition) -> dict[str, Layer]:
        """Every layer that fits memory, in order; those that were finished before are not captured again.

        Raises:
            MemoryBudgetError: none fits.
        """
        names = parts.problem.layers
        stages = {name: f"layer {place}" for place, name in enumerate(names)}
        found = {name: layer for name in names if (layer := self.stages.read(stages[name])) is not None}
        rows, refusal = parts.held, None
        averages = error_averages(rows, parts.projections, tuple(parts))
        of_live = averages.at(rows.live)
        left = rows.captures.by_layer(without=frozenset(found))
        for name, uses in announced(left, self.progress, len(names), len(found)):
            try:
                found[name] = _layer(name, uses, parts, averages, of_live)
            except MemoryBudgetError as error:
                self.left_out[name or "the model"], refusal = str(error), error
                continue
            self.stages.write(stages[name], found[name])
        if refusal is not None and not found:
            raise refusal
        return {name: found[name] for name in names if name in found}


def _with_hessian(problem: Problem, found: dict[str, Layer], num: int, run: _Run) -> dict[str, Layer]:
    """The layers with the spectra of their blocks of H, if the network has second derivatives."""
    spectra = {name: layer.gradients for name, layer in found.items()}
    try:
        blocks = _layer_hessians(problem, spectra, num, run)
    except CurvatureError as error:
        warnings.warn(
            f"layers: without the Hessian's blocks, since {error} Pass hessian=False if that is meant.",
            FallbackWarning,
            stacklevel=3,
        )
        return found
    return {name: replace(layer, hessian=blocks.get(name)) for name, layer in found.items()}


def _layer_hessians(
    problem: Problem, gradients: Mapping[str, GramSpectrum], num: int, run: _Run
) -> dict[str, LayerHessian]:
    """Spectra of every layer's block of H, `num` eigenvalues of each, given the exact spectra of G's blocks.

    Raises:
        CurvatureError: the network cannot be differentiated twice.

    Cost: one pass that builds second-order graphs; for each layer whose outputs are not linear in its
        parameters, about 100 products with its block, of graphs that all layers share.

    Source: Wu et al. 2020, arXiv 2010.04261, section 3, for layer-wise Hessians of piecewise linear networks.
    """
    owned = {layer: list(parameters_of(problem, layer)) for layer in gradients}
    sizes = _residual_sizes(problem, owned, gradients)
    eps = torch.finfo(torch.promote_types(problem.dtype, torch.float32)).eps
    hessian = Hessian(problem)
    hessian.products.release()  # R's graphs
    found = {}
    for done, (layer, spectrum) in enumerate(gradients.items()):
        if sizes[layer] <= ROUNDING * eps:
            values = spectrum.values[:num]
            found[layer] = LayerHessian(
                residual=sizes[layer],
                values=values,
                residual_norms=torch.zeros_like(values),
                trace=float(spectrum.values.sum()),
                trace_standard_error=0.0,
                density=spectrum.density,
                num_products=0,
            )
            continue
        if run.progress is not None:
            run.progress(done, len(gradients), f"{layer} of H")
        block = HessianBlock(hessian, owned[layer])
        work = functools.partial(_measured, block, sizes[layer], num)
        try:
            found[layer] = run.stages.run(f"H of layer {problem.layers.index(layer)}", work)
        except MemoryBudgetError as error:
            run.left_out[f"{layer} of H"] = str(error)
    hessian.products.release()
    return found


def _residual_sizes(
    problem: Problem, owned: Mapping[str, list[str]], gradients: Mapping[str, GramSpectrum]
) -> dict[str, float]:
    """‖R‖_F/‖G‖_F of each layer's blocks; 0 if both are zero, ∞ if only G's is."""
    generator = seeded(0)
    blocks = []
    for layer in problem.layers:  # those left out draw theirs too, so that the others' are the same
        vectors = torch.randn(num_parameters_of(problem, layer), CHECKS, generator=generator)
        if layer in owned:
            blocks.append((owned[layer], vectors.to(problem.device)))
    products = Residual(problem).diagonal_blocks(blocks)
    found = {}
    for layer, product in zip(owned, products, strict=True):
        size, whole = float(product.double().norm()) / CHECKS**0.5, float(gradients[layer].values.norm())
        found[layer] = size / whole if whole else math.inf if size else 0.0
    return found


def _measured(block: HessianBlock, residual: float, num: int) -> LayerHessian:
    pairs = eigenpairs(block, min(num, block.shape[0]), rtol=RTOL)
    spectrum = density(block, PROBES, STEPS, deflate=pairs)
    total = trace(block, TRACE_PRODUCTS)
    return LayerHessian(
        residual=residual,
        values=pairs.values.cpu(),
        residual_norms=pairs.residual_norms.cpu(),
        trace=total.value,
        trace_standard_error=total.standard_error,
        density=spectrum,
        num_products=pairs.num_products + spectrum.num_products + total.num_products,
    )


def _layer(name: str, uses: list[list[Use]], parts: Decomposition, averages: Averages, of_live: Averages) -> Layer:
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
        errors=None
        if errors is None
        else _row_spectrum(errors[parts.held.live], of_live, parts, f"errors of {name}"),
        gradients=_gradient_spectrum(uses, averages, of_live, parts, name),
        khatri_rao=khatri_rao([batch[0] for batch in matrices], parts, averages) if single else None,
        collapse=None if features is None else collapse_of(features, rows, name),
        centred=centred_spectrum([batch[0] for batch in matrices], parts, averages, name)
        if single and min(len(averages.every), matrices[0][0].slice.numel) <= SMALL
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
    uses: list[list[Use]], averages: Averages, of_live: Averages, parts: Decomposition, name: str
) -> GramSpectrum:
    """Of a layer's gradients, from their inner products or from their second moment, whichever is smaller."""
    began = time.perf_counter()
    live = parts.held.live
    num_rows, size = len(live), num_parameters_of(parts.problem, name)
    side = min(num_rows, size)
    what = f"a matrix of {side:,} rows, for the spectrum of {name or 'the model'}, and its eigenvectors"
    refuse_beyond(gram_bytes(side), parts.problem.memory, f"{what} take", "Take fewer examples, or raise memory.")
    eps = torch.finfo(parts.problem.dtype).eps
    spectrum = (
        Spectrum.of_moment(*moment_of(uses, averages), eps)
        if size < num_rows
        else Spectrum.of_gram(gram_of([uses], live=live), of_live, size, eps)
    )
    return spectrum_of(spectrum, began, parts.problem, f"gradients of {name}", size=size)


def _feature_spectrum(features: Tensor, parts: Decomposition, name: str) -> GramSpectrum:
    """Of (1/N) Σ h hᵀ: global mean, class means about it, scatter within classes."""
    weight = counted(parts.rows)
    scaled, counts = features * (weight / weight.sum()).sqrt().to(features)[:, None], parts.held.counted
    averages = feature_averages(parts.rows).at(counts)
    return _row_spectrum(scaled[counts], averages, parts, f"features of {name}")

"""A cell of the claims' sweep: a network trained as the papers train, and every number that claims are judged by."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import deepspectra as ds
from deepspectra import zoo
from deepspectra.algorithms.eigenpair_search import SPARE_VECTORS
from deepspectra.algorithms.eigenpairs import explore
from deepspectra.algorithms.estimates import frobenius_norm
from deepspectra.analysis.attribute import Attribution, attribute_known
from deepspectra.analysis.gram_spectrum import gradient_pairs, gradient_spectrum, gradient_trace, spectrum_of
from deepspectra.analysis.principal_subspace import subspace_of
from deepspectra.errors import ConvergenceWarning, MemoryBudgetError
from deepspectra.jobs.sweep_zoo import ZooCell, decades_over, gram_measures
from deepspectra.operators.curvature import Curvature, Residual
from deepspectra.operators.parts import Decomposition
from deepspectra.rows.held_rows import HeldRows

SPARE_PAIRS = 3  # beyond the number of classes
RTOL = 1e-2  # of eigenpairs
EXACT_ROWS = 3000  # N (C − 1) up to which the whole spectrum of G, and every layer, are computed
NORM_PRODUCTS = 4  # for a Frobenius norm
AT_ONCE = 512  # examples of a batch of products, where nothing is held of all
CLUSTERED = 60  # examples whose gradients are compared
EPOCHS = {"cifar10": 350}  # of others 200, as the papers
KNOCKOUTS = {"class": ("class",), "logit": ("logit",), "class_logit": ("class", "logit")}


@dataclass(frozen=True)
class ClaimsCell(ZooCell):
    """A network of the zoo, trained for 200 or 350 epochs at the best of three rates, and what claims ask of it.

    Rates are that of `zoo.recipe`, whose batches are taken, a half and a quarter of it.

    Measures of the Hessian are those of `operator_measures`, with ``hessian_`` before their names; of G likewise, or
    those of `gram_measures` where its whole spectrum is computed; ``overlap_class`` and ``overlap_cross_class`` of
    both; ``norm`` and ``norm_residual``, Frobenius norms of G (without the whole spectrum that of its first pairs, a
    little less) and R; ``clustering``; and, at the end of a training whose spectrum is computed, those of `shifts`
    and `layer_measures`.
    """

    rates: tuple[float, ...] = (0.25, 0.5, 1.0)

    def recipe(self, model: str, data: str, num_examples: int) -> zoo.Recipe:
        """That of the papers."""
        milestones = zoo.Recipe.milestones
        return replace(zoo.recipe(model, data, num_examples), epochs=EPOCHS.get(data, 200), milestones=milestones)

    def measures(self, problem: ds.Problem, seed: int, ended: bool) -> dict[str, Any]:
        """See the class."""
        return measure(problem, seed, ended)

    def _held(self, num_examples: int, num_classes: int, num_captured: int, num_weights: int) -> int:
        means = (2 * num_classes**2 + 4 * num_classes) * num_weights  # and a basis that grows
        if num_examples * (num_classes - 1) <= EXACT_ROWS:
            return means + super()._held(num_examples, num_classes, num_captured, num_weights)
        return means + min(num_examples, AT_ONCE) * num_captured


def measure(problem: ds.Problem, seed: int = 0, ended: bool = True) -> dict[str, Any]:
    """Every number that claims are judged by, of a network at its training data; of layers at the end of training."""
    exact = problem.num_examples * (problem.num_classes - 1) <= EXACT_ROWS
    found: dict[str, Any] = {
        "loss": problem.loss(),
        "accuracy": problem.accuracy(),
        "num_examples": problem.num_examples,
        "num_parameters": problem.num_parameters,
    }
    parts = ds.decompose(problem, effects="two-way")
    top = problem.num_classes - 1
    if not parts.holds_means():  # once for all that is asked of them
        raise MemoryBudgetError("the means of all pairs of classes do not fit memory. Take fewer parameters.")
    averaged = {level: subspace_of(parts, level, top)[1] for level in ("class", "cross_class")}
    hessian, gauss_newton = ds.Hessian(problem), ds.GaussNewton(problem)
    if exact:
        whole, pairs = exact_pairs(problem, top + SPARE_PAIRS)
        found |= gram_measures(problem, whole) | overlaps(averaged, pairs, "")
        found["norm"] = float(whole.values.norm())
        pairs = judged(hessian, parts, pairs.vectors, found, "hessian_")
    else:
        pairs = judged(hessian, parts, "random", found, "hessian_")
        found |= overlaps(averaged, judged(gauss_newton, parts, pairs.vectors, found, ""), "")
        found |= means_measures(problem, parts, found["bulk_edge"])
        found["norm"] = float(found["value"].norm())
    found |= overlaps(averaged, pairs, "hessian_")
    residual = frobenius_norm(Residual(problem), NORM_PRODUCTS, seed)
    found |= {"norm_residual": residual.value, "norm_residual_error": residual.standard_error}
    found["clustering"] = ds.clustering(problem, num_examples=CLUSTERED, seed=seed).gradients
    return found | (shifts(problem) | layer_measures(problem) if exact and ended else {})


def exact_pairs(problem: ds.Problem, num: int) -> tuple[ds.GramSpectrum, ds.Eigenpairs]:
    """The whole spectrum of G, and its first pairs, in float64."""
    began = time.perf_counter()
    parts = Decomposition(HeldRows(problem.to(torch.float64)), "two-way")
    spectrum = gradient_spectrum(parts)
    whole = spectrum_of(spectrum, began, parts.problem)
    pairs = gradient_pairs(spectrum, parts, num, began)
    return whole, replace(pairs, vectors=pairs.vectors.to(problem.dtype))


def judged(
    operator: Curvature, parts: Decomposition, start: Tensor | str, found: dict[str, Any], prefix: str
) -> ds.Eigenpairs:
    """The first pairs of H or G; what is measured of them joins what was found."""
    num = parts.problem.num_classes + SPARE_PAIRS
    operator.memory = max(operator.memory, parts.num_bytes(2 * num + SPARE_VECTORS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # is told below
        pairs, basis = explore(operator, num, rtol=RTOL, start=start)
    measured = operator_measures(attribute_known(operator, parts, pairs, basis))
    found |= {f"{prefix}{name}": value for name, value in measured.items()}
    found[f"{prefix}converged"] = pairs.converged
    operator.products.release()
    return pairs


def overlaps(averaged: Mapping[str, Tensor], pairs: ds.Eigenpairs, prefix: str) -> dict[str, float]:
    """How much of the first C − 1 eigenvectors averages find."""
    return {
        f"{prefix}overlap_{level}": ds.overlap(vectors, pairs.vectors[:, : vectors.shape[1]])
        for level, vectors in averaged.items()
    }


def operator_measures(found: Attribution) -> dict[str, Any]:
    """``value``, the largest; ``outliers`` and ``bulk_edge``; ``share_…``; ``value_without_…`` and ``left_…``.

    Eigenvalues without means are lower bounds, and so is ``left_…``, the number of outliers among them;
    ``left_…_at_most`` counts those that are outliers when their residuals are added.
    """
    measured: dict[str, Any] = {
        "value": found.values,
        "outliers": found.num_outliers,
        "bulk_edge": found.bulk_edge,
    }
    measured |= {f"share_{name}": share for name, share in found.mean_shares.items()}
    for name, removed in KNOCKOUTS.items():
        for method in ("subtraction", "projection"):
            knockout = found.knockout(*removed, method=method)
            measured[f"value_without_{name}_{method}"] = knockout.values
            measured[f"left_{name}_{method}"] = knockout.num_outliers
            measured[f"left_{name}_{method}_at_most"] = knockout.num_outliers_at_most
    return measured


def means_measures(problem: ds.Problem, parts: Decomposition, edge: float) -> dict[str, Any]:
    """Of `gram_measures` those that the means tell at any size: ``trace_…`` and ``bump_clearance``."""
    means = parts.factor("means").double()
    gram, values = means.T @ means, {}
    for name in ("class", "logit", "interaction", "true"):
        basis = parts.projections.basis(name).flatten(0, 1)
        rank = round(float(basis.square().sum()))  # of columns that are orthonormal, or a projection
        values[name] = torch.linalg.eigvalsh(basis.T @ gram @ basis)[-rank:]
    traces = {name: float(some.sum()) for name, some in values.items()}
    total, bump = gradient_trace(problem)[0], values["interaction"]
    traces["within"] = max(0.0, total - sum(traces.values()))
    found = {f"trace_{name}": value for name, value in traces.items()}
    return found | {"trace": total, "bump_clearance": decades_over(bump, edge)}


def shifts(problem: ds.Problem) -> dict[str, Any]:
    """``shift_class`` and so on: how far each knock-out moves outliers, bump and bulk of G, in decades of λ."""
    found = ds.regions(problem.to(torch.float64), by_layer=False, num_groups=0).whole
    names = (name.replace(" + ", "_") for name in found.knockouts)
    return {f"shift_{name}": values for name, values in zip(names, found.values, strict=True)}


def layer_measures(problem: ds.Problem) -> dict[str, Any]:
    """Of each layer, from input to output: ``layer``, its name, and ``layer_…``.

    Class shares of features and errors, products of means, neural collapse.
    """
    found: dict[str, list[Any]] = {}
    for layer in ds.layers(problem, hessian=False).values():
        if layer.features is None or layer.errors is None or layer.collapse is None:
            continue
        features, errors, products = layer.features, layer.errors, layer.khatri_rao
        between = float(features.parts["class"].sum())
        one = {
            "layer": layer.name,
            "layer_features_between": between / (between + float(features.parts["within"].sum())),
            "layer_features_mean": float(features.parts["mean"].sum() / features.values.sum()),
            "layer_errors_class": float(errors.parts["class"].sum() / errors.values.sum()),
            "layer_errors_top_over_bulk": _over(errors.values, errors.parts["within"]),
            "layer_features_top_over_bulk": _over(features.parts["class"], features.parts["within"]),
            "layer_class_cosine": float(products.class_cosine.nanmean()) if products else math.nan,
            "layer_cross_cosine": float(products.cross_cosine.nanmean()) if products else math.nan,
            "layer_nc1": layer.collapse.nc1,
            "layer_simplex": layer.collapse.nc2_simplex,
        }
        for name, value in one.items():
            found.setdefault(name, []).append(value)
    return found


def _over(values: Tensor, others: Tensor) -> float:
    """How many times the largest of some eigenvalues is that of others; NaN without any."""
    return float(values[0] / others[0]) if len(values) and len(others) else math.nan

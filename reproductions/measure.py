"""One trained network: every number that the claims are judged by."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import deepspectra as ds
from deepspectra import zoo
from deepspectra.algorithms.eigenpair_search import SPARE_VECTORS
from deepspectra.algorithms.eigenpairs import explore
from deepspectra.analysis.attribute import attribute_known, pair_shares
from deepspectra.analysis.principal_subspace import residual_norm, subspace_of
from deepspectra.argument_checks import seeded

SPARE_PAIRS = 3  # beyond the number of classes
RTOL = 1e-2  # of eigenpairs; of
LARGE = 5_000_000  # parameters or more: those of G from those of H, and, from
RTOL_LARGE = 3e-2
DEAR = 1_000  # examples on, of a sample of
SHARE = 10  # one in so many,
FEWEST = 340  # and no fewer than these, which
CHECKS = 2  # products on all the data certify
TEST_EXAMPLES = 2000
EXACT_ROWS = 3000  # up to which the whole spectrum of G, and every layer, are computed
NETWORK_SIZE = {"mlp": None, "mlp-bn": None}  # others take images padded to 32


@dataclass(frozen=True)
class Run:
    """A network, what it is trained on, and the seed of both."""

    model: str
    data: str
    per_class: int
    seed: int


def measure(run: Run, root: Path) -> dict[str, Any]:
    """Train, analyse, and return a record of plain numbers."""
    began = time.perf_counter()
    size = 32 if run.model not in NETWORK_SIZE else None
    train = zoo.load(run.data, root=root, per_class=run.per_class, size=size, seed=run.seed)
    test = zoo.load(run.data, root=root, split="test", size=size)
    some = torch.linspace(0, len(test) - 1, TEST_EXAMPLES).long()
    num_classes = len(train.class_names)
    model = zoo.build(
        run.model, input_shape=tuple(train.inputs.shape[1:]), num_classes=num_classes, seed=run.seed
    )
    recipe = asdict(zoo.recipe(run.model, run.data, len(train)))
    zoo.train(model, train, **recipe, seed=run.seed)
    with torch.no_grad():
        wrong = (model(test.inputs[some]).argmax(1) != test.targets[some]).double().mean()
    problem = ds.Problem(model, train)
    record: dict[str, Any] = {
        **asdict(run),
        "num_parameters": problem.num_parameters,
        "train_accuracy": problem.accuracy(),
        "loss": problem.loss(),
        "test_error": float(wrong),
    }
    record |= outliers_and_averages(problem, num_classes)
    if problem.num_examples * (num_classes - 1) <= EXACT_ROWS:
        record |= regions(problem, num_classes) | by_layer(problem)
    record["clustering"] = ds.clustering(problem, num_examples=60, seed=run.seed).gradients.tolist()
    return record | {"seconds": time.perf_counter() - began}


def outliers_and_averages(problem: ds.Problem, num_classes: int) -> dict[str, Any]:
    """Counts, shares and knock-outs of H and G, and overlaps of the averaged subspaces with both."""
    large = problem.num_parameters >= LARGE
    parts = ds.decompose(problem, effects="two-way")
    top, num = num_classes - 1, num_classes + SPARE_PAIRS
    held = parts.holds_means()  # once for the averages and both attributions, if they fit
    averaged = {level: subspace_of(parts, level, top)[1] for level in ("class", "cross_class")}
    if not held:
        parts.factor("logit")  # while they are there
        parts.forget_means()
    record: dict[str, Any] = {}
    start: torch.Tensor | str = "random"
    for name, whole in (("H", ds.Hessian(problem)), ("G", ds.GaussNewton(problem))):
        operator, shared = whole, parts
        if large and problem.num_examples >= DEAR:
            operator = whole.sampled(seeded(0), max(FEWEST, problem.num_examples // SHARE))
            shared = ds.decompose(operator.problem, effects="two-way")
        operator.memory = max(operator.memory, parts.num_bytes(2 * num + SPARE_VECTORS))
        pairs, basis = explore(operator, num, rtol=RTOL_LARGE if large else RTOL, start=start)
        start = pairs.vectors if large else "random"
        found = attribute_known(operator, parts, pairs, basis, shares=pair_shares(shared, pairs))
        del basis
        for some in (operator, whole):
            some.products.release()
        if operator is not whole and name == "H":
            record["sample"] = certified(problem, pairs, operator.problem.num_examples, top)
            whole.products.release()
        record[name] = {
            "values": pairs.values.tolist(),
            "converged": pairs.converged,
            "edge": found.bulk_edge,
            "outliers": found.num_outliers,
            "shares": found.mean_shares,
            "left": {
                f"{knockout.name}, {knockout.method}": [knockout.num_outliers, knockout.num_outliers_at_most]
                for knockout in found.knockouts
                if knockout.removed
            },
            "overlap": {
                level: ds.overlap(vectors, pairs.vectors[:, :top]) for level, vectors in averaged.items()
            },
            "ratio": float(pairs.values[:top].mean()) / found.bulk_edge,
        }
    return record


def certified(problem: ds.Problem, pairs: ds.Eigenpairs, num_samples: int, top: int) -> dict[str, float]:
    """How far the span of the first pairs of a sample is from an eigenspace of H on all the data."""
    norm, error = residual_norm(problem, pairs.vectors[:, :top], CHECKS, seeded(1))
    return {"examples": num_samples, "residual": norm, "error": error}


def regions(problem: ds.Problem, num_classes: int) -> dict[str, Any]:
    """How far each knock-out moves outliers, bump and bulk of G, in decades of λ, from the exact spectrum."""
    found = ds.regions(problem.to(torch.float64), by_layer=False, num_groups=0).whole
    spectrum = ds.gram_spectrum(problem, effects="two-way")
    return {
        "shifts": {
            name: dict(zip(found.regions, shifts, strict=True))
            for name, shifts in zip(found.knockouts, found.values.tolist(), strict=True)
        },
        "traces": dict(zip(spectrum.part_names, spectrum.traces.tolist(), strict=True)),
        "exact_values": spectrum.values[: num_classes**2 + 1].tolist(),
    }


def by_layer(problem: ds.Problem) -> dict[str, Any]:
    """Each layer, from input to output: class shares of features and errors, products of means, neural collapse."""
    rows = []
    for layer in ds.layers(problem, hessian=False).values():
        if layer.features is None or layer.errors is None or layer.collapse is None:
            continue
        features, errors = layer.features, layer.errors
        between = float(features.parts["class"].sum())
        products = layer.khatri_rao
        tops = dict(zip(layer.gradients.part_names, layer.gradients.shares[0].tolist(), strict=True))
        rows.append(
            {
                "layer": layer.name,
                "features_between": between / (between + float(features.parts["within"].sum())),
                "features_mean": float(features.parts["mean"].sum() / features.values.sum()),
                "errors_class": float(errors.parts["class"].sum() / errors.values.sum()),
                "errors_top_over_bulk": float(errors.values[0] / errors.parts["within"][0]),
                "features_top_over_bulk": float(features.parts["class"][0] / features.parts["within"][0]),
                "gradient_top": tops,
                "class_cosine": float(products.class_cosine.nanmean()) if products else None,
                "cross_cosine": float(products.cross_cosine.nanmean()) if products else None,
                "nc1": layer.collapse.nc1,
                "simplex": layer.collapse.nc2_simplex,
            }
        )
    return {"layers": rows}

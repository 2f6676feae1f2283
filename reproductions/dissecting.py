"""The claims on layers and Kronecker factors, measured, and written beside the published numbers."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import deepspectra as ds
from deepspectra import zoo
from deepspectra.analysis.layer_measures import LEFT, MEASURES, Measured, layer_measures, spectrum_measures
from deepspectra.jobs.sweep_store import MANIFEST
from reproductions.records import Record, of_store
from reproductions.verdicts import table

HERE = Path(__file__).parent.parent / "docs"
RECORDS, PAGE = HERE / "dissecting.jsonl", HERE / "dissecting.md"
NETWORKS = 2  # trainings of each variant
WHOLE = "all layers"
MOST_ROWS = 3000  # N (C − 1) for which the spectrum of G over all layers is computed
SHARED = ("shared", "shared_peak")  # overlaps of the eigenspaces of two networks, at k = m and where they are highest


@dataclass(frozen=True)
class Variant:
    """How one of a study's networks is made.

    Attributes:
        name: of the variant.
        batch_norm: put after every ReLU.
        random_labels: drawn for the training set.
        epochs: of training, as a multiple of the run's; None for one epoch.
        classes: how many of the data's are kept, the first ones; None for all.
    """

    name: str
    batch_norm: bool = False
    random_labels: bool = False
    epochs: int | None = 1
    classes: int | None = None

    def of(self, data: zoo.LabelledData, seed: int) -> zoo.LabelledData:
        """The examples that this variant is trained on."""
        data = data if self.classes is None else data.of_classes(self.classes)
        return data.relabelled(seed) if self.random_labels else data


STUDIES: Mapping[str, tuple[Variant, ...]] = {
    "plain": (Variant("plain"),),
    "batch-norm": (Variant("plain"), Variant("batch norm", batch_norm=True)),
    "random-labels": (Variant("true labels"), Variant("random labels", random_labels=True, epochs=4)),
    "initialisation": (
        Variant("initialisation", epochs=0),
        Variant("one epoch", epochs=None),
        Variant("trained"),
    ),
    "classes": tuple(Variant(f"{num} classes", classes=num) for num in (2, 3, 5, 10)),
}


@dataclass(frozen=True)
class Run:
    """One study of one network. Training is the paper's: SGD without momentum or weight decay."""

    name: str
    study: str
    build: Callable[..., nn.Module]
    data: str
    side: int | None
    per_class: int
    epochs: int
    learning_rate: float = 0.01
    batch_size: int = 16


def _runs() -> dict[str, Run]:
    small = partial(zoo.mlp, widths=(200, 200))
    narrow = partial(zoo.resnet18, widths=(48, 48, 48, 48), batch_norm=False)
    runs = [
        Run("784-200-200-10, mnist", "batch-norm", small, "mnist", None, 100, 60),
        Run("lenet, mnist", "batch-norm", zoo.lenet, "mnist", 32, 100, 60),
        Run("lenet, cifar10", "batch-norm", zoo.lenet, "cifar10", None, 100, 150),
        Run("lenet, cifar10", "random-labels", zoo.lenet, "cifar10", None, 30, 300),
        Run("784-200-200-10, mnist", "initialisation", small, "mnist", None, 30, 100),
        Run("784-200-200-10, mnist", "classes", small, "mnist", None, 30, 100),
        Run("784-200-200-10, fashion", "classes", small, "fashion", None, 30, 100),
        Run("vgg11-w48, cifar10", "plain", partial(zoo.vgg11, width=48), "cifar10", None, 30, 100),
        Run("resnet18-w48, cifar10", "plain", narrow, "cifar10", None, 20, 250, learning_rate=0.05),
    ]
    return {f"{run.name.replace(', ', '-')}-{run.study}": run for run in runs}


KINDS = ("kfac", "ekfac", "cfac")
CONVOLUTIONS = ("conv", "features", "layer")  # how the names of these networks' convolutions begin
VGG_CONVOLUTIONS = (0, 3, 6, 8, 11, 13, 16, 18)  # places among the features
RUNS = _runs()
# Wu et al. 2020, arXiv 2010.04261: figures 6, 21, 26-28 read off, tables 6-9; trained on all the data
PUBLISHED: dict[tuple[str, str, str, str], str] = {
    **{
        ("lenet, cifar10", "plain", layer, "shared"): value
        for layer, value in (
            ("conv1", ".78"),
            ("conv2", ".38"),
            ("fc1", ".46"),
            ("fc2", ".16"),
            ("fc3", ".20–.26"),
        )
    },
    **{
        ("lenet, cifar10", "batch norm", layer, "shared"): value
        for layer, value in (("conv1", ".88"), ("fc1", ".015"), ("fc2", ".009"), ("fc3", ".02"))
    },
    **{
        ("lenet, cifar10", "plain", layer, "rank_one"): value
        for layer, value in (
            ("conv1", ".99"),
            ("conv2", ".94"),
            ("fc1", ".85"),
            ("fc2", ".75"),
            ("fc3", ".85"),
        )
    },
    **{("lenet, cifar10", "plain", layer, "input_ratio"): "7.2" for layer in ("fc1", "fc2", "fc3")},
    **{("lenet, cifar10", "plain", layer, "input_ratio"): "15.9" for layer in ("conv1", "conv2")},
    **{("lenet, cifar10", "batch norm", layer, "input_ratio"): "1.54" for layer in ("fc1", "fc2", "fc3")},
    **{("784-200-200-10, mnist", "plain", layer, "input_ratio"): "12.3" for layer in ("fc2", "fc3")},
    **{("784-200-200-10, mnist", "batch norm", layer, "input_ratio"): "1.16" for layer in ("fc2", "fc3")},
    **{
        ("lenet, mnist", "plain", layer, "closed_form"): value
        for layer, value in (("fc1", ".890"), ("fc2", ".931"), ("fc3", ".999"))
    },
    **{
        ("lenet, cifar10", "true labels", layer, "closed_form"): value
        for layer, value in (("fc1", ".951"), ("fc2", ".972"), ("fc3", ".999"))
    },
    **{
        ("lenet, cifar10", "random labels", layer, "closed_form"): value
        for layer, value in (("fc1", ".213"), ("fc2", ".701"), ("fc3", ".999"))
    },
    **{
        ("784-200-200-10, mnist", "plain", layer, "kfac_overlap"): value
        for layer, value in (("fc1", ".97–.74"), ("fc2", ".95"), ("fc3", ".9"))
    },
    **{("lenet, cifar10", "batch norm", layer, "kfac_overlap"): ".40–.46" for layer in ("fc1", "fc2")},
    ("vgg11-w48, cifar10", "plain", "features.13", "shared"): ".50",
    ("resnet18-w48, cifar10", "plain", "layer3.1.conv1", "shared"): ".43",
    **{("vgg11-w48, cifar10", "plain", f"classifier.{j}", "input_ratio"): "6" for j in (0, 2, 4)},
    **{("vgg11-w48, cifar10", "plain", f"features.{j}", "input_ratio"): "5.2–5.8" for j in VGG_CONVOLUTIONS},
    ("resnet18-w48, cifar10", "plain", "fc", "input_ratio"): "27–28",
    **{
        ("resnet18-w48, cifar10", "plain", f"layer{stage}.{block}.conv{conv}", "input_ratio"): "3.8–4.2"
        for stage in (1, 2, 3, 4)
        for block in (0, 1)
        for conv in (1, 2)
    },
}


@dataclass(frozen=True)
class DissectingCell:
    """A cell of a sweep over runs: every variant is trained and studied.

    Measures: ``study`` (variants, layers, measures, samples), with their names ``variant``, ``layer`` and
    ``measured``; ``whole`` (variants, 2), how much of the top C − 1 eigenspace u ⊗ E[x] finds over all parameters,
    and as published; ``accuracies`` (variants, networks).
    """

    root: Path = field(repr=False)
    version = "1"

    def __call__(self, run: str) -> dict[str, Any]:
        """See the class."""
        return measure(RUNS[run], self.root)


def measure(run: Run, root: Path) -> dict[str, Any]:
    """Train every variant, and measure each network and each pair of them."""
    found: dict[str, list[dict[str, Measured]]] = {}
    whole, accuracies = [], []
    for variant in STUDIES[run.study]:
        problems = [_trained(run, variant, seed, root) for seed in range(NETWORKS)]
        found[variant.name] = [of_network(problem) for problem in problems]
        found[variant.name] += [of_pair(*pair) for pair in itertools.combinations(problems, 2)]
        dissected = ds.dissect(problems[0]).whole
        assert dissected is not None
        top = problems[0].num_classes - 2  # of the top C − 1
        whole.append([float(some[top]) for some in (dissected.overlaps, dissected.published_overlaps)])
        accuracies.append([problem.accuracy() for problem in problems])
    layers = list(dict.fromkeys(layer for samples in found.values() for one in samples for layer in one))
    measured = [*MEASURES, *SHARED]
    study = [
        [[[one.get(layer, {}).get(key, math.nan) for one in samples] for key in measured] for layer in layers]
        for samples in found.values()
    ]
    about = {"variant": [*found], "layer": layers, "measured": measured}
    return about | {"study": study, "whole": whole, "accuracies": accuracies}


def of_network(problem: ds.Problem) -> dict[str, Measured]:
    """Layer → measures, and what the whole spectrum of G tells where it is computed."""
    found, inner = layer_measures(problem), problem.num_classes - 1
    if problem.num_examples * inner <= MOST_ROWS:
        whole = ds.gram_spectrum(problem, effects="two-way", dtype=problem.dtype)
        found[WHOLE] = spectrum_measures(whole, inner)
    return found


def of_pair(one: ds.Problem, other: ds.Problem) -> dict[str, Measured]:
    """Layer → overlaps of the eigenspaces of two networks."""
    found = {}
    for layer in ds.compare(one, other, num_whole=0).values():
        at = min(layer.outputs, len(layer.ks)) - 1
        found[layer.name] = dict(zip(SHARED, (float(layer.measured[at]), layer.peak[1]), strict=True))
    return found


def record(run: Run, cell: Mapping[str, Any]) -> Record:
    """What the page shows of a run, with its layers and measures by name."""
    values = {
        variant: {
            layer: {
                measure: [one for one in samples.tolist() if math.isfinite(one)]
                for measure, samples in zip(cell["measured"], measures, strict=True)
            }
            for layer, measures in zip(cell["layer"], layers, strict=True)
        }
        for variant, layers in zip(cell["variant"], np.asarray(cell["study"]), strict=True)
    }
    whole, accuracies = (
        dict(zip(cell["variant"], np.asarray(cell[name]).tolist(), strict=True)) for name in ("whole", "accuracies")
    )
    about = {"name": run.name, "study": run.study, "per_class": run.per_class, "epochs": run.epochs}
    return about | {"values": values, "whole": whole, "accuracies": accuracies}


def go_on(store: Path, root: Path) -> None:
    """Sweep the runs of which there is no record."""
    known = {(record["name"], record["study"]) for record in _recorded()}
    missing = [key for key, run in RUNS.items() if (run.name, run.study) not in known]
    if missing:
        ds.sweep(DissectingCell(root), {"run": missing}, store, executor=1)


def write_page(store: Path) -> None:
    """From the records, and what a store has beyond."""
    cells = of_store(ds.gather(store)) if (store / MANIFEST).is_file() else []
    PAGE.write_text(page([*_recorded(), *(record(RUNS[cell["run"]], cell) for cell in cells)]))


def _recorded() -> list[Record]:
    return [json.loads(line) for line in RECORDS.read_text().splitlines()]


def _trained(run: Run, variant: Variant, seed: int, root: Path) -> ds.Problem:
    data = variant.of(zoo.load(run.data, root=root, per_class=run.per_class, size=run.side, seed=0), 0)
    torch.manual_seed(seed)
    model = run.build(data.input_shape, data.num_classes)
    model = zoo.normalised(model, data.input_shape) if variant.batch_norm else model
    epochs = 1 if variant.epochs is None else variant.epochs * run.epochs
    options = {"learning_rate": run.learning_rate, "batch_size": run.batch_size, "milestones": ()}
    zoo.train(model, data, epochs=epochs, momentum=0.0, weight_decay=0.0, seed=seed, **options)
    return ds.Problem(model, data)


def page(records: list[Record]) -> str:
    """The page as Markdown."""
    parts = [
        "# Dissecting layers on real data",
        "",
        f"{NETWORKS} trainings of each network by SGD without momentum or weight decay, measured on the images that "
        "they were trained on; published numbers are those of Wu et al. 2020 (arXiv 2010.04261), who train on all "
        "of the data. `make reproduce` measures what is missing in [dissecting.jsonl](dissecting.jsonl) and writes "
        "this page.",
    ]
    for record in records:
        parts += ["", *_section(record)]
    return "\n".join([*parts, "", *_best(records)]) + "\n"


SHOWN = (
    ("input_ratio", "λ₁/λ₂ of E[xxᵀ]"),
    ("rank_one", "σ₁/‖·‖"),
    ("gap", "λ₉/λ₁₀"),
    ("closed_form", "closed form"),
    ("kfac_overlap", "top 9 of KFAC"),
    ("shared", "between networks, k = m"),
    ("kfac_error", "KFAC"),
    ("ekfac_error", "EKFAC"),
    ("cfac_error", "CFAC"),
)


def _section(record: Record) -> list[str]:
    accuracies = "; ".join(
        f"{variant} {' and '.join(f'{a:.1%}' for a in values)}" for variant, values in record["accuracies"].items()
    )
    rows = []
    for variant, layers in record["values"].items():
        for layer, measures in layers.items():
            if layer == WHOLE:
                continue
            cells = [_cell(record["name"], variant, layer, key, measures.get(key, [])) for key, _ in SHOWN]
            rows.append([layer, variant, *cells])
    wholes = "; ".join(f"{variant} {one:.2f} ({other:.2f})" for variant, (one, other) in record["whole"].items())
    outliers = _outliers(record)
    return [
        f"## {record['name']}: {record['study'].replace('-', ' ')}",
        "",
        f"{record['per_class']} images a class, {record['epochs']} epochs. Training accuracy: {accuracies}. "
        f"All parameters: overlap of u ⊗ E[x] with the top nine eigenvectors of G (as published): {wholes}. "
        "In brackets: published. The last three columns are ‖G − K‖_F/‖G‖_F.",
        "",
        *([outliers, ""] if outliers else []),
        table(["layer", "variant", *(label for _, label in SHOWN)], rows),
    ]


def _outliers(record: Record) -> str:
    """How many outliers of G there are, what means leave of them, and what these have of the top C − 1."""
    told = []
    for variant, layers in record["values"].items():
        measures = {key: sum(some) / len(some) for key, some in layers.get(WHOLE, {}).items() if some}
        if "outliers" in measures:
            counts = " → ".join(f"{measures[key]:.3g}" for key in LEFT)
            told.append(f"{variant} {counts} ({measures['class_share']:.0%}, {measures['logit_share']:.0%})")
    return (
        "Outliers of G → left without class means → left without class and logit means (what class and logit means "
        f"have of the top C − 1 eigenvalues): {'; '.join(told)}."
        if told
        else ""
    )


def _cell(name: str, variant: str, layer: str, measure: str, values: list[float]) -> str:
    published = PUBLISHED.get((name, variant, layer, measure))
    text = f"{sum(values) / len(values):.3g}" if values else "–"
    return f"{text} ({published})" if published else text


def _best(records: list[Record]) -> list[str]:
    """In how many layers of which kind which approximation is nearest to G."""
    wins: dict[str, dict[str, int]] = {}
    for record in records:
        for variant, layers in record["values"].items():
            for layer, measures in layers.items():
                errors = {kind: sum(measures.get(f"{kind}_error", [])) for kind in KINDS}
                if all(errors.values()):
                    place = "convolution" if layer.startswith(CONVOLUTIONS) else "fully connected"
                    if variant == "batch norm":
                        place += ", batch norm"
                    counts = wins.setdefault(place, dict.fromkeys(KINDS, 0))
                    counts[min(errors, key=lambda kind: errors[kind])] += 1
    rows = [[place, *(str(counts[kind]) for kind in KINDS)] for place, counts in sorted(wins.items())]
    return [
        "## Which approximation is nearest",
        "",
        "In how many layers each has the smallest ‖G − K‖_F.",
        "",
        table(["layers", *(kind.upper() for kind in KINDS)], rows),
    ]

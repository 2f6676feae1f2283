"""Ready studies of how networks differ, as jobs: their variants, a labelled dataset and a verdict."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from deepspectra.analysis.study import LEFT, MOST_ROWS, WHOLE, Study
from deepspectra.jobs.pages import UNLABELLED, Dataset, Labels, page_dataset
from deepspectra.problem.problem import Problem
from deepspectra.zoo import LabelledData

RANDOM_LABELS_EPOCHS = 4  # times those of true labels, which take fewer to fit
TOLD = (  # in the verdict
    *("input_ratio", "gap", "kfac_error", "kfac_overlap", "class_share", "logit_share", "shared"),
)


@dataclass(frozen=True)
class Variant:
    """How one of a study's networks is made.

    Attributes:
        name: of the variant.
        batch_norm: put after every ReLU.
        random_labels: drawn for the training set.
        epochs: of training, as a multiple of the recipe's; None for one epoch.
        classes: how many of the data's are kept, the first ones; None for all.
    """

    name: str
    batch_norm: bool = False
    random_labels: bool = False
    epochs: int | None = 1
    classes: int | None = None

    def of(self, data: LabelledData, seed: int) -> LabelledData:
        """The examples that this variant is trained on."""
        data = data if self.classes is None else data.of_classes(self.classes)
        return data.relabelled(seed) if self.random_labels else data


STUDIES: Mapping[str, tuple[Variant, ...]] = {
    "batch-norm": (Variant("plain"), Variant("batch norm", batch_norm=True)),
    "random-labels": (
        Variant("true labels"),
        Variant("random labels", random_labels=True, epochs=RANDOM_LABELS_EPOCHS),
    ),
    "initialisation": (
        Variant("initialisation", epochs=0),
        Variant("one epoch", epochs=None),
        Variant("trained"),
    ),
    "classes": tuple(Variant(f"{num} classes", classes=num) for num in (2, 3, 5, 10)),
}


def study_dataset(found: Study, problem: Problem, labels: Labels = UNLABELLED, *, name: str = "") -> Dataset:
    """Every number of `study`, of some name; `problem` is one of its networks."""
    variables = {
        "study": (("variant", "layer", "measured", "sample"), torch.stack([*found.values()], 1).numpy()),
        "study_loss": (("variant", "network"), found.losses.numpy()),
        "study_accuracy": (("variant", "network"), found.accuracies.numpy()),
    }
    coords = {
        "variant": list(found.variants),
        "layer": list(found),
        "measured": list(found.measures),
    }
    subject = f"Study of {name}:" if name else "Study of"
    dataset = page_dataset(variables, coords, problem, labels, subject, sentences(found), found.seconds)
    dataset.attrs["measures"] = json.dumps(dict(found.measures))
    for one in ("loss_value", "accuracy"):  # of one network: the table has all
        del dataset.attrs[one]
    return dataset


def sentences(found: Study) -> list[str]:
    """The verdict: how the last variant differs from the first, in the mean over layers and in how many layers."""
    first, last = found.variants[0], found.variants[-1]
    layers = [name for name in found if name != WHOLE]
    whole = _explained(found)
    if first == last:
        return [f"{len(layers)} layers of {first}.", *whole]
    lines, lower = [], 0
    for key in TOLD:
        pairs = [
            (float(one.mean()), float(other.mean()))
            for one, other in ((found.of(first, name, key), found.of(last, name, key)) for name in layers)
            if len(one) and len(other)
        ]
        if not pairs:
            continue
        before, after = np.array(pairs).mean(0)
        falls = sum(other < one for one, other in pairs)
        way = f"lower in {falls}" if after < before else f"higher in {sum(other > one for one, other in pairs)}"
        lower += after < before
        lines.append(f"Mean {found.measures[key]}: {before:.3g}, then {after:.3g} ({way} of {len(pairs)} layers).")
    head = f"From {first} to {last}, {lower} of {len(lines)} measures fall on average over the layers."
    return [*whole, head, *lines]


def _explained(found: Study) -> list[str]:
    """How many outliers of G there are, and how many the means leave, variant by variant."""
    if WHOLE not in found:
        return []
    counts = [
        f"{variant} " + " → ".join(f"{float(found.of(variant, WHOLE, key).mean()):.3g}" for key in LEFT)
        for variant in found.variants
        if len(found.of(variant, WHOLE, "outliers"))
    ]
    uncounted = [name for name in found.variants if not len(found.of(name, WHOLE, "outliers"))]
    more = f" Not counted, for more than {MOST_ROWS:,} rows N (C − 1): {', '.join(uncounted)}."
    return [
        "Outliers of G → left without class means → left without class and logit means, on average over networks: "
        f"{'; '.join(counts)}." + (more if uncounted else "")
    ]

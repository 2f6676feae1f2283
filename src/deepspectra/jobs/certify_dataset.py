"""The certificate as a job: a labelled dataset of its numbers and its account, and what makes it resumable."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from deepspectra.certificates.certify import Certificate
from deepspectra.certificates.networks import examples_of
from deepspectra.jobs.pages import UNLABELLED, Dataset, Labels, Variables, page_dataset, provenance
from deepspectra.problem.finished_stages import Label, digest
from deepspectra.problem.problem import Problem
from deepspectra.results import versions

MEASURES = ("kl", "scale", "parameters", "free", "loss_increase")


def certificate_dataset(found: Certificate, problem: Problem, labels: Labels = UNLABELLED) -> Dataset:
    """Every number of a `Certificate`, but the weights."""
    bounds = _bounds(found)
    numbers = {
        (name, measure): value
        for name, one in found.layers.items()
        for measure, value in zip(
            MEASURES,
            (one.divergence, one.scale, one.num_parameters, one.num_kept, one.loss_increase),
            strict=True,
        )
    }
    charges = found.ledger.rows()
    variables: Variables = {
        "bound": (("bounded", "bound_end"), bounds),
        "charge": (("charged",), np.array([nats for _, nats in charges])),
        "posterior": (("layer", "posterior_measure"), numbers),
        "posterior_curvature": (
            ("layer", "weight"),
            {name: one.curvature for name, one in found.layers.items()},
        ),
        "posterior_variance": (
            ("layer", "weight"),
            {name: one.variance for name, one in found.layers.items()},
        ),
        "descent": (("epoch", "descent_measure"), np.array(found.curve).reshape(-1, 2)),
        "noise_cost": (("said_by",), np.array(found.loss_increase)),
    }
    coords = {
        "bounded": list(bounds),
        "bound_end": ["observed", "bound"],
        "charged": [name for name, _ in charges],
        "layer": list(found.layers),
        "posterior_measure": list(MEASURES),
        "epoch": range(1, len(found.curve) + 1),
        "descent_measure": ["error", "kl"],
        "said_by": ["quadratic model", "draws"],
    }
    dataset = page_dataset(variables, coords, problem, labels, "Certificate of", found.sentences, found.seconds)
    settings = {name: value for name, value in asdict(found.settings).items() if value is not None}
    ledger = found.ledger
    return dataset.assign_attrs(
        provenance=provenance(
            seconds=round(found.seconds, 1),
            prior=found.prior.name,
            priors_tried=found.num_tried * found.prior.tried,
            settings={name: str(value) for name, value in settings.items()},
            may_fail={"bound": ledger.delta, **ledger.others},
            seeds=dict(ledger.seeds),
            draws=found.num_draws,
            nats_an_example=ledger.nats_an_example,
        )
    )


def identity(problem: Problem, priors: Sequence[Any], settings: Mapping[str, Any], seed: int) -> dict[str, Label]:
    """What makes a certificate this one and no other, for its unfinished work to be taken up.

    Minutes are left out: they may be more the next time. The order of the data belongs to it: what is drawn for an
    example goes by its place.

    Raises:
        CertificateError: there can be none.
    """
    examples = examples_of(problem)
    weights = [value.detach() for value in problem.model.state_dict().values()]
    counted = {name: value for name, value in settings.items() if name != "minutes"}
    return {
        "weights": digest(weights),
        "data": digest([examples.inputs, examples.labels]),
        "examples": len(examples),
        "priors": json.dumps([str(prior) for prior in priors]),
        "settings": json.dumps({name: str(value) for name, value in sorted(counted.items())}),
        "seed": seed,
        "version": versions()["deepspectra"],
    }


def _bounds(found: Certificate) -> dict[str, tuple[float, float]]:
    """What is bounded → what was observed, and the bound."""
    known = {"stochastic network": (found.empirical_error, found.value)}
    if found.deterministic is not None:
        known["unmodified network"] = (math.nan, found.deterministic.value)
    for one in found.test_bounds:
        known[f"{one.network}, binomial"] = (one.num_errors / max(1, one.num_examples), one.value)
    if not math.isnan(found.test_error):
        known["stochastic network on test data"] = (found.test_error, math.nan)
        known["its mean on test data"] = (found.mean_test_error, math.nan)
    known["its mean on the examples"] = (found.mean_error, math.nan)
    return known

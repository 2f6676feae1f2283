"""Ready studies, and what is saved of one."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import deepspectra as ds
from deepspectra import zoo
from deepspectra.jobs.pages import Labels
from deepspectra.jobs.study_dataset import STUDIES, Variant, sentences, study_dataset
from nets import CASES


def test_there_are_four_studies() -> None:
    assert list(STUDIES) == ["batch-norm", "random-labels", "initialisation", "classes"]
    assert [variant.of(zoo.load("digits", per_class=2), 0).num_classes for variant in STUDIES["classes"]] == [
        2,
        3,
        5,
        10,
    ]


def test_what_is_saved_of_a_study_is_what_was_found():
    problems = {name: [CASES[name]().problem()] for name in ("relu_mlp",)}
    found = ds.study(problems)
    dataset = study_dataset(found, problems["relu_mlp"][0], Labels("net"), name="mine")
    for layer, table in found.items():
        np.testing.assert_allclose(dataset["study"].sel(layer=layer).values, table.numpy())
    assert float(dataset["study_loss"].squeeze()) == pytest.approx(problems["relu_mlp"][0].loss())
    assert dataset.attrs["title"] == "Study of mine: net"
    assert json.loads(dataset.attrs["measures"]) == dict(found.measures)
    assert "accuracy" not in dataset.attrs, "one network's would pass for all"
    assert sentences(found)[0] == "3 layers of relu_mlp."


def test_a_variant_changes_its_examples_only_as_it_says():
    data = zoo.load("digits", per_class=3)
    assert Variant("plain").of(data, 0) is data
    some = Variant("few", classes=3).of(data, 0)
    assert some.targets.unique().tolist() == [0, 1, 2]
    drawn = Variant("random", random_labels=True).of(data, 4)
    assert torch.equal(drawn.targets, data.relabelled(4).targets)

"""Ready studies, and what is saved of one."""

from __future__ import annotations

from deepspectra import zoo
from deepspectra.jobs.study_dataset import STUDIES


def test_there_are_four_studies() -> None:
    assert list(STUDIES) == ["batch-norm", "random-labels", "initialisation", "classes"]
    assert [variant.of(zoo.load("digits", per_class=2), 0).num_classes for variant in STUDIES["classes"]] == [
        2,
        3,
        5,
        10,
    ]

"""Errors of functions name the options of the command line, and nothing else as if it were one."""

from __future__ import annotations

import pytest

from deepspectra.errors import FileError, OptionError, TargetError
from deepspectra.jobs.option_names import in_options, spelled

NAMES = ["num", "num_groups", "of", "memory", "prior", "data", "test"]
SAID = {
    "num must be an integer, at least 1; got 0.": "--num must be an integer, at least 1; got 0.",
    "num_groups=1 leaves nothing; with num_groups=0 there are none.": "--num-groups=1 leaves nothing; with "
    "--num-groups=0 there are none.",
    "prior='x'; it is one of 'learnt'.": "--prior='x'; it is one of 'learnt'.",
    "A.memory = 256 bytes holds 0. Ask for less or raise A.memory.": "A.memory = 256 bytes holds 0. Ask for less or "
    "raise --memory.",
    "Raise memory=, take fewer examples, or raise memory.": "Raise --memory, take fewer examples, or raise --memory.",
    "test= takes a pair.": "--test takes a pair.",
}
KEPT = (
    "the data must be one batch: pass data=[(x, y)], or data=list(...).",
    "pass class_means(problem, of='errors').",
    "Give them: prior=Prior(centre=the network).",
    "rtol must lie between 0 and 1.",
    "num_probes=3 and --num=3.",
)


@pytest.mark.parametrize("text", SAID)
def test_arguments_are_said_as_options(text: str) -> None:
    assert spelled(text, NAMES) == SAID[text]


@pytest.mark.parametrize("text", KEPT)
def test_all_else_is_left(text: str) -> None:
    assert spelled(text, NAMES) == text


def test_errors_keep_their_kind_and_what_the_users_code_says_is_left() -> None:
    with pytest.raises(OptionError, match=r"^--num must be"), in_options({"num"}):
        raise OptionError("num must be an integer.")
    with pytest.raises(TargetError, match=r"^num=0"), in_options({"num"}):
        raise TargetError("num=0 in a line of a traceback")
    with pytest.raises(FileError, match="num=0"), in_options(()):
        raise FileError("num=0")

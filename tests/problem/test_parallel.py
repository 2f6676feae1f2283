from __future__ import annotations

import pytest
import torch

import shared_work
from deepspectra.problem import parallel
from processes import run_in


@pytest.fixture(scope="module")
def said() -> list[dict]:
    """What three processes got of each other."""
    return run_in(3, shared_work.conversation)


def test_all_get_the_same_sums_and_what_each_has(said: list[dict]) -> None:
    for found in said:
        assert found["sums"] == [3.0, 3.0]
        assert [one.item() for one in found["every"]] == [0, 1, 2]
        assert found["total"].tolist() == [9.0] * 3
        assert found["still together"] == [3.0]


def test_batches_are_dealt_in_turn_and_come_back_in_order(said: list[dict]) -> None:
    for found in said:
        assert found["dealt"] == [0, 10, 20, 30, 40]
        assert found["in turn"] == [(0, 0), (1, 1), (2, 2), (3, 0), (4, 1)]
        assert found["later"] == [(1, 1), (2, 2), (3, 0), (4, 1)]
        assert found["first"] == "made by 0"


def test_what_one_process_raises_all_raise(said: list[dict]) -> None:
    for found in said:
        assert found["raised in a pass"] == "MissingNameError: no part 'x'; there are a, b."
        assert found["raised in turn"].startswith("ZeroDivisionError")
        assert found["raised by the first"].startswith("ZeroDivisionError")
        assert found["names"] == "IrregularError: frozenset({'weight'})"
    assert said[1]["unsendable"] == "LocalError: of this function alone"
    assert said[0]["unsendable"] == "ProcessError: a process failed: LocalError: of this function alone"


def test_a_process_that_ends_is_told_to_the_others() -> None:
    (told,) = run_in(2, shared_work.left_alone, survivors=1)
    assert told.startswith("ProcessError: another process ended, or has not answered for 60 minutes")
    assert "--resume" in told


def test_one_process_is_a_group_of_one() -> None:
    group, total = parallel.current(torch.device("cpu")), torch.ones(2)
    assert group == parallel.ALONE
    with group.summing(total):
        total += 1
    assert total.tolist() == [2, 2]
    assert group.every("a") == ["a"]
    assert group.dealt([1, 2]) == [1, 2]
    assert list(group.in_turn(lambda index: index, 3)) == [0, 1, 2]
    assert group.of_first(lambda: 1) == 1
    with pytest.raises(ZeroDivisionError), group.summing():
        _ = 1 // 0
    with parallel.joined() as joined:
        assert joined == parallel.ALONE


def test_processes_of_one_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert parallel.neighbours() == 4
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert parallel.neighbours() == 1

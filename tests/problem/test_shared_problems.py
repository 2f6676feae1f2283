from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deepspectra as ds
import nets
import shared_work
from processes import run_in

SEVERAL = ["every_option", "digits", "token_classes", "language_model"]
UNEVEN = ["every_option"]  # batches of 5, 2 and 11 examples: the fourth of four processes has none
DIFFERENT = ("weights", "order", "shares", "nothing", "one batch")


@pytest.fixture(scope="module")
def alone() -> dict[str, Tensor]:
    """What one process gives."""
    return shared_work.everything(SEVERAL)


@pytest.fixture(scope="module")
def two() -> list[list[Any]]:
    """What two processes give, of all that is asked of two."""
    others = [(shared_work.different, (what,)) for what in DIFFERENT]
    alike = shared_work.with_unlike_memory, shared_work.held_by_some
    rest = [(work, ()) for work in (shared_work.within_wrapper, shared_work.streamed, shared_work.spread, *alike)]
    return run_in(2, shared_work.each_of, [(shared_work.everything, (SEVERAL,)), *others, *rest])


def assert_alike(found: list[dict[str, Tensor]], expected: dict[str, Tensor]) -> None:
    """All have what one process has up to rounding, and each other's bits."""
    assert found
    for name, value in expected.items():
        if name.endswith("residuals"):  # which are rounding themselves beside their eigenvalues
            scale = expected[name.replace("residuals", "values")].abs().max()
            assert (found[0][name] - value).abs().max() <= 1e-9 * scale
        else:
            torch.testing.assert_close(found[0][name], value, rtol=1e-9, atol=1e-9 * float(value.norm()), msg=name)
        for one in found[1:]:
            assert torch.equal(one[name], found[0][name]), name


def test_two_processes_give_what_one_gives(two: list[list[Any]], alone: dict[str, Tensor]) -> None:
    assert_alike([found[0] for found in two], alone)


@pytest.mark.parametrize("num", [3, 4])
def test_uneven_and_empty_shares_give_what_one_process_gives(num: int, alone: dict[str, Tensor]) -> None:
    expected = {key: value for key, value in alone.items() if key.startswith(UNEVEN[0])}
    every = run_in(num, shared_work.each_of, [(shared_work.everything, (UNEVEN,)), (shared_work.spread_bases, ())])
    assert_alike([found[0] for found in every], expected)
    bases, lengths = zip(*(found[1] for found in every), strict=True)
    assert_alike(list(bases), shared_work.spread_bases()[0])
    assert (
        lengths
        == {3: ([2, 21, 21], [2, 21, 21], [1, 19, 19]), 4: (*([[2, 16, 16]] * 2), [1, 16, 16], [0, 13, 13])}[num]
    )


def test_different_weights_data_and_orders_are_refused(two: list[list[Any]]) -> None:
    for found in two:
        weights, order, shares, nothing, one_batch = found[1:6]
        assert weights.startswith("DataError: the problems of the 2 processes differ in their weights.")
        assert order.startswith("DataError: the problems of the 2 processes differ in their batches.")
        assert "DistributedSampler" in shares
        assert "differ in their batches" in shares
        assert nothing.split() == ["nothing"]
        assert one_batch.startswith("nothing")
    assert "2 processes share 1 batches" in two[0][5]


def test_a_model_within_a_wrapper_of_data_parallelism_is_taken_as_it_is(two: list[list[Any]]) -> None:
    for found in two:
        shared, alone = found[6]
        assert shared == pytest.approx(alone, rel=1e-12)


def test_data_read_anew_at_each_pass_are_shared(two: list[list[Any]]) -> None:
    expected = shared_work.streamed()
    assert_alike([found[7] for found in two], expected)


def test_weights_that_lie_on_several_processes_are_refused_with_what_to_do(two: list[list[Any]]) -> None:
    for found in two:
        assert found[8].startswith("ParameterError: 'weight' is a DTensor, spread over processes")
        assert "full_state_dict=True" in found[8]


def test_processes_of_unlike_memory_cut_their_batches_by_the_least(two: list[list[Any]]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 1000), nn.Tanh(), nn.Linear(1000, 3)).double()
    x, y = torch.randn(200, 5, dtype=torch.float64), torch.arange(200) % 3
    expected = ds.Problem(net, (x, y), memory="7.5MB")
    size, gradient = expected.batch_size, expected.gradient()
    assert size is not None
    for found in two:
        assert found[9][0::4] == [7_500_000] * 4
        assert found[9][1::4] == [size] * 4
        assert all(num >= 200 / size for num in found[9][2::4])
        for one in found[9][3::4]:
            torch.testing.assert_close(one, gradient, rtol=1e-9, atol=1e-12)
    assert all(torch.equal(one, other) for one, other in zip(two[0][9][3::4], two[1][9][3::4], strict=True))


def test_data_that_some_hold_and_others_do_not_are_refused_with_what_to_do(two: list[list[Any]]) -> None:
    for found in two:
        assert found[10].startswith("MemoryBudgetError: the data is held by 1 of the 2 processes")
        assert "Pass the same memory= in each" in found[10]


def test_without_a_group_the_problem_is_itself() -> None:
    problem = nets.unbalanced().problem()
    assert ds.sharded(problem) is problem

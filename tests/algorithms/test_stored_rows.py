"""Rows of a basis are the same wherever they lie, and rounded ones say by how much."""

import gc
import weakref

import pytest
import torch

from deepspectra.algorithms import stored_rows
from deepspectra.algorithms.stored_rows import StoredRows
from deepspectra.operators.base import Operator
from spectra import diagonal

SIZE, COUNT = 1000, 21
GENERATOR = torch.Generator().manual_seed(0)
ROWS = torch.randn(COUNT, SIZE, generator=GENERATOR, dtype=torch.float64)
BLOCK = torch.randn(3, SIZE, generator=GENERATOR, dtype=torch.float64)
WEIGHTS = torch.randn(COUNT, 3, generator=GENERATOR, dtype=torch.float64)


def store_of(way, monkeypatch):
    """Rows at hand, over two memories, or rounded, so that all goes through in small stretches."""
    operator = diagonal(torch.ones(SIZE), torch.float64, vectors=COUNT + 4)
    if "host" in way:
        operator.memory //= 5
        monkeypatch.setattr(Operator, "host_memory", lambda _: 8 * SIZE * COUNT)
    if "rounded" in way:
        operator.basis = torch.bfloat16
        operator.memory //= 4
    if way != "at hand":
        monkeypatch.setattr(stored_rows, "NUMBERS", (700, 700))
    store = StoredRows(operator, COUNT + 4)
    if "stretches" in way:  # as rows in host memory are brought to a device
        for segment in store._segments:
            segment.is_at_hand = False
    squares = store.put(0, ROWS)
    return store, squares


@pytest.mark.parametrize("way", ["at hand", "host", "stretches", "rounded", "rounded, host"])
def test_all_that_is_asked_of_rows_is_right(way, monkeypatch):
    store, squares = store_of(way, monkeypatch)
    held = store[:COUNT]
    rounded = held - ROWS
    torch.testing.assert_close(squares, rounded.square().sum(1))
    assert bool((squares > 0).all()) == ("rounded" in way) == store.is_rounded
    assert (store.num_on_host > 0) == ("host" in way) == ("host memory" in store.told)
    assert float(rounded.abs().max()) <= 2**-8 * float(ROWS.abs().max())
    torch.testing.assert_close(store.inner(COUNT, BLOCK), held @ BLOCK.T)
    assert store.inner(0, BLOCK).shape == (0, 3)
    block = BLOCK.clone()
    store.subtract(WEIGHTS, block)
    torch.testing.assert_close(block, BLOCK - WEIGHTS.T @ held)
    torch.testing.assert_close(store.combine(2, WEIGHTS[: COUNT - 2]), WEIGHTS[: COUNT - 2].T @ held[2:])
    assert torch.equal(store.stored(COUNT).double(), held)
    assert store.stored(COUNT).dtype == store.dtype


@pytest.mark.parametrize("way", ["at hand", "host", "stretches", "rounded", "rounded, host"])
@pytest.mark.parametrize("moves", [True, False])
def test_a_rotation_in_place_says_what_it_rounds(way, moves, monkeypatch):
    store, _ = store_of(way, monkeypatch)
    held, pending = store[:COUNT].clone(), torch.eye(4, dtype=torch.float64)[:2] + 0.5
    basis = torch.linalg.qr(WEIGHTS[: COUNT - 5])[0].T
    squares = store.rotate(1, COUNT, basis, None if moves else pending)
    expected = torch.cat([basis @ held[1 : COUNT - 4], held[COUNT - 4 :] if moves else pending @ held[COUNT - 4 :]])
    found = store[1 : 1 + len(expected)]
    torch.testing.assert_close(squares, (found - expected).square().sum(1), atol=1e-20, rtol=1e-6)
    if "rounded" not in way:
        torch.testing.assert_close(found, expected)
    elif moves:
        assert not squares[3:].any()  # what only moves is not rounded anew
    assert torch.equal(store[:1], held[:1])


def test_rows_go_to_the_host_only_when_they_are_reached(monkeypatch):
    monkeypatch.setattr(Operator, "host_memory", lambda _: 8 * SIZE * 100)
    store = StoredRows(diagonal(torch.ones(SIZE), torch.float64, vectors=10), 60)
    store.put(0, ROWS[:10])
    assert (len(store), store.num_on_host, store.are_shared) == (60, 0, True)
    store.put(10, ROWS[:1])
    assert 0 < store.num_on_host < 20
    larger = StoredRows(diagonal(torch.ones(SIZE), torch.float64, vectors=70), 70)
    larger.copy(store, 11)
    assert torch.equal(larger[:11], torch.cat([ROWS[:10], ROWS[:1]]))


def test_rows_at_hand_are_views_and_memory_is_one_piece():
    store = StoredRows(diagonal(torch.ones(SIZE), torch.float64, vectors=10), 10)
    store.put(0, ROWS[:10])
    store[2:3].zero_()
    assert not store.stored(10)[2].any()
    assert store.told == ""


@pytest.mark.parametrize("way", ["at hand", "host"])
def test_rows_are_given_back_as_soon_as_nobody_holds_them(way, monkeypatch):
    """Not when the garbage collector comes round, which large tensors do not hurry."""
    store, _ = store_of(way, monkeypatch)
    held = [weakref.ref(segment.rows) for segment in store._segments]
    gc.disable()
    try:
        del store
        assert [one() for one in held] == [None] * len(held)
    finally:
        gc.enable()

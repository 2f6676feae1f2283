"""Memory as users write it, and what does not fit it."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import deepspectra as ds
from deepspectra import errors
from deepspectra.derivatives.products import products_of
from deepspectra.problem import memory_budget
from deepspectra.problem.memory_budget import (
    free_memory,
    largest_batch_size,
    measured,
    parse_bytes,
    refuse_beyond,
    saved_by,
    share,
    suitable_batch_size,
)
from deepspectra.rows.captures import captures_of
from given import X, Y, mlp, refused


@pytest.mark.parametrize("memory", ["much", -1, 0, "8 parsecs", "inf", math.inf, math.nan, "1e400", "8iB", "8T5"])
def test_memory_that_is_no_size(memory: Any) -> None:
    refused(errors.OptionError, re.escape(str(memory)), lambda: ds.Problem(mlp(), (X, Y), memory=memory))


def test_what_stands_side_by_side_makes_the_whole() -> None:
    assert sum(share(1200, name) for name in ("data", "basis", "graphs")) == 1200


def test_shares_are_those_that_operators_captures_and_graphs_take() -> None:
    problem = ds.Problem(mlp(), (X, Y), memory="12MiB")
    assert ds.Hessian(problem).memory == share(problem.memory, "basis") == 3 * 2**20
    assert products_of(problem).allowance.size == share(problem.memory, "graphs") == 6 * 2**20
    assert captures_of(problem).limit == share(problem.memory, "factors") == 4 * 2**20


def test_batches_suit_the_network_unless_their_size_is_given() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2000, 5, dtype=torch.float64, generator=generator), torch.arange(2000) % 3
    wide = nn.Sequential(nn.Linear(5, 5000), nn.Tanh(), nn.Linear(5000, 3)).double()

    def sizes(model: nn.Module, data: Any, **options: Any) -> list[int]:
        return [len(labels) for _, labels in ds.Problem(model, data, **options).batches]

    assert sizes(mlp(), (x, y)) == sizes(mlp(), TensorDataset(x, y)) == [2000]
    found = sizes(wide, (x, y))  # 40 kB an example: about 840 make 32 MiB
    assert found == [1000, 1000]
    assert sizes(wide, (x, y), memory="100MB")[0] < 100
    loader = DataLoader(TensorDataset(x, y), batch_size=500)
    assert sizes(mlp(), (x, y), batch_size=500) == sizes(mlp(), loader) == [500] * 4
    pair = sizes(nn.Linear(5, 1).double(), (x, x[:, :1]), loss="mse")
    assert pair == [2000]
    alike = [ds.Problem(wide, (x, y), batch_size=size).gradient() for size in (None, 300)]
    assert torch.allclose(*alike, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("given", "size"),
    [
        (1000, 1000),
        ("1000", 1000),
        ("7b", 7),
        ("8GiB", 2**33),
        ("8G", 2**33),
        ("8 GB", 8 * 10**9),
        ("500 MB", 500_000_000),
        ("1.5 kib", 1536),
        ("2m", 2**21),
        ("1TiB", 2**40),
        ("0.5 tb", 5 * 10**11),
    ],
)
def test_sizes_are_read_as_people_write_them(given: int | str, size: int) -> None:
    assert parse_bytes(given) == size


def test_what_does_not_fit_is_refused_with_both_sizes_and_what_to_do() -> None:
    refuse_beyond(2**30, 2**30, "the matrix takes", "Use fewer rows.")
    words = r"the matrix takes 2\.00 GiB; the memory for it is 0\.50 GiB\. Use fewer rows\."
    with pytest.raises(errors.MemoryBudgetError, match=words):
        refuse_beyond(2**31, 2**29, "the matrix takes", "Use fewer rows.")
    with pytest.raises(errors.MemoryBudgetError, match=r"takes 3\.00 MiB; the memory for it is 51\.20 KiB\."):
        refuse_beyond(3 * 2**20, 0.05 * 2**20, "the matrix takes", "Use fewer rows.")


def test_a_batch_keeps_so_many_bytes_or_twice_the_weights_or_a_32nd_of_memory() -> None:
    small, large = nn.Linear(10, 10), nn.Linear(3000, 3000)
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert suitable_batch_size(2**10, small, 2**40, cpu) == 2**15
    assert suitable_batch_size(2**10, small, 2**40, gpu) == 2**19
    assert suitable_batch_size(2**10, large, 2**40, cpu) == 2 * 4 * 3001 * 3000 // 2**10
    assert suitable_batch_size(2**10, small, 2**25, cpu) == 2**10
    assert suitable_batch_size(2**40, small, 2**25, cpu) == 1
    assert suitable_batch_size(0, small, 2**40, cpu) is None


def test_bytes_that_a_graph_keeps_are_those_of_its_own_storages_that_live_on() -> None:
    given = torch.ones(100)

    def build() -> list[torch.Tensor]:
        scratch = given * 2
        kept = scratch + 1
        return [
            given.view(10, 10),
            kept,
            kept.view(10, 10),
        ]  # what was there before, and views, count nothing

    graph, size = measured(build)
    assert len(graph) == 3
    assert size == 400


def test_what_autograd_keeps_beside_the_model_is_counted_once_by_type() -> None:
    model, x = nn.Linear(5, 4), torch.ones(3, 5)
    _, saved = saved_by(model, lambda: torch.tanh(model(x)).double().square().sum())
    assert saved.num_bytes == 4 * 3 * 5 + 4 * 3 * 4 + 8 * 3 * 4  # x, tanh, and its double
    assert saved.dtypes == {torch.float32, torch.float64}


def test_batches_of_a_network_with_many_weights_may_take_more_of_the_memory() -> None:
    """Each batch reads and adds to all of them."""
    heavy, light = torch.nn.Linear(1000, 1000), torch.nn.Linear(10, 10)  # 4 MB of weights
    assert largest_batch_size(1000, light, 32_000_000) == 1000
    assert largest_batch_size(1000, heavy, 32_000_000) == 4000  # an eighth, where they would want 8 MB
    assert largest_batch_size(1000, heavy, 640_000_000) == 20_000


@pytest.mark.parametrize(
    ("limit", "used", "free"), [("300", 200, 150), ("300", 400, 0), ("max", 200, None), ("300", None, None)]
)
def test_of_a_containers_limit_what_is_in_use_is_not_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, used: int | None, free: int | None
) -> None:
    """But for cached files that make room; without a limit, what the machine has counts."""
    monkeypatch.setattr(memory_budget, "CONTAINER", tmp_path)
    cpu, mebi = torch.device("cpu"), 2**20
    (tmp_path / "memory.max").write_text(f"{limit}\n" if limit == "max" else f"{int(limit) * mebi}\n")
    if used is not None:
        (tmp_path / "memory.current").write_text(f"{used * mebi}\n")
    (tmp_path / "memory.stat").write_text(f"anon {mebi}\nactive_file {mebi}\ninactive_file {50 * mebi}\nslab 7\n")
    found = free_memory(cpu)
    assert found == free * mebi if free is not None else found > 300 * mebi

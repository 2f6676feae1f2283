"""Memory as users write it, and what does not fit it."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import deepspectra as ds
from deepspectra import errors
from given import X, Y, mlp, refused


@pytest.mark.parametrize("memory", ["much", -1, 0, "8 parsecs"])
def test_memory_that_is_no_size(memory: Any) -> None:
    refused(errors.OptionError, re.escape(str(memory)), lambda: ds.Problem(mlp(), (X, Y), memory=memory))


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

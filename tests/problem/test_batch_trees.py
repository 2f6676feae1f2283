"""Batches of any containers, mapped and measured."""

from __future__ import annotations

from collections import UserDict
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deepspectra as ds
from given import UNEVEN, X, Y, mlp, seeded_mlp


class Encoding(UserDict):  # type: ignore[type-arg]
    """A mapping whose entries are attributes too."""

    def __getattr__(self, name: str) -> Any:
        if name == "data":
            raise AttributeError(name)
        return self.data[name]


@dataclass(frozen=True)
class Pair:
    x: Tensor
    y: Tensor
    note: str = ""


@pytest.mark.parametrize("kind", [Encoding, Pair])
def test_batches_keep_their_class(kind: Any) -> None:
    def forward(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        return model(batch.x), batch.y

    model = mlp()
    batches = [kind(x=X[:8].float(), y=Y[:8]), kind(x=X[8:].float(), y=Y[8:])]
    problem = ds.Problem(model, batches, forward=forward)
    assert problem.loss() == pytest.approx(ds.Problem(model, (X.float(), Y)).loss(), rel=1e-14)
    assert batches[0].x.dtype == torch.float32, "what was given is as it was"


class Texts(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Each item with a text beside its tensors."""

    def __len__(self) -> int:
        return 1200

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"x": X[index % 12], "y": UNEVEN[index % 12], "text": f"item {index}"}


def test_lists_beside_the_tensors_of_a_batch_lose_no_examples() -> None:
    problem = ds.Problem(seeded_mlp(), Texts(), forward=lambda model, batch: (model(batch["x"]), batch["y"]))
    assert problem.num_examples == 1200
    assert problem.loss() == pytest.approx(ds.Problem(seeded_mlp(), (X, UNEVEN)).loss(), rel=1e-12)

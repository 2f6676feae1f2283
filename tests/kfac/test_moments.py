"""Second moments of what a use is: tables, padding, long vectors, in chunks of any size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import deepspectra as ds
from deepspectra.errors import FallbackWarning
from deepspectra.kfac import exact_blocks, moments
from deepspectra.rows.captures import Captures
from nets import CASES, block_of, labels
from reference import case_and_reference, error

RTOL = 1e-10


KINDS = ("kfac", "ekfac", "cfac")


def test_a_table_of_embeddings_is_a_matrix_of_indicators() -> None:
    case = CASES["token_classes"]()

    class Indicators(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Linear(6, 4, bias=False), nn.Linear(4, 3)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(torch.tanh(self.table(functional.one_hot(tokens, 6).double()))).movedim(-1, 1)

    twin = Indicators().double()
    with torch.no_grad():
        twin.table.weight.copy_(case.model.embedding.weight.T)
        twin.head.load_state_dict(case.model.head.state_dict())
    for kind in ("kfac", "ekfac"):
        K = ds.kronecker(case.problem(), kind)
        L = ds.kronecker(ds.Problem(twin, case.batches, loss=case.loss), kind)
        assert error(K.blocks["embedding"].dense(), L.blocks["table"].dense()) < RTOL
        assert error(K.blocks["head"].dense(), L.blocks["head"].dense()) < RTOL
    assert ds.kronecker(case.problem()).blocks["embedding"].right.shape == (
        1,
        1,
        6,
    )  # counts, not their matrix


def test_padding_rows_of_a_table_count_nowhere() -> None:
    torch.manual_seed(0)
    tokens, y = torch.randint(1, 5, (6, 1)), labels(6, 3)
    table = nn.Embedding(5, 4, padding_idx=0)
    with torch.no_grad():
        table.weight[0] = 0
    model = nn.Sequential(table, nn.Flatten(), nn.Linear(4, 3)).double()
    padded = torch.cat([tokens, torch.zeros_like(tokens)], 1)
    wide = nn.Sequential(table, nn.Flatten(), nn.Linear(8, 3)).double()
    with torch.no_grad():
        wide[2].weight[:, :4] = model[2].weight
        wide[2].bias.copy_(model[2].bias)
    expected = ds.kronecker(ds.Problem(model, (tokens, y))).blocks["0"].dense()
    assert error(ds.kronecker(ds.Problem(wide, (padded, y))).blocks["0"].dense(), expected) < RTOL


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_do_not_matter(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = CASES["conv_pool"]().problem()
    expected = ds.kronecker(problem, kind).dense()
    monkeypatch.setattr(exact_blocks, "CHUNK_BYTES", 1)
    monkeypatch.setattr(moments, "PANEL", 3)
    monkeypatch.setattr(moments, "LONG", 2)
    assert error(ds.kronecker(problem, kind).dense(), expected) < RTOL


def test_what_does_not_fit_is_captured_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = CASES["conv_pool"]().problem()
    expected = ds.kronecker(problem, "ekfac").dense()
    monkeypatch.setattr(Captures, "hold", lambda _: False)
    assert error(ds.kronecker(problem, "ekfac").dense(), expected) < RTOL


def test_long_vectors_have_their_diagonal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "LARGEST_VECTOR", 20)
    case, ref = case_and_reference("recurrent")
    with pytest.warns(FallbackWarning, match="diagonal"):
        K = ds.kronecker(case.problem())
    layer = "lstm.weight_hh_l0"
    assert error(K.blocks[layer].dense(), block_of(K, ref.gauss_newton, layer).diag().diag()) < RTOL

"""The reproduction on large networks, at tiny size: every stage is done once, and the page tells of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from reproductions import large_models, large_networks, large_page
from reproductions.large_models import KINDS, Logits, kind, pieces
from reproductions.large_networks import Budget, ask_peers, measure
from reproductions.large_peers import RowLoss

transformers = pytest.importorskip("transformers")
BUDGET = Budget("200MB", "200MB", "200MB")


def tiny() -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    return transformers.GPT2LMHeadModel(config)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"VOCABULARY": 60, "WINDOW": 6, "POOL": 16, "TOKENS": 24, "STEPS": 2, "BATCH": 2}
    for name, value in sizes.items():
        monkeypatch.setattr(large_models, name, value)
    read = large_models.read_text
    monkeypatch.setattr(large_models, "read_text", lambda: read(3000))
    monkeypatch.setattr(large_models, "gpt2", tiny)
    monkeypatch.setattr(large_networks, "NUM", 3)
    monkeypatch.setattr(large_networks, "STEPS", 4)
    monkeypatch.setattr(large_networks, "PEERS", ["hessian-eigenthings"])


def test_tokens_are_lines_words_and_signs_and_have_kinds() -> None:
    found = pieces("def f(x2):\n    return x2 + 10\n")
    assert found == ["def", "f", "(", "x2", ")", ":", "\n    ", "return", "x2", "+", "10", "\n"]
    kinds = [KINDS[kind(token)] for token in found]
    assert kinds[:8] == ["keywords", "words", *["brackets and commas"] * 1, "words", *["brackets and commas"] * 2,
                         "layout", "keywords"]  # fmt: skip
    assert kinds[9:11] == ["other signs", "numbers"]


def test_a_stage_is_done_once_and_the_page_tells_of_it(small: None, tmp_path: Path) -> None:
    said: list[str] = []
    run = measure("gpt2", tmp_path, BUDGET, said.append)
    record = json.loads(run.path.read_text())
    assert list(record["stages"]) == ["checks", "plan", "product", "pairs", "shares", "density"]
    assert record["rows"] == 24
    assert record["converged"]
    for shares in record["shares"]:
        assert sum(shares) == pytest.approx(1)
    assert record["stages"]["density"]["products"] == 4 * 4 + 1
    assert all(stage["peak"] > 2**20 for stage in record["stages"].values())

    said.clear()
    again = measure("gpt2", tmp_path, BUDGET, said.append)
    assert again.record["stages"] == record["stages"]
    assert not [text for text in said if "step" in text or "pairs" in text]

    ask_peers(again, "gpt2", sys.executable, 60)  # an environment that has none
    assert "No module named" in again.record["peers"]["hessian-eigenthings"]["ended"]
    large_page.keep(tmp_path / "docs.jsonl", "gpt2", again.record)
    large_page.write(tmp_path / "docs.jsonl")
    text = (tmp_path / "docs.md").read_text()
    assert f"| 1 | {record['values'][0]:.4g} |" in text
    assert "No module named" in text
    assert (tmp_path / "docs" / "gpt2.svg").is_file()


def test_what_peers_are_given_is_the_same_loss(small: None, tmp_path: Path) -> None:
    made = large_models.language_model(tmp_path, "200MB", lambda _: None)
    tokens, labels, weights = made.examples
    outputs = Logits(made.problem.model).eval()(tokens)
    loss = RowLoss()(outputs, torch.stack([labels.double(), weights], 1))
    assert float(loss.detach()) == pytest.approx(made.problem.loss(), rel=1e-5)

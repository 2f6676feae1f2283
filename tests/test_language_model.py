"""The reproduction on a language model goes on where it was stopped, and its page says what was measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from reproductions import language_model
from reproductions.language_model import KINDS, PARTS, Text, build, page, train

pytest.importorskip("transformers")


def text() -> Text:
    windows = torch.randint(0, language_model.VOCABULARY, (6, 4), generator=torch.Generator().manual_seed(0))
    return Text(windows, windows, ["a"], torch.zeros(language_model.VOCABULARY, dtype=torch.long))


def test_a_stopped_training_ends_in_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"VOCABULARY": 20, "WINDOW": 4, "WIDTH": 4, "LAYERS": 1, "HEADS": 1, "BATCH": 2}.items():
        monkeypatch.setattr(language_model, name, value)
    whole, stopped, resumed = build(), build(), build()
    train(whole, text(), 102, tmp_path / "whole.pt", lambda _: None)

    def stop(_: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(stopped, text(), 102, tmp_path / "state.pt", stop)
    said: list[str] = []
    train(resumed, text(), 102, tmp_path / "state.pt", said.append)
    assert [line.partition(":")[0] for line in said] == ["step 102 of 102"]
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_tokens_have_the_kinds_of_python(tmp_path: Path) -> None:
    path = tmp_path / "source.py"
    path.write_text("def f(x):\n    # why\n    return x | 1.5  and 'text'\n")
    found = [(token, KINDS[kind]) for token, kind in language_model._tokens(path)]
    assert found == [
        ("def", "keywords"), ("f", "names"), ("(", "brackets and commas"), ("x", "names"),
        (")", "brackets and commas"), (":", "brackets and commas"), ("<newline>", "layout"),
        ("<comment>", "literals and comments"),
        ("<indent>", "layout"), ("return", "keywords"), ("x", "names"), ("|", "operators"),
        ("<number>", "literals and comments"), ("and", "keywords"), ("<string>", "literals and comments"),
        ("<newline>", "layout"), ("<dedent>", "layout"),
    ]  # fmt: skip
    broken = tmp_path / "broken.py"
    broken.write_text("(((\n")
    assert all(kind == 2 for _, kind in language_model._tokens(broken))


def test_the_page_has_a_row_for_every_eigenvalue_and_every_grouping() -> None:
    shares = [[0.5, 0.25, 0.0, 0.125, 0.0, 0.125], [0.1, 0.2, 0.3, 0.2, 0.1, 0.1]]
    record = {
        "steps": 5, "num_parameters": 1234, "train": 1.5, "held_out": 1.75, "loss": 1.5, "unigram": 4.0,
        "tokens": 100, "rows": 60, "values": [3.0, 0.5], "residuals": [0.01, 0.02], "products": 40,
        "shares": {"kinds": shares, "random": shares}, "num_groups": {"kinds": 6, "random": 6},
        "judged": {"kinds": {"edge": 0.6, "outliers": 1, "verdict": "One outlier."}},
        "by_kind": [0.2] * 6, "examples": [["|"]] * 6,
        "python": "3.11", "torch": "2.13", "cpu_seconds": 61.0,
    }  # fmt: skip
    text = page(record)
    assert "| 1 | 3 ± 0.01 | 50% | 25% | 0% | 12% | 0% | 12% |" in text
    assert "| random | 6 | 30% | 22% | 15% | 16% | 5% | 11% |" in text
    assert "For kinds: One outlier." in text
    assert r"`\|`" in text
    assert all(part in text for part in PARTS)

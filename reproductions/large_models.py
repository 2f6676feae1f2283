"""The networks of `reproductions.large_networks`: GPT-2 small on Python's sources, ResNet18 and VGG11 on CIFAR-10."""

from __future__ import annotations

import keyword
import re
import sysconfig
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import deepspectra as ds
from deepspectra import zoo
from deepspectra.argument_checks import seeded
from deepspectra.file_writing import save_whole
from deepspectra.rows.example_sampling import drawn

VOCABULARY, WINDOW = 50_257, 64  # of GPT-2; tokens that are predicted in each window
READ = 12_000_000  # characters of the sources, in the order of their names
PIECES = re.compile(r"\n[ ]*|\w+|[^\w\s]")  # a line's end with the next one's indent, a word, a sign
KINDS = ("keywords", "brackets and commas", "other signs", "layout", "numbers", "words")
POOL, TOKENS = 512, 2048  # windows of which the importance is known, and tokens that are chosen by it
STEPS, BATCH, RATE = 120, 8, 6e-4
PER_CLASS = 13  # images of CIFAR-10


class Made(NamedTuple):
    """A network, trained, and the problem that it makes with its data.

    Attributes:
        problem: of all rows, or of those that importance chose.
        groups: of classes (C,), with their names; None where each class is its own.
        examples: for whoever is given tensors, inputs (B, ...), labels (n,) and weights (n,) that sum to 1.
        about: what it is, in words.
    """

    problem: ds.Problem
    groups: Tensor | None
    names: tuple[str, ...]
    examples: tuple[Tensor, Tensor, Tensor]
    about: str


class Logits(nn.Module):
    """A language model as a map from tokens (B, T + 1) to logits (B T, C): what tools for classifiers take."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        """Of each token but the first."""
        logits: Tensor = self.model(input_ids=tokens[:, :-1]).logits
        return logits.flatten(0, 1)


def pieces(text: str) -> list[str]:
    """The tokens of a source."""
    return PIECES.findall(text)


def kind(token: str) -> int:
    """Which of `KINDS`."""
    if keyword.iskeyword(token):
        return 0
    if token.isspace():
        return 3
    if token[0].isdigit():
        return 4
    return 5 if token[0].isalpha() or token[0] == "_" else 1 if token in "()[]{},:;." else 2


def read_text(limit: int = READ) -> tuple[Tensor, list[str]]:
    """Windows (n, WINDOW + 1) of the standard library's sources, tests and all, and what the tokens are."""
    found: list[str] = []
    read = 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if "site-packages" in path.parts or read > limit:
            continue
        text = path.read_text("utf-8", errors="replace")
        read += len(text)
        found += pieces(text)
    tokens = ["<rare>", *(token for token, _ in Counter(found).most_common(VOCABULARY - 1))]
    tokens += [f"<none {j}>" for j in range(VOCABULARY - len(tokens))]
    index = {token: j for j, token in enumerate(tokens)}
    stream = torch.tensor([index.get(token, 0) for token in found])
    return stream[: len(stream) // (WINDOW + 1) * (WINDOW + 1)].view(-1, WINDOW + 1), tokens


def gpt2() -> nn.Module:
    """GPT-2 small as `transformers` builds it: 124 million parameters."""
    import transformers  # noqa: PLC0415  (needed here alone)

    torch.manual_seed(0)
    model: nn.Module = transformers.GPT2LMHeadModel(transformers.GPT2Config())
    return model


def _train(model: nn.Module, windows: Tensor, steps: int, path: Path, say: Callable[[str], None]) -> None:
    """Some steps of AdamW with a warm-up; what was trained before is read."""
    if path.is_file():
        model.load_state_dict(torch.load(path, weights_only=True))
        return
    model.eval()  # without dropout
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / 20)
        some = windows[torch.randint(len(windows), (BATCH,), generator=torch.Generator().manual_seed(step))]
        loss = model(input_ids=some, labels=some).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if not (step + 1) % 20 or step + 1 == steps:
            say(f"step {step + 1} of {steps}: loss {float(loss.detach()):.3f}")
    save_whole(path, lambda staged: torch.save(model.state_dict(), staged))


def language_model(store: Path, memory: str, say: Callable[[str], None]) -> Made:
    """GPT-2 small, trained for some steps, on tokens of a pool that importance has chosen."""
    windows, tokens = read_text()
    model = gpt2()
    _train(model, windows, STEPS, store / "weights.pt", say)
    model.eval()
    pool = windows[:: max(1, len(windows) // POOL)][:POOL]
    whole = ds.Problem(model, [{"input_ids": some, "labels": some} for some in pool.split(8)], memory=memory)
    say(f"{whole}; choosing {TOKENS:,} tokens")
    sample = drawn(whole, TOKENS // WINDOW, seeded(0))
    chosen = torch.cat([batch["input_ids"] for batch, _ in sample.batches])
    weights = torch.cat([times for _, times in sample.batches]).repeat_interleave(WINDOW) / sample.total_weight
    return Made(
        sample,
        torch.tensor([kind(token) for token in tokens]),
        KINDS,
        (chosen, chosen[:, 1:].flatten(), weights),
        f"GPT-2 small, trained for {STEPS} steps of {BATCH * WINDOW} tokens on {windows.numel():,} tokens of the "
        f"standard library of Python; {len(chosen) * WINDOW:,} tokens, chosen by importance among "
        f"{pool[:, 1:].numel():,}",
    )


def image_network(name: str, store: Path, memory: str, say: Callable[[str], None]) -> Made:
    """A network of the zoo on CIFAR-10, trained on the images that it is looked at on."""
    data = zoo.load("cifar10", per_class=PER_CLASS)
    model = zoo.build(name, input_shape=tuple(data.inputs.shape[1:]), num_classes=10)
    path = store / "weights.pt"
    if path.is_file():
        model.load_state_dict(torch.load(path, weights_only=True))
        model.eval()
    else:
        say(f"training {name}")
        zoo.train(model, data, zoo.recipe(name, "cifar10", len(data)))
        save_whole(path, lambda staged: torch.save(model.state_dict(), staged))
    problem = ds.Problem(model, (data.inputs, data.targets), memory=memory)
    weights = torch.full((len(data),), 1 / len(data), dtype=torch.float64)
    about = f"{name} of the zoo on {len(data)} images of CIFAR-10, trained on them as `zoo.recipe` says"
    return Made(problem, None, (), (data.inputs, data.targets, weights), about)


def module_of(name: str, state: dict[str, Any]) -> nn.Module:
    """The network with these weights, as a map from inputs to logits, for other tools."""
    if name == "gpt2":
        model = gpt2()
        model.load_state_dict(state)
        return Logits(model).eval()
    model = zoo.build(name, input_shape=(3, 32, 32), num_classes=10)
    model.load_state_dict(state)
    return model.eval()

"""Train a small language model on Python's sources, and attribute the outliers of its Hessian to groups of tokens.

python -m reproductions.language_model [--steps 500] [--store DIR]

Training and eigenpairs are kept in the store as they are done: stopped, it goes on where it was. What is measured is
the line of docs/language-model-outliers.jsonl, of which docs/language-model-outliers.md is written.
"""

from __future__ import annotations

import argparse
import io
import json
import keyword
import math
import sys
import sysconfig
import time
import tokenize
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor, nn

import deepspectra as ds
from deepspectra.analysis.attribute import pair_shares
from deepspectra.file_writing import save_whole
from reproductions.verdicts import table

HERE = Path(__file__).parent.parent / "docs"
RECORD, PAGE = HERE / "language-model-outliers.jsonl", HERE / "language-model-outliers.md"
STORE = Path("runs/language-model")
VOCABULARY, WINDOW = 1000, 64
READ = 700_000  # tokens of the sources that are read, of which the last tenth is held out
WIDTH, LAYERS, HEADS = 64, 4, 4
STEPS, BATCH, RATE = 500, 32, 3e-3
SENTENCES, PAIRS, RTOL = 32, 12, 3e-2
KINDS = ("keywords", "operators", "brackets and commas", "layout", "names", "literals and comments")
FREQUENT = (8, 24, 100, 300)  # tokens that are groups by themselves, beside the kinds of the others
JUDGED = 2  # groupings, from the first on, by which outliers are attributed, and which are dealt at random, too,
STRATUM = 25  # among so many tokens that are about as frequent
PARTS = ("class", "logit", "interaction", "within", "true", "residual")


class Text(NamedTuple):
    """Sources as indices of tokens, what these are, and of which kind each is."""

    train: Tensor  # (windows, WINDOW)
    held_out: Tensor
    tokens: list[str]
    kinds: Tensor  # (VOCABULARY,)


def _tokens(path: Path) -> Iterator[tuple[str, int]]:
    """Each token of a source with the number of its kind; rare names, literals and comments lose their text."""
    try:
        for token in tokenize.generate_tokens(io.StringIO(path.read_text("utf-8")).readline):
            kind = tokenize.tok_name[token.type]
            if kind in ("NEWLINE", "INDENT", "DEDENT"):
                yield f"<{kind.lower()}>", 3
            elif kind in ("STRING", "NUMBER", "COMMENT") or kind.startswith("FSTRING"):
                yield f"<{kind.partition('_')[0].lower()}>", 5
            elif kind == "OP":
                yield token.string, 2 if token.string in "()[]{},:;." else 1
            elif kind == "NAME":
                yield token.string, 0 if keyword.iskeyword(token.string) else 4
    except (UnicodeDecodeError, tokenize.TokenError, SyntaxError):  # a file for tests of the parser
        return


def read_text() -> Text:
    """The standard library's sources in the order of their names."""
    found: list[tuple[str, int]] = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if not {"site-packages", "test", "tests", "idlelib"} & set(path.parts):
            found += _tokens(path)
        if len(found) >= READ:
            break
    most = [token for token, _ in Counter(token for token, _ in found).most_common(VOCABULARY - 1)]
    index = {token: j for j, token in enumerate(["<rare name>", *most])}
    kinds = torch.full((VOCABULARY,), 4)
    for token, kind in dict(found).items():
        if token in index:
            kinds[index[token]] = kind
    stream = torch.tensor([index.get(token, 0) for token, _ in found])
    windows = stream[: len(stream) // WINDOW * WINDOW].view(-1, WINDOW)
    cut = len(windows) * 9 // 10
    return Text(windows[:cut], windows[cut:], list(index), kinds)


def build() -> nn.Module:
    """A GPT-2 of four layers, as the library transformers has it."""
    import transformers  # noqa: PLC0415  (needed here alone)

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=WINDOW, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS,
        resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model: nn.Module = transformers.GPT2LMHeadModel(config)
    return model


def mean_loss(model: nn.Module, windows: Tensor) -> float:
    """The model's own loss on some windows."""
    with torch.no_grad():
        total = sum(float(model(input_ids=some, labels=some).loss) * len(some) for some in windows.split(64))
    return total / len(windows)


def train(model: nn.Module, text: Text, steps: int, path: Path, say: Callable[[str], None]) -> None:
    """AdamW with a warm-up and a cosine; the state is kept every 100 steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1)
    start = 0
    if path.is_file():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    for step in range(start, steps):
        rate = RATE * min(1, (step + 1) / 100) * (0.05 + 0.95 * (1 + math.cos(math.pi * step / steps)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = rate
        chosen = torch.randint(len(text.train), (BATCH,), generator=torch.Generator().manual_seed(step))
        some = text.train[chosen]
        loss = model(input_ids=some, labels=some).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0 or step + 1 == steps:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            save_whole(path, lambda staged, state=state: torch.save(state, staged))
            say(f"step {step + 1} of {steps}: loss {float(loss.detach()):.3f}")


def groupings(problem: ds.Problem, text: Text) -> dict[str, Tensor]:
    """Groups of tokens by name: of the language, by single tokens, found, and at random."""
    by_count = torch.bincount(text.train.flatten(), minlength=VOCABULARY).argsort(descending=True)
    found = {"kinds of Python": text.kinds}
    for num in FREQUENT:
        groups = text.kinds + num
        groups[by_count[:num]] = torch.arange(num)
        _, found[f"{num} frequent tokens, and kinds"] = torch.unique(groups, return_inverse=True)
    generator = torch.Generator().manual_seed(0)
    order = torch.arange(VOCABULARY)
    for ranks in by_count.split(STRATUM):
        order[ranks] = ranks[torch.randperm(len(ranks), generator=generator)]
    dealt = {f"{name}, dealt at random": found[name][order] for name in list(found)[:JUDGED]}
    return found | {"found by class_groups": ds.class_groups(problem, len(KINDS))} | dealt


def measure(steps: int, store: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Everything that the page tells."""
    began = time.process_time()
    text, model = read_text(), build()
    train(model, text, steps, store / "training.pt", say)
    model.eval()
    windows = text.train[:: max(1, len(text.train) // SENTENCES)][:SENTENCES]
    problem = ds.Problem(model, [{"input_ids": some, "labels": some} for some in windows.split(8)])
    hessian = ds.Hessian(problem)
    path = store / f"pairs-{steps}.pt"
    if not path.is_file():
        say(f"{problem}: eigenpairs")
        found = ds.eigenpairs(hessian, num=PAIRS, rtol=RTOL)
        store.mkdir(parents=True, exist_ok=True)
        save_whole(path, lambda staged: torch.save(found, staged))
    pairs = torch.load(path, weights_only=False)
    say(f"{pairs}\nattribution")
    groups = groupings(problem, text)
    shares = {}
    for name, some in groups.items():
        parts = ds.decompose(problem, effects="two-way", groups=some)
        shares[name] = pair_shares(parts, pairs).tolist()
    judged = {}
    for name in list(groups)[:JUDGED]:
        parts = ds.decompose(problem, effects="two-way", groups=groups[name])
        found = ds.attribute(hessian, parts, pairs=pairs)
        say(f"{name}: {found}")
        judged[name] = {
            "edge": found.bulk_edge,
            "outliers": found.num_outliers,
            "verdict": " ".join(found.verdicts),
        }
    weights = torch.bincount(text.train.flatten(), minlength=VOCABULARY).double()
    by_kind = [float(weights[text.kinds == k].sum() / weights.sum()) for k in range(len(KINDS))]
    of_kind = [[text.tokens[j] for j in (text.kinds == k).nonzero()[:6, 0]] for k in range(len(KINDS))]
    return {
        "steps": steps,
        "num_parameters": problem.num_parameters,
        "train": mean_loss(model, text.train[: len(text.held_out)]),
        "held_out": mean_loss(model, text.held_out),
        "loss": problem.loss(),
        "unigram": -float((weights / weights.sum()).xlogy(weights / weights.sum()).sum()),
        "tokens": text.train.numel(),
        "rows": problem.num_examples,
        "values": pairs.values.tolist(),
        "residuals": pairs.residual_norms.tolist(),
        "products": pairs.num_products,
        "shares": shares,
        "num_groups": {name: int(some.max()) + 1 for name, some in groups.items()},
        "judged": judged,
        "by_kind": by_kind,
        "examples": of_kind,
        "python": ".".join(map(str, sys.version_info[:3])),
        "torch": torch.__version__.partition("+")[0],
        "cpu_seconds": time.process_time() - began,
    }


def page(found: dict[str, Any]) -> str:
    """The page, as Markdown."""
    first, *_ = found["shares"]

    def percent(shares: list[float]) -> list[str]:
        return [f"{share:.0%}" for share in shares]

    def mean(rows: list[list[float]]) -> list[float]:
        return [sum(column) / len(column) for column in zip(*rows, strict=True)]

    def of_means(name: str) -> str:
        shares = dict(zip(PARTS, mean(found["shares"][name]), strict=True))
        return f"{1 - shares['within'] - shares['residual']:.0%}"

    outliers = [
        [str(j + 1), f"{value:.3g} ± {error:.1g}", *percent(shares)]
        for j, (value, error, shares) in enumerate(
            zip(found["values"], found["residuals"], found["shares"][first], strict=True)
        )
    ]
    averaged = [
        [name, str(found["num_groups"][name]), *percent(mean(shares))] for name, shares in found["shares"].items()
    ]
    kinds = [
        [name, f"{share:.0%}", " ".join(f"`{token}`" for token in tokens).replace("|", r"\|")]
        for name, share, tokens in zip(KINDS, found["by_kind"], found["examples"], strict=True)
    ]
    lines = [
        "# The outliers of a small language model",
        "",
        f"A GPT-2 of {LAYERS} layers, {WIDTH} wide, {found['num_parameters']:,} parameters, trained for "
        f"{found['steps']:,} steps of {BATCH} × {WINDOW} tokens on {found['tokens']:,} tokens of the standard "
        f"library of Python {found['python']}, cut by Python's own `tokenize`; the {VOCABULARY:,} most frequent ones "
        f"are the vocabulary. Its loss is {found['train']:.3f} nats a token on training text and "
        f"{found['held_out']:.3f} on text held out; knowing frequencies alone gives "
        f"{found['unigram']:.2f}. H is the Hessian of the loss at {found['rows']:,} tokens of training text "
        f"({found['loss']:.3f}), with the model as it comes: `ds.Problem(model, batches)`.",
        "",
        "Class is the group of the token that comes, logit the group of a token that could come. The groups are the "
        "kinds of Python's grammar:",
        "",
        table(["group", "of the text", "such as"], kinds),
        "",
        "## Outlier by outlier",
        "",
        f"The {len(found['values'])} largest eigenvalues of H, with measured residuals, and what each owes to which "
        f"part, uᵀBu/λ, for {first}:",
        "",
        table(["", "λ", *PARTS], outliers),
        "",
        *(f"- For {name}: {one['verdict']}" for name, one in found["judged"].items()),
        "",
        "## How much depends on the groups",
        "",
        f"Mean shares of these {len(found['values'])} for other groups of the same tokens. Groups dealt at random "
        f"among tokens about as frequent, {STRATUM} at a time, say what groups as many and as large get without "
        "meaning. The finer the groups, the fewer tokens has a cell of two of them, and the more are their means "
        "those of single tokens.",
        "",
        "What means of groups make of them together, without residual and scatter within groups: "
        + "; ".join(f"{of_means(name)} for {name}" for name in found["shares"])
        + ".",
        "",
        table(["groups", "number", *PARTS], averaged),
        "",
        f"Measured with torch {found['torch']} in {found['products']} products for the eigenpairs and "
        f"{found['cpu_seconds'] / 60:.0f} CPU minutes for what was left to do in the last run; "
        "`python -m reproductions.language_model` does it again.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure what is not there yet, and write the page."""
    parser = argparse.ArgumentParser(prog="python -m reproductions.language_model", description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS, help="of training")
    parser.add_argument("--store", type=Path, default=STORE, help="folder of what is unfinished")
    parser.add_argument("--page", action="store_true", help="write the page from what was measured")
    options = parser.parse_args()
    if not options.page:
        options.store.mkdir(parents=True, exist_ok=True)
        found = measure(options.steps, options.store, Console(stderr=True, highlight=False).print)
        RECORD.write_text(json.dumps(found) + "\n")
    PAGE.write_text(page(json.loads(RECORD.read_text())))


if __name__ == "__main__":
    main()

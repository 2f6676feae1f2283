"""Networks whose examples lie in a batch in every order, and their rows by plain autograd, a gradient a logit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import deepspectra as ds

IGNORED = -100


@dataclass
class Truth:
    """Rows A (n C, P) of √w g in the order of the batches' rows that count, with G = AᵀA."""

    rows: Tensor
    weights: Tensor
    labels: Tensor

    @property
    def dense(self) -> Tensor:
        return self.rows.T @ self.rows


def truth(net: nn.Module, batches: list[Any], forward: Callable[..., Any]) -> Truth:
    """By plain autograd, a gradient a logit."""
    parameters, jacobians, probabilities, labels = list(net.parameters()), [], [], []
    for batch in batches:
        with sdpa_kernel(SDPBackend.MATH):
            z, y = forward(net, batch)
        z, y = z.reshape(-1, z.shape[-1]), y.reshape(-1)
        for row, label in zip(z, y.tolist(), strict=True):
            if label != IGNORED:
                parts = [
                    torch.autograd.grad(logit, parameters, retain_graph=True, materialize_grads=True) for logit in row
                ]
                jacobians.append(torch.stack([torch.cat([g.flatten() for g in some]) for some in parts]))
                probabilities.append(row.detach().softmax(0))
                labels.append(label)
    p = torch.stack(probabilities)
    weights = p / len(p)
    errors = p[:, None] - torch.eye(p.shape[1], dtype=p.dtype)  # of each potential class
    rows = weights.sqrt()[..., None] * (errors @ torch.stack(jacobians))
    return Truth(rows.flatten(0, 1), weights, torch.tensor(labels))


def pair(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    return model(batch[0]), batch[1]


def named(*inputs: str) -> Callable[[nn.Module, Any], tuple[Tensor, Tensor]]:
    return lambda model, batch: (model(*(batch[name] for name in inputs)), batch["y"])


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def classes(*shape: int, num: int = 3) -> Tensor:
    return torch.randint(0, num, shape)


class Tagger(nn.Module):
    """Scores of every token, by a recurrent network."""

    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(5, 3), nn.Linear(3 * (1 + options.get("bidirectional", False)), 3)
        self.inner = kind(3, 3, **options)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.inner(self.embed(tokens))[0])


class Attending(nn.Module):
    """Scores of every token, time first, by a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(5, 4), nn.Linear(4, 3)
        self.position = nn.Parameter(torch.randn(6, 1, 4))
        self.inner = nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.inner(self.embed(tokens) + self.position[: len(tokens)]))


class Convolved(nn.Module):
    """Scores of a graph's nodes."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.a, self.o = nn.Linear(4, 4), nn.Linear(4, 3)
        links = (torch.rand(size, size) < 0.3) + torch.eye(size)
        self.register_buffer("links", links / links.sum(1, keepdim=True))

    def forward(self, x: Tensor) -> Tensor:
        return self.links @ self.o(torch.tanh(self.links @ self.a(x)))


class Messages(nn.Module):
    """Scores of a graph's nodes, or of graphs, by messages along edges."""

    def __init__(self) -> None:
        super().__init__()
        self.message, self.update, self.out = nn.Linear(6, 4), nn.Linear(7, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor, edges: Tensor, owner: Tensor | None = None) -> Tensor:
        sent = torch.relu(self.message(torch.cat([x[edges[0]], x[edges[1]]], 1)))
        got = sent.new_zeros(len(x), 4).index_add(0, edges[0], sent)
        h = torch.tanh(self.update(torch.cat([x, got], 1)))
        if owner is not None:
            h = h.new_zeros(int(owner.max()) + 1, 4).index_add(0, owner, h)
        return self.out(h)


class Sorted(nn.Module):
    """Treats its examples in the order of a feature."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.o = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        order = x[:, 0].argsort()
        return self.o(torch.tanh(self.a(x[order])))[order.argsort()]


class Packed(nn.Module):
    """Sorts its examples by length."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.a, self.out = nn.Embedding(6, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        self.inner = nn.GRU(3, 3, batch_first=True)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.embed(tokens), lengths, batch_first=True, enforce_sorted=False)
        packed = PackedSequence(torch.tanh(self.a(packed.data)), *packed[1:])
        return self.out(self.inner(packed)[1][0])


class Experts(nn.Module):
    """Sends every example to one of three experts; one without examples is skipped, or called with none."""

    def __init__(self, *, skipping: bool) -> None:
        super().__init__()
        self.skipping = skipping
        self.gate, self.out = nn.Linear(4, 3), nn.Linear(4, 3)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        shares = self.gate(x).softmax(-1)
        h = torch.zeros_like(x)
        for j, expert in enumerate(self.experts):
            mine = (shares.argmax(-1) == j).nonzero().flatten()
            if len(mine) or not self.skipping:
                h = h.index_add(0, mine, torch.tanh(expert(x[mine])) * shares[mine, j, None])
        return self.out(h)


class Gated(nn.Module):
    """Has a parameter that few examples use."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.a, self.b, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        few = x[:, :1] > 1.5
        if self.kind == "mask":
            h = h + few * h * self.scale
        elif self.kind == "masked layer":
            h = h + few * self.b(h)
        elif self.kind == "chosen rows":
            chosen = few.flatten().nonzero().flatten()
            h = h.index_add(0, chosen, self.b(h[chosen]))
        elif self.kind == "where":
            h = torch.where(few, h * self.scale, h)
        elif few.any():
            h = h + few * h * (self.a.bias if self.kind == "another use if any" else self.scale)
        return self.out(h)


class Placed(nn.Module):
    """Positions come with the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place, self.out = nn.Embedding(5, 3), nn.Embedding(4, 3), nn.Linear(3, 3)

    def forward(self, tokens: Tensor, where: Tensor) -> Tensor:
        return self.out(torch.tanh(self.embed(tokens) * self.place(where)).sum(1))


class Compared(nn.Module):
    """Scores are inner products with the rows of a table that comes with the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(5, 4)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        return torch.tanh(self.a(x)) @ torch.tanh(self.b(table)).T


class Unrolled(nn.Module):
    """Uses a layer once a step."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.step, self.out = nn.Embedding(5, 3), nn.Linear(6, 3), nn.Linear(3, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        h = torch.zeros(len(tokens), 3, dtype=torch.float64)
        for token in tokens.T:
            h = torch.tanh(self.step(torch.cat([h, self.embed(token)], 1)))
        return self.out(h)


class Listed(nn.Module):
    """Treats its examples in an order that is a list of Python."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor, order: list[int]) -> Tensor:
        h = self.out(torch.tanh(self.a(torch.stack([x[i] for i in order]))))
        return torch.stack([h[order.index(i)] for i in range(len(x))])


class Sociable(nn.Module):
    """Takes batches of at least two only, so that no example can pass alone; its position is used by no rule."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(4))
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        if len(x) < 2:
            raise ValueError("two at least")
        return self.out(torch.sin(x * self.position))


def tags(steps: int, num: int) -> tuple[Tensor, Tensor]:
    return classes(steps, num, num=5), classes(steps, num)


def dropped(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """Rows that count alone."""
    kept = batch[1] != IGNORED
    return model(batch[0])[kept], batch[1][kept]


def ragged_tags() -> tuple[Tensor, Tensor]:
    tokens, targets = tags(5, 4)
    targets[3:, 1] = targets[1:, 2] = IGNORED
    return tokens, targets


def graph(nodes: int, edges: int) -> dict[str, Tensor]:
    return {"x": random(nodes, 3), "edges": torch.randint(0, nodes, (2, edges)), "y": classes(nodes)}


def graphs(sizes: list[int]) -> dict[str, Tensor]:
    starts = [sum(sizes[:j]) for j in range(len(sizes))]
    edges = [torch.randint(0, n, (2, 2 * n)) + start for n, start in zip(sizes, starts, strict=True)]
    owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return {
        "x": random(sum(sizes), 3),
        "edges": torch.cat(edges, 1),
        "owner": owner,
        "y": classes(len(sizes)),
    }


def sequences(lengths: list[int]) -> dict[str, Tensor]:
    num = len(lengths)
    return {"tokens": 1 + classes(num, 5, num=5), "lengths": torch.tensor(lengths), "y": classes(num)}


def late() -> list[tuple[Tensor, Tensor]]:
    """Two batches, of which the first is in order."""
    x = random(10, 4)
    x[:, 0] = torch.tensor([0.0, 1, 2, 3, 4, 5, 9, 7, 8, 6])
    y = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2, 2])
    return [(x[:6], y[:6]), (x[6:], y[6:])]


def few() -> list[tuple[Tensor, Tensor]]:
    """Two batches; the parameter that few use is used in the second only."""
    x, y = random(14, 4), torch.arange(14) * 3 // 14
    x[:, 0] = -x[:, 0].abs()
    x[[9, 12], 0] = 2.0
    return [(x[:7], y[:7]), (x[7:], y[7:])]


def xy(num: int) -> tuple[Tensor, Tensor]:
    return random(num, 4), classes(num)


def placed(num: int) -> dict[str, Tensor]:
    return {"tokens": classes(num, 4, num=5), "where": torch.arange(4), "y": classes(num)}


def compared(num: int) -> dict[str, Tensor]:
    return {"table": random(3, 5), "x": random(num, 4), "y": classes(num)}


def listed(order: list[int]) -> dict[str, Any]:
    return {"x": random(len(order), 4), "order": order, "y": classes(len(order))}


Made = tuple[nn.Module, list[Any], Callable[..., Any]]


NETWORKS: dict[str, Callable[[], Made]] = {
    "time first": lambda: (Tagger(nn.GRU), [tags(4, 5), tags(4, 2)], pair),
    "time first, both ways": lambda: (Tagger(nn.RNN, bidirectional=True), [tags(3, 4), tags(5, 2)], pair),
    "time first, flat": lambda: (
        Tagger(nn.GRU),
        [tags(4, 2)],
        lambda m, b: (m(b[0]).flatten(0, 1), b[1].flatten()),
    ),
    "time first, ignored rows": lambda: (Tagger(nn.GRU), [ragged_tags()], pair),
    "dropped rows": lambda: (Tagger(nn.GRU, batch_first=True), [ragged_tags()], dropped),
    "dropped examples": lambda: (nn.Linear(4, 3), [xy(5)], lambda m, b: (m(b[0])[:3], b[1][:3])),
    "attention, time first": lambda: (Attending(), [tags(4, 2)], pair),
    "nodes": lambda: (Convolved(7), [{"x": random(7, 4), "y": classes(7)}], named("x")),
    "messages": lambda: (Messages(), [graph(6, 11), graph(5, 9)], named("x", "edges")),
    "as many messages as nodes": lambda: (Messages(), [graph(6, 6)], named("x", "edges")),
    "several graphs": lambda: (Messages(), [graphs([3, 2, 4]), graphs([2, 3])], named("x", "edges", "owner")),
    "sorted": lambda: (Sorted(), [xy(6), xy(5)], pair),
    "sorted, first batch in order": lambda: (Sorted(), late(), pair),
    "packed": lambda: (Packed(), [sequences([5, 5, 5]), sequences([2, 5, 1, 4])], named("tokens", "lengths")),
    "experts": lambda: (Experts(skipping=False), [xy(6), xy(5)], pair),
    "experts that are skipped": lambda: (Experts(skipping=True), [xy(9), xy(4), xy(1)], pair),
    "experts, one example a batch": lambda: (Experts(skipping=True), [xy(1) for _ in range(6)], pair),
    **{
        kind: lambda kind=kind: (Gated(kind), few(), pair)
        for kind in ("mask", "masked layer", "chosen rows", "where", "if any", "another use if any")
    },
    "positions": lambda: (Placed(), [placed(4), placed(3)], named("tokens", "where")),
    "positions before": lambda: (
        Placed(),
        [{key: placed(n)[key] for key in ("where", "tokens", "y")} for n in (4, 8, 3)],
        named("tokens", "where"),
    ),
    "table": lambda: (Compared(), [compared(3), compared(5)], named("x", "table")),
    "unrolled": lambda: (
        Unrolled(),
        [(classes(4, 2, num=5), classes(4)), (classes(3, 4, num=5), classes(3))],
        pair,
    ),
    "listed": lambda: (Listed(), [listed([0, 1, 2, 3]), listed([2, 0, 3, 1])], named("x", "order")),
    "never alone": lambda: (Sociable(), [xy(5)], pair),
}


def made(name: str) -> tuple[ds.Problem, Truth]:
    """A problem and the truth about it."""
    net, batches, forward = NETWORKS[name]()
    net = net.double().eval()
    options = {} if forward is pair else {"forward": forward}
    return ds.Problem(net, batches, **options), truth(net, batches, forward)


def same_values(found: Tensor, dense: Tensor) -> bool:
    expected = torch.linalg.eigvalsh(dense).flip(0)
    size = max(len(found), len(expected))
    padded = [functional.pad(values, (0, size - len(values))) for values in (found, expected)]
    return bool((padded[0] - padded[1]).abs().max() < 1e-10 * expected[0])

"""Where the examples of a batch lie: features and errors are right in any order, or refused with the reason.

Time first, graphs whose nodes are rows, batches sorted inside the model, ways chosen by values, parameters that few
examples use, tensors that are as long as the batch by chance. Truth is the dense G of plain autograd, row by row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.overrides import _get_current_function_mode

import deepspectra as ds
from deepspectra.errors import CurvatureError, MemoryBudgetError
from deepspectra.problem.subsets import small_problem
from deepspectra.rows import batch_capture, capture_plan
from deepspectra.rows.gradients import GradientRows
from deepspectra.rows.held_rows import HeldRows
from reference import error, projections

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
                    torch.autograd.grad(logit, parameters, retain_graph=True, materialize_grads=True)
                    for logit in row
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


@pytest.mark.parametrize("name", NETWORKS)
def test_the_exact_spectrum_is_that_of_the_dense_matrix(name: str) -> None:
    problem, true = made(name)
    found = ds.gram_spectrum(problem)
    assert same_values(found.values, true.dense)
    total = float(true.dense.trace())
    for part, values in found.parts.items():  # so rows have their own labels
        projected = projections(true.weights, true.labels)[part] @ true.rows
        assert float(values.sum()) == pytest.approx(float(projected.square().sum()), abs=1e-10 * total)


def pieces(problem: ds.Problem, weights: Tensor, *, joint: bool) -> Iterator[batch_capture.Piece]:
    """The only batch, with scalars of these weights."""
    plan = capture_plan.learned(small_problem(problem, 3, torch.float64))
    while True:
        try:
            graph = batch_capture.Graph(problem, *problem.batches, plan.alone)
            yield from batch_capture.capture(graph, plan, batch_capture.Scalars(weights, joint))
            return
        except batch_capture.IrregularError as found:
            plan = plan.without(found.names)


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_scalars_are_of_each_row_or_sums_over_the_rows_of_an_example(name: str, joint: bool) -> None:
    net, batches, forward = NETWORKS[name]()
    net = net.double().eval()
    problem = ds.Problem(net, batches[-1:], **({} if forward is pair else {"forward": forward}))
    (batch,) = problem.batches
    with sdpa_kernel(SDPBackend.MATH):
        z = forward(net, batch)[0]
    z = z.reshape(-1, z.shape[-1])
    weights, seen = random(*z.shape, 2), []
    for piece in pieces(problem, weights, joint=joint):
        rows = piece.rows.view(piece.uses[0].num_examples, -1)
        seen += rows.flatten().tolist()
        found = {
            n: torch.zeros(len(rows), 2 if joint else 2 * rows.shape[1], v.numel()).double()
            for n, v in net.named_parameters()
        }
        for use in piece.uses:
            stretch = slice(use.slice.start, use.slice.start + use.slice.numel)
            found[use.slice.name][..., stretch] += use.formed(slice(None))
        each = torch.einsum("ncm,nc->nm", weights, z)[rows]  # (B, R, 2)
        scalars = each.sum(1, keepdim=True) if joint else each
        for scalar, mine in zip(
            scalars.flatten(), torch.cat(list(found.values()), 2).flatten(0, 1), strict=True
        ):
            parameters = list(net.parameters())
            parts = torch.autograd.grad(scalar, parameters, retain_graph=True, materialize_grads=True)
            assert error(mine, torch.cat([part.flatten() for part in parts])) < 1e-12
    assert sorted(seen) == list(range(len(z)))


@pytest.mark.parametrize("name", ["time first, flat", "nodes", "sorted", "experts", "listed"])
def test_rows_held_are_rows_through_the_network(name: str) -> None:
    problem, _ = made(name)
    rows, through = HeldRows(problem), GradientRows(problem)
    order = torch.arange(len(rows.labels)) if rows.order is None else rows.order
    assert (rows.order is not None) == (name == "time first, flat")
    block, carried = random(problem.num_parameters, 2), random(*rows.weights.shape, 2)
    products = rows.apply(block), rows.transpose(carried)
    assert rows.captures.hold()
    assert error(rows.apply(block), products[0]) < 1e-12
    assert error(rows.transpose(carried), products[1]) < 1e-12
    assert error(products[0][order.argsort()], through.apply(block)) < 1e-12
    assert error(products[1], through.transpose(carried[order.argsort()])) < 1e-12


@pytest.mark.parametrize("name", ["time first", "attention, time first"])
def test_time_first_is_batch_first_in_every_exact_way(name: str) -> None:
    torch.manual_seed(0)
    net, batches, _ = NETWORKS[name]()
    net = net.double().eval()

    def turned(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        return model(batch[0].T).transpose(0, 1).flatten(0, 1), batch[1].flatten()

    first = ds.Problem(net, batches)
    second = ds.Problem(net, [(x.T.contiguous(), y.T.contiguous()) for x, y in batches], forward=turned)
    one_by_one = zip(
        *(ds.layers(problem, hessian=False).values() for problem in (first, second)), strict=True
    )
    for one, two in one_by_one:
        assert one.name == two.name
        assert error(one.gradients.traces, two.gradients.traces) < 1e-10
        assert (one.features is None) == (two.features is None)
        if one.features is not None:
            assert error(one.features.traces, two.features.traces) < 1e-10
            assert one.collapse.nc1 == pytest.approx(two.collapse.nc1)
    for kind, sharing in (("kfac", "expand"), ("kfac", "reduce"), ("ekfac", "expand")):
        found = [ds.kronecker(problem, kind, sharing=sharing).eigenvalues() for problem in (first, second)]
        assert error(*found) < 1e-8
    for of in ("features", "errors"):
        found = [ds.class_means(problem, of=of).class_means for problem in (first, second)]
        assert error(*found) < 1e-10


@pytest.mark.parametrize(
    ("name", "plain"), [("sorted", nn.Identity()), ("sorted, first batch in order", nn.Identity())]
)
def test_a_network_that_sorts_is_the_one_that_does_not(name: str, plain: nn.Module) -> None:
    torch.manual_seed(0)
    net, batches, _ = NETWORKS[name]()
    net = net.double().eval()
    twin = ds.Problem(nn.Sequential(net.a, nn.Tanh(), net.o, plain), batches)
    problem = ds.Problem(net, batches)
    one_by_one = zip(*(ds.layers(each, hessian=False).values() for each in (problem, twin)), strict=True)
    for one, two in one_by_one:
        for what in ("features", "errors", "gradients"):
            mine, other = getattr(one, what), getattr(two, what)
            assert error(mine.values, other.values) < 1e-10
            assert error(mine.traces, other.traces) < 1e-10
        assert one.collapse.nc1 == pytest.approx(two.collapse.nc1)
    for kind in ("kfac", "ekfac", "cfac"):
        assert error(ds.kronecker(problem, kind).dense(), ds.kronecker(twin, kind).dense()) < 1e-10


def test_features_of_rows_that_belong_to_no_example_are_not_made_up() -> None:
    """A graph may have as many edges as nodes; then edges are no rows."""
    problem, _ = made("as many messages as nodes")
    layers = ds.layers(problem, hessian=False)
    assert all(layer.features is None and layer.collapse is None for layer in layers.values())
    with pytest.raises(CurvatureError, match="one row of features for each output row"):
        ds.collapse(problem)
    problem, _ = made("listed")
    with pytest.raises(CurvatureError, match="on some batches only"):
        ds.collapse(problem)


@pytest.mark.parametrize("name", ["sorted", "packed", "experts", "masked layer", "nodes"])
def test_single_precision_finds_the_same_order(name: str) -> None:
    problem, true = made(name)
    dense = true.dense
    found = ds.gram_spectrum(problem.to(torch.float32), dtype=torch.float32).values
    assert float(found[0]) == pytest.approx(float(torch.linalg.eigvalsh(dense)[-1]), rel=1e-4)
    assert float(found.sum()) == pytest.approx(float(dense.trace()), rel=1e-4)


class Stateful(nn.Module):
    """Makes a state in single precision, and so runs in no other; sorts its examples if asked."""

    def __init__(self, dtype: torch.dtype, *, sorting: bool) -> None:
        super().__init__()
        self.dtype, self.sorting = dtype, sorting
        self.cell, self.scale = nn.GRUCell(4, 3), nn.Parameter(torch.randn(3))
        self.out = nn.Linear(3, 3)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        order = x[:, 0].argsort() if self.sorting else torch.arange(len(x))
        state = torch.zeros(len(x), 3, dtype=self.dtype)
        for _ in range(2):
            state = self.cell(x[order], torch.sin(state * self.scale))
        return self.out(state)[order.argsort()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sorting", [False, True])
def test_networks_that_run_in_their_own_precision_only(dtype: torch.dtype, sorting: bool) -> None:
    x, y = xy(9)
    twin = Stateful(torch.float64, sorting=sorting)
    net = Stateful(dtype, sorting=sorting)
    net.load_state_dict({key: value.to(dtype) for key, value in twin.state_dict().items()})
    twin.load_state_dict(net.state_dict())
    x = x.to(dtype).double()
    dense = truth(twin, [(x, y)], pair).dense
    problem = ds.Problem(net, (x.to(dtype), y))
    rel = 1e-4 if dtype == torch.float32 else 0.05
    found = ds.gram_spectrum(problem, dtype=torch.float32).values
    assert float(found.sum()) == pytest.approx(float(dense.trace()), rel=rel)
    assert float(found[0]) == pytest.approx(float(torch.linalg.eigvalsh(dense)[-1]), rel=rel)
    assert ds.kronecker(problem, "ekfac").trace == pytest.approx(float(dense.trace()), rel=rel)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("skipping", [False, True])
def test_routed_networks_in_batches_of_any_size(batch_size: int, skipping: bool) -> None:
    net, (x, y) = Experts(skipping=skipping).double(), xy(8)
    problem = ds.Problem(net, (x, y), batch_size=batch_size)
    assert same_values(ds.gram_spectrum(problem).values, truth(net, [(x, y)], pair).dense)
    assert len(ds.layers(problem, hessian=False)) == 5
    assert ds.kronecker(problem).trace > 0


def test_batches_that_do_not_fit_together_are_right_or_refused() -> None:
    problem, true = made("if any")
    kron = ds.kronecker(problem)  # streams what does not fit
    small = HeldRows(problem)
    small.captures.limit = 0
    assert not small.captures.hold()
    with pytest.raises(CurvatureError, match="'scale' otherwise on one batch than on another"):
        list(small.captures.batches())
    assert small.captures.plan.alone == {"scale"}
    small.captures.limit = max(small.captures.bytes_by_layer.values())
    assert same_values(torch.linalg.eigvalsh(small.gram()).flip(0), true.dense)
    assert kron.trace > 0


def test_what_all_examples_share_is_no_single_example() -> None:
    net = Placed().double()
    batch = {"where": torch.arange(4)[None], "tokens": classes(5, 4, num=5), "y": classes(5)}
    problem = ds.Problem(net, [batch], forward=named("tokens", "where"))
    rows = HeldRows(problem)
    assert rows.captures.hold()
    (piece,) = rows.captures.held
    assert {use.num_examples for use in piece.uses} == {5}
    assert same_values(ds.gram_spectrum(problem).values, truth(net, [batch], named("tokens", "where")).dense)


def test_plain_networks_are_not_watched_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no value can choose the place of an example, a batch takes C − 1 backward passes."""
    x, y = random(6, 1, 6, 6), classes(6)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3)
    )
    rows = HeldRows(ds.Problem(net.double().eval(), (x, y)))
    plain, passes = torch.autograd.grad, []
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: passes.append(k) or plain(*a, **k))
    assert rows.captures.hold()
    assert not rows.captures.plan.by_value
    assert len([k for k in passes if not k.get("allow_unused")]) == 2


def test_rows_that_do_not_count_take_no_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = {"x": random(7, 4), "y": torch.tensor([0, IGNORED, 1, IGNORED, IGNORED, 2, IGNORED])}
    net = Convolved(7).double()
    problem = ds.Problem(net, [graph], forward=named("x"))
    rows = HeldRows(problem)
    plain, passes = torch.autograd.grad, []
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: passes.append(k) or plain(*a, **k))
    assert rows.captures.hold()
    assert len([k for k in passes if not k.get("allow_unused")]) == 3 * 2
    monkeypatch.undo()
    assert same_values(ds.gram_spectrum(problem).values, truth(net, [graph], named("x")).dense)


def test_too_many_passes_are_refused_with_what_to_pass_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, _ = made("nodes")
    monkeypatch.setattr(batch_capture, "MOST_PASSES", 13)
    with pytest.raises(CurvatureError, match=r"14 backward passes over whole batches\. Pass forward="):
        ds.gram_spectrum(problem)
    dataset = ds.analyze(problem, num_probes=2, num_steps=8, progress=False).dataset
    assert "14 backward passes" in dataset.attrs["provenance"]
    assert float(dataset.trace.sel(operator="gauss_newton")) > 0
    monkeypatch.undo()
    problem.memory = 1000
    with pytest.raises(MemoryBudgetError, match="Pass forward="):
        ds.kronecker(problem)


def test_masks_choose_no_places() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.out = nn.Embedding(6, 4), nn.Linear(4, 3)
            self.inner = nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, batch_first=True)

        def forward(self, tokens: Tensor) -> Tensor:
            gone = tokens == 0
            h = self.inner(self.embed(tokens), src_key_padding_mask=gone).masked_fill(gone[..., None], 0.0)
            return self.out(h.sum(1))

    tokens = classes(5, 4, num=6)
    tokens[:, 0] = 1
    net, data = Masked().double().eval(), [(tokens, classes(5))]
    problem = ds.Problem(net, data)
    assert not HeldRows(problem).captures.plan.by_value
    assert same_values(ds.gram_spectrum(problem).values, truth(net, data, pair).dense)


def test_links_that_come_with_the_batch_may_join_its_examples_at_last() -> None:
    class Linked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor, links: Tensor) -> Tensor:
            return self.out(torch.tanh(links @ self.a(x)))

    links = [torch.eye(5).double(), torch.rand(5, 5).double()]
    data = [{"x": random(5, 4), "links": some, "y": classes(5)} for some in links]
    net = Linked().double()
    problem = ds.Problem(net, data, forward=named("x", "links"))
    assert same_values(ds.gram_spectrum(problem).values, truth(net, data, named("x", "links")).dense)


class Shy(nn.Module):
    """Fails when it is watched."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(_get_current_function_mode(), batch_capture.Watch):
            raise ValueError("not now")
        return self.out(x)


def test_what_a_network_raises_when_watched_is_said() -> None:
    problem = ds.Problem(Shy().double(), [xy(9)])
    with pytest.raises(CurvatureError, match=r"told apart by example \(not now\)"):
        ds.gram_spectrum(problem)


def test_a_parameter_used_under_no_grad_has_no_use_there() -> None:
    class Teacher(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.o = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                known = torch.tanh(self.a(x))
            return self.o(torch.tanh(self.a(x)) + known + functional.linear(x, self.a.weight.detach()))

    net, data = Teacher().double(), [xy(7)]
    problem = ds.Problem(net, data)
    assert not HeldRows(problem).captures.plan.alone
    assert same_values(ds.gram_spectrum(problem).values, truth(net, data, pair).dense)

"""One product with H or G, per architecture, and blocks of eight."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import deepspectra as ds
from benchmarks import reference
from benchmarks.cases import Case, build
from benchmarks.measure import OURS, Cost, Row, compare
from benchmarks.peers import differentiable
from deepspectra.derivatives.products import products_of

RIGHT = 1e-3  # relative error of a float32 product against float64; a kink of ReLU can flip in float32
BLOCK = 8
SETTINGS: dict[str, tuple[tuple[Any, ...], float, float]] = {  # build's arguments, targets of H v and G v
    "mlp": (("mlp", "mnist", 5000), 1.55, 1.25),
    "lenet": (("lenet", "mnist", 2000), 1.3, 1.0),
    "vgg": (("vgg", "cifar10", 40), math.inf, math.inf),
    "transformer": (("transformer", "mnist", 1000), 2.4, 1.6),
    "resnet": (("resnet", "cifar10", 10), 2.2, 1.4),
}
BLOCKS = ("mlp", "lenet")
STREAMED = 1.7


def cases(quick: bool) -> Iterator[tuple[str, Case]]:
    """The networks, trained a little: what a product costs does not depend on the weights."""
    if quick:
        yield "mlp", build("toy", "digits", 500, epochs=10)
        return
    for name, (arguments, *_) in SETTINGS.items():
        yield name, build(*arguments, epochs=None if name == "mlp" else 3)


def run(peers: list[Any], quick: bool) -> Iterator[Row]:
    """Rows of every architecture."""
    for name, case in cases(quick):
        yield from single(case, peers, (math.inf, math.inf) if quick else SETTINGS[name][1:])
        if name in BLOCKS:
            yield from blocks(case, peers)


def single(case: Case, peers: list[Any], limits: tuple[float, ...]) -> Iterator[Row]:
    """H v and G v."""
    block = case.vector(0)
    exact = dict(zip(("H v", "G v"), reference.products(case, block), strict=True))
    bounds, targets = reference.bounds(case), dict(zip(("H v", "G v"), limits, strict=True))
    problem, v = case.problem(), block[:, 0]
    tools: dict[str, dict[str, Any]] = {"H v": {}, "G v": {}}
    tools["H v"][OURS], tools["G v"][OURS] = (
        ds.Hessian(problem).__matmul__,
        ds.GaussNewton(problem).__matmul__,
    )
    for what, kind in (("H v", "hessian"), ("G v", "gauss_newton")):
        tools[what] |= {peer.name: getattr(peer, kind)(case.copy()) for peer in peers if hasattr(peer, kind)}
    for what, products in tools.items():
        costs = compare(
            {
                tool: lambda _, product=product: differentiable(lambda: product(v))
                for tool, product in products.items()
            },
            case.gradient,
            warm=True,
            patience=8,
            keep=lambda _, result, what=what: reference.error(result, exact[what]),
        )
        products_of(problem).release()
        for tool, cost in costs.items():
            limit = targets[what] if tool == OURS else math.inf
            yield checked(case, what, tool, cost, bound=bounds[what], limit=limit)


def checked(
    case: Case, what: str, tool: str, cost: Cost, *, bound: float | None = None, limit: float = math.inf
) -> Row:
    """A row that knows whether its result is right and its target, if there is one, met."""
    error = max(cost.results, default=None)
    right = error is not None and error <= RIGHT
    aimed = limit < math.inf
    return Row(
        "products",
        case.name,
        what,
        tool,
        quality=error,
        measure="error",
        bound=bound,
        target=f"≤ {limit:g} g" if aimed else "",
        met=right and cost.median <= limit if aimed else None,
        **cost.fields | {"right": right},
    )


def blocks(case: Case, peers: list[Any]) -> Iterator[Row]:
    """Eight vectors together: graphs kept, and built anew as when they do not fit in memory."""
    V = case.vector(1, BLOCK)
    exact, _ = reference.products(case, V[:, :1])
    kept, streamed = case.problem(), case.problem()
    products = products_of(streamed)
    products.allowance.reserve(products.allowance.size)  # no room to keep a graph
    H, S = ds.Hessian(kept), ds.Hessian(streamed)
    calls: dict[str, Any] = {OURS: lambda _: H @ V, f"{OURS}, graphs not kept": lambda _: S @ V}
    for peer in peers:
        if peer.name == "curvlinops":
            product = peer.hessian(case)
            calls[peer.name] = lambda _, product=product: differentiable(lambda: product(V))
    costs = compare(
        calls,
        case.gradient,
        patience=8,
        warm=True,
        keep=lambda _, result: reference.error(result[:, :1], exact),
    )
    for tool, cost in costs.items():
        per_vector = Cost([run / BLOCK for run in cost.runs], cost.results, cost.failure)
        aimed = "not kept" in tool and case.num_parameters > 10_000
        limit = STREAMED if aimed else math.inf
        yield checked(case, f"H V, {BLOCK} columns, each", tool, per_vector, limit=limit)

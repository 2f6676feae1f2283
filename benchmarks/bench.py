"""Cost of products, class means and eigenpairs in full-data gradients, beside the peers that are installed.

Run with `make bench`. Everything is timed in one process and given as a multiple of one gradient of the same
network on the same data, because absolute times mean little on a shared machine. Peers that are not installed
are left out with a word. Medians of several runs.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import deepspectra as ds
from deepspectra import zoo
from deepspectra.products import products_of

RUNS = 5
CASES = {  # model → input shape, examples
    "mlp": ((1, 28, 28), 5000),
    "lenet": ((1, 32, 32), 1000),
    "transformer": ((1, 28, 28), 1000),
    "resnet18": ((3, 32, 32), 40),
}


def median_seconds(function: Callable[[], Any]) -> float:
    """Median time of a call, after one to warm up."""
    function()
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def ours(problem: ds.Problem) -> dict[str, Callable[[], Any]]:
    """What is timed here."""
    H, G, R = ds.Hessian(problem), ds.GaussNewton(problem), ds.Residual(problem)
    v = torch.randn(problem.num_parameters, generator=torch.Generator().manual_seed(0))
    return {
        "H v": lambda: H @ v,
        "G v": lambda: G @ v,
        "R v": lambda: R @ v,
        "class means": lambda: ds.class_means(problem, level="class"),
        "cross-class means": lambda: ds.class_means(problem),
    }


def peers(problem: ds.Problem, x: torch.Tensor, y: torch.Tensor) -> dict[str, dict[str, Callable[[], Any]]]:
    """The same products by libraries that are installed."""
    found: dict[str, dict[str, Callable[[], Any]]] = {}
    model = problem.model
    parameters = dict(problem.model.named_parameters())
    batches = list(zip(x.split(500), y.split(500), strict=True))
    v = torch.randn(problem.num_parameters, generator=torch.Generator().manual_seed(0))
    try:
        from curvlinops import GGNLinearOperator, HessianLinearOperator
    except ImportError:
        pass
    else:
        loss = torch.nn.CrossEntropyLoss()
        arguments: tuple[Any, ...] = (model, loss, parameters, batches)
        H = HessianLinearOperator(*arguments, check_deterministic=False)
        G = GGNLinearOperator(*arguments, check_deterministic=False)
        found["curvlinops"] = {"H v": lambda: H @ v, "G v": lambda: G @ v}
    try:
        from pyhessian import hessian
    except ImportError:
        pass
    else:
        whole = hessian(model, torch.nn.CrossEntropyLoss(), dataloader=batches, cuda=False)
        tree = [part.view_as(p) for part, p in zip(v.split([p.numel() for p in parameters.values()]),
                                                   parameters.values(), strict=True)]  # fmt: skip
        found["PyHessian"] = {"H v": lambda: whole.dataloader_hv_product(tree)}
    return found


def main() -> None:
    """Time every case and print one table."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    table = Table(
        "network", "what", "tool", "gradients", title="cost in full-data gradients, one thread, CPU"
    )
    for name, (shape, num_examples) in CASES.items():
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(num_examples, *shape, generator=generator)
        y = torch.arange(num_examples) % 10
        model = zoo.build(name, input_shape=shape, num_classes=10).eval()
        problem = ds.Problem(model, (x, y))
        gradient = median_seconds(problem.gradient)
        rows = {("deepspectra", what): call for what, call in ours(problem).items()}
        for peer, calls in peers(problem, x, y).items():
            rows |= {(peer, what): call for what, call in calls.items()}
        for (tool, what), call in rows.items():
            try:
                cost = f"{median_seconds(call) / gradient:.2f}"
            except Exception as error:  # a peer that fails on a network is a result too
                cost = f"failed: {type(error).__name__}"
            table.add_row(name, what, tool, cost)
        products_of(problem).release()
    Console().print(table)
    for package in ("curvlinops", "pyhessian"):
        try:
            __import__(package)
        except ImportError:
            print(f"{package} is not installed and was left out.")


if __name__ == "__main__":
    main()

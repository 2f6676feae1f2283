"""Distance of estimated spectra from the exact one, at equal numbers of products with the same matrix."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import deepspectra as ds
from benchmarks import reference
from benchmarks.cases import Case, build
from benchmarks.measure import OURS, Row

BUDGETS = (128, 256, 512)
STEPS = 64  # a probe, the default of `density`
SEEDS = range(3)
TARGETS = {True: (0.05, 0.025, 0.016), False: (0.085, 0.06, 0.045)}  # trained, untrained
GHOSTS = 200  # steps of one probe after which copies of converged eigenvalues are looked for
DISTANCES = {"W1": reference.wasserstein, "KS": reference.kolmogorov, "decades": reference.decades}
Estimate = Callable[[int], tuple[Tensor, Tensor]]  # seed → nodes and weights


def run(peers: list[Any], quick: bool) -> Iterator[Row]:
    """Rows of a trained and an untrained network."""
    network, data, num = ("toy", "digits", 500) if quick else ("tiny", "mnist", 5000)
    for trained in (True,) if quick else (True, False):
        case = build(network, data, num, epochs=(10 if quick else None) if trained else 0)
        matrix, exact = spectrum(case)
        single = matrix.float()
        budgets = BUDGETS[:1] if quick else BUDGETS
        for budget, target in zip(budgets, TARGETS[trained], strict=False):
            for tool, estimate in estimates(case, single, exact, budget, peers).items():
                aimed = None if quick or tool != OURS else target
                yield from rows(case, exact, tool, budget, estimate, aimed)
        if not quick:
            yield ghosts(case, single, exact)


def spectrum(case: Case) -> tuple[Tensor, Tensor]:
    """H (P, P) in float64 and its eigenvalues; columns compared with the reference."""
    problem = ds.Problem(case.model, (case.x, case.y), dtype=torch.float64)
    matrix = ds.Hessian(problem).dense()
    probe = case.vector(7, 2)
    wrong = reference.error(matrix @ probe.double(), reference.products(case, probe)[0])
    if wrong > 1e-9:
        raise ArithmeticError(f"the dense Hessian of {case.name} is wrong by {wrong:.1e}.")
    return (matrix + matrix.T) / 2, torch.linalg.eigvalsh(matrix)


def estimates(case: Case, matrix: Tensor, exact: Tensor, budget: int, peers: list[Any]) -> dict[str, Estimate]:
    """Every tool's way to spend so many products."""
    found: dict[str, Estimate] = {OURS: lambda seed: nodes_of(matrix, budget // STEPS, STEPS, seed)}
    for runs in (1, 2):  # the shape of an analysis' efforts: few probes, many steps
        if budget // runs > STEPS:
            found[f"{OURS}, {runs} × {budget // runs}"] = lambda seed, r=runs: nodes_of(matrix, r, budget // r, seed)
    ends = (float(exact[0]), float(exact[-1]))
    for peer in peers:
        if peer.name == "curvlinops":
            found[peer.name] = lambda seed, p=peer: p.density(matrix, ends, budget, seed)
        elif peer.name == "hessian-eigenthings":
            shapes = [(runs, budget // runs) for runs in (1, 2, 4, 8) if 16 <= budget // runs <= 128]
            for runs, steps in shapes:
                found[f"{peer.name}, {runs} × {steps}"] = lambda seed, p=peer, r=runs, s=steps: p.quadrature(
                    matrix, r, s, seed
                )
        elif peer.name == "nngeom":
            found[peer.name] = lambda seed, p=peer: p.spectrum(matrix, budget, seed)
        elif peer.name == "PyHessian":
            found[peer.name] = lambda seed, p=peer: p.density(case, budget, seed)
    return found


def nodes_of(matrix: Tensor, num_probes: int, num_steps: int, seed: int) -> tuple[Tensor, Tensor]:
    """Ours."""
    found = ds.density(matrix, num_probes, num_steps, seed=seed)
    return found.nodes, found.weights


def rows(
    case: Case, exact: Tensor, tool: str, budget: int, estimate: Estimate, target: float | None
) -> Iterator[Row]:
    """Median distances over seeds, a row each; the target is of W1."""
    what = f"{budget} products"
    try:
        found = [estimate(seed) for seed in SEEDS]
    except Exception as error:  # a tool that fails is a result too
        note = f"failed: {type(error).__name__}: {error}"[:100]
        yield Row("density", case.name, what, tool, measure="W1", right=False, note=note)
        return
    for measure, distance in DISTANCES.items():
        median = statistics.median(distance(*nodes, exact) for nodes in found)
        aimed = target if measure == "W1" else None
        yield Row("density", case.name, what, tool, runs=len(found), quality=median, measure=measure,
                  num_products=budget, target="" if aimed is None else f"≤ {aimed:g}",
                  met=None if aimed is None else median <= aimed)  # fmt: skip


def ghosts(case: Case, matrix: Tensor, exact: Tensor) -> Row:
    """Nodes in float32 above the true tenth eigenvalue, beyond the ten that are there."""
    steps = min(GHOSTS, len(exact) // 2)
    found = ds.density(matrix, num_probes=1, num_steps=steps)
    count = int((found.nodes > exact[-10] * (1 - 1e-4)).sum()) - 10
    return Row("density", case.name, f"ghosts after {steps} steps, float32", OURS, runs=1, quality=float(count),
               measure="ghosts", num_products=steps, right=count <= 0, target="none", met=count <= 0)  # fmt: skip

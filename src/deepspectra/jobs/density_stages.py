"""Densities of H, G and R as stages of an analysis: all eigenvalues, or Lanczos quadrature beside known pairs."""

from __future__ import annotations

import warnings
from dataclasses import replace

from deepspectra.algorithms.dense_spectrum import DenseMatrix, exact_density
from deepspectra.algorithms.density import density
from deepspectra.algorithms.long_vectors import room_for_rows, vector_dtype
from deepspectra.errors import ConvergenceWarning
from deepspectra.jobs.effort import FEWEST_STEPS
from deepspectra.jobs.findings import LETTERS, Findings
from deepspectra.jobs.stage_meter import Report
from deepspectra.operators.curvature import Curvature, GaussNewton, Hessian, Residual
from deepspectra.quadrature import Density


def find_dense(found: Findings, hessian: Hessian) -> None:
    """All eigenvalues of G, of R, and of H, which is their sum: a third of the products is not taken."""
    operators = {"gauss_newton": GaussNewton(found.problem), "residual": Residual(found.problem)}
    made: dict[str, DenseMatrix] = {}
    for name, operator in operators.items():

        def alone(report: Report, name: str = name, operator: Curvature = operator) -> Density:
            made[name] = DenseMatrix(operator, report)
            return made[name].density()

        found.densities[name] = found.ledger.run(_named(found, name), alone)
        operator.products.release()

    def both(report: Report) -> Density:
        again = 0
        for name in [name for name in operators if name not in made]:  # a stopped run left numbers, and no matrix
            made[name] = DenseMatrix(operators[name], _behind(report, again))
            again += made[name].num_products
        whole = made.pop("gauss_newton").add(made.pop("residual"), hessian)
        return replace(whole.density(), num_products=again)

    found.densities["hessian"] = found.ledger.run(_named(found, "hessian"), both)
    hessian.products.release()


def find_density(found: Findings, name: str, operator: Curvature) -> None:
    """All of it; or by Lanczos quadrature beside the known pairs, with fewer steps if memory asks for it."""
    known = len(found.pairs[name].values) if name in found.pairs else 0
    room = sum(room_for_rows(operator, vector_dtype(operator))) - known - 1  # its basis is never rounded

    def work(report: Report) -> Density:
        if found.effort.dense:
            return exact_density(operator, report)
        steps = found.effort.num_steps
        if FEWEST_STEPS <= room < steps:
            steps = room
            warnings.warn(
                f"the density of {LETTERS[name]} has {room} steps a probe; more do not fit memory",
                ConvergenceWarning,
                stacklevel=2,
            )
        return density(
            operator,
            num_probes=found.effort.num_probes,
            num_steps=steps,
            deflate=found.pairs.get(name),
            seed=found.seed + 2,
            progress=report,
        )

    found.densities[name] = found.ledger.run(_named(found, name), work)


def _named(found: Findings, name: str) -> str:
    return f"density of {LETTERS[name]}{found.of}"


def _behind(report: Report, before: int) -> Report:
    """Of so many products before."""
    return lambda done, _: report(before + done, None)

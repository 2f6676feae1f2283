"""How often estimates keep their word: two standard errors around each, against dense spectra, over many seeds.

python -m reproductions.coverage [--seeds 200]

writes docs/coverage.md. Each table has a row for what is estimated and a column for each spectrum. To add a row: a
function of (case, seed) that returns a `Check`, and its name in `TABLES`.
"""

from __future__ import annotations

import argparse
import math
import statistics
import warnings
from collections.abc import Callable, Iterable
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import deepspectra as ds
from deepspectra.errors import ConvergenceWarning
from deepspectra.operators.base import Matrix

PAGE = Path(__file__).parent.parent / "docs" / "coverage.md"
SEEDS = 200
STATED = 0.95  # of two standard errors
ROUNDING = 1e-8  # spread of estimates, relative to their size, below which bias is not asked for
SIGMAS = 3.0  # by which the tests let a share of the runs fall short of it


class Case(NamedTuple):
    """A symmetric matrix (P, P) in a random basis, and its eigenvalues (P,)."""

    name: str
    values: Tensor
    matrix: Tensor


class Check(NamedTuple):
    """One run: the share of what was estimated that lay within the band, and by how much the estimate was off.

    `off` is relative to a size that is the same for all seeds; NaN where bias is not asked for.
    """

    inside: float
    off: float = math.nan
    products: int = 0


class Tally(NamedTuple):
    """All runs of one estimate on one spectrum.

    `bias` is the mean of `off` in standard errors of that mean.
    """

    runs: int
    inside: float
    bias: float
    products: float
    not_finite: int

    def keeps(self, stated: float = STATED, independent: float = 1.0) -> bool:
        """Whether the runs allow the stated share, up to chance."""
        slack = SIGMAS * math.sqrt(stated * (1 - stated) / (self.runs * independent))
        return not self.not_finite and self.inside >= stated - slack


Run = Callable[[Case, int], Check]


def spectra() -> dict[str, Tensor]:
    """Flat, decaying, spiked, multiple, and mixtures of them; one so small that a basis spans it."""
    line, one = partial(torch.linspace, dtype=torch.float64), partial(torch.full, dtype=torch.float64)
    powers = 0.8 ** torch.arange(50, dtype=torch.float64)
    return {
        "flat": line(-1, 1, 200),
        "decaying": 0.95 ** torch.arange(200, dtype=torch.float64),
        "spiked": torch.cat([line(10, 1, 10), 0.3 * torch.exp(-line(0, 14, 190))]),
        "multiple": 10 * powers.repeat_interleave(4),
        "flat + spiked": torch.cat([line(50, 5, 10), one((190,), 1.0)]),
        "multiple + spiked": torch.cat([one((3,), 5.0), one((2,), -4.0), line(-0.2, 0.5, 195)]),
        "all four": torch.cat([one((4,), 9.0), line(6, 3, 4), powers[:40], one((60,), 0.1), line(-1, 0.3, 92)]),
        "tiny": torch.cat([line(3, 1, 3), 0.5 ** line(1, 20, 24), -(0.3 ** line(1, 9, 12))]),
        "rank 9 of 60": torch.cat([line(4, 1, 9), one((51,), 0.0)]),
    }


@cache
def cases() -> dict[str, Case]:
    """The spectra as matrices."""
    found = {}
    for name, values in spectra().items():
        normal = torch.randn(
            len(values), len(values), generator=torch.Generator().manual_seed(0), dtype=torch.float64
        )
        basis = torch.linalg.qr(normal)[0]
        matrix = (basis * values) @ basis.T
        found[name] = Case(name, values.sort(descending=True).values, (matrix + matrix.T) / 2)
    return found


def tally(checks: Iterable[Check]) -> Tally:
    """What the runs of one estimate say together; one that is not finite covers nothing."""
    checks = list(checks)
    fair = [check for check in checks if math.isfinite(check.inside)]
    off = [check.off for check in fair if math.isfinite(check.off)]
    bias, spread = math.nan, statistics.stdev(off) if len(off) > 1 else math.nan
    if spread > ROUNDING:
        bias = statistics.mean(off) / (spread / math.sqrt(len(off)))
    return Tally(
        runs=len(checks),
        inside=sum(check.inside for check in fair) / len(checks),
        bias=bias,
        products=statistics.mean(check.products for check in checks),
        not_finite=len(checks) - len(fair),
    )


def measure(run: Run, case: Case, seeds: int) -> Tally:
    """`run` over the seeds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return tally(run(case, seed) for seed in range(seeds))


def _within(off: float, error: float, size: float) -> float:
    """Whether two standard errors reach, up to rounding; NaN if either number is."""
    return float(abs(off) <= 2 * error + 1e-9 * size) if math.isfinite(off + error) else math.nan


def trace(case: Case, seed: int, *, num_products: int) -> Check:
    """tr A."""
    found = ds.trace(case.matrix, num_products, seed=seed)
    off, size = found.value - float(case.values.sum()), float(case.values.abs().sum())
    return Check(_within(off, found.standard_error, size), off / size, found.num_products)


def norm(case: Case, seed: int, *, num_products: int) -> Check:
    """‖A‖_F; its square is what is unbiased."""
    found, truth = ds.frobenius_norm(case.matrix, num_products, seed=seed), float(case.values.norm())
    inside = _within(found.value - truth, found.standard_error, truth)
    return Check(inside, found.value**2 / truth**2 - 1, found.num_products)


def diagonal(case: Case, seed: int, *, num_products: int) -> Check:
    """Entries of the diagonal: the share of them within their own bands."""
    found, truth = ds.diagonal(case.matrix, num_products, seed=seed), case.matrix.diagonal()
    if not bool(torch.isfinite(found.values + found.standard_error).all()):
        return Check(math.nan)
    off = found.values - truth
    inside = off.abs() <= 2 * found.standard_error + 1e-9 * float(case.values.abs().max())
    return Check(float(inside.double().mean()), float(off.sum() / case.values.norm()), found.num_products)


class Probes(NamedTuple):
    """Arguments of a density: probes, steps, pairs to deflate, rows that memory holds (0: enough)."""

    num_probes: int
    num_steps: int
    deflated: int = 0
    rtol: float = 1e-3
    rows: int = 0

    @lru_cache(maxsize=4096)
    def run(self, name: str, seed: int) -> tuple[ds.Density, float]:
        """The density, and by how much its second moment may be off for pairs that are not exact.

        The same seed finds the pairs: `density` draws its own probes.
        """
        case = cases()[name]
        operator = Matrix(case.matrix)
        if not self.deflated:
            operator.memory = 8 * len(case.values) * self.rows or operator.memory
            return ds.density(operator, self.num_probes, self.num_steps, seed=seed), 0.0
        pairs = ds.eigenpairs(operator, self.deflated, "magnitude", rtol=self.rtol, seed=seed)
        found = ds.density(operator, self.num_probes, self.num_steps, deflate=pairs, seed=seed)
        return found, 2 * float(pairs.residual_norms.square().sum()) / len(case.values)


def moment(case: Case, seed: int, *, probes: Probes, degree: int) -> Check:
    """(1/P) tr A^degree, with the standard error of the mean eigenvalue as the library gives it."""
    found, blur = probes.run(case.name, seed)
    truth, size = float(case.values.pow(degree).mean()), float(case.values.abs().pow(degree).mean())
    powered = found if degree == 1 else _powered(found, degree)
    off = powered.mean - truth
    error = powered.mean_standard_error + blur / 2 * (degree == 2)
    return Check(_within(off, error, size), off / size, found.num_products)


def _powered(density: ds.Density, degree: int) -> ds.Density:
    """The density of A^degree, by the same nodes."""
    from dataclasses import replace  # noqa: PLC0415

    return replace(density, nodes=density.nodes.pow(degree))


def count(case: Case, seed: int, *, probes: Probes) -> Check:
    """Eigenvalues above thresholds in the gaps of the spectrum: the share of the counts within their bands."""
    found, _ = probes.run(case.name, seed)
    values = case.values
    inside = []
    for quantile in (0.02, 0.1, 0.5, 0.9):
        j = int(quantile * len(values))
        level = float(values[j - 1 : j + 1].mean()) if j else float(values[0])
        above, error = found.count_above(level)
        inside.append(_within(above - int((values > level).sum()), error, len(values)))
    return Check(sum(inside) / len(inside), products=found.num_products)


PRODUCTS = (4, 8, 16, 64)
PROBES = {
    "2 × 16": Probes(2, 16),
    "4 × 8": Probes(4, 8),
    "8 × 16": Probes(8, 16),
    "6 × 16, memory for 60 vectors": Probes(6, 16, rows=60),
    "2 × 16, 6 pairs deflated": Probes(2, 16, 6),
    "4 × 8, 3 pairs deflated": Probes(4, 8, 3),
    "4 × 8, 3 pairs of residual .05": Probes(4, 8, 3, 5e-2),
}
TABLES: dict[str, dict[str, Run]] = {
    "Trace": {f"{n} products": partial(trace, num_products=n) for n in PRODUCTS},
    "Frobenius norm": {f"{n} products": partial(norm, num_products=n) for n in PRODUCTS},
    "Diagonal": {f"{n} products": partial(diagonal, num_products=n) for n in PRODUCTS},
    "Mean eigenvalue of a density": {k: partial(moment, probes=p, degree=1) for k, p in PROBES.items()},
    "Second moment of a density": {k: partial(moment, probes=p, degree=2) for k, p in PROBES.items()},
    "Counts of a density": {k: partial(count, probes=p) for k, p in PROBES.items()},
}


def main() -> None:
    """Measure all tables and write the page."""
    parser = argparse.ArgumentParser(prog="python -m reproductions.coverage", description=__doc__)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--only", nargs="+")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for title, runs in TABLES.items():
        if options.only and not any(o in title for o in options.only):
            continue
        print("##", title)
        print(f"{'':32}", *[f"{n[:14]:>16}" for n in cases()])
        for name, run in runs.items():
            t = [measure(run, case, options.seeds) for case in cases().values()]
            print(f"{name:32}", *[f"{100*x.inside:5.1f} {x.bias:5.1f} {x.not_finite:3d}" for x in t], flush=True)


if __name__ == "__main__":
    main()

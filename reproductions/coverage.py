"""How often estimates keep their word: two standard errors around each, against dense spectra, over many seeds.

python -m reproductions.coverage [TITLE ...] [--seeds 200]

measures the tables of these titles, or all, and writes docs/coverage.md. What is measured is kept in docs/coverage/,
row by row: a run that was stopped goes on where it was. Remove what is there after a change of the estimates.

Each table has a row for what is estimated and a column for each spectrum, or sample. To add a row: a function of
(case, seed) that returns a `Check`, and its name in `TABLES`, `BAND_TABLES` or `SAMPLE_TABLES`.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

import deepspectra as ds
from deepspectra import zoo
from deepspectra.errors import ConvergenceWarning
from deepspectra.operators.base import Matrix
from reproductions.spectra import BAND_WORDS, WORDS, Case, band_cases, cases
from reproductions.verdicts import table

PAGE = Path(__file__).parent.parent / "docs" / "coverage.md"
RECORDS = PAGE.with_suffix("")  # a file a table
SEEDS = 200
STATED = 0.95  # of two standard errors
ROUNDING = 1e-8  # spread of estimates, relative to their size, below which bias is not asked for
SIGMAS = 3.0  # by which the tests let a share of the runs fall short of it


class Check(NamedTuple):
    """One run: the share of what was estimated that lay within the band, and by how much the estimate was off.

    `off` is relative to a size that is the same for all seeds; NaN where bias is not asked for. `claimed`: whether
    the run claimed to be right; None where all do.
    """

    inside: float
    off: float = math.nan
    products: int = 0
    claimed: bool | None = None


class Tally(NamedTuple):
    """All runs of one estimate on one spectrum.

    `bias` is the mean of `off` in standard errors of that mean.
    """

    runs: int
    inside: float
    bias: float
    products: float
    not_finite: int
    claimed: float | None = None

    def keeps(self, stated: float = STATED, independent: float = 1.0) -> bool:
        """Whether the runs allow the stated share, up to chance."""
        slack = SIGMAS * math.sqrt(stated * (1 - stated) / (self.runs * independent))
        return not self.not_finite and self.inside >= stated - slack


class Sample(NamedTuple):
    """Directions of a principal subspace, and examples drawn of 500 that a small network was trained on."""

    num: int
    num_samples: int


Run = Callable[[Case, int], Check]
SampleRun = Callable[[Sample, int], Check]
Kind = TypeVar("Kind", Case, Sample)


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
        claimed=None if checks[0].claimed is None else statistics.mean(bool(c.claimed) for c in checks),
    )


def measure(run: Callable[[Kind, int], Check], case: Kind, seeds: int) -> Tally:
    """`run` over the seeds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return tally(run(case, seed) for seed in range(seeds))


def _within(off: float, error: float, size: float) -> float:
    """Whether two standard errors reach, up to rounding; NaN if either number is."""
    return float(abs(off) <= 2 * error + 1e-9 * size) if math.isfinite(off + error) else math.nan


def trace(case: Case, seed: int, *, num_products: int) -> Check:
    """Tr A."""
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
    """Arguments of a density: probes, steps, pairs to deflate, rows that memory holds (0: enough), its basis."""

    num_probes: int
    num_steps: int
    deflated: int = 0
    rtol: float = 1e-3
    rows: int = 0
    basis: str | None = None


@lru_cache(maxsize=4096)
def density(probes: Probes, name: str, seed: int) -> tuple[ds.Density, float]:
    """The density, and what its second moment lacks for pairs that are not exact.

    The same seed finds the pairs: `density` draws its own probes.
    """
    case = (cases() if name in cases() else band_cases())[name]
    operator = Matrix(case.matrix)
    if not probes.deflated:
        operator.memory = 8 * len(case.values) * probes.rows or operator.memory
        found = ds.density(operator, probes.num_probes, probes.num_steps, seed=seed, basis=probes.basis)
        return found, 0.0
    pairs = ds.eigenpairs(operator, probes.deflated, "magnitude", rtol=probes.rtol, seed=seed)
    found = ds.density(operator, probes.num_probes, probes.num_steps, deflate=pairs, seed=seed)
    return found, 2 * float(pairs.residual_norms.square().sum()) / len(case.values)


def moment(case: Case, seed: int, *, probes: Probes, degree: int) -> Check:
    """(1/P) tr A^degree, with the standard error of the mean eigenvalue as the library gives it."""
    found, blur = density(probes, case.name, seed)
    truth, size = float(case.values.pow(degree).mean()), float(case.values.abs().pow(degree).mean())
    powered = found if degree == 1 else _powered(found, degree)
    off = powered.mean + blur * (degree == 2) - truth  # the second moment lacks so much, as `density` says
    return Check(_within(off, powered.mean_standard_error, size), off / size, found.num_products)


def _powered(density: ds.Density, degree: int) -> ds.Density:
    """The density of A^degree, by the same nodes."""
    return replace(density, nodes=density.nodes.pow(degree))


@lru_cache(maxsize=4096)
def pairs(name: str, seed: int, num: int, rtol: float) -> ds.Eigenpairs:
    """The largest."""
    return ds.eigenpairs(Matrix(cases()[name].matrix), num, rtol=rtol, seed=seed)


def bounds(case: Case, seed: int, *, num: int, rtol: float, missed: bool = False) -> Check:
    """Eigenvalues of runs called converged, by rank: whether all lie within their error bounds; others claim nothing.

    With `missed`: within three tolerances, for none but a missed pair is further off.
    """
    found = pairs(case.name, seed, num, rtol)
    off = (found.values - case.values[:num]).abs()
    allowed = 3 * rtol * case.values[:num].abs() if missed else found.error_bounds
    inside = bool((off <= allowed + 1e-9 * case.values.abs().max()).all())
    return Check(float(inside or not found.converged), math.nan, found.num_products, found.converged)


def levels(values: Tensor) -> list[float]:
    """Four thresholds in gaps of the descending values, near some quantiles."""
    found = (values[:-1] - values[1:] > 1e-3 * values[1:].abs() + 1e-9 * values[0]).nonzero()[:, 0]
    nearest = [found[(found - quantile * len(values)).abs().argmin()] for quantile in (0.02, 0.1, 0.5, 0.9)]
    return [float(values[j : j + 2].mean()) for j in nearest]


def count(case: Case, seed: int, *, probes: Probes) -> Check:
    """Eigenvalues above thresholds in gaps of the spectrum: the share of the counts within their bands."""
    found, _ = density(probes, case.name, seed)
    inside = []
    for level in levels(case.values):
        above, error = found.count_above(level)
        inside.append(_within(above - int((case.values > level).sum()), error, len(case.values)))
    return Check(sum(inside) / len(inside), products=found.num_products)


def points(values: Tensor) -> Tensor:
    """Where a band is asked (k,), ascending: over nine decades on either side of zero, and evenly."""
    largest = float(values.abs().max())
    decades = largest * torch.logspace(-9, 0.05, 60, dtype=torch.float64)
    line = 1.1 * torch.linspace(-largest, largest, 61, dtype=torch.float64)
    return torch.cat([-decades, line, decades]).sort().values


def band(case: Case, seed: int, *, probes: Probes, bins: bool = False) -> Check:
    """The distribution function, or the masses between the points: the share of them within their bands."""
    found, _ = density(probes, case.name, seed)
    x = points(case.values)
    truth = torch.searchsorted(case.values.flip(0), x, right=True).double() / len(case.values)
    low, high = found.mass_band(x) if bins else found.cdf_band(x)
    truth = truth.diff() if bins else truth
    inside = (low <= truth + 1e-9) & (truth <= high + 1e-9)
    return Check(float(inside.double().mean()), products=found.num_products)


@cache
def network() -> tuple[ds.Problem, Tensor, Tensor]:
    """The Hessian of a network trained on 500 digits: its problem, the matrix (P, P), its eigenvectors, ascending."""
    data = zoo.load("digits", per_class=50)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = zoo.mlp((1, 8, 8), 10, widths=(16, 16))
    zoo.train(net, data, epochs=20, learning_rate=0.1, batch_size=32)
    problem = ds.Problem(net.double(), (data.inputs.double(), data.targets))
    matrix = ds.Hessian(problem).dense()
    return problem, matrix, torch.linalg.eigh(matrix).eigenvectors


@lru_cache(maxsize=4096)
def subspace(sample: Sample, seed: int) -> ds.Subspace:
    """From the sample, with the usual certificate."""
    return ds.principal_subspace(
        network()[0], level="sampled", num=sample.num, num_samples=sample.num_samples, seed=seed
    )


def residual(sample: Sample, seed: int) -> Check:
    """‖(I − UUᵀ) H U‖_F."""
    found, matrix = subspace(sample, seed), network()[1]
    assert found.certificate is not None
    image = matrix @ found.vectors
    truth = float((image - found.vectors @ (found.vectors.T @ image)).norm())
    off = found.certificate.residual_norm - truth
    return Check(_within(off, found.certificate.standard_error, truth), products=found.certificate.num_checks)


def overlap(sample: Sample, seed: int) -> Check:
    """The least overlap that the certificate states, where it states one above zero."""
    found, vectors = subspace(sample, seed), network()[2]
    assert found.certificate is not None
    least = found.certificate.overlap_at_least
    truth = ds.overlap(found.vectors, vectors[:, -sample.num :])
    return Check(float(least <= truth + 1e-9), products=found.certificate.num_checks, claimed=least > 0)


PRODUCTS = (4, 8, 16, 64)
PROBES = {
    "4 probes × 8 steps": Probes(4, 8),
    "8 × 16": Probes(8, 16),
    "4 × 8, 3 pairs of residual .05 and the same seed deflated": Probes(4, 8, 3, 5e-2),
    "6 × 16, memory for 60 vectors": Probes(6, 16, rows=60),
}
TABLES: dict[str, dict[str, Run]] = {
    "Trace": {f"{n} products": partial(trace, num_products=n) for n in PRODUCTS},
    "Frobenius norm": {f"{n} products": partial(norm, num_products=n) for n in PRODUCTS},
    "Diagonal": {f"{n} products": partial(diagonal, num_products=n) for n in PRODUCTS},
    "Mean eigenvalue of a density": {k: partial(moment, probes=p, degree=1) for k, p in PROBES.items()},
    "Second moment of a density": {k: partial(moment, probes=p, degree=2) for k, p in PROBES.items()},
    "Counts of a density": {k: partial(count, probes=p) for k, p in PROBES.items()},
    "Pairs called converged": {
        "none missed": partial(bounds, num=4, rtol=1e-3, missed=True),
        "error bounds": partial(bounds, num=4, rtol=1e-3),
    },
}
BAND_PROBES = {
    "1 probe × 16 steps": Probes(1, 16),
    "4 × 8": Probes(4, 8),
    "2 × 48": Probes(2, 48),
    "4 × 16, without a basis": Probes(4, 16, basis="none"),
    "4 × 8, 3 pairs of residual .05 deflated": Probes(4, 8, 3, 5e-2),
}
BAND_TABLES: dict[str, dict[str, Run]] = {
    "Distribution function of a density": {k: partial(band, probes=p) for k, p in BAND_PROBES.items()},
    "Masses of bins of a density": {k: partial(band, probes=p, bins=True) for k, p in BAND_PROBES.items()},
}
SAMPLE_TABLES: dict[str, dict[str, SampleRun]] = {
    "Subspaces of samples": {"residual": residual, "least overlap": overlap}
}
SAMPLES = {
    f"{num} of {drawn} examples": Sample(num, drawn)
    for num, drawn in ((9, 150), (9, 300), (5, 300), (3, 300), (1, 300))
}
HEAD = """# Coverage

How often estimates keep their word: in each cell the share of the runs in which what is estimated lies within two
standard errors of the estimate, or within the stated bound, on matrices whose spectrum is known. After it the bias
in standard errors of its own mean, where the runs differ at all. A seed serves the search of pairs and the density
alike. A value that is not finite counts as not covered; there were {bad}. {stated:.0%} are stated of two standard
errors, all of bounds but for 1 run in 100. The spectra:

{spectra}

`python -m reproductions.coverage` measures all of it and writes this page; `tests/test_coverage.py`
asks the same.
"""
BANDS = """\
By `{call}`, at 181 points over nine decades on either side of zero: the mean share of them at which it holds the
truth, of which {stated:.0%} are stated. More is no surprise, for what moments leave open is a bound. The spectra:

{spectra}
"""
NOTES = {
    **{
        title: BANDS.format(
            call=call, stated=STATED, spectra="\n".join(f"- {n}: {words}." for n, words in BAND_WORDS.items())
        )
        for title, call in zip(BAND_TABLES, ("Density.cdf_band", "Density.mass_band"), strict=True)
    },
    "Pairs called converged": """\
The 4 largest, to a relative residual of .001, by rank: none is missed where all values lie within three tolerances of
the true ones. After the share stands how many runs were called converged (others claim nothing) and what a run took.
""",
    "Subspaces of samples": """\
So many directions, drawn from so many of the 500 examples of a small network trained on digits, with the usual three
products on all examples; the truth is from the dense matrix. After the share that overlaps at least as much as stated
stands how many runs stated more than nothing. If one direction makes most of such a residual, three squares of one
normal number are few: two standard errors reach the truth less often.
""",
}


def columns(title: str) -> Mapping[str, Case] | Mapping[str, Sample]:
    """Of the table of this title."""
    if title in BAND_TABLES:
        return band_cases()
    return SAMPLES if title in SAMPLE_TABLES else cases()


def page(found: dict[str, dict[str, dict[str, Tally]]]) -> str:
    """The page as Markdown: title → row → column → tally."""
    tallies = [t for rows in found.values() for row in rows.values() for t in row.values()]
    listed = "\n".join(f"- {name}: {words}." for name, words in WORDS.items())
    bad = sum(t.not_finite for t in tallies)
    parts = [HEAD.format(bad=bad or "none", stated=STATED, spectra=listed)]
    for title, rows in found.items():
        names = list(columns(title))
        body = [[name, *(_cell(row[key]) for key in names)] for name, row in rows.items()]
        runs = next(iter(next(iter(rows.values())).values())).runs
        parts += [
            f"## {title}",
            "",
            f"{runs} seeds a cell.",
            "",
            *_notes(title),
            table(["", *names], body),
            "",
        ]
    return "\n".join(parts)


def _notes(title: str) -> list[str]:
    return [NOTES[title]] if title in NOTES else []


def _cell(tally: Tally) -> str:
    if tally.claimed is not None:
        return f"{tally.inside:.1%}; {tally.claimed:.0%}, {tally.products:.0f} products"
    bias = "" if math.isnan(tally.bias) else f" ({tally.bias:+.1f})"
    return f"{tally.inside:.1%}{bias}"


def _path(title: str) -> Path:
    return RECORDS / f"{title.lower().replace(' ', '-')}.json"


def recorded(title: str, seeds: int | None = None) -> dict[str, dict[str, Tally]]:
    """The rows of a table that are measured, over so many seeds if that is asked."""
    path = _path(title)
    known = json.loads(path.read_text()) if path.is_file() else {}
    rows = {name: {key: Tally(**cell) for key, cell in row.items()} for name, row in known.items()}
    return {name: row for name, row in rows.items() if seeds is None or all(t.runs == seeds for t in row.values())}


def fill(title: str, name: str, seeds: int) -> None:
    """Measure a row of a table unless it is known, and keep it."""
    runs: dict[str, Callable[..., Check]] = {**TABLES, **BAND_TABLES, **SAMPLE_TABLES}[title]
    found = recorded(title, seeds)
    if name not in runs or name in found:
        return
    found[name] = {key: measure(runs[name], case, seeds) for key, case in columns(title).items()}
    print(title, name, *(f"{key} {_cell(t)}" for key, t in found[name].items()), sep="; ", flush=True)
    ordered = {row: {key: t._asdict() for key, t in found[row].items()} for row in runs if row in found}
    RECORDS.mkdir(exist_ok=True)
    _path(title).write_text(json.dumps(ordered, indent=1, ensure_ascii=False) + "\n")


def main() -> None:
    """Measure what is asked for and write the page."""
    titles = [*TABLES, *BAND_TABLES, *SAMPLE_TABLES]
    parser = argparse.ArgumentParser(prog="python -m reproductions.coverage", description=__doc__)
    parser.add_argument("titles", nargs="*", metavar="TITLE", help=f"of {', '.join(titles)}")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    options = parser.parse_args()
    if unknown := set(options.titles) - set(titles):
        parser.error(f"no table is called {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    asked = options.titles or titles
    tables: dict[str, dict[str, Callable[..., Check]]] = {**TABLES, **BAND_TABLES, **SAMPLE_TABLES}
    for name in dict.fromkeys(row for title in asked for row in tables[title]):
        for title in asked:  # of the same densities, which are kept meanwhile
            fill(title, name, options.seeds)
    PAGE.write_text(page({title: rows for title in titles if (rows := recorded(title))}))


if __name__ == "__main__":
    main()

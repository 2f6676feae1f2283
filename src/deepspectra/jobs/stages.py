"""The stages of an analysis, and what they find: `run` has them in order, each a function that adds to `Findings`.

G takes one of two routes. Where its N (C − 1) gradients are few and fit memory its whole spectrum is computed from
their inner products; else its pairs, traces and density are found by products, as those of H and R always are.
"""

from __future__ import annotations

import math
import time
from pathlib import Path

import torch
from torch import Tensor

from deepspectra.algorithms.eigenpairs import explore
from deepspectra.algorithms.krylov_basis import Krylov
from deepspectra.algorithms.long_vectors import inner_products
from deepspectra.algorithms.overlap import overlap
from deepspectra.analysis.attribute import Attribution, attribute_known, pair_shares, squared_norms
from deepspectra.analysis.gram_spectrum import (
    MARGIN,
    GramSpectrum,
    RowGram,
    gradient_pairs,
    gradient_spectrum,
    gradient_trace,
    nonzero_density,
    spectrum_of,
)
from deepspectra.analysis.outlier_sources import class_pair_shares
from deepspectra.analysis.principal_subspace import subspace_of
from deepspectra.analysis.three_level_map import drawable, place
from deepspectra.argument_checks import seeded
from deepspectra.confidence import standard_error
from deepspectra.derivatives.products import Products, products_of
from deepspectra.errors import CurvatureError, MemoryBudgetError
from deepspectra.jobs.density_stages import find_dense, find_density
from deepspectra.jobs.effort import BACKWARD, OperationCounter, count_operations, effort_for
from deepspectra.jobs.estimate import UNCLASSED_PAIRS, Plan, foreseen, plan_of_analysis
from deepspectra.jobs.findings import LETTERS, RESULTS, Findings, Options, identity
from deepspectra.jobs.stage_meter import Ledger, Report
from deepspectra.jobs.tails import judged_tails
from deepspectra.operators.base import Operator
from deepspectra.operators.curvature import GaussNewton, Hessian, Residual
from deepspectra.operators.parts import Decomposition
from deepspectra.problem.finished_stages import FinishedStages
from deepspectra.problem.problem import Problem
from deepspectra.results import Eigenpairs
from deepspectra.rows.gradients import ROWS_BYTES, GradientRows
from deepspectra.rows.held_rows import HeldRows, gram_bytes
from deepspectra.rows.projections import num_groups

TRACE_PROBES = 8  # of parts whose traces are not known exactly
BASIS, ROWS = "basis of H", "rows of the basis of H"  # kept beside results of stages, as is what memory chose:
EXACT, DENSE = "exact route", "dense route"
ROUNDED = 1e-3  # relatively, by which a sum of squares may fall short of one of its parts


def run(
    problem: Problem,
    ledger: Ledger,
    options: Options,
    resume: Path | None = None,
    test: Problem | None = None,
) -> Findings:
    """Every stage; the kept graphs of one kind are dropped before another kind needs their memory."""
    num_classes = num_groups(options.groups, problem.num_classes)
    found = Findings(problem, ledger, options.seed, num_classes)
    products = products_of(problem)
    _measure_gradient(found, options)
    if test is not None:
        found.test = Findings(test, ledger, options.seed, num_classes, of=" on test data")
        _size_up(found.test, options)
    if resume is not None:
        ledger.finished = FinishedStages(resume, identity(found, options), problem.batches.group, RESULTS)
    for one in filter(None, (found, found.test)):  # memory may differ by now
        one.effort = one.effort._replace(dense=ledger.finished.once(DENSE + one.of, one.effort.dense))
    with ledger.stage("checking derivatives"):
        hessian = Hessian(problem)
    if ledger.foresees:
        with ledger.stage("measuring one batch"):
            plans = [plan for one in (found, found.test) if one is not None and (plan := _plan_of(one)) is not None]
        if plans:
            ledger.tell(" And on test data, ".join(plan.told for plan in plans))
    basis = _find_pairs(found, "hessian", hessian)
    exact = found.classed and _find_class_structure(found, hessian, basis, options)
    del basis
    if found.effort.dense and not exact:
        find_dense(found, hessian)
    if found.classed:
        if not exact:
            found.trace, found.part_traces = ledger.run("traces of G", lambda _: _traces(found))
        found.parts.forget_means()
    _find_spectra(found, hessian, products, exact)
    if found.classed:
        if not exact:
            found.shares["hessian"] = found.attribution.pair_shares
        found.sources = ledger.run("classes of outliers", lambda _: _sources(found))
        _overlap(found)
    thresholds = {name: found.threshold(name) for name in found.pairs}
    found.tails = ledger.run("tails", lambda _: judged_tails(found, thresholds))
    if found.test is not None:
        _look_at_test(found, found.test, options.groups)
    return found


def _find_class_structure(found: Findings, hessian: Hessian, basis: Krylov | None, options: Options) -> bool:
    """The parts of G, what averaging finds, and what the outliers of H owe to which; whether G is known exactly."""
    ledger, effort = found.ledger, found.effort
    with ledger.stage("class structure"):
        found.parts, exact = _parts(found.problem, products_of(found.problem), options.groups, effort.exact_rows)
        exact = ledger.finished.once(EXACT, exact)  # memory may differ by now
    # a forward pass held them, and a backward pass for each class but one, without gradients of weights
    _average(found, found.problem.num_classes / BACKWARD if exact else 0.0)
    if exact:
        _find_exact(found)
    _attribute(found, hessian, basis, options.margin or MARGIN)
    return exact


def _sources(found: Findings) -> dict[str, Tensor]:
    """Of each outlier of H and of G, what each pair of classes has of it."""
    sources = {}
    for name, pairs in found.pairs.items():
        if num := int((pairs.values > found.threshold(name)).sum()):
            sources[name] = class_pair_shares(found.parts, pairs.vectors[:, :num], pairs.values[:num])
    products_of(found.problem).release()
    return sources


def _find_spectra(found: Findings, hessian: Hessian, products: Products, exact: bool) -> None:
    """Of H and of R, and of G if it is not known; but what is known already."""
    if not found.effort.dense or exact:
        find_density(found, "hessian", hessian)
        products.release()
        find_density(found, "residual", Residual(found.problem))
        products.release()
    elif not found.densities:
        find_dense(found, hessian)
    if not exact:
        _find_by_products(found)


def _look_at_test(found: Findings, other: Findings, groups: Tensor | None) -> None:
    """Top pairs, densities and tails of other data under the same weights, whose means are not looked at.

    As many of its largest eigenvalues are left out of the tails as are outliers of the data that were analysed.
    """
    problem, products, ledger = other.problem, products_of(other.problem), found.ledger
    hessian = Hessian(problem)
    _find_pairs(other, "hessian", hessian)
    exact = False
    if other.classed:
        other.parts, exact = _parts(problem, products, groups, other.effort.exact_rows)
        exact = ledger.finished.once(EXACT + other.of, exact)
        if exact:
            _find_exact(other)
    _find_spectra(other, hessian, products, exact)
    limits = {}
    for name, pairs in other.pairs.items():
        outliers = int((found.pairs[name].values > found.threshold(name)).sum())
        limits[name] = float(pairs.values[outliers]) if outliers < len(pairs.values) else math.inf
    other.tails = ledger.run("tails" + other.of, lambda _: judged_tails(other, limits))


def _parts(
    problem: Problem, products: Products, groups: Tensor | None, exact_rows: int
) -> tuple[Decomposition, bool]:
    """The parts of G, and whether features and errors of every layer are held, for which the graphs make room."""
    if problem.num_examples * (problem.num_classes - 1) <= exact_rows:
        products.release()
        try:
            rows = HeldRows(problem)
            fits = gram_bytes(rows.num_reduced) <= problem.memory and rows.captures.hold()
            return Decomposition(rows, "two-way", groups=groups), fits
        except CurvatureError as error:  # a network that does not tell its examples apart
            products.notes["exact spectrum of G"] = f"not computed: {error}"
    return Decomposition(GradientRows(problem), "two-way", groups=groups), False


def _find_exact(found: Findings) -> None:
    """The whole spectrum of G, its pairs and its parts from inner products of gradients; shares of H's pairs."""
    assert isinstance(found.parts.rows, HeldRows)
    parts = found.parts

    def work(_: Report) -> tuple[GramSpectrum, Eigenpairs]:
        began = time.perf_counter()
        spectrum = gradient_spectrum(parts)
        exact = spectrum_of(spectrum, began, parts.problem)
        return exact, gradient_pairs(spectrum, parts, found.num, began)

    exact, found.pairs["gauss_newton"] = found.ledger.run("exact spectrum of G" + found.of, work)
    found.exact = exact
    found.densities["gauss_newton"] = exact.density
    found.trace = float(exact.values.sum()), 0.0
    found.part_traces = torch.stack([exact.traces, torch.zeros_like(exact.traces)])
    shares = exact.shares[: len(found.pairs["gauss_newton"].values)]
    found.shares["gauss_newton"] = torch.cat([shares, 1 - shares.sum(1, keepdim=True)], 1)
    found.shares["hessian"] = found.ledger.run(
        "shares of H" + found.of, lambda _: pair_shares(parts, found.pairs["hessian"])
    )
    found.parts.rows.captures.release()


def _attribute(found: Findings, hessian: Hessian, basis: Krylov | None, margin: float) -> None:
    """What the outliers of H owe to which part, in the basis that found them, which goes on growing."""
    finished = found.ledger.finished

    def work(report: Report) -> Attribution:
        state = finished.read(BASIS) if basis is None else None  # of a run that was stopped
        grown = Krylov.of_state(hessian, state, finished.read_parts(ROWS, state["num_parts"])) if state else basis
        return attribute_known(
            hessian,
            found.parts,
            found.pairs["hessian"],
            grown,
            shares=found.shares.get("hessian"),
            margin=margin,
            max_products=found.effort.knockout_products,
            seed=found.seed,
            progress=report,
        )

    found.attribution = found.ledger.run("attribution of H", work)


def _find_by_products(found: Findings) -> None:
    """Pairs and density of G by products, and what its parts have of them."""
    gauss_newton = GaussNewton(found.problem)
    _find_pairs(found, "gauss_newton", gauss_newton)
    if not found.classed:
        if "gauss_newton" not in found.densities:
            find_density(found, "gauss_newton", gauss_newton)
        gauss_newton.products.release()
        return
    rows = found.parts.rows
    gram = RowGram(rows) if rows.holds and not found.effort.dense else None
    if gram is None or gram.shape[0] >= found.problem.num_parameters:  # G need not have zeros, or rows are too many
        found.shares["gauss_newton"] = found.ledger.run(
            "shares of G" + found.of, lambda _: pair_shares(found.parts, found.pairs["gauss_newton"])
        )
        if "gauss_newton" not in found.densities:
            find_density(found, "gauss_newton", gauss_newton)
    else:
        order = found.ledger.finished.order_of(found.problem.batches)
        found.shares["gauss_newton"], vectors = found.ledger.run(
            "shares of G" + found.of, lambda _: _shares_and_rows(found, gram), order
        )
        pairs, effort = found.pairs["gauss_newton"], found.effort
        counts = effort.num_probes, min(effort.num_steps, gram.shape[0])
        found.densities["gauss_newton"] = found.ledger.run(
            "density of G" + found.of,
            lambda report: nonzero_density(gram, pairs, vectors, *counts, found.seed + 2, report),
        )
    gauss_newton.products.release()


def _shares_and_rows(found: Findings, gram: RowGram) -> tuple[Tensor, Tensor]:
    """What each part has of the pairs (λ, u) of G, and A u / √λ (R, K), a few pairs at a time."""
    parts, pairs = found.parts, found.pairs["gauss_newton"]
    width = max(1, ROWS_BYTES // (8 * parts.rows.weights.numel()))
    norms, rows = [], []
    for vectors in torch.split(pairs.vectors, width, 1):
        pushed = parts.rows.apply(vectors)
        norms.append(parts.projections.squared_norms(pushed, tuple(parts)))
        rows.append(gram.reduced(pushed))
    found_rows = torch.cat(rows, 1)
    shares = (torch.cat(norms, 1) / pairs.values.to(norms[0])).T
    shares = torch.cat([shares, 1 - shares.sum(1, keepdim=True)], 1).cpu()
    return shares, found_rows / found_rows.norm(dim=0).clamp_min(torch.finfo(found_rows.dtype).tiny)


def _traces(found: Findings) -> tuple[tuple[float, float] | None, Tensor]:
    """Of G with its standard error, if gradients of single examples are to be had, and of the parts (2, parts).

    While the means are at hand they are exact but for what does not fit.
    Traces of means are sums of their squares, and within is what they leave of G. Where that is not known, and
    for the interaction if the C² means do not fit, by random signs on the complement of the top pairs of H.
    """
    parts, problem = found.parts, found.problem
    total: tuple[float, float] | None = None
    if found.effort.dense:
        total = problem.num_parameters * found.densities["gauss_newton"].mean, 0.0
    elif problem.splits_by_class:  # else each position of an example takes passes of its own
        try:
            total = gradient_trace(problem, found.seed + 3)
        except (CurvatureError, MemoryBudgetError) as refusal:
            products_of(problem).notes["exact trace of G"] = f"not computed: {refusal}"
    traces = {name: _squared(parts.factor(name)) for name in ("class", "logit", "true")}
    if parts.holds_means():
        traces["interaction"] = max(0.0, _squared(parts.factor("means")) - sum(traces.values()))
    errors = dict.fromkeys(traces, 0.0)
    least = (1 - ROUNDED) * sum(traces.values())
    if total is not None and total[0] + 6 * total[1] < least:  # its own means have more
        products_of(problem).notes["exact trace of G"] = "not used: it misses what the means have"
        total = None
    if total is None or "interaction" not in traces:
        for name, (value, error) in _estimated_traces(parts, found.pairs["hessian"], found.seed).items():
            errors.setdefault(name, error)
            traces.setdefault(name, value)
    if total is not None:
        means = [name for name in parts if name != "within"]
        traces["within"] = max(0.0, total[0] - sum(traces[name] for name in means))
        errors["within"] = math.hypot(total[1], *(errors[name] for name in means))
    table = [[some[name] for name in parts] for some in (traces, errors)]
    return total, torch.tensor(table, dtype=torch.float64)


def _squared(factor: Tensor) -> float:
    return float(factor.square().sum(dtype=torch.float64))


def _measure_gradient(found: Findings, options: Options) -> None:
    """A gradient, whose time is the unit of every cost."""
    problem, ledger = found.problem, found.ledger

    def gradient() -> float:  # it holds no findings, which hold the ledger: nothing waits for the garbage collector
        return float(problem.gradient().norm())

    ledger.gradient, ledger.agree = gradient, lambda seconds: problem.batches.group.every(seconds)[0]
    if problem.device.type != "cpu":
        ledger.clock = time.perf_counter
    with ledger.stage("loss and gradient"):
        _size_up(found, options)
        found.gradient_norm = gradient()


def _size_up(found: Findings, options: Options) -> None:
    """Loss, accuracy, and what to do for a problem of that size where it was not asked for."""
    problem = found.problem
    found.loss, found.operations = count_operations(problem, problem.loss)
    found.accuracy = problem.accuracy()
    effort = effort_for(problem, found.operations, options.effort)
    found.effort = effort._replace(
        rtol=options.rtol or effort.rtol,
        num_probes=options.num_probes or effort.num_probes,
        num_steps=min(options.num_steps or effort.num_steps, problem.num_parameters),
        dense=effort.dense and options.num_probes is None and options.num_steps is None,
    )
    found.classed = options.classed
    found.num = options.num or (found.num_classes + effort.spare_pairs if found.classed else UNCLASSED_PAIRS)


def _plan_of(found: Findings) -> Plan | None:
    """What the stages will take."""
    num_classes = found.num_classes if found.classed else 0
    return foreseen(plan_of_analysis, found.problem, found.effort, found.num, num_classes, found.of)


def _find_pairs(found: Findings, name: str, operator: Operator) -> Krylov | None:
    """The top pairs of H or G; returns the basis that found them, if they were not found before."""
    basis: Krylov | None = None
    num = min(found.num, found.problem.num_parameters)

    def work(report: Report) -> Eigenpairs:
        nonlocal basis
        pairs, basis = explore(
            operator, num, rtol=found.effort.rtol, start="random", seed=found.seed, progress=report
        )
        return pairs

    found.pairs[name] = found.ledger.run(f"top eigenpairs of {LETTERS[name]}{found.of}", work)
    if basis is not None and f"{name}{found.of}" == "hessian":
        found.ledger.finished.write_part(ROWS, basis.part())
        found.ledger.finished.write(BASIS, basis.state())
    return basis


def _average(found: Findings, held: float) -> None:
    """The principal subspaces by averaging alone, of rows that took so many gradients; C² means only if they fit."""
    ledger, parts, num = found.ledger, found.parts, max(1, found.num_classes - 1)
    for level in ("class", "cross_class"):
        stage = f"averaging: {level.replace('_', '-')} means"

        def work(_: Report, level: str = level) -> tuple[Tensor, Tensor, float] | tuple[()]:
            with OperationCounter() as counter:  # type: ignore[no-untyped-call]
                held = level == "class" or parts.holds_means()
                averaged = subspace_of(parts, level, num) if held else None
            (total,) = found.problem.batches.group.sums(counter.total)
            return () if averaged is None else (*averaged, total)

        if subspace := ledger.run(stage, work):
            values, vectors, operations = subspace
            found.subspaces[level] = values, vectors
            found.subspace_gradients[level] = held + operations / found.operations  # which no clock changes
    if "cross_class" in found.subspaces and drawable(parts.projections.cell_weights):
        found.places = ledger.run("map of the means", lambda _: _map(parts, found.seed)) or None


def _map(parts: Decomposition, seed: int) -> tuple[Tensor, Tensor] | tuple[()]:
    """Places of class means and of cross-class means; none if the latter do not fit memory, after a stop."""
    if not parts.holds_means():
        return ()
    rows = parts.factor("means").T
    return place(inner_products(rows, rows), parts.projections.cell_weights, seed)


def _overlap(found: Findings) -> None:
    """Overlap of the averaged subspaces with the eigenspaces of the C−1 largest pairs; NaN where one is zero."""
    for level, (_, vectors) in found.subspaces.items():
        most = min(vectors.shape[1], len(found.pairs["hessian"].values))
        found.dimensions[level] = k = min(found.num_classes - 1, most)
        for name, pairs in found.pairs.items():
            spans = vectors[:, :k], pairs.vectors[:, :k]
            found.overlaps[level, name] = overlap(*spans) if all(s.numel() for s in spans) else math.nan


def _estimated_traces(parts: Decomposition, pairs: Eigenpairs, seed: int) -> dict[str, tuple[float, float]]:
    """The trace of each part and its standard error.

    Exact on the given vectors, by Hutchinson's |Π A v|² over random signs on their complement.
    """
    generator = seeded(seed)
    vectors = torch.linalg.qr(pairs.vectors)[0]
    signs = torch.randint(0, 2, (len(vectors), TRACE_PROBES), generator=generator) * 2 - 1
    block = signs.to(vectors)
    block -= vectors @ (vectors.T @ block)
    samples = squared_norms(parts, block).cpu()
    values = squared_norms(parts, vectors).cpu().sum(1) + samples.mean(1)
    errors = standard_error(samples, 1)
    return dict(zip(parts, zip(values.tolist(), errors.tolist(), strict=True), strict=True))

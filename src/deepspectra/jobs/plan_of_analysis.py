"""The stages of an analysis, foreseen: eigenpairs, averages, attribution and densities."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from deepspectra.algorithms.eigenpairs import enough_products
from deepspectra.analysis.knockouts import NEWEST
from deepspectra.errors import CurvatureError, MemoryBudgetError
from deepspectra.jobs.effort import FEWEST_STEPS, Effort
from deepspectra.jobs.pace import Pace, Stage
from deepspectra.problem.memory_budget import share
from deepspectra.rows.held_rows import gram_bytes

PAIRS = (10, 2.5)  # products that pairs take: so many, and so many for each; docs/costs.md
SPARE_ROWS = 8  # vectors of a basis beyond the pairs, at least
KNOCKOUTS = 1  # products of an attribution, for each class
TAIL, MAP = 0.4, 0.015  # seconds of a tail's laws, and of a map of means, for each of C² of them
SIDES = 7  # tails that are looked at
KNOCKED = 3  # exact spectra with their knock-outs, in units of all eigenvalues and vectors
RITZ = 8  # eigenproblems of the basis of a density, for what has converged and what nodes weigh
COLUMNS = 64  # of a dense matrix that go through a graph together, at most


Counted = Callable[[int, int], int]  # pairs, parameters → products that the pairs take


def typical_products(num: int, size: int) -> int:
    """Of a spectrum with gaps behind the pairs; all of a small space at most."""
    return min(size, round(max(15, PAIRS[0] + PAIRS[1] * num)))


def most_products(num: int, size: int) -> int:
    """After which a search gives up, for want of a gap."""
    return min(size, enough_products(num))


def ranged(stages: Callable[[Counted], Iterator[Stage]]) -> Iterator[Stage]:
    """Stages that take a typical number of products, and at most what they do without gaps in the spectrum."""
    for typical, slow in zip(stages(typical_products), stages(most_products), strict=True):
        yield typical.slower(slow)


def of_analysis(pace: Pace, effort: Effort, num: int, num_classes: int, of: str, *, exact: bool) -> Iterator[Stage]:
    """Of so many pairs and classes; ``of`` test data there are no averages; all of G is known where it is `exact`."""
    return ranged(lambda counted: _stages(pace, effort, num, num_classes, of, counted, exact=exact))


def _stages(
    pace: Pace, effort: Effort, num: int, num_classes: int, of: str, counted: Counted, *, exact: bool
) -> Iterator[Stage]:
    averaged, held = bool(num_classes) and not of, 0.0

    def leaving(num_bytes: float, *stages: Stage) -> Iterator[Stage]:
        """Stages beside what earlier ones found, of which so many bytes more, or less, stay."""
        nonlocal held
        yield from (stage._replace(beside=held) for stage in stages)
        held += num_bytes

    pairs, means = num * pace.vector, _means(pace, num_classes) if averaged else 0
    if not of:
        loss = Stage("loss and gradient", 0, 2 * pace.gradient, pace.batch_graph("hessian"), pace.problem.memory)
        yield from leaving(0, loss)
    first = pairs_stage(pace, "hessian", num, counted, of)
    basis = min(first.products * pace.held_row, share(pace.problem.memory, "basis")) if averaged else 0
    yield from leaving(pairs + basis, first)
    rows = pace.rows.num_bytes if exact else 0.0
    if exact:
        yield from leaving(rows, Stage(f"class structure{of}", 0, pace.rows.seconds, rows))
    if averaged:
        spans = (num_classes - 1) * pace.vector  # what averaging finds
        of_classes, *of_cells = _averages(pace, num_classes, exact=exact)
        yield from leaving(num_classes * pace.vector + spans, of_classes)
        yield from leaving(means + spans * bool(means), *of_cells)
    if exact:
        yield from leaving(pairs, _exact_spectrum(pace, of))
        yield from leaving(-rows, Stage(f"shares of H{of}", 0, num * pace.gradient / 3, 0))
    if averaged:
        held -= means + basis  # its own, too
        yield from leaving(means, _attribution(pace, effort, num, num_classes, counted, exact=exact))
    if effort.dense and not exact:
        yield from leaving(0, *_dense_stages(pace, effort, of))
    if averaged and not exact:
        traces = Stage("traces of G", 0, num_classes * pace.gradient, num_classes * pace.vector)
        yield from leaving(0, traces)
    held -= means
    if exact or not effort.dense:
        yield from leaving(0, density_stage(pace, effort, "hessian", f"density of H{of}", num))
        yield from leaving(0, density_stage(pace, effort, "residual", f"density of R{of}"))
    if not exact:
        yield from leaving(pairs, pairs_stage(pace, "gauss_newton", num, counted, of))
        if num_classes:
            yield from leaving(0, Stage(f"shares of G{of}", 0, num * pace.product("gauss_newton") / 2, pairs))
        if not effort.dense:
            yield from leaving(0, density_stage(pace, effort, "gauss_newton", f"density of G{of}", num))
    if averaged:
        push = pace.gradient if exact else pace.product("gauss_newton") / 2
        yield from leaving(0, Stage("classes of outliers", 0, num_classes * push, pairs))
    yield from leaving(0, Stage(f"tails{of}", 0, SIDES * TAIL, 0))


def is_exact(pace: Pace, effort: Effort) -> bool:
    """Whether gradients are few enough, and fit memory, for all eigenvalues of G."""
    problem = pace.problem
    rows = problem.num_examples * (problem.num_classes - 1)
    if rows > effort.exact_rows or gram_bytes(rows) > problem.memory:
        return False
    try:
        return pace.rows.num_bytes <= share(problem.memory, "factors")
    except (CurvatureError, MemoryBudgetError):  # examples cannot be told apart, or take too much each
        return False


def pairs_stage(pace: Pace, kind: str, num: int, counted: Counted, of: str = "") -> Stage:
    """So many top eigenpairs of H or G."""
    letter = "H" if kind == "hessian" else "G"
    products = counted(num, pace.problem.num_parameters) + (num if pace.problem.basis else 0)
    limit, row = share(pace.problem.memory, "basis"), pace.held_row
    room = limit + pace.host_memory(kind)
    fewest = min(num + SPARE_ROWS, pace.problem.num_parameters)
    held = max(fewest, min(products, room // row))
    # a product is orthogonalised twice, against half of the basis on the whole
    seconds = pace.building(kind) + products * (pace.product(kind) + min(products, held) * pace.step)
    most = share(pace.problem.memory, "graphs")
    kept = min(pace.graphs(kind), most)
    name = f"top eigenpairs of {letter}{of}"
    if fewest * row > room:
        return Stage(name, products, seconds, fewest * row, room)
    mine = min(held * row, limit)
    hosted = held * row - mine
    # pairs are whole on all, and made beside the basis; graphs make way if they do not fit with what is beyond it
    pairs = mine + num * pace.vector
    stay = kept if kept + pairs - limit <= most else 0
    return Stage(name, products, seconds, max(kept + mine, stay + pairs), host_bytes=hosted)


def _dense_stages(pace: Pace, effort: Effort, of: str) -> Iterator[Stage]:
    """All eigenvalues of G and of R by P products each, and of H, the sum of their matrices."""
    for kind, letter in (("gauss_newton", "G"), ("residual", "R")):
        yield density_stage(pace, effort, kind, f"density of {letter}{of}")
    size = pace.problem.num_parameters
    yield Stage(f"density of H{of}", 0, pace.cube * size**3 / 2, 3 * 8 * size**2)


def density_stage(pace: Pace, effort: Effort, kind: str, name: str, known: int = 0) -> Stage:
    """The density of H, R or G: of so many probes and steps beside so many known pairs, or exact."""
    size = pace.problem.num_parameters
    kept = min(pace.graphs(kind), share(pace.problem.memory, "graphs"))
    if effort.dense:
        seconds = pace.building(kind) + size * pace.product(kind, min(COLUMNS, size)) + pace.cube * size**3 / 2
        return Stage(name, size, seconds, kept + 3 * 8 * size**2)
    probes = effort.num_probes
    steps = min(effort.num_steps, size // probes if probes < size else 1)
    room = share(pace.problem.memory, "basis") // pace.row
    if FEWEST_STEPS <= room < steps:
        steps = room
    products = max(1, probes * steps)
    basis = min(products, room)
    seconds = pace.building(kind) + products * (pace.product(kind, probes) + basis * pace.step)
    seconds += RITZ * pace.cube * basis**3
    return Stage(name, products, seconds, kept + (known + basis) * pace.row)


def _averages(pace: Pace, num_classes: int, *, exact: bool) -> Iterator[Stage]:
    product = pace.gradient if exact else pace.product("gauss_newton")
    means = _means(pace, num_classes)
    # a pass for all classes of a batch together where it can be split by class, else one for each that it has
    passes = 1 if exact or pace.problem.splits_by_class else min(num_classes, pace.one.num_examples)
    yield Stage("averaging: class means", 0, (1.5 + passes / 2) * product, num_classes * pace.vector)
    yield Stage("averaging: cross-class means", 0, (2 + passes * num_classes / 2) * product if means else 0, means)
    if means:
        yield Stage("map of the means", 0, MAP * num_classes**2, 0)


def _means(pace: Pace, num_classes: int) -> int:
    """Bytes of the C² cross-class means, in the place of graphs; 0 where they do not fit it and are not held."""
    means = num_classes**2 * pace.vector
    return means if means <= share(pace.problem.memory, "graphs") else 0


def _attribution(pace: Pace, effort: Effort, num: int, num_classes: int, counted: Counted, *, exact: bool) -> Stage:
    product = pace.gradient if exact else pace.product("gauss_newton")
    products = min(num_classes * KNOCKOUTS + 1, effort.knockout_products or num_classes * KNOCKOUTS + 1)
    size, means = pace.problem.num_parameters, _means(pace, num_classes)
    rows, least = counted(num, size) + products, num + NEWEST + 2 * num_classes + min(products, 1)
    # the basis grows into what graphs and means leave
    room = share(pace.problem.memory, "basis") // pace.row
    room += (share(pace.problem.memory, "graphs") - means) // pace.row
    basis = max(min(size, least), min(rows, room)) * pace.row
    seconds = products * pace.product("hessian") + num * product / 2
    return Stage("attribution of H", products, seconds, means + basis, means + room * pace.row)


def _exact_spectrum(pace: Pace, of: str) -> Stage:
    rows = pace.problem.num_examples * (pace.problem.num_classes - 1)
    seconds = pace.rows.pair * rows**2 + KNOCKED * pace.cube * rows**3
    return Stage(f"exact spectrum of G{of}", 0, seconds, gram_bytes(rows))

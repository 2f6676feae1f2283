"""The stages of an analysis, in order, and what they find."""

from __future__ import annotations

import hashlib
import math
import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from deepspectra.algorithms.density import density
from deepspectra.algorithms.eigenpairs import explore
from deepspectra.algorithms.lanczos import Krylov, basis_capacity, inner_products, seeded
from deepspectra.algorithms.subspace import overlap
from deepspectra.analysis.attribution import Attribution, attribute, pair_shares, squared_norms
from deepspectra.analysis.gram import (
    GramSpectrum,
    gradient_basis,
    gradient_pairs,
    spectrum_of,
)
from deepspectra.analysis.hierarchy import drawable, place
from deepspectra.analysis.means import subspace_of
from deepspectra.apps.kept import Kept, Label
from deepspectra.apps.ledger import Ledger, Report
from deepspectra.errors import ConvergenceWarning, CurvatureError
from deepspectra.operators.base import Operator
from deepspectra.operators.curvature import GaussNewton, Hessian, Residual
from deepspectra.operators.held import HeldRows
from deepspectra.operators.parts import Decomposition, decompose
from deepspectra.operators.projections import num_groups
from deepspectra.problem import Problem
from deepspectra.products import Products, products_of
from deepspectra.results import Density, Eigenpairs, Provenance, versions

LETTERS = {"hessian": "H", "gauss_newton": "G", "residual": "R"}
TRACE_PROBES = 4
EXACT_ROWS = 3000  # up to which G's spectrum is computed exactly
FEWEST_STEPS = 4  # of a density that is worth having
BASIS, UNIT, EXACT = "basis of H", "seconds of a gradient", "exact route"  # kept beside results of stages


class Effort(NamedTuple):
    """What an analysis does unless told otherwise, for gradients that take up to so many seconds."""

    up_to_seconds: float
    spare_pairs: int  # eigenpairs beyond the number of classes
    num_probes: int
    num_steps: int
    rtol: float = 1e-2  # of eigenpairs
    knockout_products: int | None = None  # at most; by default what attribution takes


EFFORTS = (Effort(0.25, 3, 4, 24), Effort(3.0, 3, 2, 16), Effort(float("inf"), 0, 2, 5, 3e-2, 8))
WARM_UP = 0.5  # seconds; a gradient that takes longer is timed at its first call


@dataclass
class Findings:
    """What the stages found, to be labelled and saved.

    Attributes:
        pairs: "hessian" and "gauss_newton" → top eigenpairs.
        densities: also "residual".
        subspaces: level → all eigenvalues and the first C−1 vectors by averaging.
        overlaps: (level, operator) → overlap with the top eigenspace of dimension `dimensions[level]`.
        shares: operator → (pairs, parts).
        part_traces: (2, parts), traces of G's parts and their standard errors.
        exact: all eigenvalues of G and its parts, if the gradients are few enough.
        places: of class means and of cross-class means on the map, if these are held.
    """

    problem: Problem
    ledger: Ledger
    seed: int
    num_classes: int  # or groups of classes, over which averages are taken
    rtol: float = float("nan")
    loss: float = float("nan")
    accuracy: float = float("nan")
    gradient_norm: float = float("nan")
    pairs: dict[str, Eigenpairs] = field(default_factory=dict)
    densities: dict[str, Density] = field(default_factory=dict)
    subspaces: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    subspace_gradients: dict[str, float] = field(default_factory=dict)
    dimensions: dict[str, int] = field(default_factory=dict)
    overlaps: dict[tuple[str, str], float] = field(default_factory=dict)
    shares: dict[str, Tensor] = field(default_factory=dict)
    exact: GramSpectrum | None = None
    places: tuple[Tensor, Tensor] | None = None
    parts: Decomposition = field(init=False)
    attribution: Attribution = field(init=False)
    part_traces: Tensor = field(init=False)


def run(
    problem: Problem,
    ledger: Ledger,
    *,
    num: int | None,
    num_probes: int | None,
    num_steps: int | None,
    rtol: float | None,
    groups: Tensor | None,
    seed: int,
    resume: Path | None,
) -> Findings:
    """Every stage; the kept graphs of one kind are dropped before another kind needs their memory."""
    num_classes = num_groups(groups, problem.num_classes)
    found = Findings(problem, ledger, seed, num_classes)
    products = products_of(problem)
    _measure_gradient(found)
    if resume is not None:
        options: dict[str, Label] = {
            "num": num,
            "num_probes": num_probes,
            "num_steps": num_steps,
            "rtol": rtol,
            "groups": "" if groups is None else _digest([groups]),
        }
        _go_on(found, resume, options)
    effort = next(e for e in EFFORTS if ledger.gradient_seconds <= e.up_to_seconds)
    found.rtol = rtol or effort.rtol
    num = num or num_classes + effort.spare_pairs
    probes = num_probes or effort.num_probes
    steps = min(num_steps or effort.num_steps, problem.num_parameters)
    with ledger.stage("checking derivatives"):
        hessian = Hessian(problem)
    basis = _find_pairs(found, "hessian", hessian, num)
    with ledger.stage("class structure"):
        found.parts, exact = _parts(problem, products, groups)
        exact = exact if ledger.kept is None else ledger.kept.once(EXACT, exact)  # memory may differ by now
    _average(found)
    if exact:
        _find_exact(found, num)
    _attribute(found, hessian, basis, effort.knockout_products)
    del basis
    _find_density(found, "hessian", hessian, probes, steps)
    products.release()
    _find_density(found, "residual", Residual(problem), probes, steps)
    products.release()
    if not exact:
        found.shares["hessian"] = found.attribution.pair_shares
        _find_by_products(found, num, probes, steps)
    _overlap(found)
    return found


def _parts(problem: Problem, products: Products, groups: Tensor | None) -> tuple[Decomposition, bool]:
    """The parts of G, and whether features and errors of every layer are held, for which the graphs make room."""
    if problem.num_examples * (problem.num_classes - 1) <= EXACT_ROWS:
        products.release()
        try:
            parts = decompose(problem, effects="two-way", hold=True, groups=groups)
            assert isinstance(parts.rows, HeldRows)
            return parts, parts.rows.gram_bytes <= problem.memory and parts.rows.hold()
        except CurvatureError as error:  # a network that does not tell its examples apart
            products.notes["exact spectrum of G"] = f"not computed: {error}"
    return decompose(problem, effects="two-way", groups=groups), False


def _find_exact(found: Findings, num: int) -> None:
    """The whole spectrum of G, its pairs and its parts from inner products of gradients; shares of H's pairs."""
    assert isinstance(found.parts.rows, HeldRows)
    parts = found.parts

    def work(_: Report) -> tuple[GramSpectrum, Eigenpairs]:
        began = time.perf_counter()
        basis = gradient_basis(parts)
        exact = spectrum_of(basis, tuple(parts), Provenance.of_matrix("Gauss-Newton", parts.problem), began)
        return exact, gradient_pairs(basis, parts, num, began)

    exact, found.pairs["gauss_newton"] = found.ledger.run("exact spectrum of G", work)
    found.exact = exact
    found.densities["gauss_newton"] = exact.density
    found.part_traces = torch.stack([exact.traces, torch.zeros_like(exact.traces)])
    shares = exact.shares[: len(found.pairs["gauss_newton"].values)]
    found.shares["gauss_newton"] = torch.cat([shares, 1 - shares.sum(1, keepdim=True)], 1)
    found.shares["hessian"] = found.ledger.run(
        "shares of H", lambda _: pair_shares(parts, found.pairs["hessian"])
    )
    found.parts.rows.release()


def _attribute(found: Findings, hessian: Hessian, basis: Krylov | None, max_products: int | None) -> None:
    """What the outliers of H owe to which part, in the basis that found them, which goes on growing."""

    def work(report: Report) -> Attribution:
        return attribute(
            hessian,
            found.parts,
            pairs=found.pairs["hessian"],
            basis=_kept_basis(found, hessian) if basis is None else basis,
            shares=found.shares.get("hessian"),
            max_products=max_products,
            seed=found.seed,
            progress=report,
        )

    found.attribution = found.ledger.run("attribution of H", work)
    found.parts.forget_means()


def _find_by_products(found: Findings, num: int, probes: int, steps: int) -> None:
    """Pairs and density of G by products, and what its parts have of them."""
    gauss_newton = GaussNewton(found.problem)
    _find_pairs(found, "gauss_newton", gauss_newton, num)
    _find_density(found, "gauss_newton", gauss_newton, probes, steps)
    found.shares["gauss_newton"], found.part_traces = found.ledger.run(
        "shares of G", lambda _: _shares(found)
    )
    gauss_newton.products.release()


def _measure_gradient(found: Findings) -> None:
    """Loss, accuracy, and the seconds of one full-data gradient: the unit of every cost."""
    with found.ledger.stage("loss and gradient"):
        found.loss, found.accuracy = found.problem.loss(), found.problem.accuracy()
        for _ in range(2):
            began = time.perf_counter()
            found.gradient_norm = float(found.problem.gradient().norm())
            found.ledger.gradient_seconds = time.perf_counter() - began
            if found.ledger.gradient_seconds > WARM_UP:
                break


def _go_on(found: Findings, folder: Path, options: dict[str, Label]) -> None:
    """Keep results of stages in a folder, and take those of a stopped run, with its unit of cost, from it."""
    problem, ledger = found.problem, found.ledger
    names = ",".join(problem.parameter_names)
    first, second = problem.batches.mark
    own: dict[str, Label] = {
        "examples": problem.num_examples,
        "classes": problem.num_classes,
        "parameters": problem.num_parameters,
        "dtype": str(problem.dtype),
        "device": str(problem.device),
        "weights": _digest([*problem.model.parameters(), *problem.model.buffers()], names),
        "data": first,
        "squares of the data": second,
        "loss": found.loss,
        "loss function": problem.loss_function.name,
        "version": versions()["deepspectra"],
        "seed": found.seed,
    }
    ledger.kept = Kept(folder, own | options)
    ledger.gradient_seconds = ledger.kept.once(UNIT, ledger.gradient_seconds)


def _digest(tensors: Iterable[Tensor], text: str = "") -> str:
    """Of a text and the bytes of some tensors."""
    digest = hashlib.sha256(text.encode())
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _find_pairs(found: Findings, name: str, operator: Operator, num: int) -> Krylov | None:
    """The basis that found them, if they were not found before.

    From a random vector, which is a probe of the density too.
    """
    basis: Krylov | None = None
    num = min(num, found.problem.num_parameters)

    def work(report: Report) -> Eigenpairs:
        nonlocal basis
        pairs, basis = explore(
            operator, num, rtol=found.rtol, start="random", seed=found.seed, progress=report
        )
        return pairs

    found.pairs[name] = found.ledger.run(f"top eigenpairs of {LETTERS[name]}", work)
    if found.ledger.kept is not None and basis is not None and name == "hessian":
        found.ledger.kept.write(BASIS, basis.state())
    return basis


def _kept_basis(found: Findings, hessian: Hessian) -> Krylov | None:
    """The basis that found the pairs of H in a run that was stopped."""
    state = found.ledger.kept and found.ledger.kept.read(BASIS)
    return Krylov.of_state(hessian, state) if state else None


def _find_density(found: Findings, name: str, operator: Operator, probes: int, steps: int) -> None:
    known = len(found.pairs[name].values) if name in found.pairs else 0
    room = basis_capacity(operator) - known - 1

    def work(report: Report) -> Density:
        fewer = FEWEST_STEPS <= room < steps
        if fewer:
            warnings.warn(
                f"the density of {LETTERS[name]} has {room} steps a probe; more do not fit memory",
                ConvergenceWarning,
                stacklevel=2,
            )
        return density(
            operator,
            num_probes=probes,
            num_steps=room if fewer else steps,
            deflate=found.pairs.get(name),
            seed=found.seed + 2,
            progress=report,
        )

    found.densities[name] = found.ledger.run(f"density of {LETTERS[name]}", work)


def _average(found: Findings) -> None:
    """The principal subspaces by averaging alone; the C² means only if they fit in memory."""
    ledger, parts, num = found.ledger, found.parts, max(1, found.num_classes - 1)
    for level in ("class", "cross_class"):
        stage = f"averaging: {level.replace('_', '-')} means"

        def work(_: Report, level: str = level) -> tuple[Tensor, Tensor] | tuple[()]:
            held = level == "class" or parts.holds_means()
            return subspace_of(parts, level, num) if held else ()

        if subspace := ledger.run(stage, work):
            found.subspaces[level] = subspace
        found.subspace_gradients[level] = ledger.gradients(ledger.costs[stage])
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


def _shares(found: Findings) -> tuple[Tensor, Tensor]:
    """What each part has of the pairs of G, and the traces of the parts."""
    pairs = found.pairs["gauss_newton"]
    shares = pair_shares(found.parts, pairs)
    return shares, _part_traces(found.parts, pairs, shares, found.seed)


def _part_traces(parts: Decomposition, pairs: Eigenpairs, shares: Tensor, seed: int) -> Tensor:
    """Traces of the parts and their standard errors (2, parts).

    Exact on the top eigenvectors of G, by Hutchinson's |Π A v|² over random signs on their complement.
    """
    generator = seeded(seed)
    problem = parts.problem
    signs = torch.randint(0, 2, (problem.num_parameters, TRACE_PROBES), generator=generator) * 2 - 1
    block = signs.to(pairs.vectors)
    block -= pairs.vectors @ (pairs.vectors.T @ block)
    samples = squared_norms(parts, block).cpu()
    top = pairs.values.cpu() @ shares[:, :-1]
    return torch.stack([top + samples.mean(1), samples.std(1) / TRACE_PROBES**0.5])

"""What an analysis is asked for, and what its stages find."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from deepspectra.analysis.attribute import Attribution
from deepspectra.analysis.gram_spectrum import GramSpectrum
from deepspectra.analysis.knockouts import Knockout
from deepspectra.jobs.effort import Effort
from deepspectra.jobs.stage_meter import Ledger
from deepspectra.operators.parts import Decomposition
from deepspectra.problem.cross_entropy import CrossEntropy
from deepspectra.problem.finished_stages import Label, described, digest, identity_of, marks_of
from deepspectra.problem.losses import SquaredError
from deepspectra.problem.problem import Problem
from deepspectra.quadrature import Density
from deepspectra.results import Eigenpairs
from deepspectra.rows.averages import Averages

LETTERS = {"hessian": "H", "gauss_newton": "G", "residual": "R"}
RESULTS = (Attribution, Averages, GramSpectrum, Knockout)  # of stages, beside those of any job
TestedTail = dict[str, float | str]  # what is kept of a `Tail`, by name


class Options(NamedTuple):
    """What an analysis is asked for; what is None follows from the size of the problem."""

    num: int | None = None
    num_probes: int | None = None
    num_steps: int | None = None
    rtol: float | None = None
    margin: float | None = None
    groups: Tensor | None = None
    seed: int = 0
    effort: str = "standard"
    classed: bool = True


@dataclass
class Findings:
    """What the stages found, to be labelled and saved.

    Attributes:
        of: what tells the names of its stages from those of others.
        pairs: "hessian" and "gauss_newton" → top eigenpairs.
        densities: also "residual".
        tails: (operator, side) → the law of the bulk's tail.
        subspaces: level → all eigenvalues and the first C−1 vectors by averaging.
        overlaps: (level, operator) → overlap with the top eigenspace of dimension `dimensions[level]`.
        shares: operator → (pairs, parts).
        trace: of G, exact or an estimate, and its standard error; None where only its density tells.
        part_traces: (2, parts), traces of G's parts and their standard errors, 0 where they are exact.
        num: eigenpairs, as asked for or chosen.
        operations: floating-point operations of a gradient, by which the effort is chosen.
        exact: all eigenvalues of G and its parts, if the gradients are few enough.
        classed: whether there is one class label a row, so that there are parts and an attribution.
        sources: operator → of its outliers, (K, C, C) shares of pairs of classes.
        places: of class means and of cross-class means on the map, if these are held.
        test: pairs, densities and tails of other data under the same weights, if there are some.
    """

    problem: Problem
    ledger: Ledger
    seed: int
    num_classes: int  # or groups of classes, over which averages are taken
    of: str = ""
    num: int = 0
    operations: float = float("nan")
    loss: float = float("nan")
    accuracy: float = float("nan")
    gradient_norm: float = float("nan")
    pairs: dict[str, Eigenpairs] = field(default_factory=dict)
    densities: dict[str, Density] = field(default_factory=dict)
    tails: dict[tuple[str, str], TestedTail] = field(default_factory=dict)
    subspaces: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    subspace_gradients: dict[str, float] = field(default_factory=dict)
    dimensions: dict[str, int] = field(default_factory=dict)
    overlaps: dict[tuple[str, str], float] = field(default_factory=dict)
    shares: dict[str, Tensor] = field(default_factory=dict)
    exact: GramSpectrum | None = None
    classed: bool = True
    sources: dict[str, Tensor] = field(default_factory=dict)
    places: tuple[Tensor, Tensor] | None = None
    trace: tuple[float, float] | None = None
    test: Findings | None = None
    effort: Effort = field(init=False)
    parts: Decomposition = field(init=False)
    attribution: Attribution = field(init=False)
    part_traces: Tensor = field(init=False)

    def threshold(self, name: str) -> float:
        """Above which eigenvalues of H or G are outliers: G's own if known, else H's; ∞ without classes."""
        if not self.classed:
            return math.inf
        if name == "gauss_newton" and self.exact is not None:
            return self.exact.threshold(self.attribution.margin)
        return self.attribution.threshold

    @property
    def is_convex(self) -> bool:
        """Whether the loss is known to be convex in the outputs."""
        return isinstance(self.problem.loss_function, CrossEntropy | SquaredError)

    def spectrum(self, name: str) -> tuple[Density, float] | None:
        """The density of H, G or R with zero for what rounding made of it; None if it knows nothing but zeros.

        And the share of eigenvalues that are known to be zero: random vectors only estimate how many are. Of the G of
        a convex loss, which is positive semi-definite, what lies below zero is rounding.
        """
        density = self.densities[name]
        if not bool(density.weights.isfinite().all() and density.nodes.isfinite().all()):
            return None
        nodes, zero = density.nodes, density.nodes == 0
        if name == "gauss_newton":
            eps = torch.finfo(torch.promote_types(self.problem.dtype, torch.float32)).eps
            # as in Spectrum
            rounded = len(nodes) if self.exact is not None else 10 if density.num_probes == 0 else 1
            noise, sizes = eps * rounded * float(nodes.abs().max()), nodes.abs()
            zero = nodes <= max(noise, -float(nodes.min())) if self.is_convex else sizes <= noise
        if bool(zero.all()):
            return None
        known = zero & (density.probes < 0)
        cleaned = replace(density, nodes=torch.where(zero, 0.0, nodes))
        return cleaned, float(density.weights[known].sum()) if bool(known.any()) else math.nan


def identity(found: Findings, options: Options) -> dict[str, Label]:
    """What makes this computation the one whose finished stages may be taken: its problem and its options."""
    groups, test = options.groups, found.test and found.test.problem
    of_test = {**marks_of(test, "test data"), "test loss function": described(test.loss_function)} if test else {}
    return {
        "job": "analysis",
        **identity_of(found.problem, found.loss),
        "test data": None,
        **of_test,
        **options._asdict(),
        "groups": "" if groups is None else digest([groups]),
    }

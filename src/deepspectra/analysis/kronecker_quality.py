"""How well Kronecker-factored approximations stand for the Gauss-Newton matrix, layer by layer."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from deepspectra.algorithms.dense_spectrum import of_all
from deepspectra.algorithms.density import density
from deepspectra.algorithms.eigenpairs import eigenpairs
from deepspectra.algorithms.overlap import overlap_curve
from deepspectra.analysis.layer_blocks import (
    SMALL,
    Blocks,
    dense_spectrum,
    inner_product,
    norm_of,
    squared_distance,
)
from deepspectra.argument_checks import LayerProgress, announced
from deepspectra.dataframes import text_table
from deepspectra.errors import FallbackWarning, LossError, MemoryBudgetError, OptionError
from deepspectra.kfac.exact_blocks import ExactBlock
from deepspectra.kfac.kronecker import KINDS
from deepspectra.kfac.operators import Block, KroneckerSum
from deepspectra.operators.base import Operator
from deepspectra.problem.finished_stages import FinishedStages
from deepspectra.problem.problem import Problem
from deepspectra.quadrature import Density
from deepspectra.results import ByLayer, Provenance, origin
from deepspectra.rows.captures import rows_an_example
from deepspectra.rows.gradients import check_labelled

NUM_PROBES, NUM_STEPS = 2, 64  # of spectra that are not found densely
RESOLVED = 100  # times the dtype's rounding, from which ‖G − K‖²/‖G‖² is more than rounding
SPECTRAL_RTOL = 1e-2  # of the norm of the difference


@dataclass(frozen=True)
class Fit:
    """One approximation K of one layer's block of G.

    Attributes:
        frobenius: ‖G − K‖_F / ‖G‖_F; not resolved below ten times the root of the dtype's rounding.
        cosine: ⟨G, K⟩ / (‖G‖_F ‖K‖_F).
        spectral: ‖G − K‖₂ / ‖G‖₂.
        decades: the Wasserstein-1 distance between the spectra in log10 λ, an average over the eigenvalues above
            the floor (of G or of K, whichever has more).
        overlaps: (ks,) ‖UᵀV‖²_F / k of the top-k eigenspaces U of G and V of K.
        trace: tr K / tr G.
    """

    frobenius: float
    cosine: float
    spectral: float
    decades: float
    overlaps: Tensor
    trace: float


@dataclass(frozen=True)
class LayerFits:
    """The approximations of one layer.

    Attributes:
        name: of the layer.
        shape: (groups, outputs, inputs), the last input being the bias if there is one.
        largest: ‖G‖₂ of the layer's block.
        norm: ‖G‖_F.
        ks: sizes of the compared eigenspaces.
        baseline: (ks,) k/n, the overlap of random subspaces.
        fits: kind → how well it does.
        exact_spectrum: the spectrum of G's block is exact, and not from random probes.
    """

    name: str
    shape: tuple[int, int, int]
    largest: float
    norm: float
    ks: tuple[int, ...]
    baseline: Tensor
    fits: Mapping[str, Fit]
    exact_spectrum: bool

    @property
    def num_parameters(self) -> int:
        """Of the block, n."""
        groups, outputs, inputs = self.shape
        return groups * outputs * inputs


@dataclass(frozen=True, repr=False)
class KroneckerQuality(ByLayer[LayerFits]):
    """The approximations of every block that is a matrix and not zero; vectors have exact blocks.

    Attributes:
        kinds: the approximations.
        floor: eigenvalues below this times ‖G‖₂ of a layer count as equal to it, in `Fit.decades`.
    """

    kinds: tuple[str, ...]
    floor: float

    def __str__(self) -> str:
        ks = max((layer.ks for layer in self.values()), key=len, default=())
        head = ("layer", "", "‖G−K‖_F", "cosine", "‖G−K‖₂", "tr K/tr G", "decades", *(f"top {k}" for k in ks))
        rows: list[list[float | str]] = []
        for layer in self.values():
            for kind, fit in layer.fits.items():
                name = layer.name[-22:] if kind == self.kinds[0] else ""
                errors = f"{fit.frobenius:.1%}", fit.cosine, f"{fit.spectral:.1%}"
                rows.append([name, kind, *errors, fit.trace, fit.decades, *fit.overlaps.tolist()])
            rows.append(["", "random", *[""] * 5, *layer.baseline.tolist()])
        return text_table(
            head,
            rows,
            "errors relative to G's block; decades: mean distance of log10 λ above "
            f"{self.floor:g} ‖G‖₂; top k: overlap of eigenspaces; {self.seconds:.3g} s",
        )


def kronecker_quality(
    problem: Problem,
    kinds: Sequence[str] | None = None,
    *,
    sharing: str = "expand",
    ks: Sequence[int] = (1, 2, 5, 10, 20),
    floor: float = 1e-5,
    rtol: float = 1e-3,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    progress: LayerProgress | None = None,
) -> KroneckerQuality:
    """How far Kronecker-factored approximations are from G, for every layer.

    Frobenius norms and inner products are exact sums over pairs of examples, ‖Σ M ⊗ xxᵀ‖² =
    Σ tr(M M') (xᵀx')². Spectral norms and eigenspaces come from converged eigenpairs. Spectra are exact up to
    3,000 eigenvalues that differ from zero, and for products of factors; others from random probes.

    Args:
        problem: with a loss that is convex in the outputs.
        kinds: among "kfac", "ekfac", "cfac" and "optimal" (of one product); by default the first three, without
            "cfac" where examples have no class labels, or several.
        sharing: as in `kronecker`.
        ks: sizes of the eigenspaces to compare, ascending; those beyond a layer's rank are left out.
        floor: relative to ‖G‖₂, where logarithms of eigenvalues stop.
        rtol: of the compared eigenpairs.
        dtype: to compute in; the problem's own by default.
        seed: of random vectors.
        progress: called with (layers done, layers in all, name of the next).

    Raises:
        OptionError: an unknown kind, or ks not ascending from 1 or more.
        LossError, CurvatureError: as for `kronecker`.
        MemoryBudgetError: features and errors do not fit memory, or of no layer its block: one with shared weights,
            too many parameters and too many rows. Such a layer among others is left out, with a FallbackWarning.

    Cost: the approximations; then for each layer about (N (C − 1))²/2 inner products of errors, eigenpairs of G,
        of G − K and of "cfac".

    Source: Papyan 2020, JMLR 21:252, section 7, and Wu et al. 2020, arXiv 2010.04261, section 3, compare spectra
    and eigenspaces by eye; errors are this library's.
    """
    problem = problem if dtype is None else problem.to(dtype)
    kinds = _default_kinds(problem) if kinds is None else kinds
    found = quality_of(problem, kinds, _Settings(sharing, tuple(ks), floor, rtol, seed), progress=progress)
    for name, reason in found.left_out.items():
        warnings.warn(f"kronecker_quality leaves out {name}: {reason}", FallbackWarning, stacklevel=2)
    return found


class _Settings(NamedTuple):
    """As `kronecker_quality` explains them."""

    sharing: str = "expand"
    ks: tuple[int, ...] = (1, 2, 5, 10, 20)
    floor: float = 1e-5
    rtol: float = 1e-3
    seed: int = 0


DEFAULT = _Settings()


def quality_of(
    problem: Problem,
    kinds: Sequence[str],
    chosen: _Settings = DEFAULT,
    *,
    progress: LayerProgress | None = None,
    stages: FinishedStages | None = None,
) -> KroneckerQuality:
    """As `kronecker_quality`, which goes on behind the layers that were finished before."""
    began, kept = time.perf_counter(), stages or FinishedStages()
    ks = chosen.ks
    if not kinds or not set(kinds) <= set(KINDS):
        raise OptionError(f"kinds={tuple(kinds)}: name some of {', '.join(KINDS)}.")
    if not ks or min(ks) < 1 or list(ks) != sorted(set(ks)):
        raise OptionError(f"ks={tuple(ks)} must ascend from 1 or more.")
    blocks = Blocks(problem, kinds, chosen.sharing)
    found, left_out, refusal = {}, {}, None
    for name, exact in announced(blocks, progress, len(blocks.names)):
        approximations = {kind: operator.blocks[name] for kind, operator in blocks.approximations.items()}

        def fits(exact: ExactBlock = exact, those: Mapping[str, Block] = approximations) -> LayerFits:
            compared = _Comparison(exact, problem.memory, max(ks), chosen.rtol, chosen.seed)
            return compared.fits(those, ks, chosen.floor)

        try:
            found[name] = kept.run(f"Kronecker factors of block {blocks.names.index(name)}", fits)
        except MemoryBudgetError as error:  # hours of other layers are not lost for it
            left_out[name], refusal = str(error), error
    if refusal is not None and not found:
        raise refusal
    origins = origin(began, blocks.factors, seed=chosen.seed)
    return KroneckerQuality(found, tuple(kinds), chosen.floor, left_out=left_out, **origins)


def _decades(one: Density, other: Density, floor: float) -> float:
    """Wasserstein-1 distance of log10 λ, per eigenvalue above the floor."""
    from scipy.stats import wasserstein_distance  # noqa: PLC0415  (SciPy's import takes a while)

    above = max(float(some.weights[some.nodes > floor].sum()) for some in (one, other))
    logs = [some.nodes.clamp_min(floor).log10().numpy() for some in (one, other)]
    distance = wasserstein_distance(*logs, one.weights.numpy(), other.weights.numpy())
    return float(distance) / above if above else 0.0


def _spectrum(operator: Operator, values: Tensor | None, seed: int) -> Density:
    """From all eigenvalues that differ from zero, or by stochastic Lanczos quadrature."""
    if values is not None:
        return of_all(values.double().cpu(), Provenance.of(operator))
    return density(operator, NUM_PROBES, min(NUM_STEPS, operator.shape[0]), seed=seed)


class _Comparison:
    """G's block of one place: its norm, spectrum and largest pairs, and how approximations compare."""

    def __init__(self, exact: ExactBlock, memory: int, num: int, rtol: float, seed: int) -> None:
        self.exact, self.rtol, self.seed = exact, rtol, seed
        size = exact.shape[0]
        self.norm = norm_of(exact, memory)
        found = dense_spectrum(exact, num)
        every: Tensor | None = None
        if found is not None:
            every, self.values, self.vectors = found
        else:
            pairs = eigenpairs(exact, min(num, size, exact.num_rows), rtol=rtol, seed=seed)
            live = pairs.values > float(pairs.values[0]) * torch.finfo(exact.dtype).eps * size
            self.values, self.vectors = pairs.values[live], pairs.vectors[:, live.to(exact.device)]
        self.spectrum = _spectrum(exact, every, seed)

    def fits(self, blocks: Mapping[str, Block], sizes: Sequence[int], floor: float) -> LayerFits:
        """Of all kinds."""
        size = self.exact.shape[0]
        ks = tuple(k for k in sizes if k <= len(self.values))
        return LayerFits(
            name=self.exact.place.name,
            shape=self.exact.place.shape,
            largest=float(self.values[0]),
            norm=self.norm,
            ks=ks,
            baseline=torch.tensor([k / size for k in ks], dtype=torch.float64),
            fits={kind: self._fit(block, ks, floor) for kind, block in blocks.items()},
            exact_spectrum=not self.spectrum.num_probes,
        )

    def _fit(self, block: Block, ks: tuple[int, ...], floor: float) -> Fit:
        largest = float(self.values[0])
        product = inner_product(self.exact, block)
        squared = squared_distance(self.norm, block, product)
        furthest = squared**0.5  # a bound, where the difference is rounding
        if squared > RESOLVED * torch.finfo(self.exact.dtype).eps * self.norm**2:
            pairs = eigenpairs(self.exact - block, 1, "magnitude", rtol=SPECTRAL_RTOL, seed=self.seed)
            furthest = float(pairs.values.abs()[0])
        num = max(ks, default=1)
        if isinstance(block, KroneckerSum) and len(block.left) > 1:  # eigenvectors in no closed form
            spectrum = _spectrum(block, None if block.shape[0] > SMALL else block.eigenvalues(), self.seed)
            vectors = eigenpairs(block, num, rtol=self.rtol, seed=self.seed).vectors
        else:
            spectrum = _spectrum(block, block.eigenvalues(), self.seed)
            _, vectors = block.decomposed.top(num)
        return Fit(
            frobenius=squared**0.5 / self.norm,
            cosine=product / (self.norm * block.norm),
            spectral=furthest / largest,
            decades=_decades(self.spectrum, spectrum, floor * largest),
            overlaps=overlap_curve(self.vectors, vectors)[torch.tensor(ks, dtype=torch.long) - 1],
            trace=block.trace / self.exact.trace,
        )


def _default_kinds(problem: Problem) -> tuple[str, ...]:
    """Those that the loss and its targets allow. Cost: one batch forward."""
    try:
        check_labelled(problem)
    except LossError:
        return ("kfac", "ekfac")
    return ("kfac", "ekfac", "cfac") if rows_an_example(problem) == 1 else ("kfac", "ekfac")

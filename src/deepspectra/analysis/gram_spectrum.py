"""G from inner products of gradients: the exact spectrum of few examples, and products with their matrix for many."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from deepspectra.algorithms.dense_spectrum import of_all
from deepspectra.algorithms.density import density
from deepspectra.argument_checks import Progress, seeded
from deepspectra.confidence import standard_error
from deepspectra.dataframes import text_table
from deepspectra.operators.base import Operator
from deepspectra.operators.parts import Decomposition
from deepspectra.problem.memory_budget import share
from deepspectra.problem.problem import Problem
from deepspectra.quadrature import Density
from deepspectra.results import Eigenpairs, Provenance, Result, Separation, origin
from deepspectra.rows.averages import Averages
from deepspectra.rows.captures import Complement, captures_of
from deepspectra.rows.features_and_errors import error_averages
from deepspectra.rows.gradients import GradientRows
from deepspectra.rows.held_rows import HeldRows
from deepspectra.rows.parameter_uses import Convolution, Lookup, Matrix, Use, by_stretch
from deepspectra.rows.random_combinations import DrawnCaptures
from deepspectra.rows.spectrum import Spectrum

MARGIN = 1.25  # an outlier is at least so many times the bulk's edge
NUM_CHECKS = 2  # random sums by which pairs are checked
MOST_SCALARS = 16  # gradients of an example that are squared; of more classes, as many random sums
INDEPENDENT = 0.5  # least eigenvalue of the inner products of unit vectors that are taken to be eigenvectors
FORMED_BYTES = 2**28  # of gradients that are formed at a time


@dataclass(frozen=True, repr=False)
class GramSpectrum(Result):
    """All non-zero eigenvalues of G and of its parts, and what each eigenvector owes to which part.

    Attributes:
        values: (R,) of G, descending, float64; R = N (C − 1), or P if that is less. The other P − R are zero.
        parts: name → non-zero eigenvalues of the part, descending.
        part_names: the parts, in the order of `shares`.
        shares: (R, parts) u_jᵀ B u_j / λ_j, rows sum to 1; NaN where λ_j is zero up to rounding.

    Source: the Gram matrix has the spectrum of the second moment; Papyan 2019, arXiv 1901.08244, computes
    densities only.
    """

    values: Tensor
    parts: Mapping[str, Tensor]
    part_names: tuple[str, ...]
    shares: Tensor
    _averages: Averages = field(repr=False)

    @property
    def traces(self) -> Tensor:
        """(parts,) the traces of the parts; they sum to that of G.

        Squared norms of the averages, and what these leave for "within", so that small eigenvalues count which
        `parts` cannot tell from rounding.
        """
        squares = {name: phi.square().sum() for name, phi in self._averages.items()}
        squares["within"] = (self.values.sum() - self._averages.every.square().sum()).clamp_min(0)
        return torch.stack([squares[name] for name in self.part_names])

    @property
    def stable_rank(self) -> float:
        """‖G‖_F² / ‖G‖₂²: how many eigenvalues are of the size of the largest (Rudelson and Vershynin 2007).

        NaN if all are zero.
        """
        return float((self.values / self.values[0]).square().sum())

    @property
    def intrinsic_dimension(self) -> float:
        """Tr G / ‖G‖₂, the stable rank of the rows (Tropp 2015, arXiv 1501.01571, section 7)."""
        return float((self.values / self.values[0]).sum())

    def share_of_top(self, part: str, num: int) -> float:
        """What a part has of the sum of the `num` largest eigenvalues; NaN of a part that is not there."""
        if part not in self.part_names:
            return math.nan
        values, shares = self.values[:num], self.shares[:num, self.part_names.index(part)]
        return float((values * shares).nansum() / values.sum())

    @property
    def bulk_edge(self) -> float:
        """The largest eigenvalue of "within", of what scatter within classes makes by itself; 0 without any."""
        return max(self.parts["within"].tolist(), default=0.0)

    def threshold(self, margin: float = MARGIN) -> float:
        """Above which eigenvalues are outliers: `margin` times the bulk's edge, and more than rounding."""
        rounding = torch.finfo(self.values.dtype).eps * len(self.values) * float(self.values[0])
        return max(margin * self.bulk_edge, rounding)

    @property
    def density(self) -> Density:
        """The spectral density of G, every node an eigenvalue and one node for all the zeros."""
        return of_all(self.values, self.provenance, self.seconds)

    def num_outliers(self, *removed: str, margin: float = MARGIN) -> int:
        """How many eigenvalues are over `margin` times the largest of "within", after parts are subtracted.

        Args:
            removed: parts, as in `knockout` (class takes true with it); none for the outliers of G itself.
            margin: an outlier is at least so many times the bulk's edge.

        Raises:
            OptionError: as `knockout`.
        """
        values = self.knockout(*removed) if removed else self.values
        return int((values > self.threshold(margin)).sum())

    def knockout(self, *removed: str, method: str = "subtraction") -> Tensor:
        """All eigenvalues (R,) of G without parts, descending; the same matrix as that of `attribute` and `regions`.

        Args:
            removed: parts that are taken away: names of `parts`, "means" for all but "within", or "cross" for logit
                and interaction. Class takes true with it, whose means are collinear with the class means. (G without
                class alone is an operator: ``GaussNewton(problem) - decompose(problem)["class"]``.)
            method: "subtraction", G − B, or "projection", (I − QQᵀ) G (I − QQᵀ) with Q a basis of B. "within"
                spans too much to be projected out.

        Raises:
            OptionError: a part that is not there, or another method.

        Cost: the eigenvalues of a dense matrix (R, R).
        """
        return Spectrum(self.values, self._averages).without(removed, method)

    def __str__(self) -> str:
        total = float(self.values.sum())
        largest = [max(self.parts[name].tolist(), default=0.0) for name in self.part_names]
        numbers = zip(self.part_names, self.traces.tolist(), largest, strict=True)
        rows = [
            (name, f"{trace:.4g}", f"{trace / total:.1%}" if total else "–", f"{top:.4g}")
            for name, trace, top in (*numbers, ("G", total, float(self.values[0])))
        ]
        num = len(self.values) if total else 0
        return text_table(
            ("", "trace", "share", "largest"),
            rows,
            f"exact spectrum of {self.provenance.operator}: {num:,} of {self.provenance.size:,} "
            f"eigenvalues are not zero, {self.seconds:.3g} s",
        )


def gram_spectrum(
    problem: Problem,
    *,
    effects: str = "four-way",
    first: str = "class",
    dtype: torch.dtype = torch.float64,
) -> GramSpectrum:
    """All non-zero eigenvalues of G and of its parts at any number of parameters, for up to about 12,000 rows.

    The Gram matrix A Aᵀ of the rows A, G = AᵀA, has G's non-zero eigenvalues, and averages over classes are
    projections of its indices. It is summed over layers from features and errors, so that no Jacobian is stored.

    Args:
        problem: one with cross-entropy and class labels.
        effects: "four-way" or "two-way", as in `decompose`.
        first: as in `decompose`.
        dtype: to compute in; float64 whatever the problem's own, unless given.

    Raises:
        LossError: the loss is not the cross-entropy of class labels.
        MemoryBudgetError: R × R numbers, R = N (C − 1), do not fit memory.
        CurvatureError: features and errors cannot be told apart by example.

    Cost: C − 1 backward passes without weight gradients; inner products of R gradients, R²/2 times the cheaper
    of a layer's size and T (T/C + 1) d_out for T positions; a dense eigendecomposition (R, R).
    """
    began = time.perf_counter()
    parts = Decomposition(HeldRows(problem.to(dtype)), effects, first)
    return spectrum_of(gradient_spectrum(parts), began, parts.problem)


def spectrum_of(
    spectrum: Spectrum, began: float, source: object, name: str = "", *, size: int | None = None
) -> GramSpectrum:
    """All of it as a result, with the `origin` of the rest."""
    names = spectrum.averages.parts
    found = {name: spectrum.part(name) for name in names}
    values = spectrum.values.cpu()
    forms = torch.stack([forms.cpu() for _, forms in found.values()], 1)
    return GramSpectrum(
        values=values,
        parts={name: values.cpu() for name, (values, _) in found.items()},
        part_names=names,
        shares=forms / values.where(values > spectrum.tiny, torch.nan)[:, None],
        **origin(began, source, name, size=size),
        _averages=spectrum.averages.map(Tensor.cpu),
    )


def gradient_spectrum(parts: Decomposition) -> Spectrum:
    """That of G, of held rows."""
    averages = error_averages(parts.held, parts.projections, tuple(parts))
    eps, size = torch.finfo(parts.problem.dtype).eps, parts.problem.num_parameters
    return Spectrum.of_gram(parts.held.gram(), averages.at(parts.held.live), size, eps)


def gradient_pairs(spectrum: Spectrum, parts: Decomposition, num: int, began: float, seed: int = 0) -> Eigenpairs:
    """The largest eigenpairs u = Aᵀv/√λ of G, as many as are not zero.

    Residual norms are bounds from above, by A u against √λ v for two random sums of the pairs.

    Cost: a third of a gradient a pair.
    """
    assert spectrum.vectors is not None
    num = min(num, int((spectrum.values > spectrum.tiny).sum()))
    rows, values, v = parts.held, spectrum.values[:num], spectrum.vectors[:, :num]
    vectors, missed = rows.products.zeros(0).T, values.new_zeros(())
    if num:
        vectors = rows.transpose_reduced(v / values.sqrt())
        signs = torch.randint(0, 2, (num, NUM_CHECKS), generator=seeded(seed)).to(v) * 2 - 1
        pushed = rows.apply_reduced(vectors @ signs.to(vectors)).to(v)
        missed = (pushed - (v * values.sqrt()) @ signs).square().sum(0).mean().sqrt() * values[0].sqrt()
    return Eigenpairs(
        values=values.cpu(),
        vectors=vectors,
        residual_norms=missed.cpu().expand(num).clone(),
        converged=True,
        num_products=0,
        which="largest",
        rtol=float(missed / values.min()) if num else 0.0,
        separation=_separation(spectrum.values.cpu(), num, 3 * float(missed)),
        **origin(began, parts.problem),
    )


def _separation(values: Tensor, num: int, blurred: float) -> Separation:
    """How far the first of all non-zero eigenvalues lie from the others, and from zero."""
    steps = (-torch.cat([values, values.new_zeros(1)]).diff() - blurred).clamp_min(0)  # from each to the next
    above = torch.cat([values.new_full((1,), math.inf), steps])[: len(steps)]
    gaps = torch.minimum(above, steps)[:num].double()
    gap = float(steps[num - 1]) if num else math.inf
    return Separation(gaps, gap, float(values.abs().max()) if len(values) else 0.0, complete=True)


# -- too many rows to form the Gram matrix: products with it ----------------------------------------------------


class RowGram(Operator):
    """A Aᵀ (R, R) of the R = N (C − 1) gradients of the examples that count, by products.

    It has the eigenvalues of G but for P − R zeros, of which nothing is then spent or seen.

    Cost: a product takes one with A and one with Aᵀ, about as much as one with G.
    """

    def __init__(self, rows: GradientRows) -> None:
        (self.counted,) = (rows.curvature > 0).nonzero(as_tuple=True)
        self.rows = rows
        self.complement = Complement(rows.probabilities)
        problem = rows.problem
        size = len(self.counted) * (rows.weights.shape[1] - 1)
        dtype = torch.promote_types(problem.dtype, torch.float32)
        super().__init__(size, dtype=dtype, device=problem.device, name="Gram matrix of the gradients")
        self.memory, self.group = share(problem.memory, "basis"), problem.batches.group

    def reduced(self, pushed: Tensor) -> Tensor:
        """Rows A V (N, C, K) in the coordinates of this matrix: (R, K)."""
        return self.complement.reduce(pushed)[self.counted].flatten(0, 1)

    def _apply(self, block: Tensor) -> Tensor:
        num_rows, classes = self.rows.weights.shape
        spread = block.new_zeros(num_rows, classes - 1, block.shape[1])
        spread[self.counted] = block.view(len(self.counted), classes - 1, -1)
        return self.reduced(self.rows.apply(self.rows.transpose(self.complement.expand(spread))))


def nonzero_density(
    gram: RowGram,
    pairs: Eigenpairs,
    vectors: Tensor,
    num_probes: int,
    num_steps: int,
    seed: int = 0,
    progress: Progress | None = None,
) -> Density:
    """The `density` of G from random vectors that see its R ≤ P non-zero eigenvalues; one node for the P − R zeros.

    Its eigenpairs (λ, u) are known, and what their vectors are in the rows, (R, K) A u / √λ.
    """
    size, num_rows = gram.rows.problem.num_parameters, gram.shape[0]
    num = _num_independent(vectors)
    # ‖K v − λ v‖ = ‖A (G u − λ u)‖/√λ is at most √(λ₁/λ) times G's own.
    known = replace(
        pairs,
        values=pairs.values[:num],
        residual_norms=pairs.residual_norms[:num] * (pairs.values[0] / pairs.values[:num]).sqrt(),
        vectors=vectors[:, :num],
        separation=None,
        provenance=Provenance.of(gram, seed=seed),
    )
    found = density(gram, num_probes, num_steps, known if num else None, seed, progress)
    zero = found.nodes.new_zeros(1)
    share = num_rows / size
    return replace(
        found,
        nodes=torch.cat([found.nodes, zero]),
        weights=torch.cat([found.weights * share, zero + (1 - share)]),
        probes=torch.cat([found.probes, found.probes.new_full((1,), -1)]),
        residuals=torch.cat([found.residuals, zero]),
        provenance=Provenance.of(gram.rows.problem, seed=seed),
    )


def _num_independent(vectors: Tensor) -> int:
    """How many unit vectors (R, K) are far from dependent; those of eigenvalues that are nearly zero need not be."""
    gram = (vectors.mT @ vectors).double()
    num = 0
    while num < len(gram) and float(torch.linalg.eigvalsh(gram[: num + 1, : num + 1])[0]) > INDEPENDENT:
        num += 1
    return num


def gradient_trace(problem: Problem, seed: int = 0) -> tuple[float, float]:
    """Tr G and its standard error, 0 for up to 17 classes: the sum of all squared gradients of single examples.

    tr G = Σ_i tr(J_iᵀ F_i F_iᵀ J_i) = Σ_i Σ_j |J_iᵀ f_ij|², F_i F_iᵀ the curvature of the loss of example i; of more
    classes, 16 random sums F_i s estimate it, each example's independently (`DrawnCaptures`).

    Raises:
        CurvatureError: features and errors cannot be told apart by example.
        LossError: not the cross-entropy of class labels.

    Cost: a forward pass and 16 backward passes at most.
    """
    num = problem.num_classes - 1
    is_drawn = num > MOST_SCALARS
    captures = DrawnCaptures(problem, MOST_SCALARS, seed) if is_drawn else captures_of(problem)
    # of each scalar of all examples
    total = torch.zeros(min(num, MOST_SCALARS), dtype=torch.float64, device=problem.device)
    with problem.batches.group.summing(total):
        for batch in captures.shares():
            for uses in by_stretch(batch.uses).values():
                squares = _squares(uses)
                total += squares.view(len(squares), -1, len(total)).sum((0, 1), dtype=torch.float64)
    error = standard_error(MOST_SCALARS * total) if is_drawn else 0.0
    return float(total.sum()), float(error)


def _squares(uses: list[Use]) -> Tensor:
    """|gradient|² of each example and scalar (B, J), of the gradients Σ_t e_t h_tᵀ to one stretch.

    Of a single use Σ_{t,s} (h_tᵀh_s)(e_tᵀe_s) where that is cheaper than gradients.
    """
    use = uses[0]
    if len(uses) == 1 and isinstance(use, (Matrix, Lookup)) and _prefers_inner(use):
        features, errors = use.factors()
        if isinstance(use, Lookup):
            similar = (features[:, :, None] == features[:, None, :]).to(errors)
            errors = errors.mT
        else:
            similar = features @ features.mT
        return ((errors.mT @ errors) * similar[:, None]).sum((2, 3))
    num_rows = use.slice.shape[0] if use.slice.shape else 1
    each = use.errors.shape[0] * use.errors.shape[1] * max(1, use.slice.numel // num_rows)
    width = max(1, FORMED_BYTES // (each * use.errors.element_size()))
    total = use.errors.new_zeros(use.errors.shape[:2])
    for start in range(0, num_rows, width):
        chunk = slice(start, min(start + width, num_rows))
        total += functools.reduce(torch.add, (one.formed(chunk) for one in uses)).square().sum(2)
    return total


def _prefers_inner(use: Matrix | Lookup) -> bool:
    """Whether inner products of features and of errors take fewer multiplications than gradients."""
    if isinstance(use, Lookup):
        return True
    if isinstance(use, Convolution) and use.groups > 1:
        return False
    outputs, inputs = use.size
    scalars, positions = use.errors.shape[1], use.errors.shape[3]
    return positions * (inputs / scalars + outputs) <= inputs * outputs

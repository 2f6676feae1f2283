"""What products with the Gram matrix A Aᵀ of the gradients, G = AᵀA, say of G where it is too large to be formed."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
from torch import Tensor

from deepspectra.algorithms.density import density
from deepspectra.argument_checks import Progress
from deepspectra.confidence import standard_error
from deepspectra.operators.base import Operator
from deepspectra.problem.problem import Problem
from deepspectra.quadrature import Density
from deepspectra.results import Eigenpairs, Provenance
from deepspectra.rows.captures import Complement, captures_of
from deepspectra.rows.gradients import GradientRows
from deepspectra.rows.parameter_uses import Convolution, Lookup, Matrix, Use, by_stretch
from deepspectra.rows.random_scalars import DrawnCaptures

MOST_SCALARS = 16  # gradients of an example that are squared; of more classes, as many random sums
INDEPENDENT = 0.5  # least eigenvalue of the inner products of unit vectors that are taken to be eigenvectors
FORMED_BYTES = 2**28  # of gradients that are formed at a time


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
        self.memory = problem.memory // 4

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
    total = torch.zeros(min(num, MOST_SCALARS), dtype=torch.float64)  # of each scalar of all examples
    for batch in captures.batches():
        for uses in by_stretch(batch.uses).values():
            squares = _squares(uses)
            total += squares.view(len(squares), -1, len(total)).sum((0, 1), dtype=torch.float64).cpu()
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

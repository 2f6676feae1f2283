"""Kronecker-factored approximations of the Gauss-Newton matrix, block-diagonal over layers."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from deepspectra.argument_checks import check_count, check_seed
from deepspectra.errors import CurvatureError, LossError, OptionError
from deepspectra.kfac.blocks import Place, places
from deepspectra.kfac.exact_block import ExactBlock
from deepspectra.kfac.moments import LARGEST_VECTOR, Moments, Squares, num_replicates
from deepspectra.kfac.nearest import nearest_sum
from deepspectra.kfac.operators import Block, KroneckerSum, Rotated, check_damping
from deepspectra.operators.base import Operator
from deepspectra.problem.cross_entropy import CrossEntropy
from deepspectra.problem.memory_budget import refuse_beyond
from deepspectra.problem.problem import Problem, check_problem
from deepspectra.rows.captures import Captured, Captures
from deepspectra.rows.random_scalars import all_or_drawn

KINDS = ("kfac", "ekfac", "cfac", "optimal")
SHARINGS = ("expand", "reduce")


class Kronecker(Operator):
    """A block-diagonal operator on the parameters of a problem, with Kronecker-factored blocks.

    A block is a weight with its bias (the last column of inputs), or a vector such as a scale of normalised
    features. Parameters without effect on the outputs are in no block.

    Attributes:
        kind: "kfac", "ekfac", "cfac" or "optimal".
        sharing: "expand" or "reduce".
        blocks: name of a layer or parameter → its block, in the block's own order.
        places: name → which parameters the block is of.
        standard_errors: name → ‖·‖_F of what the draws leave open of the block, relative to its own: its root mean
            square error against the block that all scalars would give ("ekfac": in the eigenvectors that it has);
            0 if nothing was drawn, NaN of a single draw. From the scatter of at most 8 sets of draws: with fewer than
            8 draws it is itself rough.
        samples: how many scalars of each example were drawn; 0 if all are there.
        index: name → (n,) where the block's numbers lie in the vector of all parameters.
    """

    def __init__(
        self,
        blocks: Mapping[str, Block],
        index: Mapping[str, Tensor],
        places: Mapping[str, Place],
        *,
        size: int,
        kind: str,
        sharing: str,
        name: str,
    ) -> None:
        first = next(iter(blocks.values()))
        super().__init__(size, dtype=first.dtype, device=first.device, name=name)
        self.blocks = MappingProxyType(dict(blocks))
        self.index = MappingProxyType(dict(index))
        self.places = MappingProxyType(dict(places))
        self.kind = kind
        self.sharing = sharing
        self.beyond = 0.0  # what multiplies parameters of no block
        self.samples = 0  # and what they leave open, where blocks come from draws
        self.standard_errors: Mapping[str, float] = MappingProxyType({})

    def _apply(self, block: Tensor) -> Tensor:
        total = block * self.beyond
        for name, operator in self.blocks.items():
            index = self.index[name]
            total[index] = operator @ block[index]
        return total

    @property
    def trace(self) -> float:
        """Exact."""
        return sum(block.trace for block in self.blocks.values()) + self.beyond * self._num_beyond

    @property
    def norm(self) -> float:
        """‖·‖_F, exact."""
        squares = sum(block.norm**2 for block in self.blocks.values()) + self.beyond**2 * self._num_beyond
        return float(squares**0.5)

    def eigenvalues(self) -> Tensor:
        """All P, descending, float64.

        Raises:
            MemoryBudgetError: "cfac" with a block of more than 4,096 rows.

        Cost: eigenvalues of each factor, once.
        """
        found = [block.eigenvalues() for block in self.blocks.values()]
        rest = torch.full((self._num_beyond,), self.beyond, dtype=torch.float64, device=self.device)
        return torch.cat([*found, rest]).sort(descending=True).values

    def inverse(self, damping: float) -> Kronecker:
        """(K + δ I)⁻¹ exactly, with the eigenvectors of the factors.

        Args:
            damping: δ > 0.

        Raises:
            OptionError: damping is not positive.
            CurvatureError: "cfac" with more than one class: a sum of products has no inverse in closed form.
        """
        inverse = copy.copy(self)
        inverse.beyond = 1 / (self.beyond + check_damping(damping))
        blocks = {name: block.inverse(damping) for name, block in self.blocks.items()}
        inverse.blocks, inverse.name = MappingProxyType(blocks), f"({self.name} + {damping:g} I)⁻¹"
        inverse.samples, inverse.standard_errors = 0, MappingProxyType({})
        return inverse

    @property
    def _num_beyond(self) -> int:
        return self.shape[0] - sum(block.shape[0] for block in self.blocks.values())


def kronecker(
    problem: Problem,
    kind: str = "kfac",
    *,
    sharing: str = "expand",
    rank: int = 1,
    samples: int | None = None,
    seed: int = 0,
) -> Kronecker:
    """A Kronecker-factored approximation of the Gauss-Newton matrix G, an operator block-diagonal over layers.

    With features h and errors e of G's exact root (all classes, unless `samples` draws), weights ω_i of examples, and
    W = Σ ω: S = Σ e eᵀ over examples and their scalars, A = Σ ω_i h hᵀ / W, so that S ⊗ A has the scale of G.

    - "kfac": S ⊗ A. Exact where features and errors are uncorrelated.
    - "ekfac": the eigenvectors of S ⊗ A with the diagonal Σ (uᵀ g v)², G's own: the nearest of all such matrices.
      Where eigenvalues of a factor coincide, its eigenvectors are one choice among many.
    - "cfac": Σ_c S_c ⊗ A_c with S_c and A_c of the examples of class c, Σ_c S_c = S. Exact where features and
      errors are uncorrelated within each class.
    - "optimal": of all sums of `rank` products with symmetric factors the nearest to G in the Frobenius norm.

    Weights and biases of a layer make one block. A vector of parameters that no matrix goes with (scales of
    normalised features, biases alone) has its exact block up to 4,096 numbers, and of longer ones the diagonal.
    A table of embeddings has a diagonal A, of frequencies. Parameters used several times count as shared.

    Args:
        problem: with a loss that is convex in the outputs.
        kind: "kfac", "ekfac", "cfac" or "optimal".
        sharing: of weights over T positions (pixels, tokens, repeated uses). "expand": positions count as
            examples, A = Σ h_t h_tᵀ / T and S = Σ e_t e_tᵀ. "reduce": one position with the mean of features
            and the sum of errors. Where rows are tokens and positions match them, a position counts as its row.
            "optimal" only starts from it.
        rank: number of products, of "optimal".
        samples: scalars of each example that are backpropagated: random combinations F ε of the columns of the root
            F of its curvature, all its rows and outputs together, with signs ε. S, and the diagonal of "ekfac", are
            then unbiased; how far off they are is in `Kronecker.standard_errors`, which fall with √samples and with
            the number of examples. 0, or as many as there are scalars: every one, nothing drawn. By default 0 up to
            512 scalars an example, and beyond, as of images or sequences that are put out, 16 with a FallbackWarning.
            Not for "optimal".
        seed: of the draws.

    Raises:
        OptionError: another kind or sharing, a rank that is not for "optimal", or samples that are.
        LossError: the loss is not convex, or rows of a batch interact in it; or for "cfac", not the cross-entropy of
            one class label an example.
        CurvatureError: features and errors cannot be told apart by example, or a parameter is used in two ways,
            such as an embedding tied to the output layer.
        MemoryBudgetError: the factors do not fit memory.

    Cost: a forward and C − 1 backward passes without weight gradients (C for other losses; `samples` if drawn, twice
    for "ekfac"), and second moments:
    about 6 gradients with ten classes on a perceptron or a LeNet; "cfac" 6–8, "ekfac" 10–11 with its
    eigenvectors, "optimal" several times. Memory: the factors, and one batch of features and errors; of "ekfac"
    those of all the data if they fit, or else a second pass; of "optimal" those of a layer.

    Source: Martens and Grosse 2015, arXiv 1503.05671 (KFAC); Grosse and Martens 2016, arXiv 1602.01407
    (convolutions); Eschenhagen et al. 2023, arXiv 2311.00636 (expand, reduce); George et al. 2018, arXiv
    1806.03884 (EKFAC); Papyan 2020, JMLR 21:252, definition 7.2 (CFAC); Van Loan and Pitsianis 1993 (the nearest
    sum). Departures: (1) the scalars of every token are backpropagated by themselves, unless drawn; (2) weights of
    classes and ignored rows count in A as in the loss; (3) draws are signs, for any convex loss and of less variance
    than labels drawn by the model's probabilities, as published for KFAC.
    """
    check_problem(problem)
    check_seed(seed)
    if samples is not None:
        check_count("samples", samples, 0)
        if samples and kind == "optimal":
            raise OptionError(
                "samples= draws for 'kfac', 'ekfac' and 'cfac'; 'optimal' would fit the draws. Use 0."
            )
    captures = all_or_drawn(problem, 0 if kind == "optimal" else samples, seed)
    return all_from(captures, (kind,), sharing, rank)[kind]


def all_from(
    captures: Captures, kinds: Sequence[str], sharing: str = "expand", rank: int = 1
) -> dict[str, Kronecker]:
    """`kronecker` of several kinds, from features and errors that may be held already.

    They are made of the same second moments: the data are gone through once, and once more for "ekfac".
    """
    problem = captures.problem
    _check(problem, kinds, sharing, rank)
    if "ekfac" in kinds and not captures.samples:
        captures.hold()  # it goes through them twice; draws it needs anew, see `_corrected`
    by_class = "cfac" in kinds
    moments = _moments(captures, sharing, by_class=by_class)
    made = {}
    if by_class:
        made["cfac"] = _made(captures, "cfac", moments, _products(problem, moments, "CFAC"), rank)
        moments = {name: moment.together() for name, moment in moments.items()}
    if others := [kind for kind in kinds if kind != "cfac"]:
        products = _products(problem, moments, "KFAC")  # and their eigenvectors, found once
        made |= {kind: _made(captures, kind, moments, products, rank) for kind in others}
    return {kind: made[kind] for kind in kinds}


def _products(problem: Problem, moments: Mapping[str, Moments], label: str) -> dict[str, Block]:
    """S ⊗ A, or the sum over classes, of every place."""
    dtype = torch.promote_types(problem.dtype, torch.float32)
    return {
        name: KroneckerSum(*moment.factors(), dtype, f"{label} of {name}") for name, moment in moments.items()
    }


def _made(
    captures: Captures, kind: str, moments: Mapping[str, Moments], products: dict[str, Block], rank: int
) -> Kronecker:
    """One kind, from second moments and their products."""
    problem, samples = captures.problem, captures.samples
    found = {name: moment.place for name, moment in moments.items()}
    variances = {name: moment.variance() for name, moment in moments.items()}
    blocks = dict(products)
    if kind == "ekfac":
        corrected, of_diagonals = _corrected(captures, found, products)
        blocks |= corrected
        variances |= of_diagonals
    if kind == "optimal":
        blocks |= _nearest(captures, found, products, rank)
    ends = itertools.accumulate((value.numel() for value in problem.parameters.values()), initial=0)
    starts = dict(zip(problem.parameters, ends, strict=False))
    operator = Kronecker(
        blocks,
        {name: place.index(starts).to(problem.device) for name, place in found.items()},
        found,
        size=problem.num_parameters,
        kind=kind,
        sharing=next(iter(moments.values())).sharing,
        name=f"{kind.upper()} of {samples} draws" if samples else kind.upper(),
    )
    operator.memory = problem.memory // 4
    operator.samples = samples
    norms = {name: block.norm for name, block in blocks.items()}
    operator.standard_errors = MappingProxyType(
        {name: variances[name] ** 0.5 / norm if norm else 0.0 for name, norm in norms.items()}
    )
    return operator


def _check(problem: Problem, kinds: Sequence[str], sharing: str, rank: int) -> None:
    """Raise for what `kronecker` cannot make of a problem."""
    for kind in kinds:
        if kind not in KINDS:
            raise OptionError(f"kind={kind!r}; it is one of {', '.join(map(repr, KINDS))}.")
    if sharing not in SHARINGS:
        raise OptionError(f"sharing={sharing!r}; it is 'expand' or 'reduce'.")
    if not isinstance(rank, int) or rank < 1 or (rank > 1 and "optimal" not in kinds):
        raise OptionError(
            f"rank={rank!r}: an integer, at least 1, and more than 1 product for kind='optimal' only."
        )
    if "cfac" in kinds and not isinstance(problem.loss_function, CrossEntropy):
        raise LossError(
            f"cfac needs the cross-entropy of class labels; the loss is {problem.loss_function.name}."
        )


def _moments(captures: Captures, sharing: str, *, by_class: bool) -> dict[str, Moments]:
    problem, samples = captures.problem, captures.samples
    num_sets = problem.num_classes if by_class else 1
    found: dict[str, Moments] = {}
    for batch in captures.batches():
        if not bool((batch.weights > 0).any()):
            continue
        if not found:
            sizes = {name: value.numel() for name, value in problem.parameters.items()}
            every = places(batch.uses, sizes)
            _refuse_beyond_memory(problem, every, num_sets, num_replicates(samples))
            found = {
                place.name: Moments(place, num_sets, sharing, problem.device, samples) for place in every
            }
        weights = batch.by_example
        sets = _classes(problem, batch) if by_class else torch.zeros(len(weights), dtype=torch.long)
        for moment in found.values():
            moment.add(moment.place.mine(batch.uses), weights, sets.to(problem.device))
    if not found:
        raise CurvatureError("no parameter of this problem has any effect on the outputs.")
    return found


def _corrected(
    captures: Captures, found: dict[str, Place], blocks: dict[str, Block]
) -> tuple[dict[str, Block], dict[str, float]]:
    """The blocks of matrices, with G's own diagonal for their eigenvectors, and what draws leave open of it."""
    # draws differ from those of the eigenvectors, in which they would have too large a diagonal: their own
    # largest directions are where they happen to be large
    bases = {name: blocks[name].decomposed for name, place in found.items() if place.is_matrix}
    samples = captures.samples
    squares = {name: Squares(found[name], basis.left, basis.right, samples) for name, basis in bases.items()}
    for batch in captures.batches():
        weights = batch.by_example
        for total in squares.values():
            total.add(total.place.mine(batch.uses), weights)
    corrected: dict[str, Block] = {
        name: Rotated(basis.left, basis.right, squares[name].sums.total, basis.dtype, f"EKFAC of {name}")
        for name, basis in bases.items()
    }
    drawn = squares if samples else {}
    return corrected, {name: float(total.sums.variance.sum()) for name, total in drawn.items()}


def _nearest(
    captures: Captures, found: dict[str, Place], blocks: dict[str, Block], rank: int
) -> dict[str, Block]:
    """The blocks of matrices, as near to G as sums of products can be."""
    result: dict[str, Block] = {}
    for _, batches in captures.by_layer():
        names = {use.slice.name for use in batches[0]}
        for name, place in found.items():
            start = blocks[name]
            if not place.is_matrix or place.weight.name not in names or not start.norm:
                continue
            assert isinstance(start, KroneckerSum)
            right = start.right[0].double()
            right = torch.diag_embed(right) if right.ndim == 2 else right
            factors = nearest_sum(ExactBlock(place, batches, start.dtype), right, rank)
            result[name] = KroneckerSum(*factors, start.dtype, f"OPTIMAL of {name}")
    return result


def _classes(problem: Problem, batch: Captured) -> Tensor:
    """(B,) the class of each example."""
    loss = problem.loss_function
    assert isinstance(loss, CrossEntropy)
    labels = loss.labels(batch.targets)
    if len(labels) != batch.uses[0].num_examples:
        raise LossError("cfac needs one class label an example, and these examples have several rows each.")
    return labels


def _refuse_beyond_memory(problem: Problem, every: list[Place], num_sets: int, replicates: int) -> None:
    numbers = 0
    for place in every:
        groups, outputs, inputs = place.shape
        if place.is_matrix:
            numbers += num_sets * groups * (replicates * outputs**2 + inputs**2)
        elif inputs <= LARGEST_VECTOR:
            numbers += (replicates - 1) * inputs**2
    instead = "Restrict the problem to fewer layers, or raise memory."
    refuse_beyond(16 * numbers, problem.memory, "the Kronecker factors take", instead)

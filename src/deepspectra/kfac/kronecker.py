"""Kronecker-factored approximations of the Gauss-Newton matrix, block-diagonal over layers."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from deepspectra.argument_checks import check_choice, check_count, check_seed
from deepspectra.errors import ConvergenceWarning, CurvatureError, LossError, OptionError
from deepspectra.kfac.exact_blocks import ExactBlock, ParameterBlock, across_errors, across_features, places
from deepspectra.kfac.moments import LARGEST_VECTOR, Moments, Squares, add_squares, num_replicates
from deepspectra.kfac.operators import Block, Kronecker, KroneckerSum, Rotated
from deepspectra.problem.cross_entropy import CrossEntropy
from deepspectra.problem.memory_budget import refuse_beyond, share
from deepspectra.problem.problem import Problem, check_problem
from deepspectra.rows.captures import Captured, Captures
from deepspectra.rows.random_combinations import all_or_drawn

KINDS = ("kfac", "ekfac", "cfac", "optimal")
SHARINGS = ("expand", "reduce")
RTOL = 1e-7  # of the norm of the nearest sum, from one iteration to the next
MOST_ITERATIONS = 100


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
            raise OptionError("samples= draws for 'kfac', 'ekfac' and 'cfac'; 'optimal' would fit the draws. Use 0.")
    captures = all_or_drawn(problem, 0 if kind == "optimal" else samples, seed)
    return all_from(captures, (kind,), sharing, rank)[kind]


def all_from(
    captures: Captures, kinds: Sequence[str], sharing: str = "expand", rank: int = 1
) -> dict[str, Kronecker]:
    """`kronecker` of several kinds, from features and errors that may be held already.

    They are made of the same second moments: the data are gone through once, and once more for "ekfac".
    """
    problem = captures.problem
    for kind in kinds:
        check_choice("kind", kind, KINDS)
    check_choice("sharing", sharing, SHARINGS)
    if not isinstance(rank, int) or rank < 1 or (rank > 1 and "optimal" not in kinds):
        raise OptionError(f"rank={rank!r}: an integer, at least 1, and more than 1 product for kind='optimal' only.")
    if "cfac" in kinds and not isinstance(problem.loss_function, CrossEntropy):
        raise LossError(f"cfac needs the cross-entropy of class labels; the loss is {problem.loss_function.name}.")
    if "ekfac" in kinds and not captures.samples and problem.batches.group.size == 1:
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
    return {name: KroneckerSum(*moment.factors(), dtype, f"{label} of {name}") for name, moment in moments.items()}


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
    indices = problem.unflatten(torch.arange(problem.num_parameters, device=problem.device))
    operator = Kronecker(
        blocks,
        {name: place.ordered(indices) for name, place in found.items()},
        found,
        size=problem.num_parameters,
        kind=kind,
        sharing=next(iter(moments.values())).sharing,
        name=f"{kind.upper()} of {samples} draws" if samples else kind.upper(),
    )
    operator.memory = share(problem.memory, "basis")
    operator.samples = samples
    norms = {name: block.norm for name, block in blocks.items()}
    operator.standard_errors = MappingProxyType(
        {name: variances[name] ** 0.5 / norm if norm else 0.0 for name, norm in norms.items()}
    )
    return operator


def _moments(captures: Captures, sharing: str, *, by_class: bool) -> dict[str, Moments]:
    problem, samples = captures.problem, captures.samples
    num_sets = problem.num_classes if by_class else 1
    found: dict[str, Moments] = {}

    def started(every: list[ParameterBlock]) -> dict[str, Moments]:
        return {place.name: Moments(place, num_sets, sharing, problem.device, samples) for place in every}

    group = problem.batches.group
    with group.summing():
        for batch in captures.shares():
            if not bool((batch.weights > 0).any()):
                continue
            if not found:
                sizes = {name: value.numel() for name, value in problem.parameters.items()}
                every = places(batch.uses, sizes)
                _refuse_beyond_memory(problem, every, num_sets, num_replicates(samples))
                found = started(every)
            weights = batch.by_example
            sets = _classes(problem, batch) if by_class else torch.zeros(len(weights), dtype=torch.long)
            for moment in found.values():
                moment.add(moment.place.mine(batch.uses), weights, sets.to(problem.device))
    seen = [every for every in group.every([moment.place for moment in found.values()]) if every]
    if not seen:
        raise CurvatureError("no parameter of this problem has any effect on the outputs.")
    if any(every != seen[0] for every in seen):
        raise CurvatureError(
            "which parameters are biases is seen otherwise on the shares of two processes: take one process."
        )
    found = found or started(seen[0])
    for moment in found.values():
        group.sum(moment.mass, moment.inputs, moment.errors.sums)
    return found


def _corrected(
    captures: Captures, found: dict[str, ParameterBlock], blocks: dict[str, Block]
) -> tuple[dict[str, Block], dict[str, float]]:
    """The blocks of matrices, with G's own diagonal for their eigenvectors, and what draws leave open of it."""
    # draws differ from those of the eigenvectors, in which they would have too large a diagonal: their own
    # largest directions are where they happen to be large
    bases = {name: blocks[name].decomposed for name, place in found.items() if place.is_matrix}
    samples = captures.samples
    squares = {name: Squares(found[name], basis.left, basis.right, samples) for name, basis in bases.items()}
    with captures.problem.batches.group.summing(*(total.sums.sums for total in squares.values())):
        add_squares(captures.shares(), squares.values())
    corrected: dict[str, Block] = {
        name: Rotated(basis.left, basis.right, squares[name].sums.total, basis.dtype, f"EKFAC of {name}")
        for name, basis in bases.items()
    }
    drawn = squares if samples else {}
    return corrected, {name: float(total.sums.variance.sum()) for name, total in drawn.items()}


def _nearest(
    captures: Captures, found: dict[str, ParameterBlock], blocks: dict[str, Block], rank: int
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


def nearest_sum(exact: ExactBlock, start: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """S (rank, groups, o, o) and A (rank, groups, d, d), float64, symmetric, with ‖G − Σ S_r ⊗ A_r‖_F least.

    Rearranged, the block is a matrix (o², d²) that takes A to Σ g A gᵀ over gradients g, and its transpose takes
    S to Σ gᵀ S g; the leading singular vectors are found by subspace iteration from `start` (groups, d, d).

    Source: Van Loan and Pitsianis 1993, Approximation with Kronecker products.

    Cost: of an iteration, about two second moments of errors and of features for each of the products.
    """
    groups, outputs, inputs = exact.place.shape
    rank = min(rank, outputs * (outputs + 1) // 2, inputs * (inputs + 1) // 2)
    generator = torch.Generator().manual_seed(0)
    # the first product starts at KFAC's A, already near; the others anywhere, of its size so that none is lost to
    # rounding
    drawn = torch.randn(rank - 1, groups, inputs, inputs, generator=generator, dtype=torch.float64)
    right = torch.cat([start[None], (drawn + drawn.mT).to(start) * start.abs().mean()])
    previous = 0.0
    for _ in range(MOST_ITERATIONS):
        right = _orthonormal(right)
        left = _swept(exact, right, to_left=True)
        norm = float(left.norm())
        if abs(norm - previous) <= RTOL * norm:
            return left, right
        previous = norm
        right = _swept(exact, _orthonormal(left), to_left=False)
    warnings.warn(
        f"{exact.name}: the nearest sum of {rank} Kronecker products has not settled to {RTOL:g} in "
        f"{MOST_ITERATIONS} iterations; two singular values are nearly equal.",
        ConvergenceWarning,
        stacklevel=4,
    )
    right = _orthonormal(right)
    return _swept(exact, right, to_left=True), right


def _orthonormal(matrices: Tensor) -> Tensor:
    """Of each group, in the Frobenius inner product."""
    rank, groups, size, _ = matrices.shape
    columns: Tensor = torch.linalg.qr(matrices.reshape(rank, groups, -1).permute(1, 2, 0)).Q
    basis = columns.permute(2, 0, 1).reshape(rank, groups, size, size)
    # signs are free; with positive traces the first product, of positive matrices, comes out positive
    trace = basis.diagonal(dim1=2, dim2=3).sum(2)
    return basis.where(trace[:, :, None, None] >= 0, -basis)


def _swept(exact: ExactBlock, matrices: Tensor, *, to_left: bool) -> Tensor:
    """Σ g A gᵀ or Σ gᵀ S g for each of several matrices (rank, groups, ...)."""
    _, outputs, inputs = exact.place.shape
    size = outputs if to_left else inputs
    total = matrices.new_zeros(*matrices.shape[:2], size, size)
    for found in exact.positions(exact.num_positions**2 * exact.batches[0][0].errors.shape[1]):
        features, errors = exact.factors(found)
        for index, matrix in enumerate(matrices.to(features)):
            if to_left:
                similar = across_features(features, matrix) @ features.mT  # (b, groups, T, T)
                total[index] += _weighted(errors, similar[:, :, None])
            else:
                similar = (errors.mT @ across_errors(matrix, errors)).sum(2)
                total[index] += _weighted(features.mT[:, :, None], similar[:, :, None])
    return total


def _weighted(columns: Tensor, similar: Tensor) -> Tensor:
    """Σ X Q Xᵀ of columns X (b, groups, j, k, T) and Q (b, groups, 1, T, T): (groups, k, k)."""
    single = columns.shape[4] == 1
    mixed = columns * similar if single else columns @ similar
    left, right = (x.permute(1, 3, 0, 2, 4).flatten(2) for x in (mixed, columns))  # (groups, k, b·j·T)
    return (left @ right.mT).double()


def _classes(problem: Problem, batch: Captured) -> Tensor:
    """(B,) the class of each example."""
    loss = problem.loss_function
    assert isinstance(loss, CrossEntropy)
    labels = loss.labels(batch.targets)
    if len(labels) != batch.uses[0].num_examples:
        raise LossError("cfac needs one class label an example, and these examples have several rows each.")
    return labels


def _refuse_beyond_memory(problem: Problem, every: list[ParameterBlock], num_sets: int, replicates: int) -> None:
    numbers = 0
    for place in every:
        groups, outputs, inputs = place.shape
        if place.is_matrix:
            numbers += num_sets * groups * (replicates * outputs**2 + inputs**2)
        elif inputs <= LARGEST_VECTOR:
            numbers += (replicates - 1) * inputs**2
    instead = "Restrict the problem to fewer layers, or raise memory."
    refuse_beyond(16 * numbers, problem.memory, "the Kronecker factors take", instead)

"""What the top eigenvectors of a layer's block are made of: input directions, output directions, closed forms."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from deepspectra.algorithms.eigenpairs import eigenpairs
from deepspectra.algorithms.overlap import overlap, overlap_curve
from deepspectra.analysis.layer_blocks import RTOL, Blocks, top_pairs
from deepspectra.argument_checks import LayerProgress, announced, check_count
from deepspectra.kfac.exact_blocks import ExactBlock
from deepspectra.kfac.operators import KroneckerSum
from deepspectra.operators.curvature import GaussNewton
from deepspectra.problem.problem import Problem
from deepspectra.results import ByLayer, origin


@dataclass(frozen=True)
class LayerDissection:
    """The top K eigenvectors h_j of one layer's block of G, reshaped to matrices Mat(h_j) (outputs, inputs).

    E[xxᵀ] is the second moment of the layer's input x over positions, E[M] of its errors; eigenvectors descend.

    Attributes:
        name: of the layer.
        shape: (outputs, inputs), the last input being the bias if there is one.
        values: (K,) eigenvalues of the block.
        rank_one: (K,) σ_1/‖·‖_F of Mat(h_j); 1 for u ⊗ v.
        factored_values: (K,) the largest products τ_i γ_j of the eigenvalues of the factors.
        input_correspondence: (I, K) ‖Mat(h_j) v_i‖² with the eigenvectors v_i of A, bias included.
        output_correspondence: (O, K) ‖Mat(h_j)ᵀ u_i‖² with the eigenvectors u_i of S.
        input_ratio: λ_1/λ_2 of E[xxᵀ], without the bias; ∞ if all inputs lie along one direction.
        input_alignment: (v_1·E[x])²/‖E[x]‖², without the bias; NaN where E[x] is zero.
        output_values: (O,) largest eigenvalues of E[M].
        closed_form: overlap of the top C − 1 eigenspace of E[M] with the row space of S without 1ᵀS, S the
            product of the later weights; NaN where these are not all matrices that follow each other, and of one
            output.
        closed_range: the same with the range of Sᵀ(I − 11ᵀ/C)S.
    """

    name: str
    shape: tuple[int, int]
    values: Tensor
    rank_one: Tensor
    factored_values: Tensor
    input_correspondence: Tensor
    output_correspondence: Tensor
    input_ratio: float
    input_alignment: float
    output_values: Tensor
    closed_form: float
    closed_range: float


@dataclass(frozen=True)
class WholeDissection:
    """The top K eigenvectors of G over all parameters, against u ⊗ E[x] stacked over layers.

    If the inputs x of every layer were their means x̄, gradients would be e ⊗ x̄, layer by layer, and G's
    eigenvectors would follow from the second moment of the errors of all layers at once, the full output Hessian M.

    Attributes:
        values: (K,) eigenvalues of G.
        approximated: (K,) of D M D, D the lengths of the mean inputs: what G would be with x = x̄.
        published: (K,) σ_i ‖w_i‖² with the eigenpairs σ_i, u_i of M and w_i = D u_i, which are not orthogonal.
        overlaps: (K,) of the top k eigenvectors of D M D, each u ⊗ x̄/‖x̄‖ stacked, with those of G, k from 1 to K.
        published_overlaps: (K,) the same for the w_i, orthonormalised in turn.
        reach: (K,) ‖·‖² of each eigenvector of G within all u ⊗ x̄, the most that any errors could explain.
    """

    values: Tensor
    approximated: Tensor
    published: Tensor
    overlaps: Tensor
    published_overlaps: Tensor
    reach: Tensor

    def __str__(self) -> str:
        last = len(self.values)
        return (
            f"all parameters: λ₁ {float(self.values[0]):.3g}, with x = E[x] {float(self.approximated[0]):.3g}; "
            f"overlap of u ⊗ E[x] with the top {last} eigenvectors of G {float(self.overlaps[-1]):.3f} "
            f"(as published {float(self.published_overlaps[-1]):.3f}, at most {float(self.reach.mean()):.3f})"
        )


@dataclass(frozen=True, repr=False)
class Dissection(ByLayer[LayerDissection]):
    """What the blocks of all layers that multiply features are made of.

    Attributes:
        whole: the same question for all layers together; None if it was left out, or if all blocks are zero.
    """

    whole: WholeDissection | None

    def __str__(self) -> str:
        head = ("λ₁", "λ₁/τ₁γ₁", "rank one", "v₁ share", "λ₁/λ₂ xxᵀ", "v₁·E[x]", "closed form", "its range")
        return self._table(
            head,
            lambda layer: (
                float(layer.values[0]),
                float(layer.values[0] / layer.factored_values[0]),
                float(layer.rank_one.mean()),
                float(layer.input_correspondence[0].mean()),
                layer.input_ratio,
                layer.input_alignment,
                layer.closed_form,
                layer.closed_range,
            ),
            "of the top eigenvectors of each layer's block of G: mean σ₁/‖·‖ reshaped, mean share along the top "
            f"eigenvector of E[xxᵀ]; overlaps of the closed forms of E[M]; {self.seconds:.3g} s",
            *([str(self.whole)] if self.whole else []),
        )


def dissect(
    problem: Problem,
    *,
    num: int | None = None,
    num_whole: int | None = None,
    num_directions: int = 20,
    seed: int = 0,
    progress: LayerProgress | None = None,
) -> Dissection:
    """How far each layer's block of G is E[M] ⊗ E[xxᵀ], eigenvector by eigenvector.

    If features and errors were uncorrelated, the eigenvectors of the block would be u_i ⊗ v_j, their reshaped
    matrices of rank one, and each column of the correspondence matrices a single 1.

    Args:
        problem: with a loss that is convex in the outputs.
        num: eigenvectors of each block; by default twice the number of classes.
        num_whole: of G over all parameters, by default as many; 0 leaves the whole out.
        num_directions: rows of the correspondence matrices.
        seed: of random vectors.
        progress: called with (layers done, layers in all, name of the next).

    Raises:
        OptionError: num or num_directions below 1.
        LossError, CurvatureError, MemoryBudgetError: as for `kronecker`.

    Cost: the factors, their eigenvectors, and the top eigenspace of each block: of at most 3,000 rows N (C − 1)
        from their inner products, of more by Lanczos; the top eigenpairs of G by products. Grouped convolutions
        count in the whole only, and layers whose block is zero are left out.

    Source: Wu et al. 2020, arXiv 2010.04261: definition 2.2 (reshaping), section 3 (correspondence, λ_1/λ_2),
        section 4 and appendix (closed form of the output Hessian's top space), appendix C (the whole).
    """
    began = time.perf_counter()
    num = 2 * problem.num_classes if num is None else num
    check_count("num", num)
    check_count("num_directions", num_directions)
    num_whole = num if num_whole is None else num_whole
    blocks = Blocks(problem)
    layers, reduced = {}, {}
    for name, exact in announced(blocks, progress, len(blocks.names)):
        if num_whole:
            reduced[name] = _with_mean_inputs(exact)
        if exact.place.groups == 1:
            layers[name] = dissected(blocks, exact, top_pairs(exact, num, seed), num_directions)
    whole = _dissected_whole(blocks, reduced, num_whole, seed) if reduced else None
    return Dissection(layers, whole, **origin(began, problem, seed=seed))


def dissected(
    blocks: Blocks, exact: ExactBlock, pairs: tuple[Tensor, Tensor], num_directions: int = 20
) -> LayerDissection:
    """One layer's block, given its top eigenvalues and their eigenvectors."""
    name, (_, outputs, inputs) = exact.place.name, exact.place.shape
    factors, inner = blocks.factors.blocks[name], blocks.captures.problem.num_classes - 1
    assert isinstance(factors, KroneckerSum)
    values, vectors = pairs
    reshaped = vectors.double().T.view(-1, outputs, inputs)
    kron = factors.decomposed
    every = kron.left[0].double().flip(1)
    left = every[:, :num_directions]
    right = torch.eye(inputs).to(left) if kron.right is None else kron.right[0].double().flip(1)
    ratio, alignment = _inputs(exact, factors)
    forms = _closed_forms(blocks, name, outputs)
    closed = [overlap(every[:, :inner], form.to(every)) for form in forms] or [math.nan, math.nan]
    return LayerDissection(
        name=name,
        shape=(outputs, inputs),
        values=values.double().cpu(),
        rank_one=torch.linalg.matrix_norm(reshaped, 2).cpu() / torch.linalg.matrix_norm(reshaped).cpu(),
        factored_values=kron.eigenvalues()[: len(values)].cpu(),
        input_correspondence=(reshaped @ right[:, :num_directions]).square().sum(1).T.cpu(),
        output_correspondence=(reshaped.mT @ left).square().sum(1).T.cpu(),
        input_ratio=ratio,
        input_alignment=alignment,
        output_values=torch.linalg.eigvalsh(factors.left[0, 0].double()).flip(0)[:num_directions].cpu(),
        closed_form=closed[0],
        closed_range=closed[1],
    )


def _inputs(exact: ExactBlock, factors: KroneckerSum) -> tuple[float, float]:
    """λ_1/λ_2 of E[xxᵀ] and (v_1·E[x])²/‖E[x]‖², without the bias."""
    if factors.right.ndim == 3:  # rows of a table
        frequencies = factors.right[0, 0].double().sort(descending=True).values
        return _first_ratio(frequencies, 0.0), float(frequencies[0] ** 2 / frequencies.square().sum())
    size = exact.place.shape[2] - (exact.place.bias is not None)
    values, vectors = torch.linalg.eigh(factors.right[0, 0, :size, :size].double())
    total = torch.zeros(size, dtype=torch.float64, device=exact.device)
    for found in exact.positions():
        total += torch.einsum("bt,btd->d", found.counts.to(found.features), found.features).double()
    rounding = size * torch.finfo(exact.dtype).eps
    return _first_ratio(values.flip(0), rounding), float((vectors[:, -1] @ total).square() / total.square().sum())


def _first_ratio(values: Tensor, rounding: float) -> float:
    """λ_1/λ_2 of descending values; ∞ if there is no second, or nothing but rounding, and NaN of zeros."""
    if not float(values[0]) > 0:
        return math.nan
    there = len(values) > 1 and bool(values[1] > rounding * values[0])
    return float(values[0] / values[1]) if there else math.inf


def _closed_forms(blocks: Blocks, name: str, outputs: int) -> list[Tensor]:
    """Orthonormal bases (outputs, C − 1) of the row space of S without 1ᵀS, and of the rows of S less their mean.

    S is the product of the layers after this one; none where these are not all matrices that follow each other, and
    of one output.
    """
    problem = blocks.captures.problem
    num_classes = problem.num_classes
    product = torch.eye(num_classes, dtype=torch.float64)
    for later in reversed(blocks.names[blocks.names.index(name) + 1 :]):
        place = blocks.factors.places[later]
        value = problem.parameters[place.weight.name].detach()
        if value.numel() != place.weight.numel or value.ndim != 2:  # a kernel, or a part of a table
            return []
        weight = place.join(value)[0].double()
        if weight.shape[0] != product.shape[1]:
            return []
        product = product.to(weight) @ weight
    if num_classes < 2 or product.shape != (num_classes, outputs):
        return []
    along = product.sum(0)
    along = along / along.norm().clamp_min(torch.finfo(along.dtype).tiny)
    freed = product - torch.outer(product @ along, along)
    pair = freed, product - product.mean(0)
    return [torch.linalg.svd(rows, full_matrices=False)[2][: num_classes - 1].T for rows in pair]


def _with_mean_inputs(exact: ExactBlock) -> tuple[Tensor, Tensor]:
    """Errors (R, groups · outputs), summed over positions, and the mean inputs x̄ (groups, inputs)."""
    groups, _, inputs = exact.place.shape
    rows, total = [], torch.zeros(groups, inputs, dtype=torch.float64, device=exact.device)
    count = 0.0
    for found in exact.positions():
        features, errors = exact.factors(found)
        counts = found.counts.to(features)
        total += torch.einsum("bt,bgtd->gd", counts, features).double()
        count += float(found.counts.sum())
        rows.append(errors.sum(4).transpose(1, 2).flatten(2).flatten(0, 1))
    return torch.cat(rows), total / count


def _dissected_whole(
    blocks: Blocks, reduced: dict[str, tuple[Tensor, Tensor]], num: int, seed: int
) -> WholeDissection:
    """What u ⊗ x̄, stacked over layers of these errors and mean inputs, say of the top eigenvectors of G."""
    problem, factors = blocks.captures.problem, blocks.factors
    pairs = eigenpairs(GaussNewton(problem), min(num, problem.num_parameters), rtol=RTOL, seed=seed)
    lengths, coordinates = [], []  # of x̄, output by output, and of G's eigenvectors along u ⊗ x̄/‖x̄‖
    for name, (errors, mean) in reduced.items():
        length = mean.norm(dim=1)
        lengths.append(length.repeat_interleave(errors.shape[1] // len(length)))
        unit = mean / length.clamp_min(torch.finfo(mean.dtype).tiny)[:, None]
        own = pairs.vectors[factors.index[name]].double().view(*factors.places[name].shape, -1)
        coordinates.append(torch.einsum("goik,gi->gok", own, unit).flatten(0, 1))
    scale, exact = torch.cat(lengths)[:, None], torch.cat(coordinates)
    stacked = torch.cat([errors for errors, _ in reduced.values()], 1)
    moment = (stacked.T @ stacked).double()
    num = min(exact.shape[1], len(moment))
    values, vectors = (found.flip(-1) for found in torch.linalg.eigh(scale * moment * scale.T))
    sigma, outputs = (found.flip(-1) for found in torch.linalg.eigh(moment))
    tilted = scale * outputs[:, :num]
    return WholeDissection(
        values=pairs.values[:num].cpu(),
        approximated=values[:num].cpu(),
        published=(sigma[:num] * tilted.square().sum(0)).cpu(),
        overlaps=overlap_curve(vectors[:, :num], exact[:, :num]),
        published_overlaps=overlap_curve(torch.linalg.qr(tilted).Q, exact[:, :num]),
        reach=exact[:, :num].square().sum(0).cpu(),
    )

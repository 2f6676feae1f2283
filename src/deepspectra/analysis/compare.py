"""Whether independently trained networks share eigenspaces, layer by layer: measured, and predicted from factors."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from deepspectra.algorithms.eigenpairs import eigenpairs
from deepspectra.algorithms.overlap import overlap_curve
from deepspectra.analysis.layer_blocks import RTOL, Blocks, top_pairs
from deepspectra.argument_checks import LayerProgress, announced, check_count
from deepspectra.errors import ShapeError
from deepspectra.kfac.exact_blocks import ExactBlock
from deepspectra.kfac.operators import Block, Rotated
from deepspectra.operators.curvature import GaussNewton
from deepspectra.problem.finished_stages import FinishedStages, stages_of
from deepspectra.problem.problem import Problem
from deepspectra.results import ByLayer, origin

FEWEST = 10  # dimensions of a curve, if the layer has as many


@dataclass(frozen=True)
class LayerComparison:
    """Overlaps ‖UᵀV‖²_F / k of the top-k eigenspaces of one layer's block of G in two networks.

    Attributes:
        name: of the layer.
        shape: (groups, outputs, inputs), the last input being the bias if there is one.
        ks: (K,) dimensions, 1 to K.
        measured: (K,) of the exact blocks.
        kronecker: (K,) of their KFAC approximations S ⊗ A.
        predicted: (K,) from the spectra of S and A and the eigenvectors of A alone, with eigenvectors of S that know
            nothing of each other, (u·u')² = 1/m on average; of the output layer, whose outputs both networks share,
            the same as `kronecker`.
        baseline: (K,) k/n, of random subspaces.
        alignment: (t·t')² of the top eigenvectors of A: the height of the peak that theory predicts at k = m.
    """

    name: str
    shape: tuple[int, int, int]
    ks: Tensor
    measured: Tensor
    kronecker: Tensor
    predicted: Tensor
    baseline: Tensor
    alignment: float

    @property
    def outputs(self) -> int:
        """The number m of outputs."""
        return self.shape[0] * self.shape[1]

    @property
    def peak(self) -> tuple[int, float]:
        """Where the measured curve is highest, and how high."""
        return _peak(self.ks, self.measured)

    @property
    def predicted_peak(self) -> tuple[int, float]:
        """Where the predicted curve is highest, and how high."""
        return _peak(self.ks, self.predicted)

    @property
    def case(self) -> str:
        """Where the prediction has its peak: "at m" (within a tenth), "early" or "delayed"."""
        place = self.predicted_peak[0]
        if abs(place - self.outputs) <= 0.1 * self.outputs:
            return "at m"
        return "early" if place < self.outputs else "delayed"


@dataclass(frozen=True, repr=False)
class Comparison(ByLayer[LayerComparison]):
    """Eigenspaces of two networks of the same architecture, without layers whose block of G is zero in either.

    Attributes:
        whole: (K,) overlap of the top-k eigenspaces of G over all parameters, k from 1 to K.
        provenance: of the first network.
    """

    whole: Tensor

    def __str__(self) -> str:
        head = ("m", "peak at", "height", "at k = m", "predicted", "height", "(t·t′)²", "case", "random at m")
        num = len(self.whole)
        whole = f"; of all parameters {float(self.whole[-1]):.3f} at k = {num}" if num else ""
        return self._table(head, _told, f"overlap of top-k eigenspaces of G{whole}; {self.seconds:.3g} s")


def _told(layer: LayerComparison) -> list[float | str]:
    """What the table says of a layer."""
    (place, height), (foreseen, foreseen_height) = layer.peak, layer.predicted_peak
    at = min(layer.outputs, len(layer.ks)) - 1
    heights = f"{height:.3f}", f"{float(layer.measured[at]):.3f}"
    predicted = str(foreseen), f"{foreseen_height:.3f}", f"{layer.alignment:.3f}"
    return [str(layer.outputs), str(place), *heights, *predicted, layer.case, float(layer.baseline[at])]


def compare(
    first: Problem,
    second: Problem,
    *,
    num: int | None = None,
    num_whole: int | None = None,
    seed: int = 0,
    resume: str | Path | None = None,
    progress: LayerProgress | None = None,
) -> Comparison:
    """Overlap of the top eigenspaces of two networks of the same architecture, each with its own data.

    Parameters are compared as they stand. Hidden units of independently trained networks are in no common order, so
    eigenvectors u of output factors do not match; what overlaps is the input side. Where A = E[h hᵀ] has one
    dominant direction t, close to the mean feature, the top m eigenvectors of a layer's block are about u_i ⊗ t
    for all u_i, and the overlap rises linearly to (t·t')² at k = m, the number of outputs, then falls. When A's
    spectrum decays slowly, or that of S fast, the peak comes early or late; the predicted curve sorts the products
    of eigenvalues and tells which.

    Args:
        first: a problem with a loss that is convex in the outputs.
        second: another with the same layers and shapes.
        num: dimensions of each layer's curve; by default 2 m, at least 10, as far as the rank goes.
        num_whole: dimensions of the curve over all parameters, by default twice the number of classes; 0 leaves the
            whole out.
        seed: of random vectors.
        resume: a folder where finished layers are kept; called again with it after a stop, it goes on behind them,
            with the same result up to rounding.
        progress: called with (layers done, layers in all, name of the next).

    Raises:
        ShapeError: the two have different parameters.
        LossError, CurvatureError, MemoryBudgetError: as for `kronecker`.
        FileError: the folder to resume from is of other problems or of other options, or damaged.

    Cost: the factors of both, and the top eigenspaces: of at most 3,000 rows N (C − 1) from their inner products, of
        more by Lanczos.

    Source: Wu et al. 2020, arXiv 2010.04261, sections 2 and 5. Departure: G's blocks in place of the Hessian's,
    which are the same for networks that are piecewise linear.
    """
    began = time.perf_counter()
    _check_same(first, second)
    for name, value, smallest in (("num", num, 1), ("num_whole", num_whole, 0)):
        if value is not None:
            check_count(name, value, smallest)
    wanted = min(2 * first.num_classes if num_whole is None else num_whole, first.num_parameters)
    options = {"num": num, "num of all parameters": wanted, "seed": seed}
    stages = stages_of("compare", (first, second), resume, (LayerComparison,), **options)
    layers = stages.run("layers", lambda: _layers((first, second), num, seed, stages, progress))

    def overlaps() -> Tensor:
        tops = [eigenpairs(GaussNewton(side), wanted, rtol=RTOL, seed=seed) for side in (first, second)]
        return overlap_curve(tops[0].vectors, tops[1].vectors)

    whole = stages.run("all parameters", overlaps) if wanted else torch.zeros(0, dtype=torch.float64)
    return Comparison(layers, whole, **origin(began, first, seed=seed))


def _layers(
    problems: Sequence[Problem], num: int | None, seed: int, stages: FinishedStages, progress: LayerProgress | None
) -> dict[str, LayerComparison]:
    """Every layer of both."""
    sides = [Blocks(problem) for problem in problems]
    layers = {}
    for name, *pair in announced(sides[0].beside(sides[1]), progress, len(sides[0].names)):

        def compared(name: str = name, pair: Sequence[ExactBlock] = pair) -> LayerComparison:
            groups, outputs, _ = pair[0].place.shape
            wanted = num or max(2 * groups * outputs, FEWEST)
            spaces = [top_pairs(block, wanted, seed)[1] for block in pair]
            blocks = [side.factors.blocks[name] for side in sides]
            shared = outputs == problems[0].num_classes and name == sides[0].names[-1]
            return _layer(pair[0], spaces, blocks, shared=shared)

        layers[name] = stages.run(f"block {sides[0].names.index(name)}", compared)
    return layers


def _check_same(first: Problem, second: Problem) -> None:
    one, other = ({name: tuple(value.shape) for name, value in p.parameters.items()} for p in (first, second))
    if one != other:
        odd = [name for name in {**one, **other} if one.get(name) != other.get(name)]
        raise ShapeError(
            f"the two problems must have the same parameters; these differ: {', '.join(map(repr, odd[:5]))}."
        )


def _layer(exact: ExactBlock, spaces: list[Tensor], blocks: list[Block], *, shared: bool) -> LayerComparison:
    num = min(space.shape[1] for space in spaces)
    one, other = (block.decomposed for block in blocks)
    approximated = overlap_curve(one.top(num)[1], other.top(num)[1])
    ks = torch.arange(1, num + 1)
    aligned = _alignments(one, other)
    return LayerComparison(
        name=exact.place.name,
        shape=exact.place.shape,
        ks=ks,
        measured=overlap_curve(*(space[:, :num] for space in spaces)),
        kronecker=approximated,
        predicted=approximated if shared else _predicted(one, other, aligned, num),
        baseline=ks.double() / exact.shape[0],
        alignment=float(aligned[0, -1, -1]),
    )


def _alignments(one: Rotated, other: Rotated) -> Tensor:
    """(t_j·t'_l)² of the eigenvectors of A: (groups, d, d), ascending."""
    if one.right is None or other.right is None:  # rows of a table: the same unit vectors
        size = one.diagonal.shape[2]
        return torch.eye(size, dtype=torch.float64).expand(len(one.diagonal), -1, -1)
    squares: Tensor = (one.right.double().mT @ other.right.double()).square().cpu()
    return squares


def _predicted(one: Rotated, other: Rotated, aligned: Tensor, num: int) -> Tensor:
    """Σ over the top k products u_i ⊗ t_j of both of (t·t')² / (m k), counted by group g and j."""
    groups, outputs, inputs = one.diagonal.shape
    counts = []
    for side in (one, other):
        chosen = side.diagonal.flatten().topk(num).indices.cpu()
        owner = chosen // (outputs * inputs) * inputs + chosen % inputs  # (group, j) of each
        members = torch.nn.functional.one_hot(owner, groups * inputs).double()
        counts.append(members.cumsum(0).view(num, groups, inputs))
    sums = torch.einsum("kgj,gjl,kgl->k", counts[0], aligned, counts[1])
    return sums / (outputs * torch.arange(1, num + 1))


def _peak(ks: Tensor, curve: Tensor) -> tuple[int, float]:
    place = int(curve.argmax())
    return int(ks[place]), float(curve[place])

"""The top eigenspace of all layers together, from errors and mean inputs alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deepspectra.algorithms.eigenpairs import eigenpairs
from deepspectra.algorithms.overlap import overlap_curve
from deepspectra.analysis.layer_blocks import RTOL, Blocks
from deepspectra.kfac.exact import ExactBlock
from deepspectra.operators.curvature import GaussNewton
from deepspectra.problem.problem import Problem


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


class Stack:
    """Errors and mean inputs of the layers of a problem, gathered one layer at a time."""

    def __init__(self) -> None:
        self.errors: dict[str, Tensor] = {}  # (R, groups · outputs), summed over positions
        self.means: dict[str, Tensor] = {}  # (groups, inputs)

    def add(self, exact: ExactBlock) -> None:
        """One layer's."""
        groups, _, inputs = exact.place.shape
        rows, total = [], torch.zeros(groups, inputs, dtype=torch.float64, device=exact.device)
        count = 0.0
        for found in exact.positions():
            features, errors = exact.factors(found)
            counts = found.counts.to(features)
            total += torch.einsum("bt,bgtd->gd", counts, features).double()
            count += float(found.counts.sum())
            rows.append(errors.sum(4).transpose(1, 2).flatten(2).flatten(0, 1))
        self.errors[exact.place.name] = torch.cat(rows)
        self.means[exact.place.name] = total / count

    def against(self, problem: Problem, blocks: Blocks, num: int, seed: int) -> WholeDissection:
        """What the stacked u ⊗ x̄ say of the top eigenvectors of G."""
        pairs = eigenpairs(GaussNewton(problem), min(num, problem.num_parameters), rtol=RTOL, seed=seed)
        lengths = torch.cat([self._lengths(name) for name in self.errors])
        stacked = torch.cat(list(self.errors.values()), 1)
        moment = (stacked.T @ stacked).double()
        exact = self._coordinates(pairs.vectors, blocks)  # of G's eigenvectors along u ⊗ x̄/‖x̄‖
        num = min(exact.shape[1], len(moment))
        values, vectors = (found.flip(-1) for found in torch.linalg.eigh(lengths[:, None] * moment * lengths))
        sigma, outputs = (found.flip(-1) for found in torch.linalg.eigh(moment))
        tilted = lengths[:, None] * outputs[:, :num]
        return WholeDissection(
            values=pairs.values[:num].cpu(),
            approximated=values[:num].cpu(),
            published=(sigma[:num] * tilted.square().sum(0)).cpu(),
            overlaps=overlap_curve(vectors[:, :num], exact[:, :num]),
            published_overlaps=overlap_curve(torch.linalg.qr(tilted).Q, exact[:, :num]),
            reach=exact[:, :num].square().sum(0).cpu(),
        )

    def _lengths(self, name: str) -> Tensor:
        """(groups · outputs,) of the mean input of each output."""
        lengths: Tensor = self.means[name].norm(dim=1)
        return lengths.repeat_interleave(self.errors[name].shape[1] // len(lengths))

    def _coordinates(self, vectors: Tensor, blocks: Blocks) -> Tensor:
        """Of vectors (P, K) along u ⊗ x̄/‖x̄‖: (M, K)."""
        rows = []
        for name, mean in self.means.items():
            shape = blocks.factors.places[name].shape
            own = vectors[blocks.factors.index[name]].double().view(*shape, -1)
            unit = mean / mean.norm(dim=1, keepdim=True).clamp_min(torch.finfo(mean.dtype).tiny)
            rows.append(torch.einsum("goik,gi->gok", own, unit).flatten(0, 1))
        return torch.cat(rows)

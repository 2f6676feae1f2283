"""Neural collapse: how far the features of a class shrink to its mean, and the means to a simplex."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from deepspectra.problem.problem import Problem
from deepspectra.results import ByLayer, origin
from deepspectra.rows.captures import parameters_of
from deepspectra.rows.features_and_errors import counted, features_of, membership
from deepspectra.rows.gradients import GradientRows
from deepspectra.rows.held_rows import HeldRows
from deepspectra.rows.spectrum import significant

ROUNDING = 100  # times ε of the means, below which these do not differ


@dataclass(frozen=True)
class Collapse:
    """Neural collapse of the features that enter a layer.

    Attributes:
        nc1: Tr(Σ_W Σ_B⁺)/C, scatter within classes over that between them; the pseudo-inverse has rank C − 1. Here,
            and in NC2, C counts the classes that have examples.
        nc2_norms: standard deviation over mean of the norms ‖h_c − h̄‖.
        nc2_angles: standard deviation of the cosines between different h_c − h̄.
        nc2_simplex: mean of |cosine + 1/(C − 1)|; 0 for a simplex.
        nc3: ‖Wᵀ/‖W‖ − M/‖M‖‖² for the classifier W, NaN for other layers.
        nc4: share of examples whose nearest class mean is not the network's decision.
        cosines: (C, C) between h_c − h̄; NaN for absent classes.

    NC1 and NC2 are NaN where all class means are the same up to rounding, or there is one class, and NC3 also where W
    is zero.

    Source: Papyan, Han and Donoho 2020, PNAS 117(40).
    """

    nc1: float
    nc2_norms: float
    nc2_angles: float
    nc2_simplex: float
    nc3: float
    nc4: float
    cosines: Tensor


class CollapseByLayer(ByLayer[Collapse]):
    """Neural collapse of the features that enter each layer."""

    def __str__(self) -> str:
        names = ("nc1", "nc2_norms", "nc2_angles", "nc2_simplex", "nc3", "nc4")
        head = [name.upper().replace("_", " ") for name in names]
        note = f"neural collapse of what enters each layer, {self.seconds:.3g} s"
        return self._table(head, lambda layer: [getattr(layer, name) for name in names], note)


def collapse(problem: Problem) -> CollapseByLayer:
    """Neural collapse of the features that enter each layer: NC1 to NC4, and the angles between class means.

    Args:
        problem: one with cross-entropy and class labels.

    Raises:
        LossError: the loss is not the cross-entropy of class labels.
        CurvatureError: no layer has features of its own for each row.
        MemoryBudgetError: the features of all layers do not fit a third of the problem's memory.

    Cost: two forward passes, and for each layer N D C flops.

    Source: Papyan, Han and Donoho 2020, PNAS 117(40).
    """
    began = time.perf_counter()
    rows = HeldRows(problem)
    features = features_of(rows)
    found = {name: collapse_of(entering, rows, name) for name, entering in features.items()}
    *_, last = features.values()
    return CollapseByLayer(found, **origin(began, last, "features"))


def collapse_of(features: Tensor, rows: GradientRows, layer: str) -> Collapse:
    """NC1 to NC4 of features (N, D) that enter a layer."""
    own = parameters_of(rows.problem, layer)
    member = membership(rows)
    live = counted(rows) > 0
    kept = member.any(0)
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    member = member[:, kept].to(features)
    sizes = member.sum(0)
    means = (member / sizes).T @ features  # (C', D)
    centre = (sizes / sizes.sum()) @ means
    centred = means - centre
    if centred.norm() <= ROUNDING * torch.finfo(means.dtype).eps * means.norm():
        centred.zero_()
    _, singular, right = torch.linalg.svd(centred * (sizes / sizes.sum()).sqrt()[:, None], full_matrices=False)
    rank = max(1, min(len(centred) - 1, int(significant(singular).sum())))
    scatter = (features - member @ means)[live] @ right[:rank].T  # (N, C' − 1)
    ratios = (scatter.square().mean(0) / singular[:rank].square()).where(singular[0] > 0, torch.nan)
    norms = centred.norm(dim=1)
    units = centred / norms[:, None]  # NaN where there is no direction
    cosines = units @ units.T
    off = ~torch.eye(len(cosines), dtype=torch.bool, device=cosines.device)
    num_classes = len(kept)
    between = cosines[off] if len(cosines) > 1 else cosines.new_tensor([torch.nan])
    nearest = torch.cdist(features[live] - centre, centred).argmin(1)  # from the centre, beside which they cancel
    decision = rows.probabilities[live].argmax(1)
    full = torch.full((num_classes, num_classes), torch.nan, dtype=torch.float64)
    index = kept.nonzero().flatten().cpu()
    full[index[:, None], index] = cosines.double().cpu()
    return Collapse(
        nc1=float(ratios.sum()) / len(centred),
        nc2_norms=float(norms.std() / norms.mean()) if len(norms) > 1 else float("nan"),
        nc2_angles=float(between.std()) if len(between) > 1 else float("nan"),
        nc2_simplex=float((between + 1 / max(1, len(cosines) - 1)).abs().mean()),
        nc3=_duality(centred, kept, own),
        nc4=float((index.to(nearest)[nearest] != decision).double().mean()),
        cosines=full,
    )


def _duality(centred: Tensor, kept: Tensor, own: dict[str, Tensor]) -> float:
    """‖Wᵀ/‖W‖ − M/‖M‖‖² for a classifier W (C, D)."""
    shape = (len(kept), centred.shape[1])
    classifier = next((value for value in own.values() if tuple(value.shape) == shape), None)
    if classifier is None or not bool(kept.all()):
        return float("nan")
    return float((classifier / classifier.norm() - centred / centred.norm()).square().sum())

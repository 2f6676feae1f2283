"""Gradients as rows: the matrix A with G = AᵀA, known by its products."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from deepspectra.derivatives.products import products_of
from deepspectra.errors import LossError
from deepspectra.problem.cross_entropy import CrossEntropy
from deepspectra.problem.problem import Problem, check_problem
from deepspectra.rows.averages import positive
from deepspectra.rows.projections import Projections, num_groups


class GradientRows:
    """A with rows a_{i,k} = √w_{i,k} g_{i,k}, where g_{i,k} = J_iᵀ(p_i − y_k) and w_{i,k} = p_{i,k}/N.

    g_{i,k} is the gradient had example i been of class k; G = AᵀA exactly (Papyan 2020, JMLR 21:252,
    section 6). With class weights or label smoothing, w_{i,k} = a_i p_{i,k} / Σ ω with a_i the curvature of the
    row's loss, and the identity stays exact.

    Cost: one forward pass; memory of N × C float64.
    """

    order: Tensor | None = None  # which of the rows that batches give each row is, where it is another

    def __init__(self, problem: Problem) -> None:
        loss = labelled_loss(problem)
        self.problem = problem
        self.products = products_of(problem)
        probabilities, labels, curvature = [], [], []
        for outputs, targets in problem.row_batches():
            probabilities.append(outputs.double().softmax(-1))
            labels.append(loss.labels(targets))
            curvature.append(loss.curvature_weights(outputs, targets).double())
        self.sizes = [len(p) for p in probabilities]
        self.probabilities = torch.cat(probabilities)
        self.labels = torch.cat(labels)  # (N,) true classes
        self.curvature = torch.cat(curvature) / problem.total_weight
        self.weights = self.curvature[:, None] * self.probabilities  # (N, C) w_{i,k}, float64

    def apply(self, block: Tensor) -> Tensor:
        """A V = √w_{i,k} (p_iᵀ J_i V − (J_i V)_k): (N, C, K). Cost: .6–1 gradient a column."""
        pushed = torch.cat(self.products.push(block))
        pushed = pushed if self.order is None else pushed[self.order]
        p, root = self.probabilities.to(pushed), self.weights.sqrt().to(pushed)
        return root[:, :, None] * (torch.einsum("nc,nck->nk", p, pushed)[:, None] - pushed)

    def transpose(self, rows: Tensor) -> Tensor:
        """Aᵀ α for α (N, C, K): (P, K). Cost: .7 gradient a column."""
        scaled = self.weights.sqrt().to(rows)[:, :, None] * rows
        cotangent = _cotangent(self.probabilities, scaled)
        cotangent = cotangent if self.order is None else cotangent[self.order.argsort()]
        return self.products.pull(list(torch.split(cotangent, self.sizes)))

    def factor(self, projections: Projections, basis: Tensor) -> Tensor:
        """Aᵀ B for a basis B given in cell coordinates (C, C, r): (P, r).

        Batches of labelled examples are split by class, so a basis vector that lives on one class touches that
        class only: the C class means together cost one gradient, all cells C−1 backward passes on one forward
        pass. Other batches (tokens, forward=) take a backward pass for every column they touch.
        """
        mixed = basis * positive(projections.cell_weights).rsqrt()[:, :, None]  # (C, C, r)

        def columns(labels: Tensor) -> tuple[Tensor, Tensor]:
            (live,) = mixed[torch.unique(labels)].flatten(0, 1).any(0).nonzero(as_tuple=True)
            return mixed[..., live][labels], live

        return self._means(projections, columns, basis.shape[-1])

    def cells(self, projections: Projections, among: Sequence[int] | None = None) -> Tensor:
        """√w_ck g_ck for all cells (P, C²), or for those of some classes, one class after the other.

        Σ_k p_{i,k} g_{i,k} = 0 gives each class's heaviest cell from its others. Cost: C−1 backward passes on one
        forward pass, about 2C/3 gradients.
        """
        size = projections.num_classes
        place = {c: j for j, c in enumerate(range(size) if among is None else among)}
        root = projections.cell_weights.sqrt()
        heaviest, every = root.argmax(1), torch.arange(size, device=root.device)

        def others(labels: Tensor) -> tuple[Tensor, Tensor]:
            present = [c for c in torch.unique(labels).tolist() if c in place]
            cells = [(c, every[every != heaviest[c]]) for c in present]
            scale = root.new_zeros(len(labels), size, len(present) * (size - 1))
            for j, (c, k) in enumerate(cells):
                mine = root.new_zeros(size, size - 1)
                mine[k, range(size - 1)] = 1 / positive(root[c, k])
                scale[labels == c, :, j * (size - 1) : (j + 1) * (size - 1)] = mine
            return scale, torch.cat([place[c] * size + k for c, k in cells])

        factor = self._means(projections, others, len(place) * size, place)
        for c, j in place.items():
            k = int(heaviest[c])
            if root[c, k] > 0:
                mine = factor[:, j * size : (j + 1) * size]
                mine[:, k] = mine @ (-root[c] / root[c, k]).to(factor)
        return factor

    def coordinates(self, projections: Projections, block: Tensor) -> Tensor:
        """√w_ck g_ckᵀ v for all cells and every column v of (P, K): (C², K).

        Cost: that of `apply`; or, if there are more columns than classes, and C vectors of memory for the means of
        one class at a time, that of `cells`.
        """
        size = projections.num_classes
        if block.shape[1] > size and self.splits_by_class:
            with self.products.allowance.lent(size * block.shape[0] * block.element_size()) as granted:
                if granted:
                    block = block.to(torch.promote_types(self.problem.dtype, torch.float32))
                    return torch.cat([self.cells(projections, [c]).T @ block for c in range(size)])
        return projections.coordinates(self.apply(block)).flatten(0, 1)

    @property
    def splits_by_class(self) -> bool:
        """Whether the means of one class cost less than those of all."""
        return self.problem.splits_by_class

    def _means(
        self,
        projections: Projections,
        columns: Callable[[Tensor], tuple[Tensor, Tensor]],
        num: int,
        among: Collection[int] | None = None,
    ) -> Tensor:
        """Σ_i Σ_k w_{i,k} s_{c(i),k} g_{i,k} for columns s of cells: (P, num).

        `columns` takes a batch's labels (n,) to its columns (n, C, k) that are not zero, and which they are (k,).
        They touch no class but those `among` the given.
        """
        loss, groups = labelled_loss(self.problem), projections.groups

        def cotangent(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            p, labels = outputs.double().softmax(-1), loss.labels(targets)
            curvature = loss.curvature_weights(outputs, targets).double() / self.problem.total_weight
            mixed, live = by_single_class(columns, labels, groups)
            return _cotangent(p, (curvature[:, None] * p)[:, :, None] * mixed), live

        return self.products.pull_each(cotangent, num, groups, among)


def by_single_class(
    columns: Callable[[Tensor], tuple[Tensor, Tensor]], labels: Tensor, groups: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What `columns` gives for labels (n,), of groups or not, spread over single classes: (n, C, k), and (k,)."""
    if groups is None:
        return columns(labels)
    mixed, live = columns(groups[labels])
    return mixed[:, groups], live


def class_sums(problem: Problem, groups: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Σ_{i∈c} w_{i,c} g_{i,c} = −w_c g_c of every class (P, C), and the weights w_{c,k} (C, C), in one pass.

    With `groups` of classes, of every group.

    Cost: one gradient.
    """
    loss = labelled_loss(problem)
    single = torch.arange(problem.num_classes, device=problem.device)
    owner = single if groups is None else groups
    size = num_groups(groups, problem.num_classes)
    cells = torch.zeros(size, size, dtype=torch.float64, device=problem.device)

    def cotangent(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        p, mine = outputs.double().softmax(-1), owner[loss.labels(targets)]
        weights = loss.curvature_weights(outputs, targets).double()[:, None] * p / problem.total_weight
        by_group = weights.new_zeros(len(weights), size).index_add_(1, owner, weights)
        cells.index_add_(0, mine, by_group)
        own = weights * (owner == mine[:, None])
        live = torch.unique(mine)
        return _cotangent(p, own[:, :, None] * (mine[:, None] == live)[:, None]), live

    sums = products_of(problem).pull_each(cotangent, size, groups)
    problem.batches.group.sum(cells)
    return sums, cells


def labelled_loss(problem: Problem) -> CrossEntropy:
    """The problem's loss, if it has classes."""
    check_problem(problem)
    loss = problem.loss_function
    if not isinstance(loss, CrossEntropy):
        raise LossError(
            f"class structure needs the cross-entropy of class labels; this problem's loss is {loss.name}."
        )
    refuse_one_output(problem)
    return loss


def check_labelled(problem: Problem) -> None:
    """Raise LossError unless the loss is the cross-entropy of one class label an example. Cost: one batch forward."""
    loss = labelled_loss(problem)
    _, targets = next(problem.row_batches())
    loss.labels(targets)


def refuse_one_output(problem: Problem) -> None:
    """Raise LossError for the cross-entropy of a single output, which has no curvature."""
    if isinstance(problem.loss_function, CrossEntropy) and problem.num_classes < 2:
        raise LossError(
            "the cross-entropy of one output is zero whatever the weights, and so is G: give the model one output a "
            "class, or use loss=nn.BCEWithLogitsLoss() with targets of the outputs' shape."
        )


def _cotangent(probabilities: Tensor, scaled: Tensor) -> Tensor:
    """Σ_k s_{i,k} (p_i − y_k) for s (n, C, K): (n, C, K)."""
    return probabilities.to(scaled)[:, :, None] * scaled.sum(1, keepdim=True) - scaled

"""Gradients as rows: the matrix A with G = AᵀA, known by its products."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from deepspectra.derivatives.products import products_of
from deepspectra.derivatives.ways import Jacobian
from deepspectra.errors import LossError
from deepspectra.problem.cross_entropy import CrossEntropy
from deepspectra.problem.problem import Problem, check_problem
from deepspectra.rows.averages import positive
from deepspectra.rows.projections import Projections, num_groups, sum_by_cell

HELD_BYTES = 2**28  # of arrays of N × C float64 up to which they are held,
ROWS_BYTES = 2**28  # and of N × C × K that are projected at a time


class Piece(NamedTuple):
    """Some of the rows: softmax (n, C), labels (n,) and a_i / Σ ω (n,)."""

    probabilities: Tensor
    labels: Tensor
    curvature: Tensor

    @property
    def weights(self) -> Tensor:
        """(n, C) w_{i,k}."""
        return self.curvature[:, None] * self.probabilities

    def rows(self, pushed: Tensor) -> Tensor:
        """√w_{i,k} (p_iᵀ z_i − z_{i,k}) for z = J V (n, C, K)."""
        p, root = self.probabilities.to(pushed), self.weights.sqrt().to(pushed)
        return root[:, :, None] * (torch.einsum("nc,nck->nk", p, pushed)[:, None] - pushed)

    def cotangent(self, rows: Tensor) -> Tensor:
        """What J pulls back to Aᵀ α for α (n, C, K)."""
        return _cotangent(self.probabilities, self.weights.sqrt().to(rows)[:, :, None] * rows)


class GradientRows:
    """A with rows a_{i,k} = √w_{i,k} g_{i,k}, where g_{i,k} = J_iᵀ(p_i − y_k) and w_{i,k} = p_{i,k}/N.

    g_{i,k} is the gradient had example i been of class k; G = AᵀA exactly (Papyan 2020, JMLR 21:252,
    section 6). With class weights or label smoothing, w_{i,k} = a_i p_{i,k} / Σ ω with a_i the curvature of the
    row's loss, and the identity stays exact.

    What is asked of averages is computed batch by batch where an array of N × C numbers is more than 256 MiB.

    Attributes:
        labels: (N,) true classes.
        curvature: (N,) a_i / Σ ω, float64.

    Cost: one forward pass.
    """

    order: Tensor | None = None  # which of the rows that batches give each row is, where it is another

    def __init__(self, problem: Problem) -> None:
        loss = labelled_loss(problem)
        self.problem = problem
        self.products = products_of(problem)
        pieces = [_labels_of(problem, loss, *pair) for pair in problem.row_batches()]
        self.sizes = [len(labels) for labels, _ in pieces]
        self.labels, self.curvature = (torch.cat(column) for column in zip(*pieces, strict=True))  # (N,) each
        self.holds = 8 * len(self.labels) * problem.num_classes <= HELD_BYTES  # arrays of N × C are held

    @functools.cached_property
    def probabilities(self) -> Tensor:
        """(N, C) softmax of every row, float64. Cost: a forward pass, once."""
        return torch.cat([outputs.double().softmax(-1) for outputs, _ in self.problem.row_batches()])

    @functools.cached_property
    def weights(self) -> Tensor:
        """(N, C) w_{i,k}, float64."""
        return self.curvature[:, None] * self.probabilities

    @property
    def _all(self) -> Piece:
        return Piece(self.probabilities, self.labels, self.curvature)

    def _piece(self, outputs: Tensor, targets: Tensor) -> Piece:
        loss = labelled_loss(self.problem)
        return Piece(outputs.double().softmax(-1), *_labels_of(self.problem, loss, outputs, targets))

    def projections(self, first: str = "class", groups: Tensor | None = None) -> Projections:
        """The averages over classes, or over groups of them. Cost: where arrays are not held a forward pass."""
        if self.holds:
            return Projections(self.weights, self.labels, first=first, groups=groups)
        pieces = (self._piece(*pair) for pair in self.problem.row_batches())
        cells = sum(sum_by_cell(piece.weights, piece.labels, groups) for piece in pieces)
        assert isinstance(cells, Tensor)
        return Projections.of_cells(cells, first=first, groups=groups)

    def apply(self, block: Tensor) -> Tensor:
        """A V = √w_{i,k} (p_iᵀ J_i V − (J_i V)_k): (N, C, K). Cost: .6–1 gradient a column."""
        pushed = torch.cat(self.products.push(block))
        return self._all.rows(pushed if self.order is None else pushed[self.order])

    def transpose(self, rows: Tensor) -> Tensor:
        """Aᵀ α for α (N, C, K): (P, K). Cost: .7 gradient a column."""
        cotangent = self._all.cotangent(rows)
        cotangent = cotangent if self.order is None else cotangent[self.order.argsort()]
        return self.products.pull(list(torch.split(cotangent, self.sizes)))

    def _met(self, projections: Projections, block: Tensor) -> tuple[Tensor, Tensor]:
        """⟨b_{c,k}, A v⟩ (C, C, K), and ‖A v‖² (K,), float64, batch by batch."""
        size, num = projections.num_classes, block.shape[1]
        cells = torch.zeros(size, size, num, dtype=torch.float64, device=self.problem.device)
        squares = cells.new_zeros(num)
        with self.products.group.summing(cells, squares):
            for jacobian, columns, pushed in self.products.pushed(block):
                piece = self._piece(jacobian.outputs, jacobian.targets)
                rows = piece.rows(pushed).double()
                cells[..., columns] += projections.of_rows(piece.weights, piece.labels).coordinates(rows)
                squares[columns] += rows.square().sum((0, 1))
        return cells, squares

    def combine(self, projections: Projections, cells: Tensor) -> Tensor:
        """Aᵀ of what has these coordinates (C, C, K) in cells: (P, K). Cost: .7 gradient a column."""
        if projections.has_rows:
            return self.transpose(projections.expand(cells))

        def make(jacobian: Jacobian, columns: slice) -> Tensor:
            piece = self._piece(jacobian.outputs, jacobian.targets)
            return piece.cotangent(projections.of_rows(piece.weights, piece.labels).expand(cells[..., columns]))

        return self.products.pull_made(make, cells.shape[-1])

    def project(self, projections: Projections, part: str, block: Tensor) -> Tensor:
        """AᵀΠA V for the projection Π of a part: (P, K). Cost: about a product with G a column; within two."""
        if projections.has_rows:
            return self.transpose(projections.project(part, self.apply(block)))
        cells = self._met(projections, block)[0].to(block)
        if part != "within":
            return self.combine(projections, projections.project_cells(part, cells))
        whole = self.products.sandwich(self.problem.loss_function.curvatures, block) / self.problem.total_weight
        return whole - self.combine(projections, cells)

    def squared_norms(self, projections: Projections, block: Tensor, parts: tuple[str, ...]) -> Tensor:
        """‖Π A v‖² for each part and column of a block (P, K): (parts, K). Cost: .6–1 gradient a column."""
        if not projections.has_rows:
            cells, squares = self._met(projections, block)
            return projections.squared_norms_of(cells, squares, parts)
        return torch.cat([projections.squared_norms(rows, parts) for rows in self._few(block)], 1)

    def _few(self, block: Tensor) -> Iterator[Tensor]:
        """A V, a few columns at a time."""
        width = max(1, ROWS_BYTES // (8 * self.weights.numel()))
        return (self.apply(columns) for columns in torch.split(block, width, 1))

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
        if projections.has_rows:
            return torch.cat([projections.coordinates(rows) for rows in self._few(block)], 2).flatten(0, 1)
        return self._met(projections, block)[0].to(block).flatten(0, 1)

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
        groups = projections.groups

        def cotangent(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Callable[[slice], Tensor]]:
            piece = self._piece(outputs, targets)
            mixed, live = columns(piece.labels if groups is None else groups[piece.labels])

            def make(some: slice) -> Tensor:
                spread = mixed[..., some] if groups is None else mixed[..., some][:, groups]
                return _cotangent(piece.probabilities, piece.weights[:, :, None] * spread)

            return live, make

        return self.products.pull_each(cotangent, num, groups, among)


def _labels_of(problem: Problem, loss: CrossEntropy, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Labels (n,) and a_i / Σ ω (n,) of some rows."""
    return loss.labels(targets), loss.curvature_weights(outputs, targets).double() / problem.total_weight


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

    def cotangent(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Callable[[slice], Tensor]]:
        p, mine = outputs.double().softmax(-1), owner[loss.labels(targets)]
        weights = loss.curvature_weights(outputs, targets).double()[:, None] * p / problem.total_weight
        by_group = weights.new_zeros(len(weights), size).index_add_(1, owner, weights)
        cells.index_add_(0, mine, by_group)
        own = weights * (owner == mine[:, None])
        live = torch.unique(mine)
        return live, lambda some: _cotangent(p, own[:, :, None] * (mine[:, None] == live[some])[:, None])

    sums = products_of(problem).pull_each(cotangent, size, groups)
    problem.batches.group.sum(cells)
    return sums, cells


def labelled_loss(problem: Problem) -> CrossEntropy:
    """The problem's loss, if it has classes."""
    check_problem(problem)
    loss = problem.loss_function
    if not isinstance(loss, CrossEntropy):
        raise LossError(
            f"class structure needs the cross-entropy of class labels; this problem's loss is {loss.name}. "
            "Its spectra are there without: analyze, eigenpairs, density, trace, kronecker."
        )
    refuse_one_output(problem)
    return loss


def check_labelled(problem: Problem) -> None:
    """Raise LossError unless the loss is the cross-entropy of one class label an example. Cost: one batch forward."""
    loss = labelled_loss(problem)
    _, targets = next(problem.row_batches())
    loss.labels(targets)


def has_labels(problem: Problem) -> bool:
    """Whether the loss is the cross-entropy of one class label a row. Cost: one batch forward."""
    try:
        check_labelled(problem)
    except LossError:
        return False
    return True


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

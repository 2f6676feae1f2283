"""The one idea: averages over the indices of an array (example i, true class c, potential class k).

Rows a_{i,k} = √w_{i,k} g_{i,k} make a matrix A with AᵀA = Σ w g gᵀ. Averaging the rows over some of their
indices is an orthogonal projection Π of sample space R^{N×C}, with weights in the unit vectors:

    b_{c,k} ∝ √w_{i,k}  on {i ∈ c, k}        one a cell (c, k)
    b_c     ∝ √w_{i,k}  on {i ∈ c, k ≠ c}    one a class
    b'_k    ∝ √w_{i,k}  on {i ∉ k, k}        one a logit

    true         cells (c, c)
    class        span of the b_c
    logit        span of the b'_k, made orthogonal to the b_c
    interaction  the other cells (c, k ≠ c): cross without logit
    within       what no average reaches

They are mutually orthogonal and sum to the identity, so AᵀA = Σ AᵀΠA splits exactly into positive
semi-definite parts, whatever the rows are: gradients, features or errors. The published four parts (Papyan 2019
arXiv 1901.08244; 2020, JMLR 21:252, section 6) have cross = logit + interaction. Two-way effects do not commute
exactly: `first` says whether class or logit keeps what both could explain.

With many classes c and k may stand for groups of classes: then a cell is all of one group's examples and another
group's potential classes, and all of the above holds as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from deepspectra.errors import OptionError
from deepspectra.problem.memory_budget import free_memory, refuse_beyond
from deepspectra.rows.averages import Averages, positive

FOUR_WAY = ("class", "cross", "within", "true")
TWO_WAY = ("class", "logit", "interaction", "within", "true")
RANK_TOLERANCE = 1e-9
Groups = Tensor | Sequence[int] | Callable[[int], Any]  # the group of each class, or a function that gives it


class Projections:
    """The projections of sample space for given weights and labels.

    Those of some rows alone, `of_rows`, are what these add to the same averages, so that rows can be taken batch by
    batch: coordinates add up.

    Args:
        weights: (N, C) w_{i,k} ≥ 0.
        labels: (N,) true class of each row.
        first: "class" or "logit", the effect that takes the overlap of the two.
        groups: (C,) the group of each class; by default each is its own.

    Attributes:
        num_classes: how many groups there are; below, C is that number.
        cell_weights: (C, C) w_{c,k} = Σ_{i∈c} w_{i,k}.
        class_weights: (C,) w_c = Σ_{k≠c} w_{c,k}.
        logit_weights: (C,) Σ_{c≠k} w_{c,k}.
        by_class, by_logit: (C, C) b_c and b'_k over cells: √w_c g_c = Σ_k by_class[c, k] √w_{c,k} g_{c,k}.

    Cost: arrays of N × C × K numbers; no parameter-sized vector is touched.
    """

    _labels: Tensor | None  # class or group of each row at hand
    _unit: Tensor

    def __init__(
        self, weights: Tensor, labels: Tensor, *, first: str = "class", groups: Tensor | None = None
    ) -> None:
        self._settle(sum_by_cell(weights.double(), labels, groups), first, groups)
        self._take(weights, labels)

    @classmethod
    def of_cells(cls, cell_weights: Tensor, *, first: str = "class", groups: Tensor | None = None) -> Projections:
        """Those of rows that are not at hand, from w_{c,k} (C, C)."""
        found = cls.__new__(cls)
        found._settle(cell_weights, first, groups)
        return found

    def of_rows(self, weights: Tensor, labels: Tensor) -> Projections:
        """The same averages over all rows, seen from some of them."""
        found = copy.copy(self)
        found._take(weights, labels)
        return found

    @property
    def has_rows(self) -> bool:
        """Whether they were given with their rows."""
        return self._labels is not None

    def owners(self, labels: Tensor) -> Tensor:
        """The class of each label, or its group."""
        return labels if self.groups is None else self.groups[labels]

    def _take(self, weights: Tensor, labels: Tensor) -> None:
        self._labels = self.owners(labels)
        # α_{i,k} = √(w_{i,k}/w_{c,k}) β_{c,k} carries a cell coordinate to its rows, and back
        self._unit = (weights.double() / self._by_row(positive(self.cell_weights))).sqrt()

    def _settle(self, cell_weights: Tensor, first: str, groups: Tensor | None) -> None:
        if first not in ("class", "logit"):
            raise OptionError(f"first={first!r}; it is 'class' or 'logit'.")
        self.first, self.groups = first, groups
        self.num_classes = len(cell_weights)
        self.cell_weights = cell_weights
        self._root = self.cell_weights.sqrt()
        self._labels = None
        off = self.cell_weights.clone().fill_diagonal_(0)
        self.class_weights, self.logit_weights = off.sum(1), off.sum(0)
        self.by_class = off.sqrt() / positive(self.class_weights).sqrt()[:, None]
        self.by_logit = off.sqrt() / positive(self.logit_weights).sqrt()
        self._mixing = self.by_class * self.by_logit  # ⟨b_c, b'_k⟩
        self._logit_mix = self._orthogonal_to(self._mixing if first == "class" else self._mixing.T)

    def _orthogonal_to(self, mixing: Tensor) -> Tensor:
        """Q (C, r) such that the second effect's unit vectors, freed of the first's, times Q are orthonormal."""
        size = self.logit_weights if self.first == "class" else self.class_weights
        gram = torch.diag((size > 0).to(mixing)) - mixing.T @ mixing
        values, vectors = torch.linalg.eigh(gram)
        kept = values > RANK_TOLERANCE
        scaled: Tensor = vectors[:, kept] / values[kept].sqrt()
        return scaled

    # -- between rows and cells ------------------------------------------------------------------------------

    def coordinates(self, rows: Tensor) -> Tensor:
        """⟨b_{c,k}, α⟩ for α (N, C, K): (C, C, K)."""
        return self._by_cell(self._unit.to(rows)[:, :, None] * rows)

    def expand(self, cells: Tensor) -> Tensor:
        """Σ_{c,k} b_{c,k} β_{c,k} for β (C, C, K): (N, C, K)."""
        return self._unit.to(cells)[:, :, None] * self._by_row(cells)

    def _by_cell(self, rows: Tensor) -> Tensor:
        """Sums over the rows of each cell: (N, C', ...) of single classes to (C, C, ...)."""
        assert self._labels is not None
        return _sum_by(rows, self._labels, self.groups, self.num_classes)

    def _by_row(self, cells: Tensor) -> Tensor:
        """The cell of each row: (C, C, ...) to (N, C', ...)."""
        found = cells[self._labels]
        return found if self.groups is None else found[:, self.groups]

    # -- the projections -------------------------------------------------------------------------------------

    def project(self, part: str, rows: Tensor) -> Tensor:
        """Π_part α for α (N, C, K)."""
        if part == "within":
            return rows - self.expand(self.coordinates(rows))
        return self.expand(self.project_cells(part, self.coordinates(rows)))

    def project_cells(self, part: str, cells: Tensor) -> Tensor:
        """Π_part on cell coordinates β (C, C, K); "within" has none there."""
        if part in ("class", "logit", "true"):
            basis = self.basis(part).to(cells)
            return torch.einsum("ckr,rm->ckm", basis, torch.einsum("ckr,ckm->rm", basis, cells))
        others = {"cross": ("class", "true"), "interaction": ("class", "logit", "true")}
        if part not in others:
            raise OptionError(f"unknown part {part!r}; there are {', '.join(dict.fromkeys(FOUR_WAY + TWO_WAY))}.")
        return cells - sum((self.project_cells(other, cells) for other in others[part]), torch.zeros_like(cells))

    def squared_norms(self, rows: Tensor, parts: tuple[str, ...]) -> Tensor:
        """|Π_part α|² for every part, (parts, K): the analysis of variance of α (N, C, K)."""
        cells = self.coordinates(rows.double())
        within = (rows.double() - self.expand(cells)).square().sum((0, 1))
        return self.squared_norms_of(cells, within + cells.square().sum((0, 1)), parts)

    def squared_norms_of(self, cells: Tensor, squares: Tensor, parts: tuple[str, ...]) -> Tensor:
        """The same from coordinates (C, C, K) and |α|² (K,), of which "within" is the rest."""
        norms = {part: self.project_cells(part, cells).square().sum((0, 1)) for part in parts if part != "within"}
        norms["within"] = squares - cells.square().sum((0, 1))
        return torch.stack([norms[part] for part in parts])

    def averages(self, parts: tuple[str, ...], reduce: Callable[[Tensor], Tensor]) -> Averages:
        """Bases (R, r) over rows in other coordinates, into which `reduce` takes each example's (N, C, r)."""

        def rows(part: str) -> Tensor:
            return reduce(self.expand(self.basis(part))).flatten(0, 1)

        names = [part for part in parts if part != "within"]
        return Averages({name: rows(name) for name in names}, rows("means"), parts, self.first)

    def basis(self, part: str) -> Tensor:
        """B (C, C, r) with Π = BBᵀ in cell coordinates: of orthonormal columns for "class", "logit" and "true".

        "means" is all cells, r = C²; "cross" and "interaction" are C² columns of smaller rank.

        Raises:
            MemoryBudgetError: those C⁴ numbers do not fit what is free.
        """
        if part in ("means", "cross", "interaction"):
            size, device = self._root.element_size() * self.num_classes**4, self._root.device
            what = f"all pairs of {self.num_classes:,} classes as columns take"
            refuse_beyond(size, free_memory(device), what, "Put classes together with groups=.")
            cells = torch.eye(self.num_classes**2, dtype=self._root.dtype, device=device)
            cells = cells.view(self.num_classes, self.num_classes, -1)
            return cells if part == "means" else self.project_cells(part, cells)
        eye = torch.eye(self.num_classes, dtype=self._root.dtype, device=self._root.device)
        by_class = self.by_class[:, :, None] * eye[:, None, :]
        by_logit = self.by_logit[:, :, None] * eye[None, :, :]
        if part == "true":
            return eye[:, :, None] * eye[:, None, :]
        if part == self.first:
            basis = by_class if part == "class" else by_logit
            return basis[:, :, basis.square().sum((0, 1)) > 0]
        if part == "logit":
            return (by_logit - torch.einsum("ckd,dr->ckr", by_class, self._mixing)) @ self._logit_mix
        if part == "class":
            return (by_class - torch.einsum("ckd,rd->ckr", by_logit, self._mixing)) @ self._logit_mix
        raise OptionError(f"{part!r} has no basis of cells.")


def sum_by_cell(rows: Tensor, labels: Tensor, groups: Tensor | None) -> Tensor:
    """Sums of (N, C', ...) over the rows of each label, or of its group, and over potential classes: (C, C, ...)."""
    owners = labels if groups is None else groups[labels]
    return _sum_by(rows, owners, groups, num_groups(groups, rows.shape[1]))


def _sum_by(rows: Tensor, owners: Tensor, groups: Tensor | None, size: int) -> Tensor:
    if groups is not None:
        rows = rows.new_zeros(len(rows), size, *rows.shape[2:]).index_add_(1, groups, rows)
    return rows.new_zeros(size, *rows.shape[1:]).index_add_(0, owners, rows)


def collinear(cell_weights: Tensor) -> tuple[Tensor, Tensor]:
    """1/√w_c and 1/√w_cc of every class (C,), 0 for an absent one: the class and the true mean from one sum.

    Σ_k p_{i,k} g_{i,k} = 0 for each example, so w_c g_c = −w_cc g_cc = −Σ_{i∈c} w_{i,c} g_{i,c}. That sum times the
    one is √w_c g_c, but for its sign, and times the other √w_cc g_cc.
    """
    own = cell_weights.diagonal()
    classes = cell_weights.clone().fill_diagonal_(0).sum(1)
    there = (own > 0) & (classes > 0)
    return positive(classes).rsqrt() * there, positive(own).rsqrt() * (own > 0)


def numbered(groups: Callable[[int], Any], num_classes: int) -> tuple[list[int], list[str]]:
    """The number of each class's group, of those that a function of the class gives, in order, and their names."""
    given = [groups(c) for c in range(num_classes)]
    found = sorted(set(given), key=lambda one: (str(type(one)), one))
    return [found.index(one) for one in given], [str(one) for one in found]


def grouped(groups: Groups | None, num_classes: int, device: torch.device) -> Tensor | None:
    """Checked groups of classes (C,) on a device."""
    if groups is None:
        return None
    if callable(groups):
        groups, _ = numbered(groups, num_classes)
    try:
        found = torch.as_tensor(groups)
    except (TypeError, ValueError, RuntimeError):
        found = torch.empty(0)
    if found.shape != (num_classes,) or found.is_floating_point() or int(found.min()) < 0:
        given = f"shape {tuple(found.shape)}, {found.dtype}" if found.numel() else repr(groups)
        raise OptionError(f"groups must be {num_classes:,} integers from 0 on, the group of each class; got {given}.")
    if not int(found.max()):
        raise OptionError("groups puts all classes into one, and then nothing is between groups; give two at least.")
    missing = set(range(int(found.max()) + 1)) - set(found.tolist())
    if missing:
        raise OptionError(f"groups must be numbered without gaps; no class is in {sorted(missing)[:5]}.")
    return found.long().to(device)


def num_groups(groups: Tensor | None, num_classes: int) -> int:
    """How many groups there are; without, each class is its own."""
    return num_classes if groups is None else int(groups.max()) + 1

"""Averages of any rows by name, whoever made them: of gradients, of features, of errors, or in other coordinates.

The second moment of rows X is XᵀX. An average over some of them is a projection Π = BBᵀ of sample space, and its
part of the moment is XᵀΠX = F Fᵀ with F = XᵀB, whose columns are the weighted means √w x̄. What is said of averages is
said here, once for all: the means that they are (`means_of`), what they leave (`Averages.project`), and what goes
with what when a part is knocked out (`taken`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deepspectra.errors import OptionError

WIDE = ("within", "residual")  # span too much to be projected out
METHODS = ("subtraction", "projection")


@dataclass(frozen=True, eq=False)
class Averages(Mapping[str, Tensor]):
    """Orthogonal projections Π = BBᵀ by name, as B (R, r) over R rows.

    Attributes:
        bases: name → B; columns need not be orthonormal, as long as Π is a projection.
        every: (R, m) whose B Bᵀ is the sum of all Π.
        parts: the names, and "within", which is what all of them leave.
        first: the effect that came first in their making, as in `decompose`.
    """

    bases: Mapping[str, Tensor]
    every: Tensor
    parts: tuple[str, ...]
    first: str = "class"

    @classmethod
    def of_members(cls, member: Tensor) -> Averages:
        """Averages "mean", over all rows, and "class", over classes about it.

        Args:
            member: (n, C) 1 where a row is of a class, all zero for one that does not count.
        """
        by_class = member / positive(member.sum(0)).sqrt()
        mean = (member.sum(1) / positive(member.sum()).sqrt())[:, None]
        bases = {"mean": mean, "class": by_class - mean @ (mean.T @ by_class)}
        return cls(bases, by_class, (*bases, "within"))

    def __getitem__(self, name: str) -> Tensor:
        return self.bases[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.bases)

    def __len__(self) -> int:
        return len(self.bases)

    def map(self, change: Callable[[Tensor], Tensor]) -> Averages:
        """The same averages in other coordinates, such as F = XᵀB of rows X."""
        bases = {name: change(basis) for name, basis in self.items()}
        return Averages(bases, change(self.every), self.parts, self.first)

    def at(self, rows: Tensor) -> Averages:
        """Of these rows alone: of the same averages, where all others are zero."""
        return self.map(lambda basis: basis[rows])

    def project(self, part: str, rows: Tensor) -> Tensor:
        """Π α for α (R, K)."""
        basis = (self.every if part == "within" else self[part]).to(rows)
        inside = basis @ (basis.T @ rows)
        return rows - inside if part == "within" else inside

    def together(self, names: Sequence[str]) -> Tensor:
        """The bases of some averages side by side (R, ·): B Bᵀ is the sum of their projections."""
        if set(self) <= set(names):
            return self.every
        return torch.cat([self.every[:, :0], *(self[name] for name in self if name in names)], 1)


def means_of(factor: Tensor, weights: Tensor) -> Tensor:
    """The means x̄ (D, ...) of which a factor F = XᵀB (D, ...) has √w x̄; zero where w (...) is, up to rounding."""
    root = weights.sqrt().to(factor)
    return factor * ((root > 0) / positive(root))


def positive(weights: Tensor) -> Tensor:
    """Weights with zeros replaced by one: an absent class divides nothing by one."""
    return weights.where(weights > 0, 1)


def taken(
    removed: Sequence[str], parts: Sequence[str], *, first: str = "class", method: str = "subtraction"
) -> tuple[str, ...]:
    """The parts that go when some are knocked out, by subtraction and by projection alike.

    * "class" takes "true" with it. Σ_k p_{i,k} g_{i,k} = 0 for each example, so w_{c,c} g_{c,c} = −w_c g_c: both are
      made of the same vectors g_c, and G_class + G_true = Σ_c w_c (1 + w_c/w_{c,c}) g_c g_cᵀ. Without class alone
      w_c/w_{c,c} times as much would stand where it stood: C − 1 times at initialisation. With first="logit" class
      is only what the logit means leave of the g_c, and true goes when both go.
    * "true" is true alone (to project it out is to project class out too: they span the same).
    * "cross" is "logit" and "interaction" where it is split in two.
    * "means" is all but "within" and "residual".

    All of it holds for errors, for one layer's gradients and for groups of classes; features have no potential
    class, and no true. Each part that goes is named once, in the order of `parts`.

    Raises:
        OptionError: nothing is removed, a part that there is not, one that cannot be projected out, or an unknown
            method.
    """
    if method not in METHODS:
        raise OptionError(f"method={method!r}; it is 'subtraction' or 'projection'.")
    averages = [name for name in parts if name not in WIDE]
    sums = {"means": averages}
    if "interaction" in parts:
        sums["cross"] = ["logit", "interaction"]
    known = [*averages, *sums, *(name for name in parts if name in WIDE and method == "subtraction")]
    if not removed or not set(removed) <= set(known):
        raise OptionError(f"removed={tuple(removed)}: name some of {', '.join(known)}.")
    gone = {part for name in removed for part in sums.get(name, [name])}
    if gone >= ({"class"} if first == "class" else {"class", "logit"}):
        gone.add("true")
    return tuple(name for name in parts if name in gone)

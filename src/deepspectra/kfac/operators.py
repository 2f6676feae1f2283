"""Kronecker-factored operators: sums of products, diagonals between rotations, and all blocks of a network."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from deepspectra.errors import CurvatureError, MemoryBudgetError, OptionError
from deepspectra.kfac.exact_blocks import ParameterBlock
from deepspectra.operators.base import Operator

LARGEST_SUM = 4096  # rows of a sum of several products whose eigenvalues are found densely


class KroneckerSum(Operator):
    """Σ_r S_r ⊗ A_r on matrices (o, d) in row-major order: X ↦ Σ_r S_r X A_r; several groups are several blocks.

    S is (terms, groups, o, o) and A (terms, groups, d, d), or (terms, groups, d) where all are diagonal.
    """

    def __init__(self, left: Tensor, right: Tensor, dtype: torch.dtype, name: str) -> None:
        self.left, self.right = left.to(dtype), right.to(dtype)
        self.groups_shape = (left.shape[1], left.shape[2], right.shape[2])
        size = left.shape[1] * left.shape[2] * right.shape[2]
        super().__init__(size, dtype=dtype, device=left.device, name=name)

    def _apply(self, block: Tensor) -> Tensor:
        matrices = block.T.reshape(-1, *self.groups_shape)
        total = torch.zeros_like(matrices)
        for left, right in zip(self.left, self.right, strict=True):
            half = left @ matrices
            total += half * right[:, None] if right.ndim == 2 else half @ right
        return total.flatten(1).T

    @property
    def trace(self) -> float:
        """Σ_r tr S_r tr A_r."""
        right = self.right if self.right.ndim == 3 else self.right.diagonal(dim1=2, dim2=3)
        left = self.left.diagonal(dim1=2, dim2=3)
        return float((left.double().sum(2) * right.double().sum(2)).sum())

    @property
    def norm(self) -> float:
        """‖·‖_F, from Σ_rs ⟨S_r, S_s⟩ ⟨A_r, A_s⟩."""
        left, right = self.left.double().flatten(2), self.right.double().flatten(2)
        products = torch.einsum("rgi,sgi->rsg", left, left) * torch.einsum("rgi,sgi->rsg", right, right)
        return float(products.sum().clamp_min(0).sqrt())

    @functools.cached_property
    def decomposed(self) -> Rotated:
        """The same with eigenvectors, of a single product.

        Raises:
            CurvatureError: a sum of several, which has no closed form.
        """
        if len(self.left) != 1:
            raise CurvatureError(
                f"{self.name} is a sum of {len(self.left)} Kronecker products and has no eigenvectors or inverse in "
                "closed form. Use 'kfac' or 'ekfac', or solve by conjugate gradients with its products."
            )
        left, U = torch.linalg.eigh(self.left[0].double())
        if self.right.ndim == 3:
            right, V = self.right[0].double(), None
        else:
            right, V = torch.linalg.eigh(self.right[0].double())
        values = left.clamp_min(0)[:, :, None] * right.clamp_min(0)[:, None]
        return Rotated(U, V, values, self.dtype, self.name)

    def eigenvalues(self) -> Tensor:
        """All, descending, float64.

        Raises:
            MemoryBudgetError: a sum of several products with more than 4,096 rows.
        """
        if len(self.left) == 1:
            return self.decomposed.eigenvalues()
        if self.shape[0] > LARGEST_SUM:
            raise MemoryBudgetError(
                f"{self.name} has {self.shape[0]:,} rows, and the eigenvalues of a sum of Kronecker products are "
                f"found densely up to {LARGEST_SUM:,}. Use eigenpairs and density with its products."
            )
        values: Tensor = torch.linalg.eigvalsh(self.dense().double()).flip(0)
        return values

    def inverse(self, damping: float) -> Rotated:
        """(· + δ I)⁻¹; of a single product."""
        return self.decomposed.inverse(damping)


class Rotated(Operator):
    """(U ⊗ V) diag(D) (U ⊗ V)ᵀ on matrices (o, d) in row-major order: X ↦ U (D ∘ UᵀXV) Vᵀ.

    U is (groups, o, o), V (groups, d, d), or None for the identity, and D (groups, o, d).
    """

    def __init__(self, left: Tensor, right: Tensor | None, diagonal: Tensor, dtype: torch.dtype, name: str) -> None:
        self.left = left.to(dtype)
        self.right = None if right is None else right.to(dtype)
        self.diagonal = diagonal
        super().__init__(diagonal.numel(), dtype=dtype, device=left.device, name=name)

    def _apply(self, block: Tensor) -> Tensor:
        matrices = self.left.mT @ block.T.reshape(-1, *self.diagonal.shape)
        if self.right is not None:
            matrices = matrices @ self.right
        return self._rotated(matrices * self.diagonal.to(matrices))

    def _rotated(self, matrices: Tensor) -> Tensor:
        """U X Vᵀ of matrices (K, groups, o, d): (n, K)."""
        matrices = self.left @ matrices
        return (matrices if self.right is None else matrices @ self.right.mT).flatten(1).T

    @property
    def trace(self) -> float:
        """Σ D."""
        return float(self.diagonal.sum())

    @property
    def norm(self) -> float:
        """‖·‖_F = ‖D‖_F."""
        return float(self.diagonal.norm())

    @property
    def decomposed(self) -> Rotated:
        """Itself."""
        return self

    def eigenvalues(self) -> Tensor:
        """All, descending, float64."""
        return self.diagonal.flatten().sort(descending=True).values

    def top(self, num: int) -> tuple[Tensor, Tensor]:
        """The largest eigenvalues (num,) and their vectors u_i ⊗ v_j (n, num)."""
        values, chosen = self.diagonal.flatten().topk(num)
        basis = torch.zeros(self.shape[0], num, dtype=self.dtype, device=self.device)
        basis[chosen, range(num)] = 1
        return values, self._rotated(basis.T.reshape(-1, *self.diagonal.shape))

    def inverse(self, damping: float) -> Rotated:
        """(· + δ I)⁻¹."""
        inverted = 1 / (self.diagonal + check_damping(damping))
        return Rotated(self.left, self.right, inverted, self.dtype, f"({self.name} + {damping:g} I)⁻¹")


Block = KroneckerSum | Rotated


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
        places: Mapping[str, ParameterBlock],
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


def check_damping(damping: float) -> float:
    """A positive number."""
    if not damping > 0:
        raise OptionError(f"damping={damping!r} must be positive.")
    return float(damping)

"""The Hessian layer by layer: where its blocks are those of G, and their spectra where they are not."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from deepspectra.algorithms.density import density
from deepspectra.algorithms.eigenpairs import eigenpairs
from deepspectra.algorithms.estimates import trace
from deepspectra.analysis.gram_spectrum import GramSpectrum
from deepspectra.argument_checks import LayerProgress, seeded
from deepspectra.operators.curvature import Hessian, HessianBlock, Residual
from deepspectra.problem.problem import Problem
from deepspectra.quadrature import Density
from deepspectra.rows.captures import parameters_of

CHECKS = 2  # random vectors by which R's blocks are seen to be zero or not
ROUNDING = 100  # times ε, below which R's block is zero
RTOL = 1e-2  # of eigenpairs
PROBES, STEPS = 2, 24  # of densities
TRACE_PRODUCTS = 16


@dataclass(frozen=True)
class LayerHessian:
    """The spectrum of one layer's diagonal block of the Hessian.

    Where the outputs are linear in the layer's own parameters (piecewise linear networks without sharing of
    weights) the residual's block is zero and the Hessian's is that of G, whose exact spectrum this then is.

    Attributes:
        residual: ‖R‖_F/‖G‖_F of the blocks, estimated from 2 random vectors; 0 up to rounding, ∞ where
            only G's is zero.
        values: (K,) largest eigenvalues, descending.
        residual_norms: (K,) ‖H v − λ v‖, measured; 0 where G's block was taken.
        trace: of the block.
        trace_standard_error: of `trace`.
        density: of its eigenvalues.
        num_products: with the block, spent on all of it.
    """

    residual: float
    values: Tensor
    residual_norms: Tensor
    trace: float
    trace_standard_error: float
    density: Density
    num_products: int

    @property
    def smallest(self) -> float:
        """The lowest node of the density."""
        return float(self.density.nodes.min())

    @property
    def is_gauss_newton(self) -> bool:
        """Whether the block is G's, up to rounding."""
        return not self.num_products


def layer_hessians(
    problem: Problem,
    gradients: Mapping[str, GramSpectrum],
    num: int,
    *,
    seed: int = 0,
    progress: LayerProgress | None = None,
) -> dict[str, LayerHessian]:
    """Spectra of every layer's block of H, `num` eigenvalues of each, given the exact spectra of G's blocks.

    Raises:
        CurvatureError: the network cannot be differentiated twice.

    Cost: one pass that builds second-order graphs; for each layer whose outputs are not linear in its
        parameters, about 100 products with its block, of graphs that all layers share.

    Source: Wu et al. 2020, arXiv 2010.04261, section 3, for layer-wise Hessians of piecewise linear networks.
    """
    owned = {layer: list(parameters_of(problem, layer)) for layer in gradients}
    sizes = _residual_sizes(problem, owned, gradients, seed)
    eps = torch.finfo(torch.promote_types(problem.dtype, torch.float32)).eps
    hessian = Hessian(problem)
    hessian.products.release()  # R's graphs
    found = {}
    for done, (layer, spectrum) in enumerate(gradients.items()):
        if sizes[layer] <= ROUNDING * eps:
            found[layer] = _same(spectrum, sizes[layer], num)
            continue
        if progress is not None:
            progress(done, len(gradients), f"{layer} of H")
        found[layer] = _measured(HessianBlock(hessian, owned[layer]), sizes[layer], num, seed)
    hessian.products.release()
    return found


def _residual_sizes(
    problem: Problem, owned: Mapping[str, list[str]], gradients: Mapping[str, GramSpectrum], seed: int
) -> dict[str, float]:
    """‖R‖_F/‖G‖_F of each layer's blocks; 0 if both are zero, ∞ if only G's is."""
    generator = seeded(seed)
    blocks = []
    for names in owned.values():
        size = sum(problem.parameters[name].numel() for name in names)
        blocks.append((names, torch.randn(size, CHECKS, generator=generator).to(problem.device)))
    products = Residual(problem).diagonal_blocks(blocks)
    found = {}
    for layer, product in zip(owned, products, strict=True):
        size, whole = float(product.double().norm()) / CHECKS**0.5, float(gradients[layer].values.norm())
        found[layer] = size / whole if whole else math.inf if size else 0.0
    return found


def _same(spectrum: GramSpectrum, residual: float, num: int) -> LayerHessian:
    values = spectrum.values[:num]
    return LayerHessian(
        residual=residual,
        values=values,
        residual_norms=torch.zeros_like(values),
        trace=float(spectrum.values.sum()),
        trace_standard_error=0.0,
        density=spectrum.density,
        num_products=0,
    )


def _measured(block: HessianBlock, residual: float, num: int, seed: int) -> LayerHessian:
    pairs = eigenpairs(block, min(num, block.shape[0]), rtol=RTOL, seed=seed)
    spectrum = density(block, PROBES, STEPS, deflate=pairs, seed=seed)
    total = trace(block, TRACE_PRODUCTS, seed=seed)
    return LayerHessian(
        residual=residual,
        values=pairs.values.cpu(),
        residual_norms=pairs.residual_norms.cpu(),
        trace=total.value,
        trace_standard_error=total.standard_error,
        density=spectrum,
        num_products=pairs.num_products + spectrum.num_products + total.num_products,
    )

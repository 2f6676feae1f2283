"""What results are held against: products in float64, distances between spectra, and the arithmetic's bound."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cases import BATCH, Case

FLOOR = 1e-6  # of the largest |λ|: what is less is zero, as it is drawn


def products(case: Case, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """H V and G V in float64, one vector and one batch at a time, from the definitions."""
    model = copy.deepcopy(case.model).double()
    parameters = list(model.parameters())
    sizes = [p.numel() for p in parameters]
    hessian, gauss_newton = (torch.zeros(vectors.shape, dtype=torch.float64) for _ in range(2))
    for x, y in case.batches:
        with sdpa_kernel(SDPBackend.MATH):
            z = model(x.double())
            loss = nn.functional.cross_entropy(z, y, reduction="sum")
            gradient = flat(torch.autograd.grad(loss, parameters, create_graph=True))
            u = torch.zeros_like(z, requires_grad=True)
            transposed = flat(torch.autograd.grad(z, parameters, u, create_graph=True))  # Jᵀu, linear in u
            p = z.detach().softmax(1)
            for j, v in enumerate(vectors.double().T):
                hessian[:, j] += flat(torch.autograd.grad(gradient, parameters, v, retain_graph=True))
                (push,) = torch.autograd.grad(transposed, u, v, retain_graph=True)
                bent = p * (push - (p * push).sum(1, keepdim=True))
                gauss_newton[:, j] += flat(torch.autograd.grad(z, parameters, bent, retain_graph=True))
    assert sum(sizes) == len(vectors)
    return hessian / len(case.y), gauss_newton / len(case.y)


def flat(parts: tuple[Tensor, ...]) -> Tensor:
    """One vector of one tensor a parameter."""
    return torch.cat([part.reshape(-1) for part in parts])


def error(found: Tensor, exact: Tensor) -> float:
    """Relative error in the Euclidean norm."""
    return float((found.double().reshape(exact.shape) - exact).norm() / exact.norm())


def bounds(case: Case) -> dict[str, float]:
    """Least cost of a product in gradients, counting multiplications in matrix products and convolutions alone.

    Let a forward pass cost F and a gradient g = 3F − f, where f belongs to the layers that read the data, whose
    inputs need no gradient. With everything kept that does not depend on v, Hv costs a tangent pass, 2F − f,
    and its adjoint, 4F − 3f: 6F − 4f = 4g − 6F. Gv costs 2F − f twice: 2g − 2F. F and g are those of PyTorch's
    FlopCounterMode.
    """
    x, y = case.x[:BATCH], case.y[:BATCH]
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward, torch.no_grad():
            case.model(x)
        with FlopCounterMode(display=False) as both:
            loss = nn.functional.cross_entropy(case.model(x), y)
            torch.autograd.grad(loss, list(case.model.parameters()))
    share = forward.get_total_flops() / both.get_total_flops()
    return {"H v": 4 - 6 * share, "G v": 2 - 2 * share}


def wasserstein(nodes: Tensor, weights: Tensor, exact: Tensor) -> float:
    """W1 between a quadrature and eigenvalues (P,), over the mean of their absolute values."""
    points = torch.cat([nodes.double(), exact.double()])
    order = points.argsort()
    gaps = points[order].diff()
    return float((_masses(weights, exact)[order].cumsum(0)[:-1].abs() * gaps).sum() / exact.abs().mean())


def kolmogorov(nodes: Tensor, weights: Tensor, exact: Tensor) -> float:
    """Largest gap between the distribution functions of a quadrature and eigenvalues (P,); under FLOOR is zero."""
    floor = FLOOR * float(exact.abs().max())
    points = torch.cat([nodes.double(), exact.double()])
    points = torch.where(points.abs() < floor, 0.0, points)
    order = points.argsort()
    apart = _masses(weights, exact)[order].cumsum(0).abs()
    last = points[order].diff(append=points.new_full((1,), torch.inf)) > 0  # of those at one place
    return float(apart[last].max())


def decades(nodes: Tensor, weights: Tensor, exact: Tensor) -> float:
    """W1 of log10|λ|, sizes below FLOOR taken for it."""
    floor = FLOOR * float(exact.abs().max())
    points = torch.cat([nodes.double(), exact.double()]).abs().clamp_min(floor).log10()
    order = points.argsort()
    return float((_masses(weights, exact)[order].cumsum(0)[:-1].abs() * points[order].diff()).sum())


def _masses(weights: Tensor, exact: Tensor) -> Tensor:
    """Of a quadrature's nodes, and, with the other sign, of eigenvalues."""
    mine = weights.double() / weights.double().sum()
    return torch.cat([mine, -torch.full_like(exact, 1 / len(exact)).double()])

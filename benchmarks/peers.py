"""The peers: what each of them offers of products, eigenpairs and densities, called as its documentation says.

A peer is a class with some of the methods `hessian`, `gauss_newton` (a product v ↦ A v), `top` (eigenpairs)
and `density`. Those that are not installed are left out. Checks that a peer would make beforehand are switched
off, to its advantage; batches are of equal size, since some weigh them equally.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.cases import Case
from benchmarks.reference import flat

Product = Callable[[Tensor], Tensor]
Quadrature = tuple[Tensor, Tensor]  # nodes and weights
LOSS = nn.CrossEntropyLoss()
LIMIT = 60  # products after which power iteration is stopped


class Curvlinops:
    """Forward over reverse, rebuilt for each product; eigenpairs by SciPy."""

    name, package = "curvlinops", "curvlinops-for-pytorch"

    def __init__(self) -> None:
        import curvlinops

        self.module = curvlinops

    def _operator(self, kind: str, case: Case) -> Any:
        make, parameters = getattr(self.module, kind), list(case.model.parameters())
        return make(case.model, LOSS, parameters, case.batches, num_data=len(case.y), check_deterministic=False)

    def hessian(self, case: Case) -> Product:
        """v ↦ H v."""
        operator = self._operator("HessianLinearOperator", case)
        return lambda v: operator @ v

    def gauss_newton(self, case: Case) -> Product:
        """v ↦ G v."""
        operator = self._operator("GGNLinearOperator", case)
        return lambda v: operator @ v

    def top(self, case: Case, num: int, seed: int) -> tuple[Tensor, int]:
        """Largest eigenvectors (P, num) of H by ARPACK, and the products it took."""
        from scipy.sparse.linalg import LinearOperator, eigsh

        operator, count = self._operator("HessianLinearOperator", case), 0

        def apply(v: np.ndarray) -> np.ndarray:
            nonlocal count
            count += 1
            return (operator @ torch.from_numpy(v.reshape(-1)).float()).numpy()

        whole = LinearOperator((case.num_parameters,) * 2, matvec=apply, dtype=np.dtype("float32"))
        start = case.vector(seed)[:, 0].numpy()
        _, vectors = eigsh(whole, k=num, which="LA", tol=1e-2, v0=start)
        return torch.from_numpy(vectors[:, ::-1].copy()), count

    def density(self, matrix: Tensor, ends: tuple[float, float], num_products: int, seed: int) -> Quadrature:
        """Its density of a matrix on its grid, as nodes and weights; the spectrum's ends are given to it."""
        from curvlinops._torch_base import PyTorchLinearOperator
        from curvlinops.papyan2020traces.spectrum import lanczos_approximate_spectrum

        class Dense(PyTorchLinearOperator):
            SELF_ADJOINT = True
            device, dtype = matrix.device, matrix.dtype

            def _matmat(self, block: list[Tensor]) -> list[Tensor]:
                return [matrix @ block[0]]

        shape = [(len(matrix),)]
        torch.manual_seed(seed)
        return lanczos_approximate_spectrum(Dense(shape, shape), num_products, num_points=4096, boundaries=ends)


class Eigenthings:
    """Double backward, rebuilt for each product; Lanczos of a fixed number of steps."""

    name, package = "hessian-eigenthings", "hessian-eigenthings"

    def __init__(self) -> None:
        import hessian_eigenthings

        self.module = hessian_eigenthings

    def _hessian(self, case: Case) -> Any:
        return self.module.HessianOperator(case.model, case.batches, self.module.supervised_loss(LOSS))

    def hessian(self, case: Case) -> Product:
        """v ↦ H v."""
        return self._hessian(case).matvec

    def gauss_newton(self, case: Case) -> Product:
        """v ↦ G v."""
        loss = self.module.supervised_loss_of_output(LOSS)
        return self.module.GGNOperator(case.model, case.batches, self.module.supervised_forward, loss).matvec

    def lanczos(self, case: Case, num: int, num_steps: int, seed: int, product: Product | None = None) -> Any:
        """Its result after so many steps, by its own products or by others."""
        operator = self._hessian(case)
        if product is not None:
            operator = self.module.LambdaOperator(product, case.num_parameters)
        return self.module.lanczos(operator, k=num, max_iter=num_steps, tol=1e-2, which="LA", seed=seed)

    def quadrature(self, matrix: Tensor, num_runs: int, num_steps: int, seed: int) -> Quadrature:
        """Its nodes and weights for a matrix."""
        operator = self.module.LambdaOperator(lambda v: matrix @ v, len(matrix))
        found = self.module.spectral_density(
            operator, num_runs=num_runs, lanczos_steps=num_steps, num_grid_points=2, seed=1000 * seed
        )
        kept = ~found.raw_eigenvalues.isnan()
        return found.raw_eigenvalues[kept], found.raw_weights[kept]


class PyHessian:
    """Double backward, rebuilt for each product; deflated power iteration."""

    name, package = "PyHessian", "pyhessian"

    def __init__(self) -> None:
        import pyhessian

        self.module = pyhessian

    def _whole(self, case: Case, batches: Any = None) -> Any:
        return self.module.hessian(case.model, LOSS, dataloader=batches or case.batches, cuda=False)

    def hessian(self, case: Case) -> Product:
        """v ↦ H v."""
        whole, parameters = self._whole(case), list(case.model.parameters())

        def apply(v: Tensor) -> Tensor:
            parts = v.split([p.numel() for p in parameters])
            tree = [part.view_as(p) for part, p in zip(parts, parameters, strict=True)]
            return flat(tuple(part.detach() for part in whole.dataloader_hv_product(tree)[1]))

        return apply

    def top(self, case: Case, num: int, seed: int, most: int = LIMIT) -> tuple[Tensor, int]:
        """As many of the largest eigenvectors as `most` products give, (P, ≤ num), and the products taken."""
        batches = _Limited(case.batches, most)
        whole = self._whole(case, batches)
        torch.manual_seed(seed)
        kept: list[Tensor] = []
        with contextlib.suppress(_Limited.Reached):
            for _ in range(num):  # one more pair at a time, so that those found are not lost at the limit
                kept = self._one_more(whole, kept)
        vectors = torch.stack([flat(tuple(tree)) for tree in kept], 1) if kept else case.vector(0)
        return vectors, batches.passes

    def _one_more(self, whole: Any, kept: list[Any]) -> list[Any]:
        """Its own loop for the next pair, kept ones projected out."""
        from pyhessian.utils import normalization, orthnormal

        v = normalization([torch.randn(p.size()) for p in whole.params])
        value = None
        for _ in range(100):
            v = orthnormal(v, kept)
            new, image = whole.dataloader_hv_product(v)
            v = normalization(image)
            if value is not None and abs(value - new) / (abs(value) + 1e-6) < 1e-3:
                break
            value = new
        return [*kept, v]

    def density(self, case: Case, num_products: int, seed: int) -> Quadrature:
        """Its nodes and weights; `torch.eig`, which it needs and PyTorch no longer has, is lent to it."""
        torch.manual_seed(seed)
        with _lent(torch, "eig", _eig):
            nodes, weights = self._whole(case).density(iter=num_products)
        return torch.tensor(np.array(nodes)).flatten(), torch.tensor(np.array(weights)).flatten()


def _eig(matrix: Tensor, eigenvectors: bool = False) -> tuple[Tensor, Tensor]:
    """Eigenvalues (n, 2), real and imaginary, and eigenvectors of a symmetric matrix, as `torch.eig` gave them."""
    values, vectors = torch.linalg.eigh(matrix)
    return torch.stack([values, torch.zeros_like(values)], 1), vectors if eigenvectors else vectors[:, :0]


@contextlib.contextmanager
def _lent(module: Any, name: str, value: Any) -> Iterator[None]:
    """A module with another value under a name."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


class _Limited:
    """Batches that may be gone through so many times."""

    class Reached(Exception):  # noqa: N818
        """The limit."""

    def __init__(self, batches: list[Any], most: int) -> None:
        self.batches, self.most, self.passes = batches, most, 0

    def __iter__(self) -> Any:
        if self.passes == self.most:
            raise self.Reached
        self.passes += 1
        return iter(self.batches)


class Backpack:
    """Products with one batch by double backward; the loop over batches is ours."""

    name, package = "BackPACK", "backpack-for-pytorch"

    def __init__(self) -> None:
        from backpack.hessianfree import ggnvp, hvp

        self.hvp, self.ggnvp = hvp.hessian_vector_product, ggnvp.ggn_vector_product_from_plist

    def _summed(self, case: Case, one: Callable[[Tensor, Tensor, list[Any], list[Tensor]], Any]) -> Product:
        parameters = list(case.model.parameters())

        def apply(v: Tensor) -> Tensor:
            parts = v.split([p.numel() for p in parameters])
            tree = [part.view_as(p) for part, p in zip(parts, parameters, strict=True)]
            total = torch.zeros_like(v)
            for x, y in case.batches:
                outputs = case.model(x)
                loss = nn.functional.cross_entropy(outputs, y, reduction="sum")
                total += flat(one(loss, outputs, parameters, tree))
            return total / len(case.y)

        return apply

    def hessian(self, case: Case) -> Product:
        """v ↦ H v."""
        return self._summed(case, lambda loss, _, parameters, tree: self.hvp(loss, parameters, tree))

    def gauss_newton(self, case: Case) -> Product:
        """v ↦ G v."""
        return self._summed(case, self.ggnvp)


class NNGeometry:
    """Implicit products with the Fisher matrix."""

    name, package = "NNGeometry", "nngeometry"

    def __init__(self) -> None:
        import nngeometry.metrics
        import nngeometry.object

        self.module = nngeometry

    def gauss_newton(self, case: Case) -> Product:
        """v ↦ G v."""
        from nngeometry.layercollection import LayerCollection
        from nngeometry.object import PMatImplicit, PVector
        from torch.utils.data import DataLoader, TensorDataset

        loader = DataLoader(TensorDataset(case.x, case.y), batch_size=len(case.batches[0][1]))
        layers = LayerCollection.from_model(case.model)
        fisher = self.module.metrics.FIM(case.model, loader, PMatImplicit, layer_collection=layers)
        return lambda v: fisher.mv(PVector(layers, vector_repr=v)).to_torch().detach()


class Nngeom:
    """Ritz values of one Lanczos run, without weights."""

    name, package = "nngeom", "nngeom"

    def __init__(self) -> None:
        import nngeom

        self.module = nngeom

    def spectrum(self, matrix: Tensor, num_products: int, seed: int) -> Quadrature:
        """What it shows as the spectrum of a matrix: its Ritz values, alike."""

        class Model:
            num_parameters = len(matrix)

            def hvp(self, _: Any, v: np.ndarray) -> np.ndarray:
                return (matrix @ torch.from_numpy(v).to(matrix)).double().numpy()

        found = self.module.curvature.lanczos_spectrum(Model(), None, m=num_products, seed=seed)
        nodes = torch.from_numpy(found.eigenvalues.copy())
        return nodes, torch.full_like(nodes, 1 / len(nodes))


PEERS = (Curvlinops, Eigenthings, PyHessian, Backpack, NNGeometry, Nngeom)


def installed() -> tuple[list[Any], dict[str, str]]:
    """The peers that can be imported, and for each what is known: its version, or that it is absent."""
    found, versions = [], {}
    for kind in PEERS:
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                found.append(kind())
            versions[kind.name] = importlib.metadata.version(kind.package)
        except ImportError:
            versions[kind.name] = "not installed"
    return found, versions


def differentiable(call: Callable[[], Any]) -> Any:
    """A call with attention that can be differentiated twice, which no peer chooses by itself."""
    with sdpa_kernel(SDPBackend.MATH):
        return call()

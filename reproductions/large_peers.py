"""What a peer does on a large network: a product with H, its error, and the top eigenpairs, within a time limit.

python -m reproductions.large_peers NAME STORE PEER   (in the peers' environment; prints a line of JSON a finding)
"""

from __future__ import annotations

import contextlib
import importlib
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.attention import SDPBackend, sdpa_kernel

from reproductions.large_models import module_of

NUM, RTOL, STEPS = 10, 3e-2, 60  # pairs, their residual, and steps of a Lanczos that does not stop by itself
MOST = 16 * 2**30  # bytes that a peer may have, beyond which it is refused more
PEERS = {"curvlinops": "curvlinops", "hessian-eigenthings": "hessian_eigenthings"}  # and their modules


class RowLoss(nn.Module):
    """Σ m_i ℓ_i of rows with weights that sum to 1 over the data; targets are (n, 2), labels beside weights."""

    reduction = "sum"

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """A scalar."""
        targets = targets.reshape(-1, 2)
        losses = F.cross_entropy(outputs, targets[:, 0].long(), reduction="none")
        return (losses * targets[:, 1].to(losses)).sum()


def products(peer: str, model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> Any:
    """H as a function of v, as the peer's documentation says."""
    if peer == "curvlinops":
        import curvlinops  # noqa: PLC0415

        parameters, num = list(model.parameters()), sum(len(x) for x, _ in batches)
        operator = curvlinops.HessianLinearOperator(
            model, RowLoss(), parameters, batches, num_data=num, check_deterministic=False
        )
        return lambda v: operator @ v
    import hessian_eigenthings  # noqa: PLC0415

    loss = hessian_eigenthings.supervised_loss(RowLoss())
    operator = hessian_eigenthings.HessianOperator(model, batches, loss)
    return lambda v: len(batches) * operator.matvec(v)  # it takes the mean over batches


def top(peer: str, product: Any, size: int) -> tuple[Tensor, Tensor, int]:
    """Largest eigenvalues, vectors (P, K) and the products they took."""
    count = 0

    def counted(v: Tensor) -> Tensor:
        nonlocal count
        count += 1
        tell(products=count)
        found: Tensor = product(v).detach()
        return found

    if peer == "curvlinops":
        import numpy as np  # noqa: PLC0415
        from scipy.sparse.linalg import LinearOperator, eigsh  # noqa: PLC0415

        def apply(v: Any) -> Any:
            return counted(torch.from_numpy(v.reshape(-1)).float()).numpy()

        start = torch.randn(size, generator=torch.Generator().manual_seed(1)).numpy()
        whole = LinearOperator((size, size), matvec=apply, dtype=np.dtype("float32"))
        values, vectors = eigsh(whole, k=NUM, which="LA", tol=RTOL, v0=start)
        return torch.from_numpy(values[::-1].copy()), torch.from_numpy(vectors[:, ::-1].copy()), count
    import hessian_eigenthings  # noqa: PLC0415

    operator = hessian_eigenthings.LambdaOperator(counted, size)
    found = hessian_eigenthings.lanczos(operator, k=NUM, max_iter=STEPS, tol=RTOL, which="LA", seed=1)
    vectors = found.eigenvectors
    return found.eigenvalues, vectors.T if len(vectors) == NUM else vectors, count


def tell(**found: Any) -> None:
    """A line of what is known so far."""
    print(json.dumps(found | {"peak": peak_bytes()}), flush=True)


def peak_bytes() -> int:
    """The most memory that this process has had."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def main(name: str, store: Path, peer: str) -> None:
    """Tell what is found, line by line, so that what a limit ends has told what it did."""
    importlib.import_module(PEERS[peer])
    resource.setrlimit(resource.RLIMIT_DATA, (MOST, MOST))
    model = module_of(name, torch.load(store / "weights.pt", weights_only=True))
    inputs, labels, weights = torch.load(store / "examples.pt", weights_only=True)
    v, right = torch.load(store / "product.pt", weights_only=True)
    rows = torch.stack([labels.double(), weights], 1).view(len(inputs), -1, 2).squeeze(1)
    size = max(1, len(inputs) // 8)
    batches = list(zip(inputs.split(size), rows.split(size), strict=True))
    plain = contextlib.nullcontext()
    began = time.perf_counter()
    try:
        product = products(peer, model, batches)
        found = product(v)
    except Exception as error:
        tell(failure=f"{type(error).__name__}: {str(error).splitlines()[0][:300]}")
        plain = sdpa_kernel(SDPBackend.MATH)  # attention that can be differentiated twice
    with plain:
        if not isinstance(plain, contextlib.nullcontext):
            product, began = products(peer, model, batches), time.perf_counter()
            found = product(v)
        error = float((found.reshape(-1) - right).norm() / right.norm())
        tell(product_seconds=time.perf_counter() - began, error=error)
        began = time.perf_counter()
        values, vectors, count = top(peer, product, len(v))
        tell(pairs_seconds=time.perf_counter() - began, products=count, values=values.tolist())
        images = torch.stack([product(column).reshape(-1) for column in vectors.float().T])
        residuals = (images - values[:, None] * vectors.T).norm(dim=1) / values.abs()
        tell(residuals=residuals.tolist())


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])

"""Columns that ask an operator: drawn apart for each purpose, multiplied again only where products leave the type."""

from __future__ import annotations

import pytest
import torch

import deepspectra as ds
from deepspectra.algorithms.probes import stream
from deepspectra.errors import OptionError
from spectra import Function


def test_products_are_taken_again_only_where_they_over_or_underflow() -> None:
    seen = []

    def apply(block: torch.Tensor, scale: float) -> torch.Tensor:
        seen.append(block.shape[1])
        return scale * block

    for dtype, scale, again in (
        (torch.float32, 1e30, 0),
        (torch.float32, 1e38, 4),
        (torch.float32, 1e-36, 4),
        (torch.float64, 1e200, 0),
        (torch.float64, 0.0, 0),
    ):
        seen.clear()
        A = Function(lambda block, s=scale: apply(block, s), 100, dtype=dtype)
        found = ds.trace(A, 8)
        assert sum(seen) == found.num_products
        assert found.num_products - again <= 8
        assert found.value == pytest.approx(100 * scale, rel=1e-5)


def test_equal_seeds_of_different_estimates_draw_different_vectors() -> None:
    draws = [torch.randn(100, generator=stream(0, purpose)) for purpose in ("density", "trace", "diagonal")]
    draws += [torch.randn(100, generator=torch.Generator().manual_seed(0))]
    together = torch.corrcoef(torch.stack(draws)) - torch.eye(4)
    assert float(together.abs().max()) < 0.4
    assert torch.equal(torch.randn(9, generator=stream(7, "a")), torch.randn(9, generator=stream(7, "a")))
    with pytest.raises(OptionError, match="seed"):
        stream(2**70, "a")

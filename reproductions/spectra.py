"""Spectra that are known, as matrices in a random basis: what estimates are held to."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor


class Case(NamedTuple):
    """A symmetric matrix (P, P) in a random basis, and its eigenvalues (P,)."""

    name: str
    values: Tensor
    matrix: Tensor


def spectra() -> dict[str, Tensor]:
    """Flat, decaying, spiked, multiple, and mixtures of them; one so small that a basis spans it."""
    line, one = partial(torch.linspace, dtype=torch.float64), partial(torch.full, dtype=torch.float64)
    powers = 0.8 ** torch.arange(50, dtype=torch.float64)
    return {
        "flat": line(-1, 1, 200),
        "decaying": 0.95 ** torch.arange(200, dtype=torch.float64),
        "spiked": torch.cat([line(10, 1, 10), 0.3 * torch.exp(-line(0, 14, 190))]),
        "multiple": 10 * powers.repeat_interleave(4),
        "flat + spiked": torch.cat([line(50, 5, 10), one((190,), 1.0)]),
        "multiple + spiked": torch.cat([one((3,), 5.0), one((2,), -4.0), line(-0.2, 0.5, 195)]),
        "all four": torch.cat([one((4,), 9.0), line(6, 3, 4), powers[:40], one((60,), 0.1), line(-1, 0.3, 92)]),
        "tiny": torch.cat([line(3, 1, 3), 0.5 ** line(1, 20, 24), -(0.3 ** line(1, 9, 12))]),
        "rank 9 of 60": torch.cat([line(4, 1, 9), one((51,), 0.0)]),
    }


def band_spectra() -> dict[str, Tensor]:
    """What bands of the distribution function are asked on; the first two are figure 15 of Papyan, JMLR 21 (2020)."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(300, 300, generator=generator, dtype=torch.float64)
    uniform = torch.rand(250, 500, generator=generator, dtype=torch.float64)
    spikes = torch.diag(torch.cat([torch.tensor([5.0, 4.0, 3.0]), torch.zeros(297)]).double())
    bulk = torch.linalg.eigvalsh(normal[:150] @ normal[:150].T / 300)
    decades = torch.logspace(0, -8, 220, dtype=torch.float64)
    line = torch.linspace(-0.5, 1, 150, dtype=torch.float64)
    return {
        "Marchenko-Pastur + 3": torch.linalg.eigvalsh(spikes + normal @ normal.T / 300),
        "Pareto": torch.linalg.eigvalsh((1 - uniform).reciprocal() @ (1 - uniform).reciprocal().T / 500),
        "eight decades": torch.cat([decades, -0.1 * decades[::2]]),
        "half zeros": torch.cat([bulk, torch.zeros(150, dtype=torch.float64)]),
        "half copies": torch.cat([line, torch.full((150,), 0.2, dtype=torch.float64)]),
        "all copies": torch.tensor([2.0, 1.0, -0.5, 0.1], dtype=torch.float64).repeat_interleave(75),
    }


@cache
def cases() -> dict[str, Case]:
    """The spectra as matrices."""
    return _rotated(spectra())


@cache
def band_cases() -> dict[str, Case]:
    """Likewise."""
    return _rotated(band_spectra())


def _rotated(spectra: Mapping[str, Tensor]) -> dict[str, Case]:
    found = {}
    for name, values in spectra.items():
        normal = torch.randn(
            len(values), len(values), generator=torch.Generator().manual_seed(0), dtype=torch.float64
        )
        basis = torch.linalg.qr(normal)[0]
        matrix = (basis * values) @ basis.T
        found[name] = Case(name, values.sort(descending=True).values, (matrix + matrix.T) / 2)
    return found


WORDS = {
    "flat": "200 values from −1 to 1",
    "decaying": "200 values, each .95 of the one before",
    "spiked": "ten from 10 to 1, above a bulk of 190 that falls from .3 over six decades",
    "multiple": "fifty values, each .8 of the one before and four times there",
    "flat + spiked": "ten from 50 to 5, and 190 times 1",
    "multiple + spiked": "5 three times, −4 twice, 195 values from −.2 to .5",
    "all four": "9 four times, four from 6 to 3, forty each .8 of the one before, .1 sixty times, 92 from −1 to .3",
    "tiny": "39 values of both signs over six decades",
    "rank 9 of 60": "nine from 4 to 1, and 51 zeros",
}
BAND_WORDS = {
    "Marchenko-Pastur + 3": "diag(5, 4, 3, 0, …) + ZZᵀ/300, Z normal, 300 × 300",
    "Pareto": "ZZᵀ/500, Z of Pareto's law of index 1, 250 × 500",
    "eight decades": "220 positive values and 110 negative ones, evenly spaced in the logarithm",
    "half zeros": "150 of Marchenko and Pastur's law, and 150 zeros",
    "half copies": "150 from −.5 to 1, and .2 150 times",
    "all copies": "2, 1, −.5 and .1, each 75 times",
}

"""Results by layer: one mapping from names of layers to what was found there."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from deepspectra.errors import MissingNameError
from deepspectra.results import Provenance

Entry = TypeVar("Entry")


@dataclass(frozen=True)
class ByLayer(Mapping[str, Entry]):
    """Layer → its result, from input to output: what every analysis by layer returns.

    Attributes:
        layers: layer → its result.
        seconds: wall-clock time spent.
        provenance: where it came from.
    """

    layers: Mapping[str, Entry]
    seconds: float
    provenance: Provenance

    def __getitem__(self, name: str) -> Entry:
        if name not in self.layers:
            raise MissingNameError("layer", name, self.layers)
        return self.layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def _table(self, head: Sequence[str], numbers: Callable[[Entry], Iterable[float]]) -> list[str]:
        """A line for each layer; – for a number that is not defined."""
        rows = [f"{'layer':<26} " + " ".join(f"{name:>11}" for name in head)]
        for name, entry in self.layers.items():
            cells = ("–" if math.isnan(number) else f"{number:.3g}" for number in numbers(entry))
            rows.append(f"{name[-26:]:<26} " + " ".join(f"{cell:>11}" for cell in cells))
        return rows

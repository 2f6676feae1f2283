"""Results by layer: one mapping from names of layers to what was found there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from deepspectra.argument_checks import LayerProgress
from deepspectra.dataframes import text_table
from deepspectra.errors import MissingNameError
from deepspectra.results import Result

Entry = TypeVar("Entry")
Item = TypeVar("Item", bound=tuple[Any, ...])


@dataclass(frozen=True)
class ByLayer(Result, Mapping[str, Entry]):
    """Layer → its result, from input to output: what every analysis by layer returns. They are in `layers`."""

    layers: Mapping[str, Entry]

    def __getitem__(self, name: str) -> Entry:
        if name not in self.layers:
            raise MissingNameError("layer", name, self.layers)
        return self.layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def _table(
        self, head: Sequence[str], cells: Callable[[Entry], Iterable[float | str]], *notes: str
    ) -> str:
        """A line for each layer, as in `text_table`."""
        rows = ((name[-26:], *cells(entry)) for name, entry in self.layers.items())
        return text_table(("layer", *head), rows, *notes)


def announced(layers: Iterable[Item], progress: LayerProgress | None, total: int) -> Iterator[Item]:
    """The same layers, each named before it is looked at."""
    for done, layer in enumerate(layers):
        if progress is not None:
            progress(done, total, layer[0])
        yield layer

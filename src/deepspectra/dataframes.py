"""Results as tables: lines of text, and data frames with one column an array."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from torch import Tensor


class Tabular:
    """A result some of whose arrays, or some of whose numbers, are the columns of a table."""

    _columns: ClassVar[tuple[str, ...]]

    def __init_subclass__(cls, columns: tuple[str, ...] = (), **options: Any) -> None:
        super().__init_subclass__(**options)
        cls._columns = columns

    def to_dataframe(self) -> Any:
        """The arrays of the result, by name, as a `pandas.DataFrame`; single numbers make one row."""
        import pandas  # noqa: PLC0415  (its import takes a while)

        return pandas.DataFrame({name: _column(getattr(self, name)) for name in self._columns})


def _column(value: Any) -> Any:
    """Of the numbers in a tensor; NumPy knows no bfloat16."""
    if not isinstance(value, Tensor):
        return [value]
    value = value.detach().cpu()
    return (value.double() if value.is_floating_point() else value).numpy()


def text_table(head: Sequence[str], rows: Iterable[Sequence[float | str]], *notes: str) -> str:
    """Words to the left in the first column and to the right in others, numbers to three digits, – for NaN."""
    cells = [list(head), *([_written(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in itertools.zip_longest(*cells, fillvalue="")]
    lines = []
    for first, *others in cells:
        padded = (f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=False))
        lines.append("  ".join([f"{first:<{widths[0]}}", *padded]))
    return "\n".join([*lines, *notes])


def _written(cell: float | str) -> str:
    if isinstance(cell, str):
        return cell
    return "–" if math.isnan(cell) else f"{cell:.3g}"

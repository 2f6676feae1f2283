"""Results as tables: lines of text, and data frames with one column an array."""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from deepspectra.argument_checks import check_count


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

    def to_csv(self, path: str | Path) -> None:
        """Write the same table as comma-separated values, all digits."""
        self.to_dataframe().to_csv(path, index=False)

    def to_latex(self, digits: int = 3) -> str:
        """The same table for LaTeX (with the package booktabs), numbers to so many significant digits."""
        return latex_table(self.to_dataframe(), digits)


class Math(NamedTuple):
    """A cell of a table that LaTeX is to read as mathematics."""

    text: str


def latex_table(table: Any, digits: int = 3) -> str:
    """A `pandas.DataFrame` for LaTeX, numbers to so many significant digits, powers of ten as such.

    Raises:
        OptionError: digits below 1.
    """
    check_count("digits", digits)
    mixed = {name: _as_math for name in table if table[name].map(lambda cell: isinstance(cell, Math)).any()}
    found: str = table.to_latex(
        index=False, float_format=lambda x: _in_latex(x, digits), formatters=mixed, escape=True, na_rep="--"
    )
    return found


def _as_math(cell: Any) -> Any:
    return f"${cell.text}$" if isinstance(cell, Math) else cell


def _in_latex(number: float, digits: int) -> str:
    mantissa, _, exponent = f"{number:.{digits}g}".partition("e")
    return f"${mantissa} \\cdot 10^{{{int(exponent)}}}$" if exponent else f"${mantissa}$"


def preformatted(text: str) -> str:
    """Text as HTML, in letters of one width."""
    return f'<pre style="line-height: 1.3">{html.escape(text, quote=False)}</pre>'


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

"""Results as data frames: one column an array."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

if TYPE_CHECKING:
    import pandas


class Tabular:
    """A result some of whose arrays, or some of whose numbers, are the columns of a table."""

    _columns: ClassVar[tuple[str, ...]]

    def __init_subclass__(cls, columns: tuple[str, ...] = (), **options: Any) -> None:
        super().__init_subclass__(**options)
        cls._columns = columns

    def to_dataframe(self) -> pandas.DataFrame:
        """The arrays of the result, by name, as a `pandas.DataFrame`; single numbers make one row."""
        import pandas  # noqa: PLC0415  (its import takes a while)

        return pandas.DataFrame({name: _column(getattr(self, name)) for name in self._columns})


def _column(value: Any) -> Any:
    """Of the numbers in a tensor; NumPy knows no bfloat16."""
    if not isinstance(value, Tensor):
        return [value]
    value = value.detach().cpu()
    return (value.double() if value.is_floating_point() else value).numpy()

"""Pieces of text and numbers as the page shows them, escaped."""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Iterable
from typing import Any

import numpy as np
import xarray as xr

from deepspectra.glossary import terms_in
from deepspectra.report.drawing import OPERATOR_NAMES, SYMBOLS, number


def escaped(value: object) -> str:
    """Text that is safe in HTML."""
    return html.escape(str(value))


def attribute(dataset: xr.Dataset, name: str, default: Any = None) -> Any:
    """An attribute as a plain Python value; missing and NaN are the default."""
    value = dataset.attrs.get(name, default)
    value = value.item() if isinstance(value, (np.generic, np.ndarray)) and np.size(value) == 1 else value
    return default if isinstance(value, float) and math.isnan(value) else value


def json_attribute(dataset: xr.Dataset, name: str) -> dict[str, Any]:
    """A JSON attribute as a dictionary; what is not JSON is shown as it stands."""
    text = attribute(dataset, name, "")
    try:
        value = json.loads(text) if text else {}
    except ValueError:
        return {name: text}
    return value if isinstance(value, dict) else {name: value}


def number_html(value: object, digits: int = 3) -> str:
    """A number inside a sentence."""
    return f'<span class="number">{number(float(str(value)), digits)}</span>'


def share_html(value: float) -> str:
    """A share inside a sentence, in per cent."""
    return f'<span class="number">{percent(value)}</span>'


def glossed(text: str) -> str:
    """Markup of a sentence whose terms, where they stand first, lead to the glossary and say what they mean."""
    words = {word: term for term in terms_in(text) for word in sorted(term.words, key=len, reverse=True)}
    if not words:
        return text
    seen: set[str] = set()

    def linked(match: re.Match[str]) -> str:
        term = words[match[0]]
        if term.anchor in seen:
            return match[0]
        seen.add(term.anchor)
        return f'<a class="term" href="#{term.anchor}" title="{escaped(term.meaning)}">{match[0]}</a>'

    longest = sorted(words, key=len, reverse=True)
    return re.sub(rf"\b(?:{'|'.join(map(re.escape, longest))})\b(?![^<]*>)", linked, text)


def percent(value: float, digits: int = 1) -> str:
    """A share in per cent: 12.5%, −3.0%, 0.0% whatever its sign."""
    return f"{round(value, digits + 2) + 0.0:.{digits}%}".replace("-", "−")


def quantity(number: float, noun: str, plural: str = "") -> str:
    """1 outlier, 2 outliers."""
    return f"{number:,.0f} {noun if number == 1 else plural or noun + 's'}"


def symbol(operator: str) -> str:
    """H, G or R."""
    return SYMBOLS.get(operator, escaped(operator))


def operator_name(operator: str) -> str:
    """The operator's name for people."""
    return OPERATOR_NAMES.get(operator, operator)


def joined(items: Iterable[str]) -> str:
    """A, B and C."""
    *most, last = items
    return f"{', '.join(most)} and {last}" if most else last


def finite(value: float | None) -> bool:
    """Whether there is a number."""
    return value is not None and math.isfinite(value)

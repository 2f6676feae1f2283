"""Verdicts and tables: rules over single networks, means and errors over seeds, Markdown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from typing import NamedTuple

from reproductions.records import Record, fits

Group = tuple[str, str, int]
MOST = 0.75  # of the networks; a claim that is true in as many holds, in a quarter of them in part
HEAD = ["network", "data", "a class", "networks", "fit"]


class Verdict(NamedTuple):
    """Whether something holds, and in how many networks of each kind."""

    text: str
    networks: str = ""
    subject: str = ""  # if a claim has several

    def __str__(self) -> str:
        return f"{self.subject}: {self.text}" if self.subject else self.text

    @property
    def word(self) -> str:
        """Without numbers."""
        return self.text.split(":")[0].rstrip(".")


class Claim(NamedTuple):
    """A claim of the papers, the rule by which it is judged, and what was measured."""

    title: str
    source: str
    rule: str
    verdicts: list[Verdict]
    head: list[str]
    rows: list[list[str]]

    @property
    def verdict(self) -> str:
        """All verdicts in one line."""
        return " ".join(map(str, self.verdicts))


def judged(
    records: list[Record], rule: Callable[[Record], bool], subject: str = "", unit: str = "networks"
) -> Verdict:
    """A verdict from single networks."""
    truths: dict[str, list[bool]] = {}
    for record in records:
        truths.setdefault(record["model"], []).append(bool(rule(record)))
    found = [truth for some in truths.values() for truth in some]
    if not found:
        return Verdict("Not measured.", "", subject)
    share = sum(found) / len(found)
    word = "Holds" if share >= MOST else "Holds in part" if share >= 1 - MOST else "Does not hold"
    networks = ", ".join(f"{name} {sum(some)} of {len(some)}" for name, some in truths.items())
    return Verdict(f"{word}: in {sum(found)} of {len(found)} {unit}.", networks, subject)


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def groups(records: list[Record]) -> dict[Group, list[Record]]:
    """Networks that differ in their seed alone."""
    found: dict[Group, list[Record]] = {}
    for record in records:
        found.setdefault((record["model"], record["data"], int(record["per_class"])), []).append(record)
    return found


def named(group: Group, some: list[Record]) -> list[str]:
    """The first cells of a row: see `HEAD`."""
    model, data, size = group
    return [model, data, str(size), str(len(some)), str(sum(map(fits, some)))]


def by_group(records: list[Record], *values: Callable[[Record], float], digits: int = 2) -> list[list[str]]:
    """One row a group: its name, and mean ± s.e. of each value."""
    return [
        named(group, some) + [spread([value(r) for r in some], digits) for value in values]
        for group, some in groups(records).items()
    ]


def spread(values: Iterable[float], digits: int = 2) -> str:
    """Mean ± standard error."""
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return "–"
    mean = f"{statistics.mean(known):.{digits}f}"
    if len(known) < 2:
        return mean
    return f"{mean} ± {statistics.stdev(known) / math.sqrt(len(known)):.{digits}f}"


def listed(items: Iterable[object]) -> str:
    """As in a sentence: a, b and c."""
    *most, last = map(str, items)
    return f"{', '.join(most)} and {last}" if most else last

"""Verdicts and tables: rules over single networks, intervals over settings, errors over seeds, Markdown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from typing import NamedTuple

from scipy.stats import beta

from reproductions.records import Record, fits

Group = tuple[str, str, int]
SOME, MOST = 0.25, 0.75  # of the networks; a claim that is true in so many holds in part, or holds
LEVEL = 0.95  # of the intervals on which verdicts rest
WORDS = ("Does not hold", "Holds in part", "Holds")
OPEN = {(0, 1): "Open, at most in part", (1, 2): "Open, at least in part", (0, 2): "Open"}
HEAD = ["network", "data", "a class", "networks", "fit"]


class Verdict(NamedTuple):
    """Whether something holds, and in how many networks of each kind."""

    text: str
    networks: str = ""
    subject: str = ""  # if a claim has several
    possible: tuple[int, int] = (0, 2)  # the first and the last of `WORDS` that it may be
    by_count: str = ""  # what it would be without an interval

    def __str__(self) -> str:
        return f"{self.subject}: {self.text}" if self.subject else self.text

    @property
    def word(self) -> str:
        """Without numbers."""
        return self.text.split(":")[0].rstrip(".")

    def excludes(self, other: Verdict) -> bool:
        """Whether both cannot be the same."""
        return self.possible[0] > other.possible[1] or self.possible[1] < other.possible[0]


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
    records: list[Record], rule: Callable[[Record], bool | None], subject: str = "", unit: str = "networks"
) -> Verdict:
    """A verdict from single networks, of which the rule may leave some open."""
    if not records:
        return Verdict("Not measured.", "", subject)
    truths: dict[str, list[bool | None]] = {}
    for record in records:
        truth = rule(record)
        truths.setdefault(record["model"], []).append(None if truth is None else bool(truth))
    found = [truth for some in truths.values() for truth in some]
    yes, maybe, num = found.count(True), found.count(None), len(found)
    low, high = interval(yes / num, (yes + maybe) / num, len(groups(records)))
    possible = rank(low), rank(high)
    networks = ", ".join(f"{name} {_counted(some)}" for name, some in truths.items())
    networks += f"; {LEVEL:.0%} interval of the share {low:.2f} to {high:.2f}"
    text = f"{worded(possible)}: in {_counted(found, f' {unit}')}."
    return Verdict(text, networks, subject, possible, WORDS[rank(yes / num)])


def _counted(truths: list[bool | None], unit: str = "") -> str:
    maybe = truths.count(None)
    return f"{truths.count(True)} of {len(truths)}{unit}" + f" ({maybe} open)" * bool(maybe)


def interval(low: float, high: float, num: int) -> tuple[float, float]:
    """Of a share that was found between two, in so many independent draws: Clopper and Pearson's exact ends.

    With a number of draws below that of the networks the share may fall between their counts, as in Korn and Graubard
    (Survey Methodology 24, 1998).
    """
    tail = (1 - LEVEL) / 2
    least = float(beta.ppf(tail, num * low, num * (1 - low) + 1)) if low > 0 else 0.0
    return least, float(beta.ppf(1 - tail, num * high + 1, num * (1 - high))) if high < 1 else 1.0


def rank(share: float, some: float = SOME, most: float = MOST) -> int:
    """Which of `WORDS` a share amounts to."""
    return (share >= some) + (share >= most)


def worded(possible: tuple[int, int]) -> str:
    """One of `WORDS`, if no other is possible."""
    return WORDS[possible[0]] if possible[0] == possible[1] else OPEN[possible]


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
    """As in a sentence: a, b and c; none of nothing."""
    *most, last = list(map(str, items)) or ["none"]
    return f"{', '.join(most)} and {last}" if most else last

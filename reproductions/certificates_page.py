"""The page of certificates: tables and charts of the records that `reproductions.certificates` keeps."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import altair as alt

from deepspectra.report.drawing import INK, MUTED, blank, finished, log_axis, save_chart
from reproductions.verdicts import table

TRIED = 10  # priors that were tried on MNIST in making the library: scales, blurs; charged in every cell
DRAWN = "two-600-isotropic"  # whose variances are drawn
WU = "Wu et al. 2020"
Record = dict[str, Any]


def page(records: list[Record], cells: Mapping[str, Any]) -> str:
    """Markdown."""
    by_cell: dict[str, list[Record]] = {}
    for record in records:
        by_cell.setdefault(record["name"], []).append(record)
    done = [name for name in cells if name in by_cell]
    missing = [name for name in cells if name not in by_cell]
    bounds = table(
        [
            "cell",
            "seeds",
            "certificate",
            "published",
            "aim",
            "epochs",
            "error of it",
            "KL by layer",
            "CPU s",
        ],
        [_row(cells[name], by_cell[name]) for name in done],
    )
    beside = table(
        [
            "cell",
            "certificate",
            "stochastic, test",
            "its mean, test",
            "binomial bound",
            "network as it is, certified",
            "noise costs: ½ tr(HΣ)",
            "measured",
        ],
        [_beside(name, by_cell[name]) for name in done],
    )
    pictures = "\n\n".join(f"![{words}](certificates/{name}.svg)" for name, words in _pictures(by_cell).items())
    rest = f"Not measured yet, and resumable by the same command: {', '.join(missing)}." if missing else ""
    return TEXT.format(
        bounds=bounds,
        beside=beside,
        pictures=pictures,
        rest=rest,
        ranking=_ranking(by_cell),
        time=_time(cells, by_cell),
    )


TEXT = """# Certificates

Upper bounds on the error on unseen data, each with probability .965 (of what may fail, .025 are for the PAC-Bayes
bound and .01 for its Monte-Carlo estimate; that of the *network as it is* has .955, .01 being for the disagreement).
Written by `python -m reproductions.certificates`; a stopped run goes on where it was. CPU seconds are those of one
core of a machine that had other work, descent and certificate together.

{time}

{bounds}

Means over seeds ± their standard error. "two": the digits 0–4 against 5–9; "ten": all classes; "random": coin
tosses for labels. All 60,000 images (of CIFAR-10 14,000; the published bound used 50,000). Each layer has a prior
scale of its own, charged on its grid (fixed about learnt weights); log TRIED nats are charged besides, for priors
tried on MNIST in making this.

{beside}

{ranking}

{pictures}

## What they say, and what not

- They hold for *independent examples of one distribution*. Of another one, or of repeated examples, they say nothing.
- They are of the *stochastic* network, which draws its weights for every example. Its posterior minimises the bound,
  not the error: data-free, it stays as near to random features as it can afford, and errs more often than a network
  that was trained for its error: on MNIST several times, on harder data less so. Both numbers stand above.
- The *network as it is* is bounded by the stochastic one and their disagreement on unseen inputs without labels.
  Where labels are at hand the binomial bound says more with less: compare the columns. A bound of 1 says nothing.
- A *learnt* prior turns a part of the examples into a test set of sorts: its bound is nearly the binomial one of the
  same network on the same examples, which stands beside it (in other rows it is that of the network as it is, on test
  data) and is usually tighter.
- "Compression" bounds of the literature are of other priors (over encodings), and are quoted from memory.
- Every union bound is in the ledger of a certificate, and the bound is computed from it. The simulation in
  `tests/certificates/test_ledger.py` has a known true risk: thousands of repetitions keep the stated probability, and
  a ledger that conceals 4,096 tried priors fails it.

{rest}
""".replace("TRIED", str(TRIED))


def _row(cell: Any, some: list[Record]) -> list[str]:
    kl = {name: _mean([record["divergence"][name] for record in some]) for name in some[0]["divergence"]}
    return [
        cell.name,
        str(len(some)),
        _spread([record["value"] for record in some]),
        cell.published,
        _aim(cell.goal, _mean([record["value"] for record in some])),
        str(max(len(record["curve"]) for record in some)),
        _spread([record["empirical_error"] for record in some]),
        " + ".join(f"{value:.0f}" if value >= 10 else f"{value:.2g}" for value in kl.values()),
        f"{_mean([record['cpu_seconds'] for record in some]):.0f}",
    ]


def _aim(goal: float | None, value: float) -> str:
    """What was aimed at, and whether it is reached."""
    if goal is None:
        return "–"
    return f"≤ {_short(goal, 3)}: " + ("met" if value <= goal else f"missed by {_short(value - goal)}")


def _beside(name: str, some: list[Record]) -> list[str]:
    best = [_binomial(record["binomial"]) for record in some]
    plain = [record["unmodified"][0] for record in some if record["unmodified"]]
    model, measured = zip(*(record["loss_increase"] for record in some), strict=True)
    return [
        name,
        _spread([record["value"] for record in some]),
        _spread([record["test_error"] for record in some]),
        _spread([record["mean_test_error"] for record in some]),
        _spread(best),
        _spread(plain) if plain else "–",
        f"{_mean(model):.2g}",
        f"{_mean(measured):.2g}",
    ]


def _binomial(bounds: Mapping[str, list[float]]) -> float:
    """Of the network that a learnt prior lies about, where there is one, or else of the one as it is.

    The less of two would hold with less than the probability of either.
    """
    *_, value = next((one for name, one in bounds.items() if "trained on" in name), next(iter(bounds.values())))
    return value


def _time(cells: Mapping[str, Any], by_cell: dict[str, list[Record]]) -> str:
    """Passes over the data and CPU minutes, against what is published of both."""
    taken = {(name, r["seed"]): r["cpu_seconds"] / 60 for name, some in by_cell.items() for r in some}
    passes = [
        max(len(record["curve"]) for record in by_cell[name]) for name in by_cell if WU in cells[name].published
    ]
    slow, seed = max(taken, key=lambda run: taken[run])
    said = (
        f"The slowest run, {slow} with seed {seed}, took {taken[slow, seed]:.1f} CPU minutes, the median "
        f"{statistics.median(taken.values()):.1f}."
    )
    if not passes:
        return said
    return (
        f"Against the published rows of {WU}, whose time is not stated: 3,000 passes over the data there, 1,000 of\n"
        f"training and 2,000 of descent; at most {max(passes)} here. {said}"
    )


def _ranking(by_cell: dict[str, list[Record]]) -> str:
    """Whether the published variants rank as published."""
    names = {"base": "Base", "appr": "Appr", "iter.m": "Iter.M", "iter": "Iter"}
    values = {
        shown: _mean([record["value"] for record in by_cell[f"two-600-{name}"]])
        for name, shown in names.items()
        if f"two-600-{name}" in by_cell
    }
    if len(values) < 2:
        return ""
    order = " > ".join(f"{name} {_short(value)}" for name, value in sorted(values.items(), key=lambda p: -p[1]))
    return (
        f"The published variants, from the same machinery and in as many epochs: {order} "
        "(published: Base > Appr > Iter.M > Iter). They are in CPU minutes what took 1,000 epochs of training and "
        "2,000 of descent, so their values are comparable with one another only."
    )


def _pictures(by_cell: dict[str, list[Record]]) -> dict[str, str]:
    """Name of a chart that can be drawn → its words."""
    found = {"bounds": "Certificates and published bounds"} if by_cell else {}
    if DRAWN in by_cell:
        found["variances"] = "Posterior variances of the first layer against curvature"
    return found


def draw(records: list[Record], cells: Mapping[str, Any], folder: Path) -> None:
    """The charts of the page."""
    by_cell: dict[str, list[Record]] = {}
    for record in records:
        by_cell.setdefault(record["name"], []).append(record)
    folder.mkdir(exist_ok=True)
    pictures = _pictures(by_cell)
    if "bounds" in pictures:
        save_chart(bounds_chart(by_cell, cells), folder / "bounds.svg")
    if "variances" in pictures:
        save_chart(variances_chart(by_cell[DRAWN][0]), folder / "variances.svg")


def bounds_chart(by_cell: Mapping[str, list[Record]], cells: Mapping[str, Any]) -> Any:
    """Certificates, published bounds, and errors on test data."""
    rows = []
    for name, cell in cells.items():
        if name not in by_cell:
            continue
        rows.append({"cell": name, "value": _mean([r["value"] for r in by_cell[name]]), "of": "certificate"})
        test = _mean([r["test_error"] for r in by_cell[name]])
        rows.append({"cell": name, "value": test, "of": "its error on test data"})
        if cell.published[0] == ".":
            number = float(cell.published.split()[0])
            rows.append({"cell": name, "value": number, "of": "published bound"})
    order = [name for name in cells if name in by_cell]
    colours = alt.Scale(
        domain=["certificate", "published bound", "its error on test data"],
        range=["#0072B2", "#D55E00", MUTED],
    )
    points = blank(rows).mark_point(filled=True, size=80)
    points = points.encode(
        x=alt.X("value:Q", title="share of errors", scale=alt.Scale(domainMin=0)),
        y=alt.Y("cell:N", sort=order, title=None, axis=alt.Axis(grid=True, labelLimit=220)),
        color=alt.Color("of:N", scale=colours, legend=alt.Legend(title=None)),
        shape=alt.Shape("of:N", scale=alt.Scale(domain=colours.domain), legend=None),
    )
    return finished(alt.layer(points), width=560, height=26 * len(order))


def variances_chart(record: Record) -> Any:
    """Posterior variances of the first layer against curvature."""
    layer, (curvature, variance) = next(iter(record["variances"].items()))
    rows = [{"h": h, "s": s} for h, s in zip(curvature, variance, strict=True) if h > 0]
    prior = [{"s": record["scales"][layer]}]
    points = blank(rows).mark_point(filled=True, size=25, opacity=0.6, color="#0072B2")
    across, up = [row["h"] for row in rows], [row["s"] for row in rows + prior]
    points = points.encode(
        x=alt.X(**_logarithmic("h:Q", f"curvature h ({layer})", min(across), max(across))),
        y=alt.Y(**_logarithmic("s:Q", "posterior variance s", min(up) / 1.3, max(up) * 1.3)),
    )
    rule = blank(prior).mark_rule(color=INK, strokeDash=[5, 4]).encode(y="s:Q")
    return finished(alt.layer(points, rule), width=560, height=300)


def _logarithmic(kind: str, title: str, low: float, high: float) -> dict[str, Any]:
    """A coordinate of a chart, on a logarithmic axis from low to high."""
    return {
        "shorthand": kind,
        "title": title,
        "scale": alt.Scale(type="log", nice=False, domain=[low, high]),
        "axis": log_axis(low, high),
    }


def _mean(values: Iterable[float]) -> float:
    known = list(values)
    return sum(known) / len(known)


def _spread(values: list[float]) -> str:
    mean = _mean(values)
    if len(values) < 2:
        return _short(mean)
    return f"{_short(mean)} ± {_short(statistics.stdev(values) / len(values) ** 0.5)}"


def _short(value: float, digits: int = 4) -> str:
    return f"{value:.{digits}f}".removeprefix("0")

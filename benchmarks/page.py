"""From rows to the page `benchmarks.md`: what is lost or missed first, then tables and charts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks import charts
from benchmarks.measure import OURS, Row

INTRODUCTION = """\
# Benchmarks

Written by `make bench` from [bench/results.json](bench/results.json), which it wrote before; do not edit.

The unit **g** is the CPU time of one gradient over the same data by plain PyTorch, in the same process and one
thread. Calls of all tools take turns, each beside a gradient; a figure is the median of up to five runs, with the
smallest and the largest in brackets (fewer runs where one takes long). What a tool returns is checked first: a
wrong product, or pairs of which one is missing, are marked **wrong** and never count as fast. Peers are called
as their documentation says, with their own checks switched off, on batches of equal size."""

ABOUT = {
    "products": """\
## One product

v ↦ H v and v ↦ G v over all the data, against float64 products written from the definitions; right means a
relative error under 10⁻³. Graphs are kept across products by deepspectra; the peers build theirs each time. The
*bound* counts multiplications in matrix products and convolutions: with F a forward pass and g a gradient, as
PyTorch's FlopCounterMode counts them, H v takes at least 4g − 6F and G v at least 2g − 2F when all that does not
depend on v is kept. A cost under the bound means that the gradient itself runs below the machine's speed there.
Beside it in brackets: our distance from it.""",
    "means": """\
## Class means

All class means g_c and cross-class means g_{c,k} of the gradients, against float64; no peer has them.""",
    "pairs": """\
## Ten eigenpairs, certified

The ten largest eigenpairs of H with residuals ‖Hv − λv‖ ≤ 10⁻²·|λ|, none missing, from model and data to the
result: reading, checks and graphs included. curvlinops has no eigensolver; its operator goes through SciPy's
`eigsh(tol=1e-2)`. hessian-eigenthings runs the fewest steps that suffice, found in hindsight, which a user cannot
know. The residual shown is the true one of the first run, measured by us.""",
    "subspace": """\
## The principal subspace against cost

Overlap of what is found with the span of the true top nine, from model and data to the result. *Sampled* is
`principal_subspace(level="sampled")` from so many examples; *certified* adds three products on all the data, and
draws as many examples as it chooses itself.""",
    "density": """\
## Density at equal products

Distances to the exact spectrum, medians of three seeds: Wasserstein-1 over the mean |λ|, Kolmogorov-Smirnov's, and
Wasserstein-1 of log₁₀|λ| in decades, where sizes below 10⁻⁶ of the largest are taken for it. All tools multiply with
the same float32 matrix, PyHessian with its own products. curvlinops gets the spectrum's ends for free; it gives a
smooth curve, whose kernel counts. hessian-eigenthings is given in several divisions into runs × steps; a user has to
choose one beforehand. deepspectra's probes have 64 steps, its default, half of the products, as in an analysis, or
all; what is lost above is so by the best division of either side. nngeom gives Ritz values without weights. PyHessian
needs a function that PyTorch dropped, which is lent to it.""",
}
WHY = {  # why targets of a section are out of reach, and what was tried
    "products": """\
**Products.** They are near what their multiplications allow; the rest is masks, sums and the loss's curvature, a pass
over memory each. Batches follow what backpropagation keeps of them, which suits H and G at once only about. Tried:
linearising the gradient (no cheaper, three times the memory), blocks of vectors (large ones hurt).""",
    "means": """\
**Means.** One forward pass, one backward pass for all classes at once, and one more for each further potential
class. What is over the target is masks and sums.""",
    "pairs": """\
**Pairs.** Figures are of a challenge that stopped after six products. The present one goes on until a missed pair
is improbable (1 run in 5,000), which takes the more the smaller the gap after the wanted values. From a sample's
eigenvectors (LeNet, MNIST 30,000) 17 or 18 products on all the data were enough, near the least: ten measured
residuals, six challenged the pairs to show one that is missing, which no peer does. The sample's 40 products and
the checks are what is over the targets. Where a quarter of the examples is too small a sample, residuals pass
after 22 to 24 products from a random vector, as with hessian-eigenthings, whose fewest in hindsight are 22, and
the challenge follows. Tried: class means as a start (saves nothing), pairs of the sample that are not challenged
(24 products with it in place of 40, but copies of double eigenvalues are missed).""",
    "subspace": """\
**Subspaces.** Of 7.4 g for a sample of 500 of 5,000 examples, 22 products take 4.1, orthogonalising their
vectors 1.2, reading and checking the problem .8, checking its derivatives .6, drawing .7. Fewer products lose
vectors: with 18 the overlaps of three samples are .95, .86 and .96 in place of .99 (MNIST). A certificate is
three products on all the data, 4.9 g: 8 g leave room for it where a sample is a smaller share of them.""",
    "density": """\
**Density.** The miss is half a percent of the target, less than seeds differ: an untrained network has no
outliers that locking could take away.""",
}
MEASURES = {
    "W1": "Wasserstein-1 over the mean |λ|",
    "KS": "Kolmogorov-Smirnov",
    "decades": "Wasserstein-1 of log₁₀|λ|, decades",
}
CHARTS = {
    "products": charts.products,
    "pairs": charts.pairs,
    "subspace": charts.subspace,
    "density": charts.density,
}


def line(row: Row) -> str:
    """A row on the terminal."""
    parts = (row.case, row.what, row.tool, _cost(row), _quality(row), row.target, _met(row), row.note)
    return " · ".join(part for part in parts if part)


def finite(tree: Any) -> Any:
    """The same with null for what is not a finite number."""
    if isinstance(tree, dict):
        return {key: finite(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def write(kept: dict[str, Any], out: Path) -> None:
    """Page and charts from what `results.json` holds."""
    sections = {name: kept["sections"][name] for name in ABOUT if name in kept["sections"]}
    rows = {name: [Row(**row) for row in section["rows"]] for name, section in sections.items()}
    blocks = [INTRODUCTION, _where(sections), _verdict([row for some in rows.values() for row in some])]
    for name, some in rows.items():
        blocks.append(ABOUT[name])
        if name in CHARTS and charts.save(CHARTS[name](some), out / "bench" / f"{name}.svg"):
            blocks.append(f"![{name}](bench/{name}.svg)")
        blocks.append(TABLES[name](some))
    (out / "benchmarks.md").write_text("\n\n".join(blocks) + "\n", encoding="utf-8")


def _where(sections: dict[str, Any]) -> str:
    """Machine and versions; one line for all sections that share them."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, section in sections.items():
        found = ", ".join(f"{key}: {value}" for key, value in section["machine"].items())
        tools = ", ".join(f"{tool} {version}" for tool, version in section["versions"].items())
        groups.setdefault((found, tools), []).append(
            f"{name} ({section['date']}, {section['cpu_minutes']:g} CPU minutes)"
        )
    notes = dict.fromkeys(section["note"] for section in sections.values() if section.get("note"))
    return "\n".join(
        [f"- Machine: {found}\n- Versions: {tools}\n- Measured: {'; '.join(names)}"
         for (found, tools), names in groups.items()]
        + [f"- {note}" for note in notes]
    )  # fmt: skip


def _verdict(rows: list[Row]) -> str:
    """How many targets are met, every one that is missed, and every row in which a right peer costs less."""
    aimed = [row for row in rows if row.met is not None]
    missed = [f"- {line(row)}" for row in aimed if not row.met]
    lost = [
        f"- lost: {row.case} · {row.what}: {best.tool} {_value(best)}, we {_value(mine)}"
        for row in rows
        if row.tool == OURS
        and (best := _best(rows, row, ours=False))
        and (mine := _best(rows, row, ours=True))
        and _size(best) < _size(mine)
    ]
    head = f"## Lost and missed\n\n{len(aimed) - len(missed)} of {len(aimed)} targets are met. "
    head += f"A peer is ahead in {len(lost)} comparisons." if lost else "No right peer is ahead in any comparison."
    why = [text for name, text in WHY.items() if any(row.section == name for row in aimed if not row.met)]
    return "\n\n".join(filter(None, [head, "\n".join([*missed, *lost]), *why]))


def _size(row: Row) -> float:
    """What is compared: the cost, or the distance where the cost is the same."""
    size = row.quality if row.section == "density" else row.cost
    return math.inf if size is None else size


def _compared(row: Row) -> str:
    return row.measure if row.section == "density" else "cost"


def _value(row: Row) -> str:
    return _quality(row) if row.section == "density" else _cost(row)


def _best(rows: Iterable[Row], task: Row, *, ours: bool) -> Row | None:
    """The least costly right result on a row's task, of ours or of others, however a tool divides its products."""
    key = (task.section, task.case, task.what, _compared(task))
    rivals = [
        row
        for row in rows
        if (row.section, row.case, row.what, _compared(row)) == key
        and row.tool.startswith(OURS) == ours
        and row.right
        and _size(row) < math.inf
    ]
    return min(rivals, key=_size, default=None)


# cells


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _cost(row: Row) -> str:
    if row.cost is None:
        return ""
    return f"{_number(row.cost)} g [{_number(row.low or 0)}, {_number(row.high or 0)}]"


def _quality(row: Row) -> str:
    wrong = "" if row.right else "wrong"
    if row.quality is None:
        return wrong
    shown = f"{row.quality:.3f}" if row.measure == "overlap" else f"{row.quality:.2g}"
    return " ".join(part for part in (wrong, row.measure, shown) if part)


def _met(row: Row) -> str:
    return {None: "", True: "met", False: "missed"}[row.met]


def _cell(row: Row | None) -> str:
    """One tool's cost in a table of many."""
    if row is None:
        return "–"
    if row.cost is None:
        return "failed"
    return f"{_number(row.cost)} [{_number(row.low or 0)}, {_number(row.high or 0)}]" if row.right else _wrong(row)


def _wrong(row: Row) -> str:
    off = "NaN" if row.quality is None else f"off by {row.quality:.0%}" if row.quality < 10 else "wrong"
    return f"**wrong**, {off} ({_number(row.cost or 0)})"


def _ratio(rows: list[Row], ours: Row) -> str:
    best = _best(rows, ours, ours=False)
    return f"{_size(best) / _size(ours):.2f}×" if best else "–"


def _target(row: Row) -> str:
    return f"{row.target}: {'met' if row.met else '**missed**'}" if row.target else ""


def _table(head: list[str], lines: Iterable[list[str]]) -> str:
    body = ["| " + " | ".join(cells) + " |" for cells in lines]
    return "\n".join(["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *body])


# tables


def _products(rows: list[Row]) -> str:
    """One line a product, one column a tool."""
    tools = list(dict.fromkeys(row.tool for row in rows))
    lines = []
    for case, what in dict.fromkeys((row.case, row.what) for row in rows):
        some = {row.tool: row for row in rows if (row.case, row.what) == (case, what)}
        ours = some[OURS]
        far = "" if ours.cost is None or ours.bound is None else f" ({ours.cost / ours.bound:.2f}×)"
        bound = "–" if ours.bound is None else f"{ours.bound:.2f}{far}"
        targets = "; ".join(filter(None, (_target(row) for row in some.values())))
        lines.append([case, what, *(_cell(some.get(tool)) for tool in tools), bound, _ratio(rows, ours), targets])
    return _table(["network, data", "product", *tools, "bound (we)", "best peer / we", "target"], lines)


def _means(rows: list[Row]) -> str:
    lines = [[row.case, row.what, _cell(row), _quality(row), _target(row)] for row in rows]
    return _table(["network, data", "what", "cost, g", "against float64", "target"], lines)


def _pairs(rows: list[Row]) -> str:
    lines = [
        [
            row.case,
            row.tool,
            _cell(row) if row.right or row.cost is None else f"**wrong** ({_number(row.cost)})",
            f"{row.num_products:.0f}" if row.num_products else "–",
            "–" if row.quality is None else f"{row.quality:.1g}",
            _ratio(rows, row) if row.tool == OURS else "",
            _target(row),
            row.note,
        ]
        for row in rows
    ]
    return _table(
        ["network, data", "tool", "cost, g", "products", "residual", "best peer / we", "target", "note"],
        lines,
    )


def _subspace(rows: list[Row]) -> str:
    lines = [
        [
            row.case,
            row.tool,
            row.what,
            _cell(row),
            "–" if row.quality is None else f"{row.quality:.4f}",
            _target(row),
            row.note,
        ]
        for row in rows
    ]
    return _table(["network, data", "tool", "how", "cost, g", "overlap", "target", "note"], lines)


def _density(rows: list[Row]) -> str:
    """A table a measure, one line a tool, one column a budget."""
    notes = [
        f"{row.case}: {row.what}: {row.quality:.0f} ({_target(row)})." for row in rows if row.measure == "ghosts"
    ]
    failed = sorted({f"{row.tool} {row.note}." for row in rows if row.quality is None})
    tables = []
    for measure, words in MEASURES.items():
        if some := [row for row in rows if row.measure == measure]:
            tables += [f"{words}:", _budgets(some)]
    return "\n\n".join([*tables, *notes, *failed])


def _budgets(rows: list[Row]) -> str:
    budgets = list(dict.fromkeys(row.what for row in rows))
    lines = []
    for case, tool in dict.fromkeys((row.case, row.tool) for row in rows):
        some = {row.what: row for row in rows if (row.case, row.tool) == (case, tool)}
        cells = []
        for budget in budgets:
            row = some.get(budget)
            shown = "–" if row is None else "failed" if row.quality is None else _number(row.quality)
            cells.append(f"{shown} ({_target(row)})" if row and row.target else shown)
        lines.append([case, tool, *cells])
    return _table(["network, data", "tool", *budgets], lines)


TABLES: dict[str, Callable[[list[Row]], str]] = {
    "products": _products,
    "means": _means,
    "pairs": _pairs,
    "subspace": _subspace,
    "density": _density,
}

"""Charts of the rows, as Altair specifications; saved as SVG without a browser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import altair as alt

from benchmarks.measure import OURS, Row
from deepspectra.report.drawing import finished, save_chart

COLOURS = {  # Okabe and Ito's palette
    OURS: "#0072B2",
    "curvlinops": "#D55E00",
    "hessian-eigenthings": "#E69F00",
    "PyHessian": "#CC79A7",
    "BackPACK": "#009E73",
    "NNGeometry": "#5f6c7b",
}
WIDTH = 640
Chart = Any


def save(chart: Chart | None, path: Path) -> bool:
    """Save a chart, if there is one."""
    if chart is None:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    save_chart(chart, path)
    return True


def _family(tool: str) -> str:
    """The tool without its settings."""
    return tool.partition(",")[0]


def _colour(table: list[dict[str, Any]]) -> alt.Color:
    names = [name for name in COLOURS if name in {row["tool"] for row in table}]
    scale = alt.Scale(domain=names, range=[COLOURS[name] for name in names])
    return alt.Color("tool:N", scale=scale, sort=None, title=None)


def products(rows: list[Row]) -> Chart | None:
    """Cost of H v and G v by network: a point a tool, hollow when wrong, a tick at the arithmetic's bound."""
    table = [
        {
            "task": f"{row.case}: {row.what}",
            "tool": row.tool,
            "cost": row.cost,
            "bound": row.bound,
            "right": row.right,
        }
        for row in rows
        if row.cost is not None and row.bound is not None
    ]
    if not table:
        return None
    base = alt.Chart({"values": table})
    y = alt.Y("task:N", sort=None, title=None, axis=alt.Axis(labelLimit=320))
    x = alt.X("cost:Q", scale=alt.Scale(type="log", nice=False, padding=12), title="cost in gradients")
    right = alt.condition("datum.right", alt.value(1), alt.value(0))
    points = base.mark_point(size=90, strokeWidth=2).encode(
        x=x, y=y, color=_colour(table), fill=_colour(table), fillOpacity=right
    )
    bounds = base.mark_tick(color="#1f2933", thickness=2, size=16).encode(x="bound:Q", y=y)
    text = {"text": "One product", "subtitle": "bar: least cost that the arithmetic allows; hollow: wrong"}
    return finished(bounds + points, width=WIDTH, height=26 * len({row["task"] for row in table}), title=text)


def pairs(rows: list[Row]) -> Chart | None:
    """Cost of ten certified pairs."""
    table = [
        {
            "tool": row.tool,
            "cost": row.cost,
            "task": row.case,
            "label": f"{row.cost:.0f} g" + ("" if row.right else ", wrong"),
            "right": row.right,
        }
        for row in rows
        if row.cost is not None
    ]
    if not table:
        return None
    order = [name for name in COLOURS if name in {row["tool"] for row in table}]
    base = alt.Chart({"values": table})
    y = alt.Y("tool:N", sort=order, title=None, axis=None)
    x = alt.X("cost:Q", title="cost in gradients")
    bars = base.mark_bar().encode(
        x=x, y=y, color=_colour(table), opacity=alt.condition("datum.right", alt.value(1), alt.value(0.35))
    )
    text = base.mark_text(align="left", dx=4, color="#1f2933").encode(x=x, y=y, text="label:N")
    cases = list(dict.fromkeys(row["task"] for row in table))
    panels = [
        (bars + text)
        .transform_filter(f"datum.task == {case!r}")
        .properties(width=WIDTH, height=22 * sum(row["task"] == case for row in table), title=case)
        for case in cases
    ]
    return finished(alt.vconcat(*panels).resolve_scale(x="shared"))


def subspace(rows: list[Row]) -> Chart | None:
    """What is missing of the top nine against cost, a panel a case."""
    kinds = {"class means": "means", "cross-class means": "means", "sampled, certified": "certified"}
    table = [
        {
            "tool": _family(row.tool),
            "cost": row.cost,
            "missing": max(1 - row.quality, 1e-5),
            "task": row.case,
            "how": kinds.get(row.what, "Lanczos" if "ste" in row.what or "products" in row.what else "sampled"),
            "label": row.what.replace("eigenpairs, ", "").replace(" products", "").replace(" steps", "")
            .replace("sampled, ", "").replace(" means", ""),
        }
        for row in rows
        if row.cost is not None and row.quality is not None
    ]  # fmt: skip
    if not table:
        return None
    base = alt.Chart({"values": table})
    x = alt.X("cost:Q", scale=alt.Scale(type="log"), title="cost in gradients")
    y = alt.Y("missing:Q", scale=alt.Scale(type="log"), axis=alt.Axis(format="~g"), title="1 − overlap")
    points = base.mark_point(size=80, filled=True).encode(
        x=x, y=y, color=_colour(table), shape=alt.Shape("how:N", title=None)
    )
    lines = base.mark_line(strokeWidth=1).encode(x=x, y=y, color=_colour(table), detail="how:N")
    text = base.mark_text(align="left", dx=6, dy=-5, fontSize=10).encode(x=x, y=y, text="label:N")
    panels = [
        (lines + points + text)
        .transform_filter(f"datum.task == {case!r}")
        .properties(width=WIDTH // 2 - 20, height=230, title=case)
        for case in dict.fromkeys(row["task"] for row in table)
    ]
    return finished(alt.concat(*panels, columns=2).resolve_scale(x="shared", y="shared"))


def density(rows: list[Row]) -> Chart | None:
    """Distance to the exact spectrum against products, of each tool's best setting."""
    best: dict[tuple[str, str, float], float] = {}
    for row in rows:
        if row.measure == "W1" and row.quality is not None and row.num_products:
            key = (row.case, _family(row.tool), row.num_products)
            best[key] = min(best.get(key, row.quality), row.quality)
    table = [
        {"task": case, "tool": tool, "products": products, "distance": distance}
        for (case, tool, products), distance in best.items()
    ]
    if not table:
        return None
    ticks = sorted({row["products"] for row in table})
    base = alt.Chart({"values": table})
    x = alt.X("products:Q", scale=alt.Scale(type="log", domain=[ticks[0] * 0.9, ticks[-1] * 1.1]),
              axis=alt.Axis(values=ticks), title="products")  # fmt: skip
    y = alt.Y("distance:Q", scale=alt.Scale(type="log"), axis=alt.Axis(format="~g"), title="W1 / mean |λ|")
    lines = base.mark_line(point=alt.OverlayMarkDef(size=70)).encode(x=x, y=y, color=_colour(table))
    panels = [
        lines.transform_filter(f"datum.task == {case!r}").properties(width=WIDTH // 2 - 20, height=230, title=case)
        for case in dict.fromkeys(row["task"] for row in table)
    ]
    return finished(alt.concat(*panels, columns=2).resolve_scale(y="shared"))

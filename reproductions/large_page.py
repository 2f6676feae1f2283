"""The page of `reproductions.large_networks`, of its records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import altair as alt
import torch

import deepspectra as ds
from deepspectra.file_writing import save_whole
from deepspectra.report.drawing import blank, finished, save_chart
from reproductions.verdicts import table

GIB, DECADES, POINTS = 2**30, 5, 60  # of the axis on each side of zero, and points a side
LABELS = {
    "checks": "checks of the derivatives",
    "plan": "plan from one batch",
    "product": "H v, graphs built",
    "pairs": "ten pairs",
    "shares": "their shares",
    "density": "density",
}
Record = dict[str, Any]


def curve_of(density: ds.Density) -> dict[str, Any]:
    """Bounds of the share of eigenvalues at or below points of both signs, which hold it 19 times in 20."""
    largest = float(density.nodes.abs().max())
    side = largest * torch.logspace(-DECADES, 0, POINTS, dtype=torch.float64)
    x = torch.cat([-side.flip(0), torch.zeros(1, dtype=torch.float64), side])
    low, high = density.cdf_band(x)
    return {"x": x.tolist(), "low": low.tolist(), "high": high.tolist()} | {
        "mean": density.mean, "mean_error": density.mean_standard_error, "products": density.num_products,
        "exact": len(density.exact), "merged": density.merged,
    }  # fmt: skip


def keep(path: Path, name: str, record: Record) -> None:
    """The records with this network's in place of an older one."""
    records = read(path) | {name: record}
    text = "".join(json.dumps({"network": name} | found) + "\n" for name, found in records.items())
    save_whole(path, lambda staged: staged.write_text(text))


def read(path: Path) -> dict[str, Record]:
    """By network."""
    lines = path.read_text().splitlines() if path.is_file() else []
    return {record.pop("network"): record for record in map(json.loads, lines)}


def write(path: Path) -> None:
    """The page beside the records, and its charts in a folder of the same name."""
    folder = path.with_suffix("")
    folder.mkdir(exist_ok=True)
    records = read(path)
    for name, record in records.items():
        save_chart(chart(record["density"]), folder / f"{name}.svg")
    save_whole(path.with_suffix(".md"), lambda staged: staged.write_text(page(records, folder.name)))


def chart(curve: dict[str, Any]) -> Any:
    """The bounds of the share of eigenvalues above x: so few steps resolve no curve within them."""
    largest = max(curve["x"])
    rows = [
        {"x": x, "low": 1 - high, "high": 1 - low}
        for x, low, high in zip(curve["x"], curve["low"], curve["high"], strict=True)
    ]
    scale = alt.Scale(type="symlog", constant=largest * 10.0**-DECADES)
    x = alt.X("x:Q", title="λ", scale=scale, axis=alt.Axis(values=_ticks(largest), format=".0e"))
    band = blank(rows).mark_area(opacity=0.4).encode(x=x, y=alt.Y("low:Q", title="share above λ"), y2="high:Q")
    return finished(alt.layer(band), width=560, height=220)


def _ticks(largest: float) -> list[float]:
    sizes = [largest * 10.0**-k for k in range(0, DECADES, 2)]
    return [*(-size for size in sizes), 0.0, *reversed(sizes)]


def page(records: dict[str, Record], folder: str) -> str:
    """As Markdown."""
    lines = [
        "# Large networks",
        "",
        "The ten largest eigenpairs of H, what they owe to classes and logits, and a density of 64 products, of "
        "networks with tens of millions of parameters, on two cores of a CPU. Each pair's residual is measured, and "
        "that none is missing is challenged by a random vector ([verdicts](howto/verdicts.md)).",
        "",
        table(
            ["network", "parameters", "rows × classes", "minutes", "CPU minutes", "threads", "products", "memory"],
            [_summary(name, record) for name, record in records.items()],
        ),
        "",
        "Minutes are those of the stages below; other programs used the machine as well. Memory is the most that the "
        "process had, model and libraries included. The networks were trained before, which is not in it.",
    ]
    for name, record in records.items():
        lines += ["", f"## {name}", "", *_section(name, record, folder)]
    lines += ["", "`python -m reproductions.large_networks` does it again."]
    return "\n".join(lines) + "\n"


def _summary(name: str, record: Record) -> list[str]:
    stages = record["stages"].values()
    seconds, cpu = (sum(stage[key] for stage in stages) for key in ("seconds", "cpu_seconds"))
    return [
        name,
        f"{record['parameters']:,}",
        f"{record['rows']:,} × {record['classes']:,}",
        f"{seconds / 60:.1f}",
        f"{cpu / 60:.1f}",
        "/".join(sorted({str(stage["threads"]) for stage in stages})),
        str(sum(stage["products"] for stage in stages)),
        f"{max(stage['peak'] for stage in stages) / GIB:.1f} GiB",
    ]


def _section(name: str, record: Record, folder: str) -> list[str]:
    plan, curve = record["plan"], record["density"]
    sure = "converged, and none is missing" if record["converged"] else "not all converged, or one may be missing"
    stages = [
        [
            LABELS.get(stage, stage),
            str(taken["products"] or ""),
            f"{plan[stage]:.0f}" if stage in ("pairs", "shares", "density", "product") else "",
            f"{taken['seconds']:.0f}",
            f"{taken['cpu_seconds']:.0f}",
            f"{taken['peak'] / GIB:.1f}",
        ]
        for stage, taken in record["stages"].items()
    ]
    pairs = [
        [str(j + 1), f"{value:.4g}", f"{residual / abs(value):.0e}", *(f"{share:.0%}" for share in shares)]
        for j, (value, residual, shares) in enumerate(
            zip(record["values"], record["residuals"], record["shares"], strict=True)
        )
    ]
    groups = f" Classes and logits are groups of tokens: {', '.join(record['names'])}." if record["names"] else ""
    last = record["values"][-1]
    at = min(range(len(curve["x"])), key=lambda j: abs(curve["x"][j] - last / 10))
    zero = curve["x"].index(0.0)
    return [
        f"{record['about']}. The loss there is {record['loss']:.3g}. A gradient was foreseen to take "
        f"{plan['gradient']:.1f} s, its graphs for H {plan['graphs'] / GIB:.2f} GiB in {plan['batches']} batches.",
        "",
        table(["stage", "products", "foreseen, s", "taken, s", "CPU s", "peak, GiB"], stages),
        "",
        *([record["note"], ""] if "note" in record else []),  # by hand, of what a run met
        f"The pairs have {sure} ({record['status']}).{groups}",
        "",
        table(["", "λ", "‖Hv − λv‖/λ", *record["parts"]], pairs),
        "",
        f"![Share of eigenvalues above λ]({folder}/{name}.svg)",
        "",
        f"The density's mean is {curve['mean']:.3g} ± {curve['mean_error']:.1g}. What 64 products leave open is the "
        f"band, which holds the share of eigenvalues above each λ 19 times in 20: above {curve['x'][at]:.2g}, "
        f"{1 - curve['high'][at]:.2g} to {1 - curve['low'][at]:.2g} of them; above zero, "
        f"{1 - curve['high'][zero]:.2g} to {1 - curve['low'][zero]:.2g}, which says how far the middle of "
        "the spectrum is resolved.",
        *_peers(record),
    ]


def _peers(record: Record) -> list[str]:
    if not record.get("peers"):
        return []
    ours = record["stages"]
    rows = [
        ["deepspectra", f"{ours['product']['seconds']:.0f}", "", str(ours["pairs"]["products"]),
         f"{ours['pairs']['seconds']:.0f}", f"{_worst(record['residuals'], record['values']):.0e}",
         f"{ours['pairs']['peak'] / GIB:.1f}", ""]
    ]  # fmt: skip
    for peer, found in record["peers"].items():
        worst = f"{max(found['residuals']):.0e}" if "residuals" in found else ""
        rows.append([
            peer,
            f"{found['product_seconds']:.0f}" if "product_seconds" in found else "",
            f"{found['error']:.0e}" if "error" in found else "",
            str(found.get("products", "")),
            f"{found['pairs_seconds']:.0f}" if "pairs_seconds" in found else "",
            worst,
            f"{found['peak'] / GIB:.1f}" if "peak" in found else "",
            "; ".join(filter(None, [found.get("failure", ""), found["ended"]])).replace("|", r"\|"),
        ])  # fmt: skip
    head = ["tool", "H v, s", "off from ours", "products", "ten pairs, s", "worst residual/λ", "peak, GiB", "fails"]
    return [
        "",
        "The same asked of other tools: the same weights, rows and number of threads, called as their documentation "
        "says; where attention has no second derivative as they find it, once more with plain attention. curvlinops "
        "leaves pairs to SciPy's `eigsh`; hessian-eigenthings makes as many Lanczos steps as it is told, 60. Neither "
        "tells residuals, which are measured here, nor whether a pair is missing.",
        "",
        table(head, rows),
    ]


def _worst(residuals: list[float], values: list[float]) -> float:
    return max(residual / abs(value) for residual, value in zip(residuals, values, strict=True))

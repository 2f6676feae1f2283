"""What the efforts resolve: densities of H against all its eigenvalues in float64, on three trained networks.

python -m reproductions.resolution --data-root DIR [--networks mlp lenet] [--seeds 3]

keeps a line of docs/resolution.jsonl a density, goes on where it was stopped, and writes docs/resolution.md. Remove
lines after a change of the efforts or of `density`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from benchmarks.reference import FLOOR, decades, kolmogorov
from rich.console import Console
from torch import Tensor, nn

import deepspectra as ds
from deepspectra import zoo
from deepspectra.jobs.effort import EFFORTS
from reproductions.verdicts import table

HERE = Path(__file__).parent.parent / "docs"
RECORDS, PAGE = HERE / "resolution.jsonl", HERE / "resolution.md"
POINTS = 120  # a side, evenly spaced in the logarithm, at which bands are asked
PAIRS, RTOL = 13, 1e-2  # deflated, as an analysis of ten classes does
SEEDS = 3
MARKS = {"paper": (0.07, 0.12), "standard": (0.2, 0.35)}  # distribution function, decades
COVERED = 0.9
Record = dict[str, Any]


class Network(NamedTuple):
    """A network, and the images (N, C, H, W) that it is trained on: those of a data set, averaged over squares."""

    name: str
    build: Callable[[tuple[int, ...], int], nn.Module]
    data: str
    per_class: int
    square: int
    learning_rate: float
    epochs: int = 200


def _small_lenet(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Two convolutions of 3 and 6 channels, and two layers, on images of 28 × 28."""
    return nn.Sequential(
        nn.Conv2d(input_shape[0], 3, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(150, 12), nn.ReLU(), nn.Linear(12, num_classes),
    )  # fmt: skip


NETWORKS = {
    "mlp": Network(
        "MLP 49-40-30-10, MNIST of 7 × 7 pixels",
        lambda shape, classes: zoo.mlp(shape, classes, widths=(40, 30)), "mnist", 100, 4, 0.1,
    ),
    "mlp-bn": Network(
        "MLP 196-24-24-10 with batch norm, Fashion of 14 × 14 pixels",
        lambda shape, classes: zoo.mlp(shape, classes, widths=(24, 24), batch_norm=True), "fashion", 100, 2, 0.1,
    ),
    "lenet": Network("LeNet with 3 and 6 channels, Fashion", _small_lenet, "fashion", 40, 1, 0.05),
}  # fmt: skip


def trained(network: Network, root: Path) -> tuple[nn.Module, zoo.LabelledData]:
    """The network, fitted to its images."""
    data = zoo.load(network.data, root=root, per_class=network.per_class)
    images = nn.functional.avg_pool2d(data.inputs, network.square)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = network.build(tuple(images.shape[1:]), data.num_classes)
    labelled = zoo.LabelledData(images, data.targets, data.class_names, data.name, data.split)
    recipe = zoo.Recipe(network.epochs, network.learning_rate, batch_size=32)
    zoo.train(model, labelled, recipe)
    return model, labelled


def eigenvalues(model: nn.Module, data: zoo.LabelledData) -> Tensor:
    """All of H (P,), ascending, in float64."""
    matrix = ds.Hessian(ds.Problem(model, data, dtype=torch.float64)).dense()
    return torch.linalg.eigvalsh((matrix + matrix.T) / 2)


class Distances(NamedTuple):
    """How far a density is from all eigenvalues, those below `FLOOR` taken for zero.

    Attributes:
        ks: largest difference of the distribution functions (Kolmogorov and Smirnov).
        decades: mean difference of log10|λ| by rank (Wasserstein-1).
        covered: share of the points at which the band holds the truth.
        width: mean width of the band there.
        bins_covered, bins_width: the same of the masses between the points.
    """

    ks: float
    decades: float
    covered: float
    width: float
    bins_covered: float
    bins_width: float


def distances(found: ds.Density, exact: Tensor) -> Distances:
    """Of a density and all eigenvalues (P,), ascending."""
    floor = FLOOR * float(exact.abs().max())
    side = torch.logspace(0, -math.log10(FLOOR), POINTS, dtype=torch.float64) * floor
    points = torch.cat([-side.flip(0), side])

    def share(x: Tensor) -> Tensor:
        return torch.searchsorted(exact, x, right=True).double() / len(exact)

    low, high = found.cdf_band(points)
    least, most = found.mass_band(points)
    truth, slack = share(points), 0.5 / len(exact)  # rounding: shares are whole multiples
    inside = (low <= truth + slack) & (truth <= high + slack)
    held = (least <= truth.diff() + slack) & (truth.diff() <= most + slack)
    return Distances(
        ks=kolmogorov(found.nodes, found.weights, exact),
        decades=decades(found.nodes, found.weights, exact),
        covered=float(inside.double().mean()),
        width=float((high - low).mean()),
        bins_covered=float(held.double().mean()),
        bins_width=float((most - least).mean()),
    )


def measure(problem: ds.Problem, exact: Tensor, num_probes: int, num_steps: int, seed: int) -> Record:
    """One density beside deflated pairs, as an analysis takes it."""
    operator = ds.Hessian(problem)
    pairs = ds.eigenpairs(operator, PAIRS, rtol=RTOL, seed=seed)
    found = ds.density(operator, num_probes, num_steps, deflate=pairs, seed=seed + 2)
    return {
        "probes": num_probes, "steps": num_steps, "seed": seed, "products": found.num_products,
        "seconds": found.seconds, **distances(found, exact)._asdict(),
    }  # fmt: skip


HEAD = """# What the efforts resolve

Densities of H by the products of each effort, against all eigenvalues of H in float64, on networks that an analysis
could still take apart densely but is made to sample here. Medians of the seeds, and the worst in
brackets. Eigenvalues below 10⁻⁶ of the largest are taken for zero, as they are drawn.

- *distribution function*: the largest difference (Kolmogorov and Smirnov);
- *decades*: the mean difference of log₁₀|λ| by rank (Wasserstein-1);
- *band*: the share of {points} points, spread evenly over six decades on either side of zero, at which
  `Density.cdf_band` holds the truth, and its mean width; then those of `Density.mass_band`, for the masses between
  neighbouring points.

`python -m reproductions.resolution` measures it and writes this page.
"""


def page(records: list[Record]) -> str:
    """As Markdown."""
    parts = [HEAD.format(points=2 * POINTS).rstrip()]
    for name, network in NETWORKS.items():
        mine = [r for r in records if r["network"] == name]
        if not mine:
            continue
        facts = f"{mine[0]['size']:,} parameters, {mine[0]['examples']:,} images, training loss {mine[0]['loss']:.2g}"
        parts += ["", f"## {network.name}", "", f"{facts}.", ""]
        head = ["effort", "products", "distribution function", "decades", "band", "of bins", "mark"]
        parts.append(table(head, [_row(e, rows) for e in EFFORTS if (rows := _of(mine, e))]))
    return "\n".join(parts) + "\n"


def _of(records: list[Record], effort: str) -> list[Record]:
    level = EFFORTS[effort]
    return [r for r in records if (r["probes"], r["steps"]) == (level.num_probes, level.num_steps)]


def _row(effort: str, rows: list[Record]) -> list[str]:
    def cell(key: str, worst: Callable[..., float] = max) -> str:
        values = [row[key] for row in rows]
        return f"{statistics.median(values):.3f} ({worst(values):.3f})"

    return [
        f"{effort}, {rows[0]['probes']} × {rows[0]['steps']}",
        f"{rows[0]['products']:,}",
        cell("ks"),
        cell("decades"),
        f"{cell('covered', min)}, ± {statistics.median(r['width'] for r in rows) / 2:.3f}",
        f"{cell('bins_covered', min)}, ± {statistics.median(r['bins_width'] for r in rows) / 2:.4f}",
        _mark(effort, rows),
    ]


def _mark(effort: str, rows: list[Record]) -> str:
    """Whether all seeds meet what is asked of an effort."""
    if effort not in MARKS:
        return ""
    ks, decades = MARKS[effort]
    met = all(r["ks"] <= ks and r["decades"] <= decades and r["covered"] >= COVERED for r in rows)
    return f"≤ {ks:g}, ≤ {decades:g} decades, ≥ {COVERED:.0%}: {'met' if met else '**missed**'}"


def main() -> None:
    """Measure what is missing, a record a line, and write the page anew after each."""
    parser = argparse.ArgumentParser(prog="python -m reproductions.resolution", description=__doc__)
    parser.add_argument("--data-root", type=Path, default=os.environ.get("DEEPSPECTRA_DATA"))
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    records = [json.loads(line) for line in RECORDS.read_text().splitlines()] if RECORDS.exists() else []
    for name in options.networks:
        mine = [r for r in records if r["network"] == name]
        missing = [
            (level, seed)
            for seed in range(options.seeds)
            for effort, level in EFFORTS.items()
            if seed not in {r["seed"] for r in _of(mine, effort)}
        ]
        if not missing:
            continue
        if options.data_root is None:
            parser.error("--data-root or DEEPSPECTRA_DATA must name the folder of the data sets.")
        model, data = trained(NETWORKS[name], Path(options.data_root))
        problem, exact = ds.Problem(model, data), eigenvalues(model, data)
        facts = {
            "network": name,
            "size": len(exact),
            "examples": problem.num_examples,
            "loss": problem.loss(),
        }
        for level, seed in missing:
            records.append(facts | measure(problem, exact, level.num_probes, level.num_steps, seed))
            with RECORDS.open("a") as file:
                file.write(json.dumps(records[-1]) + "\n")
            Console().print(records[-1])
            PAGE.write_text(page(records))
    PAGE.write_text(page(records))


if __name__ == "__main__":
    main()

"""Sweep the networks that have not been measured yet, and write the pages from all that have.

python -m reproductions --data-root DIR [--store DIR] [--pages] [--stages 3]
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspectra as ds
from deepspectra.jobs.sweep_identity import identity
from deepspectra.jobs.sweep_store import Store
from reproductions import dissecting
from reproductions.measure import ClaimsCell
from reproductions.pages import Grid, claims_page, dynamics_page
from reproductions.records import earlier, keep, restore

DOCS = Path(__file__).parent.parent / "docs"
STORE = Path("runs/reproductions")
CELLS = DOCS / "claims-cells.jsonl"  # all that a store has, from which it can be made again
LOOKS = "progress"
SMALL = {
    "data": ["fashion", "mnist", "cifar10"],
    "model": ["mlp", "lenet", "mlp-bn"],
    LOOKS: [0.02, 0.1, 0.33, 1],
}
DEAR = SMALL | {"model": ["resnet18-small"]}


def stages() -> Iterator[dict[str, list[Any]]]:
    """Grids in the order in which they tell most for their cost; they do not overlap."""
    yield SMALL | {"per_class": [13], "seed": [0]}
    yield SMALL | {"per_class": [136], "seed": [0]}
    yield SMALL | {"per_class": [13], "seed": [1, 2]}
    for seed in range(3):
        yield SMALL | {"per_class": [51], "seed": [seed]}
    yield DEAR | {"per_class": [13], "seed": [0, 1, 2]}
    yield SMALL | {"per_class": [136], "seed": [1, 2]}
    yield SMALL | {"per_class": [702], "seed": [0, 1, 2]}
    yield DEAR | {"per_class": [51, 136, 702], "seed": [0, 1, 2]}


def opened(store: Path, root: Path | None) -> ClaimsCell:
    """The cell of the sweep, whose store has what was kept, and knows all the axes."""
    cell = ClaimsCell(root)
    name, version = identity(cell)
    for axes in stages():
        Store(store, axes, looks=LOOKS, cell=name, version=version)
    restore(CELLS, store)
    return cell


def write_pages(store: Path, docs: Path = DOCS) -> None:
    """From whatever cells there are."""
    found = ds.gather(store)
    cells = sum(math.prod(map(len, axes.values())) for axes in stages())
    grid = Grid(cells, cells // len(SMALL[LOOKS]))
    (docs / "claims.md").write_text(claims_page(found, earlier(DOCS / "claims.jsonl"), grid))
    (docs / "dynamics.md").write_text(dynamics_page(found, docs / "dynamics", grid))


def main() -> None:
    """Measure what is missing, stage by stage, and write the pages after each."""
    parser = argparse.ArgumentParser(prog="python -m reproductions", description=__doc__)
    parser.add_argument("--data-root", type=Path, default=os.environ.get("DEEPSPECTRA_DATA"))
    parser.add_argument("--store", type=Path, default=STORE, help="folder of the sweeps")
    parser.add_argument("--stages", type=int, default=len(list(stages())), help="how many of the grids")
    parser.add_argument("--pages", action="store_true", help="write the pages from what the store has")
    options = parser.parse_args()
    layers = options.store / "dissecting"
    cell = opened(options.store, options.data_root)
    if not options.pages:
        if options.data_root is None:
            parser.error("--data-root or DEEPSPECTRA_DATA must name the folder of the data sets.")
        dissecting.go_on(layers, options.data_root)
        for axes in list(stages())[: options.stages]:
            ds.sweep(cell, axes, options.store, looks=LOOKS, executor=1)
            keep(options.store, CELLS)
            write_pages(options.store)
    keep(options.store, CELLS)
    dissecting.write_page(layers)
    write_pages(options.store)


if __name__ == "__main__":
    main()

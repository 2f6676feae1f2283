"""Measure every network of the grid that has no record yet, and write the table.

python -m reproductions --data-root DIR [--models mlp lenet] [--data mnist] [--per-class 13 136] [--seeds 3]
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console

from reproductions.claims import page
from reproductions.measure import Run, measure

HERE = Path(__file__).parent.parent / "docs"
RECORDS, PAGE = HERE / "claims.jsonl", HERE / "claims.md"
MODELS = ("mlp", "mlp-bn", "lenet", "vgg11-bn", "resnet18")
SMALL = ("mlp", "mlp-bn", "lenet")  # that train in minutes: several seeds


def grid(models: list[str], data: list[str], sizes: list[int], seeds: int) -> list[Run]:
    """Runs in the order of their cost."""
    runs = [
        Run(model, name, size, seed)
        for size, model, name, seed in itertools.product(sizes, models, data, range(seeds))
        if model in SMALL or seed == 0
    ]
    return sorted(runs, key=lambda run: (run.model not in SMALL, run.per_class, run.data != "cifar10"))


def main() -> None:
    """Measure what is missing, a record a line, and write the page anew after each."""
    parser = argparse.ArgumentParser(prog="python -m reproductions", description=__doc__)
    parser.add_argument("--data-root", type=Path, default=os.environ.get("DEEPSPECTRA_DATA"))
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--data", nargs="+", default=["mnist", "fashion", "cifar10"])
    parser.add_argument("--per-class", nargs="+", type=int, default=[13, 136, 702])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--page-only", action="store_true", help="write the page from the records there are")
    options = parser.parse_args()
    records = [json.loads(line) for line in RECORDS.read_text().splitlines()] if RECORDS.exists() else []
    done = {tuple(record[key] for key in asdict(Run("", "", 0, 0))) for record in records}
    console = Console()
    runs = [] if options.page_only else grid(options.models, options.data, options.per_class, options.seeds)
    for run in runs:
        if tuple(asdict(run).values()) in done:
            continue
        if options.data_root is None:
            parser.error("--data-root or DEEPSPECTRA_DATA must name the folder of the data sets.")
        torch.manual_seed(run.seed)
        record = measure(run, Path(options.data_root))
        records.append(record)
        with RECORDS.open("a") as file:
            file.write(json.dumps(record) + "\n")
        found = record["H"]
        console.print(f"{run}: {found['outliers']} outliers, {record['seconds']:.0f} s")
        PAGE.write_text(page(records))
    if records:
        PAGE.write_text(page(records))


if __name__ == "__main__":
    main()

"""`python -m benchmarks`: measure, keep the rows in a file, write the page and its charts from them."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks import densities, means, page, pairs, peers, products
from benchmarks.measure import Row, machine
from deepspectra.results import versions

DOCS = Path(__file__).parent.parent / "docs"
RESULTS = "bench/results.json"
SECTIONS: dict[str, Callable[[list[Any], bool], Iterator[Row]]] = {
    "products": products.run,
    "means": means.run,
    "density": densities.run,
    "pairs": pairs.certified,
    "subspace": pairs.subspaces,
}


def main() -> None:
    """Measure what is asked for and write it down."""
    options = arguments()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    out = options.out or (Path(tempfile.mkdtemp(prefix="deepspectra-bench-")) if options.quick else DOCS)
    found, tools = peers.installed()
    console = Console()
    for tool, version in tools.items():
        console.print(f"{tool}: {version}")
    kept = read(out / RESULTS) if options.only else {"sections": {}}
    for name in options.only or SECTIONS:
        began = time.process_time()
        section: dict[str, Any] = {
            "machine": machine(),
            "versions": versions() | tools,
            "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
            "quick": options.quick,
            "note": options.note,
            "rows": [],
        }
        kept["sections"][name] = section
        for row in SECTIONS[name](found, options.quick):
            console.print(page.line(row), highlight=False, soft_wrap=True)
            section["rows"].append(asdict(row))
            section["cpu_minutes"] = round((time.process_time() - began) / 60, 1)
            write(out / RESULTS, kept)
    page.write(kept, out)
    console.print(f"written: {out / 'benchmarks.md'}, {out / RESULTS} and charts beside it", soft_wrap=True)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one small network, no targets; to see that it runs")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="measure these again, keep the file's others")
    parser.add_argument("--note", default="", help="what a reader should know of this run, for the page")
    parser.add_argument("--out", type=Path, help="folder; docs/ by default, a temporary one with --quick")
    return parser.parse_args()


def read(path: Path) -> dict[str, Any]:
    """What an earlier run kept."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"sections": {}}


def write(path: Path, kept: dict[str, Any]) -> None:
    """Keep the rows; NaN is written as null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(page.finite(kept), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

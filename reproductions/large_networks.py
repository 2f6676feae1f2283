"""What large networks take: top pairs of H, their shares by classes, a density, and the same asked of other tools.

python -m reproductions.large_networks [--networks gpt2 resnet18 vgg11-bn] [--threads 2] [--peers PYTHON]

Every stage is kept as it ends: stopped, the same command goes on behind it. Times are those of the runs that did the
stages; memory is the most that the process had in each. With --peers, the interpreter of an environment that has them
(`make .venv-bench/.installed`). Records are docs/large-networks.jsonl, of which docs/large-networks.md is written;
--page writes it alone.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # large pages: new memory of long vectors costs a fifth

import torch
from rich.console import Console

import deepspectra as ds
from deepspectra.analysis.attribute import pair_shares
from deepspectra.derivatives.products import products_of
from deepspectra.file_writing import save_whole
from deepspectra.jobs.effort import Effort
from deepspectra.jobs.pace import Pace
from deepspectra.jobs.plan_of_analysis import density_stage, pairs_stage, typical_products
from deepspectra.problem.memory_budget import parse_bytes, return_freed
from deepspectra.results import versions
from reproductions import large_models, large_page
from reproductions.large_peers import PEERS, peak_bytes

HERE = Path(__file__).parent.parent
RECORDS = HERE / "docs" / "large-networks.jsonl"
STORE = Path("runs") / "large-networks"
NUM, RTOL = 10, 3e-2  # pairs and their residuals, relative to each value
PROBES, STEPS, KERNEL = 4, 16, 512  # of the density, and points at which its curve is drawn
PEER_SECONDS = 1200  # after which a peer is stopped


class Budget(NamedTuple):
    """How memory is shared out: bytes for data and graphs while pairs are sought and later, and for vectors.

    Graphs take half of a problem's memory, and what finds pairs holds a basis beside them.
    """

    pairs: str
    later: str
    basis: str
    half: bool = False  # whether the basis is in bfloat16


NETWORKS = {
    "gpt2": Budget("3GiB", "9.5GiB", "8.5GiB"),
    "resnet18": Budget("8GiB", "8GiB", "4GiB"),
    "vgg11-bn": Budget("8GiB", "8GiB", "5GiB"),
}

# All graphs take 4.6 GiB, for which 18 rows of half the bytes leave room. On spectra like a language model's such a
# basis takes 43 to 52 products for ten pairs, 26 rows 42 to 50, and exact rows without limit 32 to 40.
HALF = Budget("10GiB", "10GiB", "4.2GiB", half=True)


class Run:
    """The stages of one network, each done once, and what they took."""

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self.folder, self.say = folder, say
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "record.json"
        self.record: dict[str, Any] = json.loads(self.path.read_text()) if self.path.is_file() else {"stages": {}}

    def stage(self, name: str, work: Callable[[], Any], products: Callable[[Any], int] = lambda _: 0) -> Any:
        """The result of a stage, kept as NAME.pt; its seconds, CPU seconds, products and peak of memory."""
        path = self.folder / f"{name}.pt"
        if path.is_file():
            return torch.load(path, weights_only=False)
        forget_peak()
        began, used = time.perf_counter(), time.process_time()
        found = work()
        taken = {
            "seconds": time.perf_counter() - began,
            "cpu_seconds": time.process_time() - used,
            "products": products(found),
            "peak": peak_bytes(),
            "threads": torch.get_num_threads(),
        }
        save_whole(path, lambda staged: torch.save(found, staged))
        self.record["stages"][name] = taken
        self.keep()
        self.say(f"{name}: {taken}")
        return found

    def keep(self, **more: Any) -> None:
        """Write what is known."""
        self.record |= more
        save_whole(self.path, lambda staged: staged.write_text(json.dumps(self.record)))


def forget_peak() -> None:
    """Have the kernel count the most memory of this process anew, without what the last stage freed in pieces."""
    gc.collect()
    return_freed()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # then the peaks are those of all stages so far
        return


def operators(made: large_models.Made, budget: Budget) -> ds.Hessian:
    """H, with the memory that vectors may have beside the graphs; J v, too, is checked, by reverse mode."""
    hessian = ds.Hessian(made.problem)
    hessian.memory = parse_bytes(budget.basis)
    if budget.half:
        hessian.basis = torch.bfloat16
    ds.GaussNewton(made.problem, way="double backward")
    return hessian


def plan(made: large_models.Made) -> dict[str, Any]:
    """What is foreseen of the stages, from one batch."""
    problem, pace = made.problem, Pace(made.problem)
    effort = Effort("", 0, RTOL, None, PROBES, STEPS, False, 0)
    push = pace.building("gauss_newton") + NUM * pace.product("gauss_newton") / 2
    return {
        "gradient": pace.gradient,
        "product": pace.product("hessian"),
        "graphs": pace.graphs("hessian"),
        "pairs": pairs_stage(pace, "hessian", NUM, typical_products).seconds,
        "density": density_stage(pace, effort, "hessian", "density of H").seconds,
        "shares": push,
        "batches": problem.batches.num_batches,
    }


def measure(name: str, store: Path, budget: Budget, say: Callable[[str], None]) -> Run:
    """All stages of one network."""
    run = Run(store / name, say)
    forget_peak()
    began, used = time.perf_counter(), time.process_time()
    make = large_models.language_model if name == "gpt2" else large_models.image_network
    made = make(*(() if name == "gpt2" else (name,)), run.folder, budget.later, say)
    problem = made.problem
    if "setting" not in run.record:
        torch.save(made.examples, run.folder / "examples.pt")
        run.keep(
            setting={"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - used},
            about=made.about,
            parameters=problem.num_parameters,
            rows=len(made.examples[1]),
            classes=problem.num_classes,
            names=list(made.names),
            loss=problem.loss(),
            versions=versions(),
        )
    forget_peak()
    began, used = time.perf_counter(), time.process_time()
    hessian = operators(made, budget)
    graphs = products_of(problem).allowance
    if "checks" not in run.record["stages"]:
        took = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - used}
        took |= {"products": 0, "peak": peak_bytes(), "threads": torch.get_num_threads()}
        run.record["stages"]["checks"] = took
        run.keep()
    foreseen = run.stage("plan", lambda: plan(made))
    products_of(problem).release()

    def product() -> tuple[torch.Tensor, torch.Tensor]:
        v = torch.randn(problem.num_parameters, generator=torch.Generator().manual_seed(1))
        return v, hessian @ v

    run.stage("product", product, lambda _: 1)
    whole, graphs.size = graphs.size, parse_bytes(budget.pairs) // 2
    products_of(problem).release()
    pairs = run.stage(
        "pairs",
        lambda: ds.eigenpairs(hessian, NUM, rtol=RTOL, start="random"),
        lambda found: found.num_products,
    )
    graphs.size = whole
    products_of(problem).release()
    parts = ds.decompose(problem, effects="two-way", groups=made.groups)
    shares = run.stage("shares", lambda: pair_shares(parts, pairs))
    products_of(problem).release()
    curve = run.stage("density", lambda: density(hessian, pairs), lambda found: found.num_products)
    run.keep(
        plan=foreseen,
        values=pairs.values.tolist(),
        residuals=pairs.residual_norms.tolist(),
        converged=pairs.converged,
        status=pairs.status,
        parts=[*parts, "residual"],
        shares=shares.tolist(),
        density=large_page.curve_of(curve),
        told=str(curve),
    )
    return run


def density(hessian: ds.Hessian, pairs: ds.Eigenpairs) -> ds.Density:
    """On the complement of the pairs, without a basis where there is no room for one."""
    room = hessian.memory // (4 * hessian.shape[0])
    basis = "full" if room > NUM + STEPS else "none"
    if basis == "none":
        hessian.memory = 3 * 4 * hessian.shape[0]  # one probe at a time, beside the pairs
    return ds.density(hessian, PROBES, STEPS, deflate=pairs, basis=basis)


def ask_peers(run: Run, name: str, python: str, limit: float) -> None:
    """What each peer says within the limit, in a process of its own with as many threads."""
    purelib = sysconfig.get_paths()["purelib"]  # for what their environment lacks
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE / "src"), purelib]),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    known = run.record.setdefault("peers", {})
    for peer in [peer for peer in PEERS if peer not in known]:
        command = [python, "-m", "reproductions.large_peers", name, str(run.folder), peer]
        run.say(f"{name}: {peer}")
        found: dict[str, Any] = {}
        try:
            ended = subprocess.run(
                command, check=False, env=environment, capture_output=True, text=True, timeout=limit
            )
            text, errors = ended.stdout, [_why(ended)] if ended.returncode else []
        except subprocess.TimeoutExpired as stopped:
            raw = stopped.stdout or b""
            text, errors = raw.decode() if isinstance(raw, bytes) else raw, [f"stopped after {limit:.0f} s"]
        for line in text.splitlines():
            if line.startswith("{"):
                found |= json.loads(line)
        known[peer] = found | {"ended": " ".join(errors)}
        run.keep()


def _why(ended: subprocess.CompletedProcess[str]) -> str:
    """The signal that killed a process, or the last line that it wrote."""
    if ended.returncode < 0:
        return f"killed by {signal.Signals(-ended.returncode).name}"
    return (ended.stderr.strip().splitlines() or [f"status {ended.returncode}"])[-1][:300]


def main() -> None:
    """Do what is not done yet, and write the page."""
    parser = argparse.ArgumentParser(prog="python -m reproductions.large_networks", description=__doc__)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--store", type=Path, default=STORE, help="folder of what is unfinished")
    parser.add_argument("--peers", help="interpreter of the environment that has them")
    parser.add_argument("--peer-seconds", type=float, default=PEER_SECONDS, help="after which each is stopped")
    parser.add_argument("--half", action="store_true", help="hold the basis of GPT-2 in bfloat16")
    parser.add_argument("--page", action="store_true", help="write the page from what was measured")
    options = parser.parse_args()
    say = Console(stderr=True, highlight=False).print
    if not options.page:
        torch.set_num_threads(options.threads)
        for name in options.networks:
            budget = HALF if options.half and name == "gpt2" else NETWORKS[name]
            run = measure(name, options.store, budget, say)
            if options.peers:
                ask_peers(run, name, options.peers, options.peer_seconds)
            large_page.keep(RECORDS, name, run.record)
    large_page.write(RECORDS)


if __name__ == "__main__":
    sys.exit(main())

"""How many long vectors computations hold at most, measured in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import torch

import deepspectra as ds
from deepspectra.algorithms.eigenpairs import explore
from spectra import Function

SIZE = 2**20
PAIRS = {"num": 3, "rtol": 3e-2, "start": "random"}
WORK = {  # what is done, and vectors that memory holds
    "exact": (12, lambda A: ds.eigenpairs(A, **PAIRS)),
    "rounded": (8, lambda A: ds.eigenpairs(A, **PAIRS)),
    "rounded and kept": (8, lambda A: explore(A, **PAIRS)),
    "one probe": (3, lambda A: ds.density(A, 2, 5, basis="none")),
    "four probes": (12, lambda A: ds.density(A, 4, 5, basis="none")),
    "basis of probes": (24, lambda A: ds.density(A, 4, 5, basis="full")),
}


def _status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))


def _peak(what, size):
    """Vectors of float32 at once, beside the operator: a power law, whose products hold none but themselves."""
    vectors, work = WORK[what]
    values = (torch.arange(1, size + 1, dtype=torch.float32) ** -0.8)[:, None]
    operator = Function(lambda block: values * block, size)
    operator.memory, operator.basis = 4 * size * vectors, torch.bfloat16 if "rounded" in what else None
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    work(operator)
    return (_status("VmHWM") - before) / 4 / size


def peaks():
    """Of each work, by its name."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}  # what is freed is free
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    command = [sys.executable, "-m", "vector_peaks"]
    done = subprocess.run(command, check=True, env=environment, capture_output=True, text=True)
    return dict(zip(WORK, map(float, done.stdout.split()), strict=True))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for what in WORK:
        _peak(what, 1000)  # loads and allots what is no vector
        print(_peak(what, SIZE))

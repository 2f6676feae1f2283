"""Cells of sweeps, in a file that other processes can import."""

import math
import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch

import deepspectra as ds

SIZES = {"a": 2, "b": 3, "c": 1}


def draws(name, size, seed):
    """Every kind of measure, from all global random states and the point."""
    return {
        "number": seed + size / 10,
        "count": size,
        "flag": size > 1,
        "drawn": torch.rand(SIZES[name]) + random.random() + np.random.rand(),
        "matrix": np.full((size, 2), float(seed)),
        "text": f"{name}-{size}",
        "labels": [name] * size,
        "not_a_number": math.nan,
        "infinite": -math.inf,
    }


def training(log, pause, model, epochs, seed):
    """A look an epoch that is asked for, at weights that depend on nothing else; says so in a file."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.zeros(3)
    for epoch in range(1, max(epochs) + 1):
        weights = 0.5 * weights + torch.rand(3, generator=generator)
        time.sleep(pause)
        if epoch in epochs:
            with open(log, "a") as file:
                file.write(f"{model} {seed} {epoch} {os.getpid()}\n")
            yield {"weights": weights, "loss": float(weights.square().sum())}


def failing(x):
    if x == 1:
        raise ValueError("x is one")
    if x == 2:
        sys.exit(3)
    if x == 3:
        return {"seconds": 1}
    if x == 4:
        return {"tree": {"a": 1}}
    if x == 5:
        return 5
    return {"y": x}


def broken_training(epochs):
    for epoch in epochs:
        if epoch == 3:
            raise RuntimeError("diverged")
        yield {"loss": 1 / epoch}


def short_training(epochs):
    yield {"loss": 1.0}


def dying(folder, x):
    """Kills its process: at 1 always, at 2 the first time only."""
    if x == 1 or (x == 2 and not (Path(folder) / "died").exists()):
        (Path(folder) / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return {"y": x}


class Large:
    """Says what it needs; notes how many run at once."""

    version = "1"

    def __init__(self, folder):
        self.folder = Path(folder)

    def memory(self, gib, number):
        return gib * 2**30

    def __call__(self, gib, number):
        mark = self.folder / f"{gib}-{number}"
        mark.touch()
        time.sleep(0.05)
        at_once = [int(path.name.split("-")[0]) for path in self.folder.iterdir()]
        mark.unlink()
        return {"at_once": sum(at_once)}


def block(megabytes):
    """Fills so much memory."""
    return {"sum": float(np.ones(megabytes * 2**17).sum())}


def main():
    """python sweep_cells.py FOLDER LOG PAUSE: a sweep in two processes, to be killed."""
    import functools  # noqa: PLC0415

    folder, log, pause = sys.argv[1:]
    cell = functools.partial(training, log, float(pause))
    cell.version = "1"
    ds.sweep(cell, {"model": ["u", "v"], "epochs": [1, 3, 4], "seed": range(6)}, folder,
             looks="epochs", executor=2, progress=False)  # fmt: skip


if __name__ == "__main__":
    main()

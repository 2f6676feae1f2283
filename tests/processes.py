"""Several processes of one group on this machine, each of which runs the same function."""

from __future__ import annotations

import multiprocessing
import os
import socket
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

SECONDS = 300
CONTEXT = multiprocessing.get_context("forkserver")  # which imports the library once for all
CONTEXT.set_forkserver_preload(["torch._dynamo", "sklearn.datasets", "deepspectra"])


def run_in(
    num: int, work: Callable[..., Any], *arguments: Any, survivors: int | None = None, joined: bool = True
) -> list[Any]:
    """What a function, importable by its name, returns in each of so many processes, or in as many as survive it.

    They are of one group, or have the environment that torchrun gives to join one.
    """
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            CONTEXT.Process(
                target=_enter, args=(rank, num, folder, None if joined else port, work, arguments), daemon=True
            )
            for rank in range(num)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(SECONDS)
            if process.is_alive():
                process.kill()
        outcomes = [Path(folder) / f"{rank}.pt" for rank in range(num if survivors is None else survivors)]
        found = [torch.load(path, weights_only=False) if path.is_file() else "ended" for path in outcomes]
    if failed := [one for one in found if isinstance(one, str)]:
        raise AssertionError("\n".join(failed))
    return [one[0] for one in found]


def _enter(
    rank: int, num: int, folder: str, port: int | None, work: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    place = Path(folder)
    if port is None:
        store = f"file://{place / 'store'}"
        dist.init_process_group(
            "gloo", init_method=store, rank=rank, world_size=num, timeout=timedelta(seconds=SECONDS)
        )
    else:
        given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num, "LOCAL_WORLD_SIZE": num, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in given.items()} | {"MASTER_ADDR": "127.0.0.1"})
    try:
        found: Any = (work(*arguments),)
    except Exception:
        found = f"process {rank}:\n{traceback.format_exc()}"
    staged = place / f"{rank}.part"
    torch.save(found, staged)
    staged.rename(place / f"{rank}.pt")
    if dist.is_initialized():
        dist.destroy_process_group()

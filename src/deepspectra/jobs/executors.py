"""Where the cells of a sweep run: processes of this machine, or a Ray cluster."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import torch
from threadpoolctl import threadpool_limits

from deepspectra.errors import OptionError, first_line

Result = TypeVar("Result")


class LocalProcesses(Executor):
    """So many fresh processes, a thread each; one that dies fails its own task and is replaced.

    Each is a pool of its own: in a common pool the death of one process would fail the tasks of all. They end with
    this process, however that ends.

    Args:
        num: of processes, which start when first used.
    """

    def __init__(self, num: int) -> None:
        self._max_workers = num
        self._context = multiprocessing.get_context("spawn")
        self._ear, self._mouth = self._context.Pipe(duplex=False)
        self._pools: list[ProcessPoolExecutor] = []
        self._latest: list[Future[Any]] = []

    def submit(self, fn: Callable[..., Result], /, *args: Any, **kwargs: Any) -> Future[Result]:
        """Run a function in the first process that has nothing to do; behind what the first does, if all are busy."""
        idle = (j for j, future in enumerate(self._latest) if future.done())
        at = next(idle, 0 if len(self._pools) == self._max_workers else len(self._pools))
        if at == len(self._pools):
            self._pools.append(self._pool())
            self._latest.append(Future())
        try:
            future = self._pools[at].submit(fn, *args, **kwargs)
        except BrokenExecutor:  # its process was killed
            self._pools[at] = self._pool()
            future = self._pools[at].submit(fn, *args, **kwargs)
        self._latest[at] = future
        return future

    def check(self, function: Callable[..., object]) -> None:
        """Send a function to a process and back.

        Raises:
            OptionError: it does not arrive.
        """
        try:
            self.submit(_received, function).result()
        # whatever pickling may raise, or the death of a process that cannot unpickle
        except Exception as error:
            raise OptionError(
                f"{function!r} does not reach another process ({first_line(error)}). Define it at the top level of "
                "a file that can be imported, with what calls sweep under `if __name__ == '__main__':`; or pass "
                "executor=ThreadPoolExecutor(…), which sends nothing."
            ) from error

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End all processes; with `cancel_futures` in the midst of what they do."""
        if cancel_futures:
            self._mouth.close()
        for pool in self._pools:
            pool.shutdown(wait, cancel_futures=cancel_futures)
        self._mouth.close()
        self._ear.close()

    def _pool(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(1, self._context, _started, (self._ear,))


def _started(ear: Connection) -> None:
    """Begin a process: one thread, deaf to Ctrl-C, which its parent hears, and not to outlive its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _one_thread()
    threading.Thread(target=_end_with, args=(ear,), daemon=True).start()


def _end_with(ear: Connection) -> None:
    ear.poll(None)  # nothing is ever said: it returns when the other end is closed
    os._exit(1)


def _one_thread() -> None:
    torch.set_num_threads(1)
    threadpool_limits(1)


def _received(function: object) -> None:
    """Nothing: that it was called is enough."""


class RayExecutor(Executor):
    """The Ray cluster that this process is connected to (``ray.init``); needs ``deepspectra[ray]``.

    Args:
        options: of ``ray.remote`` for each task, such as ``num_cpus=2``, ``num_gpus=1``, ``memory=2 * 2**30``; by
            default one CPU.

    Raises:
        OptionError: Ray is not installed or not connected.
    """

    def __init__(self, **options: Any) -> None:
        try:
            ray: Any = importlib.import_module("ray")
        except ImportError as error:
            raise OptionError("RayExecutor needs Ray: pip install 'deepspectra[ray]'.") from error
        if not ray.is_initialized():
            raise OptionError("RayExecutor: call ray.init(address=…) first.")
        self._task = ray.remote(**{"num_cpus": 1, "max_retries": 0} | options)(_called)

    def submit(self, fn: Callable[..., Result], /, *args: Any, **kwargs: Any) -> Future[Result]:
        """Run a function wherever the cluster has room for it."""
        future: Future[Result] = self._task.remote(fn, args, kwargs).future()
        return future


def _called(function: Callable[..., Result], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Result:
    _one_thread()
    return function(*args, **kwargs)

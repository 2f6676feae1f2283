"""Of the processes that share a command's work the first speaks and writes; the others compute and are silent."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import ParamSpec

import torch
from rich.console import Console
from rich.markup import escape

from deepspectra.errors import DeepSpectraWarning, OptionError
from deepspectra.jobs.command_targets import CONSOLE
from deepspectra.problem.parallel import Group, current, joined

Given = ParamSpec("Given")
SHARED = ("analyze", "demo", "layers", "regions", "compare", "estimate")  # commands whose work processes can share


@contextlib.contextmanager
def one_voice(words: list[str]) -> Iterator[None]:
    """Join the processes that torchrun started, if it did, for a command of these words.

    Raises:
        OptionError: the command is not for several.
        ProcessError: another process ended.
    """
    with joined() as group, contextlib.ExitStack() as silence:
        if group.size > 1 and words and words[0] not in SHARED:
            raise OptionError(
                f"{words[0]} works in one process: start it without torchrun. What several processes can share is "
                f"{', '.join(SHARED)}."
            )
        if group.rank:
            silence.enter_context(contextlib.redirect_stdout(silence.enter_context(open(os.devnull, "w"))))
            silence.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore", DeepSpectraWarning)
            CONSOLE.quiet = True
        yield


def among_all() -> Group:
    """The processes that share the command's work."""
    return current(torch.device("cpu"))


def by_first(write: Callable[Given, None]) -> Callable[Given, None]:
    """A function that writes or says something, for the first of the processes; the others leave it."""

    @functools.wraps(write)
    def written(*given: Given.args, **options: Given.kwargs) -> None:
        if among_all().rank == 0:
            write(*given, **options)

    return written


def complain(error: Exception) -> None:
    """Say on standard error what ended this process, and which of several it is."""
    which = f"process {os.environ.get('RANK')}: " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
    said = f"[bold red]{which}{type(error).__name__}[/]: {escape(str(error))}"
    Console(file=sys.stderr).print(said, highlight=False)

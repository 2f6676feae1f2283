"""Commands that are run in this process, or beside the tests with a deadline that says what it waited for."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from deepspectra import cli


def finished(
    command: Sequence[str], *, timeout: float, check: bool, **options: Any
) -> subprocess.CompletedProcess[str]:
    """The command once it has ended; the test fails with what was printed so far if it takes too long."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=check, **options)
    except subprocess.TimeoutExpired as late:
        said = "\n".join(str(part)[-2000:] for part in (late.stdout, late.stderr) if part)
        pytest.fail(f"{' '.join(map(str, command))} did not end within {timeout:g} s. It said:\n{said}")


def run(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """What the command line does with these arguments, in this process: one of its own takes longest to start.

    Modules that it loads from the folder are forgotten, and warnings are shown, as they are to a user.
    """
    words, known = list(map(str, arguments)), set(sys.modules)
    said, complained, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("default")
        patch.chdir(cwd)
        patch.setenv("COLUMNS", "200")
        patch.setattr(sys, "argv", ["deepspectra", *words])
        patch.setattr(sys, "path", [str(cwd), *sys.path])
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(complained):
                cli.main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1 if stop.code else 0
        finally:
            for name in set(sys.modules) - known:
                if Path(getattr(sys.modules[name], "__file__", None) or "/").is_relative_to(cwd):
                    del sys.modules[name]
    return subprocess.CompletedProcess(words, code, said.getvalue(), complained.getvalue())

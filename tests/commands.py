"""Commands that are run beside the tests, with a deadline that says what it waited for."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from typing import Any

import pytest


def finished(
    command: Sequence[str], *, timeout: float, check: bool, **options: Any
) -> subprocess.CompletedProcess[str]:
    """The command once it has ended; the test fails with what was printed so far if it takes too long."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=check, **options)
    except subprocess.TimeoutExpired as late:
        said = "\n".join(str(part)[-2000:] for part in (late.stdout, late.stderr) if part)
        pytest.fail(f"{' '.join(map(str, command))} did not end within {timeout:g} s. It said:\n{said}")

"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError

from deepspectra.errors import FileError, first_line


def save_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Have a file written beside its place and move it there, so that what fails or is killed leaves no half file.

    Raises:
        FileError: it cannot be written.
    """
    staged = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(staged)
        staged.replace(path)
    # RuntimeError: HDF5's or PyTorch's, of a full disk
    except (OSError, RuntimeError, SafetensorError) as error:
        with suppress(OSError):
            staged.unlink(missing_ok=True)
        raise FileError(
            f"{path} cannot be written ({first_line(error)}). Choose another directory, or make room."
        ) from error

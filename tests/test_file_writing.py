"""Files appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from deepspectra.errors import FileError
from deepspectra.file_writing import save_whole


def test_a_file_and_its_folder_are_made(tmp_path: Path) -> None:
    place = tmp_path / "new" / "file.txt"
    save_whole(place, lambda staged: staged.write_text("whole"))
    assert place.read_text() == "whole"
    assert list(place.parent.iterdir()) == [place]


@pytest.mark.parametrize("kind", [OSError, RuntimeError])
def test_what_fails_midway_leaves_the_file_that_was_there(tmp_path: Path, kind: type[Exception]) -> None:
    place = tmp_path / "file.txt"
    place.write_text("before")

    def half(staged: Path) -> None:
        staged.write_text("hal")
        raise kind("no space left\non the device")

    with pytest.raises(FileError, match=r"file\.txt cannot be written \(no space left\)"):
        save_whole(place, half)
    assert place.read_text() == "before"
    assert list(tmp_path.iterdir()) == [place]


def test_faults_of_the_program_are_no_faults_of_the_disk(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        save_whole(tmp_path / "file", lambda staged: 1 / 0)

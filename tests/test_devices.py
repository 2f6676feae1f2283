"""Everything runs on an accelerator: on a stand-in that is compiled here, for machines without a GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths, library_paths

HERE = Path(__file__).parent
WRITTEN_FOR = "2.13."  # whose C++ interface for devices it uses
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")


@pytest.fixture(scope="module")
def strict_device(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled device."""
    if COMPILER is None or not sys.platform.startswith("linux"):
        pytest.skip("needs a C++ compiler on Linux")
    library, torch_libraries = tmp_path_factory.mktemp("device") / "device.so", library_paths()[0]
    command = [COMPILER, "-std=c++20", "-O1", "-fPIC", "-shared", str(HERE / "strict_device" / "device.cpp")]
    command += [f"-isystem{path}" for path in include_paths()]
    command += [
        "-o",
        str(library),
        f"-L{torch_libraries}",
        "-ltorch_cpu",
        "-lc10",
        f"-Wl,-rpath,{torch_libraries}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode and not torch.__version__.startswith(WRITTEN_FOR):
        pytest.skip(f"the device is written for torch {WRITTEN_FOR}; with {torch.__version__} it does not compile")
    assert done.returncode == 0, done.stderr
    return library


def test_all_of_the_library_on_a_device_that_is_not_the_cpu(strict_device: Path) -> None:
    """In a process of its own, since a device stays registered."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    paths = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [*command, str(HERE / "strict_device" / "tour.py")],
        env=os.environ | {"STRICT_DEVICE": str(strict_device), "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]

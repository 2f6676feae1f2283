"""One thread, fixed seeds, no global dtype; `slow` tests and tests on real data skip unless asked for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from deepspectra.analysis import three_level_map

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start: several workers share the cores

settings.register_profile(
    "exact",
    max_examples=12,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("exact")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", default=False, help="also run tests marked slow")


LONGEST = {  # files that run for a minute or more
    "test_cli.py",
    "test_devices.py",
    "test_docs.py",
    "test_notebook.py",
    "jobs/test_analyze.py",
    "jobs/test_stages.py",
    "jobs/test_sweep.py",
    "report/test_page.py",
}
HERE = Path(__file__).parent


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # the longest first, so that no process is left alone with one
    items.sort(key=lambda item: item.path.relative_to(HERE).as_posix() not in LONGEST)
    if config.getoption("--slow"):
        return
    skip = pytest.mark.skip(reason="slow: pass --slow to run it")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Each test starts from the same global seed, so that none depends on the order they run in."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def _short_maps(request: pytest.FixtureRequest) -> Iterator[None]:
    """Maps of means are laid out in fewer steps where they are not what is tested: it is half of a small analysis."""
    with pytest.MonkeyPatch.context() as patch:
        if request.path.stem != "test_three_level_map":
            patch.setattr(three_level_map, "ITERATIONS", 250)
        yield


@pytest.fixture
def data_root() -> Path:
    """The folder that holds the real data sets."""
    given = os.environ.get("DEEPSPECTRA_DATA")
    if not given:
        pytest.skip("DEEPSPECTRA_DATA is unset: set it to the folder that holds the data sets")
    root = Path(given)
    if not root.is_dir():
        pytest.skip(f"DEEPSPECTRA_DATA={given} is not a folder")
    return root

"""The rules of the house that can be measured: where tests stand, how long things are, what an import costs."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from commands import finished

TESTS = Path(__file__).parent
SOURCE = TESTS.parent / "src" / "deepspectra"
FILES = sorted(path.relative_to(SOURCE).as_posix() for path in SOURCE.rglob("*.py"))

# Sources without a file of their own among the tests: where they are tested, and why there.
ELSEWHERE = {
    # a chart is drawn by a page, from one dataset made for all of them, and looked at in a browser
    "report/attribution_charts.py": "report/test_page.py",
    "report/class_charts.py": "report/test_page.py",
    "report/layer_charts.py": "report/test_page.py",
    "report/network_charts.py": "report/test_page.py",
    "report/spectrum_charts.py": "report/test_page.py",
    # stages of one job and what it saves: tested on one analysis, that is made once
    "jobs/analysis_dataset.py": "jobs/test_analyze.py",
    "jobs/stages.py": "jobs/test_analyze.py",
    # parts of a sweep, which takes processes and seconds: each run is looked at from all sides
    "jobs/executors.py": "jobs/test_sweep.py",
    "jobs/sweep_cell.py": "jobs/test_sweep.py",
    "jobs/sweep_schedule.py": "jobs/test_sweep.py",
    "jobs/sweep_store.py": "jobs/test_sweep.py",
}
SIMULATIONS = {"algorithms/test_eigenpairs_coverage.py"}  # 200 runs a spectrum, of what one run is tested for
LONGEST_FILE, LONGEST_CLASS, MOST_PARAMETERS = 450, 250, 9
ALLOWED_PARAMETERS = {"problem/problem.py: Problem.__init__": 10, "jobs/analyze.py: analyze": 10}


def file_of_tests(source: str) -> str:
    """The file of a source's tests, by the rule: room/file.py in room/test_file.py."""
    path = Path(source)
    return (path.parent / f"test_{path.name}").as_posix()


def has_tests(path: str) -> bool:
    return (TESTS / path).is_file() and "\ndef test_" in (TESTS / path).read_text()


@pytest.mark.parametrize("source", [name for name in FILES if not name.endswith("__init__.py")])
def test_every_source_file_has_its_tests(source: str) -> None:
    assert has_tests(ELSEWHERE.get(source, file_of_tests(source))), f"expected {file_of_tests(source)}"


@pytest.mark.parametrize(
    "test", sorted(path.relative_to(TESTS).as_posix() for path in TESTS.glob("*/test_*.py"))
)
def test_every_file_of_tests_in_a_room_has_its_source(test: str) -> None:
    source = test.replace("/test_", "/")
    assert source in FILES or test in SIMULATIONS


def test_exceptions_are_few_and_needed() -> None:
    assert len(ELSEWHERE) <= 12
    for source in ELSEWHERE:
        assert source in FILES
        assert not (TESTS / file_of_tests(source)).exists(), f"{source} needs no exception any more"


def nodes(source: str, kind: type[ast.AST]) -> Iterator[tuple[str, ast.AST]]:
    """Classes or functions of a file, each with its qualified name."""

    def within(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.AST]]:
        for child in ast.iter_child_nodes(node):
            named = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
            name = f"{prefix}{child.name}" if named else prefix
            if isinstance(child, kind):
                yield name, child
            yield from within(child, f"{name}." if named else prefix)

    yield from within(ast.parse((SOURCE / source).read_text()), "")


@pytest.mark.parametrize("source", FILES)
def test_files_classes_and_signatures_are_short(source: str) -> None:
    assert len((SOURCE / source).read_text().splitlines()) <= LONGEST_FILE
    for name, one in nodes(source, ast.ClassDef):
        assert one.end_lineno - one.lineno < LONGEST_CLASS, name  # type: ignore[attr-defined, operator]
    if source == "cli.py":  # where a parameter is an option of a command
        return
    for name, one in nodes(source, ast.FunctionDef):
        given = one.args  # type: ignore[attr-defined]
        parameters = [each.arg for each in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
        count = len([each for each in parameters if each not in ("self", "cls")])
        assert count <= ALLOWED_PARAMETERS.get(f"{source}: {name}", MOST_PARAMETERS), name


def test_importing_the_library_loads_nothing_that_only_some_of_it_needs() -> None:
    heavy = ("sklearn", "scipy", "pandas", "xarray", "altair", "vl_convert", "h5netcdf", "rich", "typer")
    code = f"import sys, deepspectra; print([name for name in {heavy} if name in sys.modules])"
    assert finished([sys.executable, "-c", code], timeout=120, check=True).stdout.strip() == "[]"

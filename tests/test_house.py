"""The rules of the house that can be measured: where tests stand, how long things are, what an import costs."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
    "report/certificate_charts.py": "jobs/test_certify_dataset.py",
    # stages of one job and what it saves: tested on one analysis, that is made once
    "jobs/analysis_dataset.py": "jobs/test_analyze.py",
    "jobs/findings.py": "jobs/test_analyze.py",
    # parts of a sweep, which takes processes and seconds: each run is looked at from all sides
    "jobs/executors.py": "jobs/test_sweep.py",
    "jobs/sweep_cell.py": "jobs/test_sweep.py",
    "jobs/sweep_schedule.py": "jobs/test_sweep.py",
    "jobs/sweep_store.py": "jobs/test_sweep.py",
}
SIMULATIONS = {"algorithms/test_eigenpairs_coverage.py"}  # 200 runs a spectrum, of what one run is tested for
LONGEST_FILE, LONGEST_CLASS, MOST_PARAMETERS = 450, 250, 9
WIDE = {  # which is public, and a cell, whose parameters are the axes of a sweep
    "problem/problem.py: Problem.__init__": 10,
    "jobs/sweep_zoo.py: ZooCell.__call__": 10,
}


def file_of_tests(source: str) -> str:
    """The file of a source's tests, by the rule: room/file.py in room/test_file.py."""
    path = Path(source)
    return (path.parent / f"test_{path.name}").as_posix()


def has_tests(path: str) -> bool:
    return (TESTS / path).is_file() and "\ndef test_" in (TESTS / path).read_text()


def test_every_source_file_has_its_tests() -> None:
    sources = [name for name in FILES if not Path(name).name.startswith("__")]
    expected = {source: ELSEWHERE.get(source, file_of_tests(source)) for source in sources}
    assert {source: path for source, path in expected.items() if not has_tests(path)} == {}


def test_every_file_of_tests_in_a_room_has_its_source() -> None:
    found = {path.relative_to(TESTS).as_posix() for path in TESTS.glob("*/test_*.py")}
    assert {test for test in found if test.replace("/test_", "/") not in FILES} == SIMULATIONS


def test_exceptions_are_few_and_needed() -> None:
    assert len(ELSEWHERE) <= 13
    for source in ELSEWHERE:
        assert source in FILES
        assert not (TESTS / file_of_tests(source)).exists(), f"{source} needs no exception any more"


def nodes(source: str, kind: Any) -> Iterator[tuple[str, Any]]:
    """Classes or functions of a file, each with its qualified name."""

    def within(node: ast.AST, prefix: str) -> Iterator[tuple[str, Any]]:
        for child in ast.iter_child_nodes(node):
            named = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
            name = f"{prefix}{child.name}" if named else prefix
            if isinstance(child, kind):
                yield name, child
            yield from within(child, f"{name}." if named else prefix)

    yield from within(ast.parse((SOURCE / source).read_text()), "")


def test_no_file_and_no_class_is_long() -> None:
    lengths = {source: len((SOURCE / source).read_text().splitlines()) for source in FILES}
    assert {source: length for source, length in lengths.items() if length > LONGEST_FILE} == {}
    classes = {
        f"{source}: {name}": one.end_lineno - one.lineno + 1
        for source in FILES
        for name, one in nodes(source, ast.ClassDef)
    }
    assert {name: length for name, length in classes.items() if length > LONGEST_CLASS} == {}


def test_no_function_has_many_parameters_but_a_command() -> None:
    """In `cli.py` a parameter is an option."""
    counts = {}
    for source in FILES:
        for name, one in nodes(source, ast.FunctionDef) if source != "cli.py" else ():
            parameters = [each.arg for each in (*one.args.posonlyargs, *one.args.args, *one.args.kwonlyargs)]
            counts[f"{source}: {name}"] = len([each for each in parameters if each not in ("self", "cls")])
    assert {name: count for name, count in counts.items() if count > MOST_PARAMETERS} == WIDE


def test_importing_the_library_loads_nothing_that_only_some_of_it_needs() -> None:
    heavy = ("sklearn", "scipy", "pandas", "xarray", "altair", "vl_convert", "h5netcdf", "rich", "typer")
    code = f"import sys, deepspectra; print([name for name in {heavy} if name in sys.modules])"
    assert finished([sys.executable, "-c", code], timeout=120, check=True).stdout.strip() == "[]"

"""Features and errors of a problem: captured once for all who ask, for as long as there is room."""

from __future__ import annotations

import gc
import re
import weakref
from collections.abc import Callable

import pytest
import torch

import deepspectra as ds
from deepspectra.analysis.layer_measures import layer_measures
from deepspectra.derivatives.products import products_of
from deepspectra.errors import ParameterError
from deepspectra.rows import captures
from deepspectra.rows.captures import captures_of
from deepspectra.rows.held_rows import HeldRows
from deepspectra.rows.random_combinations import DrawnCaptures
from nets import CASES
from reference import error


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The batches that are captured, with how many scalars each."""
    seen: list[int] = []
    capture = captures.batch_capture.capture

    def counting(graph, plan, scalars, names):  # type: ignore[no-untyped-def]
        seen.append(scalars.weights.shape[2])
        return capture(graph, plan, scalars, names)

    monkeypatch.setattr(captures.batch_capture, "capture", counting)
    return seen


ANALYSES: dict[str, Callable[[ds.Problem], object]] = {
    "layers": lambda problem: ds.layers(problem, hessian=False),
    "gram_spectrum": lambda problem: ds.gram_spectrum(problem, dtype=problem.dtype),
    "kronecker": ds.kronecker,
    "ekfac": lambda problem: ds.kronecker(problem, "ekfac"),
    "kronecker_quality": ds.kronecker_quality,
    "dissect": lambda problem: ds.dissect(problem, num_whole=0),
    "collapse": ds.collapse,
    "compare": lambda problem: ds.compare(problem, problem, num_whole=0),
}


def test_all_analyses_of_a_problem_capture_it_once(passes: list[int]) -> None:
    problem = CASES["relu_mlp"]().problem()
    ds.gram_spectrum(problem, dtype=problem.dtype)
    num = problem.batches.num_batches
    assert passes[-num:] == [problem.num_classes - 1] * num
    passes.clear()
    for name, analyse in ANALYSES.items():
        analyse(problem)
        assert not passes, name


@pytest.mark.parametrize("name", [name for name in ANALYSES if name not in ("compare", "collapse", "kronecker")])
def test_what_another_analysis_captured_gives_the_same(name: str) -> None:
    fresh, used = (CASES["conv_batchnorm"]().problem() for _ in range(2))
    ds.layers(used, hessian=False)
    first, second = (re.sub(r"[\d.e-]+ s\b", "", str(ANALYSES[name](problem))) for problem in (used, fresh))
    assert first == second


def test_measures_of_layers_capture_a_network_once(passes: list[int]) -> None:
    problem = CASES["relu_mlp"]().problem()
    captures_of(problem)  # the plan
    passes.clear()
    layer_measures(problem)
    assert len(passes) == problem.batches.num_batches


def test_networks_whose_layers_do_not_fit_together_are_compared_in_passes_over_groups(
    passes: list[int],
) -> None:
    one, other = (CASES["relu_mlp"]().problem() for _ in range(2))
    whole = ds.compare(one, other, num_whole=0)
    for problem in (one, other):
        found = captures_of(problem)
        found.limit = 0
        assert not found.hold()
        problem._derived.clear()
        problem.memory = 3 * max(found.bytes_by_layer.values())
        assert not captures_of(problem).hold()
    passes.clear()
    apart = ds.compare(one, other, num_whole=0)
    assert len(passes) <= (2 + len(apart.layers)) * 2 * one.batches.num_batches  # the factors, and each layer once
    assert all(error(a.measured, b.measured) < 1e-10 for a, b in zip(apart.values(), whole.values(), strict=True))


def test_features_and_errors_make_room_for_graphs_and_are_freed_with_the_problem() -> None:
    problem = CASES["relu_mlp"]().problem()
    allowance = products_of(problem).allowance
    rows = HeldRows(problem)
    assert rows.captures.hold()
    held = weakref.ref(rows.captures.held)
    del rows
    assert held() is not None
    assert allowance.spare is held()
    allowance.size = allowance.spare_bytes + 1  # and so any graph is too much beside them
    ds.GaussNewton(problem) @ torch.ones(problem.num_parameters, 1).double()
    assert products_of(problem).graphs.num_bytes() > 0
    assert held() is None

    problem = CASES["relu_mlp"]().problem()
    assert HeldRows(problem).captures.hold()
    held = weakref.ref(products_of(problem).allowance.spare)
    gc.disable()
    try:
        del problem
        assert held() is None
    finally:
        gc.enable()


def test_what_is_at_work_stays_whatever_else_needs_room() -> None:
    problem = CASES["relu_mlp"]().problem()
    rows = HeldRows(problem)
    assert rows.captures.hold()
    allowance = products_of(problem).allowance
    assert allowance.reserve(allowance.size)
    assert allowance.spare is None
    assert captures_of(problem).hold()
    assert captures_of(problem)._found() is rows.captures.held


def test_less_memory_holds_no_more_than_fits() -> None:
    problem = CASES["relu_mlp"]().problem()
    first = captures_of(problem)
    assert first.hold()
    problem.memory = 3
    assert not captures_of(problem).hold()


def test_an_edited_network_is_refused_though_all_is_held() -> None:
    problem = CASES["relu_mlp"]().problem()
    ds.layers(problem, hessian=False)
    with torch.no_grad():
        next(iter(problem.parameters.values())).add_(1)
    for analyse in ANALYSES.values():
        with pytest.raises(ParameterError, match="edited"):
            analyse(problem)
    with pytest.raises(ParameterError, match="edited"):
        captures_of(problem).hold()


def test_other_scalars_are_not_taken_for_those_of_the_curvature(passes: list[int]) -> None:
    problem = CASES["relu_mlp"]().problem()
    shared = captures_of(problem)
    assert shared.hold()
    passes.clear()
    drawn = [DrawnCaptures(problem, 2, 0) for _ in range(2)]
    first, second = (next(one.batches()).uses[0].errors for one in drawn)
    assert error(first, second) == 0
    assert passes == [2, 2]
    ds.weights(problem)
    assert passes[2:] == [1] * problem.batches.num_batches
    assert captures_of(problem)._found() is shared.held

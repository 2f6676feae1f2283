"""Bad input gets an error that says what was given, or a warning and the right number."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
from torch import nn

import deepspectra as ds
from deepspectra import errors
from given import Captured, Net, X, Y, use
from nets import CASES, OPERATORS
from reference import Reference, case_and_reference, error

RTOL = 1e-9


def test_an_absent_class_changes_nothing_else() -> None:
    case, ref = case_and_reference("absent_class")
    problem = case.problem()
    assert problem.num_classes == 4
    assert error(ds.Hessian(problem).dense(), ref.hessian) < 1e-9


def test_reading_the_data_leaves_the_global_random_state_alone() -> None:
    """No draw from the global generator: a training run around a measurement is the run without it."""
    case = CASES["relu_mlp"]()
    before = torch.get_rng_state()
    use(case.problem())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "entry", [ds.Hessian, ds.GaussNewton, ds.class_means, ds.decompose, ds.principal_subspace, ds.analyze]
)
def test_a_model_in_place_of_a_problem(entry: Any) -> None:
    with pytest.raises(errors.OptionError, match=r"expected a deepspectra\.Problem.*got Linear"):
        entry(nn.Linear(4, 3))


def used() -> ds.Problem:
    problem = ds.Problem(Net(), (X, Y))
    ds.Hessian(problem) @ torch.ones(problem.num_parameters, dtype=torch.float64)
    return problem


def test_copies_and_pickles_of_used_problems_and_operators() -> None:
    problem = used()
    operator, v = ds.Hessian(problem), torch.ones(problem.num_parameters, dtype=torch.float64)
    for again in (copy.deepcopy, copy.copy, lambda thing: pickle.loads(pickle.dumps(thing))):
        twin = again(problem)
        assert error(ds.Hessian(twin) @ v, operator @ v) < 1e-13
        assert error(again(operator) @ v, operator @ v) < 1e-13
        assert twin.parameter_names == problem.parameter_names
    with pytest.raises(errors.ParameterError, match="copied or pickled"):
        copy.deepcopy(ds.Problem(Captured(), (X, Y)))


@pytest.mark.parametrize("edit", ["in place", "replaced"])
def test_weights_edited_after_the_problem_was_made_are_refused(edit: str) -> None:
    problem = used()
    weight = problem.model.o.weight
    with torch.no_grad():
        if edit == "in place":
            weight.mul_(2)
        else:
            weight.data = 2 * weight
    v = torch.ones(problem.num_parameters, dtype=torch.float64)
    calls: list[Callable[[], Any]] = [lambda: ds.Hessian(problem) @ v, problem.gradient, problem.loss]
    for call in calls:
        with pytest.raises(errors.ParameterError, match=r"edited.*o\.weight"):
            call()


def test_threads_leave_global_switches_as_they_were() -> None:
    before = torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.flash_sdp_enabled()
    problems, faults = [ds.Problem(Net(), (X, Y)) for _ in range(4)], []

    def work(problem: ds.Problem) -> None:
        operator, v = ds.Hessian(problem), torch.ones(problem.num_parameters, dtype=torch.float64)
        faults.extend(None for _ in range(20) if not (operator @ v).isfinite().all())

    threads = [threading.Thread(target=work, args=(problem,)) for problem in problems]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    assert before == (torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.flash_sdp_enabled())


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_are_torch_s_on_one_batch(name: str) -> None:
    case, ref = case_and_reference(name)
    problem = case.problem()
    loss = problem.loss()
    assert isinstance(loss, float)
    assert loss == pytest.approx(ref.loss, rel=1e-12)
    assert error(problem.gradient(), ref.gradient) < RTOL


@pytest.mark.parametrize("name", CASES)
def test_a_problem_counts_parameters_rows_and_outputs(name: str) -> None:
    case, ref = case_and_reference(name)
    problem = case.problem()
    assert problem.num_parameters == ref.num_parameters
    assert list(problem.parameter_names) == list(ref.parameters)
    assert problem.num_examples == len(ref.outputs[0])
    assert problem.num_classes == ref.num_classes


GLOBS = [
    ("relu_mlp", "2.*"),
    ("relu_mlp", "*.bias"),
    ("layernorm_gelu", "1.*"),
    ("attention_module", "attention.*"),
    ("conv_batchnorm", "1.*"),
    ("frozen_parameter", "0.*"),
    ("tied_modules", "embedding.*"),
    ("tied_parameter", "temperature"),
]


@pytest.mark.parametrize(("name", "glob"), GLOBS)
def test_restricting_gives_the_diagonal_block(name: str, glob: str) -> None:
    case, ref = case_and_reference(name)
    expected_names = [n for n in ref.parameters if fnmatchcase(n, glob)]
    for problem in (case.problem().restrict(glob), case.problem(parameters=glob)):
        assert list(problem.parameter_names) == expected_names
        assert error(problem.gradient(), Reference(case, expected_names).gradient) < RTOL
        for kind, operator in OPERATORS.items():
            assert error(operator(problem).dense(), ref.block(getattr(ref, kind), glob)) < RTOL, kind


def test_restricting_leaves_the_first_problem_alone() -> None:
    case, ref = case_and_reference("relu_mlp")
    problem = case.problem()
    H = ds.Hessian(problem)
    problem.restrict("0.*")
    assert problem.num_parameters == ref.num_parameters
    assert error(H.dense(), ref.hessian) < RTOL

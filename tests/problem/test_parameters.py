"""Which parameters are meant, of what type, and as one vector."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import deepspectra as ds
from deepspectra import errors
from given import Net, X, Y, mlp, refused
from nets import CASES
from reference import Reference, case_and_reference, error

RTOL = 1e-9


@pytest.mark.parametrize("glob", ["encoder.*", "", ["nothing", "here.*"]])
def test_a_glob_that_matches_nothing(glob: Any) -> None:
    word = glob if isinstance(glob, str) else glob[0]
    caught = refused(errors.ParameterError, word, lambda: ds.Problem(mlp(), (X, Y), parameters=glob))
    assert "0.weight" in str(caught), "the message lists what there is"
    problem = ds.Problem(mlp(), (X, Y))
    with pytest.raises(errors.ParameterError):
        problem.restrict(glob)


def test_nothing_left_to_differentiate() -> None:
    model = mlp()
    model.requires_grad_(False)
    refused(errors.ParameterError, "grad|frozen|train", lambda: ds.Problem(model, (X, Y)))


def test_a_glob_that_matches_only_frozen_parameters() -> None:
    case = CASES["frozen_parameter"]()
    refused(errors.ParameterError, "2.weight", lambda: case.problem(parameters="2.weight"))


def test_frozen_parameters_stay_frozen_and_are_held_fixed() -> None:
    case, ref = CASES["frozen_parameter"](), case_and_reference("frozen_parameter")[1]
    problem = case.problem()
    assert error(ds.Hessian(problem).dense(), ref.hessian) < 1e-9
    assert [n for n, p in case.model.named_parameters() if not p.requires_grad] == ["0.bias", "2.weight"]


def test_unused_parameters_alone_have_no_curvature() -> None:
    case = CASES["unused_parameter"]()
    problem = case.problem(parameters="unused.*")
    assert problem.gradient().abs().max() == 0
    for operator in (ds.Hessian, ds.GaussNewton, ds.Residual, ds.EmpiricalFisher):
        assert operator(problem).dense().abs().max() == 0


def test_a_glob_on_the_other_name_of_a_tied_weight() -> None:
    """The weight is listed once; its second name finds it."""
    case, ref = case_and_reference("tied_modules")
    problem = case.problem(parameters="output.*")
    expected = ref.block(ref.hessian, "embedding.weight", "output.bias")
    assert error(ds.Hessian(problem).dense(), expected) < 1e-9


def test_flatten_refuses_other_names_and_shapes() -> None:
    problem = ds.Problem(mlp(), (X, Y))
    tree = problem.unflatten(problem.gradient())
    missing = {n: t for n, t in tree.items() if n != "0.bias"}
    with pytest.raises((errors.ParameterError, errors.ShapeError), match=r"0\.bias"):
        problem.flatten(missing)
    with pytest.raises(errors.ShapeError, match=r"0\.weight"):
        problem.flatten(tree | {"0.weight": torch.zeros(5, 6, dtype=torch.float64)})
    with pytest.raises(errors.ShapeError, match=str(problem.num_parameters)):
        problem.unflatten(torch.zeros(problem.num_parameters + 1, dtype=torch.float64))


def test_parameters_of_two_precisions_are_told() -> None:
    class Mixed(Net):
        def __init__(self) -> None:
            super().__init__()
            self.a.float()

        def forward(self, x: Tensor) -> Tensor:
            return self.o(torch.tanh(self.a(x.to(self.a.weight.dtype))).to(self.o.weight.dtype))

    with pytest.warns(errors.FallbackWarning, match=r"float32, torch\.float64.*float64"):
        problem = ds.Problem(Mixed(), (X, Y))
    assert problem.dtype == torch.float64


@pytest.mark.parametrize("name", ["conv_batchnorm", "tied_parameter", "tied_modules", "frozen_parameter"])
def test_flatten_and_unflatten_are_inverse_in_the_order_of_the_names(name: str) -> None:
    case, ref = case_and_reference(name)
    problem = case.problem()
    vector = torch.randn(ref.num_parameters, dtype=torch.float64)
    tree = problem.unflatten(vector)
    assert list(tree) == list(ref.parameters)
    assert {key: value.shape for key, value in tree.items()} == {key: p.shape for key, p in ref.parameters.items()}
    assert torch.equal(torch.cat([tree[key].reshape(-1) for key in ref.parameters]), vector)
    assert torch.equal(problem.flatten(tree), vector)
    assert torch.equal(problem.flatten(dict(reversed(tree.items()))), vector)


def test_a_gradient_unflattens_to_what_backward_gives() -> None:
    case, _ = case_and_reference("conv_pool")
    x, y = case.tensors
    tree = case.problem().unflatten(case.problem().gradient())
    model = CASES["conv_pool"]().model
    torch.nn.functional.cross_entropy(model(x), y).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert error(tree[key], parameter.grad) < 1e-12, key


def test_a_list_of_globs_selects_their_union_in_the_model_s_order() -> None:
    case, ref = case_and_reference("relu_mlp")
    problem = case.problem(parameters=["4.*", "0.bias"])
    assert list(problem.parameter_names) == ["0.bias", "4.weight", "4.bias"]
    assert error(ds.Hessian(problem).dense(), ref.block(ref.hessian, "4.*", "0.bias")) < RTOL


def test_tied_weights_count_once() -> None:
    """One block for the shared weight, with the derivative through both of its uses."""
    case, _ = case_and_reference("tied_modules")
    problem = case.problem()
    assert problem.num_parameters == 5 * 6 + 6 * 6 + 6 + 5
    assert [n for n in problem.parameter_names if "weight" in n] == ["embedding.weight", "hidden.weight"]
    for one_use in ("embedding", "output"):
        loose = CASES["tied_modules"]()
        loose.model.output.weight = torch.nn.Parameter(loose.model.embedding.weight.detach().clone())
        partial = Reference(loose, [f"{one_use}.weight"]).hessian
        assert error(ds.Hessian(problem.restrict("embedding.weight")).dense(), partial) > 0.1


def test_unused_parameters_have_zero_rows_and_frozen_ones_none() -> None:
    unused = case_and_reference("unused_parameter")[0].problem()
    dense = ds.Hessian(unused).dense()
    inside = unused.flatten(
        {n: torch.full_like(t, float(n.startswith("unused"))) for n, t in unused.unflatten(unused.gradient()).items()}
    ).bool()
    assert inside.sum() == 8
    assert dense[inside].abs().max() == 0
    assert dense[~inside][:, ~inside].abs().sum(0).min() > 0

    frozen = case_and_reference("frozen_parameter")[0].problem()
    assert list(frozen.parameter_names) == ["0.weight", "2.bias", "4.weight", "4.bias"]

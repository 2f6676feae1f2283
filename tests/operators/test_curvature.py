"""One conformance suite: every operator on every network is its dense definition, however it is fed."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import eigsh
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import deepspectra as ds
from deepspectra import zoo
from deepspectra.derivatives import way_choice
from deepspectra.derivatives.products import products_of
from deepspectra.errors import DeepSpectraError, MemoryBudgetError, ShapeError
from nets import CASES, Case
from reference import Reference, case_and_reference, error

OPERATORS = {
    "hessian": ds.Hessian,
    "gauss_newton": ds.GaussNewton,
    "residual": ds.Residual,
    "empirical_fisher": ds.EmpiricalFisher,
}
RTOL = 1e-9
PAIRS = ["relu_mlp", "conv_batchnorm", "layernorm_gelu", "token_classes", "every_option", "mse_module"]


@pytest.mark.parametrize("kind", OPERATORS)
@pytest.mark.parametrize("name", CASES)
def test_products_equal_the_dense_definition(name: str, kind: str) -> None:
    case, ref = case_and_reference(name)
    operator, truth = OPERATORS[kind](case.problem()), getattr(ref, kind)
    P = ref.num_parameters
    block = torch.randn(P, 5, dtype=torch.float64)
    assert operator.shape == (P, P)
    assert operator.dtype == torch.float64
    assert error(operator @ block, truth @ block) < RTOL
    assert error(operator @ block[:, 0], truth @ block[:, 0]) < RTOL
    assert error(operator @ block[:, :1], truth @ block[:, :1]) < RTOL
    assert error(operator @ (1e-6 * block), 1e-6 * (truth @ block)) < RTOL


@pytest.mark.parametrize("kind", OPERATORS)
def test_dense_is_the_definition_and_symmetric(kind: str) -> None:
    case, ref = case_and_reference("layernorm_gelu")
    dense = OPERATORS[kind](case.problem()).dense()
    assert error(dense, getattr(ref, kind)) < RTOL
    assert error(dense.T, dense) < RTOL


@pytest.mark.parametrize("name", ["relu_mlp", "attention_module", "every_option"])
def test_an_operator_is_linear_and_leaves_its_input_alone(name: str) -> None:
    case, ref = case_and_reference(name)
    H = ds.Hessian(case.problem())
    u, v = torch.randn(2, ref.num_parameters, dtype=torch.float64)
    kept = u.clone()
    combined = H @ (2.0 * u - 3.0 * v)
    assert error(combined, 2.0 * (H @ u) - 3.0 * (H @ v)) < RTOL
    assert torch.equal(u, kept)
    assert not (H @ u).requires_grad


@pytest.mark.parametrize("name", ["relu_mlp", "layernorm_gelu", "token_classes", "mse_module"])
def test_hessian_is_gauss_newton_plus_residual(name: str) -> None:
    case, ref = case_and_reference(name)
    problem = case.problem()
    H, G, R = ds.Hessian(problem), ds.GaussNewton(problem), ds.Residual(problem)
    V = torch.randn(ref.num_parameters, 3, dtype=torch.float64)
    assert error((H - G) @ V, ref.residual @ V) < RTOL
    assert error((G + R) @ V, ref.hessian @ V) < RTOL
    assert error((H - G - R) @ V + H @ V, H @ V) < RTOL
    assert error((2.0 * G - R * 0.5) @ V, (2.0 * ref.gauss_newton - 0.5 * ref.residual) @ V) < RTOL
    assert error((-H).dense(), -ref.hessian) < RTOL


def test_gauss_newton_is_positive_semidefinite_and_the_residual_is_not() -> None:
    case, _ = case_and_reference("ragged")
    problem = case.problem()
    g, r = (torch.linalg.eigvalsh(operator(problem).dense()) for operator in (ds.GaussNewton, ds.Residual))
    assert g[0] > -1e-12 * g[-1]
    assert r[0] < -1e-3 * r[-1]


def test_linear_regression_has_no_residual_and_a_constant_hessian() -> None:
    """H = (2/D) I ⊗ E[xxᵀ] wherever the weights are."""
    case = CASES["linear_regression"]()
    x = case.tensors[0]
    expected = 2 / 3 * torch.kron(torch.eye(3, dtype=torch.float64), x.T @ x / len(x))
    for _ in range(2):
        problem = case.problem(parameters="weight")
        assert error(ds.Hessian(problem).dense(), expected) < 1e-12
        assert ds.Residual(problem).dense().abs().max() < 1e-12
        with torch.no_grad():
            case.model.weight.add_(1.0)


def test_empirical_fisher_is_not_gauss_newton() -> None:
    case, ref = case_and_reference("relu_mlp")
    assert error(ds.EmpiricalFisher(case.problem()).dense(), ref.gauss_newton) > 0.1


# ------------------------------------------------------------------------------------------ feeding the data


def _feeds(case: Case) -> dict[str, Any]:
    x, y = case.tensors
    return {
        "tensors": ((x, y), {}),
        "dataset": (TensorDataset(x, y), {}),
        "loader": (DataLoader(TensorDataset(x, y), batch_size=3), {}),
        "shuffled loader": (DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True), {}),
        "list": ([(x, y)], {}),
        "reversed": ((x.flip(0), y.flip(0)), {"batch_size": 5}),
        **{f"batch_size={b}": ((x, y), {"batch_size": b}) for b in (1, 3, 7, len(x))},
    }


@pytest.mark.parametrize("name", PAIRS)
def test_batching_and_order_do_not_matter(name: str) -> None:
    case, ref = case_and_reference(name)
    v = torch.randn(ref.num_parameters, dtype=torch.float64)
    for feed, (data, options) in _feeds(case).items():
        problem = case.problem(data, **options)
        assert problem.loss() == pytest.approx(ref.loss, rel=1e-12), feed
        assert error(problem.gradient(), ref.gradient) < RTOL, feed
        for kind, operator in OPERATORS.items():
            assert error(operator(problem) @ v, getattr(ref, kind) @ v) < RTOL, (feed, kind)


@pytest.mark.parametrize("name", ["relu_mlp", "layernorm_gelu", "attention_function"])
def test_a_small_memory_budget_changes_the_time_and_not_the_product(name: str) -> None:
    """Graphs that do not fit are made anew; what cannot work at all is refused."""
    case, ref = case_and_reference(name)
    V = torch.randn(ref.num_parameters, 6, dtype=torch.float64)
    worked = 0
    for memory in (30_000, 100_000, 300_000, "1MiB", "1GiB"):
        try:
            problem = case.problem(memory=memory)
            found = {kind: operator(problem) @ V for kind, operator in OPERATORS.items()}
        except MemoryBudgetError:
            assert not worked, "what fits less memory fits more"
            continue
        worked += 1
        for kind, product in found.items():
            assert error(product, getattr(ref, kind) @ V) < RTOL, (memory, kind)
    assert worked >= 2


TRACED = ["tied_parameter"] + [
    pytest.param(name, marks=pytest.mark.slow)
    for name in ("conv_pool", "layernorm_gelu", "attention_function", "every_option")
]


@pytest.mark.parametrize("name", TRACED)
@pytest.mark.parametrize("way", ["double backward", "linearize"])
def test_every_way_of_differentiating_is_right(name: str, way: str) -> None:
    """Which way is taken depends on time, so each is asked for: vectors and blocks, H, R, J and Jᵀ."""
    case, ref = case_and_reference(name)
    V = torch.randn(ref.num_parameters, 3, dtype=torch.float64)
    problem = case.problem()
    for kind, operator in OPERATORS.items():
        truth = getattr(ref, kind) @ V
        assert error(operator(problem, way=way) @ V, truth) < RTOL, kind
        assert error(operator(problem, way=way) @ V[:, 0], truth[:, 0]) < RTOL, kind
    assert products_of(problem).notes["way"] == products_of(problem).notes["jacobian"] == way


def test_the_way_can_be_changed_and_must_be_known_and_right(monkeypatch: pytest.MonkeyPatch) -> None:
    case, ref = case_and_reference("relu_mlp")
    problem = case.problem()
    v = torch.randn(ref.num_parameters, dtype=torch.float64)
    for way in ("linearize", "double backward", None):
        assert error(ds.Hessian(problem, way=way) @ v, ref.hessian @ v) < RTOL
        assert error(ds.GaussNewton(problem, way=way) @ v, ref.gauss_newton @ v) < RTOL
    assert products_of(problem).notes["way"] == "double backward"
    for operator in OPERATORS.values():
        with pytest.raises(ds.errors.OptionError, match="'double backward', 'linearize'"):
            operator(problem, way="forward")
    monkeypatch.setattr(way_choice, "curvature_error", lambda *_: 0.1)
    with pytest.raises(ds.errors.CurvatureError, match=r"wrong by 1\.0e-01"):
        ds.Hessian(problem, way="linearize")
    monkeypatch.setattr(way_choice, "jacobian_error", lambda *_, linearize: 0.1 if linearize else 0.0)
    with pytest.raises(ds.errors.CurvatureError, match=r"linearize is wrong by 1\.0e-01"):
        ds.GaussNewton(problem, way="linearize")
    assert error(ds.Hessian(problem) @ v, ref.hessian @ v) < RTOL


def test_linearising_is_right_through_layer_norm() -> None:
    """Forward over a reverse-mode Jacobian is wrong there; forward over a gradient is not."""
    torch.manual_seed(51)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 3)).double()
    case = Case(model, [(torch.randn(6, 3, dtype=torch.float64), torch.arange(6) % 3)])
    assert error(ds.Hessian(case.problem(), way="linearize").dense(), Reference(case).hessian) < RTOL


USES: dict[str, Callable[[ds.Problem], object]] = {
    **{kind: lambda p, make=make: make(p) @ torch.ones(p.num_parameters) for kind, make in OPERATORS.items()},
    "eigenpairs": lambda p: ds.eigenpairs(ds.Hessian(p), 2, rtol=1e-2),
    "density": lambda p: ds.density(ds.GaussNewton(p), num_probes=2),
    "class means": ds.class_means,
    "principal subspace": ds.principal_subspace,
    "parts": lambda p: [part @ torch.ones(p.num_parameters) for part in ds.decompose(p, hold=True).values()],
    "attribution": lambda p: ds.attribute(ds.Hessian(p), ds.decompose(p, effects="two-way"), max_products=3),
    "exact spectrum": ds.gram_spectrum,
    "layers": ds.layers,
    "regions": lambda p: ds.regions(p, num_groups=0),
    "factors": ds.kronecker,
}


@pytest.mark.filterwarnings("ignore::deepspectra.errors.DeepSpectraWarning")
@pytest.mark.parametrize("use", USES)
def test_a_problem_that_is_dropped_gives_its_memory_back_at_once(use: str) -> None:
    """Kept graphs, data and the copy of the model die with the last reference: no cycle holds them."""
    data = zoo.load("digits", per_class=4)
    model = zoo.mlp((1, 8, 8), 10, widths=(6,))
    ds.Hessian(ds.Problem(model, data)).dense()  # PyTorch loads its compiler and keeps this call's frames
    problem = ds.Problem(model, data)
    kept = weakref.ref(problem.model)
    gc.collect()
    gc.disable()
    try:
        result = USES[use](problem)
        del problem, result
        assert kept() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("kind", OPERATORS)
def test_products_are_right_where_gradients_are_switched_off(kind: str) -> None:
    case, ref = case_and_reference("relu_mlp")
    v = torch.randn(ref.num_parameters, dtype=torch.float64)
    product, gradient = getattr(ref, kind) @ v, ref.gradient
    with torch.no_grad():
        problem = case.problem()
        assert error(OPERATORS[kind](problem) @ v, product) < RTOL
        assert error(problem.gradient(), gradient) < RTOL


def test_batches_without_a_row_that_counts_add_nothing() -> None:
    """Every label of the first batch is ignored."""
    case, ref = CASES["ragged"](), case_and_reference("ragged")[1]
    x = torch.randn(4, 5, dtype=torch.float64)
    problem = case.problem([(x, torch.full((4,), -100)), *case.batches, (x, torch.full((4,), -100))])
    assert problem.loss() == pytest.approx(ref.loss, rel=1e-12)
    v = torch.randn(ref.num_parameters, dtype=torch.float64)
    for kind, operator in OPERATORS.items():
        assert error(operator(problem) @ v, getattr(ref, kind) @ v) < RTOL, kind


def test_a_batch_as_long_as_there_are_classes_is_read_like_the_others() -> None:
    """Outputs (B, T, C) whose T differs from batch to batch: at T = C two readings fit, and one is wrong."""
    torch.manual_seed(50)
    model = torch.nn.Sequential(torch.nn.Embedding(6, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3)).double()
    batches = [(torch.randint(6, (2, length)), torch.randint(3, (2, length))) for length in (5, 3, 4)]
    case = Case(model, batches, classes_last=True)
    try:
        problem = case.problem()
    except DeepSpectraError:
        return
    assert problem.loss() == pytest.approx(Reference(case).loss, rel=1e-12)


def test_a_shuffling_loader_gives_the_same_product_twice() -> None:
    case, ref = case_and_reference("relu_mlp")
    x, y = case.tensors
    H = ds.Hessian(case.problem(DataLoader(TensorDataset(x, y), batch_size=3, shuffle=True)))
    v = torch.randn(ref.num_parameters, dtype=torch.float64)
    assert error(H @ v, H @ v) < 1e-12


# ------------------------------------------------------------------------------------------ the whole problem


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


@pytest.mark.parametrize("name", ["conv_batchnorm", "tied_parameter", "tied_modules", "frozen_parameter"])
def test_flatten_and_unflatten_are_inverse_in_the_order_of_the_names(name: str) -> None:
    case, ref = case_and_reference(name)
    problem = case.problem()
    vector = torch.randn(ref.num_parameters, dtype=torch.float64)
    tree = problem.unflatten(vector)
    assert list(tree) == list(ref.parameters)
    assert {key: value.shape for key, value in tree.items()} == {
        key: p.shape for key, p in ref.parameters.items()
    }
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


# ---------------------------------------------------------------------------------------- choosing parameters

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


def test_a_list_of_globs_selects_their_union_in_the_model_s_order() -> None:
    case, ref = case_and_reference("relu_mlp")
    problem = case.problem(parameters=["4.*", "0.bias"])
    assert list(problem.parameter_names) == ["0.bias", "4.weight", "4.bias"]
    assert error(ds.Hessian(problem).dense(), ref.block(ref.hessian, "4.*", "0.bias")) < RTOL


def test_restricting_leaves_the_first_problem_alone() -> None:
    case, ref = case_and_reference("relu_mlp")
    problem = case.problem()
    H = ds.Hessian(problem)
    problem.restrict("0.*")
    assert problem.num_parameters == ref.num_parameters
    assert error(H.dense(), ref.hessian) < RTOL


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
        {
            n: torch.full_like(t, float(n.startswith("unused")))
            for n, t in unused.unflatten(unused.gradient()).items()
        }
    ).bool()
    assert inside.sum() == 8
    assert dense[inside].abs().max() == 0
    assert dense[~inside][:, ~inside].abs().sum(0).min() > 0

    frozen = case_and_reference("frozen_parameter")[0].problem()
    assert list(frozen.parameter_names) == ["0.weight", "2.bias", "4.weight", "4.bias"]


# ---------------------------------------------------------------------------------------- types and adaptors


@pytest.mark.parametrize("kind", OPERATORS)
@pytest.mark.parametrize(
    "name", ["relu_mlp", "conv_batchnorm", "attention_function", "every_option", "mse_module"]
)
def test_float32_products_are_near_float64(name: str, kind: str) -> None:
    ref = case_and_reference(name)[1]
    case = CASES[name](torch.float32)
    with torch.no_grad():
        for (key, p32), p64 in zip(
            case.model.named_parameters(), case_and_reference(name)[0].model.parameters(), strict=True
        ):
            p32.copy_(p64)
            assert key
    case.model.load_state_dict(case_and_reference(name)[0].model.state_dict())
    case.batches = [tuple(t.float() if t.is_floating_point() else t for t in b) for b in ref.case.batches]
    operator = OPERATORS[kind](case.problem())
    V = torch.randn(ref.num_parameters, 3, dtype=torch.float64)
    given = operator @ V.float()
    assert given.dtype == torch.float32
    assert error(given.double(), getattr(ref, kind) @ V) < 5e-5


def test_dtype_computes_a_float32_model_in_float64() -> None:
    case = CASES["relu_mlp"](torch.float32)
    problem = case.problem(dtype=torch.float64)
    H = ds.Hessian(problem)
    assert H.dtype == torch.float64
    assert case.model[0].weight.dtype == torch.float32
    double = CASES["relu_mlp"](torch.float32)
    double.model.double()
    double.batches = [(x.double(), y) for x, y in double.batches]
    assert error(H.dense(), Reference(double).hessian) < RTOL


def test_scipy_sees_the_same_matrix() -> None:
    case, ref = case_and_reference("softmax_regression")
    adaptor = ds.Hessian(case.problem()).to_scipy()
    P = ref.num_parameters
    assert adaptor.shape == (P, P)
    assert adaptor.dtype == np.float64
    assert error(torch.from_numpy(adaptor @ np.eye(P)), ref.hessian) < RTOL
    v = np.arange(P, dtype=float)
    assert error(torch.from_numpy(adaptor @ v), ref.hessian @ torch.from_numpy(v)) < RTOL

    top = eigsh(adaptor, k=3, which="LA", v0=np.arange(1.0, P + 1))[0]
    assert np.allclose(np.sort(top), torch.linalg.eigvalsh(ref.hessian)[-3:], rtol=1e-9)


@pytest.mark.parametrize("shape", [(3,), (3, 2), (0,), (38, 1, 1)])
def test_a_product_with_the_wrong_shape_says_both_shapes(shape: tuple[int, ...]) -> None:
    case, ref = case_and_reference("softmax_regression")
    with pytest.raises(ShapeError, match=rf"\({ref.num_parameters}.*{shape[0]}"):
        ds.Hessian(case.problem()) @ torch.zeros(shape, dtype=torch.float64)


def test_a_block_without_columns_stays_empty() -> None:
    case, ref = case_and_reference("softmax_regression")
    empty = torch.zeros(ref.num_parameters, 0, dtype=torch.float64)
    assert (ds.GaussNewton(case.problem()) @ empty).shape == empty.shape


def test_a_wide_block_equals_its_columns() -> None:
    case, ref = case_and_reference("conv_pool")
    block: Tensor = torch.randn(ref.num_parameters, 70, dtype=torch.float64)
    for kind, operator in OPERATORS.items():
        assert error(operator(case.problem()) @ block, getattr(ref, kind) @ block) < RTOL, kind


def test_operators_of_different_sizes_do_not_add() -> None:
    case, _ = case_and_reference("relu_mlp")
    problem = case.problem()
    with pytest.raises(ShapeError, match="sizes differ"):
        ds.Hessian(problem) + ds.Hessian(problem.restrict("0.*"))


def test_training_on_does_not_move_an_operator() -> None:
    """The problem is a snapshot: weights changed afterwards change neither its loss nor its products."""
    case, ref = CASES["relu_mlp"](), case_and_reference("relu_mlp")[1]
    problem = case.problem()
    H = ds.Hessian(problem)
    with torch.no_grad():
        case.model[0].weight.mul_(3.0)
    v = torch.randn(ref.num_parameters, dtype=torch.float64)
    assert problem.loss() == pytest.approx(ref.loss, rel=1e-12)
    assert error(H @ v, ref.hessian @ v) < RTOL


def test_gradients_the_user_holds_are_left_alone() -> None:
    case = CASES["relu_mlp"]()
    x, y = case.tensors
    torch.nn.functional.cross_entropy(case.model(x), y).backward()
    before = [p.grad.clone() for p in case.model.parameters()]
    problem = case.problem()
    problem.gradient()
    ds.Hessian(problem) @ torch.ones(problem.num_parameters, dtype=torch.float64)
    assert all(torch.equal(p.grad, kept) for p, kept in zip(case.model.parameters(), before, strict=True))

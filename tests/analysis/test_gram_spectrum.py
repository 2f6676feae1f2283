"""Gradients held as features and errors, and the exact spectra of G and its parts that follow."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import deepspectra as ds
from deepspectra.analysis.gram_spectrum import gradient_pairs, gradient_spectrum
from deepspectra.errors import LossError, MemoryBudgetError, OptionError
from deepspectra.operators.parts import decompose
from deepspectra.rows.gradients import GradientRows
from deepspectra.rows.held_rows import HeldRows
from nets import CASES, CLASSIFICATION, Case, chunks, labels
from reference import case_and_reference, error

FOUR = ("class", "cross", "within", "true")
FIVE = ("class", "logit", "interaction", "within", "true")

# parameters that no rule covers, and so are differentiated one example at a time
ALONE = {
    "tied_parameter": ("temperature",),
    "attention_function": ("position",),
    "reparametrised": ("0.parametrizations.weight.original",),
    "recurrent": ("lstm.weight_ih_l0", "lstm.weight_hh_l0", "lstm.bias_ih_l0", "lstm.bias_hh_l0"),
}


def held(problem: ds.Problem) -> HeldRows:
    rows = HeldRows(problem)
    assert rows.captures.hold()
    return rows


def descending(matrix: Tensor) -> Tensor:
    return torch.linalg.eigvalsh((matrix + matrix.T) / 2).flip(0)


def same_spectrum(found: Tensor, matrix: Tensor, scale: float) -> bool:
    """Whether values are the matrix's eigenvalues, up to zeros on either side, to 1e-10 of a scale."""
    expected = descending(matrix)
    size = max(len(found), len(expected))
    found, expected = (
        functional.pad(values, (0, size - len(values))).sort().values for values in (found, expected)
    )
    return bool((found - expected).abs().max() <= 1e-10 * scale)


# ------------------------------------------------------------------------------------------------- held rows


@pytest.mark.parametrize("name", CLASSIFICATION)
def test_products_with_held_rows_are_those_through_the_network(name: str) -> None:
    problem = CASES[name]().problem()
    rows, through = held(problem), GradientRows(problem)
    block = torch.randn(problem.num_parameters, 3, dtype=torch.float64)
    carried = torch.randn(*rows.weights.shape, 3, dtype=torch.float64)
    carried[::2, :, 1] = 0  # a column that lives on some examples only
    assert error(rows.apply(block), through.apply(block)) < 1e-12
    assert error(rows.transpose(carried), through.transpose(carried)) < 1e-12


@pytest.mark.parametrize("name", CLASSIFICATION)
def test_every_use_is_understood_but_for_the_known_exceptions(name: str) -> None:
    assert HeldRows(CASES[name]().problem()).captures.plan.alone == set(ALONE.get(name, ()))


@pytest.mark.parametrize("name", ["unbalanced", "absent_class", "token_classes", "conv_batchnorm"])
@pytest.mark.parametrize("effects", ["four-way", "two-way"])
def test_parts_of_held_rows_are_the_parts(name: str, effects: str) -> None:
    case, ref = case_and_reference(name)
    parts = decompose(case.problem(), effects=effects, hold=True)
    assert isinstance(parts.rows, HeldRows)
    assert parts.rows.captures.hold()
    for part, operator in parts.items():
        assert (operator.dense() - ref.parts[part]).abs().max() < 1e-10 * ref.gauss_newton.abs().max()


def test_released_rows_go_through_the_network_again() -> None:
    problem = CASES["relu_mlp"]().problem()
    rows = held(problem)
    block = torch.randn(problem.num_parameters, 2, dtype=torch.float64)
    before = rows.apply(block)
    rows.captures.release()
    assert error(rows.apply(block), before) < 1e-12


def test_one_dead_unit_and_one_example_a_batch() -> None:
    """Zero errors say nothing about the order of examples, and one example has only one."""
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    with torch.no_grad():
        model[0].bias[0] = -100.0
    x, y = torch.randn(7, 4, dtype=torch.float64), labels(7, 3)
    problem = ds.Problem(model, chunks(x, y, [1] * 7))
    assert same_spectrum(
        ds.gram_spectrum(problem).values,
        ds.GaussNewton(problem).dense(),
        float(ds.GaussNewton(problem).dense().norm()),
    )


class Odd(nn.Module):
    """Operations at the edges of what the rules know."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(torch.randn(6, 4))
        self.square = nn.Parameter(torch.randn(6, 6))
        self.bias = nn.Parameter(torch.randn(4))
        self.scale = nn.Parameter(torch.randn(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "addmm":
            return torch.addmm(self.bias, x, self.weight)
        if self.kind == "scaled addmm":
            return torch.addmm(self.bias, x, self.weight, alpha=2.0)
        if self.kind == "matmul":
            return torch.relu(x @ self.square) @ self.weight
        if self.kind == "turned":
            return functional.linear(torch.relu(x @ self.square.t()), self.weight.t(), self.bias)
        if self.kind == "tied turned":
            return torch.relu(functional.linear(x, self.square) @ self.square) @ self.weight
        if self.kind == "halves":
            first, second = self.square.chunk(2)
            return torch.cat([functional.linear(x, first), functional.linear(x, second)], 1) @ self.weight
        if self.kind == "overlapping":
            wide = functional.linear(x, self.square[:4]) + functional.linear(x, self.square[1:5])
            return wide + self.bias
        if self.kind == "in place":
            out = x @ self.weight
            out += self.bias
            out.relu_()
            return out * 1.5
        return self.scale * (x @ self.weight)


UNDERSTOOD = {
    "addmm": (),
    "scaled addmm": ("weight", "bias"),
    "matmul": (),
    "turned": (),
    "tied turned": (),
    "halves": (),
    "overlapping": ("square", "bias"),
    "in place": ("bias",),
    "scalar": ("scale",),
}


@pytest.mark.parametrize("kind", UNDERSTOOD)
def test_odd_uses_of_parameters_are_understood_or_differentiated_alone(kind: str) -> None:
    x, y = torch.randn(11, 6, dtype=torch.float64), labels(11, 4)
    problem = ds.Problem(Odd(kind).double(), chunks(x, y, [4, 7]))
    rows = held(problem)
    assert rows.captures.plan.alone == set(UNDERSTOOD[kind])
    truth = ds.GaussNewton(problem).dense()
    assert same_spectrum(ds.gram_spectrum(problem).values, truth, float(truth.norm()))


def convolutional(kind: str) -> nn.Module:
    flat = [nn.Flatten(), nn.LazyLinear(3)]
    layers: dict[str, list[nn.Module]] = {
        "strided, dilated": [nn.Conv2d(2, 4, 3, stride=2, padding=2, dilation=2), nn.ReLU(inplace=True)],
        "grouped": [nn.Conv2d(2, 6, 3, groups=2), nn.Tanh(), nn.Conv2d(6, 6, 3, groups=6, padding=1)],
        "circular": [nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), nn.Tanh()],
        "by name": [nn.Conv2d(2, 3, 3, padding="same"), nn.Tanh()],
        "wide": [nn.Conv2d(2, 3, (1, 3), padding=(0, 1)), nn.Tanh()],
        "one-dimensional": [nn.Flatten(2), nn.Conv1d(2, 3, 5, stride=2, padding=1), nn.Tanh()],
        "transposed": [nn.ConvTranspose2d(2, 3, 2), nn.Tanh()],
        "group norm": [nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Tanh()],
        "instance norm": [nn.Conv2d(2, 4, 3), nn.InstanceNorm2d(4, affine=True), nn.Tanh()],
        "rms norm": [nn.Conv2d(2, 4, 3), nn.RMSNorm([4, 4, 4]), nn.Tanh()],
    }
    return nn.Sequential(*layers[kind], *flat)


@pytest.mark.parametrize(
    ("kind", "alone"),
    [
        ("strided, dilated", ()),
        ("grouped", ()),
        ("circular", ()),
        ("by name", ()),
        ("wide", ()),
        ("one-dimensional", ()),
        ("transposed", ("0.weight", "0.bias")),
        ("group norm", ()),
        ("instance norm", ()),
        ("rms norm", ()),
    ],
)
def test_convolutions_and_normalisations_in_every_form(kind: str, alone: tuple[str, ...]) -> None:
    x, y = torch.randn(8, 2, 6, 6, dtype=torch.float64), labels(8, 3)
    model = convolutional(kind).double()
    model(x[:1])
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    problem = ds.Problem(model.eval(), chunks(x, y, [5, 3]))
    rows = held(problem)
    assert rows.captures.plan.alone == set(alone)
    truth = ds.GaussNewton(problem).dense()
    assert same_spectrum(ds.gram_spectrum(problem).values, truth, float(truth.norm()))
    block = torch.randn(problem.num_parameters, 2, dtype=torch.float64)
    assert error(rows.apply(block), GradientRows(problem).apply(block)) < 1e-12


def test_an_embedding_that_pads_and_is_used_twice() -> None:
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(9, 5, padding_idx=-9)
            self.out = nn.Linear(5, 3)

        def forward(self, ids: Tensor) -> Tensor:
            return self.out(torch.tanh(self.embed(ids).sum(1)) + self.embed(ids[:, 0]))

    ids = torch.randint(0, 9, (10, 4))
    problem = ds.Problem(Bag().double(), [(ids, labels(10, 3))])
    assert held(problem).captures.plan.alone == set()
    truth = ds.GaussNewton(problem).dense()
    assert same_spectrum(ds.gram_spectrum(problem).values, truth, float(truth.norm()))


# ------------------------------------------------------------------------------------------------- spectra


@pytest.mark.parametrize("name", CLASSIFICATION)
@pytest.mark.parametrize(("effects", "names"), [("four-way", FOUR), ("two-way", FIVE)])
def test_the_exact_spectrum_is_that_of_the_dense_matrices(
    name: str, effects: str, names: tuple[str, ...]
) -> None:
    case, ref = case_and_reference(name)
    found = ds.gram_spectrum(case.problem(), effects=effects)
    scale = float(descending(ref.gauss_newton)[0])
    assert found.part_names == names
    assert same_spectrum(found.values, ref.gauss_newton, scale)
    for part in names:
        assert same_spectrum(found.parts[part], ref.parts[part], scale)
    assert float(found.traces.sum()) == pytest.approx(float(ref.gauss_newton.trace()), rel=1e-10)


@pytest.mark.parametrize("name", ["ragged", "conv_batchnorm"])
def test_shares_are_quadratic_forms_of_eigenvectors(name: str) -> None:
    case, ref = case_and_reference(name)
    found = ds.gram_spectrum(case.problem(), effects="two-way")
    values, vectors = torch.linalg.eigh(ref.gauss_newton)
    for j in range(3):
        u = vectors[:, -1 - j]
        expected = torch.stack([u @ ref.parts[part] @ u for part in FIVE]) / values[-1 - j]
        assert error(found.shares[j], expected) < 1e-8
    real = found.shares.isfinite().all(1)
    assert (found.shares[real].sum(1) - 1).abs().max() < 1e-6


@pytest.mark.parametrize("name", ["relu_mlp", "conv_pool"])
def test_pairs_are_eigenpairs_with_true_residual_bounds(name: str) -> None:
    case, ref = case_and_reference(name)
    parts = decompose(case.problem(), effects="two-way", hold=True)
    pairs = gradient_pairs(gradient_spectrum(parts), parts, 4, 0.0)
    missed = ref.gauss_newton @ pairs.vectors - pairs.vectors * pairs.values
    assert error(pairs.values, descending(ref.gauss_newton)[:4]) < 1e-12
    assert missed.norm(dim=0).max() < 1e-10
    assert (pairs.vectors.T @ pairs.vectors - torch.eye(4)).abs().max() < 1e-10
    assert bool(pairs.converged)


def test_a_wrong_gram_matrix_is_seen_in_the_residuals(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = decompose(CASES["relu_mlp"]().problem(), hold=True)
    true = parts.rows.gram()  # type: ignore[union-attr]
    monkeypatch.setattr(
        parts.rows, "gram", lambda: true + torch.diag(torch.linspace(0, 0.1, len(true))).to(true)
    )
    pairs = gradient_pairs(gradient_spectrum(parts), parts, 3, 0.0)
    assert float(pairs.residual_norms.min()) > 1e-3


def test_the_gram_matrix_does_not_depend_on_batches_nor_on_memory() -> None:
    """Held at once, or captured parameter by parameter; in batches of any size."""
    case = CASES["layernorm_gelu"]()
    whole = ds.gram_spectrum(case.problem())
    x, y = case.tensors
    ragged = ds.gram_spectrum(ds.Problem(case.model, chunks(x, y, [1, len(x) - 1])))
    assert error(ragged.values, whole.values) < 1e-12
    rows = HeldRows(case.problem())
    rows.captures.limit = 0
    assert not rows.captures.hold()
    rows.captures.limit = max(rows.captures.bytes_by_layer.values())
    assert len(rows.captures._groups()) > 1
    small = torch.linalg.eigvalsh(rows.gram()).flip(0)
    assert error(small[: len(whole.values)], whole.values) < 1e-12


def test_memory_is_refused_beforehand() -> None:
    problem = CASES["relu_mlp"]().problem()
    rows = HeldRows(problem)
    rows.captures.limit = 1
    with pytest.raises(MemoryBudgetError, match="features and errors of layer"):
        rows.gram()
    problem.memory = 1000
    with pytest.raises(MemoryBudgetError, match="60 rows"):
        HeldRows(problem).gram()


def test_more_rows_than_parameters_leaves_all_eigenvalues() -> None:
    x, y = torch.randn(60, 2, dtype=torch.float64), labels(60, 3)
    problem = ds.Problem(nn.Linear(2, 3).double(), (x, y))
    found = ds.gram_spectrum(problem)
    assert len(found.values) == problem.num_parameters == 9
    assert same_spectrum(found.values, ds.GaussNewton(problem).dense(), float(found.values[0]))
    assert found.density.weights.sum().item() == pytest.approx(1)


def test_float32_problems_are_computed_in_float64() -> None:
    problem = CASES["relu_mlp"](torch.float32).problem()
    double = ds.gram_spectrum(problem)
    assert double.provenance.dtype == "float64"
    assert same_spectrum(
        double.values, ds.GaussNewton(problem.to(torch.float64)).dense(), float(double.values[0])
    )
    single = ds.gram_spectrum(problem, dtype=torch.float32)
    assert error(single.values[:5], double.values[:5]) < 1e-5
    assert problem.to(torch.float32) is problem
    assert problem.to(torch.float64).gradient().dtype == torch.float64


def test_the_density_is_exact() -> None:
    case, ref = case_and_reference("relu_mlp")
    found = ds.gram_spectrum(case.problem())
    density, values = found.density, descending(ref.gauss_newton)
    assert density.mean * density.size == pytest.approx(float(values.sum()), rel=1e-10)
    assert density.mean_standard_error == 0
    middle = float(values[3] + values[4]) / 2
    assert density.count_above(middle) == (pytest.approx(4), 0)
    assert density.cdf(middle) == pytest.approx(1 - 4 / len(values))
    assert density.weights.sum().item() == pytest.approx(1)
    for scale in ("linear", "log"):
        curve = density.smooth(scale, sign=1)
        assert curve.density.isfinite().all()
        assert float(curve.standard_error.max()) == 0
        where = curve.grid.log10() if scale == "log" else curve.grid
        assert float(torch.trapezoid(curve.density, where)) == pytest.approx(curve.mass, rel=1e-2)
    assert "exact" in str(density)


def test_the_density_agrees_with_random_probes() -> None:
    problem = CASES["conv_pool"]().problem()
    exact = ds.gram_spectrum(problem).density
    probed = ds.density(ds.GaussNewton(problem), num_probes=40, num_steps=20)
    assert abs(probed.mean - exact.mean) < 4 * probed.mean_standard_error + 1e-12 * exact.mean


def test_text_and_errors() -> None:
    case, _ = case_and_reference("relu_mlp")
    found = ds.gram_spectrum(case.problem())
    assert "within" in str(found)
    assert f"{len(found.values)} of" in str(found)
    with pytest.raises(OptionError, match="method='both'"):
        found.knockout("class", method="both")
    for wrong in ((), ("logit",)):
        with pytest.raises(OptionError, match="name some of class, cross, true, means, within"):
            found.knockout(*wrong)
    with pytest.raises(OptionError, match="name some of class, cross, true, means"):
        found.knockout("within", method="projection")
    with pytest.raises(LossError, match="class structure needs"):
        ds.gram_spectrum(CASES["mse_module"]().problem())
    assert math.isclose(float(found.shares[0].sum()), 1)


def test_a_first_batch_of_one_example_does_not_hide_the_order_of_examples() -> None:
    case = CASES["attention_module"]()
    x, y = case.tensors
    problem = case.problem(chunks(x, y, [1, len(x) - 1]))
    rows = held(problem)
    assert {layout.kind for layout in (call.layout for call in rows.captures.plan.calls)} == {
        "blocks",
        "second",
        "interleaved",
    }
    block = torch.randn(problem.num_parameters, 2, dtype=torch.float64)
    assert error(rows.apply(block), GradientRows(problem).apply(block)) < 1e-12


def test_a_sequence_model_whose_examples_come_second() -> None:
    """Tensors (T, B, d), as recurrent models and attention have them."""

    class Second(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 5)
            self.norm = nn.LayerNorm(5)
            self.flat = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(torch.tanh(self.inner(x.transpose(0, 1))))
            steps, num = h.shape[:2]
            return self.flat(h.reshape(steps * num, -1)).view(steps, num, -1).mean(0)

    x, y = torch.randn(9, 6, 4, dtype=torch.float64), labels(9, 3)
    problem = Case(Second().double(), chunks(x, y, [4, 5])).problem()
    rows = held(problem)
    assert rows.captures.plan.alone == set()
    assert {layout.kind for layout in (call.layout for call in rows.captures.plan.calls)} == {
        "second",
        "interleaved",
    }
    truth = ds.GaussNewton(problem).dense()
    assert same_spectrum(ds.gram_spectrum(problem).values, truth, float(truth.norm()))


class Mixture(nn.Module):
    """Two experts, each of which sees the tokens that a gate sends to it."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(6, 2)
        self.experts = nn.ModuleList([nn.Linear(6, 5), nn.Linear(6, 5)])
        self.out = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        shares = self.gate(tokens).softmax(-1)
        found = tokens.new_zeros(len(tokens), 5)
        for i, expert in enumerate(self.experts):
            mine = (shares.argmax(-1) == i).nonzero().flatten()
            found = found.index_add(0, mine, torch.tanh(expert(tokens[mine])) * shares[mine, i, None])
        return self.out(found).view(len(x), -1, 3).mean(1)


@pytest.mark.parametrize("seed", range(4))
def test_tokens_routed_by_their_values_are_right(seed: int) -> None:
    torch.manual_seed(seed)
    model, x, y = Mixture().double(), torch.randn(8, 4, 6).double(), torch.arange(8) % 3
    dense = ds.GaussNewton(ds.Problem(model, (x, y))).dense()
    for batch_size in (1, 2, 4):
        found = ds.gram_spectrum(ds.Problem(model, (x, y), batch_size=batch_size)).values
        assert same_spectrum(found, dense, float(dense.norm()))

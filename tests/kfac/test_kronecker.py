"""Kronecker-factored approximations against factors of gradients that are formed one by one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import deepspectra as ds
from deepspectra.errors import CurvatureError, FallbackWarning, LossError, MemoryBudgetError, OptionError
from deepspectra.kfac import blocks, moments
from deepspectra.rows.captures import Captures
from nets import CASES, Case, chunks, labels
from reference import Reference, case_and_reference, error

RTOL = 1e-10
KINDS = ("kfac", "ekfac", "cfac")
MLPS = [
    "relu_mlp",
    "ragged",
    "unbalanced",
    "absent_class",
    "class_weights",
    "label_smoothing",
    "every_option",
]


def mlp_factors(case: Case) -> list[tuple[str, Tensor, Tensor, Tensor, Tensor]]:
    """Of each linear layer: its name, features (n, d + 1), errors (n, C, o), shares (n,) and labels.

    Errors are √w_{i,k} ∂ℓ(z_i, k)/∂s, one backpropagation for every example and class.
    """
    ref = Reference(case)
    linear = [(name, module) for name, module in case.model.named_modules() if isinstance(module, nn.Linear)]
    found = {name: ([], []) for name, _ in linear}
    kept: dict[str, tuple[Tensor, Tensor]] = {}
    handles = [
        module.register_forward_hook(
            lambda _m, given, output, name=name: kept.__setitem__(name, (given[0].detach(), output))
        )
        for name, module in linear
    ]
    x = torch.cat([batch[0] if isinstance(batch, tuple) else batch["inputs"] for batch in case.batches])
    y = torch.cat([batch[1] if isinstance(batch, tuple) else batch["labels"] for batch in case.batches])
    for one in x[y != ref.ignored]:
        z = case.model(one[None])
        gradients: dict[str, list[Tensor]] = {name: [] for name in kept}
        for k in range(z.shape[1]):
            outputs = [output for _, output in kept.values()]
            loss = functional.cross_entropy(z, torch.tensor([k]))
            for name, e in zip(kept, torch.autograd.grad(loss, outputs, retain_graph=True), strict=True):
                gradients[name].append(e[0])
        for name, (h, _) in kept.items():
            found[name][0].append(torch.cat([h[0], h.new_ones(1)]))
            found[name][1].append(torch.stack(gradients[name]))
    for handle in handles:
        handle.remove()
    result = []
    for name, (h, e) in found.items():
        weighted = ref.weights.sqrt()[:, :, None] * torch.stack(e)
        result.append((name, torch.stack(h), weighted, ref.scales / ref.scales.sum(), ref.labels))
    return result


def dense_kfac(h: Tensor, e: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """S = Σ w e eᵀ and A = Σ_i (share of i) h hᵀ."""
    return torch.einsum("nko,nkp->op", e, e), torch.einsum("n,ni,nj->ij", shares, h, h)


def block_of(K: ds.Kronecker, matrix: Tensor, name: str) -> Tensor:
    """Rows and columns of a block, in its own order."""
    index = K.index[name]
    return matrix[index[:, None], index]


# ------------------------------------------------------------------------------------------- what each one is


@pytest.mark.parametrize("name", MLPS)
def test_kfac_is_the_product_of_second_moments(name: str) -> None:
    case = CASES[name]()
    K = ds.kronecker(case.problem())
    for layer, h, e, shares, _ in mlp_factors(case):
        S, A = dense_kfac(h, e, shares)
        assert error(K.blocks[layer].dense(), torch.kron(S, A)) < RTOL


@pytest.mark.parametrize("name", MLPS)
def test_cfac_sums_products_of_second_moments_of_classes(name: str) -> None:
    case = CASES[name]()
    K = ds.kronecker(case.problem(), "cfac")
    for layer, h, e, shares, y in mlp_factors(case):
        total = 0.0
        for c in y.unique():
            S, A = dense_kfac(h[y == c], e[y == c], shares[y == c] / shares[y == c].sum())
            total = total + torch.kron(S, A)
        assert error(K.blocks[layer].dense(), total) < RTOL


@pytest.mark.parametrize("name", MLPS)
def test_ekfac_has_the_diagonal_of_g_in_the_basis_of_kfac(name: str) -> None:
    case, ref = case_and_reference(name)
    kfac, ekfac = ds.kronecker(case.problem()), ds.kronecker(case.problem(), "ekfac")
    for layer, block in ekfac.blocks.items():
        basis = torch.kron(block.left[0], block.right[0])
        assert error(basis.T @ basis, torch.eye(len(basis)).double()) < RTOL
        rotated = basis.T @ kfac.blocks[layer].dense() @ basis
        assert error(rotated.diag().diag(), rotated) < RTOL  # a basis of eigenvectors of KFAC
        truth = (basis.T @ block_of(ekfac, ref.gauss_newton, layer) @ basis).diag()
        assert error(block.dense(), basis @ truth.diag() @ basis.T) < RTOL


@pytest.mark.parametrize("name", ["conv_pool", "conv_batchnorm", "attention_module", "reused_module"])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_ekfac_is_nearer_than_kfac_and_its_diagonal_is_the_best(name: str, sharing: str) -> None:
    case, ref = case_and_reference(name)
    kfac = ds.kronecker(case.problem(), sharing=sharing)
    ekfac = ds.kronecker(case.problem(), "ekfac", sharing=sharing)
    assert ekfac.trace == pytest.approx(float(ref.gauss_newton.trace()), rel=1e-10)
    generator = torch.Generator().manual_seed(0)
    for layer, block in ekfac.blocks.items():
        truth = block_of(ekfac, ref.gauss_newton, layer)
        missed = (truth - block.dense()).norm()
        assert missed <= (truth - kfac.blocks[layer].dense()).norm() + 1e-12
        if ekfac.places[layer].is_matrix:
            noise = torch.randn(block.diagonal.shape, generator=generator, dtype=torch.float64)
            for step in (1e-3, -1e-3):
                block.diagonal += step * noise * truth.norm()
                assert (truth - block.dense()).norm() > missed
                block.diagonal -= step * noise * truth.norm()


def symmetric_part(size: int) -> Tensor:
    """The projection (size², size²) of matrices on symmetric ones."""
    swap = torch.eye(size**2).view(size, size, size, size).transpose(2, 3).reshape(size**2, size**2)
    return (torch.eye(size**2) + swap).double() / 2


@pytest.mark.parametrize("name", ["relu_mlp", "conv_pool", "token_classes"])
@pytest.mark.parametrize("rank", [1, 3])
def test_the_optimal_sum_is_as_near_as_singular_values_say(name: str, rank: int) -> None:
    case, ref = case_and_reference(name)
    K = ds.kronecker(case.problem(), "optimal", rank=rank)
    for layer, place in K.places.items():
        truth, (_, o, d) = block_of(K, ref.gauss_newton, layer), place.shape
        rearranged = truth.view(o, d, o, d).transpose(1, 2).reshape(o * o, d * d)
        values = torch.linalg.svdvals(symmetric_part(o) @ rearranged @ symmetric_part(d))
        least = truth.square().sum() - values[:rank].square().sum()
        missed = (truth - K.blocks[layer].dense()).square().sum()
        assert float((missed - least) / truth.square().sum()) == pytest.approx(0, abs=1e-6)


def test_the_optimal_product_is_semi_definite_and_has_an_inverse() -> None:
    K = ds.kronecker(CASES["conv_pool"]().problem(), "optimal")
    values = K.eigenvalues()
    assert error(values, torch.linalg.eigvalsh(K.dense()).flip(0)) < RTOL
    inverse = K.inverse(0.1).dense()
    assert error(inverse @ (K.dense() + 0.1 * torch.eye(len(values)).double()), torch.eye(len(values))) < RTOL


# ---------------------------------------------------------------------------------------------- weight sharing


class Positions(nn.Module):
    """Two linear layers applied at every position, then a mean over positions if asked for."""

    def __init__(self, pooled: bool, activation: nn.Module) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 3, bias=False)
        self.pooled, self.activation = pooled, activation

    def forward(self, x: Tensor) -> Tensor:
        z = self.last(self.activation(self.first(x)))
        return z.mean(1) if self.pooled else z.flatten(0, 1)


def test_expand_is_exact_for_a_deep_linear_net_whose_positions_are_rows() -> None:
    x, y = torch.randn(7, 5, 3).double(), torch.randn(7, 5, 3).double()
    model = Positions(False, nn.Identity()).double()
    case = Case(model, chunks(x, y, [3, 4]), loss="mse", forward=lambda m, b: (m(b[0]), b[1].flatten(0, 1)))
    assert exact_by_block(case, "expand") < RTOL
    assert exact_by_block(case, "reduce") > 0.1


def test_reduce_is_exact_for_a_deep_linear_net_that_averages_positions() -> None:
    x, y = torch.randn(7, 5, 3).double(), torch.randn(7, 3).double()
    case = Case(Positions(True, nn.Identity()).double(), chunks(x, y, [3, 4]), loss="mse")
    assert exact_by_block(case, "reduce") < RTOL
    assert exact_by_block(case, "expand") > 0.1


def exact_by_block(case: Case, sharing: str, kind: str = "kfac") -> float:
    """The largest deviation of a block from G's own."""
    K, G = ds.kronecker(case.problem(), kind, sharing=sharing), Reference(case).gauss_newton
    return max(error(K.blocks[name].dense(), block_of(K, G, name)) for name in K.blocks)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_convolutions_share_weights_over_pixels(sharing: str) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(6, 2, 5, 5).double(), labels(6, 3)
    conv = nn.Conv2d(2, 3, 3, stride=2).double()
    model = nn.Sequential(conv, nn.Tanh(), nn.Flatten(), nn.Linear(12, 3).double())
    K = ds.kronecker(ds.Problem(model, chunks(x, y, [4, 2])), sharing=sharing)
    patches = functional.unfold(x, 3, stride=2).mT  # (n, T, d)
    h = torch.cat([patches, torch.ones(6, 4, 1).double()], 2)
    s = conv(x)
    z = model[1:](s)
    p = z.softmax(1).detach()
    A = S = 0.0
    for i in range(6):
        for k in range(3):
            loss = functional.cross_entropy(z[i : i + 1], torch.tensor([k]))
            (g,) = torch.autograd.grad(loss, s, retain_graph=True)
            e = (p[i, k] / 6).sqrt() * g[i].flatten(1)  # (o, T)
            S = S + (e @ e.T if sharing == "expand" else torch.outer(e.sum(1), e.sum(1)))
        A = A + (h[i].T @ h[i] / 24 if sharing == "expand" else torch.outer(h[i].mean(0), h[i].mean(0)) / 6)
    assert error(K.blocks["0"].dense(), torch.kron(S, A)) < RTOL


@pytest.mark.parametrize("kind", KINDS)
def test_groups_of_a_convolution_are_blocks(kind: str) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(6, 4, 3, 3).double(), labels(6, 3)
    together = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Flatten(), nn.Linear(6, 3)).double()

    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.last = nn.Conv2d(2, 3, 3), nn.Conv2d(2, 3, 3), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.cat([self.a(x[:, :2]), self.b(x[:, 2:])], 1).flatten(1))

    apart = Apart().double()
    with torch.no_grad():
        for half, module in enumerate((apart.a, apart.b)):
            module.weight.copy_(together[0].weight[3 * half : 3 * half + 3])
            module.bias.copy_(together[0].bias[3 * half : 3 * half + 3])
        apart.last.load_state_dict(together[2].state_dict())
    K, L = (ds.kronecker(ds.Problem(model, (x, y)), kind) for model in (together, apart))
    expected = torch.block_diag(L.blocks["a"].dense(), L.blocks["b"].dense())
    assert error(K.blocks["0"].dense(), expected) < RTOL


def test_a_table_of_embeddings_is_a_matrix_of_indicators() -> None:
    case = CASES["token_classes"]()

    class Indicators(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Linear(6, 4, bias=False), nn.Linear(4, 3)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(torch.tanh(self.table(functional.one_hot(tokens, 6).double()))).movedim(-1, 1)

    twin = Indicators().double()
    with torch.no_grad():
        twin.table.weight.copy_(case.model.embedding.weight.T)
        twin.head.load_state_dict(case.model.head.state_dict())
    for kind in ("kfac", "ekfac"):
        K = ds.kronecker(case.problem(), kind)
        L = ds.kronecker(ds.Problem(twin, case.batches, loss=case.loss), kind)
        assert error(K.blocks["embedding"].dense(), L.blocks["table"].dense()) < RTOL
        assert error(K.blocks["head"].dense(), L.blocks["head"].dense()) < RTOL
    assert ds.kronecker(case.problem()).blocks["embedding"].right.shape == (
        1,
        1,
        6,
    )  # counts, not their matrix


def test_padding_rows_of_a_table_count_nowhere() -> None:
    torch.manual_seed(0)
    tokens, y = torch.randint(1, 5, (6, 1)), labels(6, 3)
    table = nn.Embedding(5, 4, padding_idx=0)
    with torch.no_grad():
        table.weight[0] = 0
    model = nn.Sequential(table, nn.Flatten(), nn.Linear(4, 3)).double()
    padded = torch.cat([tokens, torch.zeros_like(tokens)], 1)
    wide = nn.Sequential(table, nn.Flatten(), nn.Linear(8, 3)).double()
    with torch.no_grad():
        wide[2].weight[:, :4] = model[2].weight
        wide[2].bias.copy_(model[2].bias)
    expected = ds.kronecker(ds.Problem(model, (tokens, y))).blocks["0"].dense()
    assert error(ds.kronecker(ds.Problem(wide, (padded, y))).blocks["0"].dense(), expected) < RTOL


# ------------------------------------------------------------------------------------------- where it is exact


@pytest.mark.parametrize("kind", KINDS)
def test_one_datum_is_exact(kind: str) -> None:
    case = CASES["relu_mlp"]()
    x, y = case.tensors
    assert exact_by_block(Case(case.model, [(x[:1], y[:1])]), "expand", kind) < RTOL


@pytest.mark.parametrize("kind", ["kfac", "ekfac"])
def test_a_deep_linear_net_with_squared_error_is_exact(kind: str) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3, bias=False), nn.Linear(3, 2)).double()
    x, y = torch.randn(11, 4).double(), torch.randn(11, 2).double()
    assert exact_by_block(Case(model, chunks(x, y, [4, 7]), loss="mse"), "expand", kind) < RTOL


def test_cfac_is_exact_when_features_are_constant_within_classes() -> None:
    torch.manual_seed(0)
    centres = torch.randn(4, 6).double()
    y = labels(18, 4)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    case = Case(model, chunks(centres[y], y, [7, 11]))
    assert exact_by_block(case, "expand", "cfac") < RTOL
    assert exact_by_block(case, "expand", "kfac") > 1e-2


def test_cfac_of_one_class_is_kfac() -> None:
    case = CASES["relu_mlp"]()
    x, y = case.tensors
    problem = ds.Problem(case.model, (x, torch.full_like(y, 2)))
    kfac, cfac = ds.kronecker(problem), ds.kronecker(problem, "cfac")
    assert error(cfac.dense(), kfac.dense()) < RTOL
    assert error(cfac.inverse(0.1).dense(), kfac.inverse(0.1).dense()) < RTOL


# ----------------------------------------------------------------------------------------- weights and batches


@pytest.mark.parametrize("kind", KINDS)
def test_a_class_weight_of_three_is_each_example_three_times(kind: str) -> None:
    case = CASES["relu_mlp"]()
    x, y = case.tensors
    weight = torch.tensor([1.0, 3.0, 1.0, 2.0]).double()
    index = torch.arange(len(y)).repeat_interleave(weight[y].long())
    weighted = ds.Problem(case.model, (x, y), loss=nn.CrossEntropyLoss(weight=weight))
    repeated = ds.Problem(case.model, (x[index], y[index]))
    assert error(ds.kronecker(weighted, kind).dense(), ds.kronecker(repeated, kind).dense()) < RTOL


@pytest.mark.parametrize("kind", KINDS)
def test_ignored_examples_count_nowhere(kind: str) -> None:
    case = CASES["relu_mlp"]()
    x, y = case.tensors
    some = y.clone()
    some[[0, 3, 4, 9]] = -100
    kept = some != -100
    ignored = ds.kronecker(ds.Problem(case.model, chunks(x, some, [5, 15])), kind)
    assert (
        error(ignored.dense(), ds.kronecker(ds.Problem(case.model, (x[kept], y[kept])), kind).dense()) < RTOL
    )


@pytest.mark.parametrize("kind", ["kfac", "ekfac"])
def test_ignored_tokens_count_nowhere(kind: str) -> None:
    case = CASES["token_classes"]()
    tokens, targets = case.tensors
    kept = targets != 9
    alone = ds.Problem(case.model, (tokens[kept][:, None], targets[kept][:, None]), loss=case.loss)
    assert error(ds.kronecker(case.problem(), kind).dense(), ds.kronecker(alone, kind).dense()) < RTOL


@pytest.mark.parametrize("name", ["ragged", "conv_pool", "attention_function", "mse_module", "every_option"])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_batches_do_not_matter(name: str, sharing: str) -> None:
    case = CASES[name]()
    for kind in ("kfac", "ekfac") if sharing == "expand" else ("kfac",):  # bases of null spaces are free
        apart = ds.kronecker(case.problem(), kind, sharing=sharing)
        together = ds.kronecker(case.problem([case.tensors]), kind, sharing=sharing)
        assert error(apart.dense(), together.dense()) < RTOL


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_do_not_matter(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = CASES["conv_pool"]().problem()
    expected = ds.kronecker(problem, kind).dense()
    monkeypatch.setattr(blocks, "CHUNK_BYTES", 1)
    monkeypatch.setattr(moments, "PANEL", 3)
    monkeypatch.setattr(moments, "LONG", 2)
    assert error(ds.kronecker(problem, kind).dense(), expected) < RTOL


def test_what_does_not_fit_is_captured_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = CASES["conv_pool"]().problem()
    expected = ds.kronecker(problem, "ekfac").dense()
    monkeypatch.setattr(Captures, "hold", lambda _: False)
    assert error(ds.kronecker(problem, "ekfac").dense(), expected) < RTOL


# ------------------------------------------------------------------------------------------------ the operator


@pytest.mark.parametrize("name", ["conv_batchnorm", "token_classes", "unused_parameter", "frozen_parameter"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_operator_is_block_diagonal_with_its_closed_forms(name: str, kind: str) -> None:
    case = CASES[name]()
    if name == "token_classes" and kind == "cfac":
        pytest.skip("several rows an example")
    K = ds.kronecker(case.problem(), kind)
    assert K.shape == ds.GaussNewton(case.problem()).shape
    matrix = torch.zeros(K.shape, dtype=torch.float64)
    for layer, index in K.index.items():
        matrix[index[:, None], index] = K.blocks[layer].dense()
    V = torch.randn(K.shape[0], 3, generator=torch.Generator().manual_seed(0)).double()
    assert error(K @ V, matrix @ V) < RTOL
    assert error(K @ V[:, 0], matrix @ V[:, 0]) < RTOL
    assert error(K.dense(), K.dense().T) < RTOL
    assert K.trace == pytest.approx(float(matrix.trace()), rel=1e-10)
    assert K.norm == pytest.approx(float(matrix.norm()), rel=1e-10)
    values = K.eigenvalues()
    assert len(values) == K.shape[0]
    assert error(values, torch.linalg.eigvalsh(matrix).flip(0)) < RTOL


@pytest.mark.parametrize("kind", ["kfac", "ekfac"])
def test_the_inverse_inverts_with_its_damping(kind: str) -> None:
    K = ds.kronecker(CASES["unused_parameter"]().problem(), kind)
    inverse = K.inverse(0.01)
    eye = torch.eye(K.shape[0]).double()
    assert error(inverse @ (K.dense() + 0.01 * eye), eye) < RTOL
    assert inverse.trace == pytest.approx(float(inverse.dense().trace()), rel=1e-10)
    assert inverse.norm == pytest.approx(float(inverse.dense().norm()), rel=1e-10)


def test_products_compare_with_those_of_gauss_newton() -> None:
    case, ref = case_and_reference("relu_mlp")
    K, G = ds.kronecker(case.problem()), ds.GaussNewton(case.problem())
    furthest = ds.eigenpairs(G - K, 1, which="magnitude", rtol=1e-6).values
    truth = torch.linalg.eigvalsh(ref.gauss_newton - K.dense())
    assert furthest.abs()[0] == pytest.approx(float(truth.abs().max()), rel=1e-8)


@pytest.mark.parametrize(
    ("name", "layer"),
    [("conv_batchnorm", "1.weight"), ("layernorm_gelu", "4.bias"), ("recurrent", "lstm.weight_hh_l0")],
)
def test_vectors_have_their_exact_blocks(name: str, layer: str) -> None:
    case, ref = case_and_reference(name)
    for kind in KINDS:
        K = ds.kronecker(case.problem(), kind)
        assert error(K.blocks[layer].dense(), block_of(K, ref.gauss_newton, layer)) < RTOL


def test_long_vectors_have_their_diagonal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "LARGEST_VECTOR", 20)
    case, ref = case_and_reference("recurrent")
    with pytest.warns(FallbackWarning, match="diagonal"):
        K = ds.kronecker(case.problem())
    layer = "lstm.weight_hh_l0"
    assert error(K.blocks[layer].dense(), block_of(K, ref.gauss_newton, layer).diag().diag()) < RTOL


def test_a_packed_attention_is_one_block_with_its_bias() -> None:
    K = ds.kronecker(CASES["attention_module"]().problem())
    assert K.places["attention"].shape == (1, 12, 5)
    assert len(K.index["attention"]) == 60


def test_separate_inputs_of_attention_give_a_block_each() -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.attention(x, x.flip(1), 2 * x, need_weights=False)[0].mean(1))

    torch.manual_seed(0)
    case = Case(Cross().double(), chunks(torch.randn(6, 3, 4).double(), labels(6, 3), [4, 2]))
    kfac, ekfac = ds.kronecker(case.problem()), ds.kronecker(case.problem(), "ekfac")
    slices = [name for name in kfac.blocks if "in_proj_weight" in name]
    assert slices == [f"attention.in_proj_weight[{16 * j}:{16 * j + 16}]" for j in range(3)]
    covered = torch.cat(list(kfac.index.values()))
    assert len(covered) == len(covered.unique()) == kfac.shape[0]
    assert ekfac.trace == pytest.approx(float(Reference(case).gauss_newton.trace()), rel=1e-10)


# ------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize("name", ["tied_parameter", "tied_modules"])
def test_a_parameter_used_in_two_ways_is_refused(name: str) -> None:
    with pytest.raises(CurvatureError, match="different ways"):
        ds.kronecker(CASES[name]().problem())


def spread(z: Tensor, y: Tensor) -> Tensor:
    return functional.mse_loss(z, y) + z.var(0).sum()


def contrast(z: Tensor, _: Tensor) -> Tensor:
    return functional.cross_entropy(z @ z.T / 2, torch.arange(len(z)))


def partial_likelihood(z: Tensor, y: Tensor) -> Tensor:
    risk = z[y[:, 0].argsort(descending=True), 0]
    return (risk.logcumsumexp(0) - risk).mean()


@pytest.mark.parametrize("loss", [spread, contrast, partial_likelihood])
@pytest.mark.parametrize("kind", ["kfac", "ekfac", "optimal"])
def test_rows_that_interact_in_the_loss_have_no_factors(loss: Callable[..., Tensor], kind: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    data = [(torch.randn(7, 3).double(), torch.randn(7, 2).double())]
    problem = ds.Problem(model, data, loss=loss)
    for samples in (None, 1) if kind != "optimal" else (None,):
        with pytest.raises(LossError, match="rows of a batch interact"):
            ds.kronecker(problem, kind, samples=samples)
    ds.kronecker(ds.Problem(model, data, loss=lambda z, y: (z - y).square().sum() / len(z)), kind)


def test_options_and_losses_are_checked() -> None:
    problem = CASES["relu_mlp"]().problem()
    with pytest.raises(OptionError, match="kfac"):
        ds.kronecker(problem, "shampoo")
    with pytest.raises(OptionError, match="rank=2"):
        ds.kronecker(problem, rank=2)
    with pytest.raises(OptionError, match=r"rank=1\.5"):
        ds.kronecker(problem, "optimal", rank=1.5)
    with pytest.raises(OptionError, match="reduce"):
        ds.kronecker(problem, sharing="sum")
    with pytest.raises(OptionError, match="positive"):
        ds.kronecker(problem).inverse(0.0)
    with pytest.raises(CurvatureError, match="no eigenvectors or inverse"):
        ds.kronecker(problem, "cfac").inverse(0.1)
    with pytest.raises(LossError, match="cfac needs the cross-entropy"):
        ds.kronecker(CASES["mse_module"]().problem(), "cfac")
    with pytest.raises(LossError, match="one class label an example"):
        ds.kronecker(CASES["token_classes"]().problem(), "cfac")
    with pytest.raises(LossError, match="not convex"):
        ds.kronecker(ds.Problem(nn.Linear(2, 2), (torch.ones(3, 2), torch.zeros(3, 2)), loss=concave))
    small = CASES["relu_mlp"]().problem(memory=1000)
    with pytest.raises(MemoryBudgetError, match="factors"):
        ds.kronecker(small)


def concave(output: Tensor, target: Tensor) -> Tensor:
    return torch.cos(output - target).mean()


def test_eigenvalues_of_large_sums_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepspectra.kfac.operators.LARGEST_SUM", 10)
    with pytest.raises(MemoryBudgetError, match="densely"):
        ds.kronecker(CASES["relu_mlp"]().problem(), "cfac").eigenvalues()


# ----------------------------------------------------------------------------------------------- outside oracle


@pytest.mark.parametrize(
    ("name", "loss", "sharing"),
    [
        ("ragged", nn.CrossEntropyLoss(), "expand"),
        ("conv_pool", nn.CrossEntropyLoss(), "expand"),
        ("conv_pool", nn.CrossEntropyLoss(), "reduce"),
        ("mse_module", nn.MSELoss(), "expand"),
    ],
)
@pytest.mark.parametrize("kind", ["kfac", "ekfac"])
def test_curvlinops_agrees_without_class_weights(name: str, loss: nn.Module, sharing: str, kind: str) -> None:
    curvlinops = pytest.importorskip("curvlinops", reason="needs tests/oracle.txt, which cannot be had here")
    case = CASES[name]()
    make = curvlinops.KFACLinearOperator if kind == "kfac" else curvlinops.EKFACLinearOperator
    options = {"fisher_type": "type-2", "kfac_approx": sharing, "separate_weight_and_bias": False}
    theirs = make(case.model, loss, list(case.model.parameters()), case.batches, **options)
    expected = (theirs @ torch.eye(theirs.shape[0]).double()).detach()
    assert error(ds.kronecker(case.problem(), kind, sharing=sharing).dense(), expected) < 1e-8


# ----------------------------------------------------------------------------------------------------- quality


@pytest.mark.parametrize("name", ["relu_mlp", "conv_pool", "token_classes", "mse_module"])
@pytest.mark.parametrize("small", [3000, 0])
def test_quality_is_that_of_dense_blocks(name: str, small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepspectra.analysis.kronecker_quality.SMALL", small)
    monkeypatch.setattr("deepspectra.analysis.layer_blocks.SMALL", small)
    monkeypatch.setattr("deepspectra.analysis.layer_blocks.PAIRED_ROWS", 20)
    case, ref = case_and_reference(name)
    kinds = ("kfac", "ekfac", "optimal") if name in ("token_classes", "mse_module") else KINDS
    found = ds.kronecker_quality(case.problem(), kinds, ks=(1, 3), rtol=1e-8)
    operators = {kind: ds.kronecker(case.problem(), kind) for kind in kinds}
    assert set(found) == {name for name, place in operators["kfac"].places.items() if place.is_matrix}
    for layer in found.values():
        truth = block_of(operators["kfac"], ref.gauss_newton, layer.name)
        values, vectors = torch.linalg.eigh(truth)
        assert layer.num_parameters == len(truth)
        assert layer.norm == pytest.approx(float(truth.norm()), rel=1e-10)
        assert layer.largest == pytest.approx(float(values[-1]), rel=1e-8)
        assert layer.baseline.tolist() == [k / len(truth) for k in layer.ks]
        for kind, fit in layer.fits.items():
            given = operators[kind].blocks[layer.name].dense()
            if (truth - given).norm() < 1e-7 * truth.norm():
                assert fit.frobenius < 1e-6
                continue
            others, basis = torch.linalg.eigh(given)
            assert fit.frobenius == pytest.approx(float((truth - given).norm() / truth.norm()), rel=1e-6)
            cosine = (truth * given).sum() / truth.norm() / given.norm()
            assert fit.cosine == pytest.approx(float(cosine), rel=1e-8)
            spectral = torch.linalg.eigvalsh(truth - given).abs().max() / values[-1]
            assert fit.spectral == pytest.approx(float(spectral), rel=1e-2)
            assert fit.trace == pytest.approx(float(given.trace() / truth.trace()), rel=1e-8)
            for k, overlap in zip(layer.ks, fit.overlaps.tolist(), strict=True):
                gaps = [(w[-k] - w[-k - 1]) / w[-1] for w in (values, others)]
                if min(gaps) > 1e-4:
                    expected = ds.overlap(vectors[:, -k:], basis[:, -k:])
                    assert overlap == pytest.approx(expected, abs=1e-5)
            floor = found.floor * values[-1]
            logs = [w.clamp_min(floor).log10() for w in (values, others)]
            above = max(int((w > floor).sum()) for w in (values, others))
            decades = float((logs[0] - logs[1]).abs().sum()) / above
            assert fit.decades == pytest.approx(decades, abs=1e-6 if layer.exact_spectrum else 0.05)
    lines = str(found).splitlines()
    assert len(lines) == 2 + len(found) * (len(kinds) + 1)


def test_quality_checks_its_options() -> None:
    problem = CASES["relu_mlp"]().problem()
    with pytest.raises(OptionError, match="kinds"):
        ds.kronecker_quality(problem, ("shampoo",))
    with pytest.raises(OptionError, match="ascend"):
        ds.kronecker_quality(problem, ks=(3, 1))
    with pytest.raises(KeyError, match="no layer"):
        ds.kronecker_quality(problem, ("kfac",), ks=(1,))["17"]

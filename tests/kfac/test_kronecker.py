"""Kronecker-factored approximations against factors of gradients that are formed one by one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import deepspectra as ds
from deepspectra.errors import CurvatureError, LossError, MemoryBudgetError, OptionError
from nets import CASES, Case, block_of, chunks, labels
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
    assert error(ignored.dense(), ds.kronecker(ds.Problem(case.model, (x[kept], y[kept])), kind).dense()) < RTOL


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

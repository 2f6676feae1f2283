"""What results cost in products and passes, counted, which seconds cannot be; and that the bench tells the truth."""

import importlib
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from scipy.stats import wasserstein_distance
from torch import nn

import deepspectra as ds
from deepspectra.derivatives.products import Products
from deepspectra.derivatives.ways import OutputGraph
from deepspectra.problem.problem import Problem
from nets import trained_on_digits

ROOT = Path(__file__).parent.parent
CLASSES, EXAMPLES = 10, 400


class Count:
    """Columns multiplied, rows passed forward, and rows times columns passed backward."""

    products = 0
    forward = 0
    backward = 0


@pytest.fixture
def count(monkeypatch):
    counted = Count()
    hessian, evaluate, pull = Products.hessian, Problem.evaluate, OutputGraph.pull

    def counting_hessian(self, block):
        counted.products += block.shape[1]
        return hessian(self, block)

    def counting_evaluate(self, parameters, batch):
        outputs, targets = evaluate(self, parameters, batch)
        counted.forward += len(outputs)
        return outputs, targets

    def counting_pull(self, cotangent, *, batched=False):
        counted.backward += cotangent.shape[:-1].numel()
        return pull(self, cotangent, batched=batched)

    monkeypatch.setattr(Products, "hessian", counting_hessian)
    monkeypatch.setattr(Problem, "evaluate", counting_evaluate)
    monkeypatch.setattr(OutputGraph, "pull", counting_pull)
    return counted


@pytest.fixture(scope="module")
def trained():
    return trained_on_digits(EXAMPLES // CLASSES, (32, 32), epochs=20, rate=0.05, batch=32)


@pytest.fixture
def problem(trained):
    net, digits = trained
    return ds.Problem(net, (digits.inputs, digits.targets))


def test_ten_complete_pairs_take_few_products(problem, count):
    pairs = ds.eigenpairs(ds.Hessian(problem), num=10, rtol=1e-2)
    assert pairs.converged
    assert pairs.num_products == count.products
    assert count.products <= 28  # 26 where this was written


def test_class_means_take_one_pass_forward_and_one_back(problem, count):
    ds.class_means(problem, level="class")
    assert count.backward == EXAMPLES
    assert count.forward == EXAMPLES


def test_cross_class_means_take_fewer_backward_passes_than_classes(problem, count):
    ds.class_means(problem)  # the check of products with blocks, once a problem, is not counted
    count.forward = count.backward = 0
    ds.class_means(problem)
    assert count.backward == (CLASSES - 1) * EXAMPLES
    assert count.forward == EXAMPLES


def test_the_averaged_subspace_takes_no_product(problem, count):
    ds.principal_subspace(problem)
    ds.principal_subspace(problem, level="cross_class")
    assert count.products == 0


@pytest.mark.parametrize("checks", [0, 3])
def test_a_sampled_subspace_passes_the_data_only_to_draw_and_to_certify(problem, count, checks):
    ds.Hessian(problem)  # its check of derivatives is not counted
    count.forward = 0
    ds.principal_subspace(problem, level="sampled", num_samples=30, num_checks=checks)
    assert count.products <= 4 * (CLASSES - 1) + 20 + checks
    assert count.forward <= EXAMPLES * (1 + (checks > 0)) + 8 * 30  # the sample's own checks and graph


def test_a_kept_graph_is_built_once(problem, count):
    H = ds.Hessian(problem)
    count.forward = 0
    for seed in range(5):
        H @ torch.randn(problem.num_parameters, generator=torch.Generator().manual_seed(seed))
    assert count.forward == EXAMPLES


def test_a_density_takes_no_more_products_than_asked_and_one_to_check_pairs(problem, count):
    H = ds.Hessian(problem)
    ds.density(H, num_probes=2, num_steps=16)
    assert count.products == 32
    top = ds.eigenpairs(H, num=10, rtol=1e-2)
    count.products = 0
    ds.density(H, num_probes=2, num_steps=16, deflate=top)
    assert count.products == 32 + 1


# --- the bench itself --------------------------------------------------------------------------------------


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    names = ("cases", "measure", "page", "products", "reference")
    return SimpleNamespace(**{name: importlib.import_module(f"benchmarks.{name}") for name in names})


@pytest.fixture
def case(bench):
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    x, y = torch.randn(20, 5, generator=generator), torch.arange(20) % 3
    return bench.cases.Case("net", net, x, y)


@pytest.mark.parametrize(
    ("network", "parameters"),
    [("mlp", 301_066), ("lenet", 61_706), ("vgg", 159_978), ("resnet", 4_902_090), ("transformer", None)],
)
def test_every_network_of_the_bench_is_built(bench, monkeypatch, network, parameters):
    monkeypatch.delenv("DEEPSPECTRA_DATA", raising=False)
    case = bench.cases.build(network, "digits", 20, epochs=0, size=None if network == "mlp" else 32)
    assert case.model(case.x[:2]).shape == (2, 10)
    assert case.x.shape[0] == 20
    assert parameters is None or case.num_parameters == parameters


def test_the_reference_is_the_dense_hessian(bench, case):
    net = case.model.double()
    names = [name for name, _ in net.named_parameters()]
    sizes = [p.numel() for p in net.parameters()]

    def loss(theta):
        parts = [part.view_as(p) for part, p in zip(theta.split(sizes), net.parameters(), strict=True)]
        outputs = torch.func.functional_call(net, dict(zip(names, parts, strict=True)), (case.x.double(),))
        return nn.functional.cross_entropy(outputs, case.y)

    theta = torch.cat([p.detach().flatten() for p in net.parameters()])
    dense = torch.autograd.functional.hessian(loss, theta)
    vectors = case.vector(0, 2)
    hessian, gauss_newton = bench.reference.products(case, vectors)
    torch.testing.assert_close(hessian, dense @ vectors.double())
    problem = ds.Problem(net, (case.x.double(), case.y))
    torch.testing.assert_close(gauss_newton, ds.GaussNewton(problem) @ vectors.double())


def test_the_bound_of_an_mlp_is_the_count_by_hand(bench):
    widths = (784, 512, 512, 10)
    sizes = [a * b for a, b in itertools.pairwise(widths)]
    net = nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(widths)))
    case = bench.cases.Case("mlp", net, torch.randn(4, 784), torch.arange(4))
    gradient = 3 * sum(sizes) - sizes[0]
    bounds = bench.reference.bounds(case)
    assert bounds["H v"] == pytest.approx((6 * sum(sizes) - 4 * sizes[0]) / gradient)
    assert bounds["G v"] == pytest.approx((4 * sum(sizes) - 2 * sizes[0]) / gradient)


def test_the_distance_of_spectra_is_scipys(bench):
    generator = torch.Generator().manual_seed(0)
    nodes, weights, exact = (
        torch.randn(7, generator=generator),
        torch.rand(7, generator=generator),
        torch.randn(30),
    )
    expected = wasserstein_distance(nodes, exact, weights) / exact.abs().mean()
    assert bench.reference.wasserstein(nodes, weights, exact) == pytest.approx(float(expected), rel=1e-5)


class Peer:
    """A peer whose product is off by a factor."""

    name = "hasty"

    def __init__(self, factor):
        self.factor = factor

    def hessian(self, case):
        exact = ds.Hessian(case.problem())
        return lambda v: self.factor * (exact @ v)


class Broken(Peer):
    def hessian(self, case):
        def product(v):
            raise NotImplementedError("no second derivative\nof this")

        return product


@pytest.mark.parametrize(("factor", "right"), [(1.0, True), (0.9, False), (float("nan"), False)])
def test_a_wrong_product_never_counts_as_fast(bench, case, factor, right):
    rows = list(bench.products.single(case, [Peer(factor)], (2.0, 2.0)))
    (theirs,) = (row for row in rows if row.tool == "hasty")
    (ours,) = (row for row in rows if row.tool == "deepspectra" and row.what == "H v")
    assert theirs.right == right
    assert (bench.page._best(rows, ours, ours=False) is theirs) == right
    assert ("**wrong**" in bench.page._products(rows)) == (not right)


def test_a_peer_that_fails_is_a_row(bench, case):
    rows = list(bench.products.single(case, [Broken(1.0)], (2.0, 2.0)))
    (theirs,) = (row for row in rows if row.tool == "hasty")
    assert theirs.cost is None
    assert theirs.note == "failed: NotImplementedError: no second derivative"
    assert "failed" in bench.page._products(rows)


def test_calls_take_turns_and_are_given_as_multiples_of_the_unit(bench):
    order = []

    def work(amount):
        return sum(range(amount))

    calls = {name: lambda _, n=name, k=k: (order.append(n), work(k * 100_000)) for name, k in (("a", 4), ("b", 20))}
    costs = bench.measure.compare(calls, lambda: work(400_000), rounds=3)
    assert order == ["a", "b"] * 3
    assert 0.3 < costs["a"].median < 3
    assert 2 < costs["b"].median / costs["a"].median < 12


def test_the_quick_bench_writes_file_page_and_charts(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "DEEPSPECTRA_DATA"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    command = [sys.executable, "-m", "benchmarks", "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    sections = json.loads((tmp_path / "bench" / "results.json").read_text())["sections"]
    assert set(sections) == {"products", "means", "density", "pairs", "subspace"}
    rows = [row for section in sections.values() for row in section["rows"] if row["tool"] == "deepspectra"]
    assert rows
    assert all(row["right"] for row in rows), [row for row in rows if not row["right"]]
    page = (tmp_path / "benchmarks.md").read_text()
    for name in ("products", "pairs", "subspace", "density"):
        assert f"(bench/{name}.svg)" in page
        assert (tmp_path / "bench" / f"{name}.svg").stat().st_size > 1000

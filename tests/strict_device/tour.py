"""All of the library on a device that refuses to be mixed with the CPU. Run by tests/test_devices.py.

STRICT_DEVICE names the compiled device.cpp. Results must equal those on the CPU.
"""

from __future__ import annotations

import contextlib
import copy
import os
import types
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import deepspectra as ds
from deepspectra import zoo
from deepspectra.algorithms.eigenpairs import explore
from deepspectra.analysis.attribute import attribute_known
from deepspectra.analysis.layer_measures import layer_measures
from nets import CASES, CLASSIFICATION

torch.utils.rename_privateuse1_backend("strict")
MODULE = types.ModuleType("torch.strict")
for name, value in {
    "is_available": True,
    "device_count": 1,
    "current_device": 0,
    "_is_in_bad_fork": False,
}.items():
    setattr(MODULE, name, lambda value=value: value)
for name in ("manual_seed", "manual_seed_all", "synchronize", "_lazy_init"):
    setattr(MODULE, name, lambda *_: None)
MODULE.device = contextlib.nullcontext
torch._register_device_module("strict", MODULE)
torch.ops.load_library(os.environ["STRICT_DEVICE"])
torch.__future__.set_swap_module_params_on_conversion(True)  # tied parameters stay tied
STRICT = torch.device("strict:0")
PER_CLASS = 6  # digits
RUN_HERE = [name for name in CASES if name != "recurrent"]  # whose fused kernel the stand-in lacks


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-8) -> None:
    assert found.device == STRICT
    torch.testing.assert_close(found.cpu(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def test_the_device_refuses_what_a_gpu_refuses() -> None:
    here, there = torch.ones(3, device=STRICT), torch.ones(3)
    assert float((here + 1).sum()) == 6
    for mixed in (lambda: here + there, lambda: torch.cat([here, there]), lambda: here @ there):
        with pytest.raises(RuntimeError, match="device"):
            mixed()
    with pytest.raises(RuntimeError, match="generator"):
        torch.randn(3, generator=torch.Generator(), device=STRICT)
    with pytest.raises(TypeError, match="convert"):
        here.numpy()


@pytest.mark.parametrize("name", RUN_HERE)
def test_products_equal_those_on_the_cpu(name: str) -> None:
    case = CASES[name]()
    v = torch.randn(case.problem().num_parameters, 3, dtype=torch.float64)
    on_cpu = case.problem()
    case.model = copy.deepcopy(case.model).to(STRICT)
    if isinstance(case.loss, nn.Module):
        case.loss = copy.deepcopy(case.loss).to(STRICT)
    problem = case.problem()
    assert problem.loss() == pytest.approx(on_cpu.loss())
    close(problem.gradient(), on_cpu.gradient())
    for kind in (ds.Hessian, ds.GaussNewton, ds.Residual):
        close(kind(problem) @ v.to(STRICT), kind(on_cpu) @ v)
    close(ds.Hessian(problem).dense(), ds.Hessian(on_cpu).dense())


@pytest.mark.parametrize("name", [name for name in RUN_HERE if name in CLASSIFICATION])
def test_class_structure_equals_that_on_the_cpu(name: str) -> None:
    case = CLASSIFICATION[name]()
    on_cpu = case.problem()
    case.model = copy.deepcopy(case.model).to(STRICT)
    problem = case.problem()
    v = torch.randn(problem.num_parameters, 2, dtype=torch.float64)
    for effects in ("two-way", "four-way"):
        for hold in (False, True):
            expected = ds.decompose(on_cpu, effects=effects)
            for part, operator in ds.decompose(problem, effects=effects, hold=hold).items():
                close(operator @ v.to(STRICT), expected[part] @ v)
    means, expected_means = ds.class_means(problem), ds.class_means(on_cpu)
    close(means.class_means, expected_means.class_means)
    close(means.cross_class_means, expected_means.cross_class_means)
    spectrum = ds.gram_spectrum(problem, effects="two-way")
    torch.testing.assert_close(spectrum.values.cpu(), ds.gram_spectrum(on_cpu, effects="two-way").values)
    close(ds.principal_subspace(problem).values.to(STRICT), ds.principal_subspace(on_cpu).values)


@pytest.fixture(scope="module")
def trained() -> tuple[ds.Problem, ds.Problem]:
    """The same network on the device, and on the CPU."""
    data = zoo.load("digits", per_class=PER_CLASS)
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
    net = nn.Sequential(*layers, nn.LayerNorm(36), nn.Linear(36, 12), nn.Tanh(), nn.Linear(12, 10))
    zoo.train(net, data, epochs=15, learning_rate=0.05, batch_size=16, device=STRICT)
    assert next(net.parameters()).device == STRICT
    pair = data.inputs, data.targets
    return ds.Problem(net, pair, memory="2GiB"), ds.Problem(copy.deepcopy(net).cpu(), pair, memory="2GiB")


def test_spectra(trained: tuple[ds.Problem, ds.Problem]) -> None:
    problem, on_cpu = trained
    H = ds.Hessian(problem)
    expected = ds.eigenpairs(ds.Hessian(on_cpu), num=11, rtol=1e-3)
    for start in ("random", "sampled", "class_means"):
        top = ds.eigenpairs(H, num=11, rtol=1e-3, start=start)
        assert top.converged
        torch.testing.assert_close(top.values.cpu(), expected.values.cpu(), rtol=1e-4, atol=0)
    assert top.vectors.device == STRICT
    density = ds.density(H, num_probes=2, num_steps=24, deflate=top)
    assert float(density.smooth("log").density.sum()) > 0
    dense = ds.Hessian(on_cpu).dense()
    trace = ds.trace(H, num_products=16)
    assert abs(float(trace.value) - float(dense.trace())) < 6 * float(trace.standard_error)
    assert str(ds.diagonal(H, num_products=8))
    assert str(ds.frobenius_norm(H))
    ds.Hessian(problem, way="linearize")
    close(H @ torch.ones(problem.num_parameters, device=STRICT), dense.sum(1), 1e-3)
    ds.Hessian(problem, way="double backward")


@pytest.mark.parametrize("basis", [None, torch.bfloat16])
def test_rows_in_host_memory(trained: tuple[ds.Problem, ds.Problem], basis: torch.dtype | None) -> None:
    H, on_cpu = ds.Hessian(trained[0]), ds.Hessian(trained[1])
    expected = ds.eigenpairs(on_cpu, num=8, rtol=1e-2, start="random")
    H.basis, H.memory = basis, 10 * 2 * H.shape[0]
    top, grown = explore(H, 8, rtol=1e-2, start="random")
    assert "lay in host memory" in str(top)
    assert top.vectors.device == STRICT
    torch.testing.assert_close(top.values.cpu(), expected.values, rtol=1e-3, atol=0)
    grown.contract(grown.ritz().coefficients[:, -8:])
    torch.testing.assert_close(grown.ritz().values.flip(0), expected.values, rtol=1e-3, atol=0)
    H.basis, H.memory = None, 10 * 4 * H.shape[0]
    assert "lay in host memory" in ds.density(H, num_probes=1, num_steps=20, basis="full").provenance.basis


def test_attribution(trained: tuple[ds.Problem, ds.Problem]) -> None:
    problem, on_cpu = trained
    found = []
    for one, capacity in ((problem, None), (problem, 13 + 3 + 30 + 19), (on_cpu, None)):
        H, parts = ds.Hessian(one), ds.decompose(one, effects="two-way")
        if capacity:
            H.memory = capacity * 4 * one.num_parameters
        pairs, basis = explore(H, 13, rtol=1e-2, start="random")
        found.append(attribute_known(H, parts, pairs, basis))
        assert ds.attribute(H, parts, pairs=pairs).num_outliers == found[-1].num_outliers
    for attribution in found:
        assert attribution.num_outliers == found[-1].num_outliers
        assert attribution.bulk_edge == pytest.approx(found[-1].bulk_edge, rel=0.02)
        assert str(attribution)


QUESTIONS = {
    "layers": lambda problem: ds.layers(problem, kronecker=("kfac", "ekfac", "cfac")),
    "features": lambda problem: ds.class_means(problem, of="features"),
    "errors": lambda problem: ds.class_means(problem, of="errors"),
    "groups": lambda problem: ds.class_means(problem, groups=ds.class_groups(problem, 4)),
    "map": lambda problem: ds.three_level_map(ds.class_means(problem)),
    "collapse": ds.collapse,
    "clustering": lambda problem: ds.clustering(problem, num_examples=30),
    "dissect": ds.dissect,
    "weights": ds.weights,
    "quality": ds.kronecker_quality,
    "measures of layers": layer_measures,
    "compare": lambda problem: ds.compare(problem, problem),
    "certificate": lambda problem: ds.certify(problem, "learnt", epochs=2, passes=2),
}
QUESTIONS |= {
    f"regions of {of}": partial(ds.regions, of=of, num_groups=2)
    for of in ("gradients", "hessian", "features", "errors")
}
QUESTIONS |= {level: partial(ds.principal_subspace, level=level) for level in ("class", "cross_class", "sampled")}


@pytest.mark.parametrize("name", QUESTIONS)
def test_every_question_has_an_answer(trained: tuple[ds.Problem, ds.Problem], name: str) -> None:
    assert str(QUESTIONS[name](trained[0]))


@pytest.mark.parametrize("kind", ["kfac", "ekfac", "cfac"])
def test_kronecker_factors(trained: tuple[ds.Problem, ds.Problem], kind: str) -> None:
    problem, on_cpu = trained
    v = torch.randn(problem.num_parameters)
    close(ds.kronecker(problem, kind) @ v.to(STRICT), ds.kronecker(on_cpu, kind) @ v, 1e-4)
    if kind != "cfac":
        close(
            ds.kronecker(problem, kind).inverse(0.1) @ v.to(STRICT),
            ds.kronecker(on_cpu, kind).inverse(0.1) @ v,
            1e-4,
        )


@pytest.mark.parametrize("copies", [1, 4])
def test_the_whole_analysis(trained: tuple[ds.Problem, ds.Problem], tmp_path: Path, copies: int) -> None:
    """With few examples exactly, with many by products; stopped, resumed, saved and drawn."""
    problem, data = trained[0], zoo.load("digits", per_class=PER_CLASS)
    if copies > 1:
        many = data.inputs.repeat(copies, 1, 1, 1), data.targets.repeat(copies)
        problem = ds.Problem(problem.model.requires_grad_(), many, memory="2GiB")
    found = ds.analyze(problem, progress=False, num_probes=2, num_steps=20, resume=tmp_path / "stages")
    again = ds.analyze(problem, progress=False, num_probes=2, num_steps=20, resume=tmp_path / "stages")
    assert str(again) == str(found)
    found.save(tmp_path)
    assert found.to_html(tmp_path / "report.html").stat().st_size > 10_000


def test_models_go_where_they_are_told(trained: tuple[ds.Problem, ds.Problem]) -> None:
    _, on_cpu = trained
    data = zoo.load("digits", per_class=PER_CLASS)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(data.inputs, data.targets), batch_size=50)
    problem = ds.Problem(on_cpu.model.requires_grad_(), loader, device="strict")
    close(problem.gradient(), on_cpu.gradient(), 1e-4)
    assert problem.to(torch.float64).gradient().device == STRICT

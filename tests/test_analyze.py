"""The whole job on a small trained network: numbers, files, report."""

import json

import numpy as np
import pytest
import torch
import xarray as xr

import deepspectra as ds
from deepspectra import errors, zoo
from deepspectra.apps import stages


def trained(memory=None, **options):
    data = zoo.load("digits", per_class=15)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = zoo.mlp((1, 8, 8), 10, widths=(16,))
    zoo.train(net, data, epochs=30, learning_rate=0.1, batch_size=16)
    return ds.Problem(net.double(), (data.inputs.double(), data.targets), memory=memory, **options)


def analysed(route, problem=None):
    """Of a small problem G is known exactly; "products" has it analysed as a large one."""
    with pytest.MonkeyPatch.context() as patch:
        if route == "products":
            patch.setattr(stages, "EXACT_ROWS", 0)
        options = {"num_probes": 2, "num_steps": 24, "progress": False, "model": "mlp", "data": "digits"}
        return ds.analyze(problem or trained(), **options)


@pytest.fixture(scope="module", params=["exact", "products"])
def route(request):
    return request.param


@pytest.fixture(scope="module")
def analysis(route):
    return analysed(route)


def test_numbers_agree_with_the_dense_spectrum(analysis):
    problem = trained()
    for name, operator in (("hessian", ds.Hessian), ("gauss_newton", ds.GaussNewton)):
        exact = torch.linalg.eigvalsh(operator(problem).dense()).flip(0).numpy()
        found = analysis.dataset.eigenvalue.sel(operator=name).values
        np.testing.assert_allclose(found, exact[: len(found)], rtol=2e-4)
        trace = float(analysis.dataset.trace.sel(operator=name))
        error = float(analysis.dataset.trace_standard_error.sel(operator=name))
        assert abs(trace - exact.sum()) < 5 * error + 0.02 * exact.sum()
    parts = ds.decompose(problem, effects="two-way")
    for part in parts:
        exact = float(parts[part].dense().trace())
        found = analysis.dataset.sel(part=part)
        assert abs(float(found.part_trace) - exact) < 6 * float(found.part_trace_standard_error) + 1e-9


def test_both_routes_find_the_same():
    exact, products = (analysed(route).dataset for route in ("exact", "products"))
    np.testing.assert_allclose(exact.eigenvalue, products.eigenvalue, rtol=3e-4)
    np.testing.assert_allclose(
        exact.share.sel(operator="hessian"), products.share.sel(operator="hessian"), atol=1e-9
    )
    np.testing.assert_allclose(
        exact.share.sel(operator="gauss_newton"), products.share.sel(operator="gauss_newton"), atol=0.02
    )
    np.testing.assert_allclose(exact.subspace_value, products.subspace_value, rtol=1e-8)
    np.testing.assert_allclose(exact.subspace_overlap, products.subspace_overlap, atol=1e-3)
    np.testing.assert_allclose(
        exact.knockout_value.sel(operator="hessian"),
        products.knockout_value.sel(operator="hessian"),
        rtol=0.05,
    )
    for part in ("class", "within"):
        gap = abs(float(exact.part_trace.sel(part=part) - products.part_trace.sel(part=part)))
        assert gap < 6 * float(products.part_trace_standard_error.sel(part=part)) + 1e-9


def test_the_exact_route_knows_all_of_g():
    problem, dataset = trained(), analysed("exact").dataset
    g = dataset.sel(operator="gauss_newton")
    parts = {name: part.dense() for name, part in ds.decompose(problem, effects="two-way").items()}
    edge = float(torch.linalg.eigvalsh(parts["within"])[-1])
    assert float(g.bulk_edge) == pytest.approx(edge, rel=1e-8)
    assert float(g.outlier_threshold) == pytest.approx(1.25 * edge, rel=1e-8)
    left = torch.linalg.eigvalsh(sum(parts.values()) - parts["class"] - parts["logit"]).flip(0)
    found = g.knockout_value.sel({"knockout": "class + logit", "method": "subtraction"})
    np.testing.assert_allclose(found, left[: len(found)], rtol=1e-6, atol=1e-9)
    assert int(g.num_outliers) == int((g.eigenvalue > g.outlier_threshold).sum())
    assert set(g.density_probe.values.tolist()) <= {-1, -2}
    assert float(g.trace_standard_error) == 0
    assert (dataset.part_trace_standard_error.dropna("part") == 0).all()


def test_a_network_that_does_not_tell_examples_apart_is_analysed_by_products():
    """Rows are not spread evenly over examples: features and errors by example make no sense."""

    def forward(model, batch):
        return model(batch[0])[:-1], batch[1][:-1]

    torch.manual_seed(0)
    x, y = torch.randn(40, 4, dtype=torch.float64), torch.arange(40) % 3
    problem = ds.Problem(torch.nn.Linear(4, 3).double(), [(x, y)], forward=forward)
    dataset = ds.analyze(problem, num_probes=2, num_steps=8, progress=False).dataset
    assert "exact spectrum of G" not in dataset.stage
    assert "not computed: a batch of 40 examples gives 39 rows" in dataset.attrs["provenance"]


def test_weights_of_every_density_sum_to_one(analysis):
    sums = analysis.dataset.density_weight.sum("node")
    np.testing.assert_allclose(sums, 1, atol=1e-12)


def test_shares_of_every_pair_sum_to_one(analysis):
    shares = analysis.dataset.share.sel(operator=["hessian", "gauss_newton"]).sum("part")
    np.testing.assert_allclose(shares, 1, atol=1e-9)


def test_the_verdict_says_what_the_numbers_say(analysis):
    dataset = analysis.dataset
    count = int(dataset.num_outliers.sel(operator="hessian"))
    threshold = float(dataset.outlier_threshold.sel(operator="hessian"))
    assert count == int((dataset.eigenvalue.sel(operator="hessian") > threshold).sum()) > 0
    assert analysis.verdict.startswith(f"{count} outliers (above {threshold:.3g}")
    left = dataset.knockout_outliers.sel({"operator": "hessian", "method": "subtraction"})
    for name in ("class", "class + logit"):
        number = int(left.sel(knockout=name))
        assert f"leaves {number or 'none'}" in analysis.verdict
    assert str(analysis) == analysis.verdict


def test_every_stage_is_in_the_bill(analysis, route):
    dataset = analysis.dataset
    assert (dataset.cost_seconds >= 0).all()
    for letter in "HR" if route == "exact" else "HGR":
        assert int(dataset.cost_products.sel(stage=f"density of {letter}")) > 0
    assert ("exact spectrum of G" in dataset.stage) == (route == "exact")
    notes = json.loads(dataset.attrs["provenance"])
    assert notes["versions"]["torch"] == torch.__version__
    assert notes["way"] in ("double backward", "linearize")


def test_the_same_seed_gives_the_same_numbers(analysis, route):
    again = analysed(route)
    timed = [name for name in again.dataset if name.startswith("cost_") or name == "subspace_gradients"]
    xr.testing.assert_equal(again.dataset.drop_vars(timed), analysis.dataset.drop_vars(timed))


def test_a_small_memory_budget_gives_the_same_numbers(analysis):
    streamed = analysed("exact", trained(memory="3MB", batch_size=32))
    assert "exact spectrum of G" not in streamed.dataset.stage  # it does not fit
    np.testing.assert_allclose(streamed.dataset.eigenvalue, analysis.dataset.eigenvalue, rtol=1e-3)
    np.testing.assert_allclose(streamed.dataset.mean_share, analysis.dataset.mean_share, atol=1e-3)


def test_saved_and_loaded_it_is_the_same(analysis, tmp_path):
    folder = analysis.save(tmp_path / "run")
    again = ds.load(folder)
    xr.testing.assert_identical(again.dataset, analysis.dataset)
    assert again.vectors.keys() == analysis.vectors.keys() == {"hessian", "gauss_newton"}
    for kind, tree in analysis.vectors.items():
        for name, value in tree.items():
            assert torch.equal(again.vectors[kind][name], value)
    assert sorted(path.name for path in folder.iterdir()) == ["analysis.nc", "vectors.safetensors"]
    page = again.to_html(tmp_path / "report.html").read_text()
    assert "outliers" in page
    assert analysis.dataset.attrs["title"] in page


def test_saved_vectors_are_the_eigenvectors(analysis):
    problem = trained()
    tree = analysis.vectors["hessian"]
    v = problem.flatten({name: value[0] for name, value in tree.items()})
    top = float(analysis.dataset.eigenvalue.sel(operator="hessian")[0])
    assert (ds.Hessian(problem) @ v - top * v).norm() <= 1e-2 * top


@pytest.mark.parametrize("name", ["analysis.nc", "vectors.safetensors"])
def test_a_truncated_or_missing_file_is_said_to_be_so(analysis, tmp_path, name):
    folder = analysis.save(tmp_path)
    path = folder / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(errors.FileError, match="truncated"):
        ds.load(folder)
    path.unlink()
    with pytest.raises(errors.FileError, match="does not exist"):
        ds.load(folder)


def test_a_foreign_netcdf_file_is_refused(analysis, tmp_path):
    analysis.save(tmp_path)
    xr.Dataset({"x": ("n", [1.0])}).to_netcdf(tmp_path / "analysis.nc", engine="h5netcdf")
    with pytest.raises(errors.FileError, match="not an analysis"):
        ds.load(tmp_path)


def test_class_names_must_be_one_a_class():
    with pytest.raises(errors.OptionError, match="class names"):
        ds.analyze(trained(), class_names=["a", "b"], progress=False)


def test_another_loss_has_no_class_structure():
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    problem = ds.Problem(torch.nn.Linear(3, 2), (x, x[:, :2]), "mse")
    with pytest.raises(errors.LossError, match="cross-entropy"):
        ds.decompose(problem)


@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_what_has_no_classes_is_refused_before_any_work(monkeypatch, loss):
    targets = torch.full((12, 3), 1 / 3)
    problem = ds.Problem(torch.nn.Linear(4, 3), (torch.randn(12, 4), targets), loss)
    monkeypatch.setattr(stages, "run", lambda *_, **__: pytest.fail("work was done"))
    with pytest.raises(errors.LossError):
        ds.analyze(problem, progress=False)


def test_an_untrained_network_is_analysed_without_complaint():
    data = zoo.load("digits", per_class=8)
    net = zoo.build("mlp-bn", input_shape=(1, 8, 8), num_classes=10).eval()
    problem = ds.Problem(net, (data.inputs, data.targets), parameters="*.weight")
    found = ds.analyze(problem, num=5, num_probes=1, num_steps=8, progress=False)
    assert np.isfinite(found.dataset.eigenvalue.sel(operator="hessian")).all()


def test_an_absent_class_is_left_out():
    data = zoo.load("digits", per_class=10)
    kept = data.targets != 3
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = zoo.mlp((1, 8, 8), 10, widths=(8,)).eval()
    problem = ds.Problem(net, (data.inputs[kept], data.targets[kept]))
    found = ds.analyze(problem, num_probes=1, num_steps=8, progress=False)
    assert int(found.dataset.class_count[3]) == 0
    assert float(found.dataset.class_weight[3]) == 0


def test_two_classes():
    data = zoo.load("digits", per_class=20)
    kept = data.targets < 2
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = zoo.mlp((1, 8, 8), 2, widths=(8,)).eval()
    problem = ds.Problem(net, (data.inputs[kept], data.targets[kept]))
    found = ds.analyze(problem, num_probes=1, num_steps=8, progress=False)
    np.testing.assert_allclose(found.dataset.share.sel(operator="hessian").sum("part"), 1, atol=1e-6)

"""The whole job on a small trained network: numbers, files, report."""

import functools
import html
import json
import math
import os
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import xarray as xr

import deepspectra as ds
from deepspectra import errors, report, zoo
from deepspectra.jobs import density_stages, stages
from deepspectra.jobs.effort import effort_for
from nets import trained_on_digits


@functools.cache
def network():
    return trained_on_digits(15, (16,), epochs=30)


def trained(memory=None, **options):
    net, data = network()
    return ds.Problem(net.double(), (data.inputs.double(), data.targets), memory=memory, **options)


def analysed(route, problem=None):
    """Of a small problem G is known exactly; "products" has it analysed as a large one."""
    with pytest.MonkeyPatch.context() as patch:
        if route == "products":
            patch.setattr(stages, "effort_for", lambda *size: effort_for(*size)._replace(exact_rows=0))
        found = ds.analyze(problem or trained(), num_probes=2, num_steps=24, progress=False)
        return found.labelled(model="mlp", data="digits")


@pytest.fixture(scope="module", params=["exact", "products"])
def route(request):
    return request.param


analysed_once = functools.cache(analysed)  # of each route


@pytest.fixture(scope="module")
def analysis(route):
    return analysed_once(route)


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
        found = analysis.dataset.sel(part=part)
        assert float(found.part_trace) == pytest.approx(float(parts[part].dense().trace()), rel=1e-9)
        assert float(found.part_trace_standard_error) == 0
    trace = float(analysis.dataset.trace.sel(operator="gauss_newton"))
    assert float(analysis.dataset.part_trace.sum()) == pytest.approx(trace, rel=1e-12)


def test_both_routes_find_the_same():
    exact, products = (analysed_once(route).dataset for route in ("exact", "products"))
    np.testing.assert_allclose(exact.eigenvalue, products.eigenvalue, rtol=3e-4)
    np.testing.assert_allclose(exact.share.sel(operator="hessian"), products.share.sel(operator="hessian"), atol=1e-9)
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
    np.testing.assert_allclose(exact.part_trace, products.part_trace, rtol=1e-8)


def test_the_exact_route_knows_all_of_g():
    problem, dataset = trained(), analysed_once("exact").dataset
    g = dataset.sel(operator="gauss_newton")
    parts = {name: part.dense() for name, part in ds.decompose(problem, effects="two-way").items()}
    edge = float(torch.linalg.eigvalsh(parts["within"])[-1])
    assert float(g.bulk_edge) == pytest.approx(edge, rel=1e-8)
    assert float(g.outlier_threshold) == pytest.approx(1.25 * edge, rel=1e-8)
    left = torch.linalg.eigvalsh(sum(parts.values()) - parts["class"] - parts["true"] - parts["logit"])
    left = left.flip(0)
    found = g.knockout_value.sel({"knockout": "class + logit", "method": "subtraction"})
    np.testing.assert_allclose(found, left[: len(found)], rtol=1e-6, atol=1e-9)
    assert int(g.num_outliers) == int((g.eigenvalue > g.outlier_threshold).sum())
    assert set(g.density_probe.values.tolist()) <= {-1, -2}
    assert float(g.trace_standard_error) == 0
    assert (dataset.part_trace_standard_error.dropna("part") == 0).all()


@pytest.mark.parametrize("passes", [50_000, 10])
def test_a_network_that_does_not_tell_examples_apart_is_analysed(passes, monkeypatch):
    """Rows are not spread evenly over examples: row by row, or by products where that takes too many passes."""
    monkeypatch.setattr("deepspectra.rows.batch_capture.MOST_PASSES", passes)

    def forward(model, batch):
        return model(batch[0])[:-1], batch[1][:-1]

    torch.manual_seed(0)
    x, y = torch.randn(40, 4, dtype=torch.float64), torch.arange(40) % 3
    problem = ds.Problem(torch.nn.Linear(4, 3).double(), [(x, y)], forward=forward)
    dataset = ds.analyze(problem, num_probes=2, num_steps=8, progress=False).dataset
    few = passes < 39 * 2
    assert ("exact spectrum of G" in dataset.stage) != few
    parts = {name: part.dense() for name, part in ds.decompose(problem, effects="two-way").items()}
    for (
        name,
        part,
    ) in parts.items():  # no gradients of single examples: what scatters within classes is estimated
        exact, found = float(part.trace()), dataset.sel(part=name)
        error = float(found.part_trace_standard_error)
        assert (error > 0) == (few and name == "within")
        assert abs(float(found.part_trace) - exact) < 6 * error + 1e-9 * exact
    assert ("not computed" in dataset.attrs["provenance"]) == few


def few_examples(num=8, seed=0):
    """More parameters than gradients: G has zeros."""
    torch.manual_seed(seed)
    x, y = torch.randn(num, 5, dtype=torch.float64), torch.arange(num) % 3
    net = torch.nn.Sequential(torch.nn.Linear(5, 9), torch.nn.Tanh(), torch.nn.Linear(9, 3)).double()
    return ds.Problem(net, (x, y))


def test_the_bins_of_g_are_its_spectrum_without_zeros_whatever_the_route(route):
    problem = few_examples()
    values = torch.linalg.eigvalsh(ds.GaussNewton(problem).dense())
    rank = 8 * 2
    assert int((values > 1e-12).sum()) == rank
    g = analysed(route, problem).dataset.sel(operator="gauss_newton", split="train")
    assert float(g.zero_share) == pytest.approx(1 - rank / problem.num_parameters, abs=1e-12)
    for view in ("linear", "signed", "magnitude"):
        bins = g.sel(view=view)
        assert float(bins.bin_mass.sum() + g.zero_share) == pytest.approx(1, abs=1e-9)
        for start, end, low, high in zip(bins.bin_start, bins.bin_end, bins.bin_low, bins.bin_high, strict=True):
            inside = (values > max(float(start), 1e-12)) & (values <= float(end))
            assert not float(low) - 1e-9 > float(inside.double().mean())
            assert not float(high) + 1e-9 < float(inside.double().mean())
    assert not (g.bin_mass.where(g.bin_end <= 0) > 0).any()


def test_no_zeros_are_said_that_are_only_estimated(analysis, route):
    """More gradients than parameters, some of which no gradient reaches: random vectors cannot count the zeros."""
    problem = trained()
    values = torch.linalg.eigvalsh(ds.GaussNewton(problem).dense())
    zeros = float((values < 1e-13 * values[-1]).double().mean())
    g = analysis.dataset.sel(operator="gauss_newton", split="train")
    if route == "exact":
        assert float(g.zero_share) == pytest.approx(zeros, abs=3 / problem.num_parameters)
    else:
        assert np.isnan(float(g.zero_share))


def test_tails_are_judged_of_every_spectrum_and_said(analysis):
    dataset = analysis.dataset.sel(split="train")
    verdicts = dataset.tail_verdict
    assert (verdicts.sel(operator=["hessian", "residual"]) != "").all()
    assert (verdicts.sel(operator="gauss_newton").values == "").tolist() == [False, True, True]
    said = {name: str(verdicts.sel(operator=name, side="magnitude").values) for name in ("gauss_newton", "residual")}
    assert f"G {said['gauss_newton']}" in analysis.verdict
    assert f"R {said['residual']}" in analysis.verdict


def test_test_data_stand_beside_those_of_training():
    problem = trained()
    data = zoo.load("digits", split="test", per_class=6)
    test = ds.Problem(network()[0].double(), (data.inputs.double(), data.targets))
    found = ds.analyze(problem, test=test, num_probes=2, num_steps=24, progress=False)
    dataset = found.dataset
    for name, operator in (("hessian", ds.Hessian), ("gauss_newton", ds.GaussNewton)):
        exact = torch.linalg.eigvalsh(operator(test).dense())
        values = dataset.test_eigenvalue.sel(operator=name).values
        np.testing.assert_allclose(values, exact.flip(0).numpy()[: len(values)], rtol=2e-4)
        bins = dataset.sel(split="test", operator=name, view="signed").dropna("bin")
        inside = [
            ((exact > start) & (exact <= end)).double().mean()
            for start, end in zip(bins.bin_start.values, bins.bin_end.values, strict=True)
            if start > 1e-4
        ]
        above = bins.bin_start.values > 1e-4
        low, high = (bins[f"bin_{end}"].values[above] for end in ("low", "high"))
        covered = (low - 1e-9 <= inside) & (inside <= high + 1e-9)
        assert covered.mean() >= 0.9
    assert dataset.attrs["test_accuracy"] == test.accuracy()
    assert dataset.attrs["test_loss_value"] == pytest.approx(test.loss())
    assert f"on the test data (loss {test.loss():.3g}, accuracy {test.accuracy():.1%})" in found.verdict
    alone = analysed_once("exact").dataset
    xr.testing.assert_allclose(dataset.eigenvalue, alone.eigenvalue, rtol=1e-4)
    assert alone.split.values.tolist() == ["train"]
    page = report.render(dataset)
    for name in ("spectrum_test", "log_spectrum_test", "magnitude_spectrum_test"):
        assert f'id="chart-{name}"' in page


def test_another_network_is_no_test_of_this_one():
    problem = few_examples()
    other = few_examples(seed=1)
    with pytest.raises(errors.OptionError, match="same network with other data"):
        ds.analyze(problem, test=other, progress=False)


def test_figures_are_saved_as_wide_as_a_column(analysis, tmp_path):
    pdf = analysis.save_chart(tmp_path / "spectrum.pdf").read_bytes()
    left, top, right, bottom = map(float, re.search(rb"MediaBox \[([^\]]*)\]", pdf)[1].split())
    assert (right - left, bottom > top) == (pytest.approx(3.3 * 72, abs=0.5), True)
    for name in ("log_spectrum", "magnitude_spectrum"):
        assert analysis.save_chart(tmp_path / f"{name}.svg", name).read_bytes().startswith(b"<svg")
    assert analysis.chart("shares").to_dict()["width"] == 720
    with pytest.raises(errors.OptionError, match="there is no chart 'density'; there are spectrum, "):
        analysis.chart("density")


@pytest.mark.parametrize("sizes", [(1, 0, 2, 3), (2, 0, 4, 6), (2, 3, 4, 1), (3, 2, 5, 20)])
def test_the_smallest_networks_are_analysed(route, sizes):
    inputs, hidden, classes, num = sizes
    torch.manual_seed(sum(sizes))
    net = torch.nn.Linear(inputs, classes, bias=inputs > 1)
    if hidden:
        layers = torch.nn.Linear(inputs, hidden), torch.nn.Tanh(), torch.nn.Linear(hidden, classes)
        net = torch.nn.Sequential(*layers)
    problem = ds.Problem(net.double(), (torch.randn(num, inputs).double(), torch.arange(num) % classes))
    analysis = analysed(route, problem)
    dataset, g = analysis.dataset, ds.GaussNewton(problem).dense()
    assert float(dataset.trace.sel(operator="gauss_newton")) == pytest.approx(float(g.trace()), rel=1e-9)
    assert float(dataset.part_trace.sum()) == pytest.approx(float(g.trace()), rel=1e-9)
    values = torch.linalg.eigvalsh(ds.Hessian(problem).dense()).flip(0)
    found = dataset.eigenvalue.sel(operator="hessian").values
    known = np.isfinite(found)
    np.testing.assert_allclose(found[known], values[: known.sum()], atol=1e-3 * float(values[0]))
    assert "Trace" in analysis.verdict
    if sizes == (1, 0, 2, 3):
        assert report.render(dataset)


def test_values_that_are_not_finite_are_said_and_not_drawn(monkeypatch):
    original = density_stages.density

    def broken(operator, *args, **kwargs):
        found = original(operator, *args, **kwargs)
        return replace(found, weights=found.weights * math.nan) if operator.name == "residual" else found

    monkeypatch.setattr(density_stages, "density", broken)
    analysis = analysed("exact", few_examples())
    assert "the density of R has values that are not finite" in analysis.verdict
    assert np.isnan(analysis.dataset.bin_mass.sel(operator="residual")).all()
    assert report.render(analysis.dataset)


def test_weights_of_every_density_sum_to_one(analysis):
    sums = analysis.dataset.density_weight.sum("node")
    np.testing.assert_allclose(sums, 1, atol=1e-12)


def test_shares_of_every_pair_sum_to_one(analysis):
    shares = analysis.dataset.share.sel(operator=["hessian", "gauss_newton"]).sum("part")
    np.testing.assert_allclose(shares, 1, atol=1e-9)


def test_a_trace_of_rounding_alone_is_told_as_zero():
    torch.manual_seed(0)
    data = torch.randn(40, 4), torch.arange(40) % 3
    linear = ds.Problem(torch.nn.Linear(4, 3), data)  # H = G
    assert "R 0." in ds.analyze(linear, progress=False).verdict
    curved = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    assert "R 0." not in ds.analyze(ds.Problem(curved, data), progress=False).verdict


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
    timed = [name for name in again.dataset if name.startswith("cost_")]
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


@pytest.mark.parametrize("where", ["file/below", "file"])
def test_a_folder_that_cannot_be_written_is_said(analysis, tmp_path, where):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(errors.FileError, match=r"cannot be written .*Choose another directory, or make room"):
        analysis.save(tmp_path / where)


def test_a_disk_without_room_for_the_vectors_has_the_numbers(analysis, tmp_path, monkeypatch):
    def full(_, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("deepspectra.jobs.analyze.save_file", full)
    with pytest.raises(errors.FileError, match=r"vectors\.safetensors cannot be written .*No space"):
        analysis.save(tmp_path)
    assert os.listdir(tmp_path) == ["analysis.nc"]
    with xr.open_dataset(tmp_path / "analysis.nc", engine="h5netcdf") as saved:
        xr.testing.assert_equal(saved.load(), analysis.dataset)


def test_a_foreign_netcdf_file_is_refused(analysis, tmp_path):
    analysis.save(tmp_path)
    xr.Dataset({"x": ("n", [1.0])}).to_netcdf(tmp_path / "analysis.nc", engine="h5netcdf")
    with pytest.raises(errors.FileError, match="not an analysis"):
        ds.load(tmp_path)


def test_a_notebook_shows_the_verdict_and_the_spectrum(analysis):
    shown = analysis._repr_html_()
    assert html.escape(analysis.verdict, quote=False) in shown
    assert "<svg" in shown
    assert repr(analysis).startswith("<Analysis: Spectrum of")


def test_pairs_are_a_table_with_their_shares(analysis):
    table = analysis.to_dataframe()
    shares = table[[name for name in table if name.startswith("share of ")]].sum(axis=1)
    assert shares.to_numpy() == pytest.approx(1, abs=1e-3)
    of_h = table[table["operator"] == "hessian"]
    assert of_h["is_outlier"].sum() == int(analysis.dataset["num_outliers"].sel(operator="hessian"))
    lines = analysis.to_latex().splitlines()
    assert len([line for line in lines if line.endswith(r"\\") and line[0].isdigit()]) == len(of_h)


def test_class_names_must_be_one_a_class(analysis):
    with pytest.raises(errors.OptionError, match="2 class names for 10"):
        analysis.labelled(class_names=["a", "b"])


def test_labels_change_names_and_no_number(analysis):
    names = [f"digit {c}" for c in range(10)]
    named = analysis.labelled(model="net", class_names=names)
    assert named.dataset.attrs["title"] == "Spectrum of net on digits"
    assert named.labelled(title="Mine").dataset.attrs["title"] == "Mine"
    for axis in ("class", "cross_class", "class_other"):
        assert named.dataset[axis].values.tolist() == names
    assert analysis.dataset["class"].values.tolist() == [str(c) for c in range(10)]
    for name, values in analysis.dataset.data_vars.items():
        np.testing.assert_array_equal(named.dataset[name].values, values.values)


def test_another_loss_has_no_class_structure():
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    problem = ds.Problem(torch.nn.Linear(3, 2), (x, x[:, :2]), "mse")
    with pytest.raises(errors.LossError, match="cross-entropy"):
        ds.decompose(problem)


def cauchy(outputs, targets):
    return torch.log1p((outputs - targets).square()).mean()


WITHOUT_CLASSES = {
    "regression": ("mse", 2, 2),
    "one output": ("mse", 1, 1),
    "a callable that is not convex": (cauchy, 2, 2),
    "probabilities of classes": ("cross_entropy", 3, 3),
}


@pytest.mark.parametrize("case", WITHOUT_CLASSES)
@pytest.mark.parametrize("dense", [True, False])
def test_a_problem_without_classes_has_its_spectra_and_no_outliers(case, dense, tmp_path):
    loss, width, outputs = WITHOUT_CLASSES[case]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 3, generator=generator, dtype=torch.float64)
    y = torch.rand(30, width, generator=generator, dtype=torch.float64)
    y = y / y.sum(1, keepdim=True) if loss == "cross_entropy" else 4 * y
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, outputs)).double()
    problem = ds.Problem(net, (x, y), loss)
    problem.name, problem.data_name = "<mine>", "noise"
    counts = {} if dense else {"num_probes": 2, "num_steps": 12}
    found = ds.analyze(problem, num=4, test=problem, progress=False, **counts)
    data = found.dataset
    for name, operator in (("hessian", ds.Hessian), ("gauss_newton", ds.GaussNewton)):
        exact = torch.linalg.eigvalsh(operator(problem).dense()).flip(0)
        np.testing.assert_allclose(data.eigenvalue.sel(operator=name), exact[:4], rtol=1e-3, atol=1e-9)
        error = 6 * float(data.trace_standard_error.sel(operator=name)) + 1e-6 * float(exact.abs().sum())
        assert abs(float(data.trace.sel(operator=name)) - float(exact.sum())) <= error
        if dense:  # what lies below zero is drawn where it is no rounding
            bins = data.sel(operator=name, split="train", view="linear")
            below = float(bins.bin_mass.where(bins.bin_end < -1e-9).sum())
            assert (below > 0) == bool((exact < -1e-6).any())
    assert not (data.is_outlier == 1).any()
    assert "part" not in data.dims
    assert "class" not in data.dims
    assert "num_classes" not in data.attrs
    assert data.attrs["title"] == "Spectrum of <mine> on noise"
    assert "no outlier is told from the bulk" in found.verdict
    found.save(tmp_path)
    page = ds.load(tmp_path).to_html(tmp_path / "report.html").read_text()
    assert 'id="chart-spectrum"' in page
    assert 'id="chart-shares"' not in page


def test_what_a_problem_without_classes_cannot_have_is_refused_before_any_work(monkeypatch):
    problem = ds.Problem(torch.nn.Linear(4, 3), (torch.randn(12, 4), torch.randn(12, 3)), "mse")
    monkeypatch.setattr(stages, "run", lambda *_, **__: pytest.fail("work was done"))
    with pytest.raises(errors.OptionError, match="no class labels"):
        ds.analyze(problem, groups=2, progress=False)
    single = ds.Problem(torch.nn.Linear(4, 1), (torch.randn(12, 4), torch.zeros(12).long()))
    with pytest.raises(errors.LossError, match="one output"):
        ds.analyze(single, progress=False)


def test_very_many_classes_are_put_into_groups_and_that_is_said(capsys):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(150, 6, generator=generator), torch.arange(150) % 120
    problem = ds.Problem(torch.nn.Linear(6, 120), (x, y))
    problem.class_names = [f"word {c}" for c in range(120)]
    found = ds.analyze(problem, num_probes=1, num_steps=4)
    assert "120 classes are taken over 10 groups" in " ".join(capsys.readouterr().err.split())
    assert found.dataset.attrs["averages"] == "10 groups of 120 classes"
    assert found.dataset.sizes["pair"] == 13
    owner = found.dataset["class_group"].values
    names = [f"word {c}" for c in np.flatnonzero(owner == 0)]
    assert str(found.dataset["class"].values[0]).startswith(", ".join(names[:2]))
    asked = ds.analyze(problem, num=3, groups=4, num_probes=1, num_steps=4, progress=False)
    assert asked.dataset.sizes["class"] == 4


def test_names_and_margin_are_the_users():
    problem = trained()
    problem.name, problem.class_names = "net", [f"digit {c}" for c in range(10)]
    named = ds.analyze(problem, num_probes=1, num_steps=4, margin=3, progress=False).dataset
    assert named["class"].values.tolist() == problem.class_names
    assert named.attrs["title"] == "Spectrum of net"
    h = named.sel(operator="hessian")
    assert float(h.outlier_threshold) == pytest.approx(3 * float(h.bulk_edge))
    assert int(h.num_outliers) == int((h.eigenvalue > 3 * h.bulk_edge).sum())
    with pytest.raises(errors.OptionError, match="margin"):
        ds.analyze(problem, margin=0.5, progress=False)
    problem.class_names = ["one"]
    with pytest.raises(errors.OptionError, match="1 names for 10 classes"):
        ds.analyze(problem, progress=False)


def test_groups_beyond_the_classes_are_refused_by_their_name():
    problem = ds.Problem(torch.nn.Linear(4, 3), (torch.randn(12, 4), torch.arange(12) % 3))
    with pytest.raises(errors.OptionError, match=r"^groups must be an integer, at least 1 and at most 3; got 20"):
        ds.analyze(problem, groups=20, progress=False)


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


def test_groups_are_named_by_a_function_and_found_for_very_many_classes(monkeypatch):
    torch.manual_seed(0)
    problem = ds.Problem(torch.nn.Linear(3, 6).double(), (torch.randn(12, 3).double(), torch.arange(12) % 6))
    quick = functools.partial(ds.analyze, problem, effort="quick", num_probes=1, num_steps=4, progress=False)
    named = quick(groups=lambda c: "low" if c < 3 else "high")
    assert named.dataset["class"].values.tolist() == ["high", "low"]
    assert named.dataset.class_count.values.tolist() == [6, 6]
    monkeypatch.setattr("deepspectra.jobs.analyze.MOST_CLASSES", 5)
    monkeypatch.setattr("deepspectra.jobs.analyze.NUM_GROUPS", 2)
    found = quick()
    assert found.dataset.attrs["averages"] == "2 groups of 6 classes"

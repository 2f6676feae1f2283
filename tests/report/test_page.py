"""The report: what a dataset says is what the charts and the page show, and nothing is fetched to show it."""

import html
import importlib.util
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

import deepspectra as ds
from commands import finished
from deepspectra import report
from deepspectra.errors import DataError, FileError, OptionError
from deepspectra.jobs.compare_dataset import comparison_dataset
from deepspectra.jobs.layers_dataset import layer_dataset
from deepspectra.jobs.pages import Labels, load_dataset, measured, save_dataset
from deepspectra.jobs.regions_dataset import regions_dataset
from deepspectra.report import render
from deepspectra.report.drawing import PART_COLOURS, number
from deepspectra.report.figures import FIGURES, figures_of
from deepspectra.report.page import _bibtex, _citation, tables_section
from deepspectra.report.text import percent, quantity

OPERATORS = ["hessian", "gauss_newton", "residual"]
PARTS = ["class", "logit", "interaction", "within", "true", "residual"]
KNOCKOUTS = ["nothing", "class", "class + logit", "all means"]
METHODS = ["subtraction", "projection"]
STAGES = ["eigenpairs", "density", "class means", "attribution", "knock-outs", "averaging"]
VERDICT = (
    "Nine outliers of the Hessian stand above a bulk that ends at 0.085, and 86 % of them is additive: "
    "class means 52 %, logit means 34 %. Removing the class means alone leaves at least seven outliers "
    "standing; removing class and logit means leaves none. Averaging gradients by class finds 87 % of the "
    "outlier eigenspace for the price of one gradient, and the cross-class means find 97.5 %."
)


def unlinked(page):
    """A page without the links of its terms."""
    return re.sub(r'<a class="term"[^>]*>(.*?)</a>', r"\1", page)


def bulk(rng, operator, num):
    """Eigenvalues of the bulk: of G positive and heavy-tailed, of R on both sides of zero."""
    positive = np.minimum(rng.lognormal(math.log(2e-4), 2.0, num), 0.085)
    both = np.clip(rng.standard_t(3, num) * 3e-3, -0.05, 0.06)
    return {"gauss_newton": positive, "residual": both, "hessian": np.clip(positive + both, -0.05, 0.085)}[operator]


def padded(dims, values, num_pairs):
    """Values with the dimension `pair` filled up with NaN."""
    if "pair" not in dims:
        return values
    missing = [(0, num_pairs - size if dim == "pair" else 0) for dim, size in zip(dims, values.shape, strict=True)]
    return np.pad(values, missing, constant_values=np.nan)


def make_dataset(num_classes=10, seed=0):
    """A whole analysis by the schema, with numbers like those of a converged MNIST network."""
    rng = np.random.default_rng(seed)
    num_parameters = 269_322
    count = num_classes - 1
    num_known = count + 7
    top = np.sort(0.67 * rng.uniform(0.25, 1.0, count))[::-1]
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    classes = names if num_classes == 10 else [f"class {index}" for index in range(num_classes)]
    data, coords = (
        {},
        {"operator": OPERATORS, "part": PARTS, "level": ["class", "cross_class"], "class": classes},
    )
    coords |= {"split": ["train"], "view": ["linear", "signed", "magnitude"]}
    coords |= {
        "side": ["magnitude", "positive", "negative"],
        "knockout": KNOCKOUTS,
        "method": METHODS,
        "stage": STAGES,
    }
    coords |= {"cross_class": classes, "class_other": classes}
    _add_pairs(data, rng, top, num_known)
    _add_bins(data, rng, num_parameters)
    _add_shares(data, rng, count, num_known)
    _add_knockouts(data, rng, top, num_known)
    _add_averaging(data, rng, top, num_classes)
    _add_classes(data, rng, num_classes)
    data["trace"] = ("operator", [41.2, 38.9, 2.3])
    data["trace_standard_error"] = ("operator", [0.8, 0.5, 0.6])
    data["part_trace"] = ("part", [3.1, 2.0, 1.4, 31.9, 0.5, np.nan])
    data["cost_products"] = ("stage", [320, 1536, 0, 120, 260, 0])
    data["cost_gradients"] = ("stage", [812.0, 3890.0, 1.0, 96.0, 655.0, 9.0])
    data["cost_seconds"] = ("stage", [61.0, 292.0, 0.1, 7.2, 49.0, 0.7])
    num_pairs = max(array[1].shape[array[0].index("pair")] for array in data.values() if "pair" in array[0])
    data = {name: (dims, padded(dims, values, num_pairs)) for name, (dims, values) in data.items()}
    return xr.Dataset(data, coords, _attributes(num_parameters, num_classes))


def _attributes(num_parameters, num_classes):
    provenance = {
        "versions": {"deepspectra": "0.1.0", "torch": "2.9.1", "python": "3.12.3"},
        "batch_size": 512,
        "differentiation": "double backward, graph kept",
        "checks": {"deterministic": "two products agree to 3e-8", "symmetric": "uᵀHv = vᵀHu to 1e-7"},
        "converged": True,
        "probes": 8,
        "steps": 128,
    }
    thresholds = {
        "outlier": [2.0, "an outlier is at least this many times the bulk edge"],
        "rtol": [1e-3, "largest ‖Av − λv‖ / |λ| of a converged eigenpair"],
    }
    return {
        "title": "784-256-256-10 perceptron on MNIST",
        "verdict": VERDICT,
        "created": "2025-11-03 14:22 UTC",
        "model": "MLP 784-256-256-10, ReLU",
        "data": "MNIST, 5,100 training images",
        "loss": "cross-entropy",
        "num_parameters": num_parameters,
        "num_examples": 5100,
        "num_classes": num_classes,
        "dtype": "float32",
        "device": "cpu",
        "seed": 0,
        "loss_value": 0.0312,
        "accuracy": 0.9967,
        "gradient_norm": 0.00412,
        "gradient_seconds": 0.075,
        "memory_bytes": 4_000_000_000,
        "peak_memory_bytes": 2_310_000_000,
        "provenance": json.dumps(provenance),
        "thresholds": json.dumps(thresholds),
    }


def _add_pairs(data, rng, top, num_pairs):
    value, outlier = np.full((3, num_pairs), np.nan), np.zeros((3, num_pairs))
    tail = np.sort(rng.uniform(0.04, 0.085, num_pairs - len(top)))[::-1]
    value[0] = np.concatenate([top * 1.04, tail])
    value[1] = np.concatenate([top, tail * 0.97])
    value[2] = np.sort(rng.uniform(0.03, 0.06, num_pairs))[::-1]
    outlier[:2, : len(top)] = 1
    data["eigenvalue"] = (("operator", "pair"), value)
    data["residual_norm"] = (("operator", "pair"), value * rng.uniform(1e-5, 8e-4, value.shape))
    data["is_outlier"] = (("operator", "pair"), outlier)
    data["bulk_edge"] = ("operator", [0.085, 0.082, 0.06])
    data["outlier_threshold"] = ("operator", [0.12, 0.12, 0.12])
    data["num_outliers"] = ("operator", outlier.sum(1))


def _add_bins(data, rng, num_parameters):
    node, weight, probe = np.full((3, 64), np.nan), np.full((3, 64), np.nan), np.full((3, 64), -2)
    bins = {name: np.full((1, 3, 3, 60), np.nan) for name in ("start", "end", "mass", "low", "high")}
    for index, operator in enumerate(OPERATORS):
        value = data["eigenvalue"][1][index]
        lonely = value[data["is_outlier"][1][index] == 1]
        nodes = np.concatenate([bulk(rng, operator, 300), lonely])
        mass = np.concatenate([np.full(300, 1 / 300), np.full(len(lonely), 1 / num_parameters)])
        mass /= mass.sum()
        sizes = np.geomspace(1e-6, 1, 31)
        lattices = (np.linspace(-0.1, 1, 61), np.append(-sizes[::-1], sizes), np.append(0, sizes))
        for view, edges in enumerate(lattices):
            shown = np.abs(nodes) if view == 2 else nodes
            held, _ = np.histogram(shown, edges, weights=mass)
            rows = {
                "start": edges[:-1],
                "end": edges[1:],
                "mass": held,
                "low": 0.7 * held,
                "high": 1.4 * held,
            }
            for name, one in rows.items():
                bins[name][0, index, view, : min(60, len(one))] = one[:60]
        node[index, :60], weight[index, :60] = nodes[-60:], mass[-60:]
        probe[index, :60] = np.repeat(np.arange(4), 15)
    data |= {f"bin_{name}": (("split", "operator", "view", "bin"), one) for name, one in bins.items()}
    data["zero_share"] = (("split", "operator"), [[np.nan, 0.957, np.nan]])
    numbers = {"exponent": 2.5, "exponent_low": 2.2, "exponent_high": 2.9, "p_value": 0.4, "start": 1e-3}
    numbers |= {"end": 0.1, "density_at_start": 0.1, "density_at_end": 1e-4}
    for name, one in numbers.items():
        data[f"tail_{name}"] = (("split", "operator", "side"), np.full((1, 3, 3), one))
    words = {"verdict": ["power law", "log-normal", "not resolved"], "why": ["it holds."] * 3}
    for name, said in words.items():
        data[f"tail_{name}"] = (("split", "operator", "side"), np.array([[[one] * 3 for one in said]]))
    for name, values in (("node", node), ("weight", weight), ("probe", probe)):
        data[f"density_{name}"] = (("operator", "node"), values)


def _add_shares(data, rng, count, num_pairs):
    share = np.full((3, num_pairs, 6), np.nan)
    base = np.array([0.52, 0.33, 0.02, 0.08, 0.02, 0.03])
    for index, parts in ((0, base), (1, np.append(base[:5], 0))):
        drawn = rng.dirichlet(parts * 40 + 1e-3, count)
        drawn[:, 5] *= index == 0
        share[index, :count] = drawn / drawn.sum(1, keepdims=True)
    mean = np.full((3, 6), np.nan)
    mean[:2] = np.nanmean(share[:2], axis=1)
    data["share"] = (("operator", "pair", "part"), share)
    data["mean_share"] = (("operator", "part"), mean)


def _add_knockouts(data, rng, top, num_pairs):
    dims = ("operator", "knockout", "method", "pair")
    value, upper = np.full((3, 4, 2, num_pairs), np.nan), np.full((3, 4, 2), np.nan)
    for operator in (0, 1):
        before = data["eigenvalue"][1][operator]
        for knockout, factor in enumerate((1, 0.46, 0.12, 0.1)):
            for method in (0, 1) if knockout else (0,):
                after = np.concatenate([top * factor, before[len(top) :] * 0.9]) if knockout else before
                value[operator, knockout, method] = np.sort(after * rng.uniform(0.95, 1, num_pairs))[::-1]
    data["knockout_value"] = (dims, value)
    data["knockout_residual_norm"] = (dims, value * 4e-4)
    left = (value > 0.12).sum(-1).astype(float)
    left[np.isnan(value).all(-1)] = np.nan
    upper[:, 2:] = left[:, 2:]
    upper[0, 1, 0] = left[0, 1, 0] + 1
    data["knockout_outliers"] = (dims[:3], left)
    data["knockout_upper"] = (dims[:3], upper)


def _add_averaging(data, rng, top, num_classes):
    num = max(90, len(top) + 1)
    value = np.full((2, num), np.nan)
    value[0, : len(top) + 1] = np.append(top * 0.62, 0.02)
    value[1] = np.concatenate([top * 0.97, 0.07 * np.exp(-np.arange(num - len(top)) / 18)])
    data["subspace_value"] = (("level", "pair"), value)
    data["subspace_overlap"] = (("level", "operator"), [[0.868, 0.881, np.nan], [0.975, 0.986, np.nan]])
    data["subspace_dimension"] = (("level", "operator"), [[len(top), len(top), np.nan]] * 2)
    data["subspace_gradients"] = ("level", [1.0, float(num_classes - 1)])


def _add_classes(data, rng, num_classes):
    factors = rng.normal(size=(num_classes, max(6, num_classes // 2))) + 0.5
    data["mean_gram"] = (("class", "class_other"), factors @ factors.T * 1e-3)
    weight = rng.lognormal(math.log(2e-5), 1.4, (num_classes, num_classes))
    np.fill_diagonal(weight, 1 / num_classes)
    data["class_count"] = ("class", np.full(num_classes, 5100 // num_classes))
    data["class_weight"] = ("class", weight.sum(1) - np.diag(weight))
    data["cross_class_weight"] = (("class", "cross_class"), weight)
    centres = rng.normal(size=(2, num_classes))
    for axis, centre in zip("xy", centres, strict=True):
        data[f"map_class_{axis}"] = ("class", centre)
        spread = centre[:, None] + 0.1 * rng.normal(size=(num_classes, num_classes))
        data[f"map_{axis}"] = (("class", "cross_class"), spread)


GROUPS = {
    "spectrum": ["bin_mass"],
    "log_spectrum": ["bin_mass"],
    "magnitude_spectrum": ["bin_mass"],
    "shares": ["share"],
    "knockouts": ["knockout_value"],
    "averaging": ["subspace_value"],
    "class_cosines": ["mean_gram"],
    "cross_class_weights": ["cross_class_weight"],
    "three_level_map": ["map_x"],
    "cost": ["cost_gradients"],
}


@pytest.fixture(scope="module")
def dataset():
    return make_dataset()


@pytest.fixture(scope="module")
def drawn(dataset):
    return report.charts(dataset)


@pytest.fixture(scope="module")
def page(dataset):
    return report.render(dataset)


def without_scripts(page):
    return re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)


def specs(page):
    return json.loads(re.search(r'<script type="application/json" id="specs">(.*?)</script>', page)[1])


def values(spec):
    """Every data row of a specification."""
    return [row for table in spec.get("datasets", {}).values() for row in table]


def table_values(page, name):
    """The full values behind the numeric cells of a table, row by row."""
    table = re.search(rf'<table id="{name}">.*?<tbody>(.*?)</tbody>', page, flags=re.DOTALL)[1]
    cells = [re.findall(r'data-value="([^"]*)"', row) for row in table.split("</tr>") if row]
    return [[float(cell) if cell else math.nan for cell in row] for row in cells]


def test_page_opens_with_the_verdict_before_any_figure(page):
    verdict, plain = html.escape(VERDICT.split(". ", 1)[0]), unlinked(page)
    assert 0 < plain.index(verdict) < plain.index("<figure>")
    assert '<a class="term" href="#term-outlier" title="An eigenvalue that stands clear' in page


def test_page_has_a_section_for_every_link_and_a_place_for_every_chart(page, drawn):
    body = without_scripts(page)
    links = re.findall(r'href="#(\w+)"', body)
    assert len(links) == 11
    assert [name for name in links if f'<section id="{name}">' not in body] == []
    assert set(drawn) == set(GROUPS) == set(specs(page)) == set(re.findall(r'id="chart-(\w+)"', body))


def test_tables_hold_the_numbers_of_the_dataset(page, dataset):
    eigenvalue, residual, share = (dataset[name].values for name in ("eigenvalue", "residual_norm", "share"))
    known = np.argwhere(np.isfinite(eigenvalue))
    rows = table_values(page, "eigenvalues")
    assert len(rows) == len(known)
    for row, (operator, pair) in zip(rows, known, strict=True):
        parts = share[operator, pair] if dataset["is_outlier"][operator, pair] == 1 else np.full(6, np.nan)
        np.testing.assert_allclose(
            row, [pair + 1, eigenvalue[operator, pair], np.nan, residual[operator, pair], *parts], rtol=1e-8
        )
    np.testing.assert_allclose([row[0] for row in table_values(page, "traces")[:3]], dataset["trace"])
    np.testing.assert_allclose([row[0] for row in table_values(page, "cost-table")], dataset["cost_gradients"])
    overlaps = dataset["subspace_overlap"].values
    np.testing.assert_allclose([row[0] for row in table_values(page, "overlaps")], overlaps[np.isfinite(overlaps)])


def test_captions_quote_the_dataset(page, dataset):
    text = re.sub(r"<[^>]+>", "", without_scripts(page))
    largest = float(dataset["eigenvalue"][0].max())
    assert f"H has 9 outliers above 0.12; the largest, {largest:.3g}, is {largest / 0.085:.2g} times its bulk" in text
    assert f"class {float(dataset['mean_share'][0, 0]):.1%}" in text
    assert "span 86.8% of the top 9 eigenvectors of H" in text
    assert "without class by subtraction, 7 to 8 left; without class by projection, at least 7;" in text
    assert "Together about 5,500 gradients" in text  # 5,463, but a clock gave it


def test_knockout_table_quotes_the_largest_eigenvalue_left(page, dataset):
    largest = dataset["knockout_value"].max("pair").values
    expected = [value for operator in largest for value in operator.ravel() if np.isfinite(value)]
    np.testing.assert_allclose([row[0] for row in table_values(page, "knockout-table")], expected, rtol=1e-8)


def test_lollipops_are_the_outliers(drawn, dataset):
    dots = [row for row in values(drawn["spectrum"].to_dict()) if "rank" in row]
    wanted = dataset["eigenvalue"].values[dataset["is_outlier"].values == 1]
    np.testing.assert_allclose([row["eigenvalue"] for row in dots], wanted, rtol=1e-8)


def test_share_bars_are_shares_end_to_end(drawn, dataset):
    bars = [row for row in values(drawn["shares"].to_dict()) if row["row"] not in (" ", "mean")]
    assert len(bars) == 2 * 9 * 6
    for bar in bars:
        assert bar["to"] - bar["from"] == pytest.approx(abs(bar["share"]))
    for index, operator in enumerate(OPERATORS[:2]):
        shown = [bar["share"] for bar in bars if bar["operator"] == operator]
        np.testing.assert_allclose(shown, dataset["share"][index, :9].values.ravel(), rtol=1e-8)


def test_negative_shares_are_drawn_left_of_zero(dataset):
    changed = dataset.copy(deep=True)
    changed["share"][0, 0] = [0.7, 0.5, 0, 0, 0, -0.2]
    bars = values(report.shares(changed).to_dict())
    bar = next(bar for bar in bars if bar["operator"] == "hessian" and bar["label"] == "residual")
    assert (bar["from"], bar["to"]) == (-0.2, 0.0)


def test_one_colour_per_part_in_every_chart(drawn):
    spec = json.dumps(drawn["shares"].to_dict())
    assert all(colour in spec for colour in PART_COLOURS.values())


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("suffix", ["svg", "pdf"])
def test_charts_save_for_papers(drawn, tmp_path, name, suffix):
    path = tmp_path / f"{name}.{suffix}"
    report.save_chart(drawn[name], path)
    start = path.read_bytes()[:4]
    assert start == (b"%PDF" if suffix == "pdf" else b"<svg")


def test_charts_save_for_the_web_and_refuse_other_formats(drawn, tmp_path):
    report.save_chart(drawn["cost"], tmp_path / "cost.html")
    report.save_chart(drawn["cost"], tmp_path / "cost.json")
    report.save_chart(drawn["cost"], tmp_path / "cost.png")
    assert "cdn" not in without_scripts((tmp_path / "cost.html").read_text())
    with pytest.raises(OptionError, match=r"\.svg"):
        report.save_chart(drawn["cost"], tmp_path / "cost.docx")


@pytest.mark.parametrize("name", GROUPS)
def test_a_missing_group_leaves_out_its_chart_and_nothing_else(dataset, name):
    smaller = dataset.drop_vars(GROUPS[name])
    with pytest.raises(DataError, match=GROUPS[name][0]):
        getattr(report, name)(smaller)
    page = report.render(smaller)
    assert (
        set(specs(page))
        == set(re.findall(r'id="chart-(\w+)"', page))
        == {other for other, needed in GROUPS.items() if needed != GROUPS[name]}
    )


@pytest.mark.parametrize("name", ["eigenvalue", "is_outlier", "outlier_threshold", "mean_share", "residual_norm"])
def test_a_missing_variable_leaves_a_page(dataset, name):
    assert "<h2>Glossary</h2>" in report.render(dataset.drop_vars(name))


def test_an_exponent_in_the_verdict_is_raised():
    page = report.render(
        xr.Dataset(attrs={"verdict": "No outliers. Tails: H power law |λ|^−1.5 (1.3 to 1.7), G none."})
    )
    assert 'power law <span style="white-space: nowrap">|λ|<sup>−1.5</sup></span> (1.3' in page


def test_an_empty_analysis_leaves_a_page():
    page = report.render(xr.Dataset(attrs={"title": "Nothing yet", "verdict": "No verdict."}))
    assert "No verdict." in page
    assert "<figure>" not in page


def test_values_never_computed_count_as_missing(dataset):
    empty = dataset.copy(deep=True)
    empty["knockout_value"][:] = np.nan
    assert "knockouts" not in report.charts(empty)


def test_all_text_is_escaped(dataset):
    evil = "<script>alert(1)</script>&\"'"
    changed = dataset.copy(deep=True)
    changed.attrs |= {"title": evil, "verdict": evil, "model": evil, "provenance": json.dumps({evil: evil})}
    changed.attrs["thresholds"] = json.dumps({evil: [1.0, evil]})
    changed = changed.assign_coords({"class": [evil, *changed["class"].values[1:]], "stage": [evil, *STAGES[1:]]})
    page = report.render(changed)
    assert "<script>alert" not in page
    assert html.escape(evil) in page
    assert any(row.get("stage") == evil for row in values(specs(page)["cost"]))


def test_nothing_is_fetched(page):
    body = without_scripts(page)
    assert "default-src 'none'" in body
    assert not re.search(r'(src|srcset|action|data)="?https?:|url\(|@import|<iframe|<img', body)
    links = re.findall(r'<link[^>]*>|<a [^>]*href="(http[^"]*)"', body)
    assert [link for link in links if link and not link.startswith("https://arxiv.org/abs/")] == []


def test_many_classes_show_the_heaviest_and_say_so():
    dataset = make_dataset(num_classes=120)
    spec = report.class_cosines(dataset).to_dict()
    shown = {row["row"] for row in values(spec)}
    heaviest = np.argsort(-dataset["class_weight"].values)[:40]
    assert shown == {f"class {index}" for index in heaviest}
    assert spec["title"] == "40 of 120 classes: those of largest weight"


def test_many_outliers_show_the_largest_and_say_so():
    spec = report.shares(make_dataset(num_classes=60)).to_dict()
    assert len({row["row"] for row in values(spec) if row["operator"] == "hessian"} - {" ", "mean"}) == 40
    assert spec["title"] == "the 40 largest of up to 59 outliers; the mean is over all"


def test_dataset_survives_its_file(dataset, page, tmp_path):
    pytest.importorskip("h5py", reason="h5netcdf reads and writes through h5py")
    dataset.to_netcdf(tmp_path / "analysis.nc", engine="h5netcdf")
    with xr.open_dataset(tmp_path / "analysis.nc", engine="h5netcdf") as again:
        assert report.render(again.load()) == page


def test_write_names_the_file_it_cannot_write(dataset, tmp_path):
    with pytest.raises(FileError, match="nowhere"):
        report.write(dataset, tmp_path / "nowhere" / "report.html")


def test_every_page_is_cited_with_its_version_and_its_charts_are_valid():
    version = ds.results.versions()["deepspectra"]
    problems = []
    for seed in range(2):
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))
        problems.append(ds.Problem(model, (torch.randn(18, 4), torch.arange(18) % 3)))
    first = problems[0]
    pages = [
        small_analysis(0, "net").dataset,
        layer_dataset(ds.layers(first), first),
        regions_dataset([ds.regions(first, "gradients")], first),
        comparison_dataset(ds.compare(*problems), first),
    ]
    for page in pages:
        drawn = {chart for figure in figures_of(page).values() for chart in figure.drawn(page)}
        assert drawn
        for chart in drawn:
            chart(page).to_dict()  # held against Vega-Lite's schema, as pages are not
        assert f"deepspectra {version}; " in _citation(page)
        assert f"version = {{{version}}}" in _bibtex(page)
        assert json.loads(page.attrs["provenance"])["versions"]["torch"] == torch.__version__


def test_flipped_bytes_are_found_or_change_no_number(tmp_path):
    small = make_dataset(num_classes=3)[["eigenvalue", "share", "trace", "bin_mass"]]
    path = tmp_path / "analysis.nc"
    save_dataset(small, path)
    whole, refused = path.read_bytes(), 0
    for place in range(0, len(whole), len(whole) // 40):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            again = load_dataset(path, "Do it again.")
        except FileError as refusal:
            refused += "damaged or foreign" in str(refusal)
            continue
        for name, numbers in again.data_vars.items():
            np.testing.assert_array_equal(numbers.values, small[name].values)
    assert refused > 5


def test_files_of_before_are_cited_with_their_version(dataset):
    before = dataset.copy()
    before.attrs["provenance"] = json.dumps({"deepspectra": "0.0.9", "torch": "2.9", "batches": 3})
    assert "deepspectra 0.0.9; " in _citation(before)


def test_the_caption_says_what_is_left_out(dataset):
    text = re.sub(r"<[^>]+>", "", FIGURES["spectrum"].captioned(dataset))
    assert "Left out: 95.7% of the eigenvalues of G, zero up to rounding" in text
    assert "zero up to rounding. H has 9 outliers" in text


def test_steps_are_the_densities_of_bins_that_are_known(dataset):
    """And boxes their bands; where a band is wider than what it is of, there is no step."""
    told = dataset.copy(deep=True)
    told["bin_high"][0, 0, 2, 20] = 3 * told["bin_mass"][0, 0, 2, 20]
    rows = [row for row in values_of(report.magnitude_spectrum(told)) if row["operator"] == "hessian"]
    boxes = [row for row in rows if "low" in row]
    bins = told.sel(split="train", operator="hessian", view="magnitude").isel(bin=slice(1, 31))
    widths = np.log10(bins.bin_end / bins.bin_start).values
    for row in boxes:
        index = int(np.argmin(np.abs(bins.bin_start.values - row["start"])))
        low, high = (float(bins[f"bin_{end}"][index]) / widths[index] for end in ("low", "high"))
        assert row["high"] == pytest.approx(high, rel=1e-6)
        assert row["low"] == pytest.approx(low, rel=1e-6) or low < row["low"]
    stepped = {row["start"] for row in rows if "run" in row}
    known = (bins.bin_high - bins.bin_low <= bins.bin_mass).values
    assert known.sum() == 29
    assert stepped == {float(f"{start:.9g}") for start in bins.bin_start.values[known]}


def test_what_is_about_zero_stands_in_the_figure(dataset):
    texts = [row["text"] for row in values_of(report.magnitude_spectrum(dataset)) if "lane" in row and "x2" in row]
    smallest = dataset.bin_mass.sel(split="train", view="magnitude").isel(bin=0)
    shown = [f"{percent(float(one))} of {name}" for one, name in zip(smallest, "HGR", strict=True) if one > 0]
    assert texts == shown


def test_power_laws_are_lines_with_their_exponents_and_faint_where_they_do_not_hold(dataset):
    for chart, sides in ((report.magnitude_spectrum, 1), (report.log_spectrum, 2)):
        rows = values_of(chart(dataset))
        ends = [row for row in rows if "strength" in row and "text" not in row]
        assert len(ends) == 2 * 2 * sides  # of H and G: R's is not resolved
        assert {row["operator"]: row["strength"] for row in ends} == {"hessian": 1.0, "gauss_newton": 0.35}
        texts = [row["text"] for row in rows if "strength" in row and "text" in row]
        assert texts == ["|λ|^−2.5"] * sides
    assert not any("strength" in row for row in values_of(report.spectrum(dataset)))


def values_of(chart):
    return values(chart.to_dict())


def test_traces_stand_with_their_errors(dataset):
    told = dataset.copy()
    told["part_trace_standard_error"] = ("part", [0, 0, 0.02, 0.13, 0, np.nan])
    tables = tables_section(told)
    rows = table_values(tables, "traces")
    np.testing.assert_allclose([row[1] for row in rows[3:8]], [0, 0, 0.02, 0.13, 0])
    assert ">exact<" in tables


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (396.24, 12.3, "396 ± 12"),
        (7.7377, 0.157, "7.74 ± 0.16"),
        (2.97, 8e-9, "2.97"),
        (7.83003, 0.0, "7.83"),
        (7.68, math.nan, "7.68 ± ?"),
        (-0.0004, 0.0068, "-0.0004 ± 0.0068"),
        (12345.6, 678.0, "12350 ± 680"),
        (12345.6, 0.0, "12300"),
        (3.1e-9, 4e-10, "3.1e-09 ± 4e-10"),
        (0.0, 0.0, "0"),
    ],
)
def test_a_number_stands_with_as_many_digits_as_its_error_allows(value, error, text):
    assert measured(value, error) == text


def test_shares_have_no_negative_zero_and_counts_agree_with_their_nouns():
    assert [percent(value) for value in (-1e-9, 0.0, -0.031, 0.9996)] == ["0.0%", "0.0%", "−3.1%", "100.0%"]
    assert percent(-0.001, 0) == "0%"
    assert [quantity(number, "class", "classes") for number in (1, 2, 1200)] == [
        "1 class",
        "2 classes",
        "1,200 classes",
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.02134, "0.0213"),
        (0.96, "0.96"),
        (-1.5, "−1.5"),
        (2.34e-7, "2.34×10⁻⁷"),
        (1e-6, "1×10⁻⁶"),
        (12345, "12,300"),
        (math.nan, "–"),
    ],
)
def test_numbers_read_well(value, text):
    assert number(value) == text


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def opened(page, folder):
    """The page's elements once a browser has run it, without a complaint on its console."""
    (folder / "report.html").write_text(page, encoding="utf-8")
    switches = (
        "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
        "disable-component-update disable-sync enable-logging=stderr v=0 virtual-time-budget=10000 dump-dom"
    )
    command = [
        CHROMIUM,
        *(f"--{switch}" for switch in switches.split()),
        f"--user-data-dir={folder / 'profile'}",
    ]
    done = finished([*command, str(folder / "report.html")], timeout=240, check=True)
    assert [line for line in done.stderr.splitlines() if ":CONSOLE:" in line] == []
    return done.stdout


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium to open the page")
def test_page_draws_every_chart_in_a_browser_without_a_complaint(page, tmp_path):
    elements = opened(page, tmp_path)
    for name in GROUPS:
        place = elements.split(f'id="chart-{name}"')[1].split("</figure>")[0]
        assert "<svg" in place
        marks = re.findall(r"<g class=\"mark-(?:symbol|rect|line)[^>]*>.*?</g>", place, flags=re.DOTALL)
        assert sum(mark.count("<path") for mark in marks) >= 3


@pytest.fixture(scope="module")
def layers_page():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 3, 3),
        torch.nn.BatchNorm2d(3),
        torch.nn.Tanh(),
        torch.nn.Flatten(),
        torch.nn.Linear(48, 3),
    ).eval()
    problem = ds.Problem(model, (torch.randn(30, 1, 6, 6), torch.arange(30) % 3))
    return render(layer_dataset(ds.layers(problem), problem, Labels(data="<noise>")))


LAYER_CHARTS = ("layer_spectra", "layer_densities", "layer_traces", "layer_products", "layer_collapse")


def test_the_page_of_layers_says_what_was_found_and_escapes_names(layers_page):
    for name in LAYER_CHARTS:
        assert f'id="chart-{name}"' in layers_page
    assert "Of 2 layers with weights" in layers_page
    assert "Layers of Sequential on &lt;noise&gt;" in layers_page
    assert 'id="layer-table"' in layers_page
    assert 'id="block-table"' in layers_page
    assert 'id="collapse-table"' in layers_page
    assert 'id="chart-spectrum"' not in layers_page


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium to open the page")
def test_the_page_of_layers_draws_in_a_browser_without_a_complaint(layers_page, tmp_path):
    elements = opened(layers_page, tmp_path)
    for name in LAYER_CHARTS:
        assert "<svg" in elements.split(f'id="chart-{name}"')[1].split("</figure>")[0]


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium to open the page")
def test_the_page_of_regions_draws_in_a_browser_without_a_complaint(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))
    problem = ds.Problem(model, (torch.randn(18, 4), torch.arange(18) % 3))
    page = render(regions_dataset([ds.regions(problem, of) for of in ("hessian", "errors")], problem))
    elements = opened(page, tmp_path)
    assert "<svg" in elements.split('id="chart-region_shifts"')[1].split("</figure>")[0]


def small_analysis(seed, name):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))
    problem = ds.Problem(model, (torch.randn(18, 4), torch.arange(18) % 3))
    return ds.analyze(problem, num_probes=1, num_steps=4, progress=False).labelled(model=name)


def test_a_series_is_one_page_with_names_of_its_own_for_each(tmp_path):
    found = {"epoch <1>": small_analysis(0, "early"), "end": small_analysis(1, "late")}
    page = ds.save_series(found, tmp_path / "all.html").read_text()
    assert "epoch &lt;1&gt;" in page
    names = re.findall(r'\bid="([^"]+)"', page.split("<main")[1])
    assert len(names) == len(set(names))
    for j in range(2):
        for name in ("spectrum-m", "chart-shares-m", "eigenvalues-m"):
            assert f"{name}{j}" in names
    tabs = re.findall(r'<label for="([^"]+)"', page)
    assert set(tabs) <= set(re.findall(r'\bid="([^"]+)"', page))
    for analysis in found.values():
        assert html.escape(analysis.verdict.split(". ")[0], quote=False) in unlinked(page)
    assert page.count('class="moment away"') == 1
    with pytest.raises(DataError, match="at least one"):
        ds.save_series({}, tmp_path / "none.html")
    with pytest.raises(FileError, match="cannot write"):
        ds.save_series(found, tmp_path / "no" / "where.html")


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium to open the page")
def test_a_series_shows_what_is_chosen_and_draws_all_of_it(tmp_path):
    series = {"one": small_analysis(0, "early").dataset, "two": small_analysis(1, "late").dataset}
    choose = "<script type=module>document.getElementById('moment-0').click()</script></body>"
    page, _, rest = report.render_series(series).rpartition("</body>")
    elements = opened(page + choose + rest, tmp_path)
    shown = re.findall(r'<div class="(moment(?: away)?)"', elements)
    assert shown == ["moment", "moment away"]
    for j in range(2):
        for name in ("spectrum", "shares", "cost"):
            assert "<svg" in elements.split(f'id="chart-{name}-m{j}"')[1].split("</figure>")[0]


AXE = importlib.util.find_spec("axe_playwright_python")  # of it only the script that browsers run
RUN_AXE = """<script type="module">
const found = await axe.run(document, { resultTypes: ["violations"] });
const place = node => node.html.slice(0, 120);
document.title = "axe: " + JSON.stringify(found.violations.map(one => [one.id, one.nodes.slice(0, 3).map(place)]));
</script></body>"""


@pytest.mark.skipif(CHROMIUM is None or AXE is None, reason="needs chromium and axe to judge the page")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_bars_a_reader_who_cannot_see_or_point(page, tmp_path, scheme):
    script = (Path(AXE.origin).parent / "axe.min.js").read_text(encoding="utf-8").replace("</script", "<\\/script")
    before, _, after = page.rpartition("</body>")
    if scheme == "dark":
        before = before.replace("@media screen and (prefers-color-scheme: dark)", "@media screen")
    elements = opened(f"{before}<script>{script}</script>{RUN_AXE}{after}", tmp_path)
    title = re.search(r"<title>axe: (.*?)</title>", elements)
    assert title is not None
    assert json.loads(html.unescape(title[1])) == []

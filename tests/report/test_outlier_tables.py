"""What made each eigenvalue, as tables: the numbers of the dataset, their sums, and their forms."""

import functools

import pytest
import torch

import deepspectra as ds
from deepspectra.errors import DataError, OptionError
from deepspectra.report import outlier_tables
from nets import trained_on_digits


@functools.cache
def analysis():
    net, data = trained_on_digits(6, (8,), epochs=20)
    problem = ds.Problem(net.double(), (data.inputs.double(), data.targets))
    problem.class_names = [f"no_{c}" for c in range(10)]
    return ds.analyze(problem, num_probes=1, num_steps=8, progress=False)


def outliers(table):
    found = analysis().to_dataframe(table)
    return found[(found.operator == "hessian") & (found.pair == 0)]


def test_shares_of_classes_pairs_and_layers_sum_as_they_should():
    of_parts = analysis().to_dataframe().iloc[0]
    means = sum(of_parts[f"share of {name}"] for name in ("class", "logit", "interaction", "true"))
    classes, pairs, layers = map(outliers, ("classes", "class_pairs", "layers"))
    assert list(classes["class"]) == [f"no_{c}" for c in range(10)]
    assert classes["share"].sum() == pytest.approx(means, rel=1e-6)
    assert classes["share as potential class"].sum() == pytest.approx(means, rel=1e-6)
    assert pairs["share"].sum() == pytest.approx(means, rel=1e-6)
    assert len(pairs) == 100
    assert layers["share"].sum() == pytest.approx(1)
    for table in (classes, pairs, layers):
        assert (table["error"] > 0).all()
    of_g = analysis().to_dataframe("classes")
    assert (of_g[of_g.operator == "gauss_newton"]["error"] < 1e-3).all()  # known exactly


def test_tables_of_a_paper_have_errors_and_escaped_names():
    assert r"\pm" in analysis().to_latex()
    text = analysis().to_latex("classes")
    assert r"no\_3 (\%)" in text
    first = outliers("classes").iloc[3]
    assert f"${100 * first['share']:.1f} \\pm {100 * first['error']:.1f}$" in text
    largest = outliers("class_pairs").nlargest(1, "share").iloc[0]
    line = analysis().to_latex("class_pairs").splitlines()[4]
    assert f"{largest['class']} as {largest['cross_class']}".replace("_", r"\_") in line
    assert analysis().to_latex("layers").count(r"\\") == 1 + analysis().to_dataframe()["operator"].eq("hessian").sum()


def test_the_page_has_the_same_shares(tmp_path):
    page = analysis().to_html(tmp_path / "report.html").read_text()
    for name in ("outlier-classes", "outlier-layers", "outlier-pairs"):
        assert f'<table id="{name}">' in page
    first = outliers("classes").iloc[3]
    assert f">{outlier_tables.share_text(first['share'], first['error'])}</td>" in page


def test_what_is_not_there_is_said():
    with pytest.raises(OptionError, match="there are pairs, classes, class_pairs, layers"):
        analysis().to_dataframe("rows")
    problem = ds.Problem(torch.nn.Linear(3, 2), (torch.randn(20, 3), torch.randn(20, 2)), loss="mse")
    spectra = ds.analyze(problem, num=2, progress=False)
    with pytest.raises(DataError, match="no classes, or no outliers"):
        spectra.to_latex("classes")
    assert len(spectra.to_dataframe()) == 4
    assert "eigenvalue" in spectra.to_latex()


def test_an_error_that_says_nothing_is_a_question_mark():
    for error in (float("nan"), float("inf"), 1.0, 10.4):
        assert outlier_tables.share_text(0.25, error) == "25.0% ± ?"
        assert outlier_tables._in_math(0.25, error) == r"25.0 \pm ?"
    assert outlier_tables.share_text(0.25, 0.01) == "25.0% ± 1.0%"

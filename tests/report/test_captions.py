"""Captions quote the numbers of the analysis."""

import re

import numpy as np
import xarray as xr

from deepspectra.report import captions


def plain(text):
    return re.sub(r"<[^>]+>", "", text)


def test_the_caption_of_classes_names_the_closest_and_the_most_confused_pair():
    gram = np.array([[1.0, 0.9, -0.2], [0.9, 1.0, 0.1], [-0.2, 0.1, 1.0]])
    weights = np.array([[0.5, 0.01, 0.02], [0.03, 0.3, 0.07], [0.01, 0.02, 0.1]])
    names = ["cat", "<dog>", "car"]
    dataset = xr.Dataset(
        {
            "mean_gram": (("class", "class_other"), gram),
            "cross_class_weight": (("class", "cross_class"), weights),
        },
        {"class": names, "class_other": names, "cross_class": names},
    )
    text = captions.classes(dataset)
    assert "the closest are cat and &lt;dog&gt; (0.9)" in plain(text)
    assert f"mean cosine of two classes is {(0.9 - 0.2 + 0.1) / 3:.2g}" in plain(text)
    assert "The largest is &lt;dog&gt; under the label car (0.07)" in plain(text)


def test_the_caption_of_averages_has_overlap_dimension_and_price():
    dataset = xr.Dataset(
        {
            "subspace_overlap": (("level", "operator"), [[0.875, 0.5]]),
            "subspace_dimension": (("level", "operator"), [[9.0, np.nan]]),
            "subspace_gradients": (("level",), [1.0]),
        },
        {"level": ["class"], "operator": ["hessian", "gauss_newton"]},
    )
    text = plain(captions.averaging(dataset))
    assert "The class means span 87.5% of the top 9 eigenvectors of H and 50.0% of the top eigenvectors of G" in text
    assert "for the cost of about 1 gradient." in text


def test_the_caption_of_the_cost_adds_it_up_and_names_the_dearest_stage():
    dataset = xr.Dataset(
        {"cost_gradients": ("stage", [30.0, 10.0]), "cost_seconds": ("stage", [3.0, 1.0])},
        {"stage": ["density", "eigenpairs"]},
        {"gradient_seconds": 0.1},
    )
    text = plain(captions.cost(dataset))
    assert "Together about 40 gradients, 75.0% of them for density." in text
    assert text.endswith("One gradient took 0.1 s.")


def test_the_caption_of_regions_says_how_parts_are_taken_out():
    assert "is projected out" in captions.regions(xr.Dataset(attrs={"method": "projection"}))
    assert "is subtracted" in captions.regions(xr.Dataset(attrs={"method": "subtraction"}))


def test_the_caption_of_spectra_speaks_of_dots_only_where_there_are_outliers():
    values = {"eigenvalue": (("operator", "pair"), [[2.0, 1.0]])}
    for is_outlier in (1.0, 0.0):
        values["is_outlier"] = (("operator", "pair"), [[is_outlier, 0.0]])
        text = captions.spectrum(xr.Dataset(values, {"operator": ["hessian"]}))
        assert ("Dots are outliers" in text) == bool(is_outlier)

"""What is saved of a certificate: every number, under names that the documents explain."""

import json
from pathlib import Path

import pytest

import deepspectra as ds
from certificates_problems import cnn, images
from deepspectra.jobs.certify import certified
from deepspectra.jobs.certify_dataset import certificate_dataset
from deepspectra.jobs.pages import load_pages, save_page

FORMAT = Path(__file__).parents[2] / "docs" / "file-format.md"
FEW = {"epochs": 3, "batch_size": 100, "passes": 2}


def test_a_strangers_convolutional_network_is_certified_and_its_page_written(tmp_path):
    of = ds.Problem(cnn(), images(200))
    found = certified(of, ("isotropic", "learnt"), images(100, seed=1), FEW)
    save_page(certificate_dataset(found, of), tmp_path, "certify")
    saved = load_pages(tmp_path)["certify.html"]
    assert float(saved["bound"].sel(bounded="stochastic network", bound_end="bound")) == pytest.approx(found.value)
    about = json.loads(saved.attrs["provenance"])
    assert float(saved["charge"].sum()) / found.ledger.num_examples == pytest.approx(about["nats_an_example"])
    assert about["priors_tried"] == 2
    assert about["may_fail"] == {"bound": 0.025, "Monte Carlo": 0.01}
    assert saved.attrs["verdict"].startswith("With probability 0.965")
    described = FORMAT.read_text().split("## certify.nc")[1]
    for name in (*saved.data_vars, *saved.coords):
        assert f"`{name}`" in described, f"{name} is saved and not described"
    page = (tmp_path / "certify.html").read_text()
    for name in (
        "chart-bounds",
        "chart-posterior_variances",
        "chart-descent",
        "charge-table",
        "posterior-table",
    ):
        assert f'id="{name}"' in page

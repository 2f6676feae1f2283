"""Charts of regions draw every kind of spectrum."""

from __future__ import annotations

import pytest

import deepspectra as ds
from deepspectra.analysis.regions import OF
from deepspectra.errors import DataError
from deepspectra.jobs.pages import save_page
from deepspectra.jobs.regions_dataset import regions_dataset
from deepspectra.report.drawing import save_chart
from deepspectra.report.region_charts import region_shifts
from reference import case_and_reference


def test_a_page_draws_every_kind_of_spectrum(tmp_path) -> None:
    case, _ = case_and_reference("relu_mlp")
    problem = case.problem()
    dataset = regions_dataset([ds.regions(problem, of, num_groups=2) for of in OF], problem)
    chart = region_shifts(dataset).to_dict()
    assert chart["params"][0]["bind"]["options"] == list(OF)
    (table,) = chart["datasets"].values()
    assert {row["spectrum"] for row in table} == set(OF)
    assert all(row["low"] <= row["region_shift"] <= row["high"] for row in table)
    page = save_page(dataset, tmp_path, "regions").read_text()
    assert 'id="chart-region_shifts"' in page
    assert 'id="region-table"' in page
    save_chart(region_shifts(dataset), tmp_path / "regions.svg")
    assert "outliers" in (tmp_path / "regions.svg").read_text()
    with pytest.raises(DataError, match="region_shift"):
        region_shifts(dataset.drop_vars("region_shift"))

"""What every job ends in: a labelled dataset and a page, written side by side and read again."""

import json

import numpy as np
import pytest
import torch
import xarray as xr

from deepspectra.errors import FileError, OptionError
from deepspectra.jobs.pages import (
    STEMS,
    Labels,
    check_writable,
    dataset_of,
    load_pages,
    measured,
    page_dataset,
    provenance,
    rewrite,
    save_dataset,
    save_page,
    titled,
)
from deepspectra.report.page import _size_cards
from nets import CASES


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (1.23456, 0.0, "1.23"),
        (1.23456, float("nan"), "1.23 ± ?"),
        (12345.678, 0.0, "12300"),
        (1.23456, 0.0567, "1.235 ± 0.057"),
        (12345.6, 234.0, "12350 ± 230"),
        (3.2e-9, 4.1e-10, "3.2e-09 ± 4.1e-10"),
        (1234567.0, 0.0, "1230000"),
        (1.71e30, 0.0, "1.71e+30"),
        (-1.71e30, 5.1e28, "-1.710e+30 ± 5.1e+28"),
        (5.0, 3.0e12, "5.0e+00 ± 3.0e+12"),
    ],
)
def test_a_number_has_as_many_digits_as_its_error_allows(value, error, text):
    assert measured(value, error) == text


def test_values_by_name_are_put_where_their_names_are_and_nan_elsewhere():
    found = dataset_of(
        {
            "curve": (("layer", "point"), {"b": torch.tensor([1.0, 2.0]), "": [3.0]}),
            "one": (("layer", "kind"), {("", "x"): 5.0}),
            "plain": (("layer",), np.arange(3)),
        },
        {"layer": ["a", "b", ""], "kind": ["x", "y"]},
        {"title": "T"},
    )
    assert list(found["layer"].values) == ["a", "b", "(model)"]
    np.testing.assert_equal(found["curve"].values, [[np.nan] * 2, [1, 2], [3, np.nan]])
    np.testing.assert_equal(found["one"].values, [[np.nan] * 2, [np.nan] * 2, [5, np.nan]])
    assert found.attrs == {"title": "T"}


def test_a_page_says_what_was_looked_at_and_how():
    problem = CASES["relu_mlp"]().problem()
    variables = {"losses": (("network",), np.ones(2))}
    found = page_dataset(variables, {}, problem, Labels(data="noise"), "Layers of", ["One.", "Two."], 1.26)
    assert found.attrs["verdict"] == "One. Two."
    assert found.attrs["title"] == "Layers of Sequential on noise"
    assert found.attrs["num_parameters"] == problem.num_parameters
    assert found.attrs["loss_value"] == pytest.approx(problem.loss())
    assert json.loads(found.attrs["provenance"])["seconds"] == 1.3
    assert json.loads(provenance(probes=3))["probes"] == 3
    assert titled("Spectra of", "net", "") == "Spectra of net"


@pytest.mark.parametrize(("case", "card"), [("relu_mlp", "Examples"), ("tied_modules", "Rows")])
def test_tokens_are_not_called_examples(case, card):
    problem = CASES[case]().problem()
    found = page_dataset({"losses": (("network",), np.ones(2))}, {}, problem, Labels(), "Layers of", [], 1.0)
    name, number, note = _size_cards(found)[1]
    assert (name, number) == (card, f"{problem.num_examples:,}")
    assert note.startswith("several an example, in " if card == "Rows" else "in ")


def test_what_is_saved_is_loaded_an_analysis_before_others(tmp_path):
    dataset = xr.Dataset({"region_missed": ("spectrum", [1.5, 2.5])}, attrs={"verdict": "One."})
    page = save_page(dataset, tmp_path, "regions")
    assert "One." in page.read_text()
    assert load_pages(tmp_path)["regions.html"].identical(dataset)
    save_dataset(dataset.assign_attrs(verdict="Two."), tmp_path / "analysis.nc")
    assert [(name, one.attrs["verdict"]) for name, one in load_pages(tmp_path).items()] == [
        ("report.html", "Two."),
        ("regions.html", "One."),
    ]
    with pytest.raises(FileError, match=r"none of analysis\.nc, layers\.nc"):
        load_pages(tmp_path / "nowhere")


def test_pages_of_each_kind_are_written_again_and_none_is_dropped(tmp_path):
    dataset = xr.Dataset({"region_missed": ("spectrum", [1.5, 2.5])}, attrs={"verdict": "One."})
    kinds = {"a": ("compare", "layers"), "b": ("compare", "regions")}
    for name, stems in kinds.items():
        for stem in stems:
            save_page(dataset.assign_attrs(verdict=f"{stem} of {name}."), tmp_path / name, stem)
    both = [tmp_path / name for name in kinds]
    pages = rewrite(both)
    assert pages == [tmp_path / "b" / f"{stem}.html" for stem in ("layers", "compare", "regions")]
    said = [{f"{stem} of {name}." for stem in STEMS for name in kinds if f"{stem} of {name}." in page.read_text()}
            for page in pages]  # fmt: skip
    assert said == [{"layers of a."}, {"compare of a.", "compare of b."}, {"regions of b."}]
    named = rewrite(both[:1], tmp_path / "new" / "mine.html")
    assert [path.name for path in named] == ["mine.html", "mine-compare.html"]
    with pytest.raises(OptionError, match=r"a report is HTML"):
        rewrite(both, tmp_path / "x.pdf")


def test_a_damaged_file_is_told_with_what_to_do(tmp_path):
    (tmp_path / "layers.nc").write_bytes(b"no numbers")
    with pytest.raises(FileError, match=r"layers\.nc is truncated, damaged or foreign.*Run the command again"):
        load_pages(tmp_path)


def test_a_folder_that_cannot_be_written_is_found_beforehand(tmp_path):
    check_writable(tmp_path / "new")
    assert (tmp_path / "new").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="cannot be written"):
        check_writable(tmp_path / "file" / "below")

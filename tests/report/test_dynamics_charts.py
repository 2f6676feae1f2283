"""The chart of a sweep: what a store has against every axis of numbers, by menus, mean and spread over seeds."""

import concurrent.futures

import numpy as np
import pytest
import xarray as xr

import deepspectra as ds
from deepspectra.errors import DataError
from deepspectra.report import render
from deepspectra.report.dynamics_charts import FAMILIES, _scale, by_layer, drawn, dynamics
from deepspectra.report.figures import charts

AXES = {"model": ["a", "b"], "per_class": [13, 136, 702], "progress": [0.0, 0.33, 1.0], "seed": [0, 1]}


def store(**measures):
    """A sweep of some measures, functions of the point's places, without the last seed of the largest size."""
    shape = [len(values) for values in AXES.values()]
    places = np.indices(shape)
    status = np.full(shape, "done", dtype=object)
    status[:, -1, :, -1] = "missing"
    found = {"status": (tuple(AXES), status)}
    for name, function in measures.items():
        values = np.asarray(function(*places), float)
        values[status == "missing"] = np.nan
        found[name] = ((*AXES, *(f"{name}_{j}" for j in range(values.ndim - 4))), values)
    about = {"title": "Sweep of cells", "verdict": "36 cells: 30 done, 6 missing.", "looks": "progress"}
    return xr.Dataset(found, AXES, about)


MINE = store(
    mine=lambda model, size, look, seed: 100 * model + 10 * size + look + 0.1 * seed,
    trace=lambda model, size, look, seed: size + 1.0,
    accuracy=lambda model, size, look, seed: 0.9 + 0.05 * (look > 0),
    value=lambda model, size, look, seed: np.stack([look + 2.0, look + 1.0], -1),
)


def figures(spec):
    """Title of each row of figures → the charts in it."""
    return {row["title"]: row["hconcat"] for row in spec["vconcat"]}


def test_each_finished_cell_is_a_row_with_what_the_store_has():
    spec = dynamics(MINE).to_dict()
    rows = spec["datasets"][spec["data"]["name"]]
    assert len(rows) == 30
    (row,) = [r for r in rows if (r["model"], r["per_class"], r["progress"], r["seed"]) == ("b", 136, 0.33, 1)]
    assert (row["mine"], row["value"], row["accuracy"]) == (111.1, 3, pytest.approx(0.05))
    assert row["per_class "] == "136"  # as the menu spells it


def test_families_without_measures_are_left_out_and_any_measure_can_be_chosen():
    spec = dynamics(MINE).to_dict()
    assert list(figures(spec)) == [
        "Share of examples misclassified",
        "Largest eigenvalue and edge of the bulk",
        "Gauss-Newton G against residual R",
        "Any measure, as chosen above",
    ]
    menus = {one["name"]: one for one in spec["params"] if "bind" in one}
    assert menus["measure_chosen"]["bind"]["options"] == ["mine", "trace", "accuracy"]
    assert {name: menu["value"] for name, menu in menus.items()} == {
        "at_model": "a",
        "at_per_class": "702",
        "at_progress": "1",
        "measure_chosen": "mine",
    }


def test_there_is_a_column_for_each_axis_of_numbers_at_a_place_on_the_others():
    looks, sizes = figures(dynamics(MINE).to_dict())["Gauss-Newton G against residual R"]
    assert looks["layer"][0]["encoding"]["x"]["field"] == "progress"
    assert sizes["layer"][0]["encoding"]["x"]["field"] == "per_class"
    filters = [one["filter"] for one in sizes["layer"][0]["transform"] if "filter" in one]
    assert "datum['progress '] === at_progress" in filters
    assert not any("at_per_class" in one or "seed" in one for one in filters)


def test_means_and_the_whole_range_of_seeds_are_drawn():
    (_, sizes) = figures(dynamics(MINE).to_dict())["Any measure, as chosen above"]
    band, mean, points = sizes["layer"]
    assert [band["encoding"][y]["aggregate"] for y in ("y", "y2")] == ["min", "max"]
    assert mean["encoding"]["y"]["aggregate"] == "mean"
    assert "aggregate" not in points["encoding"]["y"]


def test_choices_can_be_made_and_families_picked_for_a_still_picture(tmp_path):
    chart = drawn(MINE, {"model": "b", "progress": 0.33}, ("Gauss-Newton G against residual R",))
    spec = chart.to_dict()
    assert len(spec["vconcat"]) == 1
    assert {one["name"]: one["value"] for one in spec["params"] if "bind" in one} == {
        "at_model": "b",
        "at_per_class": "702",
        "at_progress": "0.33",
    }
    chart.save(str(tmp_path / "still.svg"))
    assert "trace of G" in (tmp_path / "still.svg").read_text()


@pytest.mark.parametrize(
    ("values", "kind"),
    [([13, 51, 702], "log"), ([0, 1, 10, 200], "symlog"), ([1, 2, 3], None), ([-1, 100], None)],
)
def test_axes_of_many_decades_are_logarithmic(values, kind):
    assert _scale(np.array(values)).to_dict().get("type") == kind


def test_measures_of_a_sweep_are_not_taken_for_those_of_an_analysis():
    assert list(charts(MINE)) == ["dynamics"]  # although it measures "trace"
    page = render(MINE)
    assert "36 cells: 30 done, 6 missing." in page
    assert "What moves with what" in page
    assert '<section id="tables">' not in page


def test_without_numbers_along_an_axis_nothing_is_drawn():
    one = MINE.isel(per_class=[0], progress=[0])
    with pytest.raises(DataError, match="no measure along an axis"):
        dynamics(one)
    assert "What moves with what" not in render(one)
    with pytest.raises(DataError, match="no measure along an axis"):
        dynamics(MINE.drop_vars(["mine", "trace", "accuracy", "value"]))


def test_known_measures_are_those_that_cells_of_the_zoo_have(tmp_path):
    cell = ds.ZooCell(training_epochs=1, residual_products=2)
    axes = {"model": ["mlp-small"], "per_class": [3], "epochs": [0, 1]}
    threads = concurrent.futures.ThreadPoolExecutor(1)
    found = ds.sweep(cell, axes, tmp_path, looks="epochs", executor=threads, progress=False)
    known = {name for family in FAMILIES for name in family.lines if not name.startswith("hessian_")}
    assert known - set(found) == {"norm", "norm_residual", "share_residual"}  # of other cells
    titles = list(figures(dynamics(found).to_dict()))
    assert len(titles) == len(FAMILIES) - 1 + 1  # not of H, and any measure


def _layered(models):
    """A store whose cells have measures of two layers each, by other names for another model."""
    names = np.array([[f"{model}1", f"{model}2"] for model in models], dtype=object)
    values = np.arange(8.0 * len(models)).reshape(len(models), 2, 2, 2)
    dims = ("model", "epochs", "seed", "depth")
    return xr.Dataset(
        {
            "status": (dims[:3], np.full(values.shape[:3], "done", dtype=object)),
            "layer": (dims, np.broadcast_to(names[:, None, None], values.shape)),
            "layer_gap": (dims, values),
        },
        coords={"model": models, "epochs": [0, 3], "seed": [0, 1]},
        attrs={"looks": "epochs"},
    )


def test_layers_are_drawn_against_depth_along_axes_that_leave_them_the_same():
    drawn = by_layer(_layered(["a", "b"])).to_dict()
    (rows,) = drawn["datasets"].values()
    assert {(row["layer"], row["depth"]) for row in rows} == {("a1", 0), ("a2", 1), ("b1", 0), ("b2", 1)}
    assert sorted(row["layer_gap"] for row in rows) == list(range(16))
    (pair,) = drawn["vconcat"]
    assert [part["layer"][0]["encoding"]["color"]["legend"]["title"] for part in pair["hconcat"]] == ["epochs"]
    assert {"at_model", "at_epochs", "measure_chosen"} <= {one["name"] for one in drawn["params"]}
    assert by_layer.lacks(_layered(["a"]).drop_vars("layer_gap")) == "the sweep measured no layers."


def test_axes_may_be_called_as_fields_of_figures_are():
    names = ("height", "label", "key")
    found = MINE.rename(dict(zip(("per_class", "progress", "seed"), names, strict=True))).assign_attrs(looks="label")
    spec = drawn(found).to_dict()
    (rows,) = spec["datasets"].values()
    calculated = set()
    for part in (one for row in figures(spec).values() for one in row):
        for step in part["layer"][0]["transform"]:
            calculated |= {step["as"]} if isinstance(step.get("as"), str) else set(step.get("as", ()))
        assert part["layer"][0]["encoding"]["x"]["field"] in names
    assert calculated
    assert not calculated & set(rows[0])


def test_layers_are_those_of_a_measure_and_no_axis():
    status = ("layer", np.full(3, "done", dtype=object))
    axis = xr.Dataset({"status": status, "layer_gap": ("layer", np.arange(3.0))}, {"layer": [0, 1, 2]}, {"looks": ""})
    text = axis.rename(layer="x").assign(layer=("x", np.array(["a"] * 3, dtype=object)))
    for found in (axis, text):
        assert by_layer.lacks(found) == "the sweep measured no layers."
        assert not dynamics.lacks(found)


def test_a_known_measure_without_numbers_is_not_drawn():
    empty = MINE.assign(value=((*AXES, "value_0"), np.zeros((*MINE.status.shape, 0))))
    assert "Largest eigenvalue and edge of the bulk" not in figures(dynamics(empty).to_dict())
    assert _scale(np.array([2**62, 2**62 + 1])).to_dict().get("type") is None

"""Every figure of the page in one place."""

import re

import xarray as xr

from deepspectra.report import figures
from deepspectra.report.figures import FIGURES, charts


def test_each_figure_has_a_heading_a_caption_and_charts_and_no_chart_or_table_is_shown_twice():
    drawn = [chart.name for figure in FIGURES.values() for chart in figure.charts]
    listed = [table.__name__ for figure in FIGURES.values() for table in figure.tables]
    assert len(set(drawn)) == len(drawn)
    assert len(set(listed)) == len(listed)
    for name, figure in FIGURES.items():
        assert re.fullmatch(r"[a-z-]+", name)
        assert figure.link
        assert figure.heading
        assert figure.charts
        assert figure.caption
        assert figure.tabs <= (len(figure.charts) > 1)


def test_an_analysis_has_the_charts_of_the_numbers_that_it_has():
    assert charts(xr.Dataset()) == {}
    dataset = xr.Dataset(
        {"cost_gradients": ("stage", [3.0]), "cost_seconds": ("stage", [1.0])}, {"stage": ["density"]}
    )
    assert set(charts(dataset)) == {"cost"}
    figure = figures.FIGURES["cost"]
    assert [chart.name for chart in figure.drawn(dataset)] == ["cost"]
    assert "Together about" in figure.captioned(dataset)


def test_subscripts_of_captions_stand_below():
    text = FIGURES["products"].captioned(xr.Dataset())
    assert "g<sub>c,k</sub> and h<sub>c</sub> ⊗ e<sub>c,k</sub>" in text
    fixed = [figure for figure in FIGURES.values() if isinstance(figure.caption, str)]
    assert [figure.link for figure in fixed if "_{" in figure.captioned(xr.Dataset())] == []

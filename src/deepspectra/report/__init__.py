"""The report: a saved analysis as charts for papers and notebooks, and as one self-contained HTML page."""

from deepspectra.report.attribution_charts import averaging, cost, knockouts, shares
from deepspectra.report.class_charts import class_cosines, cross_class_weights, three_level_map
from deepspectra.report.drawing import save_chart, svg
from deepspectra.report.figures import charts
from deepspectra.report.page import render, render_series, write, write_series
from deepspectra.report.spectrum_charts import log_spectrum, magnitude_spectrum, spectrum

__all__ = [
    "averaging",
    "charts",
    "class_cosines",
    "cost",
    "cross_class_weights",
    "knockouts",
    "log_spectrum",
    "magnitude_spectrum",
    "render",
    "render_series",
    "save_chart",
    "shares",
    "spectrum",
    "svg",
    "three_level_map",
    "write",
    "write_series",
]

"""Every figure of the page in one place, in its order: a new one is a chart, a caption and a record here."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import altair as alt
import xarray as xr

from deepspectra.errors import OptionError
from deepspectra.report import captions, certificate_charts, drawing, layer_charts, spectrum_charts, tables
from deepspectra.report.attribution_charts import averaging, cost, knockouts, shares
from deepspectra.report.class_charts import class_cosines, cross_class_weights, three_level_map
from deepspectra.report.dynamics_charts import by_layer, dynamics, is_sweep
from deepspectra.report.network_charts import overlap_curves, overlap_whole
from deepspectra.report.region_charts import region_shifts


@dataclass(frozen=True)
class Figure:
    """A section of the page.

    Attributes:
        link: its name in the contents.
        heading: above it.
        charts: with their own headings, for several; those that the analysis lacks are left out.
        caption: below it, the same for every analysis or made of its numbers.
        tables: of its numbers, in the section of all tables; empty for an analysis that lacks them.
        tabs: whether of several charts one is shown at a time, or those of one heading.
    """

    link: str
    heading: str
    charts: dict[drawing.Chart, str]
    caption: str | Callable[[xr.Dataset], str]
    tables: tuple[Callable[[xr.Dataset], str], ...] = ()
    tabs: bool = False

    def drawn(self, dataset: xr.Dataset) -> dict[drawing.Chart, str]:
        """The charts that the analysis has the numbers of."""
        return {chart: label for chart, label in self.charts.items() if not chart.lacks(dataset)}

    def captioned(self, dataset: xr.Dataset) -> str:
        """The caption for this analysis; g_{c,k} in one that is the same for all has its subscript below."""
        if isinstance(self.caption, str):
            return re.sub(r"_(?:\{([^}]+)\}|(\w)\b)", r"<sub>\1\2</sub>", self.caption)
        return self.caption(dataset)


FIGURES = {
    "spectrum": Figure(
        "Spectrum",
        "The spectrum",
        {
            spectrum_charts.spectrum: "On a linear axis",
            spectrum_charts.spectrum_test: "On a linear axis",
            spectrum_charts.log_spectrum: "On logarithmic axes",
            spectrum_charts.log_spectrum_test: "On logarithmic axes",
            spectrum_charts.magnitude_spectrum: "Of |λ|, both signs together",
            spectrum_charts.magnitude_spectrum_test: "Of |λ|, both signs together",
        },
        captions.spectrum,
        (tables.eigenvalue, tables.tail),
        tabs=True,
    ),
    "shares": Figure(
        "Shares",
        "What the outliers are made of",
        {shares: ""},
        captions.shares,
        (tables.outlier_classes, tables.outlier_class_pairs, tables.outlier_layers),
    ),
    "knockouts": Figure(
        "Knock-outs",
        "What is left when parts are removed",
        {knockouts: ""},
        captions.knockouts,
        (tables.knockout,),
    ),
    "averaging": Figure(
        "Averaging", "What averaging alone finds", {averaging: ""}, captions.averaging, (tables.averaging,)
    ),
    "classes": Figure(
        "Classes",
        "The classes",
        {class_cosines: "Cosines of class means", cross_class_weights: "Cross-class weights"},
        captions.classes,
        (tables.trace,),
    ),
    "hierarchy": Figure(
        "Map",
        "The map of the means",
        {three_level_map: ""},
        "Class means δ_c (large) and cross-class means δ_{c,k} (small: the mean gradient of examples of class c, "
        "had they been of class k; open where k = c), placed by t-SNE of their distances. Small circles gather "
        "around their class c in a trained network, and by k early in training: choose the colouring, and point at "
        "a circle for its pair. Only who is near whom has a meaning.",
    ),
    "layers": Figure(
        "Layers",
        "Layer by layer",
        {layer_charts.layer_spectra: ""},
        "The largest eigenvalues of every layer: of the second moment of its features (what enters), of its "
        "backpropagated errors (what comes back to its output), and of its block of G. Each dash is one eigenvalue "
        "in the colour of the part that has most of it; all are exact. Outliers stand apart from the dashes below "
        "them. “Without the mean feature” is what the gradients of a layer would be if the features that enter it "
        "had mean zero.",
        (tables.layer,),
    ),
    "layer-densities": Figure(
        "Blocks",
        "Spectra of the layers' blocks",
        {layer_charts.layer_densities: ""},
        "The density of the eigenvalues of each layer's diagonal block of G, exact, per decade of λ and without "
        "its zeros; each row has a scale of its own, and its largest eigenvalues are marked. Where the outputs are "
        "linear in the layer's own parameters the Hessian's block is the same matrix. Elsewhere its density is "
        "drawn beside it, eigenvalues below zero by their size.",
        (tables.block,),
    ),
    "layer-traces": Figure(
        "Shares by layer",
        "What the layers are made of",
        {layer_charts.layer_traces: ""},
        "How much of each layer's trace the parts make: of features, the global mean, the class means about it and "
        "the scatter within classes; of errors and gradients, the parts of G.",
    ),
    "products": Figure(
        "Products of means",
        "Products of means",
        {layer_charts.layer_products: ""},
        "Whether means of gradients are products of means: the cosine between g_c and h_c ⊗ e_c (class means) and "
        "between g_{c,k} and h_c ⊗ e_{c,k} (cross-class means), averaged over classes or pairs; bars are one "
        "standard deviation. At 1 the two agree up to length. Logit means are compared with h̄ ⊗ e_k: where these "
        "agree, it is the mean feature that makes them.",
    ),
    "collapse": Figure(
        "Neural collapse",
        "Neural collapse",
        {layer_charts.layer_collapse: ""},
        "How far the features that enter each layer have collapsed onto their class means: every measure is 0 for "
        "complete collapse. Zeros cannot be drawn here; the table has them.",
        (tables.collapse,),
    ),
    "kronecker": Figure(
        "Kronecker factors",
        "Kronecker factors",
        {layer_charts.kronecker_fits: ""},
        "How far Kronecker-factored approximations K are from each layer's block of G: relative errors in the "
        "Frobenius and the spectral norm, the Wasserstein-1 distance of their spectra in log₁₀ λ, and the cosine "
        "⟨G, K⟩ / ‖G‖‖K‖. KFAC is S ⊗ A; EKFAC has its eigenvectors and G's own diagonal there; CFAC sums S_c ⊗ "
        "A_c over classes.",
        (tables.kronecker,),
    ),
    "kronecker-spaces": Figure(
        "Their eigenspaces",
        "Eigenspaces of Kronecker factors",
        {layer_charts.kronecker_overlaps: ""},
        "Overlap of an approximation's top k eigenvectors with those of the block of G, for the chosen layer.",
    ),
    "regions": Figure(
        "Regions", "Which part makes which region", {region_shifts: ""}, captions.regions, (tables.region,)
    ),
    "overlaps": Figure(
        "Shared eigenspaces",
        "Shared eigenspaces",
        {overlap_curves: ""},
        "Overlap of the top k eigenvectors of a layer's block of G in the two networks, against k. Hidden units of "
        "the two are in no common order, so what overlaps is the input side: where the second moment A of the "
        "features has one dominant direction t, the overlap rises to (t·t′)² at k = m, the number of outputs "
        "(dashed), then falls. “Predicted” knows the spectra of the factors and the eigenvectors of A only; “of "
        "the Kronecker factors” also the eigenvectors of S.",
        (tables.overlap,),
    ),
    "whole": Figure(
        "All parameters",
        "All parameters together",
        {overlap_whole: ""},
        "Overlap of the top k eigenvectors of G over all parameters of the two networks.",
    ),
    "certificate": Figure(
        "Bounds",
        "What is certified",
        {certificate_charts.bounds: ""},
        "Upper bounds on the error on unseen data (bars) and the errors that were observed (dots). The "
        "certificate is of the stochastic network, which draws its weights anew for each example. “Unmodified” adds "
        "how often the network as it is disagrees with that one. “Binomial” is what examples that a plain network "
        "has not seen say, with the same confidence: where it is lower, the certificate tells less than they do.",
        (tables.charge,),
    ),
    "posterior": Figure(
        "Variances",
        "Where the posterior is narrow",
        {certificate_charts.posterior_variances: ""},
        "Optimised variances of a layer's weights, in the coordinates in which they are kept, against the curvature "
        "(the diagonal of G there, of the cross-entropy at the posterior's mean). Where the loss curves, "
        "weights must be known; in the bulk they may be the prior's and cost nothing. The quadratic model alone "
        "would have 1/s = 1/λ + βh.",
        (tables.posterior,),
    ),
    "descent": Figure(
        "Descent",
        "How the bound was found",
        {certificate_charts.descent: ""},
        "Error of the stochastic network on the examples of the bound, and its divergence from the prior, epoch by "
        "epoch; the bound weighs the two.",
    ),
    "cost": Figure("Cost", "What it cost", {cost: ""}, captions.cost),
}
OF_SWEEPS = {
    "dynamics": Figure(
        "Dynamics",
        "What moves with what",
        {dynamics: ""},
        "Measures of a sweep's finished cells against each axis of numbers, one column an axis; menus choose where "
        "on the other axes. Points are cells, lines are means over seeds, and bands run from the lowest seed to the "
        "highest. On logarithmic axes what is zero or negative is left out. The last row draws any number that the "
        "sweep measured.",
        (tables.failure,),
    ),
    "by-layer": Figure(
        "Layers",
        "What moves with depth",
        {by_layer: ""},
        "A measure of every layer, from input to output, one figure an axis of the sweep: its values have colours, "
        "and menus choose where on the other axes. Points are cells, lines are means over seeds.",
    ),
}


def figures_of(dataset: xr.Dataset) -> dict[str, Figure]:
    """Those that a dataset may have: a sweep's measures may be called as an analysis' variables are."""
    return OF_SWEEPS if is_sweep(dataset) else FIGURES


def chart(dataset: xr.Dataset, name: str, inches: float | None = None) -> alt.LayerChart:
    """One chart by name, as on the page or for print, as wide as some inches.

    Raises:
        OptionError: there is no chart of this name.
        DataError: the analysis lacks what it draws.
    """
    known = {chart.name: chart for figure in FIGURES.values() for chart in figure.charts}
    if name not in known:
        raise OptionError(f"there is no chart {name!r}; there are {', '.join(known)}.")
    return drawing.printed(known[name](dataset), inches)


def charts(dataset: xr.Dataset) -> dict[str, alt.TopLevelMixin]:
    """Every chart whose variables the analysis holds, by name."""
    return {chart.name: chart(dataset) for figure in figures_of(dataset).values() for chart in figure.drawn(dataset)}

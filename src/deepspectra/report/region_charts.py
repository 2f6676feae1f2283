"""Which knock-out moves which region of a spectrum."""

from __future__ import annotations

import altair as alt
import xarray as xr

from deepspectra.report import drawing as d

SPECTRUM_LABELS = {
    "gradients": "Gradients (G)",
    "hessian": "Hessian H",
    "features": "Features",
    "errors": "Backpropagated errors",
}
REGION_COLOURS = {"outliers": "#0072B2", "bump": "#CC79A7", "bulk": "#009E73"}
LANE = 22  # pixels of a knock-out's region


@d.needs("region_shift")
def region_shifts(dataset: xr.Dataset) -> alt.LayerChart:
    """How far each knock-out moves outliers, bump and bulk, with standard errors."""
    table = d.rows(dataset, "region_shift", "region_shift_error")
    for row in table:
        shift, error = row["region_shift"], row.get("region_shift_error") or 0.0
        row |= {"label": row["region"], "low": max(0.0, shift - error), "high": shift + error}
    spectra = list(dict.fromkeys(row["spectrum"] for row in table))
    places = [str(place) for place in dataset["place"].values]
    regions = [str(region) for region in dataset["region"].values]
    shown = d.choice("spectrum_shown", {name: SPECTRUM_LABELS.get(name, name) for name in spectra})
    place = d.choice("place_shown", places, menu="of ")
    by_layer = {row["spectrum"] for row in table if row["place"] != places[0]}
    together = [name for name in spectra if name not in by_layer]
    base = d.blank(table).transform_filter("datum.spectrum === spectrum_shown")
    base = base.transform_filter(f"datum.place === place_shown || indexof({together}, datum.spectrum) >= 0")
    base = base.encode(
        y=alt.Y(
            "removed:N",
            title="without",
            sort=[str(name) for name in dataset["removed"].values],
            axis=alt.Axis(ticks=False, domain=False, grid=True, labelLimit=160),
            scale=alt.Scale(paddingInner=0.25),
        ),
        yOffset=alt.YOffset("label:N", sort=regions),
        color=d.colour({name: REGION_COLOURS[name] for name in regions}),
    )
    axis = alt.Axis(title="moved by, decades of λ", tickCount=7)
    x = alt.X("region_shift:Q", axis=axis, scale=alt.Scale(domainMin=0))
    tooltip = [
        d.word("removed", "without"),
        d.word("label", "region"),
        d.tip("region_shift", "moved by, decades"),
        d.tip("region_shift_error", "± standard error"),
    ]
    bars = base.mark_bar(opacity=0.8).encode(x=x, tooltip=tooltip)
    errors = base.mark_rule(color=d.INK, strokeWidth=1.2).encode(
        x=alt.X("low:Q"), x2=alt.X2("high:Q"), color=alt.ColorValue(d.INK), tooltip=tooltip
    )
    height = LANE * len(regions) * len(dataset["removed"])
    return d.finished(d.layered(bars, errors, choices=[shown, place]), width=d.WIDTH, height=height)

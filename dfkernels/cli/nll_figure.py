"""The figure of `dfkernels nll`: likelihood against guidance, and seed by seed at one scale."""

from __future__ import annotations

import math

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .._page import theme
from ..methods.guided_likelihood import GuidedSample, summarised


def png(rows: list[GuidedSample], under: str, latents: bool) -> bytes:
    """The figure of rows at one or more scales, as a PNG."""
    return theme.png(lambda: _figure(rows, under, latents), theme.LIGHT, 150)


def _figure(rows: list[GuidedSample], under: str, latents: bool) -> Figure:
    scales = sorted({row.scale for row in rows})
    several = len(scales) > 1
    figure = Figure(figsize=(8.6 if several else 4.6, 3.6), layout="constrained")
    panels = figure.subplots(1, 1 + several, squeeze=False)[0]
    if several:
        _against_guidance(panels[0], rows, scales)
    _across_seeds(panels[-1], rows, scales[-1], several)
    of = "latents" if latents else "images"
    flow = "the model's own flow" if under == "model" else "the guided flow"
    for axis in panels:
        axis.set_ylabel("NLL, nats per number")
    figure.supxlabel(f"of {of}, under {flow}", fontsize=8, color=theme.LIGHT.faint)
    return figure


def _against_guidance(axis: Axes, rows: list[GuidedSample], scales: list[float]) -> None:
    """The mean, twice its standard error, and every seed."""
    colour = theme.LIGHT.series[0]
    found = sorted(summarised(rows), key=lambda at: at.scale)
    mean = [at.nll for at in found]
    for seed in sorted({row.seed for row in rows}):
        of = {row.scale: row.nll for row in rows if row.seed == seed}
        line = [of.get(scale, math.nan) for scale in scales]
        axis.plot(scales, line, color=theme.LIGHT.faint, linewidth=0.6, alpha=0.5)
    width = [0 if math.isnan(at.standard_error) else 2 * at.standard_error for at in found]
    low, high = zip(*((m - w, m + w) for m, w in zip(mean, width, strict=True)), strict=True)
    axis.fill_between(scales, low, high, color=colour, alpha=0.25, linewidth=0)
    axis.plot(scales, mean, "o-", color=colour, label="mean ± 2 standard errors")
    axis.plot([], [], color=theme.LIGHT.faint, linewidth=0.6, label="each seed")
    axis.set(xlabel="guidance scale", xticks=scales, xticklabels=[f"{w:g}" for w in scales])
    axis.set_title("Against guidance")
    axis.legend(fontsize=8)


def _across_seeds(axis: Axes, rows: list[GuidedSample], scale: float, several: bool) -> None:
    """Sorted, with the error that random probes leave."""
    colour = theme.LIGHT.series[1]
    some = sorted((row for row in rows if row.scale == scale), key=lambda row: row.nll)
    error = [0 if math.isnan(row.trace_error) else row.trace_error for row in some]
    places = range(len(some))
    axis.errorbar(places, [row.nll for row in some], error, fmt="o", color=colour, markersize=4)
    if len(some) <= 16:
        axis.set_xticks(places, [str(row.seed) for row in some])
        axis.set_xlabel("seed, in order of NLL")
    else:
        axis.set_xlabel("seeds, in order of NLL")
    axis.set_title(f"Across seeds, guidance {scale:g}" if several else "Across seeds")

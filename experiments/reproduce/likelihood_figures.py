"""Figures of the likelihood experiment: error against cost, and density by noise level."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from dfkernels._page.theme import Theme

from .likelihood_tables import Level, Row


def error(rows: list[Row], theme: Theme) -> Figure:
    figure = Figure(figsize=(8.6, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    truth, residual, paper = rows[0], rows[4], rows[5]
    probes = rows[1:4]
    for some, mark, colour, name in (
        (probes, "o-", theme.series[0], "Hutchinson, K = 1, 4, 16"),
        ([residual], "X", theme.series[1], residual.name),
        ([paper], "^", theme.extra[0], paper.name),
    ):
        sizes = [row.error(truth).abs().mean().item() for row in some]
        left.plot(
            [row.seconds for row in some], sizes, mark, color=colour, markersize=8, label=name
        )
    left.axvline(truth.seconds, color=theme.faint, linestyle="--", linewidth=1)
    left.annotate(
        "exact divergence ",
        (truth.seconds, 0.98),
        xycoords=("data", "axes fraction"),
        color=theme.faint,
        rotation=90,
        ha="right",
        va="top",
        fontsize=8,
    )
    left.set(
        xscale="log", yscale="log", xlabel="seconds for all images", ylabel="mean |error|, bits/dim"
    )
    left.xaxis.set_minor_formatter(NullFormatter())
    left.set_title("Error against cost")
    for row, mark, colour in ((probes[0], "o", theme.series[0]), (residual, "X", theme.series[1])):
        right.plot(truth.bits, row.bits, mark, color=colour, markersize=5, label=row.name)
    ends = [truth.bits.min().item() - 0.1, truth.bits.max().item() + 0.1]
    right.plot(ends, ends, color=theme.faint, linewidth=1, zorder=1)
    right.set(xlabel="exact divergence, bits/dim", ylabel="approximation, bits/dim")
    right.set_title("Image by image")
    left.legend(fontsize=8)
    right.legend(fontsize=8)
    return figure


def levels(found: list[Level], theme: Theme) -> Figure:
    figure = Figure(figsize=(8.6, 3.2), layout="constrained")
    axis = figure.subplots()
    s = [level.s for level in found]
    for name, mark, colour, label in (
        ("held", "o-", theme.series[0], "data set, held-out images"),
        ("own", "o:", theme.series[0], "data set, its own images"),
        ("network", "X-", theme.series[1], "network, held-out images"),
    ):
        axis.plot(s, [getattr(level, name) for level in found], mark, color=colour, label=label)
    axis.set(xscale="log", xlabel="noise level σ/α", ylabel="bits/dim of q at that level")
    top = max(max(level.network, level.own) for level in found)
    # where it memorises, it leaves
    axis.set_ylim(min(0, *(level.own for level in found)), 1.5 * top)
    axis.set_title(
        "The data set's own law describes new images only where the noise joins its atoms"
    )
    axis.legend(fontsize=8)
    return figure

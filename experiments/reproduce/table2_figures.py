"""Figures of Table 2: the trace as a field, by every method, and the error against the noise
level."""

from __future__ import annotations

import torch
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from torch import Tensor

from dfkernels._page.theme import Theme

from . import chessboard
from .section import Picture

LEVELS = (1.0, 0.447, 0.1)
REACH = 5.0
COLUMNS = {
    "truth": "Truth",
    "residual": "DF-TM, residual",
    "noise": "DF-TM, noise",
    "paper": "DF-TM, paper",
    "vjp": "VJP",
}


def pictures(networks, curve, methods, targets, quick) -> list[Picture]:
    """Both figures; each is drawn when asked for."""
    return [
        Picture(
            "table2_fields",
            "(σ²/d) tr F over the plane, [−5, 5]², at three noise levels: 1 in free noise, 0 where"
            " the density is locally flat, negative (blue) in the gaps between squares. From the"
            " left: the closed form, the three forms of DF-TM, the trace of the noise network's"
            " Jacobian by VJP. Grey: where the density is below 1e-6.",
            lambda theme: fields(networks, 48 if quick else 120, theme),
        ),
        Picture(
            "table2_error",
            "Mean error of tr F relative to mean |tr F| against the noise level. Circles: the"
            " paper's DF-TM, drawn at σ = √t.",
            lambda theme: error(curve, methods, targets, theme),
        ),
    ]


def _fields(networks, sigma: float, side: int) -> tuple[dict[str, Tensor], Tensor]:
    """(sigma^2/d) tr F by method and the density, each [side, side], first index downward."""
    axis = torch.linspace(-REACH, REACH, side, dtype=torch.float64)
    x = torch.cartesian_prod(axis, axis).flip(1)  # rows are x_2
    truth = chessboard.truth(x, 1.0, sigma)
    found = networks.estimates(x, sigma, torch.Generator().manual_seed(4)) | {"truth": truth.trace}
    shaped = {name: (found[name] * sigma**2 / 2).view(side, side) for name in COLUMNS}
    return shaped, truth.log_prob.exp().view(side, side)


def fields(networks, side: int, theme: Theme) -> Figure:
    light = theme.name == "light"
    colours = LinearSegmentedColormap.from_list(
        "signed", [theme.series[0], "#f4f4f4" if light else "#24282e", theme.series[1]]
    ).with_extremes(bad=theme.grid)
    figure = Figure(figsize=(10.2, 5.9), layout="constrained")
    axes = figure.subplots(len(LEVELS), len(COLUMNS), sharex=True, sharey=True)
    images = {}
    for row, sigma in zip(axes, LEVELS, strict=True):
        found, density = _fields(networks, sigma, side)
        for axis, (name, title) in zip(row, COLUMNS.items(), strict=True):
            values = found[name].masked_fill(~(density > 1e-6), torch.nan)
            images[sigma, name] = axis.imshow(
                values,
                origin="lower",
                extent=2 * (-REACH, REACH),
                cmap=colours,
                norm=Normalize(-1, 1),
            )
            axis.grid(False)
            axis.set(xticks=[-4, 0, 4], yticks=[-4, 0, 4])
            if sigma == LEVELS[0]:
                axis.set_title(title)
        row[0].set_ylabel(f"σ = {sigma:g}")
    bar = figure.colorbar(next(iter(images.values())), ax=axes, shrink=0.6, extend="both")
    bar.set_label("(σ²/d) tr F")
    bar.outline.set_visible(False)
    return figure


def error(curve, methods, targets, theme: Theme) -> Figure:
    figure = Figure(figsize=(7.2, 4.0), layout="constrained")
    axis = figure.subplots()
    looks = {
        "hutchinson": (theme.extra[2], ":"),
        "vjp": (theme.series[2], "-"),
        "paper": (theme.series[1], "-"),
        "noise": (theme.extra[0], "-"),
        "residual": (theme.series[0], "-"),
    }
    sigma = [row.sigma for row in curve]
    for name, (colour, line) in looks.items():
        axis.plot(
            sigma, [row.errors[name] for row in curve], line, color=colour, label=methods[name]
        )
    shown = {t: value for t, value in targets.items() if t > 0}
    axis.plot(
        [t**0.5 for t in shown],
        [v / 100 for v in shown.values()],
        "o",
        mfc="none",
        color=theme.series[1],
        label="paper's DF-TM (σ = √t)",
    )
    ticks = {1e-4: "0.01 %", 1e-2: "1 %", 0.1: "10 %", 1.0: "100 %", 1e2: "10⁴ %", 1e4: "10⁶ %"}
    axis.set(xscale="log", yscale="log", xlabel="noise level σ", ylabel="relative error of tr F")
    axis.set_ylim(1e-6, 1e4)
    axis.set_yticks(list(ticks), labels=list(ticks.values()))
    axis.set_xticks([0.01, 0.1, 1, 10], labels=["0.01", "0.1", "1", "10"])
    axis.legend()
    return figure

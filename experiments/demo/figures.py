"""The demo's figures."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter
from torch import Tensor

from dfkernels._page.theme import Theme, png

from .speed import PEERS, Speed
from .sweep import CHECKS, LIMIT, PAIRS, Sweep

_FLOOR = 1e-9  # where an error of zero is drawn on a log axis
_COLLAPSED = (
    1e-4  # below this share of sigma^2 float32 cannot tell the posterior variance from zero
)


def draw_all(
    sweeps: list[Sweep], speeds: list[Speed], theme: Theme, dpi: int
) -> dict[str, Callable[[], bytes]]:
    """Name -> a call that draws that figure and returns its PNG."""
    figures: dict[str, Callable[[], Figure]] = {
        f"{s.data.name}": lambda s=s: images(s, theme) for s in sweeps
    }
    figures["noise"] = lambda: noise(sweeps, theme)
    figures["accuracy"] = lambda: accuracy(sweeps, theme)
    figures["speed"] = lambda: speed(speeds, theme)
    return {name: lambda draw=draw: png(draw, theme, dpi) for name, draw in figures.items()}


# ---- images


def images(sweep: Sweep, theme: Theme) -> Figure:
    """One query across the noise levels: noisy, denoised, leading directions of the posterior,
    direction best determined.
    """
    which = sweep.data.shown
    levels = _columns(sweep, 8)
    rows = ["noisy  x", "denoised  ȳ", *[f"direction {i + 1}" for i in range(PAIRS)], "largest λ"]
    height, width = 0.9, 0.86
    left, top, bottom = 1.05, 0.72, 0.88
    size = (left + width * len(levels) + 0.1, top + height * len(rows) + bottom)
    figure = Figure(figsize=size)
    grid = figure.add_gridspec(
        len(rows), len(levels), left=left / size[0], right=1 - 0.1 / size[0], top=1 - top / size[1],
        bottom=bottom / size[1], wspace=0.06, hspace=0.22,
    )  # fmt: skip
    for column, s in enumerate(levels):
        sigma = float(sweep.data.sigma[s])
        shown = sweep.noisy[s, which] / math.sqrt(1 + sigma**2)  # strong noise would saturate
        tiles: list[tuple[np.ndarray | None, str]] = [
            (_picture(shown), ""),
            (_picture(sweep.denoised[s, which]), ""),
        ]
        gaps = [1 - float(v) for v in (*sweep.small[s, 0], sweep.large[s, 0, 0])]
        for j, gap in enumerate(gaps):
            # F = I/sigma^2 there: any vector will do
            empty = gaps[0] < _COLLAPSED or (j < PAIRS and gap < _COLLAPSED)
            label = "" if empty else _short(sigma * math.sqrt(gap)) if gap > _COLLAPSED else "≈ 0"
            tiles.append((None if empty else _direction(sweep.vectors[s, 0, j], theme), label))
        for row, (picture, label) in enumerate(tiles):
            axis = figure.add_subplot(grid[row, column])
            axis.set_xticks([])
            axis.set_yticks([])
            axis.grid(False)
            for spine in axis.spines.values():
                spine.set_visible(True)
                spine.set_color(theme.grid)
            if picture is None:
                axis.set_box_aspect(1)
                axis.text(
                    0.5,
                    0.5,
                    "0",
                    ha="center",
                    va="center",
                    color=theme.faint,
                    fontsize=9,
                    transform=axis.transAxes,
                )
            else:
                axis.imshow(picture, interpolation="nearest")
            if label:
                axis.set_xlabel(label, labelpad=1.5, fontsize=7.5, color=theme.faint)
            if column == 0:
                axis.set_ylabel(rows[row], rotation=0, ha="right", va="center", labelpad=8)
            if row == 0:
                axis.set_title(
                    f"σ = {_short(sigma)}", loc="center", fontsize=9, fontweight="normal", pad=5
                )
    what = {"digits": "A digit", "patches": "A photograph patch"}[sweep.data.name]
    title = f"{what} and its Fisher information, N = {len(sweep.data.cloud):,} atoms"
    figure.text(
        0.1 / size[0],
        1 - 0.12 / size[1],
        title,
        ha="left",
        va="top",
        fontsize=11,
        fontweight="bold",
    )
    note = (
        "Directions 1 to 3: eigenvectors of F with the smallest eigenvalues λ, where the posterior"
        " of the clean image is widest;\nbelow each, the posterior standard deviation along it,"
        " σ√(1 − σ²λ). 0: one atom, or a line of atoms, holds all the\nweight; then λ = 1/σ² and"
        " any direction would do. Last row: a direction in which the clean image is certain.\nx is"
        " shown divided by √(1 + σ²)."
    )
    figure.text(
        0.1 / size[0],
        0.1 / size[1],
        note,
        ha="left",
        va="bottom",
        fontsize=7.5,
        color=theme.faint,
        linespacing=1.45,
    )
    return figure


def _picture(image: Tensor) -> np.ndarray:
    """[8, 8] or [8, 8, 3] in [-1, 1] -> RGB in [0, 1]."""
    picture = (image.numpy() / 2 + 0.5).clip(0, 1)
    return picture if picture.ndim == 3 else np.repeat(picture[..., None], 3, -1)


def _direction(vector: Tensor, theme: Theme) -> np.ndarray:
    """A signed image: grey levels diverge from the page's blue to its vermilion; colours are
    offsets from mid-grey.
    """
    v = vector.numpy() / np.abs(vector.numpy()).max()
    if v.ndim == 3:
        return 0.5 + 0.45 * v
    neutral = "#f4f4f4" if theme.name == "light" else "#24282e"
    colours = LinearSegmentedColormap.from_list(
        "signed", [theme.series[0], neutral, theme.series[1]]
    )
    return colours(v / 2 + 0.5)[..., :3]


# ---- curves


def noise(sweeps: list[Sweep], theme: Theme) -> Figure:
    """Fisher trace, smallest eigenvalue and effective sample size against the noise level."""
    figure = Figure(figsize=(10.4, 3.3), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for sweep, colour in zip(sweeps, theme.series, strict=False):
        sigma, n = sweep.data.sigma.numpy(), len(sweep.data.cloud)
        _band(left, sigma, sweep.trace.numpy(), colour, sweep.data.name)
        left.plot(sigma, sweep.gaussian.numpy(), color=colour, linestyle=(0, (4, 2)), linewidth=1.2)
        _band(middle, sigma, sweep.small[..., 0].numpy(), colour, sweep.data.name)
        _band(right, sigma, sweep.ess.numpy(), colour, sweep.data.name)
        right.axhline(n, color=colour, linestyle=(0, (1, 2)), linewidth=1.2)
        right.annotate(
            f"N = {n:,}",
            (sigma[0], n),
            xytext=(0, 3),
            textcoords="offset points",
            fontsize=8,
            color=colour,
        )
    left.plot(
        [],
        [],
        color=theme.faint,
        linestyle=(0, (4, 2)),
        linewidth=1.2,
        label="Gaussian, same covariance",
    )
    left.set_title("Fisher trace, σ² tr F / d")
    left.set_ylim(0, 1.05)
    left.legend(fontsize=8, loc="lower right")
    middle.set_title("Smallest eigenvalue, σ² λ")
    middle.set_yscale("symlog", linthresh=1, linscale=0.7)
    middle.set_yticks([1, 0, -1, -10, -100], ["1", "0", "−1", "−10", "−100"])
    middle.axhline(0, color=theme.faint, linewidth=0.8)
    middle.annotate(
        "log q not concave",
        (0.98, 0.04),
        xycoords="axes fraction",
        ha="right",
        fontsize=8,
        color=theme.faint,
    )
    right.set_title("Effective sample size")
    right.set_yscale("log")
    right.set_ylim(0.7, 4 * max(len(s.data.cloud) for s in sweeps))
    right.yaxis.set_minor_formatter(NullFormatter())
    for axis in (left, middle, right):
        _sigma_axis(axis)
    return figure


def _band(axis: Axes, sigma: np.ndarray, values: np.ndarray, colour: str, label: str) -> None:
    low, middle, high = np.quantile(values, [0.1, 0.5, 0.9], axis=1)
    axis.fill_between(sigma, low, high, color=colour, alpha=0.2, linewidth=0)
    axis.plot(sigma, middle, color=colour, label=label)


def accuracy(sweeps: list[Sweep], theme: Theme) -> Figure:
    """Error of each quantity against float64, with the usual float32 formula for tr F."""
    figure = Figure(figsize=(8.6, 3.6), layout="constrained")
    axes = figure.subplots(1, len(sweeps), sharey=True, squeeze=False)
    colours = (*theme.series, *theme.extra)
    marks = "osD^vP"
    for axis, sweep in zip(axes[0], sweeps, strict=True):
        sigma = sweep.data.sigma.numpy()
        for j, name in enumerate(CHECKS):
            errors = sweep.errors[:, j].numpy().clip(_FLOOR)
            style = {"color": colours[j], "marker": marks[j], "markersize": 3.5, "linewidth": 1.2}
            axis.plot(sigma, errors, **style, label=name)
        errors, label = sweep.plain_trace_error.numpy().clip(_FLOOR), "tr F, plain float32 PyTorch"
        axis.plot(sigma, errors, color=theme.ink, linestyle=(0, (4, 2)), linewidth=1.2, label=label)
        axis.axhline(LIMIT, color=theme.faint, linewidth=0.8)
        place = {"xytext": (0, 2), "textcoords": "offset points", "ha": "right"}
        axis.annotate("limit", (sigma[-1], LIMIT), **place, fontsize=8, color=theme.faint)
        axis.set_yscale("log")
        axis.set_ylim(_FLOOR / 2, None)
        axis.set_title(f"Error, {sweep.data.name}")
        _sigma_axis(axis)
    axes[0][0].set_ylabel("largest error against float64")
    axes[0][0].set_yticks(
        [10.0**e for e in range(-9, -1)],
        ["≤10⁻⁹", *[f"10⁻{'⁰¹²³⁴⁵⁶⁷⁸⁹'[e]}" for e in range(8, 1, -1)]],
    )
    figure.legend(
        *axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8
    )
    return figure


def speed(speeds: list[Speed], theme: Theme) -> Figure:
    """Time of one pass against the number of queries."""
    figure = Figure(figsize=(8.6, 3.4), layout="constrained")
    axes = figure.subplots(1, len(speeds), squeeze=False)
    for axis, result in zip(axes[0], speeds, strict=True):
        for j, name in enumerate(PEERS):
            ms = [row[j] for row in result.ms]
            axis.plot(
                result.batch,
                ms,
                color=theme.series[j],
                marker="oso"[j],
                markersize=4.5,
                label=name,
                linestyle=["-", (0, (4, 2)), (0, (1, 1.5))][j],
            )
        for b, row in zip(result.batch, result.ms, strict=True):
            place = {"xytext": (0, -13), "textcoords": "offset points", "ha": "center"}
            ratio = f"{min(row[1:]) / row[0]:.1f}×"
            axis.annotate(ratio, (b, row[0]), **place, fontsize=8, color=theme.series[0])
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(result.batch, [str(b) for b in result.batch])
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.set_ylim(min(map(min, result.ms)) / 2.2, max(map(max, result.ms)) * 1.6)
        axis.set_xlabel("queries in the call")
        axis.set_title(
            f"Time, {result.data.name} (N = {len(result.data.cloud):,}, d = {result.data.cloud.d})"
        )
    axes[0][0].set_ylabel("milliseconds")
    axes[0][0].legend(fontsize=8, loc="upper left")
    return figure


# ---- common


def _sigma_axis(axis: Axes) -> None:
    axis.set_xscale("log")
    axis.set_xlabel("noise level σ (data in [−1, 1])")
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())


def _columns(sweep: Sweep, most: int) -> list[int]:
    """At most `most` noise levels, evenly spread, from the last one at which the shown query's
    posterior is one atom.
    """
    open_ = (1 - sweep.small[:, 0, 0]) > _COLLAPSED
    first = max(int(open_.int().argmax()) - 1, 0)
    n = len(sweep.data.sigma) - first
    return sorted({first + round(i) for i in np.linspace(0, n - 1, min(n, most))})


def _short(value: float) -> str:
    return f"{value:.2g}" if value < 10 else f"{value:.0f}"

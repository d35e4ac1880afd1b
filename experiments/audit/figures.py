"""What the page of the two networks shows: their errors over the noise levels, their samples."""

from __future__ import annotations

from collections.abc import Callable

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter
from torch import Tensor

from dfkernels._page.theme import Theme
from dfkernels.methods.audit.report import AuditReport

from .report import Audited, error_of

_SHOWN = 10  # samples of each network


def of(audited: list[Audited], theme: Theme) -> dict[str, Callable[[], Figure]]:
    """The figures by name, each drawn when it is called."""
    return {"errors": lambda: _errors(audited, theme), "samples": lambda: _samples(audited, theme)}


def _errors(audits: list[Audited], theme: Theme) -> Figure:
    """Mean square errors relative to those of the best linear prediction, a panel per network."""
    figure = Figure(figsize=(8.6, 3.3), layout="constrained")
    axes = figure.subplots(1, len(audits), sharey=True, squeeze=False)
    for axis, audited in zip(axes[0], audits, strict=True):
        audit = audited.report
        noise = [level.noise for level in audit.levels]
        train, held_out, ink = theme.series[0], theme.series[1], theme.faint
        dotted = {"linestyle": (0, (1, 1.6)), "linewidth": 1.4}
        axis.plot(noise, _relative(audit, "train", "exact"), color=train, **dotted)
        axis.plot(noise, _relative(audit, "held_out", "exact"), color=held_out, **dotted)
        axis.plot(noise, _relative(audit, "train", "network"), color=train, label="training images")
        axis.plot(
            noise, _relative(audit, "held_out", "network"), color=held_out, label="held-out images"
        )
        axis.plot([], [], color=ink, label="the network")
        axis.plot([], [], color=ink, label="exact posterior mean", **dotted)
        axis.set_title(f"Trained on {audited.title}")
        axis.set_xscale("log")
        axis.set_xlabel("noise level σ/α")
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
    axes[0][0].set_ylim(0, 1.6)
    axes[0][0].set_ylabel("error / that of the best multiple of x")
    axes[0][0].legend(fontsize=8, loc="upper right")
    return figure


def _relative(audit: AuditReport, data: str, of: str) -> list[float]:
    return [error_of(level, data, of).value / level.baseline for level in audit.levels]


def _samples(audits: list[Audited], theme: Theme) -> Figure:
    """Samples of each network, those nearest to a training image first, above that image."""
    figure = Figure(figsize=(8.6, 1.9 * len(audits)), layout="constrained")
    parts = figure.subfigures(len(audits), 1, squeeze=False)[:, 0]
    for part, audited in zip(parts, audits, strict=True):
        found = audited.report.samples
        assert found is not None  # there are training images
        part.suptitle(f"Trained on {audited.title}", x=0.01, ha="left", fontsize=9, weight="bold")
        axes = part.subplots(2, _SHOWN)
        rows = (found.samples[:_SHOWN], audited.train[found.rows[:_SHOWN]])
        for row, label, images in zip(axes, ("sample", "nearest"), rows, strict=True):
            for axis, image in zip(row, images, strict=True):
                _image(axis, image, theme)
            row[0].set_ylabel(label, rotation=0, ha="right", va="center", labelpad=6)
        for axis, distance in zip(axes[1], found.distances[:_SHOWN], strict=True):
            axis.set_xlabel(f"{distance:.2f}", fontsize=7.5, color=theme.faint, labelpad=1.5)
    return figure


def _image(axis: Axes, image: Tensor, theme: Theme) -> None:
    axis.imshow(image[0].numpy(), cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
    axis.set_xticks([])
    axis.set_yticks([])
    axis.grid(False)
    for spine in axis.spines.values():
        spine.set_visible(True)
        spine.set_color(theme.grid)

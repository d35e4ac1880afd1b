"""The figures of single points: likelihoods, and samples beside the training data."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from torch import Tensor

from ..._page.theme import Theme
from ..audit.parts import LikelihoodAudit, SampleAudit

_SHOWN = 10  # samples in the strip


def likelihood(found: LikelihoodAudit, theme: Theme) -> Figure:
    """Mean log-likelihoods of training and held-out data."""
    figure = Figure(figsize=(8.6, 1.7), layout="constrained")
    axis = figure.subplots()
    bits = found.width is not None
    rows = (
        ("held-out data", found.held_out_bits if bits else found.held_out, "o"),
        ("training data", found.train_bits if bits else found.train, "s"),
    )
    names = []
    for name, mean, marker in rows:
        if mean is not None:
            look = {"fmt": marker, "color": theme.series[0], "capsize": 3, "markersize": 6}
            axis.errorbar(mean.value, len(names), xerr=2 * mean.error, **look)
            names.append(name)
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(-0.6, len(names) - 0.4)
    axis.margins(x=0.15)
    what = "bits per dimension (less is better)" if bits else "nats per number (more is better)"
    axis.set_xlabel(f"mean log-likelihood, {what}" if not bits else what)
    axis.grid(visible=False, axis="y")
    return figure


def distances(found: SampleAudit, theme: Theme) -> Figure:
    """How many samples and held-out points have a training atom within a distance."""
    figure = Figure(figsize=(8.6, 3.0), layout="constrained")
    axis = figure.subplots()
    for values, colour, name in (
        (found.held_out_distances, theme.extra[2], "held-out data"),
        (found.distances, theme.series[0], "samples"),
    ):
        if values is not None:
            rising = np.concatenate([[0.0], values.numpy()])
            share = 100 * np.arange(len(rising)) / (len(rising) - 1)
            axis.step(rising, share, where="post", color=colour, label=name)
    if found.threshold is not None and found.expected is not None:
        axis.axvline(found.threshold, color=theme.faint, linewidth=0.9, linestyle=(0, (1, 1.5)))
        text = f" {100 * found.expected:.2g} % of held-out data are nearer"
        place = {"xycoords": ("data", "axes fraction"), "fontsize": 7.5, "color": theme.faint}
        axis.annotate(text, (found.threshold, 0.93), **place)
    axis.margins(x=0.02)
    axis.set_ylim(0, 102)
    axis.set_xlabel("distance to the nearest training atom, root mean square per number")
    axis.set_ylabel("points at most so far away, %")
    axis.legend(fontsize=8, loc="lower right")
    return figure


def pictures(found: SampleAudit, atoms: Tensor, theme: Theme) -> Figure:
    """Samples [C, H, W] above their nearest training atoms, [K, C, H, W]."""
    count = min(_SHOWN, len(found.samples))
    low, high = atoms.min().item(), atoms.max().item()
    figure = Figure(figsize=(8.6, 2.0), layout=ConstrainedLayoutEngine(h_pad=0.01, hspace=0))
    grid = figure.subplots(2, count, squeeze=False)
    for column in range(count):
        pair = (found.samples[column], atoms[column])
        for axis, image in zip(grid[:, column], pair, strict=True):
            axis.imshow(_picture(image, low, high), interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            axis.grid(visible=False)
            for spine in axis.spines.values():
                spine.set_visible(False)
        grid[1, column].set_xlabel(f"{found.ratios[column]:.2f}", fontsize=8, color=theme.faint)
    for row, name in enumerate(("sample", "nearest\natom")):
        grid[row, 0].set_ylabel(name, rotation=0, ha="right", va="center", labelpad=8)
    return figure


def _picture(image: Tensor, low: float, high: float) -> np.ndarray:
    """[1 or 3, H, W] in [low, high] -> RGB [H, W, 3] in [0, 1]."""
    scaled = ((image.double() - low) / max(high - low, 1e-30)).clamp(0, 1)
    return scaled.expand(3, *image.shape[1:]).permute(1, 2, 0).numpy()

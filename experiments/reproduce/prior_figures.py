"""Figures of the general prior: denoised digits, and curves against the noise."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from dfkernels._page.theme import Theme
from dfkernels.fisher import DiffusionFisher
from dfkernels.law import Law

if TYPE_CHECKING:
    from .prior import Level

_NOISE = (0.05, 0.2, 0.4, 0.8, 1.6)


def denoised(priors: dict[str, Law], image: Tensor, theme: Theme) -> Figure:
    """One image [1, 8, 8] under noise, and its posterior means under each prior."""
    noise = torch.randn(
        image.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64
    )
    noisy = torch.stack([image + sigma * noise for sigma in _NOISE])
    sigma = torch.tensor(_NOISE, dtype=torch.float64)
    rows = {"noisy": noisy}
    rows |= {name: DiffusionFisher(noisy, law, 1.0, sigma).denoised for name, law in priors.items()}
    figure = Figure(figsize=(7.6, 7.4), layout="constrained")
    axes = figure.subplots(len(rows), len(_NOISE) + 1)
    for axis in axes.flat:
        axis.grid(False)
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    axes[0, 0].imshow(image[0], cmap="gray", vmin=-1, vmax=1)
    axes[0, 0].set_title("new digit", loc="center", fontsize=9)
    for level, axis in zip(_NOISE, axes[0, 1:], strict=True):
        axis.set_title(f"σ = {level:g}", loc="center", fontsize=9)
    for i, (name, images) in enumerate(rows.items()):
        if i:
            place: dict[str, Any] = {"xycoords": "axes fraction", "ha": "right", "va": "center"}
            axes[i, 0].set_facecolor("none")
            axes[i, 0].annotate(name, (1, 0.5), weight="bold", **place)
        for j, axis in enumerate(axes[i, 1:]):
            axis.imshow(images[j, 0], cmap="gray", vmin=-1, vmax=1)
            if i:
                error = (images[j] - image).square().mean().sqrt().item()
                axis.set_xlabel(f"{error:.2f}", fontsize=8, labelpad=2)
            if name == "atoms" and _alone(priors, noisy[j], _NOISE[j]):
                axis.spines[:].set(visible=True, color=theme.series[1], linewidth=2.5)
    return figure


def _alone(priors: dict[str, Law], x: Tensor, sigma: float) -> bool:
    """Whether one atom has all the weight, so that the posterior mean is a training image."""
    return DiffusionFisher(x[None], priors["atoms"], 1.0, sigma).ess.item() < 1.01


def curves(found: dict[str, list[Level]], theme: Theme) -> Figure:
    figure = Figure(figsize=(10.4, 3.7), layout="constrained")
    density, fisher, error = figure.subplots(1, 3)
    order = (theme.series[1], theme.series[0], theme.series[2], theme.extra[0])
    colours = dict(zip(found, order, strict=True))
    for name, levels in found.items():
        sigma, colour = [at.sigma for at in levels], colours[name]
        density.plot(sigma, [at.held for at in levels], color=colour, label=name)
        density.plot(sigma, [at.own for at in levels], ":", color=colour)
        fisher.plot(sigma, [at.fisher / at.sigma**2 for at in levels], color=colour)
        error.plot(sigma, [at.held_error for at in levels], color=colour)
        error.plot(sigma, [at.own_error for at in levels], ":", color=colour)
    sigma = [at.sigma for at in found["atoms"]]
    fisher.plot(sigma, [s**-2 for s in sigma], "--", color=theme.faint, linewidth=1, label="1/σ²")
    density.set(title="log q per pixel, nats", ylim=(-6, 4))
    fisher.set(title="tr F / d", yscale="log")
    error.set(title="Error of the denoiser", yscale="log", ylim=(1e-3, 2))
    for axis in (density, fisher, error):
        axis.set(xscale="log", xlabel="noise level σ")
    density.plot([], [], ":", color=theme.ink, label="training images")
    density.legend(fontsize=8, loc="upper right")
    fisher.legend(fontsize=8)
    return figure

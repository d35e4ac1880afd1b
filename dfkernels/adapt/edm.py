"""EDM and k-diffusion: networks D(x; sigma).

The convention, as read in NVlabs/edm (training/networks.py, generate.py) and k-diffusion 0.1.1
(external.py, sampling.py): `net(x, sigma, class_labels)` is the posterior mean of x_0 at x = x_0 +
sigma eps, so that alpha = 1 and sigma itself is the time. EDM's networks compute in float32
whatever they are given, take class labels one-hot as [B, label_dim], and say their range as
`sigma_min`, `sigma_max`; k-diffusion's take their conditions by any name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..law import Law
from ..methods.denoiser import Denoiser
from ..schedule import EDM
from ._exact import ExactNetwork, times

__all__ = ["ExactEDM", "as_edm", "from_edm", "from_k_diffusion"]


@dataclass(frozen=True)
class RangedEDM(EDM):
    """`schedule.EDM` over the levels that a network knows, t in [sigma_min, sigma_max]."""

    sigma_min: float
    sigma_max: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "t_range", (self.sigma_min, self.sigma_max))


def known_levels(network: object) -> EDM:
    """The schedule over `network.sigma_min` and `network.sigma_max`, where it has them."""
    low, high = (
        float(getattr(network, "sigma_min", 0)),
        float(getattr(network, "sigma_max", math.inf)),
    )
    return EDM() if (low, high) == EDM.t_range else RangedEDM(low, high)


def from_edm(net: Callable[..., Tensor], labels: Tensor | None = None) -> Denoiser:
    """The denoiser of an EDM network `net(x, sigma, class_labels)`, EDMPrecond or another Precond.

    >>> denoiser = from_edm(net, torch.eye(10)[[3]])  # class 3
    >>> path = df.sample(denoiser, 80 * noise, df.time_grid(denoiser.schedule, 18, (0.002, 80)))

    Args:
        net: as in NVlabs/edm. Its `sigma_min` and `sigma_max`, where it has them, are the range of
            the schedule. Those of iDDPM round the time that they give to the network inside, by
            themselves; the level stays that of sigma.
        labels: [1, label_dim] or [B, label_dim], one-hot; None leaves them to the network.

    Returns:
        A `Denoiser` with t = sigma (schedule.EDM) and the prediction type "sample".
    """
    denoiser = Denoiser(net, known_levels(net), "sample")
    return denoiser if labels is None else denoiser.bind(class_labels=labels)


def from_k_diffusion(model: Callable[..., Tensor]) -> Denoiser:
    """The denoiser of a k-diffusion model `model(x, sigma, **conditions)`: its own Denoiser, and
    its wrappers VDenoiser, DiscreteEpsDDPMDenoiser, OpenAIDenoiser and their like.

    Args:
        model: as in k-diffusion. The range of a discrete schedule is that of the result's.

    Returns:
        A `Denoiser` with t = sigma (schedule.EDM) and the prediction type "sample"; conditions are
        keyword arguments of its calls.
    """
    return Denoiser(model, known_levels(model), "sample")


def as_edm(cloud: Law, *, tolerance: float | None = None) -> ExactEDM:
    """The data set as an EDM network `net(x, sigma)`, for EDM's samplers and k-diffusion's.

    >>> x_0 = edm_sampler(as_edm(cloud), latents)  # theirs, unchanged

    Args:
        cloud: the atoms, in the network's space: EDM's images are in [-1, 1].
        tolerance: as in `DiffusionFisher`.

    Source: Karras et al. 2022, appendix B.3 (the ideal denoiser of a finite data set).
    """
    return ExactEDM(cloud, tolerance)


class ExactEDM(ExactNetwork):
    """What `as_edm` returns: `net(x, sigma)` -> the posterior mean.

    It has the attributes that EDM's samplers ask for: `sigma_min` = 0, `sigma_max` = inf,
    `label_dim` = 0, `round_sigma`, and for images [C, H, W] `img_channels` and
    `img_resolution`.
    """

    sigma_min, sigma_max, label_dim = 0.0, float("inf"), 0

    def __init__(self, cloud: Law, tolerance: float | None) -> None:
        super().__init__(cloud, tolerance)
        if len(cloud.event_shape) == 3:
            self.img_channels, self.img_resolution = cloud.event_shape[0], cloud.event_shape[-1]

    def forward(
        self, x: Tensor, sigma: float | Tensor, class_labels: None = None, force_fp32: bool = False
    ) -> Tensor:
        """The posterior mean, [B, *E] in x's dtype: float64 is kept, unlike EDM's networks do.

        Args:
            x: [B, *E], floating.
            sigma: one number or B, in any shape; > 0.
            class_labels: None, since the data set has no classes.
            force_fp32: has no influence.

        Raises:
            ValueError: class_labels are given, sigma is not positive, or a shape is wrong.
        """
        if class_labels is not None:
            raise ValueError("class_labels: expected None for a data set without classes")
        t = times("sigma", sigma, x)
        return self.exact(x, torch.ones_like(t), t).mean.to(x.dtype)

    def round_sigma(self, sigma: float | Tensor) -> Tensor:
        """sigma itself: the data set is defined at every level."""
        return torch.as_tensor(
            sigma,
            dtype=getattr(sigma, "dtype", torch.float32),
            device=getattr(sigma, "device", "cpu"),
        )

"""azula: denoisers that return a posterior, and schedules from data at t = 0 to noise at t = 1.

The convention, as read in azula 0.11.1 (noise.py, denoise.py): `schedule(t)` -> (alpha, sigma) at x
= alpha x_0 + sigma eps, t in [0, 1], with sigma > 0 at t = 0 too, and no derivatives or inverse;
`denoiser(x_t, t, **conditions)` -> an object whose `.mean` is the posterior mean, t [] or [B].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .._torch import check
from ..law import Law
from ..methods.denoiser import Denoiser
from ._adapted import Adapted
from ._exact import ExactNetwork, times
from ._levels import Levels

__all__ = ["ExactAzula", "Posterior", "as_azula", "from_azula"]


class Posterior(NamedTuple):
    """What azula calls a posterior: an object with the posterior mean."""

    mean: Tensor


def from_azula(denoiser: nn.Module) -> Denoiser:
    """The denoiser of an azula denoiser, trained or not, with its schedule.

    >>> denoiser = from_azula(azula.denoise.KarrasDenoiser(backbone, azula.noise.VPSchedule()))

    Args:
        denoiser: `denoiser(x_t, t, **conditions)` -> an object with `.mean`, and
            `denoiser.schedule(t)` -> (alpha, sigma) for t in [0, 1], differentiable PyTorch.

    Returns:
        A `Denoiser` with azula's clock, data at t = 0, and the prediction type "sample".

    Raises:
        TypeError: There is no callable `schedule`.
    """
    schedule = getattr(denoiser, "schedule", None)
    if not callable(denoiser) or not callable(schedule):
        raise TypeError(
            "denoiser: expected a callable denoiser(x_t, t) with a callable .schedule, got "
            f"{type(denoiser).__name__}"
        )
    return Denoiser(
        _Mean(denoiser), Levels(schedule, (0.0, 1.0), type(schedule).__name__), "sample"
    )


class _Mean(Adapted):
    """An azula denoiser as a network that returns the posterior mean."""

    def __init__(self, denoiser: Callable[..., Posterior]) -> None:
        super().__init__(denoiser, "denoiser")
        self.one_time = type(denoiser).__name__ == "GaussianDenoiser"  # takes t [] only

    def forward(self, x: Tensor, t: Tensor, **conditions: object) -> Tensor:
        if self.one_time:
            return torch.func.vmap(lambda x, t: self.network(x[None], t).mean[0])(x, t)
        return self.network(x, t, **conditions).mean


def as_azula(
    cloud: Law,
    schedule: Callable[[Tensor], tuple[Tensor, Tensor]],
    *,
    tolerance: float | None = None,
) -> ExactAzula:
    """The data set as an azula denoiser, for azula's samplers and for its guidance (MMPS, DPS and
    their like), which differentiate the mean: its backward is the fused Fisher product.

    >>> sampler = azula.sample.DDIMSampler(as_azula(cloud, azula.noise.VPSchedule()), steps=64)

    Args:
        cloud: the atoms.
        schedule: `schedule(t)` -> (alpha, sigma): azula's, or one of `dfkernels.schedule` with t in
            the sampler's range.
        tolerance: as in `DiffusionFisher`.
    """
    return ExactAzula(cloud, schedule, tolerance)


class ExactAzula(ExactNetwork):
    """What `as_azula` returns: `denoiser(x_t, t)` -> an object with `.mean`, and `.schedule`."""

    def __init__(
        self,
        cloud: Law,
        schedule: Callable[[Tensor], tuple[Tensor, Tensor]],
        tolerance: float | None,
    ) -> None:
        check.function("schedule", schedule, "a callable schedule(t) -> (alpha, sigma)")
        super().__init__(cloud, tolerance)
        self.schedule = schedule

    def forward(self, x_t: Tensor, t: float | Tensor) -> Posterior:
        """The posterior, whose mean is [B, *E] in x_t's dtype. Levels are computed in float64.

        Args:
            x_t: [B, *E], floating.
            t: one number or B.
        """
        levels = self.schedule(times("t", t, x_t))
        return Posterior(self.exact(x_t, *levels).mean.to(x_t.dtype))

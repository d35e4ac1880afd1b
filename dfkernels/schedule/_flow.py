"""The linear paths of flow matching, in both directions of time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._base import Schedule

__all__ = ["RectifiedFlow", "ReversedRectifiedFlow"]


@dataclass(frozen=True)
class RectifiedFlow(Schedule):
    """The linear path of flow matching, where t = 1 is data: alpha = t, sigma = 1 - t, t in [0, 1].

    f = 1/t;  g2 = -2 (1 - t)/t, negative because the noise falls as t grows. f and g2 need t > 0.
    """

    t_range = (0.0, 1.0)
    _pole = 0.0

    def _alpha(self, t: Tensor) -> Tensor:
        return t.clone()

    def _sigma(self, t: Tensor) -> Tensor:
        return 1 - t

    def _f(self, t: Tensor) -> Tensor:
        return 1 / t

    def _g2(self, t: Tensor) -> Tensor:
        return -2 * (1 - t) / t

    def _rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), -torch.ones_like(t)

    def _log_snr(self, t: Tensor) -> Tensor:
        return 2 * torch.logit(t)

    def _t_of_log_snr(self, lam: Tensor) -> Tensor:
        return torch.sigmoid(lam / 2)


@dataclass(frozen=True)
class ReversedRectifiedFlow(Schedule):
    """The linear path where t is the noise, as in diffusers' flow matching, SD3 and Flux: alpha =
    1 - t, sigma = t, t in [0, 1].

    The velocity of this clock, which the prediction type "flow" means, is eps - x_0: that of
    `RectifiedFlow` with the other sign. f = -1/(1 - t);  g2 = 2 t/(1 - t). f and g2 need t < 1.
    """

    t_range = (0.0, 1.0)
    _pole = 1.0

    def _alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def _sigma(self, t: Tensor) -> Tensor:
        return t.clone()

    def _f(self, t: Tensor) -> Tensor:
        return -1 / (1 - t)

    def _g2(self, t: Tensor) -> Tensor:
        return 2 * t / (1 - t)

    def _rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return -torch.ones_like(t), torch.ones_like(t)

    def _log_snr(self, t: Tensor) -> Tensor:
        return -2 * torch.logit(t)

    def _t_of_log_snr(self, lam: Tensor) -> Tensor:
        return torch.sigmoid(-lam / 2)

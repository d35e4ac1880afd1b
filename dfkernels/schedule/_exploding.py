"""Variance-exploding schedules in closed form, alpha = 1."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .._torch import check
from ._base import Schedule

__all__ = ["EDM", "VE", "GeometricVE"]


@dataclass(frozen=True)
class VE(Schedule):
    """The variance-exploding schedule in its natural time: sigma = sqrt(t), alpha = 1, f = 0,
    g2 = 1, t in [0, inf).

    This is the form of Karras et al. 2022 (Table 1). `GeometricVE` is the same process in another
    clock.
    """

    def _alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def _sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(t)

    def _f(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def _g2(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def _rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(t), 0.5 / torch.sqrt(t)

    def _log_snr(self, t: Tensor) -> Tensor:
        return -torch.log(t)

    def _t_of_log_snr(self, lam: Tensor) -> Tensor:
        return torch.exp(-lam)


@dataclass(frozen=True)
class EDM(VE):
    """The schedule of Karras et al. 2022: sigma = t, alpha = 1, f = 0, g2 = 2 t, t in [0, inf)."""

    def _sigma(self, t: Tensor) -> Tensor:
        return t.clone()

    def _g2(self, t: Tensor) -> Tensor:
        return 2 * t

    def _rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(t), torch.ones_like(t)

    def _log_snr(self, t: Tensor) -> Tensor:
        return -2 * torch.log(t)

    def _t_of_log_snr(self, lam: Tensor) -> Tensor:
        return torch.exp(-lam / 2)


@dataclass(frozen=True)
class GeometricVE(Schedule):
    """The variance-exploding schedule in the clock of Song et al. 2021 (appendix C; score_sde's
    VESDE), t in [0, 1], with r = sigma_max/sigma_min:

    sigma = sigma_min r^t, alpha = 1, f = 0, g2 = 2 ln(r) sigma^2.

    The lowest noise, at t = 0, is sigma_min.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0
    t_range = (0.0, 1.0)

    def __post_init__(self) -> None:
        for name in ("sigma_min", "sigma_max"):
            object.__setattr__(self, name, check.constant(name, getattr(self, name)))
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            came = f"{self.sigma_min}, {self.sigma_max}"
            raise check.mismatch("sigma_min, sigma_max", "0 < sigma_min < sigma_max < inf", came)

    @property
    def _growth(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)

    def _alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def _sigma(self, t: Tensor) -> Tensor:
        return self.sigma_min * torch.exp(t * self._growth)

    def _f(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def _g2(self, t: Tensor) -> Tensor:
        return 2 * self._growth * self._sigma(t) ** 2

    def _rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(t), self._growth * self._sigma(t)

    def _log_snr(self, t: Tensor) -> Tensor:
        return -2 * (math.log(self.sigma_min) + t * self._growth)

    def _t_of_log_snr(self, lam: Tensor) -> Tensor:
        return (-lam / 2 - math.log(self.sigma_min)) / self._growth

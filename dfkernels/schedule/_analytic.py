"""Schedules in closed form."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .._torch import check
from ._base import Schedule

__all__ = ["EDM", "VE", "VP", "RectifiedFlow", "SubVP"]


@dataclass(frozen=True)
class VP(Schedule):
    """The variance-preserving schedule (DDPM; Song et al. 2021, eq. 11), t in [0, 1].

    beta(t) = beta_min + t (beta_max - beta_min);  ln alpha = -int_0^t beta / 2;  sigma^2 = 1 -
    alpha^2;
    f = -beta/2;  g2 = beta.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_range = (0.0, 1.0)

    def __post_init__(self) -> None:
        for name in ("beta_min", "beta_max"):
            object.__setattr__(self, name, check.constant(name, getattr(self, name)))
        if not 0 < self.beta_min <= self.beta_max < math.inf:
            raise ValueError(
                f"beta_min, beta_max: expected 0 < beta_min <= beta_max < inf, got "
                f"{self.beta_min}, "
                f"{self.beta_max}"
            )

    def beta(self, t: float | Tensor) -> Tensor:
        """The noise rate beta(t) = -2 f(t), of t's shape."""
        return self._beta(self._time(t))

    def _beta(self, t: Tensor) -> Tensor:
        return self.beta_min + t * (self.beta_max - self.beta_min)

    def _integral(self, t: Tensor) -> Tensor:
        return t * (self.beta_min + t * ((self.beta_max - self.beta_min) / 2))

    def _alpha(self, t: Tensor) -> Tensor:
        return torch.exp(-self._integral(t) / 2)

    def _sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(-torch.expm1(-self._integral(t)))  # expm1: no cancellation at small t

    def _f(self, t: Tensor) -> Tensor:
        return -self._beta(t) / 2

    def _g2(self, t: Tensor) -> Tensor:
        return self._beta(t)

    def _rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha = self._alpha(t)
        return self._f(t) * alpha, self._beta(t) * alpha**2 / (2 * self._sigma(t))

    def _log_snr(self, t: Tensor) -> Tensor:
        integral = self._integral(t)
        return -integral - torch.log(-torch.expm1(-integral))  # expm1(integral) may overflow

    def _t_of_log_snr(self, lam: Tensor) -> Tensor:
        # softplus would cut off terms of 2e-9
        return self._t_of_integral(-torch.nn.functional.logsigmoid(lam))

    def _t_of_integral(self, integral: Tensor) -> Tensor:
        root = torch.sqrt(self.beta_min**2 + 2 * (self.beta_max - self.beta_min) * integral)
        return (
            2 * integral / (self.beta_min + root)
        )  # the quadratic's root in the form that does not cancel


@dataclass(frozen=True)
class SubVP(VP):
    """The sub-VP schedule (Song et al. 2021, eq. 13), with the standard deviation of its SDE.

    alpha as in VP;  sigma = 1 - alpha^2;  f = -beta/2;  g2 = beta (1 - alpha^4).
    """

    def _sigma(self, t: Tensor) -> Tensor:
        return -torch.expm1(-self._integral(t))

    def _g2(self, t: Tensor) -> Tensor:
        return self._beta(t) * -torch.expm1(-2 * self._integral(t))

    def _rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha = self._alpha(t)
        return self._f(t) * alpha, self._beta(t) * alpha**2

    def _log_snr(self, t: Tensor) -> Tensor:
        integral = self._integral(t)
        return -integral - 2 * torch.log(
            -torch.expm1(-integral)
        )  # sigma/alpha = exp(integral/2) sigma

    def _t_of_log_snr(self, lam: Tensor) -> Tensor:
        return self._t_of_integral(2 * torch.asinh(torch.exp(-lam / 2) / 2))


@dataclass(frozen=True)
class VE(Schedule):
    """The variance-exploding schedule in its natural time: sigma = sqrt(t), alpha = 1, f = 0,
    g2 = 1, t in [0, inf).

    This is the form of Karras et al. 2022 (Table 1). The geometric one, sigma(s) = sigma_min
    (sigma_max/sigma_min)^s, is the same process in another clock: t = sigma(s)^2.
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
class RectifiedFlow(Schedule):
    """The linear path of flow matching, where t = 1 is data: alpha = t, sigma = 1 - t, t in [0, 1].

    f = 1/t;  g2 = -2 (1 - t)/t, negative because the noise falls as t grows. f and g2 need t > 0.
    """

    t_range = (0.0, 1.0)
    _drift_open = True

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

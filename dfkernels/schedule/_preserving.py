"""Variance-preserving schedules in closed form, and the sub-VP one beside them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .._torch import check
from ._base import Schedule

__all__ = ["VP", "Cosine", "SubVP"]


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
            got = f"{self.beta_min}, {self.beta_max}"
            raise check.mismatch("beta_min, beta_max", "0 < beta_min <= beta_max < inf", got)

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
        # the quadratic's root in the form that does not cancel
        return 2 * integral / (self.beta_min + root)


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
        # sigma/alpha = exp(integral/2) sigma
        return -integral - 2 * torch.log(-torch.expm1(-integral))

    def _t_of_log_snr(self, lam: Tensor) -> Tensor:
        return self._t_of_integral(2 * torch.asinh(torch.exp(-lam / 2) / 2))


@dataclass(frozen=True)
class Cosine(Schedule):
    """The cosine schedule in continuous time (Nichol & Dhariwal 2021, eq. 17), t in [0, 1].

    alpha = cos(theta)/cos(theta_0), theta = (pi/2) (t + offset)/(1 + offset), theta_0 at t = 0;
    sigma^2 = 1 - alpha^2;  f = -theta' tan(theta);  g2 = -2 f.

    Args:
        offset: the paper's s, >= 0; 0 gives alpha = cos(pi t/2), sigma = sin(pi t/2).

    alpha = 0 at t = 1, where f and g2 are infinite: there the state says nothing about the data
    ("zero terminal SNR"). iDDPM's discrete table clips its betas and ends before that: pass it to
    `Tabulated`.
    """

    offset: float = 0.008
    t_range = (0.0, 1.0)
    _pole = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "offset", check.constant("offset", self.offset))
        if not self.offset >= 0:
            raise check.mismatch("offset", "at least 0", self.offset)

    # With u = theta' the angle left is pi/2 - theta = (1 - t) u, and cos(theta_0) is sin(u).
    # sigma^2 cos(theta_0)^2 is the product of the sines of theta - theta_0 and theta + theta_0, so
    # that nothing cancels at either end.

    @property
    def _u(self) -> float:
        return math.pi / 2 / (1 + self.offset)

    def _sine_product(self, t: Tensor) -> Tensor:
        return torch.sin(t * self._u) * torch.sin((t + 2 * self.offset) * self._u)

    def _alpha(self, t: Tensor) -> Tensor:
        return torch.sin((1 - t) * self._u) / math.sin(self._u)

    def _sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(self._sine_product(t)) / math.sin(self._u)

    def _f(self, t: Tensor) -> Tensor:
        return -self._u / torch.tan((1 - t) * self._u)

    def _g2(self, t: Tensor) -> Tensor:
        return 2 * self._u / torch.tan((1 - t) * self._u)

    def _rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha_rate = -self._u * torch.cos((1 - t) * self._u) / math.sin(self._u)
        if self.offset == 0:  # sigma = sin(u t), where the formula below is 0/0 at t = 0
            return alpha_rate, self._u * torch.cos(self._u * t)
        return alpha_rate, -self._alpha(t) * alpha_rate / self._sigma(t)

    def _log_snr(self, t: Tensor) -> Tensor:
        return 2 * torch.log(torch.sin((1 - t) * self._u)) - torch.log(self._sine_product(t))

    def _t_of_log_snr(self, lam: Tensor) -> Tensor:
        sine = math.sin(self._u)
        noisy = 1 - torch.asin(sine * torch.sqrt(torch.sigmoid(lam))) / self._u
        product, start = sine**2 * torch.sigmoid(-lam), self.offset * self._u
        theta = torch.asin(torch.sqrt(math.sin(start) ** 2 + product))
        divisor = torch.sin(theta + start).clamp_min(torch.finfo(lam.dtype).tiny)  # 0/0 at t = 0
        return torch.where(lam < 0, noisy, torch.asin(product / divisor) / self._u)

"""A schedule of another library, of which only alpha(t) and sigma(t) are known."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..schedule import Schedule
from ..schedule._base import SLACK

__all__ = ["Levels"]


class Levels(Schedule):
    """The schedule whose levels are what a function returns, in that function's clock.

    Args:
        levels: `levels(t)` -> (alpha, sigma), of t's shape; elementwise, differentiable PyTorch,
            sigma/alpha strictly monotone.
        t_range: the closed range of t.
        name: of the representation.

    Derivatives are PyTorch's, in float64; the inverse is found by bisection.
    """

    def __init__(
        self,
        levels: Callable[[Tensor], tuple[Tensor, Tensor]],
        t_range: tuple[float, float],
        name: str,
    ) -> None:
        self._levels, self.t_range, self._name = levels, t_range, name
        ends = torch.tensor(t_range, dtype=torch.float64, device="cpu")
        alpha, sigma = levels(ends)
        if not (
            math.isfinite(alpha.sum()) and math.isfinite(sigma.sum()) and min(*alpha, *sigma) >= 0
        ):
            raise ValueError(
                f"schedule: expected levels that are finite and at least 0 over [{t_range[0]:g}, "
                f"{t_range[1]:g}], got alpha {alpha.tolist()}, sigma {sigma.tolist()} at the ends"
            )
        poles = [t for t, a in zip(t_range, alpha, strict=True) if a == 0]
        self._pole = poles[0] if poles else None
        self._ends = [float(lam) for lam in self._log_snr(ends)]
        if self._ends[0] == self._ends[1]:
            raise ValueError("schedule: expected another sigma/alpha at either end, got the same")

    def __repr__(self) -> str:
        return self._name

    def _alpha(self, t: Tensor) -> Tensor:
        return self._levels(t.double())[0].to(t.dtype)

    def _sigma(self, t: Tensor) -> Tensor:
        return self._levels(t.double())[1].to(t.dtype)

    def _both(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """alpha, sigma and their derivatives, in float64."""
        at = t.double()
        alpha, sigma = self._levels(at)
        # each by itself: where one has no finite derivative, the other may have
        slopes = (torch.func.grad(lambda t, i=i: self._levels(t)[i].sum())(at) for i in (0, 1))
        return alpha, sigma, *slopes

    def _rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        _, _, alpha_rate, sigma_rate = self._both(t)
        return alpha_rate.to(t.dtype), sigma_rate.to(t.dtype)

    def _f(self, t: Tensor) -> Tensor:
        alpha, _, alpha_rate, _ = self._both(t)
        return (alpha_rate / alpha).to(t.dtype)

    def _g2(self, t: Tensor) -> Tensor:
        alpha, sigma, alpha_rate, sigma_rate = self._both(t)
        return (2 * sigma * (sigma_rate - sigma * alpha_rate / alpha)).to(t.dtype)

    def _log_snr(self, t: Tensor) -> Tensor:
        alpha, sigma = self._levels(t.double())
        return (2 * (torch.log(alpha) - torch.log(sigma))).to(t.dtype)

    def _t_of_log_snr(self, lam: Tensor) -> Tensor:
        target = lam.detach().to("cpu", torch.float64)
        low, high = min(self._ends), max(self._ends)
        slack = SLACK * torch.finfo(lam.dtype).eps * target.abs().clamp_min(1)
        if not bool(((target >= low - slack) & (target <= high + slack)).all()):
            raise ValueError(f"log_snr: expected values in [{low:g}, {high:g}] for {self!r}")
        target = target.clamp(low, high)
        falls = self._ends[0] > self._ends[1]
        lo, hi = (torch.full_like(target, end) for end in self.t_range)
        for _ in range(2 * 53):  # enough for full precision down to t = 2^-53 of the range
            middle = (lo + hi) / 2
            below = (self._log_snr(middle) >= target) == falls
            lo, hi = torch.where(below, middle, lo), torch.where(below, hi, middle)
        t = ((lo + hi) / 2).to(lam.device, lam.dtype)
        if not lam.requires_grad:
            return t
        alpha, sigma, alpha_rate, sigma_rate = self._both(t)
        slope = 2 * (alpha_rate / alpha - sigma_rate / sigma)
        return t + (lam - lam.detach()) / slope.to(t.dtype)

"""Noise schedules x_t = alpha_t x_0 + sigma_t eps: t -> alpha, sigma, f, g2.

Every schedule obeys f = d ln(alpha)/dt and g2 = d(sigma^2)/dt - 2 f sigma^2 (closed forms, no differencing),
so that the probability-flow ODE dx/dt = f x - (g2/2) score carries the marginals q_t. Calling a schedule
gives (alpha, sigma).

t is a float or a tensor of any shape; results are tensors of t's shape, device and dtype (integers and floats
count as the default dtype). A t outside the range raises ValueError in eager CPU code; on an accelerator,
under torch.compile and under vmap the values are not looked at, since that would synchronise or break the
graph.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["EDM", "RectifiedFlow", "Schedule", "SubVP", "Tabulated", "VE", "VP"]


class Schedule:
    """Base class. A subclass gives `t_range`, `_alpha`, `_sigma`, `_f`, `_g2`, `_log_snr`, `_t_of_log_snr`.

    >>> alpha, sigma = VP()(torch.tensor([0.1, 0.5]))
    """

    t_range: tuple[float, float] = (0.0, math.inf)
    _drift_open = False  # f and g2 are infinite at t = t_range[0]

    def __call__(self, t: float | Tensor) -> tuple[Tensor, Tensor]:
        """(alpha_t, sigma_t), each of t's shape."""
        t = self._time(t)
        return self._alpha(t), self._sigma(t)

    def alpha(self, t: float | Tensor) -> Tensor:
        """alpha_t, of t's shape."""
        return self._alpha(self._time(t))

    def sigma(self, t: float | Tensor) -> Tensor:
        """sigma_t, of t's shape; 0 at the data end."""
        return self._sigma(self._time(t))

    def f(self, t: float | Tensor) -> Tensor:
        """f = d ln(alpha)/dt, of t's shape."""
        return self._f(self._time(t, self._drift_open))

    def g2(self, t: float | Tensor) -> Tensor:
        """g^2 = d(sigma^2)/dt - 2 f sigma^2, of t's shape. Negative where the noise falls with t
        (RectifiedFlow).
        """
        return self._g2(self._time(t, self._drift_open))

    def log_snr(self, t: float | Tensor) -> Tensor:
        """ln(alpha_t^2 / sigma_t^2), of t's shape; +inf where sigma_t = 0."""
        return self._log_snr(self._time(t))

    def t_of_log_snr(self, log_snr: float | Tensor) -> Tensor:
        """The t with that log-SNR (inverse of `log_snr`). Raises ValueError if it lies outside the schedule's
        range.
        """
        t = self._t_of_log_snr(_tensor(log_snr))
        lo, hi = self.t_range
        slack = 16 * torch.finfo(t.dtype).eps * max(hi, 1.0) if math.isfinite(hi) else 0.0
        inside = (t >= lo - slack) & (t <= hi + slack)
        snapped = torch.where(inside, t.clamp(lo, hi), t)  # the ends, up to rounding
        return self._time(snapped, name="t_of_log_snr(log_snr)")

    def _time(self, t: float | Tensor, open_start: bool = False, name: str = "t") -> Tensor:
        t = _tensor(t)
        lo, hi = self.t_range
        if t.device.type != "cpu" or torch.compiler.is_compiling() or torch._C._functorch.is_batchedtensor(t):
            return t
        bad = ~((t > lo if open_start else t >= lo) & (t <= hi))  # also true for NaN
        if bool(bad.any()):
            came = t[bad].flatten()[0].item()
            left, right = "(" if open_start else "[", "]" if math.isfinite(hi) else ")"
            raise ValueError(
                f"{name}: expected values in {left}{lo:g}, {hi:g}{right} for {self!r}, got {came:g}"
            )
        return t

    def _alpha(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    _sigma = _f = _g2 = _log_snr = _t_of_log_snr = _alpha


def _tensor(t: float | Tensor) -> Tensor:
    t = torch.as_tensor(t)
    return t if t.is_floating_point() else t.to(torch.get_default_dtype())


@dataclass(frozen=True)
class VP(Schedule):
    """Variance preserving (DDPM; Song et al. 2021, eq. 11), t in [0, 1].

    beta(t) = beta_min + t (beta_max - beta_min);  ln alpha = -int_0^t beta / 2;  sigma^2 = 1 - alpha^2;
    f = -beta/2;  g2 = beta.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_range = (0.0, 1.0)

    def __post_init__(self) -> None:
        if not 0 < self.beta_min <= self.beta_max < math.inf:
            raise ValueError(
                f"beta_min, beta_max: expected 0 < beta_min <= beta_max < inf, got {self.beta_min}, "
                f"{self.beta_max}"
            )

    def beta(self, t: float | Tensor) -> Tensor:
        """beta(t) = -2 f(t), of t's shape."""
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

    def _log_snr(self, t: Tensor) -> Tensor:
        return -torch.log(torch.expm1(self._integral(t)))

    def _t_of_log_snr(self, lam: Tensor) -> Tensor:
        return self._t_of_integral(torch.nn.functional.softplus(-lam))  # alpha^2 = sigmoid(lam)

    def _t_of_integral(self, integral: Tensor) -> Tensor:
        root = torch.sqrt(self.beta_min**2 + 2 * (self.beta_max - self.beta_min) * integral)
        return 2 * integral / (self.beta_min + root)  # the quadratic's root in the form that does not cancel


@dataclass(frozen=True)
class SubVP(VP):
    """Sub-VP (Song et al. 2021, eq. 13), with the standard deviation that belongs to its SDE.

    alpha as in VP;  sigma = 1 - alpha^2;  f = -beta/2;  g2 = beta (1 - alpha^4).
    """

    def _sigma(self, t: Tensor) -> Tensor:
        return -torch.expm1(-self._integral(t))

    def _g2(self, t: Tensor) -> Tensor:
        return self._beta(t) * -torch.expm1(-2 * self._integral(t))

    def _log_snr(self, t: Tensor) -> Tensor:
        return -2 * torch.log(2 * torch.sinh(self._integral(t) / 2))  # sigma/alpha = 1/alpha - alpha = 2 sinh

    def _t_of_log_snr(self, lam: Tensor) -> Tensor:
        return self._t_of_integral(2 * torch.asinh(torch.exp(-lam / 2) / 2))


@dataclass(frozen=True)
class VE(Schedule):
    """Variance exploding in its natural time: sigma = sqrt(t), alpha = 1, f = 0, g2 = 1, t in [0, inf).

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

    def _log_snr(self, t: Tensor) -> Tensor:
        return -torch.log(t)

    def _t_of_log_snr(self, lam: Tensor) -> Tensor:
        return torch.exp(-lam)


@dataclass(frozen=True)
class EDM(VE):
    """Karras et al. 2022: sigma = t, alpha = 1, f = 0, g2 = 2 t, t in [0, inf)."""

    def _sigma(self, t: Tensor) -> Tensor:
        return t.clone()

    def _g2(self, t: Tensor) -> Tensor:
        return 2 * t

    def _log_snr(self, t: Tensor) -> Tensor:
        return -2 * torch.log(t)

    def _t_of_log_snr(self, lam: Tensor) -> Tensor:
        return torch.exp(-lam / 2)


@dataclass(frozen=True)
class RectifiedFlow(Schedule):
    """Linear path (flow matching's convention, t = 1 is data): alpha = t, sigma = 1 - t, t in [0, 1].

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

    def _log_snr(self, t: Tensor) -> Tensor:
        return 2 * torch.logit(t)

    def _t_of_log_snr(self, lam: Tensor) -> Tensor:
        return torch.sigmoid(lam / 2)


class Tabulated(Schedule):
    """From a table such as diffusers' `scheduler.alphas_cumprod`: alpha_t^2 = alphas_cumprod[t], sigma_t^2 =
    1 - alpha_t^2.

    Args:
        alphas_cumprod: [T], T >= 2, strictly decreasing inside (0, 1).

    Between the integers the log-SNR lam(t) is a monotone cubic (Fritsch-Butland, C^1) through the table, t in
    [0, T-1], and alpha^2 = sigmoid(lam), f = lam' sigma^2 / 2, g2 = -lam' sigma^2: consistent with the
    interpolant by construction.

    Raises ValueError for a table that is not strictly decreasing inside (0, 1); a zero-terminal-SNR table has
    to be cut or floored (diffusers uses 2**-24) first.
    """

    def __init__(self, alphas_cumprod: Tensor) -> None:
        table = torch.as_tensor(alphas_cumprod).detach().to("cpu", torch.float64)
        if table.ndim != 1 or table.numel() < 2:
            raise ValueError(f"alphas_cumprod: expected shape [T] with T >= 2, got {list(table.shape)}")
        ok = bool((table > 0).all()) and bool((table < 1).all()) and bool((table.diff() < 0).all())
        if not ok:
            raise ValueError(
                "alphas_cumprod: expected strictly decreasing values inside (0, 1), got values from "
                f"{table[0].item():g} to {table[-1].item():g}"
            )
        self.t_range = (0.0, float(table.numel() - 1))
        self._lam = torch.logit(table)
        self._slope = _monotone_slopes(self._lam)

    def __repr__(self) -> str:
        return f"Tabulated({self._lam.numel()} steps)"

    def _cubic(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """lam(t) and lam'(t): cubic Hermite on [i, i+1]; a table of float64, evaluated in t's dtype."""
        lam, slope = self._lam.to(t.device), self._slope.to(t.device)
        i = t.detach().floor().clamp(0, lam.numel() - 2).long()
        r = t.double() - i
        y0, y1, m0, m1 = lam[i], lam[i + 1], slope[i], slope[i + 1]
        c2, c3 = 3 * (y1 - y0) - 2 * m0 - m1, m0 + m1 - 2 * (y1 - y0)
        value = y0 + r * (m0 + r * (c2 + r * c3))
        return value.to(t.dtype), (m0 + r * (2 * c2 + 3 * r * c3)).to(t.dtype)

    def _alpha(self, t: Tensor) -> Tensor:
        return torch.sqrt(torch.sigmoid(self._cubic(t)[0]))

    def _sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(torch.sigmoid(-self._cubic(t)[0]))

    def _f(self, t: Tensor) -> Tensor:
        lam, slope = self._cubic(t)
        return slope * torch.sigmoid(-lam) / 2

    def _g2(self, t: Tensor) -> Tensor:
        lam, slope = self._cubic(t)
        return -slope * torch.sigmoid(-lam)

    def _log_snr(self, t: Tensor) -> Tensor:
        return self._cubic(t)[0]

    def _t_of_log_snr(self, lam: Tensor) -> Tensor:
        if bool(((lam > self._lam[0]) | (lam < self._lam[-1])).any()):
            lo, hi = self._lam[-1].item(), self._lam[0].item()
            raise ValueError(f"log_snr: expected values in [{lo:g}, {hi:g}] for {self!r}")
        target = lam.detach().double()
        lo = torch.zeros_like(target)
        hi = lo + self.t_range[1]
        for _ in range(64):  # bisection: lam is monotone, and 2^-64 of the table's length is below rounding
            mid = (lo + hi) / 2
            above = self._cubic(mid)[0] > target
            lo, hi = torch.where(above, mid, lo), torch.where(above, hi, mid)
        return ((lo + hi) / 2).to(lam.dtype)


def _monotone_slopes(y: Tensor) -> Tensor:
    """Fritsch-Butland slopes of a cubic Hermite on the integers: harmonic means of neighbouring secants."""
    step = y.diff()
    inner = 2 * step[:-1] * step[1:] / (step[:-1] + step[1:])
    return torch.cat([step[:1], inner, step[-1:]])

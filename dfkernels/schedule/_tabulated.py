"""Schedules given by a table, such as diffusers' and NCSN's."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .._torch import check
from ._base import SLACK, Schedule, as_tensor

__all__ = ["FLOOR", "Tabulated", "TabulatedVE", "floored"]

FLOOR = 2.0**-24  # of the last entry of a table that ends without signal, as in diffusers


def floored(alphas_cumprod: Tensor) -> Tensor:
    """The table with FLOOR as its last entry or, where that is less, a quarter of the entry before,
    so that the table still falls.
    """
    return torch.cat([alphas_cumprod[:-1], (alphas_cumprod[-2:-1] / 4).clamp_max(FLOOR)])


class _Table(Schedule):
    """A log-SNR lam(t) through a table, t in [0, T-1]: a monotone cubic (Fritsch-Butland, C^1).

    Args:
        name: of the argument that the table came as.
        table: [T], its entries.
        lam: [T], their log-SNR in float64 on the CPU.
        discrete: whether t is rounded to the entries.
    """

    def __init__(self, name: str, table: Tensor, lam: Tensor, discrete: bool) -> None:
        if not isinstance(discrete, bool):
            raise TypeError(f"discrete: expected True or False, got {type(discrete).__name__}")
        equal = (lam.diff() >= 0).nonzero()
        if len(equal):
            i = int(equal[0])
            raise ValueError(
                f"{name}: expected entries whose log-SNR differs in float64, got "
                f"{table[i].item():g} at {i} and {i + 1} but for rounding"
            )
        self.t_range, self.discrete = (0.0, float(lam.numel() - 1)), discrete
        self._lam, self._slope = lam, _monotone_slopes(lam)

    def __repr__(self) -> str:
        discrete = ", discrete=True" if self.discrete else ""
        return f"{type(self).__name__}({self._lam.numel()} steps{discrete})"

    def _cubic(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The log-SNR lam(t) and its slope, by cubic Hermite polynomials in float64, in t's
        dtype.
        """
        lam, slope = self._lam.to(t.device), self._slope.to(t.device)
        i = t.detach().floor().clamp(0, lam.numel() - 2).long()
        r = t.double() - i
        y0, y1, m0, m1 = lam[i], lam[i + 1], slope[i], slope[i + 1]
        c2, c3 = 3 * (y1 - y0) - 2 * m0 - m1, m0 + m1 - 2 * (y1 - y0)
        value = y0 + r * (m0 + r * (c2 + r * c3))
        return value.to(t.dtype), (m0 + r * (2 * c2 + 3 * r * c3)).to(t.dtype)

    def _log_snr(self, t: Tensor) -> Tensor:
        return self._cubic(t)[0]

    def _t_of_log_snr(self, lam: Tensor) -> Tensor:
        """Finds the interval by bisection of the table, and the cubic's root in it by Newton's
        method. Differentiable. On the CPU in NumPy, since most calls are for one number, and
        NumPy's calls cost a fraction of torch's.
        """
        table, slope = self._lam.numpy(), self._slope.numpy()
        target = lam.detach().to("cpu", torch.float64).numpy()
        slack = SLACK * torch.finfo(lam.dtype).eps * np.maximum(1, np.abs(target))
        if not ((target <= table[0] + slack) & (target >= table[-1] - slack)).all():
            raise ValueError(
                f"log_snr: expected values in [{table[-1]:g}, {table[0]:g}] for {self!r}"
            )
        target = np.clip(target, table[-1], table[0])
        i = np.clip(np.searchsorted(-table, -target, "right") - 1, 0, len(table) - 2)
        r = _root(table[i], table[i + 1], slope[i], slope[i + 1], target)
        t = torch.from_numpy(np.asarray(i + r)).to(lam.device, lam.dtype)
        return t if not lam.requires_grad else t + (lam - lam.detach()) / self._cubic(t)[1]


class Tabulated(_Table):
    """The schedule of a table such as diffusers' `scheduler.alphas_cumprod`: alpha_t^2 =
    alphas_cumprod[t], sigma_t^2 = 1 - alpha_t^2.

    Args:
        alphas_cumprod: [T], T >= 2, strictly decreasing inside (0, 1). Of noise levels s =
            sigma/alpha, that is 1/(1 + s**2).
        discrete: for a network that knows the T timesteps only, such as one with a table of
            embeddings.

    Between the integers the log-SNR lam(t) is a monotone cubic (Fritsch-Butland, C^1) through the
    table, t in [0, T-1], and alpha^2 = sigmoid(lam), f = lam' sigma^2 / 2, g2 = -lam' sigma^2:
    consistent with the interpolant by construction.

    With discrete=True every t is rounded to the nearest integer first, wherever it is used: levels,
    `t_of_log_snr`, and so the nodes of `time_grid`, are those of trained timesteps, and a Denoiser
    gives its network that integer as int64 (k-diffusion's `quantize`). A path that is meant to be
    continuous is then a staircase: take solvers of fixed steps, and expect of a likelihood no more
    than the table's spacing at low noise gives.

    Raises:
        ValueError: The table is not strictly decreasing inside (0, 1), or two entries have the same
            log-SNR but for rounding. A zero-terminal-SNR table, which ends in 0, has to be cut, or
            its last entry floored, first: the message says how.
    """

    def __init__(self, alphas_cumprod: Tensor, *, discrete: bool = False) -> None:
        table = _entries("alphas_cumprod", alphas_cumprod)
        if not (bool(((table > 0) & (table < 1)).all()) and bool((table.diff() < 0).all())):
            came, hint = f"values from {table[0].item():g} to {table[-1].item():g}", ""
            if table[-1] == 0:
                hint = (
                    " (zero terminal SNR: cut it, alphas_cumprod[:-1], or floor the last entry "
                    "alone, at min(2**-24, alphas_cumprod[-2] / 4))"
                )
            elif table[0] == 1:
                hint = " (no noise at t = 0: cut it, alphas_cumprod[1:])"
            expected = "strictly decreasing values inside (0, 1)"
            raise check.mismatch("alphas_cumprod", expected, came + hint)
        super().__init__("alphas_cumprod", table, torch.logit(table), discrete)

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

    def _rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        lam, slope = self._cubic(t)
        alpha, sigma = torch.sqrt(torch.sigmoid(lam)), torch.sqrt(torch.sigmoid(-lam))
        return slope * alpha * sigma**2 / 2, -slope * sigma * alpha**2 / 2


class TabulatedVE(_Table):
    """The variance-exploding schedule of a table of noise levels: alpha = 1, sigma_t = sigmas[t].

    For networks that are trained on a grid of sigma only, such as NCSN's and iDDPM's (EDM's
    `round_sigma`).

    >>> schedule = TabulatedVE(grid, discrete=True)
    >>> Denoiser(network, schedule, "sample", clock=schedule.sigma)  # network(x, sigma)

    Args:
        sigmas: [T], T >= 2, positive and strictly increasing.
        discrete: as for `Tabulated`.

    Between the integers ln(sigma) is a monotone cubic (Fritsch-Butland, C^1) through the table, t
    in [0, T-1]; f = 0, g2 = 2 sigma sigma'.

    Raises:
        ValueError: The table is not positive and strictly increasing, or two entries have the same
            logarithm but for rounding.
    """

    def __init__(self, sigmas: Tensor, *, discrete: bool = False) -> None:
        table = _entries("sigmas", sigmas)
        positive = bool(((table > 0) & table.isfinite()).all())
        if not (positive and bool((table.diff() > 0).all())):
            came = f"values from {table[0].item():g} to {table[-1].item():g}"
            if bool((table.diff() < 0).all()):
                end = "[:-1]" if table[-1] == 0 else ""
                came += f" (a table that falls: pass sigmas{end}.flip(0))"
            raise check.mismatch("sigmas", "positive, strictly increasing values", came)
        super().__init__("sigmas", table, -2 * table.log(), discrete)

    def _alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def _sigma(self, t: Tensor) -> Tensor:
        return torch.exp(self._cubic(t)[0] / -2)

    def _f(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def _g2(self, t: Tensor) -> Tensor:
        lam, slope = self._cubic(t)
        return -slope * torch.exp(-lam)

    def _rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        lam, slope = self._cubic(t)
        return torch.zeros_like(t), -slope / 2 * torch.exp(lam / -2)


def _entries(name: str, table: Tensor) -> Tensor:
    """A table [T], T >= 2, in float64 on the CPU."""
    table = as_tensor(name, table).detach().to("cpu", torch.float64)
    if table.ndim != 1 or table.numel() < 2:
        raise check.mismatch(name, "shape [T] with T >= 2", list(table.shape))
    return table


def _root(
    y0: np.ndarray, y1: np.ndarray, m0: np.ndarray, m1: np.ndarray, target: np.ndarray
) -> np.ndarray:
    """The r in [0, 1] where the falling cubic Hermite from (y0, m0) to (y1, m1) meets the target
    between y0 and y1, by Newton's method, with bisection where that leaves the bracket or does not
    halve its step.
    """
    c2, c3 = 3 * (y1 - y0) - 2 * m0 - m1, m0 + m1 - 2 * (y1 - y0)
    lo, hi = np.zeros_like(target), np.ones_like(target)
    r = (target - y0) / (y1 - y0)
    last = hi - lo
    with np.errstate(divide="ignore", invalid="ignore"):  # a slope of 0: the bracket is bisected
        for _ in range(2 * 53):  # bisection every other time at least
            above = y0 - target + r * (m0 + r * (c2 + r * c3))
            lo, hi = np.where(above >= 0, r, lo), np.where(above <= 0, r, hi)
            step = above / (m0 + r * (2 * c2 + 3 * r * c3))
            new = r - step
            good = (new >= lo) & (new <= hi) & (np.abs(step) <= last / 2)
            new = np.where(good, new, (lo + hi) / 2)
            last, r = np.abs(new - r), new
            if (last <= 2**-53).all():
                break
    return r


def _monotone_slopes(y: Tensor) -> Tensor:
    """Fritsch-Butland slopes of a cubic Hermite on the integers: harmonic means of neighbouring
    secants."""
    step = y.diff()
    inner = 2 * step[:-1] * step[1:] / (step[:-1] + step[1:])
    return torch.cat([step[:1], inner, step[-1:]])

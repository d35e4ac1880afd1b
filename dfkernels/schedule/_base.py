"""What every schedule shares: the calls, the range of t, and t from whatever the caller has."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from .._torch import check

__all__ = ["SLACK", "Schedule", "as_tensor"]

# a log-SNR computed from a level at either end of the range is off by a few roundings
SLACK = 16


class Schedule:
    """The base class of the noise schedules x_t = alpha_t x_0 + sigma_t eps.

    A subclass defines `t_range`, `_alpha`, `_sigma`, `_f`, `_g2`, `_log_snr` and `_t_of_log_snr`,
    which get checked tensors, and `_rates` where the formula by f and g2 is not finite and accurate
    over the closed range.

    >>> alpha, sigma = VP()(torch.tensor([0.1, 0.5]))
    """

    t_range: tuple[float, float] = (0.0, math.inf)
    discrete: bool = False  # whether every t is rounded to an integer
    _pole: float | None = None  # the end of the range at which f and g2 are infinite

    def __call__(self, t: float | Tensor) -> tuple[Tensor, Tensor]:
        """The levels (alpha_t, sigma_t), each of t's shape."""
        t = self._time(t)
        return self._alpha(t), self._sigma(t)

    def alpha(self, t: float | Tensor) -> Tensor:
        """The scale of the data, alpha_t, of t's shape."""
        return self._alpha(self._time(t))

    def sigma(self, t: float | Tensor) -> Tensor:
        """The scale of the noise, sigma_t, of t's shape; 0 at the data end."""
        return self._sigma(self._time(t))

    def f(self, t: float | Tensor) -> Tensor:
        """The drift f = d ln(alpha)/dt, of t's shape."""
        return self._f(self._time(t, self._pole))

    def g2(self, t: float | Tensor) -> Tensor:
        """The diffusion g^2 = d(sigma^2)/dt - 2 f sigma^2, of t's shape. Negative where the noise
        falls with t (RectifiedFlow).
        """
        return self._g2(self._time(t, self._pole))

    def rates(self, t: float | Tensor) -> tuple[Tensor, Tensor]:
        """The derivatives (d alpha/dt, d sigma/dt), each of t's shape, over the whole closed range:
        finite where f and g2 are not, but for d sigma/dt = inf where sigma starts as a square root
        (VP and VE at t = 0).
        """
        return self._rates(self._time(t))

    def log_snr(self, t: float | Tensor) -> Tensor:
        """The log-SNR ln(alpha_t^2/sigma_t^2), of t's shape; +inf where sigma_t = 0."""
        return self._log_snr(self._time(t))

    def t_of_log_snr(self, log_snr: float | Tensor) -> Tensor:
        """The time with a given log-SNR: the inverse of `log_snr`.

        Raises:
            ValueError: It lies outside the schedule's range.
        """
        t = self._t_of_log_snr(as_tensor("log_snr", log_snr))
        lo, hi = self.t_range
        slack = SLACK * torch.finfo(t.dtype).eps * max(hi, 1.0) if math.isfinite(hi) else 0.0
        inside = (t >= lo - slack) & (t <= hi + slack)
        snapped = torch.where(inside, t.clamp(lo, hi), t)  # the ends, up to rounding
        return self._time(snapped, name="t_of_log_snr(log_snr)")

    def _time(self, t: float | Tensor, pole: float | None = None, name: str = "t") -> Tensor:
        t = as_tensor(name, t)
        lo, hi = self.t_range
        if not check.values_hidden(t):
            bad = ~((t >= lo) & (t <= hi) & (t < math.inf))  # also true for NaN
            if pole is not None:
                bad = bad | (t == pole)
            if bool(bad.any()):
                came = t[bad].flatten()[0].item()
                left = "(" if pole == lo else "["
                right = "]" if math.isfinite(hi) and pole != hi else ")"
                raise ValueError(
                    f"{name}: expected values in {left}{lo:g}, {hi:g}{right} for {self!r}, "
                    f"got {came:g}"
                )
        return t.round() if self.discrete else t

    def _exists(self, what: str, ok: Tensor, why: str, t: Tensor) -> None:
        """Refuses times t at which, `why`, there is no such thing as `what`: those not `ok`."""
        if not check.values_hidden(ok) and not bool(ok.all()):
            at = t.expand(ok.shape)[~ok].flatten()[0].item()
            raise ValueError(f"t: {what} does not exist where {why}, as at t = {at:g} of {self!r}")

    def _alpha(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    _sigma = _f = _g2 = _log_snr = _alpha

    def _t_of_log_snr(self, lam: Tensor) -> Tensor:
        raise NotImplementedError

    def _rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        f, sigma = self._f(t), self._sigma(t)
        return f * self._alpha(t), f * sigma + self._g2(t) / (2 * sigma)


def as_tensor(name: str, t: object) -> Tensor:
    """A dense floating tensor of whatever a caller passes for t: numbers and integers in float64,
    all else in its own dtype and on its own device (NumPy's on the CPU).
    """
    if isinstance(t, (int, float)) and not isinstance(t, bool) and not isinstance(t, np.generic):
        try:
            return torch.tensor(t, dtype=torch.float64, device="cpu")
        except (OverflowError, RuntimeError):
            raise check.mismatch(name, "a number in float64", t) from None
    if not isinstance(t, Tensor):
        t = _from_numpy(name, t)
    check.tensor(name, t)
    if t.dtype == torch.bool or t.is_complex():
        raise TypeError(f"{name}: expected real numbers, got {t.dtype}")
    return t if t.is_floating_point() else t.double()


def _from_numpy(name: str, t: object) -> Tensor:
    if isinstance(t, np.ma.MaskedArray):
        raise TypeError(
            f"{name}: expected a number or an array without a mask, got a masked array: fill it"
        )
    try:
        array = np.asarray(t)
    except (TypeError, ValueError):
        array = np.asarray(None)
    if array.dtype.kind not in "fiu":  # also what no array can hold, such as a Fraction
        return torch.tensor(check.constant(name, t), dtype=torch.float64, device="cpu")
    wide = array.dtype.kind != "f" or array.dtype.itemsize > 8 or not isinstance(t, np.ndarray)
    native = np.float64 if wide else array.dtype.newbyteorder("=")
    return torch.from_numpy(np.array(array, dtype=native, order="C"))

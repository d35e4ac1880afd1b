"""Denoiser: a network of any convention, or the data set itself, as eps, posterior mean and score."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import _check
from ..cloud import PointCloud
from ..fisher import DiffusionFisher
from ..schedule import Schedule

__all__ = ["PREDICTION_TYPES", "Denoiser"]

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "flow")


class Denoiser:
    """What a network predicts at x_t = alpha x_0 + sigma eps, in every parametrisation.

    Args:
        network: `network(x, t)` with x [B, *E] and t [B] (the schedule's t, in x's dtype) -> [B, *E].
        schedule: maps t to alpha, sigma, f, g2.
        prediction_type: what the network returns:
            "epsilon": the noise eps (DDPM); "sample": the clean sample x_0 (with schedule.EDM, t = sigma, this
            is EDM's `model(x, sigma)`); "v_prediction": alpha eps - sigma x_0 (Salimans & Ho 2022, VP);
            "flow": the velocity dx_t/dt = f x + g2 eps / (2 sigma) (with schedule.RectifiedFlow, x_0 - eps).

    `evaluations` counts calls of the network. Every result is checked: ValueError naming `network` for another
    shape, dtype, NaN or inf (values are not looked at on an accelerator, under torch.func or torch.compile).
    """

    def __init__(
        self,
        network: Callable[[Tensor, Tensor], Tensor],
        schedule: Schedule,
        prediction_type: str = "epsilon",
    ) -> None:
        if not callable(network):
            raise TypeError(f"network: expected a callable network(x, t), got {type(network).__name__}")
        if not isinstance(schedule, Schedule):
            raise TypeError(f"schedule: expected a dfkernels.schedule, got {type(schedule).__name__}")
        _check.choice("prediction_type", prediction_type, PREDICTION_TYPES)
        self.network, self.schedule, self.prediction_type = network, schedule, prediction_type
        self.evaluations = 0

    @classmethod
    def exact(cls, cloud: PointCloud, schedule: Schedule, *, tolerance: float | None = None) -> Denoiser:
        """The ideal denoiser of a finite data set: exact, differentiable in x, and it memorises. tolerance: as
        in `DiffusionFisher`.
        """

        def mean(x: Tensor, t: Tensor) -> Tensor:
            return DiffusionFisher(x, cloud, *schedule(t), tolerance=tolerance).denoised

        return cls(mean, schedule, "sample")

    def __repr__(self) -> str:
        return f"Denoiser({type(self.network).__name__}, {self.schedule!r}, {self.prediction_type!r})"

    def levels(self, x: Tensor, t: float | Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma), each [B] in x's dtype, evaluated in t's (a number: in float64)."""
        t = _time(x, t)
        alpha, sigma = self.schedule(t)
        return alpha.to(x.dtype), sigma.to(x.dtype)

    def eps(self, x: Tensor, t: float | Tensor) -> Tensor:
        """The noise prediction, [B, *E]; the score is -eps/sigma. One call of the network."""
        return self.both(x, t)[0]

    def denoised(self, x: Tensor, t: float | Tensor) -> Tensor:
        """The prediction of x_0, [B, *E], an approximation of the posterior mean. One call of the network."""
        return self.both(x, t)[1]

    def score(self, x: Tensor, t: float | Tensor) -> Tensor:
        """-eps/sigma, [B, *E]. One call of the network."""
        return -self.eps(x, t) / _column(self.levels(x, t)[1], x)

    def both(self, x: Tensor, t: float | Tensor) -> tuple[Tensor, Tensor]:
        """(eps, denoised) by one call of the network."""
        t = _time(x, t)
        alpha, sigma = (_column(level, x) for level in self.levels(x, t))
        out = self._call(x, t)
        if self.prediction_type == "sample":
            return (x - alpha * out) / sigma, out
        if self.prediction_type == "epsilon":
            eps = out
        elif self.prediction_type == "v_prediction":
            eps = (sigma * x + alpha * out) / (alpha**2 + sigma**2)
        else:
            f, g2 = (_column(rate.to(x.dtype), x) for rate in (self.schedule.f(t), self.schedule.g2(t)))
            eps = (out - f * x) * 2 * sigma / g2
        return eps, (x - sigma * eps) / alpha

    def _call(self, x: Tensor, t: Tensor) -> Tensor:
        out = self.network(x, t.to(x.dtype))
        self.evaluations += 1
        checked("network", out, x, t)
        return out


def checked(name: str, out: Tensor, like: Tensor, t: Tensor) -> None:
    """Raises ValueError / TypeError where a network's output is not finite or not like a tensor."""
    if not isinstance(out, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(out).__name__}")
    if out.shape != like.shape:
        raise ValueError(f"{name}: expected output of shape {list(like.shape)}, got {list(out.shape)}")
    if out.dtype != like.dtype:
        raise TypeError(f"{name}: expected output of dtype {like.dtype}, got {out.dtype}")
    if (
        out.device.type != "cpu"
        or torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
    ):
        return
    bad = ~out.detach().isfinite().flatten(1).all(1) if out.ndim > 1 else ~out.detach().isfinite()
    if bool(bad.any()):
        first = int(bad.nonzero()[0])
        raise ValueError(
            f"{name}: returned NaN or inf for {int(bad.sum())} of {len(bad)} samples, first for sample {first} "
            f"at t = {t[first].item():g}"
        )


def _time(x: Tensor, t: float | Tensor) -> Tensor:
    _check.query("x", x)
    t = t if isinstance(t, Tensor) else torch.tensor(float(t), dtype=torch.float64)
    if t.ndim and t.shape != x.shape[:1]:
        raise _check.mismatch("t", f"a number, shape [] or [{x.shape[0]}]", f"shape {list(t.shape)}")
    t = t if t.is_floating_point() else t.to(x.dtype)
    return t.to(x.device).expand(x.shape[0])


def _column(level: Tensor, x: Tensor) -> Tensor:
    return level.view(-1, *[1] * (x.ndim - 1))

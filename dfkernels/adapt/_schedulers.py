"""What a scheduler of diffusers says about its models: the level of a timestep, what the model is
given and what it returns. `dfkernels/adapt/diffusers.py` has the conventions in words.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .._torch import check
from ._exact import Exact, column

__all__ = ["Convention", "Edm", "Flow", "Table", "Ve", "convention"]

_FLOW = {
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
}
# The levels of their second calls per step are not in `sigmas`; the times are, by interpolation.
_BETWEEN = {"KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "DPMSolverSDEScheduler"}
_PREDICTIONS = {
    "epsilon": "epsilon",
    "sample": "sample",
    "original_sample": "sample",
    "v_prediction": "v_prediction",
    "flow_prediction": "flow",
}
_KNOWN = (
    "a scheduler with alphas_cumprod and config.prediction_type, FlowMatchEulerDiscreteScheduler, "
    "FlowMatchHeunDiscreteScheduler, FlowMatchLCMScheduler, EDMEulerScheduler, "
    "EDMDPMSolverMultistepScheduler, CosineDPMSolverMultistepScheduler or ScoreSdeVeScheduler"
)


class Convention:
    """What a scheduler says about its models. `prediction` is one of `Denoiser`'s types."""

    def __init__(self, scheduler: Any, prediction: str) -> None:
        self.scheduler, self.prediction = scheduler, prediction

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma), each [B] in float64, at timesteps [B].

        Raises:
            ValueError: The scheduler has no such timestep.
        """
        found, listed = self._listed(t)
        if bool(listed.all()):
            return self.levels_of(found)
        alpha, sigma = self.levels_of(found)
        others = self.levels_at(torch.where(listed, self._any_time(), t))
        return torch.where(listed, alpha, others[0]), torch.where(listed, sigma, others[1])

    def levels_of(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """The levels at an entry of `scheduler.sigmas`."""
        return torch.ones_like(s), s

    def levels_at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The levels at a time that is not in `scheduler.timesteps`."""
        raise NotImplementedError

    def _any_time(self) -> float:
        """A time that `levels_at` takes."""
        return 0.5

    def _listed(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The entries of `scheduler.sigmas` at the times t, and whether the time is listed there.

        Timesteps are rounded by some schedulers: of several equal ones the current step counts.
        """
        steps = getattr(self.scheduler, "timesteps", None)
        sigmas = getattr(self.scheduler, "sigmas", None)
        if (
            not isinstance(sigmas, Tensor)
            or not isinstance(steps, Tensor)
            or len(sigmas) < len(steps)
        ):
            return torch.ones_like(t), torch.zeros_like(t, dtype=torch.bool)
        sigmas = sigmas[: len(steps)].to(t.device, torch.float64)
        same = t[:, None] == steps.to(t.device, torch.float64)
        if type(self.scheduler).__name__ in _BETWEEN:
            same[:, 1::2] = False
        index = same.int().argmax(1)
        step = getattr(self.scheduler, "step_index", None)
        if step is not None and step < len(steps):
            index = torch.where(same[:, step], step, index)
        return sigmas[index], same.any(1)

    def output(self, exact: Exact) -> Tensor:
        """What the model returns, from the exact answer."""
        if self.prediction == "sample":
            return exact.mean
        if self.prediction == "epsilon":
            return exact.eps
        if self.prediction == "flow":
            return exact.eps - exact.mean
        eps = column(exact.alpha, exact.x) * exact.eps
        return eps - column(exact.sigma, exact.x) * exact.mean

    def scale(self, sigma: Tensor) -> Tensor | None:
        """What the model's input has to be multiplied by to be x; None for 1."""
        return None


class Table(Convention):
    """alpha^2 = alphas_cumprod[t], between the integers with ln(sigma/alpha) linear in t, as the
    schedulers' `_sigma_to_t` has it; `scheduler.sigmas` are sigma/alpha.
    """

    def levels_of(self, s: Tensor) -> tuple[Tensor, Tensor]:
        alpha = torch.rsqrt(1 + s * s)
        return alpha, s * alpha

    def levels_at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        table = self.scheduler.alphas_cumprod.to(t.device, torch.float64)
        known = (t >= 0) & (t <= len(table) - 1)
        if not bool(known.all()):
            outside = t[~known][0].item()
            raise check.mismatch("timestep", f"times in [0, {len(table) - 1}]", f"{outside:g}")
        index = t.long().clamp(max=len(table) - 2)
        part = t - index
        log_snr = torch.logit(table)
        between = torch.sigmoid((1 - part) * log_snr[index] + part * log_snr[index + 1])
        squared = torch.where(
            part > 0, torch.where(part < 1, between, table[index + 1]), table[index]
        )
        return squared.sqrt(), (1 - squared).sqrt()

    def _any_time(self) -> float:
        return 0.0


class Flow(Convention):
    """alpha = 1 - sigma; the other way round for a clock that runs backwards."""

    @property
    def backwards(self) -> bool:
        return bool(getattr(self.scheduler.config, "invert_sigmas", False))

    def levels_of(self, s: Tensor) -> tuple[Tensor, Tensor]:
        return (s, 1 - s) if self.backwards else (1 - s, s)

    def levels_at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        steps = self.scheduler.config.num_train_timesteps
        if not bool(((t >= 0) & (t <= steps)).all()):
            outside = t[~((t >= 0) & (t <= steps))][0].item()
            raise check.mismatch("timestep", f"times in [0, {steps}]", f"{outside:g}")
        return self.levels_of(t / steps)

    def output(self, exact: Exact) -> Tensor:
        out = super().output(exact)
        return -out if self.backwards and self.prediction == "flow" else out


class Edm(Convention):
    """alpha = 1, with EDM's preconditioning; `sigma_data` and the clock are the scheduler's."""

    def __init__(self, scheduler: Any, prediction: str) -> None:
        super().__init__(scheduler, prediction)
        self.sigma_data = float(getattr(scheduler.config, "sigma_data", 1.0))
        self.sign = -1.0 if prediction == "v_prediction" else 1.0
        self.cosine = type(scheduler).__name__.startswith("Cosine")

    def noise(self, sigma: Tensor) -> Tensor:
        """What the model is given as its time."""
        return torch.atan(sigma) * (2 / math.pi) if self.cosine else torch.log(sigma) / 4

    def levels_at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        # up to the sigma whose square float32 has
        name, low, high = ("2 atan(sigma)/pi", 0, 1) if self.cosine else ("ln(sigma)/4", -11, 11)
        known = (t >= low) & (t <= high)
        if not bool(known.all()):
            came = f"{t[~known][0].item():g}"
            raise check.mismatch("timestep", f"times {name} in [{low}, {high}]", came)
        return self.levels_of(torch.tan(t * (math.pi / 2)) if self.cosine else torch.exp(4 * t))

    def scale(self, sigma: Tensor) -> Tensor:
        return torch.sqrt(sigma**2 + self.sigma_data**2)

    def coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """(c_skip, c_out): x_0 = c_skip x + c_out F."""
        scale = self.scale(sigma)
        return self.sigma_data**2 / scale**2, self.sign * sigma * self.sigma_data / scale

    def output(self, exact: Exact) -> Tensor:
        skip, out = self.coefficients(exact.sigma)
        return (exact.mean - column(skip, exact.x) * exact.x) * column(1 / out, exact.x)


class Ve(Convention):
    """alpha = 1; the model is given sigma and returns the score."""

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.levels_of(t)

    def output(self, exact: Exact) -> Tensor:
        return exact.eps * column(-1 / exact.sigma, exact.x)


def convention(scheduler: Any) -> Convention:
    """The convention of a scheduler.

    Raises:
        ValueError: Its class is unknown, or its configuration says what no model does; the message
            names it and what is known.
    """
    kind, config = type(scheduler).__name__, getattr(scheduler, "config", None)
    classes = {c.__name__ for c in type(scheduler).__mro__}
    said = getattr(config, "prediction_type", None)
    if classes & _FLOW:
        return Flow(scheduler, "flow")
    if "ScoreSdeVeScheduler" in classes:
        return Ve(scheduler, "epsilon")
    tabulated = isinstance(getattr(scheduler, "alphas_cumprod", None), Tensor)
    edm = hasattr(scheduler, "precondition_outputs") and hasattr(config, "sigma_data")
    if said is None or not (tabulated or edm):
        raise ValueError(f"scheduler: expected {_KNOWN}, got {kind}")
    if hasattr(config, "shift") and "prediction_type" in getattr(config, "_use_default_values", ()):
        raise ValueError(
            f"scheduler: expected a {kind} that says what the model predicts, got one made of a "
            f"flow model's configuration (its `shift`) with {said!r} by default: make it with "
            'from_config(config, use_flow_sigmas=True, prediction_type="flow_prediction")'
        )
    flow = bool(getattr(config, "use_flow_sigmas", False))
    allowed = [
        name
        for name in _PREDICTIONS
        if name in (("epsilon", "v_prediction") if edm else _PREDICTIONS)
        and (name != "v_prediction" or not flow)
        and (name != "flow_prediction" or flow)
    ]
    if said not in allowed:
        raise ValueError(
            f"scheduler: expected prediction_type {' or '.join(allowed)}, got {said!r} of {kind}"
        )
    if flow:
        return Flow(scheduler, _PREDICTIONS[said])
    continuous = getattr(config, "timestep_type", None) == "continuous" and said == "v_prediction"
    return (Edm if edm or continuous else Table)(scheduler, _PREDICTIONS[said])

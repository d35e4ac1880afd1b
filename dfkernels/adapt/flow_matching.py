"""flow_matching, torchcfm and others in which t = 1 is data: networks that return a velocity.

The convention, as read in flow_matching 1.0.10 (path/affine.py, path/scheduler, solver/ode_solver)
and torchcfm 1.0.7 (conditional_flow_matching.py): x_t = alpha_t x_1 + sigma_t x_0 with noise x_0
and data x_1 (what this library calls eps and x_0), the velocity is dx_t/dt. flow_matching calls
`velocity(x=x, t=t)` with t [] from its solver and t [B] in training; its `scheduler(t)` has
alpha_t, sigma_t, d_alpha_t and d_sigma_t. torchcfm, like torchdyn and torchdiffeq, calls `f(t, x)`;
its paths say mean and width: x_t ~ N(mu_t(x_0, x_1), sigma_t^2), so that the noise is that of x_0
and that of the width together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._torch import check
from ..law import Law
from ..methods.denoiser import Denoiser
from ..schedule import RectifiedFlow, Schedule
from ._adapted import Adapted
from ._exact import ExactNetwork, column, positive, times
from ._levels import Levels

__all__ = [
    "ExactTimeFirst",
    "ExactVelocity",
    "as_torchcfm",
    "as_velocity",
    "from_flow_matching",
    "from_torchcfm",
]


def from_flow_matching(velocity: Callable[..., Tensor], path: object) -> Denoiser:
    """The denoiser of a velocity model of flow_matching.

    >>> denoiser = from_flow_matching(model, CondOTProbPath())
    >>> nats = df.log_prob(denoiser, x_1, (0.01, 50.0), "hutchinson").log_prob

    Args:
        velocity: `velocity(x=x, t=t, **extras)` -> dx_t/dt.
        path: the affine path that it was trained on, with independent noise and data, or its
            scheduler: `scheduler(t)` -> an object with alpha_t and sigma_t, differentiable PyTorch.

    Returns:
        A `Denoiser` with the clock of flow_matching, data at t = 1, and the prediction type "flow".

    Raises:
        TypeError: `path` is neither, or a path of flow_matching that is not affine: geodesic, or of
            discrete states.
    """
    return Denoiser(_Named(velocity, "velocity"), affine_path(path), "flow")


def from_torchcfm(network: Callable[..., Tensor], path: object = 0.0) -> Denoiser:
    """The denoiser of a network of torchcfm, `network(t, x)`.

    >>> denoiser = from_torchcfm(UNetModelWrapper(...), ConditionalFlowMatcher(sigma=0.1))
    >>> joined = methods.Called(mlp, lambda mlp, t, x: mlp(torch.cat([x, t[:, None]], 1)))
    >>> denoiser = from_torchcfm(joined, 0.1)

    Args:
        network: `network(t, x, **conditions)` -> dx_t/dt, with t [B]. A `torch_wrapper` of
            torchcfm, which takes one time only, is called through its model.
        path: the flow matcher that it was trained with, or the number `sigma` of a
            ConditionalFlowMatcher.

    Returns:
        A `Denoiser` with torchcfm's clock, data at t = 1, and the prediction type "flow".

    Raises:
        ValueError: The flow matcher couples noise to data (optimal transport, Schrodinger bridge):
            the velocity then says nothing of a posterior mean or a score. To sample and for
            likelihoods, which need the velocity alone, give its sigma.
    """
    return Denoiser(_TimeFirst(network), flow_matcher(path), "flow")


class _Named(Adapted):
    """A velocity model that is called by the names of its arguments, as flow_matching does."""

    def forward(self, x: Tensor, t: Tensor, **extras: object) -> Tensor:
        return self.network(x=x, t=t, **extras)


class _TimeFirst(Adapted):
    """A network that takes t before x."""

    def __init__(self, network: Any) -> None:
        joined = type(network).__name__ == "torch_wrapper"
        super().__init__(network.model if joined else network, "network")
        self.joined = joined

    def forward(self, x: Tensor, t: Tensor, **conditions: object) -> Tensor:
        if self.joined:
            return self.network(torch.cat([x, t[:, None]], 1))
        return self.network(t, x, **conditions)


def as_velocity(cloud: Law, path: object, *, tolerance: float | None = None) -> ExactVelocity:
    """The data set as a velocity model of flow_matching: `velocity(x, t)`, for its ODESolver.

    >>> solver = ODESolver(as_velocity(cloud, CondOTProbPath()))
    >>> x = solver.sample(x_init=noise, step_size=0.05, method="midpoint")

    Args:
        cloud: the atoms.
        path: an affine path (an object with a `scheduler`), or its scheduler: `scheduler(t)` -> an
            object with alpha_t, sigma_t, d_alpha_t, d_sigma_t.
        tolerance: as in `DiffusionFisher`.

    The velocity d_alpha E[x_1 | x] + d_sigma E[x_0 | x] is the minimum of the conditional
    flow-matching loss over all functions, for independent noise and data (Lipman et al. 2023,
    theorem 1). It does not exist where sigma = 0, at t = 1: solvers that ask there, such as
    "dopri5", have to stop earlier.
    """
    return ExactVelocity(cloud, affine_path(path), tolerance)


def as_torchcfm(
    cloud: Law, path: object = 0.0, *, tolerance: float | None = None
) -> ExactTimeFirst:
    """The data set as a network of torchcfm, torchdyn or torchdiffeq: `network(t, x)`.

    >>> x = torchdiffeq.odeint(as_torchcfm(cloud), noise, torch.tensor([0.0, 0.99]))

    Args:
        cloud: the atoms.
        path: a flow matcher of torchcfm, or the number `sigma` of its ConditionalFlowMatcher.
        tolerance: as in `DiffusionFisher`.

    Raises:
        ValueError: The flow matcher couples noise to data (optimal transport, Schrodinger bridge):
            its velocity has no closed form.
    """
    return ExactTimeFirst(cloud, flow_matcher(path), tolerance)


class _Exact(ExactNetwork):
    """What both orders of arguments share."""

    def __init__(self, cloud: Law, schedule: Schedule, tolerance: float | None) -> None:
        super().__init__(cloud, tolerance)
        self.schedule = schedule

    def velocity(self, x: Tensor, t: float | Tensor) -> Tensor:
        t = times("t", t, x)
        alpha, sigma = self.schedule(t)
        alpha_rate, sigma_rate = self.schedule.rates(t)
        exact = self.exact(x, alpha, positive("t", sigma, t))
        out = column(alpha_rate, exact.x) * exact.mean + column(sigma_rate, exact.x) * exact.eps
        return out.to(x.dtype)


class ExactVelocity(_Exact):
    """What `as_velocity` returns: `velocity(x, t)`."""

    def forward(self, x: Tensor, t: float | Tensor) -> Tensor:
        """The velocity dx_t/dt, [B, *E] in x's dtype.

        Args:
            x: [B, *E], floating.
            t: one number or B.

        Raises:
            ValueError: sigma = 0 at t.
        """
        return self.velocity(x, t)


class ExactTimeFirst(_Exact):
    """What `as_torchcfm` returns: `network(t, x)`."""

    def forward(self, t: float | Tensor, x: Tensor) -> Tensor:
        """The velocity dx_t/dt, [B, *E] in x's dtype; see `ExactVelocity.forward`."""
        return self.velocity(x, t)


def affine_path(path: Any) -> Schedule:
    """The schedule of an affine path of flow_matching, or of its scheduler."""
    # what geodesic and discrete paths have, whose schedulers are those of affine paths
    if hasattr(path, "manifold") or hasattr(path, "posterior_to_velocity"):
        raise TypeError(
            f"path: expected an affine path, x_t = alpha x_1 + sigma x_0, got {type(path).__name__}"
        )
    scheduler = getattr(path, "scheduler", path)
    probe = scheduler(_half()) if callable(scheduler) else None
    missing = [name for name in ("alpha_t", "sigma_t") if not hasattr(probe, name)]
    if missing:
        raise TypeError(
            "path: expected a path with a `scheduler`, or a scheduler(t) whose result has alpha_t "
            f"and sigma_t, got {type(path).__name__}"
        )

    if type(scheduler).__name__ == "CondOTScheduler":
        return RectifiedFlow()

    def levels(t: Tensor) -> tuple[Tensor, Tensor]:
        out = scheduler(t)
        return out.alpha_t, out.sigma_t

    return Levels(levels, (0.0, 1.0), type(scheduler).__name__)


def flow_matcher(path: Any) -> Schedule:
    """The schedule of a flow matcher of torchcfm, or of the number sigma of the basic one."""
    if hasattr(path, "ot_sampler"):
        raise ValueError(
            f"path: expected a flow matcher with independent noise and data, got "
            f"{type(path).__name__}, which couples them"
        )
    if not hasattr(path, "compute_mu_t"):
        width = check.constant("path", path)
        if width < 0:
            raise check.mismatch("path", "a flow matcher or its sigma >= 0", path)
        if width == 0:
            return RectifiedFlow()
        return Levels(
            lambda t: (t, torch.sqrt((1 - t) ** 2 + width**2)), (0.0, 1.0), f"CFM(sigma={width:g})"
        )

    def levels(t: Tensor) -> tuple[Tensor, Tensor]:
        at = t.reshape(-1)
        zero, one = torch.zeros_like(at)[:, None], torch.ones_like(at)[:, None]
        alpha, noise = path.compute_mu_t(zero, one, at), path.compute_mu_t(one, zero, at)
        width = path.compute_sigma_t(at)
        sigma = noise[:, 0]
        if isinstance(width, Tensor) or width != 0:
            sigma = torch.sqrt(sigma**2 + width**2)
        return alpha.reshape(t.shape), sigma.reshape(t.shape)

    return Levels(levels, (0.0, 1.0), type(path).__name__)


def _half() -> Tensor:
    return torch.tensor([0.5], dtype=torch.float64, device="cpu")

"""score_sde: networks with the SDE classes VPSDE, subVPSDE and VESDE.

The convention, as in score_sde_pytorch (models/utils.py, sde_lib.py): `sde.marginal_prob(x, t)` ->
(alpha x, sigma [B]) for images x [B, C, H, W] and t in [0, 1]. A network trained on VPSDE or
subVPSDE is given 999 t and returns the noise eps; one trained on VESDE is given sigma and returns
the score itself. Trained on discrete steps (`continuous=False`), it is given (N - 1) t, or counts
the noise levels from the largest, rounded, for VESDE.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..methods.denoiser import Denoiser
from ..schedule import VP, GeometricVE, Schedule, SubVP, Tabulated, TabulatedVE

__all__ = ["from_score_sde"]


def from_score_sde(model: Callable[..., Tensor], sde: Any, *, continuous: bool = True) -> Denoiser:
    """The denoiser of a network of score_sde, with the clock of its SDE.

    >>> denoiser = from_score_sde(score_model, VPSDE(beta_min=0.1, beta_max=20))
    >>> t = df.time_grid(denoiser.schedule, 100, (0.01, 100))

    Args:
        model: `model(x, labels, **conditions)`, as the repository's `get_score_fn` calls it.
        sde: its VPSDE or subVPSDE, with `beta_0`, `beta_1`, or VESDE, with `sigma_min`,
            `sigma_max`, or an object with these and `marginal_prob`.
        continuous: as in its configuration files; False with VPSDE and VESDE makes a discrete
            schedule, with timesteps 0 to N - 1 from the least noise upwards, at the levels of
            `sde.alphas_cumprod` or `sde.discrete_sigmas`.

    Returns:
        A `Denoiser` with the prediction type "epsilon"; "score" for VESDE.

    Raises:
        ValueError: The SDE has other levels than these three; the message says which it has.
    """
    schedule = _schedule(sde)
    if isinstance(schedule, GeometricVE):
        if continuous:
            return Denoiser(model, schedule, "score", clock=schedule.sigma)
        levels = TabulatedVE(sde.discrete_sigmas, discrete=True)
        last = int(levels.t_range[1])
        return Denoiser(model, levels, "score", clock=lambda t: last - t.long())
    if continuous or isinstance(schedule, SubVP):
        return Denoiser(model, schedule, clock=lambda t: 999 * t)
    levels = Tabulated(sde.alphas_cumprod, discrete=True)
    return Denoiser(model, levels, clock=lambda t: t)  # an integer, but in the network's dtype


def _schedule(sde: Any) -> Schedule:
    """The schedule whose levels `sde.marginal_prob` has."""
    if not callable(getattr(sde, "marginal_prob", None)):
        raise TypeError(f"sde: expected an SDE with marginal_prob, got {type(sde).__name__}")
    t = torch.tensor([0.25, 0.5, 1.0], dtype=torch.float64, device="cpu")
    alpha, sigma = sde.marginal_prob(t.new_ones(3, 1, 1, 1), t)
    candidates: list[Schedule] = []
    if hasattr(sde, "beta_0") and hasattr(sde, "beta_1"):
        candidates = [VP(sde.beta_0, sde.beta_1), SubVP(sde.beta_0, sde.beta_1)]
    elif hasattr(sde, "sigma_min") and hasattr(sde, "sigma_max"):
        candidates = [GeometricVE(sde.sigma_min, sde.sigma_max)]
    for schedule in candidates:
        wanted = torch.stack(schedule(t))
        if torch.allclose(
            torch.stack([alpha.reshape(3), sigma.reshape(3)]).to(wanted), wanted, rtol=1e-5
        ):
            return schedule
    raise ValueError(
        "sde: expected the levels of VPSDE, subVPSDE (beta_0, beta_1) or VESDE (sigma_min, "
        f"sigma_max), got {type(sde).__name__} with alpha {alpha.flatten().tolist()} and sigma "
        f"{sigma.flatten().tolist()} at t = {t.tolist()}"
    )

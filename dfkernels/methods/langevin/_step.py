"""From a state to the proposal of its next step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..._fisher_operator import FisherOperator
from ..._torch import check
from ..._torch.shapes import flat
from ...fisher import DiffusionFisher
from .._own_fisher import in_units, own_fisher
from ..denoiser import Denoiser
from ._proposals import Isotropic, Krylov, Proposal, RankOne, Spectral, of_spectrum
from .printed_correction import printed_correction

__all__ = ["Settings", "State", "at"]


class State(NamedTuple):
    """What is known at a state x [B, *E]."""

    x: Tensor
    eps: Tensor  # [B, *E]
    fisher: FisherOperator

    @property
    def log_prob(self) -> Tensor:
        """log q of a data set, [B] in float64."""
        assert isinstance(self.fisher, DiffusionFisher)
        return self.fisher.log_prob.double()


def at(denoiser: Denoiser, x: Tensor, t: float | Tensor, mode: str) -> State:
    return State(x, *own_fisher(denoiser, x, t, mode))


@dataclass(frozen=True)
class Settings:
    """How `langevin` steps; its arguments, checked."""

    preconditioner: str
    step_size: float
    damping: float
    x0: Tensor | None
    lanczos: int
    metropolis: bool

    def propose(self, state: State) -> Proposal | Krylov:
        """The proposal at a state, with sigma^2 score = -sigma eps for the drift."""
        x, sigma = flat(state.x), state.fisher.sigma[:, None]
        drift = -sigma * flat(state.eps)
        if self.preconditioner == "rank-one":
            return self._rank_one(state, x, drift)
        if self.preconditioner in ("none", "paper"):
            if self.preconditioner == "paper":
                drift = printed_correction(drift, self.damping)
            return Isotropic(x + self.step_size * drift, 2 * self.step_size * sigma**2)
        if not self.metropolis:
            apply = in_units(state.fisher)
            return Krylov(x, apply, self._factor, drift, self.step_size, sigma, self.lanczos)
        dense = sigma[..., None] ** 2 * state.fisher.to_dense()
        values, vectors = torch.linalg.eigh(dense)
        factors = self._factor(values)
        mean = x + self.step_size * of_spectrum(vectors, factors, drift)
        return Spectral(mean, 2 * self.step_size * sigma**2 * factors, vectors)

    def _factor(self, values: Tensor) -> Tensor:
        """M/sigma^2 as a function of the eigenvalues of S = sigma^2 F."""
        if self.preconditioner == "gibbs":
            # those above 1 are rounding, or a network's error: no covariance is negative
            return 1 + (1 - values).clamp_min(0)
        return 1 / (values.abs() + self.damping)

    def _rank_one(self, state: State, x: Tensor, drift: Tensor) -> RankOne:
        """M/sigma^2 = (a I - u u^T)^(-1) = (I + c u u^T)/a with a = 1 + damping, c = 1/(a - |u|^2)
        and u = (alpha/sigma) r, the difference of two noises, which has a value at alpha = 0 too.
        """
        assert self.x0 is not None
        alpha, sigma = state.fisher.alpha[:, None], state.fisher.sigma[:, None]
        u = flat(state.eps) - (x - alpha * flat(self.x0)) / sigma
        a = 1 + self.damping
        left = a - u.square().sum(1, keepdim=True)
        if bool((left <= 0).any()):
            i = int(left[:, 0].argmin())
            raise check.mismatch(
                "damping",
                "more than (alpha/sigma)^2 |x0 - mean|^2 - 1 for preconditioner 'rank-one', "
                f"{self.damping - left[i].item():.4g} at sample {i}",
                f"{self.damping:g}",
            )
        along = (u * drift).sum(1, keepdim=True) / left
        mean = x + self.step_size / a * (drift + along * u)
        return RankOne(mean, 2 * self.step_size / a * sigma**2, u, 1 / left)

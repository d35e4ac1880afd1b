"""How the mass of particles follows the first variation: as weights, or as copies."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["copied", "reweighted"]


def reweighted(log_w: Tensor, value: Tensor, amount: float) -> Tensor:
    """The solution after a time a t = `amount` of dw_i/dt = -a w_i (Phi_i - sum_j w_j Phi_j), Phi
    held fixed: w_i exp(-a t Phi_i), normalised. Weights stay positive at any step."""
    return (log_w - amount * value).log_softmax(0)


def copied(log_w: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Systematic resampling: M particles of equal weights, of which particle i becomes M w_i,
    rounded up or down at random without bias.

    Returns:
        (origin [M], int64: which particle each one is; copy [M], bool: whether another one stays
        in that particle's place). Survivors keep their places.
    """
    M, device = len(log_w), log_w.device
    how = {"generator": generator, "dtype": torch.float64, "device": generator.device}
    u = torch.rand((), **how).to(device)
    edges = M * log_w.double().softmax(0).cumsum(0)
    upto = (edges - u).ceil().long().clamp(0, M)
    upto[-1] = M
    counts = upto.diff(prepend=upto.new_zeros(1))
    origin = torch.arange(M, dtype=torch.int64, device=device)
    killed = counts == 0
    origin[killed] = origin.repeat_interleave((counts - 1).clamp_min(0))
    return origin, killed

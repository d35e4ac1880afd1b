"""What is certain of a result that left atoms out, and of several together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .rounding import FEW_ROUNDINGS
from .shard_bounds import log_sum

__all__ = ["Certificate"]


@dataclass(frozen=True, eq=False)
class Certificate:
    """Bounds on what a pass over a part of a data set left out. A logit is
    -|x - alpha y|^2/(2 sigma^2), in nats, so that the certificates of parts of one data set can be
    put together.

    Attributes:
        log_heaviest: a lower bound of the largest logit among the atoms that were counted, [B] in
            float64.
        log_dropped: an upper bound of the log-sum of the logits of all others, [B].
        selected: how many atoms were counted, int64 [B].
        centre, radius: a ball that has every atom in it that was left out, ``[*E]`` and [].
    """

    log_heaviest: Tensor
    log_dropped: Tensor
    selected: Tensor
    centre: Tensor
    radius: Tensor

    def with_other(self, other: Certificate) -> Certificate:
        """That of both parts."""
        apart = (self.centre - other.centre).norm()
        radius = torch.maximum(self.radius, other.radius + apart * FEW_ROUNDINGS)
        return Certificate(
            torch.maximum(self.log_heaviest, other.log_heaviest),
            log_sum(self.log_dropped, other.log_dropped),
            self.selected + other.selected,
            self.centre,
            radius,
        )

    def dropped_mass(self) -> Tensor:
        """A bound on the mass left out, relative to that of the atoms counted, [B]."""
        return (self.log_dropped - self.log_heaviest).exp() * FEW_ROUNDINGS

    def reach(self, mean: Tensor) -> Tensor:
        """How far any atom left out is from a mean ``[B, *E]``, at most: [B]."""
        return (mean.double() - self.centre).flatten(1).norm(dim=1) + self.radius

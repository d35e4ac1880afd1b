"""Where chains of Langevin dynamics have got to."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Chains"]


@dataclass(frozen=True)
class Chains:
    """What `langevin` returns.

    Attributes:
        x: The last states, ``[B, *E]``.
        acceptance: With Metropolis, the share of the proposals that each chain took, [B] in
            float64 (NaN after no steps); else None.
    """

    x: Tensor
    acceptance: Tensor | None

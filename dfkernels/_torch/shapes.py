"""Samples [B, *E] and numbers [B] beside each other."""

from __future__ import annotations

from torch import Tensor

__all__ = ["column", "flat"]


def column(numbers: Tensor, x: Tensor) -> Tensor:
    """One number per sample, [B], as a factor of x [B, *E], in its dtype."""
    return numbers.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


def flat(x: Tensor) -> Tensor:
    """Samples [B, *E] as rows [B, d]."""
    return x.reshape(len(x), x.shape[1:].numel())

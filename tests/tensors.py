"""Random tensors, each from a generator of its own, and shapes to go with them."""

from __future__ import annotations

import torch


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, dtype=torch.float64):
    """Standard normal numbers, the same ones in every dtype but for rounding."""
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64).to(dtype)


def column(numbers, x):
    """Numbers [B] as factors of samples x [B, *E], in their dtype."""
    return numbers.to(x.dtype).view(-1, *[1] * (x.ndim - 1))

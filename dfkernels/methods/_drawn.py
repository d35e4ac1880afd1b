"""Random numbers of methods that draw, from the caller's generator alone."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["normal", "uniform"]


def normal(x: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal noise like x, drawn on the generator's device."""
    how = {"dtype": x.dtype, "device": generator.device}
    return torch.randn(x.shape, generator=generator, **how).to(x.device)


def uniform(x: Tensor, generator: torch.Generator) -> Tensor:
    """One number in [0, 1) for each sample of x, [B] in float64."""
    how = {"dtype": torch.float64, "device": generator.device}
    return torch.rand(len(x), generator=generator, **how).to(x.device)

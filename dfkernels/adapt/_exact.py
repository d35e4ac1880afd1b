"""What the exact networks share: a data set that stands where a library expects a network."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._torch import check
from .._torch.shapes import column
from ..fisher import DiffusionFisher
from ..law import Law, checked_law
from ..methods._posterior_mean import DataSet
from ..schedule._base import as_tensor

__all__ = ["Exact", "ExactNetwork", "column", "positive", "times"]


class Exact(NamedTuple):
    """The exact answer for queries x [B, *E], in the dtype of computation; levels in float64."""

    x: Tensor
    mean: Tensor
    alpha: Tensor
    sigma: Tensor

    @property
    def eps(self) -> Tensor:
        """The noise prediction (x - alpha mean)/sigma."""
        return (self.x - column(self.alpha, self.x) * self.mean) * column(1 / self.sigma, self.x)


class ExactNetwork(DataSet):
    """A data set in the place of a network. A subclass defines `forward` in its library's
    convention.
    """

    def __init__(self, cloud: Law, tolerance: float | None) -> None:
        super().__init__(checked_law("cloud", cloud), tolerance)

    def exact(
        self, x: Tensor, alpha: Tensor, sigma: Tensor, *, scale: Tensor | None = None
    ) -> Exact:
        """The posterior mean at x, which is first multiplied by `scale` [B]. Computed in float64 if
        x or the atoms are, else in float32. Levels are [B] in float64.
        """
        x = x.to(torch.float64 if torch.float64 in (x.dtype, self.cloud.dtype) else torch.float32)
        if scale is not None:
            x = column(scale, x) * x
        fisher = DiffusionFisher(x, self.cloud, alpha, sigma, tolerance=self.tolerance)
        return Exact(x, fisher.denoised, alpha, sigma)


def times(name: str, t: float | Tensor, x: Tensor) -> Tensor:
    """A library's time, a number or a tensor of one or of B numbers in any shape, as [B] in
    float64 on x's device.
    """
    check.tensor("x", x)
    if not x.is_floating_point() or not x.ndim:
        raise TypeError(f"x: expected a floating tensor [B, ...], got {x.dtype} {list(x.shape)}")
    t = as_tensor(name, t)
    if t.numel() not in (1, len(x)):
        raise check.mismatch(name, f"one number or {len(x)}", f"shape {list(t.shape)}")
    return t.to(x.device, torch.float64).reshape(-1).expand(len(x))


def positive(name: str, sigma: Tensor, t: Tensor) -> Tensor:
    """The noise levels, refused where there is none: a data set has no velocity or noise there."""
    if not check.values_hidden(sigma) and not bool((sigma > 0).all()):
        at = t[~(sigma > 0)][0].item()
        raise ValueError(
            f"{name}: expected times with noise, got {at:g}, where sigma = 0 and the exact answer "
            "for a finite data set is not finite: stop one step earlier"
        )
    return sigma

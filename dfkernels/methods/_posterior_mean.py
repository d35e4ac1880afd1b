"""A data set in the place of a network."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from .._torch import check
from ..fisher import DiffusionFisher
from ..law import Law
from ..schedule import Schedule

__all__ = ["DataSet", "PosteriorMean", "refuse_conditions"]


def refuse_conditions(conditions: Mapping[str, object]) -> None:
    """Refuses conditions of a data set: its atoms have none."""
    if conditions:
        way_out = (
            "make the cloud of those atoms alone that have it (log_prior: -inf for the others)"
        )
        got = f"{', '.join(conditions)}: {way_out}"
        raise check.mismatch("conditions", "none for a data set", got)


class DataSet(nn.Module):
    """A data set as a Module without parameters: `.to(device)` moves it, with its index, and casts
    leave it alone, since computation follows the query's dtype.
    """

    full_precision = True  # see `_calls.call`

    def __init__(self, cloud: Law, tolerance: float | None) -> None:
        super().__init__()
        self.cloud, self.tolerance = cloud, tolerance

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DataSet:
        # what .to(), .cuda() and their like do to every tensor; integers change their device only
        device = fn(torch.empty(0, dtype=torch.int64, device=self.cloud.device)).device
        self.cloud = self.cloud.to(device)
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        tolerance = "" if self.tolerance is None else f", tolerance={self.tolerance:g}"
        return f"{self.cloud!r}{tolerance}"


class PosteriorMean(DataSet):
    """The network of `Denoiser.exact`. It takes t in float64 whatever x's, and no conditions."""

    def __init__(self, cloud: Law, schedule: Schedule, tolerance: float | None) -> None:
        super().__init__(cloud, tolerance)
        self.schedule = schedule

    def forward(self, x: Tensor, t: Tensor, **conditions: object) -> Tensor:
        refuse_conditions(conditions)
        return self.fisher(x, t).denoised

    def fisher(self, x: Tensor, t: float | Tensor) -> DiffusionFisher:
        """Everything that one pass over the data gives at x and t."""
        t = self.schedule._time(t)
        alpha, sigma = self.schedule(t)
        self.schedule._exists("the posterior mean of a data set", sigma > 0, "sigma = 0", t)
        return DiffusionFisher(x, self.cloud, alpha, sigma, tolerance=self.tolerance)

    def equals(self, other: object) -> bool:
        """Whether the other one gives the same results by construction."""
        return (
            isinstance(other, PosteriorMean)
            and self.cloud is other.cloud
            and (self.schedule, self.tolerance) == (other.schedule, other.tolerance)
        )

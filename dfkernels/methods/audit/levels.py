"""The noise levels of an audit.

The lowest is a tenth of the data's standard deviation per number, or less: where most noisy atoms
have one atom alone behind them (a median ESS below 1.5), or as many as at twice the level
(duplicates), in up to eight halvings. The highest is
that of `check`: 4 times the level at which 100 atoms share the weight. Both stay within the
schedule's reach.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..._torch import check as argument
from ...law import Law
from ...schedule import Schedule
from ..convention.queries import Rng, data_mean, data_std, exact, noise_range_of, reach
from ..grid import noise_range, times_of

__all__ = ["FEWEST", "Level", "Range", "range_of", "times"]

FEWEST = 4  # points that data of either kind must have
_ALONE, _SETTLED, _HALVINGS, _PILOTS = 1.5, 0.9, 8, 16


class Level(NamedTuple):
    """A time, and the levels there."""

    t: float
    alpha: float
    sigma: float

    @property
    def time(self) -> Tensor:
        """t as a tensor."""
        return torch.tensor(self.t, dtype=torch.float64, device="cpu")


class Range(NamedTuple):
    """The range of noise levels of an audit, and of `check`."""

    noise: tuple[float, float]
    check: tuple[float, float] | None  # None: no check can be made
    obstacle: str  # why


def range_of(cloud: Law, schedule: Schedule, noise: tuple[float, float] | None, rng: Rng) -> Range:
    """The range of levels as described above; `noise` takes its place where it is given."""
    if data_mean(cloud)[1] < FEWEST:
        raise argument.mismatch(
            "train, held_out", f"at least {FEWEST} points of comparable weight", f"{cloud!r}"
        )
    std = data_std(cloud, rng)
    if not std > 0:
        raise argument.mismatch("train, held_out", "points that differ", "all the same")
    checked, obstacle = None, ""
    try:
        checked = noise_range_of(cloud, schedule, rng)
    except ValueError as error:
        obstacle = str(error)
    if noise is not None:
        return Range(noise_range(noise), checked, obstacle)
    least, most = reach(schedule)
    if checked is not None:
        most = checked[1]
    low = _lowest(cloud, max(std / 10, least), least, rng)
    if low >= most:
        raise ValueError(obstacle)
    return Range(noise_range((low, most)), checked, obstacle)


def times(schedule: Schedule, count: int, noise: tuple[float, float]) -> Tensor:
    """`count` times of noise levels spaced evenly in their logarithm, noisiest first; fewer where a
    discrete schedule has fewer.

    Raises:
        ValueError: The schedule does not reach `noise`.
    """
    unit = torch.linspace(0, 1, count, dtype=torch.float64, device="cpu")
    s = noise[1] * (noise[0] / noise[1]) ** unit
    s[-1] = noise[0]
    t = times_of(schedule, s)
    return t.round().unique_consecutive() if schedule.discrete else t


def _lowest(cloud: Law, s: float, least: float, rng: Rng) -> float:
    before = math.inf
    for _ in range(_HALVINGS):
        if s / 2 < least:
            break
        ess = _ess(cloud, s, rng)
        if ess < _ALONE or ess > _SETTLED * before:
            break
        s, before = s / 2, ess
    return s


def _ess(cloud: Law, s: float, rng: Rng) -> float:
    """The median ESS of noisy atoms."""
    y = rng.atoms(cloud, _PILOTS)
    x = y + s * rng.normal(*y.shape).to(y.device)
    dtype = torch.float64 if cloud.dtype == torch.float64 else torch.float32
    return exact(cloud, x.to(dtype), 1.0, s)[2].median().item()

"""What an audit works on."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ...cloud import PointCloud
from ..convention.queries import Rng
from ..denoiser import Denoiser
from ..sharded import ShardedCloud
from .levels import Level

__all__ = ["Points", "Task"]

Points = PointCloud | ShardedCloud  # data whose points can be told apart

_NUMBERS = 1 << 17  # of a batch of the network


class Task(NamedTuple):
    """The denoiser with its conditions, the data, and how much of what is done."""

    denoiser: Denoiser
    train: Points | None
    held_out: Points | None
    noise: tuple[float, float]
    levels: tuple[Level, ...]  # noise rising
    groups: int  # data points behind the queries of a level and kind
    repeats: int  # queries of each
    samples: int
    points: int  # of a kind, whose likelihood is computed
    width: float | None
    mean: Tensor  # of the data, [1, *E]
    std: float  # of the data, per number
    seed: int

    @property
    def clouds(self) -> dict[str, Points]:
        """The data that were given, by kind, the held-out last."""
        both = {"train": self.train, "held_out": self.held_out}
        return {kind: cloud for kind, cloud in both.items() if cloud is not None}

    @property
    def reference(self) -> Points:
        """The training data, or the held-out where no others are given."""
        return next(iter(self.clouds.values()))

    @property
    def dtype(self) -> torch.dtype:
        """That of states: the data's precision, or float32."""
        doubled = self.reference.dtype == torch.float64
        return torch.float64 if doubled else torch.float32

    def rng(self, part: int) -> Rng:
        """The random numbers of a part of the audit, whatever else was computed before."""
        return Rng(torch.Generator("cpu").manual_seed(self.seed + part))

    def normal(self, rng: Rng, count: int) -> Tensor:
        """Normal noise [count, *E] in float64 on the data's device."""
        y = self.reference
        return rng.normal(count, *y.event_shape).to(y.device)

    def generator(self, rng: Rng) -> torch.Generator:
        """A generator on the data's device, of a random seed."""
        drawn = torch.randint(1 << 31, (), generator=rng.generator, dtype=torch.int64, device="cpu")
        return torch.Generator(self.reference.device).manual_seed(int(drawn))

    def in_batches(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """A function of queries [B, *E], batch by batch."""
        size = max(1, _NUMBERS // self.reference.d)
        return torch.cat([function(part) for part in x.split(size)])

"""The data that a network acts as if it had been trained on: the cloud's, scaled and shifted.

A network trained on a y + b, but given alpha y + sigma eps, still returns the posterior mean over
its own data, exactly that over the atoms a y_i + b. So a and b are fitted to its outputs by least
squares, with one pair for all numbers, or one per channel.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ...law import Law, per_channel
from .queries import Queries, exact

__all__ = ["DataMap", "fit", "over"]

_QUERIES = 32  # of a level, that a fit looks at
_ENTRIES = 1 << 16  # of its residual
_ATOMS = 1 << 22  # numbers of the atoms that are copied for a map per channel
_CHANNELS = 16
_OCTAVES = 10  # by which a may differ from 1 at the start
_STEPS = 12
_DELTA = 1e-3  # of a difference quotient, relative


class DataMap(NamedTuple):
    """y -> a y + b, with numbers per channel, each [C] in float64; C = 1: the same for all."""

    a: Tensor
    b: Tensor

    def applied(self, cloud: Law) -> Law:
        """The atoms a y_i + b; with a map per channel, some of the atoms of a large cloud."""
        return cloud._mapped(self.a, self.b, _ATOMS)

    def then(self, other: DataMap) -> DataMap:
        """This map, and then the other one."""
        return DataMap(other.a * self.a, other.a * self.b + other.b)

    def __str__(self) -> str:
        if len(self.a) == 1:
            a, b = self.a.item(), self.b.item()
            return f"{a:.3g} y {'-' if b < 0 else '+'} {abs(b):.3g}"
        a, b = (", ".join(f"{number:.3g}" for number in part.tolist()) for part in self)
        return f"a y + b, with a = ({a}) and b = ({b}) for the channels"


def over(cloud: Law, data: DataMap, q: Queries) -> Queries:
    """The queries with the exact answers over the mapped atoms. None counts as the lowest level:
    for the mapped data that is another one, and a sound network may be no better than their mean
    here.
    """
    mean, std, ess = exact(data.applied(cloud), q.x, q.alpha, q.sigma)
    a, b = (per_channel(part, mean) for part in data)
    there = q._replace(mean=mean, std=max(std, 1e-30), ess=ess.median().item())
    return there._replace(data_mean=q.data_mean * a + b, lowest=False)


def fit(
    cloud: Law, queries: list[Queries], means: list[Tensor], count: int | None = None
) -> list[DataMap]:
    """The maps that explain a network's means best: one for all numbers, and one per channel where
    the data have channels, [C, H, W] and the like. With a count of channels that one alone, for
    data that are nearly right.
    """
    if count is not None:
        one = torch.ones(count, dtype=torch.float64, device="cpu")
        return [_fit(cloud, queries, means, DataMap(one, 0 * one))]
    fitted = [_fit(cloud, queries, means, _start(cloud, queries, means))]
    if len(cloud.event_shape) > 1 and 1 < cloud.event_shape[0] <= _CHANNELS:
        channels = cloud.event_shape[0]
        start = DataMap(*(part.expand(channels) for part in fitted[0]))
        fitted.append(_fit(cloud, queries, means, start))
    return fitted


def _start(cloud: Law, queries: list[Queries], means: list[Tensor]) -> DataMap:
    """The best of the powers of 2 for a, with the b that gives the right mean."""
    last, mean = queries[-1], means[-1].double().mean()
    residual = _Residual(cloud, queries, means)
    maps = []
    for k in range(-_OCTAVES, _OCTAVES + 1):
        a = torch.tensor([2.0**k], dtype=torch.float64, device="cpu")
        maps.append(DataMap(a, (mean.cpu() - a * last.mean.double().mean().cpu())))
    return min(maps, key=lambda data: residual(data).square().sum().item())


class _Residual:
    """The difference of a network's means from those over mapped atoms, on some of its entries, in
    units of the spread of the former.
    """

    def __init__(self, cloud: Law, queries: list[Queries], means: list[Tensor]) -> None:
        self.cloud = cloud
        self.queries = [q._replace(x=q.x[:_QUERIES]) for q in queries]
        self.means = [mean[:_QUERIES].double() for mean in means]
        self.weights = [
            1 / (m - m.mean(0)).square().mean().sqrt().clamp_min(1e-30) for m in self.means
        ]
        generator = torch.Generator().manual_seed(0)
        entries = self.means[0].numel()
        self.chosen = torch.arange(entries, dtype=torch.int64, device="cpu")
        if entries > _ENTRIES:
            self.chosen = torch.randint(
                entries, (_ENTRIES,), generator=generator, dtype=torch.int64, device="cpu"
            )
        self.chosen = self.chosen.to(cloud.device)

    def __call__(self, data: DataMap) -> Tensor:
        parts = [
            weight * (mean - over(self.cloud, data, q).mean).flatten()[self.chosen]
            for q, mean, weight in zip(self.queries, self.means, self.weights, strict=True)
        ]
        return torch.cat(parts)


def _fit(cloud: Law, queries: list[Queries], means: list[Tensor], start: DataMap) -> DataMap:
    """Levenberg and Marquardt's method in ln a and b, with difference quotients."""
    residual, unit = _Residual(cloud, queries, means), start.a.mean().item() * queries[-1].std
    channels = len(start.a)
    read = lambda p: DataMap(p[:channels].exp(), p[channels:] * unit)
    point = torch.cat([start.a.log(), start.b / unit])
    value, damping = residual(start), 1e-3
    for _ in range(_STEPS):
        columns = []
        for i in range(len(point)):
            moved = point.clone()
            moved[i] += _DELTA
            columns.append((residual(read(moved)) - value) / _DELTA)
        J = torch.stack(columns, 1)
        normal, slope = (J.mT @ J).cpu(), (J.mT @ value).cpu()
        for _ in range(6):
            scaled = normal + damping * torch.diag(normal.diagonal().clamp_min(1e-12))
            step = torch.linalg.solve(scaled, slope).clamp(-1, 1)
            new = residual(read(point - step))
            if new.square().sum() < value.square().sum():
                break
            damping *= 10
        else:
            break
        gain = 1 - (new.square().sum() / value.square().sum()).item()
        point, value, damping = point - step, new, max(damping / 10, 1e-9)
        if gain < 1e-3 or math.isnan(gain):
            break
    return read(point)

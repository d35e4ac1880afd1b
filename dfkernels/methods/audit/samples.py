"""Are samples of the network copies of training data? Distances to the nearest ones."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._top_k import top_k
from ...cloud import PointCloud
from ..convention.queries import Rng
from ..samplers import sample
from . import estimates
from .levels import times
from .parts import Estimate, SampleAudit
from .task import Points, Task

__all__ = ["measured"]

_STEPS = 24  # of Heun's method
_RATIO = 1 / 3  # of the distances of the nearest atoms, below which a sample counts as a copy
_PART = 0.01  # of the held-out points, nearer to a training atom than the threshold
_HELD_OUT = 1024  # of them, at most, whose nearest atoms are sought
_SIDE = 1 << 24  # numbers in the points of each kind, at most, of which the nearest one is sought
_NEAR = 1e-3  # standard deviations: so little noise that the heaviest atom is the nearest
_SHOWN, _NUMBERS = 16, 1 << 17  # samples that the report keeps; numbers in them


class _Nearest(NamedTuple):
    """Of each point [n]: the nearest atom's row and distance, and that over the second's."""

    row: Tensor
    distance: Tensor
    ratio: Tensor


def measured(task: Task, part: int) -> SampleAudit | None:
    """Samples beside the training data; None without these, or where none were asked for."""
    if task.train is None or not task.samples:
        return None
    rng = task.rng(part)
    x = _sampled(task, rng)
    nearest = _nearest(task, x, task.train)
    order = nearest.distance.argsort()
    shown = order[: max(1, min(_SHOWN, _NUMBERS // task.train.d))]
    return SampleAudit(
        len(x),
        estimates.share(nearest.ratio < _RATIO),
        **_beside_held_out(task, task.train, x, nearest, rng),
        distance=nearest.distance.median().item(),
        samples=x[shown.to(x.device)].float().cpu(),
        rows=nearest.row[order],
        distances=nearest.distance[order],
        ratios=nearest.ratio[order],
    )


def _sampled(task: Task, rng: Rng) -> Tensor:
    """Samples of x_0 [n, *E]: the posterior mean at the end of the flow."""
    t = times(task.denoiser.schedule, _STEPS + 1, task.noise)
    high = task.levels[-1]
    start = high.alpha * math.hypot(high.sigma / high.alpha, task.std)

    def from_noise(x: Tensor) -> Tensor:
        end = sample(task.denoiser, x, t, "heun", keep=1).x[-1]
        return task.denoiser(end, t[-1])

    return task.in_batches(from_noise, (start * task.normal(rng, task.samples)).to(task.dtype))


def _beside_held_out(
    task: Task, train: Points, x: Tensor, nearest: _Nearest, rng: Rng
) -> dict[str, Any]:
    """The shares that need held-out data, and what chance makes of them."""
    if task.held_out is None:
        among = _nearest(task, rng.different(train, _HELD_OUT).to(task.dtype), train, itself=True)
        names = ("closer", "expected", "threshold", "train_side")
        names += ("held_out_distance", "held_out_distances")
        return {"chance_ratio": estimates.share(among.ratio < _RATIO)} | dict.fromkeys(names)
    count = min(len(task.held_out), _HELD_OUT)
    held_out = _nearest(task, rng.different(task.held_out, count).to(task.dtype), train)
    rank = max(1, int(_PART * (count + 1)))
    rising = held_out.distance.sort().values
    threshold = rising[rank - 1].item()
    expected = rank / (count + 1)  # of new points, on average over held-out data
    closer = estimates.share(nearest.distance < threshold)
    return {
        "chance_ratio": estimates.share(held_out.ratio < _RATIO),
        # the threshold itself is known as well as `rank` points allow
        "closer": Estimate(closer.value, math.hypot(closer.error, expected / math.sqrt(rank))),
        "expected": expected,
        "threshold": threshold,
        "train_side": _train_side(task, [train, task.held_out], x, rng),
        "held_out_distance": held_out.distance.median().item(),
        "held_out_distances": rising,
    }


def _train_side(task: Task, clouds: list[Points], x: Tensor, rng: Rng) -> Estimate:
    """The share of samples whose nearest point is one of the first cloud, of as many of either. Had
    each point been assigned to a cloud by chance, the share would be one half with the error
    sqrt(sum_j c_j^2)/(2 n), for points j that are the nearest one of c_j samples.
    """
    side = min(*(len(cloud) for cloud in clouds), max(1, _SIDE // x[0].numel()))
    both = torch.cat([rng.different(cloud, side).to(task.dtype) for cloud in clouds])
    rows = _nearest(task, x, PointCloud(both)).row
    error = rows.bincount().double().norm().item() / (2 * len(x))
    return Estimate((rows < side).double().mean().item(), error)


def _nearest(task: Task, x: Tensor, cloud: Points, itself: bool = False) -> _Nearest:
    """The nearest atoms of points; `itself`: the first one, the point itself, left out."""
    first = int(itself)
    rows = top_k(x, cloud, 1.0, _NEAR * task.std, 2 + first).index[:, first:]
    atoms = cloud.rows(rows.flatten()).unflatten(0, rows.shape)
    distance = (x.double()[:, None] - atoms).flatten(2).square().mean(2).sqrt().cpu()
    ratio = distance[:, 0] / distance[:, 1].clamp_min(torch.finfo(torch.float64).tiny)
    return _Nearest(rows[:, 0].cpu(), distance[:, 0], ratio)

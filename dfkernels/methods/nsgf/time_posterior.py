"""The time that a point looks like on the straight paths to a data set, exactly.

With t uniform in [0, 1 - end], x_t = (1 - t) eps + t y, eps standard normal and y an atom, the law
of x_t at fixed t is that of a diffused data set with alpha = t and sigma = s = 1 - t, and

    E[t | x] = int t q_t(x) dt / int q_t(x) dt

The integrals are taken in u = ln s, where near an atom q_t(x) s varies on the scale 1/sqrt(d)
whatever the distance, by Gauss-Legendre panels; weights are kept as logarithms, and what is summed
is 1 - t, which near t = 1 keeps its digits.

One atom contributes exp(-(d - 1) u - |z|^2/2), z = (x - y)/s + y. At a maximum over u the second
derivative of the exponent is at most d - 1 + (|y| + sqrt(d - 1))^2 in absolute value, so that no
peak is narrower than the inverse root w of this for the largest |y|. At the end u = 0, the noise,
there need be no maximum: the slope there is at most (|x| + 2 |y|)^2. Panels of 16 nodes are enough
if they are no longer than 6 w, and fall by halves towards u = 0 to 6 over that slope.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ... import ops
from ..._torch import check, diagnosis
from ..._torch.objects import plain
from ..._torch.shapes import flat
from ...cloud import PointCloud

__all__ = ["TimePosterior", "time_posterior"]

_NODES = 16  # of a panel
_WIDTHS = 6.0  # of the narrowest peak, in a panel
_MOST = 1 << 12  # panels: passes over the data are 16 times as many
_ROWS = 1 << 14  # atoms looked at together for the largest norm


class TimePosterior(NamedTuple):
    """Mean and standard deviation of t given x, each [B], in x's dtype."""

    mean: Tensor
    std: Tensor


def time_posterior(x: Tensor, cloud: PointCloud, *, end: float = 1e-3) -> TimePosterior:
    """Computes what x says about its time on the straight paths from normal noise to a data set.

    The mean is what a time predictor trained without end would return, so that it serves as one
    without training, and as the ground truth for one; the standard deviation is what no predictor
    can know.

    Args:
        x: Points ``[B, *E]``, float32 or float64: the dtype of computation.
        cloud: The atoms y.
        end: 1 - t where the times stop, in (0, 1): at t = 1 itself the law is on the atoms alone.

    The result is exact, but for rounding, for t uniform in [0, 1 - end]. For t up to 1 the mean
    would be larger, by at most (1 - mean) times the probability of the times left out: next to
    nothing for points whose distance from every atom is some times end sqrt(d). For a point closer
    than that to an atom, which is as good as there, the mean is about 1 - end.

    It takes one pass of `ops.log_prob` for each of some 16 ln(1/end)/(6 w) nodes, w as above: 150
    for d = 2, 350 for 8 x 8 pixels in [-1, 1].

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it.
    """
    check.query("x", x)
    check.instance("cloud", cloud, PointCloud, "a PointCloud")
    check.events("x", x, cloud.event_shape, "to match the cloud")
    diagnosis.finite("x", x.detach())
    end = check.positive("end", end)
    if end >= 1:
        raise check.mismatch("end", "0 < end < 1", f"{end:g}")
    with torch.no_grad(), plain(x.device):
        s, log_weight = _quadrature(x, cloud, end)
        largest = x.new_full((len(x),), -math.inf, dtype=torch.float64)
        sums = x.new_zeros((3, len(x)), dtype=torch.float64)  # of w, w s and w s^2
        prior, given = cloud._log_pi(x.dtype), {"scale": cloud.scale, "offset": cloud.offset}
        for level, weight in zip(s, log_weight, strict=True):
            log_prob = ops.log_prob(x.detach(), cloud.y, 1 - level, level, prior, **given)
            log_w = log_prob.double() + weight
            new = torch.maximum(largest, log_w)
            w = (log_w - new).exp()
            sums = sums * (largest - new).exp() + torch.stack([w, w * level, w * level**2])
            largest = new
        mean, square = sums[1] / sums[0], sums[2] / sums[0]
        std = (square - mean**2).clamp_min(0).sqrt()
        return TimePosterior((1 - mean).to(x.dtype), std.to(x.dtype))


def _quadrature(x: Tensor, cloud: PointCloud, end: float) -> tuple[list[float], list[float]]:
    """Levels s = 1 - t in (end, 1), and the logarithms of their weights in an integral over t."""
    norm, root = _largest_norm(cloud), math.sqrt(cloud.d - 1)
    width = max(cloud.d - 1 + (norm + root) ** 2, 1.0) ** -0.5  # 0 of one atom 0 on a line
    far = flat(x).detach().double().norm(dim=1).amax().item() if len(x) else 0.0
    length = -math.log(end)
    panels = max(1, math.ceil(length / (_WIDTHS * width)))
    if panels > _MOST:
        least = f"atoms y with |y| < {_MOST * _WIDTHS / length:.0e}, beside noise of size 1"
        raise check.mismatch("cloud", least, f"|y| up to {norm:.1e}")
    steep = length / panels * (far + 2 * norm) ** 2 / _WIDTHS
    halves = math.ceil(math.log2(max(steep, 1.0)))
    last = length / panels * 0.5 ** np.arange(halves + 1)
    edges = np.concatenate([-length + length / panels * np.arange(panels), -last[1:], [0.0]])
    unit, weights = np.polynomial.legendre.leggauss(_NODES)
    h = np.diff(edges)[:, None]
    u = edges[:-1, None] + (unit + 1) / 2 * h
    log_weight = np.log(weights * h / 2) + u  # dt = s du
    return np.exp(u).ravel().tolist(), log_weight.ravel().tolist()


def _largest_norm(cloud: PointCloud) -> float:
    """The largest |y| of an atom that has weight."""
    y, largest = cloud.y.reshape(len(cloud), -1), 0.0
    kept = None if cloud.log_prior is None else cloud.log_prior > -math.inf
    for first in range(0, len(y), _ROWS):
        rows = slice(first, first + _ROWS)
        part = y[rows] if kept is None else y[rows][kept[rows]]
        if len(part):
            values = part.double() * cloud.scale + cloud.offset
            largest = max(largest, values.norm(dim=1).max().item())
    return largest

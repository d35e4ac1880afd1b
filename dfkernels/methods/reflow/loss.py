"""The loss by which a flow is trained on pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._torch import check
from ..._torch.shapes import column, flat
from ..denoiser import Denoiser, expect_denoiser
from ._straight import time_at, velocity
from .pairs import Pairs

__all__ = ["loss", "residual", "stratified"]


def loss(denoiser: Denoiser, pairs: Pairs, generator: torch.Generator) -> Tensor:
    """The training loss of a rectified flow on a batch of pairs, a scalar: the mean of

        |v(x_t, t) - (x_1 - x_0)|^2/d,   x_t = (1 - t) x_0 + t x_1,  t uniform in [0, 1]

    With pairs of data and independent noise it trains the first flow, with those of `pairs` the
    next.

    >>> loss(denoiser, Pairs(torch.randn(data.shape, generator=g), data), g).backward()

    Args:
        denoiser: what is trained, of a schedule that reaches from pure noise to data (RectifiedFlow
            does); conditions of its network by `denoiser.bind(label=label)`.
        pairs: a batch of n.
        generator: of the times, one in each of n equal parts of [0, 1].

    Raises:
        TypeError, ValueError: An argument or the network's output is wrong; the message names it.
    """
    check.instance("pairs", pairs, Pairs, "Pairs")
    expect_denoiser(denoiser)
    square = residual(denoiser, pairs, stratified(pairs, generator))
    return square.mean() / pairs.noise.shape[1:].numel() if len(pairs) else square.sum()


def stratified(pairs: Pairs, generator: torch.Generator) -> Tensor:
    """Times in [0, 1] for n pairs, one in each of n equal parts, in random order; float64."""
    check.generator(generator)
    n, device = len(pairs), generator.device
    order = torch.randperm(n, generator=generator, dtype=torch.int64, device=device)
    u = torch.rand(n, generator=generator, dtype=torch.float64, device=device)
    return ((order + u) / max(1, n)).to(pairs.noise.device)


def residual(denoiser: Denoiser, pairs: Pairs, tau: Tensor) -> Tensor:
    """|v(x_t, t) - (x_1 - x_0)|^2 of each pair at its time, [n]."""
    t = time_at(denoiser.schedule, tau)
    alpha, sigma = denoiser.schedule(t)
    found = velocity(denoiser, column(alpha + sigma, pairs.noise) * pairs.at(tau), t)
    check.like("network", found, "noise", pairs.noise)
    return flat(found - (pairs.sample - pairs.noise)).square().sum(1)

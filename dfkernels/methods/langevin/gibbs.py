"""Gibbs sampling of a diffused data set: the exact kernel at a fixed noise level."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._torch import check
from ..._torch.objects import ordinary, plain
from ..._torch.shapes import column
from .._drawn import normal
from .._own_fisher import data_set_of
from .._reporting import Callback, reporting
from ..denoiser import Denoiser

__all__ = ["gibbs"]


def gibbs(
    denoiser: Denoiser,
    x: Tensor,
    t: float | Tensor,
    steps: int,
    *,
    generator: torch.Generator,
    callback: Callback | None = None,
    progress: bool = False,
) -> Tensor:
    """Runs chains of Gibbs sampling at one noise level: an atom y from its posterior at x, then
    x' = alpha y + sigma xi.

    q_t is its stationary law, with no step size and no rejection. One sweep has the mean alpha
    ybar(x) = x + sigma^2 score and the covariance sigma^2 I + alpha^2 C(x), which `langevin` takes
    for a preconditioner.

    Args:
        denoiser: `Denoiser.exact(cloud, schedule)`: a network has no atoms.
        x: Where the chains start, ``[B, *E]``, float32 or float64.
        t: The noise level, a number, [] or [B].
        steps: How many sweeps, one pass over the data each.
        generator: Moved on, so that a call goes on where the last one stopped, bit for bit.
        callback: Called as callback(done, steps) after each sweep.
        progress: Whether to show a bar on stderr.

    Returns:
        The last states, ``[B, *E]``, without a graph.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it.
    """
    data = data_set_of(denoiser)
    if data is None:
        name = denoiser.short
        raise check.mismatch("denoiser", "a data set, Denoiser.exact(cloud, schedule)", name)
    check.query("x", x)
    steps, cloud = check.integer("steps", steps, 0), data.cloud
    check.generator(generator)
    alpha, sigma = denoiser.levels(x, t)
    bar = reporting("gibbs", callback, progress, steps)
    with torch.no_grad(), plain(x.device), bar as report:
        x = ordinary(x.detach()).clone()
        for i in range(steps):
            how = {"dtype": torch.int64, "device": generator.device}
            seed = int(torch.randint(2**63 - 1, (), generator=generator, **how))
            y = cloud.draw(x, alpha, sigma, seed=seed).x_0
            x = column(alpha, x) * y + column(sigma, x) * normal(x, generator)
            report(i + 1, steps)
    return x

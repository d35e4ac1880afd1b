"""The velocity network: its regression on a pool, and sampling with it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..._torch import check
from ..._torch.shapes import flat
from .._calls import call, checked
from .._reporting import Callback, reporting
from ..grid import Trajectory
from .flow import step_size
from .pool import TrajectoryPool

__all__ = ["Network", "sample", "velocity_loss"]

Network = nn.Module | Callable[[Tensor, Tensor], Tensor]


def velocity_loss(
    network: Network, pool: TrajectoryPool, generator: torch.Generator, *, batch: int = 256
) -> Tensor:
    """The training loss of a velocity network, a scalar: the mean over a batch of the pool of

        |v_theta(x, t) - v|^2/d

    >>> loss = lambda network, generator: velocity_loss(network, pool, generator)
    >>> trained = training.train(network, loss, steps=2000, generator=generator)

    Args:
        network: `network(x, t)` -> ``[batch, *E]``, for x ``[batch, *E]`` and t [batch] in float32,
            such as `networks.VectorNet(d)`.
        pool: What `trajectory_pool` has filled.
        generator: Of the batch.
        batch: How many points.

    Raises:
        TypeError, ValueError: An argument or the network's output is wrong; the message names it.
    """
    check.instance("pool", pool, TrajectoryPool, "a TrajectoryPool")
    x, t, v = pool.draw(batch, generator)
    out = checked("network", call(network, x, t, {}), x, t)
    return flat(out - v).square().mean()


def sample(
    network: Network,
    x: Tensor,
    *,
    steps: int,
    eta: float,
    callback: Callback | None = None,
    progress: bool = False,
) -> Trajectory:
    """Moves points of the source by the velocity network: x <- x + eta v_theta(x, t), t = k eta.

    Args:
        network: `network(x, t)` -> ``[B, *E]``, as trained by `velocity_loss`.
        x: Points of the source ``[B, *E]``, float32 or float64.
        steps: As many as the pool's flows had.
        eta: Their step size.
        callback: Called as callback(done, steps) after each step.
        progress: Whether to show a bar on stderr.

    Differentiable through the network; sample under torch.no_grad() otherwise.

    Returns:
        The trajectory: times t [steps + 1] and states; the last one, `.x[-1]`, is the sample.

    Raises:
        TypeError, ValueError: An argument is wrong, or the network returns another shape, NaN or
            inf; the message names it.
    """
    check.query("x", x)
    steps, eta = check.integer("steps", steps, 1), step_size(eta)
    times = eta * torch.arange(steps + 1, dtype=torch.float64, device="cpu")
    states = [x]
    with reporting("nsgf.sample", callback, progress, steps) as report:
        for k in range(steps):
            t = times[k].to(x.device).expand(len(x))
            v = checked("network", call(network, states[-1], t, {}), x, t)
            states.append(states[-1] + eta * v)
            report(k + 1, steps)
    return Trajectory(times, states)

"""Neural Sinkhorn gradient flow: particles that descend the Sinkhorn divergence to a target, and a
network that has learnt their velocity.

The divergence S(mu, nu) of `methods.sinkhorn`, between mu = sum_i a_i delta_{x_i} and a target nu,
falls fastest, for steps measured by the Wasserstein distance, along the velocity

    v(x_i) = -(1/a_i) dS/dx_i = T_mu,nu(x_i) - T_mu,mu(x_i)

where T_mu,nu(x) is the mean of y given x under the entropic plan between mu and nu
(`Coupling.barycentric_map`): each particle goes to where the plan sends its mass, less where the
plan of mu with itself does. Both are posterior means, with log b + g/eps for the log prior.

    velocity            v at the particles, from two solved plans
    flow                x <- x + eta v, from a source to the target
    trajectory_pool     (x, t, v) along many small flows, kept in bounded memory
    velocity_loss       regresses a network v_theta(x, t) on the pool (`methods.training.train`)
    sample              x <- x + eta v_theta(x, t), in the same steps

NSGF++ takes a few such steps, then goes on along the straight flow dx/dt = u(x, t) of
x_t = (1 - t) x_0 + t y, which `reflow.loss` trains (`straight_flow`), from the time t that a point
looks like: that of a trained `TimePredictor` (`time_loss`), or, for a cloud, E[t | x] itself
(`time_posterior`).

The blur is a length, in the unit of the points: eps = blur^2, for the cost |x - y|^2/2.

Source: Zhu, Wang, Zhang, Zhao & Qian, Neural Sinkhorn Gradient Flow (2024), arXiv 2401.14069,
Algorithms 1 to 4. Its Proposition 2 prints the direction of steepest ascent, and its loops, from
t = 0 to T, make T + 1 steps; here they make T.
"""

from __future__ import annotations

from .flow import Flow, flow
from .network import sample, velocity_loss
from .pool import TrajectoryPool
from .straight import straight_flow
from .time_posterior import TimePosterior, time_posterior
from .time_predictor import TimePredictor, time_loss
from .trajectories import trajectory_pool
from .velocity import Velocity, velocity

__all__ = [
    "Flow",
    "TimePosterior",
    "TimePredictor",
    "TrajectoryPool",
    "Velocity",
    "flow",
    "sample",
    "straight_flow",
    "time_loss",
    "time_posterior",
    "trajectory_pool",
    "velocity",
    "velocity_loss",
]

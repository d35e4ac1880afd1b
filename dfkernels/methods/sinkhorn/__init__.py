"""Entropic optimal transport between two sets of points, without a matrix of their distances.

For weights a of points x and b of points y, `solve` finds the plan P, whose rows add up to a and
whose columns to b, that minimises

    sum_ij P_ij c_ij + eps KL(P | a b^T),   c_ij = |x_i - y_j|^2/2,   eps = blur^2

It is P_ij = a_i b_j exp((f_i + g_j - c_ij)/eps), and Sinkhorn's algorithm finds its potentials f
and g in turn, each as a log-sum-exp of the other, which is `ops.log_prob` of the points with the
potential for log_prior:

    f = S(g),  S(g)_i = -eps log sum_j b_j exp((g_j - c_ij)/eps)

The blur is GeomLoss's, in the unit of the points. Where the cost is the whole squared distance and
its regularisation is reg (POT, OTT, FlashSinkhorn), blur = sqrt(reg/2), and potentials and costs
are twice those of this module.

With a reach, rho = reach^2, the marginals are relaxed: the objective has
rho KL(P 1 | a) + rho KL(P^T 1 | b) more in place of the constraints, and half-steps are damped,
f = S(g)/(1 + eps/rho).

Sources: Cuturi, Sinkhorn distances (2013); Feydy et al., Interpolating between optimal transport
and MMD using Sinkhorn divergences (2019), for the divergence and its gradient; Sejourne
et al., Sinkhorn divergences for unbalanced optimal transport (2019), for the reach; Walker & Ni,
Anderson acceleration for fixed-point iterations (2011), for the steps between the half-steps.
"""

from __future__ import annotations

from .coupling import Coupling
from .divergence import Divergence, divergence
from .not_converged import NotConverged
from .solve import solve

__all__ = ["Coupling", "Divergence", "NotConverged", "divergence", "solve"]

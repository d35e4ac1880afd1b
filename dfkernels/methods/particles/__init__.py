"""Variational inference with particles that have weights and velocities.

Use it for a law that is known by its log-density up to a constant, or by its score: a few hundred
particles, moved and weighted so that together they stand for it. Particles x_i with weights w_i and
velocities v_i follow a functional F of their law mu, such as KL(mu | target): with its first
variation Phi_i and the gradient G_i of that in x_i,

    dx_i/dt = A v_i,    dv_i/dt = -gamma v_i - (1/w_i) dT/dx_i - G_i
    dw_i/dt = -a w_i (Phi_i - sum_j w_j Phi_j)

A is the metric's: the identity (`Wasserstein`), the particles' covariance (`Kalman`), an average
over neighbours (`Stein`); T = sum_i w_i <v_i, A v_i>/2 is the kinetic energy. With friction=None
there are no velocities and dx_i/dt = -A G_i.

A `Flow` is put together of a functional (`KL`, `KSD`, `SinkhornDivergence`, `SVGD`), a metric and
what happens to the weights, and `evolve` runs it. Memory is that of the particles, not of their
pairs.

Sources: Wang, Chen, Xu, Chen, Wang & Liu, GAD-PVI (arXiv 2312.16429), for the flow with all three;
Zhang, Li, Wang, ..., DPVI (arXiv 2112.00945), for the weights; Wang & Li, Accelerated information
gradient flow (2019), for the metrics; Carrillo, Craig & Patacchini, A blob method for diffusion
(2017), for "blob"; Liu et al., Understanding and accelerating particle-based variational inference
(2018), for "gfsd"; Korba et al., Kernel Stein discrepancy descent (2021), for `KSD`; Liu & Wang,
Stein variational gradient descent (2016), for `SVGD`.
"""

from __future__ import annotations

from .bandwidth import bandwidth
from .evolve import Evolution, evolve
from .flow import Flow
from .kl import KL
from .ksd import KSD
from .metrics import Kalman, Metric, Stein, Wasserstein
from .sinkhorn_divergence import SinkhornDivergence
from .state import Particles
from .svgd import SVGD
from .variation import Variation

__all__ = [
    "KL",
    "KSD",
    "SVGD",
    "Evolution",
    "Flow",
    "Kalman",
    "Metric",
    "Particles",
    "SinkhornDivergence",
    "Stein",
    "Variation",
    "Wasserstein",
    "bandwidth",
    "evolve",
]

"""Reflow: a flow that is trained again on its own pairs of noise and sample, so that its paths get
straight and few steps suffice; with what keeps it from collapsing.

A rectified flow transports noise x_0 to data x_1 along

    x_t = (1 - t) x_0 + t x_1,   dx_t/dt = v(x_t, t) = E[x_1 - x_0 | x_t]

and round k trains v on the pairs (x_0, flow of round k - 1 from x_0) of `pairs`. An exact v keeps
the law of the data at every round. A network's does not: the error that it makes once it makes
again in every round, on what the last one left. Real data in the mixture keep it: as pairs (x_0,
x_1) on the paths of a flow, which `reverse_pairs` makes, so that they do not bend the paths as
fresh noise does; of the first round's flow (the anchor), since pairs of the present one repeat what
it knows.

    noise  = torch.randn(5000, 2, generator=generator)
    made   = pairs(current, noise, t)                          # synthetic
    real   = reverse_pairs(anchor, data, t, generator)         # real data, and where they come from
    both   = mix(made, real, 0.3, generator)                   # 30 % real
    losses = loss(denoiser, both[rows], generator)             # what a round minimises

`rounds` repeats this, from checkpoints where it was interrupted. `straightness` says how straight
the paths are, `straightness_of_pairs` how straight any network could make them, and `exact` is the
next flow of stored pairs without a network.

Every schedule is this one in other coordinates: with t = alpha/(alpha + sigma) and x_t = x/(alpha +
sigma) its probability-flow ODE has the velocity v, in which DDIM is Euler's method. So the flow may
be a `Denoiser` of any schedule, and "t" of this page is 1 - t of those with noise at t = 1.

Sources: Liu, Gong & Liu, Flow straight and fast (2022, arXiv 2209.03003), for reflow and
straightness; Zhu et al., Analyzing and mitigating model collapse in rectified flow models (2024,
arXiv 2412.08175), for reverse pairs of real data against collapse. Their mixture as printed (eq. 11
of the first version) adds independent samples to each other, which no law survives; `mix` mixes
pairs.
"""

from __future__ import annotations

from ._straight import velocity
from .exact import exact
from .loss import loss
from .pairs import Pairs, mix, pairs, reverse_pairs
from .rounds import rounds
from .straightness import Straightness, straightness, straightness_of_pairs

__all__ = [
    "Pairs",
    "Straightness",
    "exact",
    "loss",
    "mix",
    "pairs",
    "reverse_pairs",
    "rounds",
    "straightness",
    "straightness_of_pairs",
    "velocity",
]

"""Noise schedules x_t = alpha_t x_0 + sigma_t eps: t -> alpha, sigma, f, g2.

Every schedule obeys f = d ln(alpha)/dt and g2 = d(sigma^2)/dt - 2 f sigma^2 (closed forms, no
differencing), so that the probability-flow ODE dx/dt = f x - (g2/2) score carries the marginals
q_t. Calling a schedule gives (alpha, sigma).

t is a number or a tensor of any shape; results are tensors of t's shape, device and dtype. Numbers,
integers and NumPy arrays are taken too: numbers and integers count as float64, whatever torch's
default dtype and device are. A t outside the range raises ValueError in eager CPU code; on an
accelerator, under torch.compile and under vmap the values are not looked at, since that would
synchronise or break the graph.
"""

from __future__ import annotations

from ._base import Schedule
from ._exploding import EDM, VE, GeometricVE
from ._flow import RectifiedFlow, ReversedRectifiedFlow
from ._preserving import VP, Cosine, SubVP
from ._tabulated import Tabulated, TabulatedVE

__all__ = [
    "EDM",
    "VE",
    "VP",
    "Cosine",
    "GeometricVE",
    "RectifiedFlow",
    "ReversedRectifiedFlow",
    "Schedule",
    "SubVP",
    "Tabulated",
    "TabulatedVE",
]

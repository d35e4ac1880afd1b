"""The 2-D sets of the NSGF experiment, each with the scale of the code that it comes from.

    8gaussians    FFJORD: 8 centres on a circle of radius 4, standard deviation 0.5, all over 1.414
    moons         torchcfm: scikit-learn's two moons, noise 0.2, then 3 x - 1
    scurve        scikit-learn's S curve, noise 0.05, the first and the last coordinate
    checkerboard  FFJORD: 8 squares of side 2 in [-4, 4]^2 (chessboard.py)

The paper gives no scale. Sources are standard normal, but for 8gaussians-moons, which goes from
8gaussians to moons.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dfkernels.methods.nsgf.trajectories import Draw

from . import chessboard

__all__ = ["SETS", "Set"]


class Set(NamedTuple):
    """A source and a target, each (n, generator) -> [n, 2] in float32; whose scale they have; and
    the standard deviation of a coordinate of the target."""

    source: Draw
    target: Draw
    scale: str
    std: float

    @property
    def blur(self) -> float:
        """Of the flow: a quarter of the spread."""
        return self.std / 4


def normal(n: int, generator: torch.Generator) -> Tensor:
    return torch.randn(n, 2, generator=generator)


def eight_gaussians(n: int, generator: torch.Generator) -> Tensor:
    angle = torch.randint(8, (n,), generator=generator) * (math.pi / 4)
    centres = 4 * torch.stack([angle.cos(), angle.sin()], 1)
    return (centres + 0.5 * torch.randn(n, 2, generator=generator)) / 1.414


def moons(n: int, generator: torch.Generator) -> Tensor:
    angle = math.pi * torch.rand(n, generator=generator)
    inner = torch.randint(2, (n,), generator=generator)[:, None]
    outer_moon = torch.stack([angle.cos(), angle.sin()], 1)
    inner_moon = torch.stack([1 - angle.cos(), 0.5 - angle.sin()], 1)
    x = torch.where(inner == 1, inner_moon, outer_moon)
    return 3 * (x + 0.2 * torch.randn(n, 2, generator=generator)) - 1


def s_curve(n: int, generator: torch.Generator) -> Tensor:
    t = 3 * math.pi * (torch.rand(n, generator=generator) - 0.5)
    x = torch.stack([t.sin(), t.sign() * (t.cos() - 1)], 1)
    return x + 0.05 * torch.randn(n, 2, generator=generator)


SETS = {
    "8gaussians": Set(normal, eight_gaussians, "FFJORD", 2.03),
    "8gaussians-moons": Set(eight_gaussians, moons, "FFJORD to torchcfm", 2.2),
    "moons": Set(normal, moons, "torchcfm", 2.2),
    "scurve": Set(normal, s_curve, "scikit-learn", 1.1),
    "checkerboard": Set(normal, chessboard.sample, "FFJORD", 2.31),
}
